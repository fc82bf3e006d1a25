"""Fixtures: Chromium, a gallery, and an `sbtk serve` process.

Playwright drives the `chromium` on the PATH, or the one that `SBTK_CHROMIUM` names. Without it the
tests are skipped; `make test-browser` installs it.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from sbtk_runtime.embedding.embedder import Embedder
from sbtk_runtime.gallery.update import update_gallery
from tests.browser.visit import Visit
from tests.serve_process import ServeProcess, serving
from tests.tiny import write_photos

if TYPE_CHECKING:
    from playwright.sync_api import Browser

_SWITCHES = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
#: Generated photos in the gallery: more than one page of hits, so that scrolling loads more.
GENERATED = 45


# Not session-scoped: while Playwright runs, other tests cannot use asyncio in this thread.
@pytest.fixture(scope="package")
def chromium() -> Iterator[Browser]:
    """Launch a headless Chromium."""
    name = os.environ.get("SBTK_CHROMIUM", "chromium")
    path = shutil.which(name)
    if path is None:
        pytest.skip(f"there is no {name}: 'make test-browser' installs it, or SBTK_CHROMIUM names")
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=path, args=list(_SWITCHES))
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with three photographs from Python packages, and generated photos."""
    folder = tmp_path_factory.mktemp("page") / "photos"
    found = [
        ("sklearn", "datasets/images/flower.jpg", "plants/flower.jpg"),
        ("sklearn", "datasets/images/china.jpg", "places/china.jpg"),
        ("matplotlib", "mpl-data/sample_data/grace_hopper.jpg", "people/grace_hopper.jpg"),
    ]
    for package, inside, name in found:
        spec = importlib.util.find_spec(package)
        assert spec is not None and spec.origin is not None
        (folder / name).parent.mkdir(parents=True)
        shutil.copy(Path(spec.origin).parent / inside, folder / name)
    write_photos(folder / "shapes", GENERATED)
    return folder


@pytest.fixture(scope="session")
def gallery(photos: Path) -> Path:
    """Return a gallery of `photos`, indexed with the included model."""
    folder = photos.parent / "gallery.sbtk"
    with Embedder(engine="onnxruntime", threads=1) as embedder:
        update_gallery(folder, [photos], embedder)
    return folder


@pytest.fixture(scope="session")
def server(gallery: Path) -> Iterator[ServeProcess]:
    """Return a shared server of `gallery`."""
    log = gallery.parent / "serve.log"
    with serving(gallery, "--engine", "onnxruntime", "--threads", "1", log=log) as served:
        served.wait_until_ready()
        yield served


@pytest.fixture
def visit(chromium: Browser, server: ServeProcess) -> Iterator[Visit]:
    """Open the page in a window of 1280 x 900 pixels."""
    with Visit(chromium, server.origin) as page:
        page.open()
        yield page
