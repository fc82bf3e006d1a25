"""Refusals: error responses of the form `{"error": {"code", "message", "next"}}`.

They use plain ASGI, so that middleware can send them, too.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import html
import json
from dataclasses import dataclass
from pathlib import Path
from string import Template

from starlette.types import ASGIApp, Message, Receive, Scope, Send


@dataclass(frozen=True)
class Refusal:
    """An error response.

    Attributes:
        status: the HTTP status.
        code: identifies the error for programs.
        message: one sentence for people.
        next_step: what to do about it; may be empty.
        retry_after_s: seconds after which to try again; 0 if that does not help.
        closes: close the connection, because the rest of the request is not read.
        is_wrong: what the user entered is wrong, rather than missing.
    """

    status: int
    code: str
    message: str
    next_step: str = ""
    retry_after_s: int = 0
    closes: bool = False
    is_wrong: bool = False

    def body(self) -> bytes:
        """Return the response's JSON."""
        error = {"code": self.code, "message": self.message, "next": self.next_step}
        return json.dumps({"error": error}, ensure_ascii=False).encode()

    def headers(self) -> list[tuple[bytes, bytes]]:
        """Return the response's headers, without those of all responses."""
        found = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(self.body())).encode()),
            (b"cache-control", b"no-store"),
        ]
        if self.status == 401:
            found.append((b"www-authenticate", b'Bearer realm="sbtk"'))
        if self.retry_after_s:
            found.append((b"retry-after", str(self.retry_after_s).encode()))
        if self.closes:
            found.append((b"connection", b"close"))
        return found


class Refused(Exception):
    """A request is refused; `refusal` is the response."""

    def __init__(self, refusal: Refusal) -> None:
        super().__init__(refusal)
        self.refusal = refusal


async def send_refusal(send: Send, refusal: Refusal) -> None:
    """Send a refusal as JSON."""
    await _send(send, refusal.status, refusal.headers(), refusal.body())


def is_for_people(path: str, accept: str) -> bool:
    """Return whether a browser asks for a page, or a photo, given the request's header Accept."""
    is_page = not path.startswith(DATA_PATHS) or path.endswith("/file")
    return "text/html" in accept and is_page


async def send_refusal_page(send: Send, refusal: Refusal, path: str) -> None:
    """Send a refusal of `path` as a page, with a form to sign in (401), or a link (404)."""
    # Relative, since the page of a further gallery is at /g/NAME/.
    root = "../" * (path.count("/") - 1) or "./"
    form = {401: _SIGN_IN, 404: _TO_START}.get(refusal.status, "").format(root=root)
    if refusal.is_wrong:
        form = form.replace("autofocus", 'autofocus aria-invalid="true" aria-describedby="message"')
    style = _style()
    body = (
        Template((_STATIC / "refusal.html").read_text(encoding="utf-8"))
        .substitute(
            title="Sign in" if refusal.status == 401 else "Cannot open this page",
            style=style,
            icon=_icon(),
            message=html.escape(refusal.message),
            kind="notice-wrong" if refusal.is_wrong else "notice-message",
            next=html.escape(f"{refusal.next_step[:1].upper()}{refusal.next_step[1:]}."),
            form=form,
        )
        .encode()
    )
    style_hash = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    own = {
        b"content-type": b"text/html; charset=utf-8",
        b"content-length": str(len(body)).encode(),
        b"content-security-policy": _REFUSAL_POLICY.format(style_hash).encode(),
    }
    await _send(send, refusal.status, list((dict(refusal.headers()) | own).items()), body)


_STATIC = Path(__file__).parent / "static"
_SIGN_IN = """<form action="{root}" method="get">
<input type="text" autocomplete="username" value="sbtk" hidden>
<label for="token">Token</label>
<input type="password" id="token" name="token" required autofocus autocomplete="current-password">
<button>Sign in</button>
</form>"""
_TO_START = '<p class="notice-link"><a href="{root}">Open the start page</a></p>'
_REFUSAL_POLICY = (
    "default-src 'none'; style-src 'sha256-{}'; img-src data:; form-action 'self'; "
    "frame-ancestors 'none'; base-uri 'none'"
)


@functools.cache
def _style() -> str:
    # In the page, because the files of the page are refused too.
    files = ("theme.css", "refusal.css")
    return "".join((_STATIC / name).read_text(encoding="utf-8") for name in files)


@functools.cache
def _icon() -> str:
    # Without one, browsers ask for /favicon.ico, which the policy forbids.
    encoded = base64.b64encode((_STATIC / "icon.svg").read_bytes()).decode()
    return f"data:image/svg+xml;base64,{encoded}"


async def _send(send: Send, status: int, headers: list[tuple[bytes, bytes]], body: bytes) -> None:
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


#: For the page and its files: nothing external, nothing inline, no frames.
PAGE_POLICY = (
    "default-src 'self'; img-src 'self' blob: data:; frame-ancestors 'none'; "
    "base-uri 'none'; form-action 'none'; object-src 'none'"
)
#: For data: a photo that is opened directly has the browser's own styles, and no scripts.
DATA_POLICY = (
    "default-src 'none'; img-src 'self'; style-src 'unsafe-inline'; frame-ancestors 'none'; "
    "base-uri 'none'; form-action 'none'; sandbox"
)

#: Paths of data, as opposed to pages.
DATA_PATHS = ("/v1/", "/healthz", "/metrics", "/openapi.json")

COMMON_HEADERS = (
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"cross-origin-opener-policy", b"same-origin"),
)


class SecurityHeaders:
    """ASGI middleware that adds security headers, unless the application set them."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on with a `send` that adds headers."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        added = security_headers(scope["path"])

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                given = list(message.get("headers", []))
                names = {name.lower() for name, _ in given}
                kept = [header for header in added if header[0] not in names]
                message = {**message, "headers": [*given, *kept]}
            await send(message)

        await self._app(scope, receive, send_with_headers)


def security_headers(path: str) -> list[tuple[bytes, bytes]]:
    """Return the headers of a response for `path`; by default caches must revalidate it."""
    policy = DATA_POLICY if path.startswith(DATA_PATHS) else PAGE_POLICY
    return [
        (b"content-security-policy", policy.encode()),
        *COMMON_HEADERS,
        (b"cache-control", b"private, no-cache"),
    ]
