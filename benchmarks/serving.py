"""A running server of a gallery, for benchmarks."""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.commands import ROOT, SBTK, environment, run_sbtk
from benchmarks.photos import add_photos_option, copy_photos

_STARTED_WITHIN_S = 120.0
_POLL_S = 0.05


@dataclass(frozen=True)
class Server:
    """A running `sbtk serve`; `ready_s` is the time from its start until it reports 'ok'."""

    port: int
    pid: int
    ready_s: float

    def health(self) -> dict[str, Any]:
        """Return the response of `/healthz`."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        with contextlib.closing(connection):
            connection.request("GET", "/healthz")
            found: dict[str, Any] = json.loads(connection.getresponse().read())
        return found

    def cpu_s(self) -> float:
        """Return the CPU seconds of the process."""
        fields = Path("/proc", str(self.pid), "stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def make_parser(description: str | None) -> argparse.ArgumentParser:
    """Return a parser with the options of `serve_gallery`, and `--json`."""
    parser = argparse.ArgumentParser(description=description)
    add_photos_option(parser)
    parser.add_argument("--count", type=int, default=1000, help="photos in the gallery")
    parser.add_argument("--model", help="bundle; by default the pretrained one")
    parser.add_argument("--json", action="store_true")
    return parser


@contextlib.contextmanager
def serve_gallery(options: argparse.Namespace) -> Iterator[tuple[Server, str]]:
    """Index and serve photos; yield the server and a description of the photos."""
    with serve_checkouts(options, [ROOT]) as ((server,), note):
        yield server, note


@contextlib.contextmanager
def serve_checkouts(
    options: argparse.Namespace, checkouts: Sequence[Path]
) -> Iterator[tuple[list[Server], str]]:
    """Index photos, and serve them with the code of each checkout."""
    with tempfile.TemporaryDirectory() as scratch, contextlib.ExitStack() as stack:
        note = copy_photos(options.photos, options.count, Path(scratch, "photos"))
        chosen = ["--gallery", str(Path(scratch, "gallery.sbtk")), "--quiet"]
        chosen += ["--model", options.model] if options.model else []
        run_sbtk("index", str(Path(scratch, "photos")), *chosen)
        yield [stack.enter_context(_served(chosen, root)) for root in checkouts], note


@contextlib.contextmanager
def _served(chosen: Sequence[str], root: Path) -> Iterator[Server]:
    command = [*SBTK, "serve", "--port", "0", *chosen]
    started = time.perf_counter()
    process = subprocess.Popen(command, env=environment(root), stdout=subprocess.PIPE, text=True)
    try:
        yield _ready(process, started)
    finally:
        process.terminate()
        process.wait()


def _ready(process: subprocess.Popen[str], started: float) -> Server:
    assert process.stdout is not None
    port = re.search(r":(\d+)/", process.stdout.readline())
    if port is None:
        sys.exit("sbtk serve did not start")
    server = Server(int(port[1]), process.pid, 0.0)
    while time.perf_counter() - started < _STARTED_WITHIN_S:
        with contextlib.suppress(OSError):
            if server.health()["status"] == "ok":
                return Server(server.port, server.pid, time.perf_counter() - started)
        time.sleep(_POLL_S)
    sys.exit("sbtk serve did not become ready")
