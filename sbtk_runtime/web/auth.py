"""Access control: allowed host names and origins, and the token.

The server is for the user of this machine. Other web pages in the same browser are refused by their
origin, foreign names that resolve to this machine (DNS rebinding) by the Host header, and other
machines by the token.
"""

from __future__ import annotations

import hashlib
import ipaddress
import re
import secrets
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from urllib.parse import parse_qs, urlsplit

from starlette.requests import cookie_parser
from starlette.types import ASGIApp, Receive, Scope, Send

from sbtk_runtime.errors import BadConfig
from sbtk_runtime.web.refusals import Refusal, is_for_people, send_refusal, send_refusal_page

#: The path that load balancers request without a token.
HEALTH_PATH = "/healthz"

_DEFAULT_PORTS = {"http": 80, "https": 443}
# After a link from another site, browsers do not send a new SameSite=Strict cookie with a redirect;
# they do with a refresh by our own page.
_OWN_STEP = (
    b'<!doctype html><meta charset="utf-8"><title>sbtk</title>'
    b'<meta http-equiv="refresh" content="0; url=./"><p><a href="./">Continue</a></p>'
)


class AccessGuard:
    """ASGI middleware that passes on requests that `rules` allow, and refuses all others.

    It sets `scope["state"]["is_trusted"]` (`request.state.is_trusted`) to whether the request has
    the token, or needs none. It is false only for `/healthz`. WebSockets are closed.
    """

    def __init__(self, app: ASGIApp, rules: AccessRules) -> None:
        self._app = app
        self._rules = rules
        self._expected = (rules.token or "").encode()
        # Cookies are shared between ports, so servers on other ports need other cookie names.
        self._cookie = f"sbtk-{hashlib.sha256(self._expected).hexdigest()[:12]}"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or refuse it."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        elif scope["type"] == "http":
            await self._http(scope, receive, send)

    async def _http(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = _single_headers(scope)
        given = self._token_of_address(scope)
        refusal = self._foreign(scope, headers)
        if refusal is not None:
            await _refuse(send, refusal, scope, headers)
        elif given is not None:
            await self._sign_in(given, scope, headers, send)
        else:
            is_trusted = self._shows_token(headers)
            if not is_trusted and scope["path"] != HEALTH_PATH:
                await _refuse(send, _NO_TOKEN, scope, headers)
                return
            scope.setdefault("state", {})["is_trusted"] = is_trusted
            await self._app(scope, receive, send)

    def _foreign(self, scope: Scope, headers: Mapping[str, str]) -> Refusal | None:
        """Return the refusal of a foreign host or origin, or `None`."""
        host = HOST.fullmatch(headers.get("host", ""))
        name = canonical_host(host[1]) if host else ""
        if not host or not self._answers_to(name):
            return _FOREIGN_HOST
        origin = headers.get("origin")
        if origin is not None and not _is_origin_of(origin, name, host[2]):
            return _FOREIGN_ORIGIN
        site = headers.get("sec-fetch-site", "none")
        if site not in ("none", "same-origin") and not _is_visit(scope, headers):
            return _FOREIGN_ORIGIN
        return None

    def _answers_to(self, name: str) -> bool:
        return name in self._rules.hosts or (
            self._rules.any_address and address_of(name) is not None
        )

    def _token_of_address(self, scope: Scope) -> str | None:
        """Return the token of `/?token=...`, or `None`; no other URL may have one."""
        if self._rules.token is None or scope["path"] != "/" or not _is_read(scope):
            return None
        found = parse_qs(scope["query_string"].decode("latin-1")).get("token")
        return found[0] if found else None

    async def _sign_in(
        self, given: str, scope: Scope, headers: Mapping[str, str], send: Send
    ) -> None:
        """Move the token of a URL to a cookie, so that it leaves the address bar."""
        if not self._is_token(given):
            await _refuse(send, _WRONG_TOKEN, scope, headers)
            return
        # A client that falsely claims HTTPS only loses its own cookie.
        is_https = "https" in (scope.get("scheme"), headers.get("x-forwarded-proto"))
        secure = "; Secure" if is_https else ""
        cookie = f"{self._cookie}={given}; Path=/; HttpOnly; SameSite=Strict{secure}"
        is_from_elsewhere = headers.get("sec-fetch-site") in ("cross-site", "same-site")
        body = _OWN_STEP if is_from_elsewhere else b""
        answer = [
            (b"set-cookie", cookie.encode()),
            (b"cache-control", b"no-store"),
            (b"content-type", b"text/html; charset=utf-8"),
            (b"content-length", str(len(body)).encode()),
        ]
        if not is_from_elsewhere:
            # Relative, since the page of a further gallery is at /g/NAME/.
            answer.append((b"location", b"./"))
        status = 200 if is_from_elsewhere else 303
        await send({"type": "http.response.start", "status": status, "headers": answer})
        await send({"type": "http.response.body", "body": body})

    def _shows_token(self, headers: Mapping[str, str]) -> bool:
        if self._rules.token is None:
            return True
        scheme, _, given = headers.get("authorization", "").partition(" ")
        if scheme.lower() == "bearer":
            return self._is_token(given.strip())
        cookie = cookie_parser(headers.get("cookie", "")).get(self._cookie)
        return cookie is not None and self._is_token(cookie)

    def _is_token(self, given: str) -> bool:
        return secrets.compare_digest(given.encode("utf-8", "replace"), self._expected)


_FOREIGN_HOST = Refusal(
    403,
    "foreign_host",
    "This server does not accept this host name.",
    "use the address that 'sbtk serve' printed, or allow the name with --allow-host NAME",
    closes=True,
)
_FOREIGN_ORIGIN = Refusal(
    403,
    "foreign_origin",
    "The request came from another web page; only the server's own page is allowed.",
    "use the server's own page, or a program",
    closes=True,
)
_NO_TOKEN = Refusal(
    401,
    "no_token",
    "This server requires a token.",
    "the token was printed by 'sbtk serve' when it started, or set with --token; open "
    "/?token=TOKEN, or in programs send the header 'Authorization: Bearer TOKEN'",
    closes=True,
)
_WRONG_TOKEN = replace(_NO_TOKEN, message="The token is wrong.", is_wrong=True)


async def _refuse(send: Send, refusal: Refusal, scope: Scope, headers: Mapping[str, str]) -> None:
    """Send a page to browsers, and JSON to programs."""
    if is_for_people(scope["path"], headers.get("accept", "")):
        await send_refusal_page(send, refusal, scope["path"])
    else:
        await send_refusal(send, refusal)


def _single_headers(scope: Scope) -> dict[str, str]:
    """Return the headers by name; repeated ones are joined, so that none counts alone."""
    found: dict[str, str] = {}
    for raw_name, raw_value in scope["headers"]:
        name, value = raw_name.decode("latin-1"), raw_value.decode("latin-1")
        joint = "; " if name == "cookie" else ", "
        found[name] = f"{found[name]}{joint}{value}" if name in found else value
    return found


def _is_origin_of(origin: str, name: str, port: str | None) -> bool:
    """Return whether the Origin and Host headers name the same host.

    Schemes are not compared: behind a proxy, the page uses HTTPS and the request HTTP.
    """
    try:
        parts = urlsplit(origin)
        given = parts.port
    except ValueError:
        return False
    default = _DEFAULT_PORTS.get(parts.scheme)
    if default is None or parts.hostname is None or canonical_host(parts.hostname) != name:
        return False
    return (given or default) == (int(port) if port else default)


def _is_read(scope: Scope) -> bool:
    return scope["method"] in ("GET", "HEAD")


def _is_visit(scope: Scope, headers: Mapping[str, str]) -> bool:
    """Return whether the request follows a link to the page."""
    return (
        _is_read(scope)
        and scope["path"] == "/"
        and headers.get("sec-fetch-mode") == "navigate"
        and headers.get("sec-fetch-dest") == "document"
    )


#: A Host header: group 1 is the name or address, group 2 the port.
HOST = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+)(?::(\d{1,5}))?")

_LOOPBACK = ("127.0.0.1", "localhost", "::1")
_TOKEN = re.compile(r"[A-Za-z0-9._~-]{8,256}")


@dataclass(frozen=True)
class AccessRules:
    """The clients that the server accepts; see `access_rules`.

    Attributes:
        hosts: names and addresses in lower case, without port; IPv6 without brackets.
        any_address: accept every Host that is an IP address; rebinding requires a name.
        token: the token that clients must send; `None` if none is needed.
    """

    hosts: frozenset[str]
    any_address: bool = False
    token: str | None = None


def access_rules(
    host: str, allow_hosts: Iterable[str] = (), token: str | None = None
) -> AccessRules:
    """Return the rules of a server that listens on `host`; other machines need a token.

    With a wildcard address (`0.0.0.0`, `::`), every IP address is accepted as Host.

    Args:
        host: the address or name to listen on.
        allow_hosts: additional host names, such as a reverse proxy's; ports are ignored.
        token: letters, digits and `._~-`, 8 to 256 of them.

    Raises:
        BadConfig: a host name or the token is malformed, or the token is missing although other
            machines can connect.
    """
    if token is None and not is_loopback(host):
        raise BadConfig(
            f"other machines can reach {host}, but there is no token", "a token", "--token TOKEN"
        )
    if token is not None and not _TOKEN.fullmatch(token):
        raise BadConfig(
            "the token is malformed",
            "8 to 256 letters, digits and . _ ~ -",
            "without --token, sbtk serve creates one",
        )
    allowed = {_known_name(name) for name in (*_LOOPBACK, host, *allow_hosts)}
    address = address_of(_known_name(host))
    return AccessRules(frozenset(allowed), address is not None and address.is_unspecified, token)


def is_loopback(host: str) -> bool:
    """Return whether only this machine can reach a server that listens on `host`."""
    name = _known_name(host)
    address = address_of(name)
    return name == "localhost" if address is None else address.is_loopback


def new_token() -> str:
    """Return a new token: 192 random bits as 32 characters."""
    return secrets.token_urlsafe(24)


def canonical_host(host: str) -> str:
    """Return a host name in lower case, or an IP address in its shortest form."""
    name = host.strip("[]").lower().removesuffix(".")
    address = address_of(name)
    return name if address is None else str(address)


def address_of(name: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """Return the IP address that a host is; `None` for a name."""
    try:
        return ipaddress.ip_address(name.strip("[]"))
    except ValueError:
        return None


def _known_name(host: str) -> str:
    """Return a host of the command line in the form of `AccessRules`."""
    if address_of(host) is None:
        match = HOST.fullmatch(host)
        if match is None:
            raise BadConfig(
                f"{host!r} is not a host", "a name or an IP address, such as photos.lan"
            )
        host = match[1]
    return canonical_host(host)
