"""Reading the bodies of requests: counted while they stream, against a clock, within a budget."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from starlette.types import Receive, Scope

from sbtk_runtime.web.refusals import Refusal, Refused

MAX_BODY_BYTES = 8 << 20
#: For the bodies of all requests together, from the first byte until they are decoded.
MAX_BODIES_BYTES = 64 << 20
BODY_TIMEOUT_S = 10.0


class ClientGone(Exception):
    """The client went away before its whole body had come; nobody waits for an answer."""


class BodyReader:
    """Reads bodies for a whole server.

    One body may have `max_bytes`; all that are held at a time, `max_held_bytes`. Only what has
    come counts, never what a header promises, so an idle connection holds nothing.
    """

    def __init__(
        self,
        max_bytes: int = MAX_BODY_BYTES,
        max_held_bytes: int = MAX_BODIES_BYTES,
        timeout_s: float = BODY_TIMEOUT_S,
    ) -> None:
        self._max_bytes = max_bytes
        self._max_held_bytes = max_held_bytes
        self._timeout_s = timeout_s
        self._held_bytes = 0

    @property
    def held_bytes(self) -> int:
        """How many bytes of bodies are in memory now."""
        return self._held_bytes

    @asynccontextmanager
    async def read(self, scope: Scope, receive: Receive) -> AsyncIterator[bytes]:
        """Gives the block the whole body; its room is free again after the block.

            async with bodies.read(request.scope, request.receive) as body:
                ...

        Raises:
            Refused: `body_too_large` (413), `too_slow` (408) or `busy` (503).
            ClientGone: there is nobody left to answer.
        """
        body, whole = bytearray(), b""
        try:
            if (_promised_bytes(scope) or 0) > self._max_bytes:
                raise Refused(self._too_large())
            try:
                async with asyncio.timeout(self._timeout_s):
                    await self._fill(body, receive)
            except TimeoutError as problem:
                raise Refused(self._too_slow()) from problem
            whole = bytes(body)
            # The budget counts it once, so it must not stay in memory twice.
            body.clear()
            yield whole
        finally:
            self._held_bytes -= len(body) + len(whole)

    async def _fill(self, body: bytearray, receive: Receive) -> None:
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ClientGone
            chunk = message.get("body", b"")
            if len(body) + len(chunk) > self._max_bytes:
                raise Refused(self._too_large())
            if self._held_bytes + len(chunk) > self._max_held_bytes:
                raise Refused(_NO_ROOM)
            # One array and not a list of chunks: some clients send a byte at a time.
            body += chunk
            self._held_bytes += len(chunk)
            if not message.get("more_body", False):
                return

    def _too_large(self) -> Refusal:
        return Refusal(
            413,
            "body_too_large",
            f"The request's body is larger than {self._max_bytes >> 20} MiB.",
            "send a smaller picture: 1,000 pixels a side are plenty",
            closes=True,
        )

    def _too_slow(self) -> Refusal:
        return Refusal(
            408,
            "too_slow",
            f"The request's body did not come within {self._timeout_s:g} seconds.",
            "send it again, or a smaller picture",
            closes=True,
        )


_NO_ROOM = Refusal(
    503,
    "busy",
    "Too many pictures are being received at once.",
    "try again in a moment",
    retry_after_s=1,
    closes=True,
)


def _promised_bytes(scope: Scope) -> int | None:
    """Returns the Content-Length, or `None`; that it is a number, the HTTP parser has checked."""
    for name, value in scope["headers"]:
        if name == b"content-length":
            return int(value)
    return None
