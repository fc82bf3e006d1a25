"""Accessibility, screen sizes, themes and the content security policy."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.browser.test_regions import photo_box
from tests.browser.visit import NO_MEDIA, ROOF, Visit, violations
from tests.serve_process import ServeProcess

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Locator

SCREENS = {
    "phone": (390, 844),
    "small phone": (320, 568),
    "phone in landscape": (844, 390),
    "small phone in landscape": (568, 320),
    "tablet": (1024, 768),
    "tablet in portrait": (820, 1180),
    "laptop": (1280, 720),
    "desktop": (1600, 1000),
}

_TEXT_END = """element => {
    const range = document.createRange();
    range.selectNodeContents(element);
    return range.getBoundingClientRect().right;
}"""


def test_axe_finds_no_serious_violation(browser: Browser, server: ServeProcess) -> None:
    with Visit(browser, server.origin, reduced_motion="reduce") as visit:
        visit.open()
        assert violations(visit) == []
        with visit.new_hits():
            visit.stroke(ROOF)
        assert violations(visit) == []
        visit.use_scheme("dark")
        assert violations(visit) == []
        visit.page.locator("#hits li a").first.click()
        visit.page.get_by_role("dialog").wait_for()
        assert violations(visit) == []
        visit.page.get_by_role("button", name="Close").click()
        visit.page.get_by_role("button", name="photos").click()
        visit.page.locator("#info").wait_for()
        assert violations(visit) == []
        visit.page.keyboard.press("Escape")
        visit.page.keyboard.press("?")
        visit.page.get_by_role("dialog", name="Keyboard shortcuts").wait_for()
        assert violations(visit) == []


@pytest.mark.parametrize("opened", ["phone", "laptop"])
def test_the_page_fits_the_screen(browser: Browser, server: ServeProcess, opened: str) -> None:
    """The page is opened on one screen, and turned or resized to the others."""
    width, height = SCREENS[opened]
    with Visit(browser, server.origin, viewport={"width": width, "height": height}) as visit:
        visit.open()
        for screen in (opened, *SCREENS):
            _assert_page_fits(visit, *SCREENS[screen])


def _assert_page_fits(visit: Visit, width: int, height: int) -> None:
    """Assert that the page fits before anything is drawn, and with a sketch."""
    visit.page.set_viewport_size({"width": width, "height": height})
    visit.wait_for_recent()
    assert visit.fits()
    # Examples and photos fill the page before anything is drawn.
    list_bottom = "list => list.getBoundingClientRect().bottom"
    assert visit.page.eval_on_selector("#hits", list_bottom) > height
    example = visit.page.locator(".example").first.bounding_box()
    assert example is not None and example["y"] < height
    with visit.new_hits():
        visit.stroke(ROOF)
    assert visit.fits()
    canvas = visit.page.locator("#input-layer").bounding_box()
    assert canvas is not None
    assert canvas["width"] == pytest.approx(canvas["height"], abs=1)
    assert canvas["width"] > 0.35 * min(width, height)
    assert canvas["y"] + canvas["height"] < height
    first = visit.page.locator("#hits li.photo").first.bounding_box()
    assert first is not None and first["width"] > 90
    # The first hits are visible without scrolling.
    assert first["y"] < height - 40
    with visit.new_hits(are_recent=True):
        visit.page.keyboard.press("Control+z")


def test_a_zoomed_photo_fills_the_viewer(visit: Visit, photos: Path) -> None:
    visit.page.get_by_label("Folder").select_option(str(photos / "places"))
    link = visit.page.get_by_role("link", name="china.jpg")
    for screen in (
        "tablet",
        "tablet in portrait",
        "phone in landscape",
        "small phone in landscape",
    ):
        width, height = SCREENS[screen]
        visit.page.set_viewport_size({"width": width, "height": height})
        link.click()
        _assert_zoomed_photo_fills(visit, width, height)


def _assert_zoomed_photo_fills(visit: Visit, width: int, height: int) -> None:
    """Assert that a zoomed photo fills the viewer wherever it is dragged, and close it."""
    dialog = visit.page.get_by_role("dialog", name="china.jpg")
    without_scrollbar = visit.page.evaluate("document.body.clientWidth")
    names = ("Zoom in", "More like this", "Close")
    for part in (dialog, *(dialog.get_by_role("button", name=name, exact=True) for name in names)):
        box = _box(part)
        assert box[0] >= 0 and box[1] >= 0
        assert box[0] + box[2] <= without_scrollbar and box[1] + box[3] <= height
    stage = _box(visit.page.locator("#viewer-stage"))
    middle = (stage[0] + stage[2] / 2, stage[1] + stage[3] / 2)
    for _ in range(3):
        visit.page.keyboard.press("+")
        for corner in ((1, 1), (width - 1, height - 1)):
            for _ in range(4):
                visit.page.mouse.move(*middle)
                visit.page.mouse.down()
                visit.page.mouse.move(*corner)
                visit.page.mouse.up()
            photo = photo_box(visit, "#viewer-image")
            for axis in (0, 1):
                _assert_fills(photo[axis::2], stage[axis::2])
    # The button is seen on any photo.
    close = dialog.get_by_role("button", name="Close")
    x, y, wide, high = _box(close)
    if x < stage[0] + stage[2] and y < stage[1] + stage[3]:
        behind = close.evaluate("button => getComputedStyle(button).backgroundColor")
        assert behind not in ("transparent", "rgba(0, 0, 0, 0)")
    visit.page.mouse.click(x + wide / 2, y + high / 2)
    visit.page.locator("dialog[open]").wait_for(state="detached")


def _box(item: Locator) -> tuple[float, float, float, float]:
    item.wait_for()
    box = item.bounding_box()
    assert box is not None
    return box["x"], box["y"], box["width"], box["height"]


def _assert_fills(photo: tuple[float, ...], stage: tuple[float, ...]) -> None:
    """Assert that a photo fills the stage or is in its middle, by their starts and lengths."""
    if photo[1] < stage[1]:
        assert photo[0] + photo[1] / 2 == pytest.approx(stage[0] + stage[1] / 2, abs=2)
    else:
        assert photo[0] < stage[0] + 2 and photo[0] + photo[1] > stage[0] + stage[1] - 2


def test_the_help_fits_a_laptop(browser: Browser, server: ServeProcess) -> None:
    with Visit(browser, server.origin, viewport={"width": 1280, "height": 720}) as visit:
        visit.open()
        visit.page.keyboard.press("?")
        help_dialog = visit.page.get_by_role("dialog", name="Keyboard shortcuts")
        box = help_dialog.bounding_box()
        assert box is not None and box["y"] >= 0 and box["y"] + box["height"] <= 720
        assert help_dialog.evaluate("dialog => dialog.scrollHeight <= dialog.clientHeight")
        # On a small phone, too, its title is clear of the button beside it.
        visit.page.set_viewport_size({"width": 320, "height": 568})
        title = visit.page.locator("#help-title").evaluate(_TEXT_END)
        button = visit.page.locator("#help-close").bounding_box()
        assert button is not None and title <= button["x"]


@pytest.mark.chromium_only(NO_MEDIA)
def test_the_theme_follows_the_system_or_the_button(browser: Browser, server: ServeProcess) -> None:
    with Visit(browser, server.origin, color_scheme="dark") as visit:
        visit.open()
        dark = _brightness(visit)
        visit.page.get_by_role("button", name="photos").click()
        visit.page.get_by_role("radio", name="Light").check()
        light = _brightness(visit)
        assert dark < 80 < 200 < light
        visit.open()
        assert _brightness(visit) == light
        visit.page.keyboard.press("t")
        assert _brightness(visit) == dark
        visit.page.get_by_role("status").filter(has_text="Theme: dark.").wait_for()
        visit.page.emulate_media(media="print")
        assert _brightness(visit) == light


def test_injected_scripts_and_requests_to_other_origins_are_blocked(visit: Visit) -> None:
    _record_violations(visit)
    visit.page.evaluate(
        """() => {
            const script = document.createElement("script");
            script.textContent = "document.title = 'run'";
            document.body.append(script);
            document.body.insertAdjacentHTML("beforeend", "<p onclick='document.title = 1'>x</p>");
        }"""
    )
    visit.page.locator("body > p", has_text="x").last.dispatch_event("click")
    assert visit.page.title() == "sbtk: search photos by sketch"
    visit.wait_until("() => window.blocked.filter((name) => name.startsWith('script')).length >= 2")
    fetched = "fetch('http://127.0.0.1:9/').then(() => 'loaded', () => 'blocked')"
    assert visit.page.evaluate(fetched) == "blocked"
    visit.wait_until("() => window.blocked.includes('connect-src')")


def test_the_api_reference_makes_no_requests_to_other_origins(
    browser: Browser, server: ServeProcess
) -> None:
    with Visit(browser, server.origin) as visit:
        visit.page.goto(f"{visit.origin}/docs")
        visit.page.get_by_text("/v1/query").first.wait_for()
        visit.page.wait_for_load_state("networkidle")


def _record_violations(visit: Visit) -> None:
    """Record what the content security policy blocks in `window.blocked`."""
    visit.page.evaluate(
        """() => {
            window.blocked = [];
            addEventListener("securitypolicyviolation", (event) => {
                window.blocked.push(event.effectiveDirective);
            });
        }"""
    )
    visit.allow_message("Content Security Policy|settings blocked")


def _brightness(visit: Visit) -> float:
    """Return the mean of red, green and blue of the page's background."""
    script = "() => getComputedStyle(document.body).backgroundColor.match(/[\\d.]+/g).map(Number)"
    red, green, blue = visit.page.evaluate(script)[:3]
    return float(red + green + blue) / 3
