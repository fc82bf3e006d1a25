"""Contact sheets: rows that fill the width of a window and of a printed page."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from sbtk_cli.main import main
from tests.browser.visit import NO_MEDIA, Visit, violations

if TYPE_CHECKING:
    from playwright.sync_api import Browser

SKETCH = Path(__file__).parents[2] / "demo" / "sketches" / "flower.png"
# Left, top, width, height and shape of each photo, and the width of the list.
_LAID_OUT = """() => [
    [...document.querySelectorAll(".card-image")].map((image) => {
        const { x, y, width, height } = image.getBoundingClientRect();
        const { naturalWidth, naturalHeight } = image.querySelector("img");
        return [x, Math.round(y), width, height, naturalWidth / naturalHeight];
    }),
    document.querySelector(".cards").clientWidth,
]"""


@pytest.fixture(scope="module")
def sheet(gallery: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the contact sheet of a sketch's first 40 hits."""
    path = tmp_path_factory.mktemp("sheet") / "sheet.html"
    words = ["query", str(SKETCH), "-k", "40", "--gallery", str(gallery), "--html", str(path)]
    assert main([*words, "--engine", "onnxruntime", "--threads", "1", "--quiet"]) == 0
    return path


@pytest.mark.parametrize("width", [320, 390, 1280])
def test_photos_in_their_own_shapes_fill_the_rows(
    browser: Browser, sheet: Path, width: int
) -> None:
    with _opened(browser, sheet, width) as visit:
        _assert_rows_are_full(visit)
        assert violations(visit) == []
        assert visit.fits()


@pytest.mark.chromium_only(NO_MEDIA)
def test_rows_are_full_on_a_printed_page_too(browser: Browser, sheet: Path) -> None:
    with _opened(browser, sheet, 720) as visit:
        visit.page.emulate_media(media="print")
        _assert_rows_are_full(visit)
        assert visit.fits()
        cards = visit.page.locator(".card")
        assert cards.first.evaluate("card => getComputedStyle(card).breakInside") == "avoid"


def _opened(browser: Browser, sheet: Path, width: int) -> Visit:
    visit = Visit(browser, sheet.parent.as_uri(), viewport={"width": width, "height": 900})
    visit.page.goto(sheet.as_uri())
    # Those far below are loaded when they come into view, and Firefox waits longer.
    visit.page.evaluate("for (const image of document.images) image.loading = 'eager'")
    visit.wait_until("() => [...document.images].every((image) => image.complete)")
    return visit


def _assert_rows_are_full(visit: Visit) -> None:
    photos, width = visit.page.evaluate(_LAID_OUT)
    assert len(photos) == 40
    rows: dict[int, list[tuple[float, float]]] = {}
    for x, y, wide, high, shape in photos:
        assert wide / high == pytest.approx(shape, rel=0.04)
        rows.setdefault(y, []).append((x, wide))
    assert len(rows) > 2
    for row in list(rows.values())[:-1]:
        assert row[-1][0] + row[-1][1] - row[0][0] == pytest.approx(width, abs=4)
