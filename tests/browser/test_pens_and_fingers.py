"""Pens, fingers and palms on the canvas, as Chromium's own input events."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import pytest

from tests.browser.test_drawing_tools import LEFT, NEAR, ink_after, ink_box
from tests.browser.visit import NO_TOUCH, ROOF, Place, Visit
from tests.serve_process import ServeProcess

if TYPE_CHECKING:
    from playwright.sync_api import Browser, CDPSession

pytestmark = pytest.mark.chromium_only(NO_TOUCH)

LEVEL: tuple[Place, ...] = ((0.2, 0.2), (0.5, 0.2), (0.8, 0.2))
#: The heel of a hand touches the screen in several places.
PALM: tuple[Place, ...] = ((0.6, 0.8), (0.7, 0.85))


@pytest.fixture
def page(browser: Browser, server: ServeProcess) -> Iterator[Visit]:
    """Open the page on a screen that takes touches."""
    with Visit(browser, server.origin, has_touch=True) as visit:
        visit.open()
        yield visit


def test_pen_pressure_increases_the_ink(page: Visit) -> None:
    amounts = []
    for force in (0.1, 0.9):
        _pen(page, ROOF, force=force)
        amounts.append(page.ink())
        page.page.get_by_role("button", name="Clear").click()
    light, hard = amounts
    assert hard > 1.5 * light


def test_a_line_grows_wider_with_the_pressure(page: Visit) -> None:
    def press_harder() -> None:
        places = [(x / 40, 0.5) for x in range(4, 37)]
        _pen(page, places, force=[0.05 + 0.9 * step / 32 for step in range(33)])

    widths = ink_after(page, press_harder).sum(axis=0)
    start, middle, end = (np.median(widths[x : x + 50]) for x in (150, 475, 800))
    assert 1.3 * start < middle < end / 1.15


def test_a_finger_draws_and_does_not_scroll(browser: Browser, server: ServeProcess) -> None:
    phone = {"width": 390, "height": 844}
    with Visit(browser, server.origin, viewport=phone, has_touch=True, is_mobile=True) as visit:
        visit.open()
        with visit.new_hits():
            visit.touch(*([visit.on_screen(place)] for place in ROOF))
        assert visit.count() == 24
        assert visit.page.evaluate("scrollY") == 0
        assert visit.page.evaluate("document.documentElement.scrollWidth") == phone["width"]


def test_two_fingers_zoom_and_do_not_draw(page: Visit) -> None:
    ink_after(page, lambda: page.stroke(ROOF))
    sent, ink = page.sent_ink(), page.ink()
    # With a pause, the first finger's dot is searched for before the second one lands.
    for pause_ms in (0, 600):
        _two_fingers(page, ((0.45, 0.5), (0.55, 0.5)), ((0.3, 0.5), (0.7, 0.5)), pause_ms)
        assert _zoom(page) == "400%"
        page.page.keyboard.press("0")
        assert page.ink() == pytest.approx(ink, rel=0.02)
        end = time.monotonic() + 10
        while (page.sent_ink() != sent).any():
            assert time.monotonic() < end, "the dot of the first finger is still searched for"
            page.page.wait_for_timeout(50)


def test_two_fingers_move_the_zoomed_canvas(page: Visit) -> None:
    page.page.get_by_role("button", name="Zoom in", exact=True).click()
    assert _zoom(page) == "150%"
    _two_fingers(page, ((0.5, 0.4), (0.6, 0.6)), ((0.4, 0.3), (0.5, 0.5)))
    assert (_zoom(page), page.ink()) == ("150%", 0)
    dot = ink_after(page, lambda: page.stroke(((0.5, 0.5), (0.5, 0.5))))
    left, top, right, bottom = ink_box(dot)
    # A tenth of what is shown has moved under the middle, in both directions.
    moved = 500 + 0.1 * 1000 / 1.5
    assert ((left + right) / 2, (top + bottom) / 2) == pytest.approx((moved, moved), abs=NEAR)


@pytest.mark.parametrize("device", ["pen", "finger"])
def test_pens_and_fingers_move_the_selection(page: Visit, device: str) -> None:
    left = ink_box(ink_after(page, lambda: page.stroke(LEFT)))
    page.page.keyboard.press("v")
    places = ((0.2, 0.3), (0.3, 0.4), (0.4, 0.5))

    def drag() -> None:
        if device == "finger":
            page.touch(*([page.on_screen(place)] for place in places))
        else:
            _pen(page, places)

    moved = ink_box(ink_after(page, drag))
    assert moved == pytest.approx([value + 200 for value in left], abs=NEAR)


def test_a_palm_beside_the_pen_does_not_zoom(page: Visit) -> None:
    _pen(page, LEVEL[:2], lift=False)
    _two_fingers(page, ((0.6, 0.8), (0.7, 0.8)), ((0.5, 0.8), (0.9, 0.8)))
    assert _zoom(page) == ""
    ink = ink_after(page, lambda: _pen(page, LEVEL[1:], press=False))
    assert ink_box(ink) == pytest.approx((195, 195, 805, 205), abs=2 * NEAR)


@pytest.mark.parametrize("places", [1, 2])
def test_the_pen_draws_while_a_palm_lies_on_the_canvas(page: Visit, places: int) -> None:
    session = page.context.new_cdp_session(page.page)

    def draw() -> None:
        for count in range(1, places + 1):
            _send_touches(page, session, "touchStart", PALM[:count])
        _pen(page, LEVEL[:2], lift=False)
        # The hand moves with the pen.
        moved = [(x + 0.1, y) for x, y in PALM[:places]]
        _send_touches(page, session, "touchMove", moved)
        _pen(page, LEVEL[1:], press=False)
        _send_touches(page, session, "touchEnd", ())

    ink = ink_after(page, draw)
    assert ink_box(ink) == pytest.approx((195, 195, 805, 205), abs=2 * NEAR)
    assert _zoom(page) == ""
    page.page.keyboard.press("Control+z")
    page.wait_for_recent()  # there was nothing but the pen's stroke


def test_a_palm_that_touches_just_after_the_pen_does_not_draw(page: Visit) -> None:
    def draw() -> None:
        _pen(page, LEVEL)
        page.touch([page.on_screen(PALM[0])], [page.on_screen(PALM[1])])

    assert ink_box(ink_after(page, draw)) == pytest.approx((195, 195, 805, 205), abs=2 * NEAR)


def _zoom(visit: Visit) -> str:
    """Return the scale of the canvas that the page shows; "" for the whole canvas."""
    whole = visit.page.locator("#canvas-zoom-whole")
    return whole.inner_text() if whole.is_visible() else ""


def _two_fingers(
    visit: Visit, start: Sequence[Place], end: Sequence[Place], pause_ms: float = 0
) -> None:
    """Put down one finger and after a pause another, move both, and lift them."""
    session = visit.context.new_cdp_session(visit.page)
    _send_touches(visit, session, "touchStart", start[:1])
    visit.page.wait_for_timeout(pause_ms)
    _send_touches(visit, session, "touchStart", start)
    for share in (0.5, 1.0):
        places = [_between(a, b, share) for a, b in zip(start, end, strict=True)]
        _send_touches(visit, session, "touchMove", places)
    _send_touches(visit, session, "touchEnd", ())


def _send_touches(visit: Visit, session: CDPSession, kind: str, places: Sequence[Place]) -> None:
    on_screen = (visit.on_screen(place) for place in places)
    points = [{"x": x, "y": y, "id": index} for index, (x, y) in enumerate(on_screen)]
    session.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": points})


def _pen(
    visit: Visit,
    places: Sequence[Place],
    *,
    force: float | Sequence[float] = 0.5,
    press: bool = True,
    lift: bool = True,
) -> None:
    """Move a pen over the canvas, with one force or one for each place."""
    session = visit.context.new_cdp_session(visit.page)
    forces = [force] * len(places) if isinstance(force, float) else [*force]
    kinds = ["mousePressed" if press else "mouseMoved", *["mouseMoved"] * (len(places) - 1)]
    steps = [*zip(kinds, places, forces, strict=True)]
    if lift:
        steps.append(("mouseReleased", places[-1], forces[-1]))
    for kind, place, pressure in steps:
        x, y = visit.on_screen(place)
        held = {"button": "left", "buttons": int(kind != "mouseReleased"), "clickCount": 1}
        event = {"type": kind, "x": x, "y": y, "pointerType": "pen", "force": pressure}
        session.send("Input.dispatchMouseEvent", event | held)


def _between(a: Place, b: Place, share: float) -> Place:
    return a[0] + (b[0] - a[0]) * share, a[1] + (b[1] - a[1]) * share
