"""The page in its colours and sizes, for everybody, and closed to what does not belong to it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from tests.browser.visit import ROOF, Visit
from tests.serve_process import ServeProcess

if TYPE_CHECKING:
    from playwright.sync_api import Browser

SCREENS = {"phone": (390, 844), "tablet": (1024, 768), "desk": (1600, 1000)}


def _violations(visit: Visit) -> list[str]:
    """Returns what axe-core finds serious or worse, as rule and place."""
    axe = pytest.importorskip("axe_playwright_python.sync_playwright")
    found: dict[str, Any] = axe.Axe().run(visit.page).response
    assert len(found["passes"]) > 10
    return [
        f"{one['id']}: {node['target']} {node['failureSummary']}"
        for one in found["violations"]
        for node in one["nodes"]
        if one["impact"] in ("serious", "critical")
    ]


def test_axe_finds_no_serious_violation(chromium: Browser, server: ServeProcess) -> None:
    with Visit(chromium, server.origin, reduced_motion="reduce") as visit:
        visit.open()
        assert _violations(visit) == []
        with visit.new_hits():
            visit.stroke(ROOF)
        assert _violations(visit) == []
        visit.page.emulate_media(color_scheme="dark")
        assert _violations(visit) == []
        visit.page.locator("#hits li a").first.click()
        visit.page.get_by_role("dialog").wait_for()
        assert _violations(visit) == []
        visit.page.get_by_role("button", name="Close").click()
        visit.page.keyboard.press("?")
        visit.page.get_by_role("dialog", name="Keyboard shortcuts").wait_for()
        assert _violations(visit) == []


@pytest.mark.parametrize("screen", SCREENS)
def test_the_page_fits_the_screen(chromium: Browser, server: ServeProcess, screen: str) -> None:
    width, height = SCREENS[screen]
    with Visit(chromium, server.origin, viewport={"width": width, "height": height}) as visit:
        visit.open()
        with visit.new_hits():
            visit.stroke(ROOF)
        assert visit.fits()
        paper = visit.page.locator("#pen").bounding_box()
        assert paper is not None
        assert paper["width"] == pytest.approx(paper["height"], abs=1)
        assert paper["width"] > 0.35 * min(width, height)
        assert paper["y"] + paper["height"] < height
        first = visit.page.locator("#hits li").first.bounding_box()
        assert first is not None and first["width"] > 90
        # What is found is in sight without scrolling, beside the paper or below it.
        assert first["y"] < height - 40


def test_light_and_dark_follow_the_system_or_the_button(
    chromium: Browser, server: ServeProcess
) -> None:
    with Visit(chromium, server.origin, color_scheme="dark") as visit:
        visit.open()
        dark = _brightness(visit)
        button = visit.page.get_by_role("button", name="Theme")
        button.click()
        assert button.get_attribute("aria-label") == "Theme: light"
        light = _brightness(visit)
        assert dark < 80 < 200 < light
        visit.open()
        assert _brightness(visit) == light
        visit.page.keyboard.press("t")
        assert _brightness(visit) == dark


def test_a_script_that_gets_into_the_page_does_not_run(visit: Visit) -> None:
    visit.page.evaluate(
        """() => {
            const script = document.createElement("script");
            script.textContent = "document.title = 'run'";
            document.body.append(script);
            document.body.insertAdjacentHTML("beforeend", "<p onclick='document.title = 1'>x</p>");
        }"""
    )
    visit.page.locator("body > p", has_text="x").last.dispatch_event("click")
    assert visit.page.title() == "sbtk: draw and find"
    visit.forgive("Content Security Policy")


def test_nothing_can_be_fetched_from_elsewhere(visit: Visit) -> None:
    fetched = "fetch('http://127.0.0.1:9/').then(() => 'came', () => 'refused')"
    assert visit.page.evaluate(fetched) == "refused"
    visit.forgive("Content Security Policy")


def test_the_reference_of_the_api_asks_nobody_else(visit: Visit) -> None:
    visit.page.goto(f"{visit.origin}/docs")
    visit.page.get_by_text("/v1/query").first.wait_for()
    visit.page.wait_for_load_state("networkidle")


def _brightness(visit: Visit) -> float:
    """Returns the mean of red, green and blue of the page's ground."""
    script = "() => getComputedStyle(document.body).backgroundColor.match(/[\\d.]+/g).map(Number)"
    red, green, blue = visit.page.evaluate(script)[:3]
    return float(red + green + blue) / 3
