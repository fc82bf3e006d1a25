"""The page with the keyboard alone."""

from __future__ import annotations

import re

import pytest

from tests.browser.visit import NO_KEY_CODES, ROOF, Visit


@pytest.mark.firefox
def test_keys_draw_a_sketch_and_open_a_photo(visit: Visit) -> None:
    keys = visit.page.keyboard
    _tab_to(visit, "Canvas")
    keys.press("Space")
    for key in ["Shift+ArrowRight"] * 3 + ["Shift+ArrowDown"] * 3 + ["ArrowLeft"] * 4:
        keys.press(key)
    with visit.new_hits():
        keys.press("Space")
    first = visit.ids()
    assert first == visit.resend_last()
    assert visit.ink() > 500

    keys.press("r")
    assert _focused(visit).startswith(f"{visit.names()[0]}, result 1,")
    keys.press("ArrowRight")
    assert _focused(visit).startswith(f"{visit.names()[1]}, result 2,")
    keys.press("Enter")
    visit.page.get_by_role("dialog", name=visit.names()[1]).wait_for()
    keys.press("ArrowRight")
    last = visit.names()[2]
    visit.page.get_by_role("dialog", name=last).wait_for()
    keys.press("Escape")
    visit.page.locator("dialog[open]").wait_for(state="detached")
    # The browser moves the focus to the photo that was opened, and the page to the last one.
    focused = visit.page.locator("#hits a:focus")
    focused.and_(visit.page.get_by_label(f"{last}, result 3")).wait_for()

    with visit.new_hits():
        keys.press("l")
    assert "/similar" in visit.queries[-1].url
    # The photo is not in its own results, so the focus moves to the first one.
    assert _focused(visit).startswith(f"{visit.names()[0]}, result 1,")
    # Backwards: the other way leads through Firefox's own controls.
    _tab_to(visit, "Back to the sketch", "Shift+Tab")
    with visit.new_hits():
        keys.press("Enter")
    assert visit.ids() == first
    keys.press("Control+z")
    visit.wait_for_recent()


def test_tab_reaches_every_control_and_each_has_a_name(visit: Visit) -> None:
    names = []
    for _ in range(30):
        visit.page.keyboard.press("Tab")
        name = _focused(visit)
        assert name, "the focused element has no name"
        if name in names:
            break
        names.append(name)
    wanted = ["Skip to the photos", "48 photos", "Keyboard shortcuts", "Canvas"]
    wanted += ["Pen", "Medium", "Open image", "Sketch", "Draw the example: cat", "Folder"]
    assert [want for want in wanted if not any(name.startswith(want) for name in names)] == []


def test_the_focus_moves_on_when_its_button_is_disabled(visit: Visit) -> None:
    with visit.new_hits():
        visit.stroke(ROOF)
    visit.page.get_by_role("button", name="Clear").focus()
    visit.page.keyboard.press("Enter")
    assert _focused(visit) == "Undo"
    for _ in range(2):
        visit.page.keyboard.press("Enter")
    assert _focused(visit) == "Redo"
    with visit.new_hits():
        visit.page.keyboard.press("Enter")
    assert visit.ink() > 500


@pytest.mark.chromium_only(NO_KEY_CODES)
def test_shortcuts_work_on_non_latin_keyboards(visit: Visit) -> None:
    with visit.new_hits():
        visit.stroke(ROOF)
    session = visit.context.new_cdp_session(visit.page)
    key = {"key": "я", "code": "KeyZ", "windowsVirtualKeyCode": 90, "modifiers": 2}
    session.send("Input.dispatchKeyEvent", {"type": "rawKeyDown"} | key)
    visit.wait_for_recent()
    assert visit.ink() == 0


def test_the_skip_link_keeps_the_similar_photos(visit: Visit) -> None:
    with visit.new_hits():
        visit.stroke(ROOF)
    with visit.new_hits():
        visit.page.get_by_role("button", name=f"More like {visit.names()[0]}").focus()
        visit.page.keyboard.press("Enter")
    alike, address = visit.ids(), visit.page.evaluate("location.href")
    visit.page.locator("#skip-link").focus()
    visit.page.keyboard.press("Enter")
    assert visit.page.evaluate("document.activeElement.id") == "results"
    assert (visit.ids(), visit.page.evaluate("location.href")) == (alike, address)


def test_help_lists_shortcuts_and_turns_off_single_keys(visit: Visit) -> None:
    page = visit.page
    page.keyboard.press("?")
    dialog = page.get_by_role("dialog", name="Keyboard shortcuts")
    assert dialog.get_by_text("Undo", exact=True).is_visible()
    dialog.get_by_role("checkbox").uncheck()
    page.keyboard.press("Escape")
    dialog.wait_for(state="hidden")
    page.keyboard.press("e")
    assert page.get_by_role("radio", name="Pen").is_checked()
    page.get_by_role("button", name="Keyboard shortcuts").click()
    dialog.get_by_role("checkbox").check()
    page.keyboard.press("Escape")
    page.keyboard.press("e")
    assert page.get_by_role("radio", name="Eraser", exact=True).is_checked()


def test_the_focus_stays_near_a_chip_that_is_removed(visit: Visit) -> None:
    page = visit.page
    for position in (0, 2):
        with visit.new_hits():
            page.locator("#hits li a").nth(position).focus()
            page.keyboard.press("l")
    chips = page.get_by_role("button", name="Remove")
    remaining = chips.last.get_attribute("aria-label")
    chips.first.focus()
    with visit.new_hits():
        page.keyboard.press("Enter")
    assert _focused(visit) == remaining
    page.keyboard.press("Enter")
    visit.wait_for_recent()
    visit.wait_until("() => document.activeElement.id === 'results'")
    page.locator("#hits li a").first.focus()
    with visit.new_hits():
        page.keyboard.press("l")
    page.get_by_role("button", name="Back to the sketch").focus()
    page.keyboard.press("Enter")
    visit.wait_for_recent()
    visit.wait_until("() => document.activeElement.id === 'results'")


def test_a_change_of_the_tool_lifts_the_pen(visit: Visit) -> None:
    keys = visit.page.keyboard
    visit.page.locator("#input-layer").focus()
    keys.press("Space")
    with visit.new_hits():
        keys.press("Shift+ArrowRight")
        keys.press("n")
    keys.press("Space")
    visit.page.get_by_role("status").filter(has_text="Pen down at").wait_for(state="attached")


def test_hits_are_announced_to_screen_readers(visit: Visit) -> None:
    visit.page.locator("#input-layer").focus()
    visit.page.keyboard.press("Space")
    visit.page.keyboard.press("Shift+ArrowRight")
    with visit.new_hits():
        visit.page.keyboard.press("Space")
    # The model decides whether a line is close to anything.
    found = re.compile("(24 photos found. Best match|No close match. Best guess): ")
    visit.page.get_by_role("status").filter(has_text=found).wait_for(state="attached")


def _tab_to(visit: Visit, name: str, key: str = "Tab") -> None:
    """Press Tab until the control with this name has the focus."""
    for _ in range(90):
        visit.page.keyboard.press(key)
        if _focused(visit) == name:
            return
    raise AssertionError(f"Tab does not lead to {name!r}")


def _focused(visit: Visit) -> str:
    """Return the accessible name of the focused element."""
    script = """() => {
        const element = document.activeElement;
        const label = element.labels?.[0]?.textContent;
        return element.getAttribute("aria-label") ?? label ?? element.textContent;
    }"""
    return str(visit.page.evaluate(script)).strip()
