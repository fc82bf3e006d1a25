"""A client of a served gallery, for valid and invalid requests."""

from __future__ import annotations

import contextlib
import http.client
import io
import json
import socket
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from tests.tiny import tiny_sketch


@dataclass(frozen=True)
class Answer:
    """What a server answered; header names are in lower case."""

    status: int
    headers: dict[str, str]
    body: bytes

    def json(self) -> Any:
        """Return the body's JSON."""
        assert self.headers["content-type"] == "application/json", self
        return json.loads(self.body)

    @property
    def code(self) -> str:
        """The code of an error, whose form is checked."""
        answer = self.json()
        assert set(answer) == {"error"}
        assert set(answer["error"]) == {"code", "message", "next"}
        assert answer["error"]["message"].endswith(".")
        return str(answer["error"]["code"])


def ask(
    port: int,
    path: str,
    method: str = "GET",
    body: bytes | None = None,
    headers: Mapping[str, str] | None = None,
) -> Answer:
    """Return the answer to one request on a connection of its own; the path goes as it is."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    with contextlib.closing(connection):
        connection.request(method, path, body, dict(headers or {}))
        answer = connection.getresponse()
        named = {name.lower(): value for name, value in answer.getheaders()}
        return Answer(answer.status, named, answer.read())


def query(port: int, image: bytes, parameters: str = "", media_type: str = "image/png") -> Answer:
    """Return the answer to a query with these bytes as its image."""
    return ask(port, f"/v1/query{parameters}", "POST", image, {"content-type": media_type})


@contextlib.contextmanager
def connected(port: int, timeout_s: float = 20.0) -> Iterator[socket.socket]:
    """Give the block a connection that has sent nothing yet."""
    with socket.create_connection(("127.0.0.1", port), timeout=timeout_s) as client:
        yield client


def all_received(client: socket.socket) -> bytes:
    """Return what comes until the server closes; a reset counts as the end."""
    received = bytearray()
    with contextlib.suppress(ConnectionError):
        while chunk := client.recv(1 << 16):
            received += chunk
    return bytes(received)


def post_head(port: int, *lines: str) -> bytes:
    """Return the head of a query that is written by hand, with these header lines too."""
    first = ["POST /v1/query HTTP/1.1", f"Host: 127.0.0.1:{port}", "Content-Type: image/png"]
    return "\r\n".join([*first, *lines, "", ""]).encode()


def png(image: Image.Image) -> bytes:
    """Return an image as the bytes of a PNG file."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def sketch_png(seed: int = 0) -> bytes:
    """Return a sketch as the bytes of a PNG file."""
    return png(tiny_sketch(seed))


def resident_bytes(pid: int) -> int:
    """Return the memory that a process holds now."""
    for line in Path("/proc", str(pid), "status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) << 10
    raise AssertionError(f"process {pid} has ended")
