"""Fixtures: Chromium and Firefox, a gallery, and an `sbtk serve` process.

Playwright drives the `chromium` and the `firefox-esr` on the PATH, or those that `SBTK_CHROMIUM`
and `SBTK_FIREFOX` name. Without one its tests are skipped; `make test-browser` installs both.

Every test runs in Chromium, and those marked `firefox` in Firefox, too; `SBTK_BROWSERS=firefox`, as
in `make test-firefox`, runs all in Firefox.
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
    from playwright.sync_api import Browser, Playwright

_BROWSERS = ("chromium", "firefox")
_CHROMIUM_SWITCHES = (
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


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run each test of the page in its browsers."""
    if "browser" not in metafunc.fixturenames:
        return
    chosen = os.environ.get("SBTK_BROWSERS", "").replace(",", " ").split()
    if unknown := set(chosen) - {*_BROWSERS}:
        raise pytest.UsageError(
            f"SBTK_BROWSERS names {min(unknown)}; expected {' or '.join(_BROWSERS)}"
        )
    marks = {mark.name: mark for mark in metafunc.definition.iter_markers()}
    if not chosen:
        chosen = [*_BROWSERS] if "firefox" in marks else ["chromium"]
    parameters = []
    for name in chosen:
        only = marks.get("chromium_only") if name == "firefox" else None
        skip = [pytest.mark.skip(reason=f"not in Firefox: {only.args[0]}")] if only else []
        parameters.append(pytest.param(name, marks=skip))
    metafunc.parametrize("browser", parameters, indirect=True, scope="package")


# Not session-scoped: while Playwright runs, other tests cannot use asyncio in this thread.
@pytest.fixture(scope="package")
def playwright() -> Iterator[Playwright]:
    """Start Playwright."""
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with api.sync_playwright() as driver:
        yield driver


@pytest.fixture(scope="package")
def browser(request: pytest.FixtureRequest, playwright: Playwright) -> Iterator[Browser]:
    """Launch the headless browser that the test is to run in."""
    kind = request.param
    variable, usual = {
        "chromium": ("SBTK_CHROMIUM", "chromium"),
        "firefox": ("SBTK_FIREFOX", "firefox-esr"),
    }[kind]
    name = os.environ.get(variable, usual)
    path = shutil.which(name)
    if path is None:
        pytest.skip(
            f"there is no {name}: 'make test-browser' installs it, or {variable} names another"
        )
    if kind == "chromium":
        launched = playwright.chromium.launch(executable_path=path, args=[*_CHROMIUM_SWITCHES])
    else:
        # As released by Mozilla and Debian, not as patched by Playwright.
        launched = playwright.firefox.launch(
            executable_path=path,
            channel="moz-firefox",
            firefox_user_prefs={
                # Playwright cannot answer Firefox's questions about the clipboard.
                "dom.events.testing.asyncClipboard": True,
                # Without a screen it sees no mouse: 2 is a fine pointer, 4 one that hovers.
                "ui.primaryPointerCapabilities": 6,
                "ui.allPointerCapabilities": 6,
            },
        )
    yield launched
    launched.close()


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
def visit(browser: Browser, server: ServeProcess) -> Iterator[Visit]:
    """Open the page in a window of 1280 x 900 pixels."""
    with Visit(browser, server.origin) as page:
        page.open()
        yield page
