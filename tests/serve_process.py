"""`sbtk serve` as a separate process, on a free port of this machine."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

_STARTED_WITHIN_S = 60.0
_STOPPED_WITHIN_S = 20.0


@dataclass(frozen=True)
class ServeProcess:
    """A running server; `log` is the file that its outputs go to."""

    port: int
    process: subprocess.Popen[bytes]
    log: Path

    @property
    def origin(self) -> str:
        """The address of its page, without a slash at the end."""
        return f"http://127.0.0.1:{self.port}"

    def health(self) -> tuple[int, dict[str, object]]:
        """Return status and body of `/healthz`."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        with contextlib.closing(connection):
            connection.request("GET", "/healthz")
            answer = connection.getresponse()
            return answer.status, json.loads(answer.read())

    def wait_until_ready(self) -> None:
        """Wait until the engine is loaded."""
        self.wait_for(lambda: self.health()[0] == 200)

    def wait_until_listening(self) -> None:
        """Wait until it answers, be it that its engine is still loading."""
        self.wait_for(lambda: bool(self.health()))

    def wait_for(self, is_so: Callable[[], bool]) -> None:
        """Wait until the server is so; a request that fails is repeated."""
        end = time.monotonic() + _STARTED_WITHIN_S
        while time.monotonic() < end:
            assert self.process.poll() is None, self.log.read_text()
            with contextlib.suppress(OSError):
                if is_so():
                    return
            time.sleep(0.05)
        raise AssertionError(f"not within {_STARTED_WITHIN_S:.0f} s\n{self.log.read_text()}")

    def stop(self) -> int:
        """Stop it as a service manager does, and return its exit code."""
        if self.process.poll() is None:
            self.process.terminate()
        try:
            return self.process.wait(_STOPPED_WITHIN_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise


@contextlib.contextmanager
def serving(
    gallery: Path | None,
    *options: str,
    log: Path,
    port: int | None = None,
    cwd: Path | None = None,
    most_files: int | None = None,
) -> Iterator[ServeProcess]:
    """Start `sbtk serve` with these options, wait until it listens, and stop it at the end.

    Args:
        gallery: the folder of the gallery; `None` if the options name a collection.
        options: of the command.
        log: the file that its outputs go to.
        port: a free one if `None`.
        cwd: where it runs; beside the gallery if `None`.
        most_files: how many files the system lets it open.
    """
    chosen = port or free_port()
    command = [sys.executable, "-P", "-m", "sbtk_cli", "serve"]
    command += [] if gallery is None else ["--gallery", str(gallery)]
    command += ["--port", str(chosen), *options]
    if most_files is not None:
        command = ["sh", "-c", f'ulimit -n {most_files} && exec "$0" "$@"', *command]
    left_out = {"SBTK_GALLERY", "SBTK_AT", "SBTK_DATA", "SBTK_WEIGHTS"}
    environment = {key: value for key, value in os.environ.items() if key not in left_out}
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            stdout=output,
            stderr=output,
            env=environment,
            cwd=cwd or (log if gallery is None else gallery).parent,
        )
    served = ServeProcess(chosen, process, log)
    try:
        served.wait_until_listening()
        yield served
    finally:
        served.stop()


def free_port() -> int:
    """Return a port of the loopback address that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
