"""The pictures in the documents: taken from the page itself, by `make screenshots`.

Without `SBTK_SCREENSHOTS` the same steps are gone through over the tests' own gallery, and the
pictures thrown away. With it they go to the folder that it names, over the demo's photographs.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from PIL import Image

from demo.photos import copy_stamps, fetch_wheel_photos
from sbtk_runtime.embedding.embedder import Embedder
from sbtk_runtime.gallery.update import update_gallery
from tests.browser.visit import Visit
from tests.serve_process import ServeProcess, serving

if TYPE_CHECKING:
    from playwright.sync_api import Browser

ROOT = Path(__file__).parents[2]
SKETCHES = ROOT / "demo" / "sketches"
ASKED_FOR = os.environ.get("SBTK_SCREENSHOTS")
#: Photographs whose licence scikit-image does not state, so no document shows them.
NOT_SHOWN = ("moon.png", "motorcycle_left.png", "motorcycle_right.png")

DESK: dict[str, Any] = {"viewport": {"width": 1280, "height": 800}, "device_scale_factor": 1.5}
PHONE: dict[str, Any] = {
    "viewport": {"width": 390, "height": 844},
    "device_scale_factor": 2,
    "is_mobile": True,
    "has_touch": True,
    "color_scheme": "dark",
}


@pytest.fixture(scope="module")
def pictured(request: pytest.FixtureRequest) -> Iterator[ServeProcess]:
    """Returns a server of the gallery that the pictures show."""
    if ASKED_FOR is None:
        yield request.getfixturevalue("server")
        return
    # Its path is in a picture; that of a test says nothing to a reader.
    with tempfile.TemporaryDirectory(prefix="demo-") as name:
        folder = Path(name)
        fetch_wheel_photos(folder / "photos")
        for not_shown in NOT_SHOWN:
            (folder / "photos" / not_shown).unlink()
        copy_stamps(folder / "photos" / "stamps")
        with Embedder(engine="onnxruntime") as embedder:
            update_gallery(folder / "gallery.sbtk", [folder / "photos"], embedder)
        with serving(folder / "gallery.sbtk", log=folder / "log") as served:
            served.wait_until_ready()
            yield served


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Returns the folder that pictures go to."""
    return tmp_path if ASKED_FOR is None else ROOT / ASKED_FOR


def test_the_page_finds_photos_from_a_sketch(
    chromium: Browser, pictured: ServeProcess, images: Path
) -> None:
    with Visit(chromium, pictured.origin, **DESK) as visit:
        visit.open()
        _bring(visit, "cat")
        _take(visit, images / "page.jpg")
        visit.page.locator("#hits li a").first.click()
        visit.page.get_by_role("dialog").wait_for()
        _take(visit, images / "photo.jpg")


def test_the_page_on_a_phone_in_the_dark(
    chromium: Browser, pictured: ServeProcess, images: Path
) -> None:
    with Visit(chromium, pictured.origin, **PHONE) as visit:
        visit.open()
        _bring(visit, "flower")
        _take(visit, images / "phone.jpg")


def _bring(visit: Visit, subject: str) -> None:
    with visit.new_hits(), visit.page.expect_file_chooser() as chosen:
        visit.page.get_by_role("button", name="Open picture").click()
        chosen.value.set_files(SKETCHES / f"{subject}.png")


def _take(visit: Visit, path: Path) -> None:
    """Writes what the window shows, once every thumbnail in it is sharp and nothing moves."""
    visit.page.wait_for_load_state("networkidle")
    visit.page.locator("#toast.is-shown").wait_for(state="detached")
    visit.page.mouse.move(1, 1)
    visit.page.wait_for_timeout(600)
    visit.page.screenshot(path=path, type="jpeg", quality=84)
    with Image.open(path) as picture:
        colours = picture.convert("RGB").getcolors(picture.width * picture.height)
        assert colours is not None and len(colours) > 1000
