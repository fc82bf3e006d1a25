"""The page that describes the API, from files on this machine."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from fastapi import FastAPI
from fastapi.responses import FileResponse

from sbtk_runtime.errors import MissingExtra

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
