"""Run the app on a socket until SIGINT or SIGTERM, with limits on connections.

Connections are limited in number and in time, and end so that clients can read the response.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import http
import os
import socket
import sys
from collections.abc import Sequence
from concurrent.futures import Future
from contextvars import ContextVar
from typing import Any, ClassVar, cast

import h11
import uvicorn
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.config import LOGGING_CONFIG
from uvicorn.protocols.http.h11_impl import H11Protocol

from sbtk_runtime.errors import SbtkError
from sbtk_runtime.files import printable_name
from sbtk_runtime.web.app import GalleryDispatch, guarded_app
from sbtk_runtime.web.auth import AccessRules
from sbtk_runtime.web.refusals import Refusal, security_headers
from sbtk_runtime.web.service import Service

# Time for running requests when the server is stopped; then they are cancelled.
_LAST_ANSWERS_S = 3
# How long a thread runs Python code while others wait for it; Python's default is 5 ms. The engine
# would be idle for that long after each batch, until its thread can fetch the next.
_SWITCH_INTERVAL_S = 0.000_5


def serve(
    services: Sequence[Service],
    listening: socket.socket,
    rules: AccessRules,
    *,
    may_change: bool = False,
) -> None:
    """Serve requests until SIGINT or SIGTERM; `services` may still be loading.

    With several services, each is served under its name, and the first also at the root.

    Args:
        services: at least one.
        listening: the socket.
        rules: the clients that are accepted.
        may_change: let clients on this machine index and remove folders.

    Raises:
        KeyboardInterrupt: it was stopped; running requests have been answered or refused.
        SbtkError: a service cannot be loaded.
    """
    sys.setswitchinterval(_SWITCH_INTERVAL_S)
    is_debugged = bool(os.environ.get("SBTK_DEBUG"))
    GuardedConnection.limit = connection_limit()
    apps = {each.name: guarded_app(each, rules, may_change=may_change) for each in services}
    config = uvicorn.Config(
        closing_unread(GalleryDispatch(apps) if len(apps) > 1 else next(iter(apps.values()))),
        http=GuardedConnection,
        backlog=max(1, GuardedConnection.limit // _TURNS),
        ws="none",
        loop="asyncio",
        lifespan="off",
        # `ErrorMiddleware` logs errors; uvicorn would add tracebacks.
        log_config=LOGGING_CONFIG if is_debugged else None,
        log_level="info" if is_debugged else "critical",
        access_log=False,
        server_header=False,
        # The guard checks only the Host header, and nothing depends on the client's address.
        proxy_headers=False,
        timeout_graceful_shutdown=_LAST_ANSWERS_S,
    )
    server = uvicorn.Server(config)

    def stop_if_failed(loaded: Future[None]) -> None:
        if loaded.exception() is not None:
            server.should_exit = True

    for service in services:
        service.loaded.add_done_callback(stop_if_failed)
        service.is_stopping = lambda: server.should_exit
    server.run([listening])
    for service in services:
        service.loaded.result()


MAX_CONNECTIONS = 1_024

# The most bytes that are read and dropped after the response.
_LINGER_BYTES = 64 << 20
# File descriptors for everything but connections.
_OTHER_FILES = 128
# asyncio accepts the whole backlog at once, and this often before the first of these connections
# can be refused. With a longer backlog, a flood uses up all files before that, and asyncio prints a
# traceback for each of the others.
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
    reserved: for served connections, for refused ones, and for those in the backlog.
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


_PORTS_TO_TRY = 100


class PortTaken(SbtkError):
    """Another program listens on the port."""


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens on a port of `host`; 0 chooses a free port.

    Raises:
        PortTaken: another program listens on the port; the error names a free one.
        SbtkError: `host` is not an address of this machine, or the port requires more rights.
    """
    family, address = _address(host, port)
    try:
        return _bound(family, address)
    except OSError as problem:
        if problem.errno == errno.EADDRINUSE:
            raise _port_taken(family, address) from problem
        shown = f"{printable_name(host)} port {port}"
        if problem.errno == errno.EACCES:
            raise SbtkError(
                f"this user may not listen on {shown}", "a port from 1024 on", "--port 8000"
            ) from problem
        raise SbtkError(
            f"cannot listen on {shown}: {os.strerror(problem.errno or errno.EINVAL)}",
            "an address of this machine",
            "--host 127.0.0.1 for this machine only, --host 0.0.0.0 for all its addresses",
        ) from problem


def _address(host: str, port: int) -> tuple[socket.AddressFamily, tuple[str, int]]:
    try:
        found = socket.getaddrinfo(
            host.strip("[]"), port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
    except (socket.gaierror, UnicodeError) as problem:
        raise SbtkError(
            f"{printable_name(host)} is not a name of this machine", "an address of this machine"
        ) from problem
    # Names with addresses of both families, such as localhost, use IPv4.
    family, _, _, _, address = min(found, key=lambda entry: entry[0] != socket.AF_INET)
    return family, (str(address[0]), int(address[1]))


def _bound(family: socket.AddressFamily, address: tuple[str, int]) -> socket.socket:
    both = family == socket.AF_INET6 and address[0] == "::" and socket.has_dualstack_ipv6()
    return socket.create_server(address, family=family, backlog=1024, dualstack_ipv6=both)


def _port_taken(family: socket.AddressFamily, address: tuple[str, int]) -> PortTaken:
    host, port = address
    free = next(
        (
            other
            for other in range(port + 1, min(port + 1 + _PORTS_TO_TRY, 65_536))
            if _is_free(family, (host, other))
        ),
        0,
    )
    return PortTaken(
        f"port {port} is in use",
        "a port that no other program listens on",
        f"sbtk serve --port {free} (ss -ltnp 'sport = :{port}' shows the other program)",
    )


def _is_free(family: socket.AddressFamily, address: tuple[str, int]) -> bool:
    try:
        with _bound(family, address):
            return True
    except OSError:
        return False
