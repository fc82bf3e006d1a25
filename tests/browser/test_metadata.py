"""What photos say about themselves, in the page and in contact sheets, whoever wrote it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from PIL import Image

from sbtk_cli.main import main
from tests.browser.visit import Visit
from tests.serve_process import serving
from tests.tiny import tiny_bundle, tiny_photo
from tests.tiny_gallery import index

if TYPE_CHECKING:
    from playwright.sync_api import Browser

#: Elements that run scripts when they are parsed, and an end of whatever the text is put into.
ATTACK = "</dd></script><script>document.title=1</script><img src=x onerror=document.title=1>"
_TAKEN, _LENS, _COMMENT = 0x9003, 0xA434, 0x9286
_DESCRIPTION, _MAKE, _MODEL, _ARTIST = 0x010E, 0x010F, 0x0110, 0x013B
_NOWHERE = {1: "N", 2: (0.0, 0.0, 0.0), 3: "E", 4: (0.0, 0.0, 0.0)}


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """Return a folder with `tiny`, and `photos` with odd metadata in `gallery.sbtk`."""
    tiny_bundle(tmp_path / "tiny")
    photos = tmp_path / "photos"
    photos.mkdir()
    texts = {_DESCRIPTION: ATTACK, _MODEL: ATTACK, _ARTIST: ATTACK}
    write_photo(photos / "script.jpg", texts, {_LENS: ATTACK, _COMMENT: ATTACK.encode()}, {})
    dates = {_TAKEN: "0000:00:00 00:00:00"}
    write_photo(photos / "nowhere.jpg", {_MAKE: "\0", _MODEL: ""}, dates, _NOWHERE)
    index(tmp_path / "gallery.sbtk", photos, tmp_path / "tiny")
    return tmp_path


def write_photo(
    path: Path, base: dict[int, Any], photo: dict[int, Any], gps: dict[int, Any]
) -> None:
    exif = Image.Exif()
    exif.update(base)
    exif.get_ifd(0x8769).update(photo)
    exif.get_ifd(0x8825).update(gps)
    tiny_photo(len(path.name)).save(path, exif=exif)


def test_script_in_metadata_is_shown_as_text(browser: Browser, place: Path) -> None:
    options = ("--model", str(place / "tiny"))
    with serving(place / "gallery.sbtk", *options, log=place / "log") as served:
        served.wait_until_ready()
        with Visit(browser, served.origin) as visit:
            visit.open()
            title = visit.page.title()
            rows = _open(visit, "script.jpg")
            assert rows["Camera"] == rows["Lens"] == ATTACK[:80]
            assert visit.page.locator("#viewer-exif :is(script, img)").count() == 0
            assert visit.fits()
            visit.page.wait_for_load_state("networkidle")
            assert visit.page.title() == title

            # Impossible values are left out, not shown.
            assert _open(visit, "nowhere.jpg").keys() == {"Size"}
            # Photos without a plausible date count by the time of their file.
            visit.page.keyboard.press("Escape")
            visit.page.get_by_role("button", name="All dates").click()
            visit.page.get_by_label("Until").fill("1999-12-31")
            visit.page.get_by_role("heading", name="No photos of these days").wait_for()


def test_script_in_metadata_does_not_run_in_a_contact_sheet(browser: Browser, place: Path) -> None:
    sheet = place / "sheet.html"
    query = ["query", str(place / "photos" / "script.jpg"), "--html", str(sheet), "--quiet"]
    place_options = ["--gallery", str(place / "gallery.sbtk"), "--model", str(place / "tiny")]
    assert main([*query, *place_options]) == 0
    with Visit(browser, sheet.parent.as_uri()) as visit:
        visit.page.goto(sheet.as_uri())
        visit.page.get_by_text("script.jpg").first.wait_for()
        assert visit.page.locator(".cards img").count() == 2
        assert visit.page.locator("script, [onerror]").count() == 0
        assert visit.page.title().startswith("Photos for")
        assert "onerror" not in sheet.read_text()


def _open(visit: Visit, name: str) -> dict[str, str]:
    """Enlarge a photo, and return its metadata as shown."""
    visit.page.keyboard.press("Escape")
    visit.page.locator("dialog[open]").wait_for(state="detached")
    visit.page.get_by_role("link", name=name).click()
    visit.page.get_by_role("dialog", name=name).wait_for()
    visit.page.locator("#viewer-exif dt").filter(has_text="Size").wait_for()
    terms, values = (visit.page.locator(f"#viewer-exif {tag}") for tag in ("dt", "dd"))
    return dict(zip(terms.all_inner_texts(), values.all_inner_texts(), strict=True))
