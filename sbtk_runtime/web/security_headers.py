"""Headers that all answers have: what browsers may do with them, and what not."""

from __future__ import annotations

from starlette.types import ASGIApp, Message, Receive, Scope, Send

#: For the page and its files: nothing from outside, nothing inline, in no frame.
PAGE_POLICY = (
    "default-src 'self'; img-src 'self' blob: data:; frame-ancestors 'none'; "
    "base-uri 'none'; form-action 'none'; object-src 'none'"
)
#: For data: a photo opened by itself is shown by the browser's own styles, and runs nothing.
DATA_POLICY = (
    "default-src 'none'; img-src 'self'; style-src 'unsafe-inline'; frame-ancestors 'none'; "
    "base-uri 'none'; form-action 'none'; sandbox"
)

#: Where data are, rather than pages.
DATA_PATHS = ("/v1/", "/healthz", "/metrics", "/openapi.json")

COMMON_HEADERS = (
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"cross-origin-opener-policy", b"same-origin"),
)


class SecurityHeaders:
    """ASGI middleware, outermost, that adds the headers; the application's own ones win."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes a request on, with a `send` that adds headers."""
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
    """Returns the headers of an answer for `path`; by default a cache must ask again each time."""
    policy = DATA_POLICY if path.startswith(DATA_PATHS) else PAGE_POLICY
    return [
        (b"content-security-policy", policy.encode()),
        *COMMON_HEADERS,
        (b"cache-control", b"private, no-cache"),
    ]
