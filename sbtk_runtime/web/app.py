"""The ASGI app: the API and the page over one service, behind the guard."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from fastapi import APIRouter, Depends, FastAPI
from fastapi.responses import FileResponse, JSONResponse
from fastapi.routing import APIRoute
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp

from sbtk_runtime.errors import MissingExtra
from sbtk_runtime.web.auth import AccessGuard, AccessRules
from sbtk_runtime.web.errors import FaultsTold, add_error_answers
from sbtk_runtime.web.metrics import Counted, Metrics
from sbtk_runtime.web.photos import Thumbnails
from sbtk_runtime.web.refusals import SecurityHeaders
from sbtk_runtime.web.routes_photos import photo_routes
from sbtk_runtime.web.routes_query import query_routes
from sbtk_runtime.web.routes_state import state_routes
from sbtk_runtime.web.schemas import only_known_parameters
from sbtk_runtime.web.service import Service

STATIC = Path(__file__).parent / "static"

_DESCRIPTION = """Finds photos from a sketch.

An error is `{"error": {"code", "message", "next"}}`: go by the code, show the message. With
`busy` and `loading`, the header Retry-After says when to come back. A hit's `path` is absolute,
as of when its photo was indexed.
"""


def guarded_app(service: Service, rules: AccessRules) -> ASGIApp:
    """Returns the app that answers for `service`, to those whom `rules` allow."""
    thumbnails = Thumbnails()
    metrics = Metrics(service, thumbnails)
    app = FastAPI(
        title="sbtk",
        version="1",
        description=_DESCRIPTION,
        openapi_tags=[
            {"name": "Search", "description": "Photos that look like an image."},
            {"name": "Photos", "description": "Photos of the gallery: facts, thumbnails, files."},
            {"name": "Server", "description": "The gallery, the server's health and its metrics."},
        ],
        docs_url=None,
        openapi_url=None,
        redoc_url=None,
        redirect_slashes=False,
        # Nothing is sent anywhere, whatever OTEL_* variables ask for.
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
    app.include_router(answer_head(query_routes(service, metrics)))
    app.include_router(answer_head(photo_routes(service, thumbnails)))
    app.include_router(answer_head(state_routes(service, metrics)))
    _add_description(app)
    add_docs_page(app)
    _add_page(app)
    answer_head(app.router)
    return Counted(SecurityHeaders(FaultsTold(AccessGuard(app, rules))), metrics)


def _add_description(app: FastAPI) -> None:
    @app.get("/openapi.json", include_in_schema=False)
    async def description() -> JSONResponse:
        return JSONResponse(app.openapi())


def _add_page(app: FastAPI) -> None:
    @app.get("/", include_in_schema=False)
    async def page() -> FileResponse:
        return FileResponse(STATIC / "index.html")

    # In the root, because a service worker controls only pages below its own path.
    _add_file(app, "/service-worker.js", STATIC / "service-worker.js")
    app.mount("/static", StaticFiles(directory=STATIC))


_PAGE = Path(__file__).parent / "static" / "docs.html"
# Swagger UI, which FastAPI itself would load from elsewhere. Of the package only these are used.
_PACKAGE = "fastapi_offline"
_FILES = ("swagger-ui-bundle.js", "swagger-ui.css")


def add_docs_page(app: FastAPI) -> None:
    """Gives `app` the page `/docs` and the files that it loads; they show `/openapi.json`.

    Raises:
        MissingExtra: the package that has the files is not installed.
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
    """Returns `router`, whose routes that take GET take HEAD too.

    The API's description leaves them out: they would double it. The HTTP server drops the bodies.
    """
    for route in list(router.routes):
        if isinstance(route, APIRoute) and "GET" in (route.methods or ()):
            router.add_api_route(
                route.path, route.endpoint, methods=["HEAD"], include_in_schema=False
            )
    return router
