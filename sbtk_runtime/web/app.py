"""The ASGI app: the API and the page of one service, behind the access guard."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path

from fastapi import APIRouter, Depends, FastAPI
from fastapi.responses import FileResponse, JSONResponse
from fastapi.routing import APIRoute
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Receive, Scope, Send

from sbtk_runtime.errors import MissingExtra
from sbtk_runtime.web.auth import AccessGuard, AccessRules
from sbtk_runtime.web.errors import ErrorMiddleware, add_error_answers
from sbtk_runtime.web.photos import Thumbnails
from sbtk_runtime.web.refusals import SecurityHeaders
from sbtk_runtime.web.routes_collection import collection_routes
from sbtk_runtime.web.routes_photos import photo_routes
from sbtk_runtime.web.routes_query import query_routes
from sbtk_runtime.web.routes_state import Metrics, MetricsMiddleware, state_routes
from sbtk_runtime.web.schemas import only_known_parameters
from sbtk_runtime.web.service import Service

STATIC = Path(__file__).parent / "static"

_DESCRIPTION = """Find photos from a sketch.

Errors are `{"error": {"code", "message", "next"}}`: compare the code, and show the message. With
`busy` and `loading`, the header Retry-After says when to try again. The `path` of a hit is
absolute, and was correct when the photo was indexed.
"""


def guarded_app(service: Service, rules: AccessRules, *, may_change: bool = False) -> ASGIApp:
    """Return the app that serves `service` to clients that `rules` allow.

    With `may_change`, those on this machine may index and remove folders.
    """
    thumbnails = Thumbnails()
    metrics = Metrics(service, thumbnails)
    app = FastAPI(
        title="sbtk",
        version="1",
        description=_DESCRIPTION,
        openapi_tags=[
            {"name": "Search", "description": "Photos that look like an image."},
            {"name": "Photos", "description": "Photos of the gallery: facts, thumbnails, files."},
            {"name": "Collection", "description": "Indexed folders, failures, indexing."},
            {"name": "Server", "description": "The gallery, the server's health and its metrics."},
        ],
        docs_url=None,
        openapi_url=None,
        redoc_url=None,
        redirect_slashes=False,
        # No telemetry, whatever the OTEL_* variables say.
        telemetry={
            "tracing": False,
            "metrics": False,
            "logs": False,
            "operation_spans": False,
            "auto_configure": False,
        },
    )
    app.router.dependencies.append(Depends(only_known_parameters(app)))
    add_error_answers(app)
    app.include_router(answer_head(query_routes(service, metrics.query_seconds.observe)))
    app.include_router(answer_head(photo_routes(service, thumbnails)))
    app.include_router(answer_head(collection_routes(service, may_change=may_change)))
    app.include_router(answer_head(state_routes(service, metrics)))

    @app.get("/openapi.json", include_in_schema=False)
    async def description() -> JSONResponse:
        return JSONResponse(app.openapi())

    add_docs_page(app)
    _add_page(app)
    answer_head(app.router)
    return MetricsMiddleware(SecurityHeaders(ErrorMiddleware(AccessGuard(app, rules))), metrics)


def _add_page(app: FastAPI) -> None:
    @app.get("/", include_in_schema=False)
    async def page() -> FileResponse:
        return FileResponse(STATIC / "index.html")

    @app.get("/collection", include_in_schema=False)
    async def collection() -> FileResponse:
        return FileResponse(STATIC / "collection.html")

    # In the root, because a service worker controls only pages below its own path.
    _add_file(app, "/service-worker.js", STATIC / "service-worker.js")
    app.mount("/static", StaticFiles(directory=STATIC))


_PAGE = Path(__file__).parent / "static" / "docs.html"
# Swagger UI, which FastAPI itself would load from the network. Only its files are used.
_PACKAGE = "fastapi_offline"
_FILES = ("swagger-ui-bundle.js", "swagger-ui.css")


def add_docs_page(app: FastAPI) -> None:
    """Add the page `/docs`, which shows `/openapi.json`, and its files to `app`.

    Raises:
        MissingExtra: the package with the files is not installed.
    """
    folder = _swagger_ui()

    @app.get("/docs", include_in_schema=False)
    async def docs() -> FileResponse:
        return FileResponse(_PAGE)

    for name in _FILES:
        _add_file(app, f"/docs/{name}", folder / name)


def _add_file(app: FastAPI, path: str, file: Path) -> None:
    @app.get(path, include_in_schema=False)
    async def content() -> FileResponse:
        return FileResponse(file)


def _swagger_ui() -> Path:
    found = find_spec(_PACKAGE)
    if found is None or found.origin is None:
        raise MissingExtra(
            "'sbtk serve' needs fastapi-offline, which is not installed",
            "the extra 'serve'",
            'pip install "sbtk[serve]"',
        )
    return Path(found.origin).parent / "static"


def answer_head(router: APIRouter) -> APIRouter:
    """Return `router` after adding a HEAD route for each GET route.

    They are not in the API's description. The HTTP server drops their bodies.
    """
    for route in list(router.routes):
        if isinstance(route, APIRoute) and "GET" in (route.methods or ()):
            router.add_api_route(
                route.path, route.endpoint, methods=["HEAD"], include_in_schema=False
            )
    return router


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
            await self._first(scope, receive, send)
        elif match[2] is None:
            await _redirect(f"/g/{match[1]}/", scope["query_string"], send)
        else:
            await app({**scope, "path": match[2], "raw_path": None}, receive, send)


async def _redirect(address: str, search: bytes, send: Send) -> None:
    # It may hold the token.
    location = address.encode() + (b"?" + search if search else b"")
    headers = [(b"location", location), (b"content-length", b"0"), (b"cache-control", b"no-store")]
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
