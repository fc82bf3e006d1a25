"""Connections that send too little, too much or invalid data, to a real server on loopback."""

from __future__ import annotations

import contextlib
import json
import logging
import socket
import threading
import time
from collections.abc import Iterator

import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from sbtk_runtime.web.server import MAX_CONNECTIONS, GuardedConnection, closing_unread
from tests.processes import run_python
from tests.serve_client import all_received

SMALL = b"GET /small HTTP/1.1\r\nHost: x\r\n\r\n"
LARGE_BYTES = 32 << 20
CHUNK_BYTES = 256 << 10


class Hasty(GuardedConnection):
    """Deadlines that tests can wait for."""

    limit = 8
    header_timeout_s = 0.4
    stall_timeout_s = 1.5
    linger_s = 0.4


async def _small(_: Request) -> PlainTextResponse:
    return PlainTextResponse("small")


async def _large(_: Request) -> Response:
    return StreamingResponse(bytes(CHUNK_BYTES) for _ in range(LARGE_BYTES // CHUNK_BYTES))


async def _size(request: Request) -> PlainTextResponse:
    try:
        return PlainTextResponse(str(len(await request.body())))
    except ClientDisconnect:
        return PlainTextResponse("nobody reads this")


@pytest.fixture(scope="module")
def server() -> Iterator[uvicorn.Server]:
    """Run a server of three paths; `/small` and `/large` read no body, `/size` does."""
    routes = [
        Route("/small", _small, methods=["GET", "POST"]),
        Route("/large", _large),
        Route("/size", _size, methods=["POST"]),
    ]
    config = uvicorn.Config(
        closing_unread(Starlette(routes=routes)),
        http=Hasty,
        ws="none",
        lifespan="off",
        log_config=None,
    )
    running = uvicorn.Server(config)
    listening = socket.create_server(("127.0.0.1", 0))
    config.port = listening.getsockname()[1]
    thread = threading.Thread(target=running.run, args=([listening],))
    thread.start()
    while not running.started:
        time.sleep(0.01)
    yield running
    running.should_exit = True
    thread.join(10)
    assert not thread.is_alive()


@pytest.fixture(autouse=True)
def unlogged(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Fail the test after an internal error of the server, or if it is left with a connection."""
    yield
    assert not [record.getMessage() for record in caplog.records if record.levelno > logging.INFO]


@contextlib.contextmanager
def connected(server: uvicorn.Server, receive_bytes: int | None = None) -> Iterator[socket.socket]:
    with socket.socket() as client:
        if receive_bytes is not None:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
        client.settimeout(5)
        client.connect(("127.0.0.1", server.config.port))
        yield client


def asked(client: socket.socket) -> bytes:
    """Return the whole answer to a small request; headers and body may come apart."""
    client.sendall(SMALL)
    received = b""
    while not received.endswith(b"\r\n\r\nsmall"):
        chunk = client.recv(1 << 16)
        assert chunk, received
        received += chunk
    return received


def status_of(answer: bytes) -> int:
    return int(answer.split(b" ", 2)[1])


def code_of(answer: bytes) -> str:
    return str(json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["code"])


def until_empty(server: uvicorn.Server) -> None:
    end = time.monotonic() + 20
    while server.server_state.connections:
        assert time.monotonic() < end, "a connection is left open"
        time.sleep(0.01)


def test_a_connection_that_sends_nothing_is_closed(server: uvicorn.Server) -> None:
    with connected(server) as client:
        started = time.monotonic()
        assert all_received(client) == b""
        assert 0.3 < time.monotonic() - started < 5
    until_empty(server)


def test_slow_headers_are_refused_even_if_they_keep_coming(server: uvicorn.Server) -> None:
    with connected(server) as client:
        started = time.monotonic()
        client.sendall(b"GET /small HTTP/1.1\r\nHost: x\r\n")
        with contextlib.suppress(ConnectionError):
            while time.monotonic() - started < 0.8:
                client.sendall(b"X: y\r\n")
                time.sleep(0.02)
        answer = all_received(client)
        assert status_of(answer) == 408
        assert code_of(answer) == "too_slow"
        assert b"x-content-type-options: nosniff" in answer
    until_empty(server)


def test_the_second_request_of_a_connection_has_a_deadline_too(server: uvicorn.Server) -> None:
    with connected(server) as client:
        assert status_of(asked(client)) == 200
        client.sendall(b"GET /sm")
        assert status_of(all_received(client)) == 408
    until_empty(server)


def test_consecutive_and_pipelined_requests_are_answered(server: uvicorn.Server) -> None:
    with connected(server) as client:
        for _ in range(3):
            assert status_of(asked(client)) == 200
            time.sleep(0.2)
        # And three at once.
        client.sendall(SMALL * 3)
        received = b""
        while received.count(b"small") < 3:
            received += client.recv(1 << 16)
    until_empty(server)


def test_answers_do_not_wait_for_the_client_to_acknowledge_their_headers(
    server: uvicorn.Server,
) -> None:
    with connected(server) as client:
        assert status_of(asked(client)) == 200
        (connection,) = server.server_state.connections
        accepted = connection.transport.get_extra_info("socket")
        assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
    until_empty(server)


def test_an_unread_body_closes_the_connection_after_the_response(
    server: uvicorn.Server,
) -> None:
    with connected(server) as client:
        client.sendall(b"POST /small HTTP/1.1\r\nHost: x\r\nContent-Length: 4000000000\r\n\r\n")
        started = time.monotonic()
        sent = 0
        with contextlib.suppress(ConnectionError):
            while time.monotonic() - started < 8:
                sent += client.send(bytes(1 << 20))
        assert time.monotonic() - started < 6
        assert sent < 200 << 20
    with connected(server) as client:
        client.sendall(b"POST /small HTTP/1.1\r\nHost: x\r\nContent-Length: 900000\r\n\r\n")
        # An honest client of the same kind sends all it has, and still reads its answer.
        client.sendall(bytes(800_000))
        assert all_received(client).endswith(b"small")
    until_empty(server)


def test_a_body_that_is_read_keeps_the_connection_open(server: uvicorn.Server) -> None:
    with connected(server) as client:
        for _ in range(2):
            client.sendall(b"POST /size HTTP/1.1\r\nHost: x\r\nContent-Length: 300000\r\n\r\n")
            client.sendall(bytes(300_000))
            received = b""
            while not received.endswith(b"\r\n\r\n300000"):
                received += client.recv(1 << 16)
    until_empty(server)


CHUNKED = b"4\r\nabcd\r\n0\r\n\r\n"
LENGTHS = [b"Content-Length: 4", b"Transfer-Encoding: chunked"]


@pytest.mark.parametrize("path", [b"/size", b"/small", b"/nothing"])
@pytest.mark.parametrize("order", [1, -1])
def test_a_request_with_two_lengths_closes_the_connection(
    server: uvicorn.Server, path: bytes, order: int
) -> None:
    """What follows may be a part of it that a proxy in front took for its body."""
    head = b"\r\n".join([b"POST " + path + b" HTTP/1.1", b"Host: x", *LENGTHS[::order], b"", b""])
    with connected(server) as client:
        client.sendall(head + CHUNKED + SMALL)
        answer = all_received(client)
    assert answer.count(b"HTTP/1.1 ") == 1
    assert b"connection: close" in answer.partition(b"\r\n\r\n")[0]
    if path == b"/size":
        assert status_of(answer) == 200 and answer.endswith(b"\r\n\r\n4")
    until_empty(server)


def test_a_client_that_does_not_read_its_response_is_disconnected(server: uvicorn.Server) -> None:
    with connected(server, receive_bytes=4096) as client:
        client.sendall(b"GET /large HTTP/1.1\r\nHost: x\r\n\r\n")
        assert client.recv(1)
        until_empty(server)
        assert len(all_received(client)) < LARGE_BYTES


def test_a_slow_reader_gets_its_complete_response(server: uvicorn.Server) -> None:
    with connected(server) as client:
        client.sendall(b"GET /large HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        received = 0
        while chunk := client.recv(1 << 20):
            received += len(chunk)
            time.sleep(0.01)
        assert received > LARGE_BYTES
    until_empty(server)


@pytest.mark.parametrize(
    "nonsense",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(100),
        b"GET /\x00 HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET / HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\nHost: y\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\nX: " + b"y" * 70_000,
        b"\r\n\r\n\r\n",
        *(
            b"POST /size HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n" + chunks
            for chunks in (
                b"not a number\r\n",
                b"-1\r\n",
                b"0x4\r\nabcd\r\n",
                b"4\r\nabcdefgh",
                b"4\r\nabcd\r\n\r\n\r\n",
                b"f" * 30 + b"\r\n",
            )
        ),
    ],
)
def test_invalid_http_is_refused(
    server: uvicorn.Server, nonsense: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    with connected(server) as client:
        client.sendall(nonsense)
        answer = all_received(client)
    assert status_of(answer) == 400
    assert b"Invalid HTTP request received." in answer
    assert b"connection: close" in answer.partition(b"\r\n\r\n")[0].lower()
    assert {record.getMessage() for record in caplog.records} <= {"Invalid HTTP request received."}
    caplog.clear()
    until_empty(server)


def test_connections_over_the_limit_get_a_503_and_later_ones_are_served(
    server: uvicorn.Server,
) -> None:
    with contextlib.ExitStack() as stack:
        first = [stack.enter_context(connected(server)) for _ in range(Hasty.limit)]
        for client in first:
            assert status_of(asked(client)) == 200
        late = stack.enter_context(connected(server))
        late.sendall(SMALL)
        answer = all_received(late)
        assert status_of(answer) == 503
        assert code_of(answer) == "busy"
        assert b"retry-after: " in answer
        assert status_of(asked(first[0])) == 200
    until_empty(server)
    with connected(server) as client:
        assert status_of(asked(client)) == 200
    until_empty(server)


def test_the_limit_leaves_files_for_everything_else() -> None:
    import resource

    def limit_with(soft: int, hard: int) -> tuple[int, int]:
        code = "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, ({}, {})); "
        code += "from sbtk_runtime.web.server import connection_limit as limit; "
        code += "print(limit(), resource.getrlimit(resource.RLIMIT_NOFILE)[0])"
        limit, files = run_python(code.format(soft, hard)).split()
        return int(limit), int(files)

    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    assert limit_with(100, 100) == (1, 100)
    assert limit_with(428, 428) == (100, 428)
    assert limit_with(200, 728) == (200, 728)
    limit, files = limit_with(256, most)
    assert limit == MAX_CONNECTIONS or files == most
    assert files >= 3 * limit + 128
