"""Several galleries on one server: `/g/NAME/` is the page and the API of the gallery NAME."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from starlette.types import ASGIApp, Receive, Scope, Send

_PREFIX = re.compile(r"/g/([^/]*)(/.*)?", re.DOTALL)
_LINK_LETTERS = re.compile(r"[^A-Za-z0-9._~-]+")


class GalleryDispatch:
    """ASGI app that passes `/g/NAME/...` on to the app of a gallery, and all else to the first.

    Args:
        apps: by the names of the galleries; each checks access itself.
    """

    def __init__(self, apps: Mapping[str, ASGIApp]) -> None:
        self._apps = apps
        self._first = next(iter(apps.values()))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, with a path as if its gallery were the only one."""
        match = _PREFIX.fullmatch(scope["path"]) if scope["type"] == "http" else None
        if match is None:
            await self._first(scope, receive, send)
            return
        app = self._apps.get(match[1])
        if app is None:
            # The first app's guard comes before anything about the galleries is sent.
            await self._first({**scope, "path": "/not-found"}, receive, send)
        elif match[2] is None:
            await _redirect(f"/g/{match[1]}/", send)
        else:
            await app({**scope, "path": match[2], "raw_path": None}, receive, send)


async def _redirect(address: str, send: Send) -> None:
    headers = [(b"location", address.encode()), (b"content-length", b"0")]
    await send({"type": "http.response.start", "status": 308, "headers": headers})
    await send({"type": "http.response.body", "body": b""})


def gallery_names(folders: Sequence[Path]) -> list[str]:
    """Return a name for each gallery that can be part of a URL: its folder's, made unique."""
    names: list[str] = []
    for folder in folders:
        stem = _LINK_LETTERS.sub("-", folder.absolute().name.removesuffix(".sbtk")).strip("-.")
        name, number = stem or "gallery", 2
        while name in names:
            name, number = f"{stem or 'gallery'}-{number}", number + 1
        names.append(name)
    return names
