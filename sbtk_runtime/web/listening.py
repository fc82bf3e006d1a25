"""The socket that is listened on, and who has it when it is taken."""

from __future__ import annotations

import errno
import socket

from sbtk_runtime.errors import SbtkError
from sbtk_runtime.names import printable_name

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
