"""Runs the app on a socket until it is told to stop."""

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

# What is under way when the server is told to stop may take so long; then it is given up.
_LAST_ANSWERS_S = 3


def serve(service: Service, listening: socket.socket, rules: AccessRules) -> None:
    """Answers for `service`, which may still be loading, until SIGINT or SIGTERM.

    Raises:
        KeyboardInterrupt: it was told to stop; what was under way has been answered, or refused.
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
        # Of what goes wrong `FaultsTold` tells; uvicorn would add tracebacks.
        log_config=LOGGING_CONFIG if is_debugged else None,
        log_level="info" if is_debugged else "critical",
        access_log=False,
        server_header=False,
        # The guard judges by the Host header alone, and nothing here goes by the client's address.
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
    """Returns a socket that listens on a host's `port`, or with 0 on a free one.

    Raises:
        PortTaken: another program has the port; says how to find out which, and a free one.
        SbtkError: this machine is not that host, or the port needs more rights.
    """
    family, address = _address(host, port)
    try:
        return _bound(family, address)
    except OSError as problem:
        if problem.errno == errno.EADDRINUSE:
            raise _taken(family, address) from problem
        shown = f"{printable_name(host)} port {port}"
        if problem.errno == errno.EACCES:
            raise SbtkError(
                f"this user may not listen on {shown}", "a port from 1024 on", "--port 8000"
            ) from problem
        raise SbtkError(
            f"nobody can listen on {shown} here: {problem.strerror}",
            "an address of this machine",
            "--host 127.0.0.1 is for this machine alone, --host 0.0.0.0 for all its addresses",
        ) from problem


def _address(host: str, port: int) -> tuple[socket.AddressFamily, tuple[str, int]]:
    try:
        found = socket.getaddrinfo(
            host.strip("[]"), port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
    except (socket.gaierror, UnicodeError) as problem:
        raise SbtkError(
            f"{printable_name(host)} is no name of this machine", "an address of this machine"
        ) from problem
    # A name with both kinds of addresses, as localhost, is understood best by the older one.
    family, _, _, _, address = min(found, key=lambda entry: entry[0] != socket.AF_INET)
    return family, (str(address[0]), int(address[1]))


def _bound(family: socket.AddressFamily, address: tuple[str, int]) -> socket.socket:
    both = family == socket.AF_INET6 and address[0] == "::" and socket.has_dualstack_ipv6()
    return socket.create_server(address, family=family, backlog=1024, dualstack_ipv6=both)


def _taken(family: socket.AddressFamily, address: tuple[str, int]) -> PortTaken:
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
        f"port {port} is taken",
        "a port that no other program listens on",
        f"ss -ltnp 'sport = :{port}' says who has it; sbtk serve --port {free} takes a free one",
    )


def _is_free(family: socket.AddressFamily, address: tuple[str, int]) -> bool:
    try:
        with _bound(family, address):
            return True
    except OSError:
        return False


MAX_CONNECTIONS = 1_024

# How much is read and dropped of what a client sends after its answer.
_LINGER_BYTES = 64 << 20
# Descriptors that the process needs for anything but connections.
_OTHER_FILES = 128
# Connections that are accepted before one of them can be refused: asyncio takes as many at a time
# as may wait to be accepted, and looks at them three turns later.
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
    "The request's headers did not come in time.",
    "send them again",
    closes=True,
)
_NOT_HTTP = Refusal(400, "bad_request", "This is not a request of HTTP/1.1.", closes=True)


def connection_limit() -> int:
    """Returns how many connections may be open, after raising the limit of open files for them.

    It is `MAX_CONNECTIONS`, or less where the system allows fewer files. There are files for three
    times as many: for those that are served, for those that are told that they are too many, and
    for `accepted_at_once`.
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
    """Returns how many connections may wait to be accepted where `limit` are served.

    With more, a crowd takes all files before the first of it is turned away, and asyncio writes a
    traceback for each of the others.
    """
    return max(1, limit // _TURNS)


class GuardedProtocol(H11Protocol):
    """uvicorn's protocol, for `uvicorn.Config(http=GuardedProtocol, ws="none")`.

    Headers must be there in time; past the limit of connections the next ones get a 503; a request
    whose body is not read ends its connection; so does a client that takes nothing of its answer.

    Attributes:
        limit: connections that are served at a time.
        header_timeout_s: from the connection's begin, or a request's first byte.
        stall_timeout_s: how long a client may take for what is on its way, a chunk of an answer.
        linger_s: how long is read and dropped what a client sends after its answer.
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
        self.app = _closing_what_is_ambiguous(cast(ASGIApp, self.app))
        self._closing: _KindlyClosed
        self._header_timer: asyncio.TimerHandle | None = None
        self._stall_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Takes a connection, or says that there are too many."""
        real = cast(asyncio.Transport, transport)
        _send_at_once(real)
        self._closing = _KindlyClosed(
            real, self._is_being_sent, linger_s=self.linger_s, stall_s=self.stall_timeout_s
        )
        super().connection_made(cast(asyncio.Transport, self._closing))
        if len(self.connections) > 2 * self.limit:
            real.abort()
        elif len(self.connections) > self.limit:
            self._answer_alone(_TOO_MANY)
        else:
            self._time_headers()

    def data_received(self, data: bytes) -> None:
        """Parses what has come, unless this connection is over."""
        if self.transport.is_closing():
            self._closing.drop(len(data))
            return
        super().data_received(data)
        self._time_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forgets the connection and its timers."""
        for timer in (self._header_timer, self._stall_timer):
            if timer is not None:
                timer.cancel()
        self._closing.stop()
        super().connection_lost(exc)

    def on_response_complete(self) -> None:
        """Takes the next request; one whose body has not come whole ends the connection."""
        if self._is_being_sent():
            self.server_state.total_requests += 1
            self.transport.close()
            return
        super().on_response_complete()
        self._time_headers()

    def send_400_response(self, msg: str) -> None:
        """Answers what is not HTTP, such as a chunk whose size is not a number."""
        cycle = self.cycle
        if cycle is not None and not cycle.response_complete:
            if cycle.response_started:
                # Another answer is on its way here.
                self.transport.abort()
                return
            # Whoever waits for the body is told that its client has gone.
            cycle.disconnected = True
            cycle.message_event.set()
        self._answer_alone(_NOT_HTTP)

    def shutdown(self) -> None:
        """Ends the connection when its answer is given; one that ends already is left alone."""
        if not self.transport.is_closing():
            super().shutdown()

    def pause_writing(self) -> None:
        """The client is slow to take its answer."""
        super().pause_writing()
        self._stall_timer = self.loop.call_later(self.stall_timeout_s, self.transport.abort)

    def resume_writing(self) -> None:
        """The client takes its answer again."""
        super().resume_writing()
        if self._stall_timer is not None:
            self._stall_timer.cancel()
            self._stall_timer = None

    def _is_being_sent(self) -> bool:
        """Whether more of a request is to come, or of what is none."""
        return self.conn.their_state in (h11.SEND_BODY, h11.ERROR)

    def _time_headers(self) -> None:
        """Runs the clock exactly while a request's headers are awaited or under way."""
        is_kept_alive = self.timeout_keep_alive_task is not None
        if self.conn.their_state is h11.IDLE and not is_kept_alive:
            # Not moved by what comes: a byte now and then is no progress.
            if self._header_timer is None:
                self._header_timer = self.loop.call_later(self.header_timeout_s, self._end_headers)
        elif self._header_timer is not None:
            self._header_timer.cancel()
            self._header_timer = None

    def _end_headers(self) -> None:
        """Browsers open connections ahead of need: one that has sent nothing is told nothing."""
        if self.conn.trailing_data[0]:
            self._answer_alone(_SLOW_HEADERS)
        else:
            self.transport.close()

    def _answer_alone(self, refusal: Refusal) -> None:
        """Sends an answer without the application, and ends the connection."""
        status = http.HTTPStatus(refusal.status)
        headers = [*refusal.headers(), *security_headers("/v1/")]
        lines = [f"HTTP/1.1 {status.value} {status.phrase}".encode()]
        lines += [name + b": " + value for name, value in dict(reversed(headers)).items()]
        self.transport.write(b"\r\n".join([*lines, b"", refusal.body()]))
        self._closing.close_after_reading()


def _closing_what_is_ambiguous(app: ASGIApp) -> ASGIApp:
    """Returns an app that ends the connection after a request that has two lengths.

    With Content-Length beside Transfer-Encoding, a proxy in front may have taken another part of
    the bytes for the request (RFC 9112, 6.3): nothing that follows it can be trusted.
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


def _send_at_once(transport: asyncio.Transport) -> None:
    """Makes an answer's body follow its headers without waiting for the client's word of them.

    asyncio does so only for sockets that name their protocol, and those of `create_server` do not:
    each answer came 40 ms late (the client's delayed acknowledgement).
    """
    connection = transport.get_extra_info("socket")
    if connection is not None and connection.family in (socket.AF_INET, socket.AF_INET6):
        # A client that has gone already is no news here.
        with contextlib.suppress(OSError):
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


class _KindlyClosed:
    """A transport whose `close` lets the client read its answer first.

    Closed while the client still sends, a connection would be reset, and the answer lost. So it
    stops writing, drops what still comes, and closes when the client does, or after a while.
    """

    def __init__(
        self,
        transport: asyncio.Transport,
        is_being_sent: Callable[[], bool],
        *,
        linger_s: float,
        stall_s: float,
    ) -> None:
        self._transport = transport
        self._is_being_sent = is_being_sent
        self._linger_s = linger_s
        self._stall_s = stall_s
        self._timer: asyncio.TimerHandle | None = None
        self._dropped_bytes = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def is_closing(self) -> bool:
        return self._timer is not None or self._transport.is_closing()

    def close(self) -> None:
        if self._is_being_sent():
            self.close_after_reading()
        elif not self.is_closing():
            self._abort_after(self._stall_s)
            self._transport.close()

    def close_after_reading(self) -> None:
        if self.is_closing():
            return
        has_unsent = self._transport.get_write_buffer_size() > 0
        self._abort_after(self._stall_s if has_unsent else self._linger_s)
        try:
            self._transport.write_eof()
        except OSError:  # the client has gone already
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
