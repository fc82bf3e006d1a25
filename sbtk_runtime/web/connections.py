"""Limits on the connections of the server: how many, how slow, and how they end."""

from __future__ import annotations

import asyncio
import contextlib
import http
import socket
from contextvars import ContextVar
from typing import Any, ClassVar, cast

import h11
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from sbtk_runtime.web.refusals import Refusal, security_headers

MAX_CONNECTIONS = 1_024

# The most bytes that are read and dropped after the response.
_LINGER_BYTES = 64 << 20
# File descriptors for everything but connections.
_OTHER_FILES = 128
# asyncio accepts the whole backlog at once, and this often before the first of these connections
# can be refused.
_TURNS = 4

_TOO_MANY = Refusal(
    503,
    "busy",
    "Too many connections are open.",
    "try again in a moment",
    retry_after_s=1,
    closes=True,
)
_SLOW_HEADERS = Refusal(
    408,
    "too_slow",
    "The request's headers took too long.",
    "send them again",
    closes=True,
)


def connection_limit() -> int:
    """Raise the limit of open files, and return the number of connections to serve.

    It is `MAX_CONNECTIONS`, or less if the system allows fewer files. Three times as many files are
    reserved: for served connections, for refused ones, and for `accepted_at_once`.
    """
    try:
        import resource
    except ImportError:  # Windows has no such limit
        return MAX_CONNECTIONS
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 3 * MAX_CONNECTIONS + _OTHER_FILES
    if soft != resource.RLIM_INFINITY and soft < wanted:
        raised = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (raised, hard))
            soft = raised
    if soft == resource.RLIM_INFINITY:
        return MAX_CONNECTIONS
    return max(1, min(MAX_CONNECTIONS, (soft - _OTHER_FILES) // 3))


def accepted_at_once(limit: int) -> int:
    """Return the backlog of the socket for a server of `limit` connections.

    With a longer backlog, a flood uses up all files before the first connection is refused, and
    asyncio prints a traceback for each of the others.
    """
    return max(1, limit // _TURNS)


class GuardedConnection(asyncio.Protocol):
    """A connection with limits, around uvicorn's: `uvicorn.Config(http=GuardedConnection)`.

    It limits the time for headers and the number of connections (others get a 503), closes
    connections of clients that do not read the response, and lets the client read the response
    before a connection closes. The application must be wrapped by `closing_unread`.

    Attributes:
        limit: the most connections that are served at once.
        header_timeout_s: from the start of the connection, or the first byte of a request.
        stall_timeout_s: time for the client to read a chunk of the response.
        linger_s: how long data are read and dropped after the response.
    """

    limit = MAX_CONNECTIONS
    header_timeout_s = 10.0
    stall_timeout_s = 30.0
    linger_s = 2.0
    _open: ClassVar[set[GuardedConnection]] = set()

    def __init__(self, **of_uvicorn: Any) -> None:
        self._served = H11Protocol(**of_uvicorn)
        self._transport: _LingeringTransport
        self._header_timer: asyncio.TimerHandle | None = None
        self._stall_timer: asyncio.TimerHandle | None = None
        self._running_requests = 0
        self._has_partial_headers = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Accept a connection, or refuse it if there are too many."""
        real = cast(asyncio.Transport, transport)
        _set_no_delay(real)
        self._transport = _LingeringTransport(real, self.linger_s, self.stall_timeout_s)
        self._open.add(self)
        self._served.connection_made(cast(asyncio.Transport, self._transport))
        if len(self._open) > 2 * self.limit:
            real.abort()
        elif len(self._open) > self.limit:
            self._refuse(_TOO_MANY)
        else:
            self._start_header_timer()

    def data_received(self, data: bytes) -> None:
        """Pass data on, unless the connection is closing."""
        if self._transport.is_closing():
            self._transport.drop(len(data))
            return
        if not self._running_requests:
            # Further data do not reset the timer: single bytes are not progress.
            self._has_partial_headers = True
            self._start_header_timer()
        # The task of a request is created in this context.
        _CONNECTION.set(self)
        try:
            self._served.data_received(data)
        except h11.LocalProtocolError:
            # What came is not HTTP, and another response is being sent.
            self._transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        """Remove the connection and its timers."""
        self._open.discard(self)
        self._stop_header_timer()
        self.resume_writing()
        self._transport.stop()
        self._served.connection_lost(exc)

    def pause_writing(self) -> None:
        """Start a timer when the client stops reading the response."""
        self._served.pause_writing()
        loop = asyncio.get_running_loop()
        self._stall_timer = loop.call_later(self.stall_timeout_s, self._transport.abort)

    def resume_writing(self) -> None:
        """Stop the timer when the client reads again."""
        if self._stall_timer is not None:
            self._stall_timer.cancel()
            self._stall_timer = None
            self._served.resume_writing()

    def request_started(self) -> None:
        """Note that the application runs: the headers of a request are complete."""
        self._running_requests += 1
        self._has_partial_headers = False
        self._stop_header_timer()

    def request_ended(self) -> None:
        """Note that the application has returned; the next data are headers."""
        self._running_requests -= 1

    def _start_header_timer(self) -> None:
        if self._header_timer is None:
            loop = asyncio.get_running_loop()
            self._header_timer = loop.call_later(self.header_timeout_s, self._end_headers)

    def _stop_header_timer(self) -> None:
        if self._header_timer is not None:
            self._header_timer.cancel()
            self._header_timer = None

    def _end_headers(self) -> None:
        """End a connection without complete headers; without a response if nothing was sent."""
        if self._has_partial_headers:
            self._refuse(_SLOW_HEADERS)
        else:
            self._transport.close()

    def _refuse(self, refusal: Refusal) -> None:
        """Send a response without the application, and close the connection."""
        status = http.HTTPStatus(refusal.status)
        headers = [*refusal.headers(), *security_headers("/v1/")]
        lines = [f"HTTP/1.1 {status.value} {status.phrase}".encode()]
        lines += [name + b": " + value for name, value in dict(reversed(headers)).items()]
        self._transport.write(b"\r\n".join([*lines, b"", refusal.body()]))
        self._transport.close()


_CONNECTION: ContextVar[GuardedConnection] = ContextVar("connection")


def closing_unread(app: ASGIApp) -> ASGIApp:
    """Return an app that closes the connection after a request that it has not read to its end.

    So it does after a request with two lengths: with both Content-Length and Transfer-Encoding, a
    proxy may have parsed another request (RFC 9112, 6.3). What follows cannot be trusted.
    """

    async def closing(scope: Scope, receive: Receive, send: Send) -> None:
        headers = dict(scope.get("headers", ()))
        lengths = headers.keys() & {b"content-length", b"transfer-encoding"}
        is_ambiguous = len(lengths) == 2
        is_unread = bool(lengths) and headers.get(b"content-length") != b"0"

        async def receive_counting() -> Message:
            nonlocal is_unread
            message = await receive()
            is_unread = is_unread and message.get("more_body", False)
            return message

        async def send_closing(message: Message) -> None:
            if message["type"] == "http.response.start" and (is_ambiguous or is_unread):
                kept = [header for header in message["headers"] if header[0] != b"connection"]
                message = {**message, "headers": [*kept, (b"connection", b"close")]}
            await send(message)

        connection = _CONNECTION.get()
        connection.request_started()
        try:
            await app(scope, receive_counting, send_closing)
        finally:
            connection.request_ended()

    return closing


def _set_no_delay(transport: asyncio.Transport) -> None:
    """Set TCP_NODELAY, so that a body is sent without waiting for the headers' acknowledgement.

    asyncio does this only for sockets with an explicit protocol, which those of `create_server`
    lack: each response came 40 ms late (the client's delayed acknowledgement).
    """
    connection = transport.get_extra_info("socket")
    if connection is not None and connection.family in (socket.AF_INET, socket.AF_INET6):
        # The client may have disconnected.
        with contextlib.suppress(OSError):
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


class _LingeringTransport:
    """A transport whose `close` lets the client read the response first.

    Closing a connection while the client is sending resets it, and the response is lost. This
    transport stops writing, drops further data, and closes when the client does, or after a while.
    """

    def __init__(self, transport: asyncio.Transport, linger_s: float, stall_s: float) -> None:
        self._transport = transport
        self._linger_s = linger_s
        self._stall_s = stall_s
        self._timer: asyncio.TimerHandle | None = None
        self._dropped_bytes = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def is_closing(self) -> bool:
        return self._timer is not None or self._transport.is_closing()

    def close(self) -> None:
        if self.is_closing():
            return
        has_unsent = self._transport.get_write_buffer_size() > 0
        self._timer = asyncio.get_running_loop().call_later(
            self._stall_s if has_unsent else self._linger_s, self._transport.abort
        )
        try:
            self._transport.write_eof()
        except OSError:  # the client has disconnected
            self._transport.abort()
        self._transport.resume_reading()

    def drop(self, size_bytes: int) -> None:
        self._dropped_bytes += size_bytes
        if self._dropped_bytes > _LINGER_BYTES:
            self._transport.abort()

    def stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
