"""Milvus for tests: milvus-lite, which starts in a second, and the real server, from pip.

The real server runs in a network namespace, see `milvus_namespace`.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest

from tests.tls import Certificate

_STARTS_IN_S = {"milvus-lite": 60, "milvus": 240}
#: The administrator's of the real server, which asks for one.
TOKEN = "root:Milvus"
_PROGRAM = str(Path(__file__).with_name("milvus_namespace.py"))


class MilvusServer:
    """A server that can be killed and started again."""

    #: The package.
    name = "milvus"
    token = TOKEN

    def __init__(self, certificate: Certificate | None = None) -> None:
        self.place = Path(tempfile.mkdtemp(prefix="sbtk-milvus-"))
        self._certificate = certificate
        self.port = _free_port()
        self._process: subprocess.Popen[bytes] | None = None
        try:
            self.start()
        except BaseException:
            self.close()
            raise

    @property
    def pid(self) -> int:
        """The process group of the server."""
        assert self._process is not None
        return self._process.pid

    def url(self, database: str = "", **options: str) -> str:
        """Return the URL of a database."""
        query = "".join(f"{'&' if i else '?'}{k}={v}" for i, (k, v) in enumerate(options.items()))
        user = f"{self.token}@" if self.token else ""
        scheme = "https" if self._certificate else "milvus"
        return f"{scheme}://{user}127.0.0.1:{self.port}/{database}{query}"

    def client(self, database: str = "") -> Any:
        """Return a client of the administrator."""
        os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # as sbtk does, before gRPC is loaded
        from pymilvus import MilvusClient

        safe = self._certificate
        uri = f"{'https' if safe else 'http'}://127.0.0.1:{self.port}"
        known = {"server_pem_path": str(safe.authority)} if safe else {}
        options = {"token": self.token, "db_name": database, **known}
        return MilvusClient(uri, **options, dedicated=True, timeout=5)

    def make_database(self, name: str) -> str:
        """Make an empty database, and return its URL."""
        with contextlib.closing(self.client()) as client:
            client.create_database(name)
        return self.url(name)

    def drop_database(self, name: str) -> None:
        """Drop a database and its collections."""
        with contextlib.closing(self.client(name)) as client:
            for collection in client.list_collections():
                client.drop_collection(collection)
            client.drop_database(name)

    def count_regions(self, database: str, collection: str) -> tuple[int, int]:
        """Return how many regions of how many photos a collection has."""
        with contextlib.closing(self.client(database)) as client:
            rows = client.query(
                f"{collection}_regions",
                "number >= 0",
                output_fields=["photo"],
                limit=16_384,
                consistency_level="Strong",
            )
        return len(rows), len({row["photo"] for row in rows})

    def command(self) -> list[str]:
        """Return the command that starts the server."""
        tls = self._certificate
        files = [str(tls.cert), str(tls.key)] if tls else []
        return [sys.executable, _PROGRAM, str(self.place), str(self.port), *files]

    def start(self) -> None:
        """Start the server, and return when it answers."""
        self._process = subprocess.Popen(
            self.command(),
            stdout=(self.place / "log").open("ab"),
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        ends = time.monotonic() + _STARTS_IN_S[self.name]
        while True:
            try:
                with contextlib.closing(self.client()) as client:
                    client.list_collections(timeout=5)
                return
            except Exception as problem:
                if self._process.poll() is not None or time.monotonic() > ends:
                    log = (self.place / "log").read_text()
                    raise RuntimeError(f"{problem}\n{log}") from problem
                time.sleep(0.1)

    def kill(self) -> None:
        """End all processes of the server at once, as a power cut does."""
        assert self._process is not None
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def freeze(self) -> None:
        """Stop all processes of the server, which then do not answer."""
        assert self._process is not None
        os.killpg(self._process.pid, signal.SIGSTOP)

    def thaw(self) -> None:
        """Let the server go on."""
        assert self._process is not None
        os.killpg(self._process.pid, signal.SIGCONT)

    def close(self) -> None:
        """End the server and remove its files."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                self.kill()
        shutil.rmtree(self.place, ignore_errors=True)


class LiteServer(MilvusServer):
    """milvus-lite, which has the same interface, but neither codes nor users."""

    name = "milvus-lite"
    token = ""

    def command(self) -> list[str]:
        """Return the command that starts the server."""
        return [
            *(sys.executable, "-m", "milvus_lite.cmdline", "server"),
            *("--data-dir", str(self.place / "data")),
            *("--host", "127.0.0.1", "--port", str(self.port)),
        ]


@functools.cache
def why_no_lite() -> str | None:
    """Return why there is no milvus-lite here; `None` if there is."""
    if importlib.util.find_spec("pymilvus") and importlib.util.find_spec("milvus_lite"):
        return None
    return "the packages pymilvus and milvus-lite are not installed"


@functools.cache
def why_no_server() -> str | None:
    """Return why the real server cannot run here; `None` if it can."""
    if importlib.util.find_spec("pymilvus") is None or importlib.util.find_spec("milvus") is None:
        return "the packages pymilvus and milvus (2.3.5, for x86-64) are not installed"
    tried = subprocess.run([sys.executable, _PROGRAM], capture_output=True, text=True)
    if tried.returncode:
        return f"no network namespace can be made here: {tried.stderr.strip()[-200:]}"
    return None


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        return int(listening.getsockname()[1])


_NO_LITE, _NO_SERVER = why_no_lite(), why_no_server()
#: Skips tests where there is no milvus-lite.
NEEDS_LITE = pytest.mark.skipif(_NO_LITE is not None, reason=str(_NO_LITE))
#: Skips tests where the real server cannot run.
NEEDS_MILVUS = pytest.mark.skipif(_NO_SERVER is not None, reason=str(_NO_SERVER))
