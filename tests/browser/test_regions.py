"""Parts of photos on the page: frames of hits, photos like a marked part, and cropped images."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import parse_qs, urlsplit

import pytest
from PIL import Image

from sbtk_runtime.embedding.embedder import Embedder
from sbtk_runtime.gallery.gallery import Gallery
from sbtk_runtime.gallery.queries import Box
from sbtk_runtime.gallery.update import update_gallery
from tests.browser.visit import ROOF, Visit, violations
from tests.runtime.gallery.test_regions import CORNERS, scene, thing
from tests.serve_process import ServeProcess, serving
from tests.tiny_regions import tiny_map_bundle

if TYPE_CHECKING:
    from playwright.sync_api import Browser

COLOURS = ("red", "green", "blue")
# Where the photo is on the screen, without the margins of its element.
_PHOTO_BOX = """async image => {
    // The large image has taken the preview's place, and the page has heard of it.
    await image.decode();
    await new Promise(done => requestAnimationFrame(() => setTimeout(done)));
    const { naturalWidth: width, naturalHeight: height } = image;
    const box = image.getBoundingClientRect();
    const isFitted = getComputedStyle(image).objectFit === "contain";
    const fitting = Math.min(box.width / width, box.height / height);
    const zoom = box.width / image.offsetWidth;
    const scale = isFitted ? fitting : Math.min(zoom, fitting);
    return [box.left + (box.width - width * scale) / 2, box.top + (box.height - height * scale) / 2,
        width * scale, height * scale];
}"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a model, photos with a thing in a corner, and a gallery with regions."""
    place = tmp_path_factory.mktemp("regions")
    tiny_map_bundle(place / "bundle")
    for number, colour in enumerate(COLOURS):
        for corner, box in enumerate(CORNERS):
            name, size = f"{colour}-{corner}.png", (640, 400)
            scene(place / "photos" / name, colour, box, 10 * number + corner, size)
        thing(colour).save(place / f"{colour}.png")
    with Embedder(place / "bundle", engine="onnxruntime", threads=1) as embedder:
        update_gallery(place / "gallery.sbtk", [place / "photos"], embedder, regions=16)
    return place


@pytest.fixture(scope="module")
def regional(place: Path) -> Iterator[ServeProcess]:
    options = ("--model", str(place / "bundle"), "--engine", "onnxruntime", "--threads", "1")
    with serving(place / "gallery.sbtk", *options, log=place / "log") as served:
        served.wait_until_ready()
        yield served


@pytest.fixture
def page(browser: Browser, regional: ServeProcess) -> Iterator[Visit]:
    with Visit(browser, regional.origin) as visit:
        visit.open()
        yield visit


def upload(visit: Visit, path: Path) -> None:
    with visit.new_hits(), visit.page.expect_file_chooser() as chosen:
        visit.page.get_by_role("button", name="Open image").click()
        chosen.value.set_files(path)


def colours(visit: Visit, count: int) -> set[str]:
    return {name.partition("-")[0] for name in visit.names()[:count]}


def photo_box(visit: Visit, selector: str) -> Box:
    # Not while a thumbnail stands in for the photo, which may be shown at another size.
    visit.wait_until(
        """selector => {
            const image = document.querySelector(selector);
            return image.naturalWidth > 300 && !image.classList.contains("is-preview");
        }""",
        selector,
    )
    x, y, width, height = visit.page.eval_on_selector(selector, _PHOTO_BOX)
    return x, y, width, height


def framed(visit: Visit, image: str, frame: str) -> Box:
    """Return the frame on the screen as shares of the photo."""
    left, top, width, height = photo_box(visit, image)
    box = visit.page.locator(frame).bounding_box()
    assert box is not None
    return (
        (box["x"] - left) / width,
        (box["y"] - top) / height,
        box["width"] / width,
        box["height"] / height,
    )


def drag(visit: Visit, image: str, part: Box) -> None:
    """Mark a part of the photo with the mouse."""
    left, top, width, height = photo_box(visit, image)
    x, y, breadth, depth = part
    visit.page.mouse.move(left + x * width, top + y * height)
    visit.page.mouse.down()
    end = (left + (x + breadth) * width, top + (y + depth) * height)
    visit.page.mouse.move(*end, steps=4)
    visit.page.mouse.up()


def test_the_viewer_frames_the_part_that_was_found(page: Visit, place: Path) -> None:
    upload(page, place / "green.png")
    assert colours(page, 4) == {"green"}
    with (
        Gallery.open(place / "gallery.sbtk") as gallery,
        Embedder(place / "bundle", engine="onnxruntime", threads=1) as embedder,
    ):
        regions = {
            Path(hit.path).name: hit.region
            for hit in gallery.query(place / "green.png", embedder, 4, "photo")
        }
    for position in range(2):
        page.page.locator(f'#hits > li[aria-posinset="{position + 1}"] a').click()
        page.page.locator("#viewer-region").wait_for()
        expected = regions[page.names()[position]]
        assert framed(page, "#viewer-image", "#viewer-region") == pytest.approx(expected, abs=0.01)
        # The frame stays on the part of a zoomed photo.
        page.page.locator("#viewer-zoom-in").click()
        page.page.keyboard.press("ArrowRight")
        assert framed(page, "#viewer-image", "#viewer-region") == pytest.approx(expected, abs=0.01)
        page.page.keyboard.press("0")
        page.page.keyboard.press("Escape")
        page.wait_until("() => location.hash === ''")


def test_more_like_a_part_that_is_marked_by_pointer_or_keys(page: Visit, place: Path) -> None:
    upload(page, place / "photos" / "blue-1.png")
    # Found by its whole frame.
    page.page.locator('#hits > li[aria-posinset="1"] a').click()
    dialog = page.page.get_by_role("dialog", name="blue-1.png")
    assert dialog.get_by_role("button", name="More like the marked part").is_hidden()
    dialog.get_by_role("button", name="Mark a part").click()
    drag(page, "#viewer-image", CORNERS[1])
    marked = framed(page, "#viewer-image", "#viewer-region")
    assert marked == pytest.approx(CORNERS[1], abs=0.02)
    # A click marks nothing; arrow keys move the frame, and change its size with Shift.
    page.page.locator("#viewer-marking").click(position={"x": 200, "y": 200})
    page.page.keyboard.press("ArrowDown")
    page.page.keyboard.press("Shift+ArrowUp")
    moved = framed(page, "#viewer-image", "#viewer-region")
    assert moved[1] - marked[1] == pytest.approx(0.02, abs=0.01)
    assert marked[3] - moved[3] == pytest.approx(0.02, abs=0.01)
    assert violations(page) == []
    with page.new_hits():
        page.page.keyboard.press("Enter")
    sent = parse_qs(urlsplit(page.queries[-1].url).query)["region"][0]
    assert list(map(float, sent.split(","))) == pytest.approx(list(moved), abs=0.02)
    assert colours(page, 3) == {"blue"}
    assert page.page.locator("#likes-label").inner_text() == "Similar to a part of"
    before = page.ids()
    page.page.reload()
    page.page.wait_for_selector('#results[data-shown="similar"][aria-busy="false"]')
    assert page.ids() == before


def test_an_image_is_cropped_before_it_is_searched_with(page: Visit, place: Path) -> None:
    crop = page.page.get_by_role("button", name="Crop")
    assert crop.is_hidden()
    upload(page, place / "photos" / "red-2.png")
    crop.click()
    page.page.get_by_role("dialog", name="Search with a part of the image").wait_for()
    drag(page, "#cropper-image", CORNERS[2])
    assert violations(page) == []
    with page.new_hits():
        page.page.get_by_role("button", name="Search with this part").click()
    assert colours(page, 4) == {"red"}
    assert page.ids() == page.resend_last()[: len(page.ids())]
    whole = len(page.queries)
    with page.new_hits():
        page.page.get_by_role("button", name="Undo").click()
    assert len(page.queries) > whole
    assert page.names()[0] == "red-2.png"
    # The focus stays near a button that is hidden.
    crop.focus()
    page.page.keyboard.press("Control+z")
    page.wait_for_recent()
    assert page.page.evaluate("document.activeElement.id") == "upload"


def test_a_photo_that_was_turned_since_has_no_frame_and_says_so(page: Visit, place: Path) -> None:
    path = place / "photos" / "blue-3.png"
    image = Image.open(path).copy()
    try:
        # Its thumbnail may be requested while it is written.
        page.allow_message("404.*/thumbnail")
        image.rotate(90, expand=True).save(path)
        upload(page, place / "blue.png")
        position = page.names().index("blue-3.png") + 1
        page.page.locator(f'#hits > li[aria-posinset="{position}"] a').click()
        page.page.get_by_text("The file has changed since it was indexed.").wait_for()
        page.wait_until("() => document.querySelector('#viewer-region').hidden")
        page.page.keyboard.press("Escape")
        position = page.names().index("blue-2.png") + 1
        page.page.locator(f'#hits > li[aria-posinset="{position}"] a').click()
        page.page.locator("#viewer-region").wait_for()
    finally:
        image.save(path)


def test_a_gallery_of_whole_frames_offers_no_parts(visit: Visit) -> None:
    with visit.new_hits():
        visit.stroke(ROOF)
    visit.page.locator('#hits > li[aria-posinset="1"] a').click()
    visit.page.get_by_role("button", name="More like this", exact=True).wait_for()
    assert visit.page.get_by_role("button", name="Mark a part").is_hidden()
    assert visit.page.locator("#viewer-region").is_hidden()


def test_the_collection_page_offers_to_compare_parts(
    browser: Browser, place: Path, tmp_path: Path
) -> None:
    with Embedder(place / "bundle", engine="onnxruntime", threads=1) as embedder:
        update_gallery(tmp_path / "plain.sbtk", [place / "photos"], embedder)
    options = ("--model", str(place / "bundle"), "--engine", "onnxruntime", "--threads", "1")
    with serving(tmp_path / "plain.sbtk", *options, log=tmp_path / "log") as served:
        served.wait_until_ready()
        with Visit(browser, served.origin) as visit:
            visit.page.goto(f"{served.origin}/collection")
            assert not visit.page.get_by_text("are compared, too.").is_visible()
            visit.page.get_by_role("button", name="Compare parts").click()
            visit.page.get_by_text("Parts of the photos are compared, too.").wait_for()
            assert not visit.page.get_by_role("button", name="Compare parts").is_visible()
            assert violations(visit) == []
    with Gallery.open(tmp_path / "plain.sbtk") as gallery:
        assert gallery.manifest.regions is not None
        assert gallery.manifest.regions.count == 16


def test_read_only_pages_do_not_offer_it(
    browser: Browser, place: Path, regional: ServeProcess, tmp_path: Path
) -> None:
    with Embedder(place / "bundle", engine="onnxruntime", threads=1) as embedder:
        update_gallery(tmp_path / "plain.sbtk", [place / "photos"], embedder)
    options = ("--model", str(place / "bundle"), "--engine", "onnxruntime", "--read-only")
    with serving(tmp_path / "plain.sbtk", *options, log=tmp_path / "log") as served:
        served.wait_until_ready()
        with Visit(browser, served.origin) as visit:
            with visit.page.expect_response("**/v1/gallery"):
                visit.page.goto(f"{served.origin}/collection")
            visit.page.get_by_text("Folders can be changed on the computer").wait_for()
            visit.page.wait_for_load_state("networkidle")
            assert not visit.page.locator("#parts").is_visible()
    with Visit(browser, regional.origin) as visit:
        visit.page.goto(f"{regional.origin}/collection")
        visit.page.get_by_text("Parts of the photos are compared, too.").wait_for()
