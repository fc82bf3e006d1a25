"""Images that are opened, pasted or dropped on the page."""

from __future__ import annotations

import base64
import io
import struct
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest
from PIL import Image

from tests.browser.visit import ROOF, Visit
from tests.serve_process import ServeProcess

ROOT = Path(__file__).parents[2]
FLOWER_SKETCH = ROOT / "demo" / "sketches" / "flower.png"
SVG = b'<svg xmlns="http://www.w3.org/2000/svg"><script>document.title = "run"</script></svg>'

NO_DRAGS = "Playwright sends it no drags from other programs"

# The events that the clipboard and a file manager cause.
_FILE_EVENT = """([kind, name, type, bytes, others]) => {
    const content = Uint8Array.from(atob(bytes), (character) => character.charCodeAt(0));
    const carried = new DataTransfer();
    for (const other of others) carried.items.add(new File(["x"], other, { type: "text/plain" }));
    carried.items.add(new File([content], name, { type }));
    const how = { bubbles: true, cancelable: true };
    if (kind === "paste") {
        // Firefox lets no script set the data of a clipboard event.
        const event = new ClipboardEvent("paste", how);
        Object.defineProperty(event, "clipboardData", { value: carried });
        document.dispatchEvent(event);
        return;
    }
    const canvas = document.getElementById("input-layer");
    for (const step of ["dragenter", "dragover", "drop"]) {
        canvas.dispatchEvent(new DragEvent(step, { ...how, dataTransfer: carried }));
    }
}"""
_COPY_IMAGE = """async (bytes) => {
    const content = Uint8Array.from(atob(bytes), (character) => character.charCodeAt(0));
    const image = new Blob([content], { type: "image/png" });
    await navigator.clipboard.write([new ClipboardItem({ "image/png": image })]);
}"""

# An uncompressed image, which takes a while to decode. Counts the images that are no longer needed.
_DROP_SLOW_IMAGE = """() => {
    window.released = 0;
    const revoke = URL.revokeObjectURL;
    URL.revokeObjectURL = (url) => {
        window.released += 1;
        revoke.call(URL, url);
    };
    const side = 4400;
    const bytes = new Uint8Array(54 + 3 * side * side);
    const header = new DataView(bytes.buffer);
    const fields = [[2, bytes.length], [10, 54], [14, 40], [18, side], [22, side], [26, 0x180001]];
    for (const [offset, value] of fields) header.setUint32(offset, value, true);
    bytes.set([0x42, 0x4d]);
    const carried = new DataTransfer();
    carried.items.add(new File([bytes], "slow.bmp", { type: "image/bmp" }));
    const event = new DragEvent("drop", { bubbles: true, cancelable: true, dataTransfer: carried });
    document.getElementById("input-layer").dispatchEvent(event);
}"""


def _open(visit: Visit, path: Path) -> None:
    with visit.page.expect_file_chooser() as chosen:
        visit.page.get_by_role("button", name="Open image").click()
    chosen.value.set_files(path)


def _event(
    visit: Visit, kind: str, name: str, media_type: str, content: bytes, others: Sequence[str] = ()
) -> None:
    encoded = base64.b64encode(content).decode()
    visit.page.evaluate(_FILE_EVENT, [kind, name, media_type, encoded, [*others]])


def _drop(visit: Visit, path: Path) -> None:
    _event(visit, "drop", path.name, "image/png", path.read_bytes())


def _drag_in(
    visit: Visit, *, files: Sequence[Path] = (), items: Mapping[str, str] | None = None
) -> None:
    """Drop files, folders, or texts by their types on the page, as a file manager does."""
    session = visit.context.new_cdp_session(visit.page)
    texts = [{"mimeType": kind, "data": text} for kind, text in (items or {}).items()]
    carried = {"items": texts, "files": [*map(str, files)], "dragOperationsMask": 1}
    for kind in ("dragEnter", "dragOver", "drop"):
        event = {"type": kind, "x": 300, "y": 300, "data": carried}
        session.send("Input.dispatchDragEvent", event)


def _toast(visit: Visit, start: str) -> str:
    """Wait for the message that starts so, and return it."""
    toast = visit.page.locator("#toast.is-shown").filter(has_text=start)
    toast.wait_for()
    said = toast.inner_text()
    assert said.startswith(start)
    return said


def _paste(visit: Visit, path: Path) -> None:
    if visit.is_firefox:
        # The keys of its driver paste nothing.
        _event(visit, "paste", path.name, "image/png", path.read_bytes())
        return
    visit.allow_clipboard()
    visit.page.evaluate(_COPY_IMAGE, base64.b64encode(path.read_bytes()).decode())
    visit.page.locator("#input-layer").focus()
    visit.page.keyboard.press("Control+V")


@pytest.mark.firefox
@pytest.mark.parametrize("upload", [_open, _paste, _drop])
def test_an_uploaded_sketch_finds_its_photo(
    visit: Visit, upload: Callable[[Visit, Path], None]
) -> None:
    with visit.new_hits():
        upload(visit, FLOWER_SKETCH)
    assert visit.names()[0] == "flower.jpg"
    assert visit.ids() == visit.resend_last()
    assert visit.page.get_by_role("radio", name="Sketch").is_checked()
    assert visit.ink() > 1000


def test_a_photo_is_detected_and_finds_itself(visit: Visit, photos: Path) -> None:
    with visit.new_hits():
        _open(visit, photos / "places" / "china.jpg")
    assert visit.page.get_by_role("radio", name="Photo").is_checked()
    assert visit.names()[0] == "china.jpg"
    score = visit.page.locator("#hits .photo-score").first.text_content()
    assert score is not None and float(score) > 0.99
    as_photo = visit.ids()
    with visit.new_hits():
        visit.page.get_by_role("radio", name="Sketch").check()
    assert "as=sketch" in visit.queries[-1].url
    assert visit.ids() != as_photo


@pytest.mark.parametrize("kind", ["drop", "paste"])
def test_files_beside_an_image_are_counted_as_not_used(visit: Visit, kind: str) -> None:
    content = FLOWER_SKETCH.read_bytes()
    with visit.new_hits():
        _event(visit, kind, "flower.png", "image/png", content, ["a.txt", "b.txt"])
    said = visit.page.locator("#toast").inner_text()
    assert said.startswith("flower.png: searching with a sketch.")
    assert said.endswith("2 more not used.")


@pytest.mark.chromium_only(NO_DRAGS)
def test_a_folder_that_is_dropped_says_where_folders_are_added(
    visit: Visit, photos: Path, tmp_path: Path
) -> None:
    _drag_in(visit, files=[photos / "places"])
    said = _toast(visit, "places is a folder.")
    assert "add it on the page Collection" in said
    _drag_in(visit, files=[photos / "places", photos / "plants", photos / "people"])
    _toast(visit, "places and 2 more are folders.")
    assert visit.queries == []
    (tmp_path / "notes.txt").write_text("not an image")
    with visit.new_hits():
        _drag_in(visit, files=[photos, tmp_path / "notes.txt", FLOWER_SKETCH])
    assert _toast(visit, "flower.png: searching with a sketch.").endswith("2 more not used.")


@pytest.mark.chromium_only(NO_DRAGS)
def test_a_folder_that_is_dropped_on_the_collection_leads_to_its_field(
    visit: Visit, photos: Path
) -> None:
    visit.page.goto(f"{visit.origin}/collection")
    visit.page.get_by_text("photos searchable").wait_for()
    _drag_in(visit, files=[photos / "places"])
    visit.page.get_by_role("status").filter(has_text="do not tell where places is").wait_for()
    assert visit.page.evaluate("document.activeElement.id") == "path"
    assert visit.page.url == f"{visit.origin}/collection"


@pytest.mark.chromium_only(NO_DRAGS)
def test_links_and_texts_that_are_dropped_do_not_leave_the_page(visit: Visit) -> None:
    visit.stroke(ROOF)
    _drag_in(visit, items={"text/uri-list": "https://example.org/a.jpg"})
    assert "Save the image as a file" in _toast(visit, "This is a link, not an image.")
    _drag_in(visit, items={"text/plain": "a tree"})
    _toast(visit, "This is text, not an image.")
    assert visit.page.url.startswith(f"{visit.origin}/")
    assert visit.ink() > 500


def test_pasted_text_says_that_it_is_not_an_image(visit: Visit) -> None:
    visit.allow_clipboard()
    visit.page.evaluate("navigator.clipboard.writeText('a tree')")
    visit.page.locator("#input-layer").focus()
    visit.page.keyboard.press("Control+V")
    _toast(visit, "This is text, not an image.")


def test_files_that_cannot_be_used_are_named_with_the_reason(visit: Visit) -> None:
    _event(visit, "drop", "empty.png", "image/png", b"")
    _toast(visit, "empty.png: The file is empty.")
    _event(visit, "drop", "IMG_1.heic", "image/heic", b"heic", ["a.txt", "b.txt"])
    _toast(visit, "a.txt: Unsupported image format.")
    _event(visit, "drop", "cut.png", "image/png", FLOWER_SKETCH.read_bytes()[:30], ["a.txt"])
    said = _toast(visit, "cut.png: The file is damaged or not an image.")
    assert said.endswith("1 more not used.")
    _event(visit, "drop", "no suffix", "", b"not an image")
    _toast(visit, "no suffix: The file is damaged or not an image.")
    assert visit.queries == []


def test_an_image_without_a_suffix_is_recognised(visit: Visit) -> None:
    with visit.new_hits():
        _event(visit, "drop", "flower", "", FLOWER_SKETCH.read_bytes())
    assert visit.names()[0] == "flower.jpg"


def test_the_last_of_two_uploads_wins(visit: Visit) -> None:
    with visit.new_hits():
        visit.page.evaluate(_DROP_SLOW_IMAGE)
        _drop(visit, FLOWER_SKETCH)
    flowers = visit.ids()
    visit.wait_until("() => window.released === 2")
    visit.page.wait_for_timeout(100)
    assert visit.ids() == flowers
    assert visit.names()[0] == "flower.jpg"


def test_an_image_of_many_pixels_is_sent_scaled_down(visit: Visit) -> None:
    # Its file is small, but the server would take long to decode it.
    many = io.BytesIO()
    Image.new("RGB", (7000, 6000), (200, 30, 30)).save(many, "PNG")
    with visit.new_hits():
        _event(visit, "drop", "many.png", "image/png", many.getvalue())
    assert visit.sent_image().size == (1024, 878)


def test_strokes_over_an_image_are_part_of_the_search(visit: Visit) -> None:
    with visit.new_hits():
        _open(visit, FLOWER_SKETCH)
    before = visit.ids()
    with visit.new_hits():
        visit.stroke(((0.1, 0.1), (0.9, 0.1), (0.9, 0.9), (0.1, 0.9), (0.1, 0.1)))
    assert visit.ids() != before
    with visit.new_hits():
        visit.page.keyboard.press("Control+z")
    assert visit.ids() == before


def test_an_svg_is_rejected_and_not_executed(visit: Visit, server: ServeProcess) -> None:
    for kind in ("paste", "drop"):
        _event(visit, kind, "a.svg", "image/svg+xml", SVG)
        visit.page.get_by_role("status").filter(has_text="Unsupported image format").wait_for()
    _event(visit, "drop", "a.png", "image/png", SVG)
    visit.page.get_by_role("status").filter(has_text="damaged").wait_for()
    assert visit.queries == []
    assert visit.page.title() == "sbtk: search photos by sketch"
    assert server.health()[0] == 200


def test_an_image_of_20000_pixels_a_side_is_rejected_by_the_page(
    visit: Visit, tmp_path: Path
) -> None:
    path = tmp_path / "wide.png"
    path.write_bytes(_blank_png(20_000))
    assert path.stat().st_size < 100_000
    _open(visit, path)
    visit.page.get_by_role("status").filter(has_text="The limit is 120 megapixels").wait_for()
    assert visit.queries == []


def test_a_photo_of_40_megapixels_is_reduced_and_found(
    visit: Visit, photos: Path, tmp_path: Path
) -> None:
    path = tmp_path / "large.jpg"
    with Image.open(photos / "plants" / "flower.jpg") as image:
        image.resize((7750, 5170)).save(path, quality=97)
    assert path.stat().st_size > 2 << 20  # larger ones are converted
    with visit.new_hits():
        _open(visit, path)
        visit.page.wait_for_selector('#results[data-shown="photo"]')
    assert visit.names()[0] == "flower.jpg"
    assert "as=photo" in visit.queries[-1].url
    sent = visit.page.evaluate("createImageBitmap(window.lastSent.body).then(({ width }) => width)")
    assert sent == 1024


def _blank_png(side: int) -> bytes:
    """Return a white square PNG with one bit per pixel."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    rows = zlib.compress((b"\0" + b"\xff" * (side // 8)) * side, 9)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    )
