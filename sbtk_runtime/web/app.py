"""The ASGI app: the API and the page over one service, behind the guard."""

from __future__ import annotations

from pathlib import Path

from fastapi import Depends, FastAPI
from fastapi.responses import FileResponse, JSONResponse
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp

from sbtk_runtime.web.access import AccessGuard
from sbtk_runtime.web.access_rules import AccessRules
from sbtk_runtime.web.api_errors import FaultsTold, add_error_answers
from sbtk_runtime.web.api_photos import photo_routes
from sbtk_runtime.web.api_query import query_routes
from sbtk_runtime.web.api_state import state_routes
from sbtk_runtime.web.docs_page import add_docs_page
from sbtk_runtime.web.head_requests import answer_head
from sbtk_runtime.web.metrics import Counted, Metrics
from sbtk_runtime.web.parameters import only_known_parameters
from sbtk_runtime.web.security_headers import SecurityHeaders
from sbtk_runtime.web.service import Service
from sbtk_runtime.web.thumbnails import Thumbnails

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

    app.mount("/static", StaticFiles(directory=STATIC))
