"""Run the app on a socket until SIGINT or SIGTERM."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import http
import os
import socket
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, cast

import h11
import uvicorn
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.config import LOGGING_CONFIG, Config
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState

from sbtk_runtime.errors import SbtkError
from sbtk_runtime.files import printable_name
from sbtk_runtime.web.app import guarded_app
from sbtk_runtime.web.auth import AccessRules
from sbtk_runtime.web.refusals import Refusal, security_headers
from sbtk_runtime.web.service import Service

# Time for running requests when the server is stopped; then they are cancelled.
_LAST_ANSWERS_S = 3


def serve(service: Service, listening: socket.socket, rules: AccessRules) -> None:
    """Serve requests until SIGINT or SIGTERM; `service` may still be loading.

    Raises:
        KeyboardInterrupt: it was stopped; running requests have been answered or refused.
        SbtkError: the service cannot be loaded.
    """
    is_debugged = bool(os.environ.get("SBTK_DEBUG"))
    GuardedProtocol.limit = connection_limit()
    config = uvicorn.Config(
        guarded_app(service, rules),
        http=GuardedProtocol,
        backlog=accepted_at_once(GuardedProtocol.limit),
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

    service.loaded.add_done_callback(stop_if_failed)
    server.run([listening])
    service.loaded.result()


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
            f"cannot listen on {shown}: {problem.strerror}",
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
_NOT_HTTP = Refusal(400, "bad_request", "This is not an HTTP/1.1 request.", closes=True)


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


class GuardedProtocol(H11Protocol):
    """uvicorn's protocol with limits, for `uvicorn.Config(http=GuardedProtocol, ws="none")`.

    It limits the time for headers and the number of connections (others get a 503). It closes
    connections after requests whose body was not read, and those of clients that do not read the
    response.

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

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self.app = _closing_ambiguous(cast(ASGIApp, self.app))
        self._lingering: _LingeringTransport
        self._header_timer: asyncio.TimerHandle | None = None
        self._stall_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Accept a connection, or refuse it if there are too many."""
        real = cast(asyncio.Transport, transport)
        _set_no_delay(real)
        self._lingering = _LingeringTransport(
            real, self._is_receiving, linger_s=self.linger_s, stall_s=self.stall_timeout_s
        )
        super().connection_made(cast(asyncio.Transport, self._lingering))
        if len(self.connections) > 2 * self.limit:
            real.abort()
        elif len(self.connections) > self.limit:
            self._send_refusal(_TOO_MANY)
        else:
            self._time_headers()

    def data_received(self, data: bytes) -> None:
        """Parse data, unless the connection is closing."""
        if self.transport.is_closing():
            self._lingering.drop(len(data))
            return
        super().data_received(data)
        self._time_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        """Remove the connection and its timers."""
        for timer in (self._header_timer, self._stall_timer):
            if timer is not None:
                timer.cancel()
        self._lingering.stop()
        super().connection_lost(exc)

    def on_response_complete(self) -> None:
        """Start the next request; close the connection if a body was not read to its end."""
        if self._is_receiving():
            self.server_state.total_requests += 1
            self.transport.close()
            return
        super().on_response_complete()
        self._time_headers()

    def send_400_response(self, msg: str) -> None:
        """Respond to data that are not HTTP, such as a chunk with a malformed size."""
        cycle = self.cycle
        if cycle is not None and not cycle.response_complete:
            if cycle.response_started:
                # Another response is being sent.
                self.transport.abort()
                return
            # The application, which waits for the body, receives a disconnect.
            cycle.disconnected = True
            cycle.message_event.set()
        self._send_refusal(_NOT_HTTP)

    def shutdown(self) -> None:
        """Close the connection after its response, unless it is closing already."""
        if not self.transport.is_closing():
            super().shutdown()

    def pause_writing(self) -> None:
        """Start a timer when the client stops reading the response."""
        super().pause_writing()
        self._stall_timer = self.loop.call_later(self.stall_timeout_s, self.transport.abort)

    def resume_writing(self) -> None:
        """Stop the timer when the client reads again."""
        super().resume_writing()
        if self._stall_timer is not None:
            self._stall_timer.cancel()
            self._stall_timer = None

    def _is_receiving(self) -> bool:
        """Return whether the client is still sending a request, or data that are not HTTP."""
        return self.conn.their_state in (h11.SEND_BODY, h11.ERROR)

    def _time_headers(self) -> None:
        """Run the header timer exactly while a request's headers are expected or incomplete."""
        is_kept_alive = self.timeout_keep_alive_task is not None
        if self.conn.their_state is h11.IDLE and not is_kept_alive:
            # Incoming data do not reset it: single bytes are not progress.
            if self._header_timer is None:
                self._header_timer = self.loop.call_later(self.header_timeout_s, self._end_headers)
        elif self._header_timer is not None:
            self._header_timer.cancel()
            self._header_timer = None

    def _end_headers(self) -> None:
        """End a connection without complete headers; without a response if nothing was sent."""
        if self.conn.trailing_data[0]:
            self._send_refusal(_SLOW_HEADERS)
        else:
            self.transport.close()

    def _send_refusal(self, refusal: Refusal) -> None:
        """Send a response without the application, and close the connection."""
        status = http.HTTPStatus(refusal.status)
        headers = [*refusal.headers(), *security_headers("/v1/")]
        lines = [f"HTTP/1.1 {status.value} {status.phrase}".encode()]
        lines += [name + b": " + value for name, value in dict(reversed(headers)).items()]
        self.transport.write(b"\r\n".join([*lines, b"", refusal.body()]))
        self._lingering.close_lingering()


def _closing_ambiguous(app: ASGIApp) -> ASGIApp:
    """Return an app that closes the connection after a request with two lengths.

    With both Content-Length and Transfer-Encoding, a proxy may have parsed another request (RFC
    9112, 6.3). What follows cannot be trusted.
    """

    async def closing(scope: Scope, receive: Receive, send: Send) -> None:
        async def send_closing(message: Message) -> None:
            if message["type"] == "http.response.start":
                kept = [header for header in message["headers"] if header[0] != b"connection"]
                message = {**message, "headers": [*kept, (b"connection", b"close")]}
            await send(message)

        names = {name for name, _ in scope.get("headers", ())}
        is_ambiguous = {b"content-length", b"transfer-encoding"} <= names
        await app(scope, receive, send_closing if is_ambiguous else send)

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

    def __init__(
        self,
        transport: asyncio.Transport,
        is_receiving: Callable[[], bool],
        *,
        linger_s: float,
        stall_s: float,
    ) -> None:
        self._transport = transport
        self._is_receiving = is_receiving
        self._linger_s = linger_s
        self._stall_s = stall_s
        self._timer: asyncio.TimerHandle | None = None
        self._dropped_bytes = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def is_closing(self) -> bool:
        return self._timer is not None or self._transport.is_closing()

    def close(self) -> None:
        if self._is_receiving():
            self.close_lingering()
        elif not self.is_closing():
            self._abort_after(self._stall_s)
            self._transport.close()

    def close_lingering(self) -> None:
        if self.is_closing():
            return
        has_unsent = self._transport.get_write_buffer_size() > 0
        self._abort_after(self._stall_s if has_unsent else self._linger_s)
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

    def _abort_after(self, seconds: float) -> None:
        self._timer = asyncio.get_running_loop().call_later(seconds, self._transport.abort)
