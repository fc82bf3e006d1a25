"""Clients that send endlessly, very slowly, or all at once, to a real server of a gallery."""

from __future__ import annotations

import asyncio
import contextlib
import json
import resource
import signal
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.serve_client import (
    all_received,
    ask,
    connected,
    post_head,
    query,
    resident_bytes,
    sketch_png,
)
from tests.serve_process import ServeProcess, serving
from tests.tiny import tiny_bundle, write_photos
from tests.tiny_gallery import index

pytestmark = pytest.mark.kill

CAP_BYTES = 8 << 20
DEADLINE_S = 10.0


@dataclass
class SlowClient:
    """A client that sends a byte now and then; `answer` and `ended_s` are there at its end."""

    answer: bytes = b""
    ended_s: float = 0.0
    thread: threading.Thread = field(default_factory=threading.Thread)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServeProcess]:
    folder = tmp_path_factory.mktemp("flooded")
    write_photos(folder / "photos", 12)
    bundle = tiny_bundle(folder / "bundles" / "tiny")
    index(folder / "gallery.sbtk", folder / "photos", bundle)
    options = ("--model", str(bundle), "--engine", "onnxruntime", "--threads", "1")
    with serving(folder / "gallery.sbtk", *options, log=folder / "log") as process:
        process.wait_until_ready()
        yield process
        assert process.process.poll() is None, "the server has died"
        assert_serving(process)
        log = process.log.read_text()
    assert "Traceback" not in log
    assert len(log) < 5_000, log


@pytest.fixture(scope="module", autouse=True)
def slow_clients(served: ServeProcess) -> dict[str, SlowClient]:
    """Return clients that are slow while all other tests of this file run."""
    port = served.port
    return {
        "nothing": _slow(port, b"", b""),
        "headers": _slow(port, b"GET / HTTP/1.1\r\n", b"X: y\r\n"),
        "body": _slow(port, post_head(port, "Content-Length: 100000"), b"x"),
        "chunks": _slow(port, post_head(port, "Transfer-Encoding: chunked"), b"1\r\nx\r\n"),
    }


def _slow(port: int, first: bytes, then: bytes) -> SlowClient:
    client = SlowClient()

    def run() -> None:
        started = time.monotonic()
        with connected(port, timeout_s=0.2) as connection:
            connection.sendall(first)
            while time.monotonic() - started < 3 * DEADLINE_S:
                try:
                    received = connection.recv(1 << 16)
                    client.answer += received
                    if not received:
                        break
                except TimeoutError:
                    with contextlib.suppress(OSError):
                        connection.sendall(then)
                except ConnectionError:
                    break
        client.ended_s = time.monotonic() - started

    client.thread = threading.Thread(target=run)
    client.thread.start()
    return client


def assert_serving(served: ServeProcess) -> None:
    """Make sure that an honest client gets its answer at once."""
    started = time.monotonic()
    answer = query(served.port, sketch_png(), "?k=3")
    assert answer.status == 200
    assert len(answer.json()["hits"]) == 3
    assert time.monotonic() - started < 5


def grown_bytes(served: ServeProcess, act: Callable[[], None]) -> int:
    """Return by how much the server's memory grew at most while `act` ran."""
    before, peak, done = resident_bytes(served.process.pid), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.02):
            peak = max(peak, resident_bytes(served.process.pid))

    watching = threading.Thread(target=watch)
    watching.start()
    try:
        act()
    finally:
        done.set()
        watching.join()
    return peak - before


def test_a_body_of_two_gigabytes_is_refused_before_it_is_sent(served: ServeProcess) -> None:
    with connected(served.port) as client:
        client.sendall(post_head(served.port, "Content-Length: 2000000000"))
        answer = all_received(client)
    assert answer.startswith(b"HTTP/1.1 413 ")
    assert b'"body_too_large"' in answer


def test_an_endless_body_is_cut_off_at_the_limit(served: ServeProcess) -> None:
    chunk = b"100000\r\n" + bytes(1 << 20) + b"\r\n"
    answers = []

    def send_without_end() -> None:
        with connected(served.port) as client:
            client.sendall(post_head(served.port, "Transfer-Encoding: chunked"))
            sent = 0
            with contextlib.suppress(ConnectionError):
                while sent < 2 << 30:
                    sent += client.send(chunk)
            assert sent < 256 << 20
            answers.append(all_received(client))

    assert grown_bytes(served, send_without_end) < 64 << 20
    # A client that stops sending at the answer, as libraries do, gets to read it.
    with connected(served.port) as client:
        client.sendall(post_head(served.port, "Transfer-Encoding: chunked") + chunk * 9)
        answer = all_received(client)
    assert answer.startswith(b"HTTP/1.1 413 ")
    assert b'"body_too_large"' in answer


def test_a_body_of_the_largest_size_is_read(served: ServeProcess) -> None:
    image = sketch_png()
    assert query(served.port, image + bytes(CAP_BYTES - len(image))).status == 200
    over = query(served.port, image + bytes(CAP_BYTES - len(image) + 1))
    assert (over.status, over.code) == (413, "body_too_large")


def test_an_unread_body_is_dropped_only_up_to_a_limit(served: ServeProcess) -> None:
    for path in ("/nothing", "/v1/gallery", "/"):
        with connected(served.port) as client:
            head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 4000000000\r\n\r\n"
            client.sendall(head.encode())
            started = time.monotonic()
            with contextlib.suppress(ConnectionError):
                while time.monotonic() - started < 10:
                    client.send(bytes(1 << 18))
            assert time.monotonic() - started < 8


def test_a_compressed_body_is_not_expanded(served: ServeProcess) -> None:
    import gzip

    headers = {"content-type": "image/png", "content-encoding": "gzip"}
    bomb = gzip.compress(bytes(64 << 20))
    answer = ask(served.port, "/v1/query", "POST", bomb, headers)
    assert (answer.status, answer.code) == (400, "bad_image")


def test_clients_that_hang_up_leave_nothing_behind(served: ServeProcess) -> None:
    image = sketch_png()
    request = post_head(served.port, f"Content-Length: {len(image)}") + image
    for end in (0, 10, len(request) // 2, len(request)):
        for _ in range(25):
            with connected(served.port) as client:
                client.sendall(request[:end])
    assert_serving(served)


def test_a_thousand_queries_at_once_are_answered_or_get_a_503(
    served: ServeProcess,
) -> None:
    counts: Counter[int] = Counter()

    def flood() -> None:
        for status, headers, body in asyncio.run(_queries(served.port, 1_000)):
            counts[status] += 1
            if status == 503:
                assert b"retry-after: " in headers
                assert json.loads(body)["error"]["code"] == "busy"
            else:
                assert status == 200, body
                assert json.loads(body)["hits"]

    grown = grown_bytes(served, flood)
    assert sum(counts.values()) == 1_000
    assert counts[200] >= 20
    assert grown < 300 << 20
    assert_serving(served)


async def _queries(port: int, count: int) -> list[tuple[int, bytes, bytes]]:
    """Return status, headers and body of that many queries at once."""
    image = sketch_png()
    request = post_head(port, f"Content-Length: {len(image)}", "Connection: close") + image

    async def one() -> tuple[int, bytes, bytes]:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        try:
            writer.write(request)
            answer = await asyncio.wait_for(reader.read(), 60)
        finally:
            writer.close()
        head, _, body = answer.partition(b"\r\n\r\n")
        return int(head.split(b" ", 2)[1]), head.lower(), body

    return list(await asyncio.gather(*(one() for _ in range(count))))


def test_ten_thousand_connections_do_not_stop_the_server(served: ServeProcess) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 10_000 if hard == resource.RLIM_INFINITY else min(10_000, hard - 500)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, wanted + 500), hard))
    clients: list[socket.socket] = []

    def connect() -> None:
        address = ("127.0.0.1", served.port)
        try:
            for _ in range(wanted):
                client = socket.socket()
                client.setblocking(False)
                clients.append(client)
                client.connect_ex(address)
            time.sleep(1)
        finally:
            for client in clients:
                client.close()

    try:
        grown = grown_bytes(served, connect)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert len(clients) == wanted
    assert grown < 200 << 20
    end = time.monotonic() + 60
    while time.monotonic() < end:
        with contextlib.suppress(OSError, AssertionError):
            assert_serving(served)
            return
        time.sleep(0.1)
    raise AssertionError("it does not serve again")


def test_more_connections_than_open_files_are_refused_quietly(
    served: ServeProcess,
) -> None:
    folder = served.log.parent
    options = ("--model", str(folder / "bundles" / "tiny"), "--engine", "onnxruntime")
    log = folder / "log-of-few-files"
    with (
        serving(folder / "gallery.sbtk", *options, log=log, most_files=400) as process,
        contextlib.ExitStack() as crowd,
    ):
        process.wait_until_ready()
        # All of them come while it looks away.
        process.process.send_signal(signal.SIGSTOP)
        try:
            for _ in range(1_000):
                client = crowd.enter_context(socket.socket())
                client.setblocking(False)
                client.connect_ex(("127.0.0.1", process.port))
        finally:
            process.process.send_signal(signal.SIGCONT)
        answer = None
        while answer is None:
            with contextlib.suppress(OSError):
                answer = ask(process.port, "/healthz")
        assert answer.status in (200, 503)
        crowd.close()
        _until_status(process, 200)
    said = log.read_text()
    assert "Traceback" not in said
    assert len(said) < 1_000


def test_slow_clients_were_refused_or_closed_in_time_while_others_were_served(
    served: ServeProcess, slow_clients: dict[str, SlowClient]
) -> None:
    for name, client in slow_clients.items():
        client.thread.join(2 * DEADLINE_S)
        assert not client.thread.is_alive(), name
        assert DEADLINE_S - 1 < client.ended_s < DEADLINE_S + 15, name
    assert slow_clients["nothing"].answer == b""
    for name in ("headers", "body", "chunks"):
        assert slow_clients[name].answer.startswith(b"HTTP/1.1 408 "), name
        assert b'"too_slow"' in slow_clients[name].answer
    assert_serving(served)


def test_the_gallerys_folder_can_be_removed_and_return(
    served: ServeProcess, tmp_path: Path
) -> None:
    gallery = served.log.parent / "gallery.sbtk"
    gallery.rename(tmp_path / "away")
    try:
        _until_status(served, 503)
        answer = query(served.port, sketch_png())
        assert (answer.status, answer.code) == (503, "gallery_gone")
        assert served.health()[0] == 503
    finally:
        (tmp_path / "away").rename(gallery)
    _until_status(served, 200)


def _until_status(served: ServeProcess, status: int) -> None:
    end = time.monotonic() + 30
    while True:
        with contextlib.suppress(OSError):
            if query(served.port, sketch_png()).status == status:
                return
        assert time.monotonic() < end
        time.sleep(0.05)
