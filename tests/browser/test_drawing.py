"""Drawing with a mouse, and erasing, finds photos."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.browser.visit import DOOR, ROOF, Visit

if TYPE_CHECKING:
    from playwright.sync_api import Route

FIRST_HITS = 24
# Delays the first rendered image until `finishFirst` is called.
_FIRST_IMAGE_LAST = """() => {
    const plain = OffscreenCanvas.prototype.convertToBlob;
    OffscreenCanvas.prototype.convertToBlob = async function (options) {
        const blob = await plain.call(this, options);
        if (window.finishFirst === undefined) {
            await new Promise((resolve) => { window.finishFirst = resolve; });
        }
        return blob;
    };
}"""


@pytest.mark.firefox
def test_a_stroke_finds_photos(visit: Visit) -> None:
    visit.wait_for_recent()
    assert visit.page.get_by_role("heading", name="Draw what you are looking for").is_visible()
    with visit.new_hits():
        visit.stroke(ROOF)
    ids = visit.ids()
    assert visit.count() == FIRST_HITS
    assert ids == visit.resend_last()
    assert not visit.page.locator("#welcome").is_visible()
    first = visit.page.get_by_role("list", name="Results").get_by_role("link").first
    label = first.get_attribute("aria-label") or ""
    assert label.startswith(f"{visit.names()[0]}, result 1, score 0.")
    visit.wait_until("() => document.querySelector('#hits img').naturalWidth >= 100")


def test_each_stroke_changes_the_hits_and_undo_restores_them(visit: Visit) -> None:
    with visit.new_hits():
        visit.stroke(ROOF)
    before = visit.ids()
    with visit.new_hits():
        visit.stroke(DOOR)
    after = visit.ids()
    assert after != before
    assert after == visit.resend_last()
    undo, redo = (visit.page.get_by_role("button", name=name) for name in ("Undo", "Redo"))
    with visit.new_hits():
        undo.click()
    assert visit.ids() == before
    with visit.new_hits():
        redo.click()
    assert visit.ids() == after
    assert redo.is_disabled()


def test_clear_removes_the_hits_and_undo_restores_them(visit: Visit) -> None:
    with visit.new_hits():
        visit.stroke(ROOF)
    before = visit.ids()
    visit.page.get_by_role("button", name="Clear").click()
    visit.wait_for_recent()
    assert visit.ink() == 0
    with visit.new_hits():
        visit.page.get_by_role("button", name="Undo").click()
    assert visit.ids() == before


def test_hits_appear_before_the_pen_is_lifted(visit: Visit) -> None:
    visit.press(ROOF[0])
    visit.move(ROOF[1:4])
    visit.page.wait_for_selector("#hits > li")
    assert visit.queries
    with visit.new_hits():
        visit.move(ROOF[4:])
        visit.page.mouse.up()
    assert visit.ids() == visit.resend_last()


def test_a_late_response_does_not_replace_a_newer_one(visit: Visit) -> None:
    held: list[Route] = []

    def hold_the_first(route: Route) -> None:
        if held:
            route.continue_()
        else:
            held.append(route)

    visit.context.route("**/v1/query*", hold_the_first)
    with visit.page.expect_request("**/v1/query*"):
        visit.stroke(ROOF, steps=1)
    visit.page.wait_for_timeout(50)
    assert len(held) == 1
    with visit.new_hits():
        visit.stroke(DOOR, steps=1)
    newest = visit.ids()
    held[0].continue_()
    visit.page.wait_for_timeout(300)
    assert visit.ids() == newest == visit.resend_last()


def test_show_more_uses_the_latest_drawing(visit: Visit) -> None:
    visit.page.evaluate(_FIRST_IMAGE_LAST)
    visit.stroke(ROOF, steps=1)
    visit.wait_until("() => window.finishFirst !== undefined")
    with visit.new_hits():
        visit.stroke(DOOR, steps=1)
    newest = visit.ids()
    visit.page.evaluate("window.finishFirst()")
    with visit.new_hits():
        # A click of the mouse scrolls to the button first, which loads more photos, too.
        visit.page.get_by_role("button", name="Show more").dispatch_event("click")
    assert visit.count() > FIRST_HITS
    visit.page.keyboard.press("r")
    visit.wait_until("() => document.querySelector('#hits > li.photo').ariaPosInSet === '1'")
    assert visit.ids() == newest
    last = visit.queries[-1]
    assert f"offset={FIRST_HITS}" in last.url


def test_erased_strokes_are_not_searched_for(visit: Visit) -> None:
    with visit.new_hits():
        visit.stroke(ROOF)
    before = visit.ids()
    with visit.new_hits():
        visit.stroke(((0.1, 0.1), (0.12, 0.9)))
    visit.page.get_by_role("radio", name="Eraser", exact=True).check(force=True)
    visit.page.get_by_role("radio", name="Thick").check(force=True)
    with visit.new_hits():
        visit.stroke(((0.1, 0.02), (0.12, 0.95)))
    assert visit.ids() == before


def test_a_canvas_erased_to_blank_has_no_hits(visit: Visit) -> None:
    with visit.new_hits():
        visit.stroke(((0.4, 0.5), (0.6, 0.5)))
    visit.page.get_by_role("radio", name="Eraser", exact=True).check(force=True)
    visit.page.get_by_role("radio", name="Thick").check(force=True)
    visit.stroke(((0.35, 0.5), (0.65, 0.5)))
    visit.wait_for_recent()


def test_a_single_dot_finds_photos(visit: Visit) -> None:
    with visit.new_hits():
        visit.stroke(((0.5, 0.5), (0.5, 0.5)))
    assert visit.count() == FIRST_HITS


def test_thicker_lines_have_more_ink(visit: Visit) -> None:
    amounts = []
    for size in ("Thin", "Medium", "Thick"):
        visit.page.get_by_role("radio", name=size).check(force=True)
        visit.stroke(ROOF)
        amounts.append(visit.ink())
        visit.page.get_by_role("button", name="Clear").click()
    thin, medium, thick = amounts
    assert 1.3 * thin < medium < thick / 1.3
