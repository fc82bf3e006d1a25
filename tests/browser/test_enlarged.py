"""The page enlarged to 200 % and 400 %: nothing is cut off, covered or out of reach.

Browsers enlarge a page by laying it out in fewer, larger pixels: a window of 1280 x 1024 pixels has
320 x 256 at 400 %, the smallest size that WCAG 1.4.10 (reflow) asks for.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

from tests.browser.visit import ROOF, Visit, violations
from tests.serve_process import ServeProcess

if TYPE_CHECKING:
    from playwright.sync_api import Browser

# Windows of 1280 pixels width, and a phone's, by the factor that they are enlarged by.
WINDOWS = {
    "200 % of 1280 x 1024": (640, 512, 2),
    "200 % of 1280 x 720": (640, 360, 2),
    "200 % of 1280 x 512": (640, 256, 2),
    "400 % of 1280 x 1024": (320, 256, 4),
    "400 % of a portrait screen": (320, 480, 4),
}

# Texts and controls that are wider than the window or than what shows them, and controls that
# cannot be scrolled to, or are covered then. An ellipsis shows that a text goes on.
_OUT_OF_REACH = """(scope) => {
    const { clientWidth: width, clientHeight: height } = document.documentElement;
    const root = document.querySelector(scope);
    const isShown = (element) => element.checkVisibility({ visibilityProperty: true }) &&
        element.closest(".visually-hidden, [aria-hidden=true], svg, #hits") === null &&
        element.getBoundingClientRect().width > 1;
    const nameOf = ({ tagName, id, className, textContent }) =>
        `${tagName}#${id}.${className} ${textContent.trim().slice(0, 30)}`;
    const found = [];
    for (const element of root.querySelectorAll("h1,h2,h3,p,dt,dd,code,label,li,a,button,select")) {
        if (!isShown(element)) continue;
        const { left, right } = element.getBoundingClientRect();
        const { overflowX, textOverflow } = getComputedStyle(element);
        const isCut = overflowX !== "visible" && textOverflow !== "ellipsis" &&
            element.scrollWidth > element.clientWidth + 1;
        if (element.matches(".skip-link")) continue;
        if (left < -1 || right > width + 1 || isCut) found.push(`cut off: ${nameOf(element)}`);
    }
    for (const element of root.querySelectorAll("a,button,select,input,summary")) {
        if (!isShown(element) || element.disabled || element.matches(".skip-link")) continue;
        element.scrollIntoView({ block: "nearest", inline: "nearest", behavior: "instant" });
        const { left, right, top, bottom } = element.getBoundingClientRect();
        const isWithin = left > -1 && right < width + 1 && top > -1 && bottom < height + 1;
        const hit = document.elementFromPoint((left + right) / 2, (top + bottom) / 2);
        const isFree = hit !== null && (element.contains(hit) || hit.contains(element) ||
            hit.closest("label")?.contains(element));
        if (!isWithin) found.push(`out of reach: ${nameOf(element)}`);
        else if (!isFree) found.push(`covered by ${nameOf(hit)}: ${nameOf(element)}`);
    }
    window.scrollTo(0, 0);
    return found;
}"""


@pytest.fixture(params=WINDOWS)
def page(request: pytest.FixtureRequest, browser: Browser, server: ServeProcess) -> Iterator[Visit]:
    """Open the page in an enlarged window."""
    width, height, factor = WINDOWS[request.param]
    viewport = {"width": width, "height": height}
    settings = {"viewport": viewport, "device_scale_factor": factor, "reduced_motion": "reduce"}
    with Visit(browser, server.origin, **settings) as visit:
        visit.open()
        yield visit


def test_the_page_and_its_dialogs_reflow(page: Visit) -> None:
    _assert_in_reach(page)
    with page.new_hits():
        page.stroke(ROOF)
    _assert_in_reach(page)
    assert violations(page) == []
    for name, opened in (("photos", "#info"), ("All dates", "#dates")):
        page.page.get_by_role("button", name=name).first.click()
        page.page.locator(opened).wait_for()
        _assert_in_reach(page, opened)
        page.page.keyboard.press("Escape")
    page.page.keyboard.press("?")
    page.page.locator("#help[open]").wait_for()
    _assert_in_reach(page, "#help")
    page.page.keyboard.press("Escape")
    page.page.locator("#hits li a").first.click()
    page.page.locator("#viewer[open]").wait_for()
    page.wait_until("() => document.getElementById('viewer-details').textContent !== ''")
    _assert_in_reach(page, "#viewer")
    stage = page.page.locator("#viewer-stage").bounding_box()
    assert stage is not None and stage["width"] > 150 and stage["height"] > 80
    close, following = (
        page.page.locator(f"#viewer-{name}").bounding_box() for name in ("close", "next")
    )
    assert close is not None and following is not None
    assert following["y"] >= close["y"] + close["height"]
    page.page.get_by_role("button", name="More like this").click()
    page.page.wait_for_selector('#results[data-shown="similar"][aria-busy="false"]')
    page.page.locator("#viewer[open]").wait_for(state="detached")
    _assert_in_reach(page)


def test_an_opened_image_and_the_cropper_reflow(page: Visit) -> None:
    from tests.browser.test_uploads import FLOWER_SKETCH

    with page.new_hits(), page.page.expect_file_chooser() as chosen:
        page.page.get_by_role("button", name="Open image").click()
        chosen.value.set_files(FLOWER_SKETCH)
    page.page.locator("#toast:not(.is-shown)").wait_for()
    _assert_in_reach(page)
    page.page.get_by_role("button", name="Crop").click()
    page.page.locator("#cropper[open]").wait_for()
    _assert_in_reach(page, "#cropper")


def test_the_collection_reflows(page: Visit) -> None:
    page.page.goto(f"{page.origin}/collection")
    page.page.get_by_text("photos searchable").wait_for()
    _assert_in_reach(page)
    page.page.get_by_role("button", name="Remove").first.click()
    page.page.locator("#confirm[open]").wait_for()
    _assert_in_reach(page, "#confirm")


def test_the_page_of_an_address_that_does_not_exist_reflows(page: Visit) -> None:
    page.page.goto(f"{page.origin}/v1/photos/999/file")
    page.page.get_by_role("link", name="Open the start page").wait_for()
    _assert_in_reach(page)
    page.expect_message("404")
    page.page.get_by_role("link", name="Open the start page").click()
    page.wait_for_status("ok")


def test_strokes_follow_the_pointer_while_the_screen_is_magnified(
    browser: Browser, server: ServeProcess
) -> None:
    """A pinch outside the canvas, or a magnifier, shows a part of the page without a new layout."""
    with Visit(browser, server.origin) as visit:
        if visit.is_firefox:
            pytest.skip("Playwright cannot magnify its pages")
        visit.open()
        session = visit.context.new_cdp_session(visit.page)
        session.send("Emulation.setPageScaleFactor", {"pageScaleFactor": 2})
        assert visit.page.evaluate("visualViewport.scale") == 2
        with visit.new_hits():
            visit.stroke(((0.1, 0.3), (0.3, 0.3)))
        rows, columns = visit.sent_ink().nonzero()
        box = (columns.min(), rows.min(), columns.max(), rows.max())
        assert box == pytest.approx((95, 295, 305, 305), abs=8)


def _assert_in_reach(visit: Visit, scope: str = "body") -> None:
    assert visit.fits()
    assert visit.page.evaluate(_OUT_OF_REACH, scope) == []
