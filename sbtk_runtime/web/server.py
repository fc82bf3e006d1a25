"""Run the app on a socket until SIGINT or SIGTERM."""

from __future__ import annotations

import errno
import os
import socket
import sys
from collections.abc import Sequence
from concurrent.futures import Future
from types import FrameType

import uvicorn
from uvicorn.config import LOGGING_CONFIG, Config

from sbtk_runtime.errors import SbtkError
from sbtk_runtime.files import printable_name
from sbtk_runtime.web.app import GalleryDispatch, guarded_app
from sbtk_runtime.web.auth import AccessRules
from sbtk_runtime.web.connections import (
    GuardedConnection,
    accepted_at_once,
    closing_unread,
    connection_limit,
)
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
        backlog=accepted_at_once(GuardedConnection.limit),
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
    server = _Server(config, services)

    def stop_if_failed(loaded: Future[None]) -> None:
        if loaded.exception() is not None:
            server.should_exit = True

    for service in services:
        service.loaded.add_done_callback(stop_if_failed)
    server.run([listening])
    for service in services:
        service.loaded.result()


class _Server(uvicorn.Server):
    """A server that ends event streams when it stops; uvicorn would wait for them."""

    def __init__(self, config: Config, services: Sequence[Service]) -> None:
        super().__init__(config)
        self._services = services

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        for service in self._services:
            service.stopping.set()
        super().handle_exit(sig, frame)


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
