"""What a server answers to: the names that it may be called by, and the token that it asks for."""

from __future__ import annotations

import ipaddress
import re
import secrets
from collections.abc import Iterable
from dataclasses import dataclass

from sbtk_runtime.errors import BadConfig

#: A Host header: a name or an address in group 1, a port in group 2.
HOST = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+)(?::(\d{1,5}))?")

_LOOPBACK = ("127.0.0.1", "localhost", "::1")
_TOKEN = re.compile(r"[A-Za-z0-9._~-]{8,256}")


@dataclass(frozen=True)
class AccessRules:
    """Whom the server answers; see `access_rules`.

    Attributes:
        hosts: names and addresses in lower case, without port; IPv6 without brackets.
        any_address: also every Host that is an IP address. Safe, since rebinding needs a name.
        token: what a request must show; `None` when anyone who gets here may ask.
    """

    hosts: frozenset[str]
    any_address: bool = False
    token: str | None = None


def access_rules(
    host: str, allow_hosts: Iterable[str] = (), token: str | None = None
) -> AccessRules:
    """Returns the rules of a server that listens on `host`, which others reach with a token only.

    A host that stands for all of a machine's addresses (`0.0.0.0`, `::`) allows every IP address
    as Host; names are only those given.

    Args:
        host: the address or name that is listened on.
        allow_hosts: more names to answer to, such as a reverse proxy's; a port is ignored.
        token: letters, digits and `._~-`, 8 to 256 of them.

    Raises:
        BadConfig: not a host name, not a token, or none where other machines can ask.
    """
    if token is None and not is_loopback(host):
        raise BadConfig(
            f"other machines can reach {host}, and there is no token", "a token", "--token TOKEN"
        )
    if token is not None and not _TOKEN.fullmatch(token):
        raise BadConfig(
            "this token cannot be used",
            "8 to 256 letters, digits and . _ ~ -",
            "leave out --token and one is made for you",
        )
    allowed = {_known_name(name) for name in (*_LOOPBACK, host, *allow_hosts)}
    address = address_of(_known_name(host))
    return AccessRules(frozenset(allowed), address is not None and address.is_unspecified, token)


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a server that listens on `host`."""
    name = _known_name(host)
    address = address_of(name)
    return name == "localhost" if address is None else address.is_loopback


def new_token() -> str:
    """Returns a token that nobody guesses: 192 random bits, 32 characters."""
    return secrets.token_urlsafe(24)


def canonical_host(host: str) -> str:
    """Returns a host name in lower case, or an IP address as it is written shortest."""
    name = host.strip("[]").lower().removesuffix(".")
    address = address_of(name)
    return name if address is None else str(address)


def address_of(name: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """Returns a host as the IP address that it is; `None` for a name."""
    try:
        return ipaddress.ip_address(name.strip("[]"))
    except ValueError:
        return None


def _known_name(host: str) -> str:
    """Returns a host of the command line as `AccessRules` has it."""
    if address_of(host) is None:
        match = HOST.fullmatch(host)
        if match is None:
            raise BadConfig(f"{host!r} is no host", "a name or an IP address, such as photos.lan")
        host = match[1]
    return canonical_host(host)
