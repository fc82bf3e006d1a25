"""Straight lines, the stroke eraser, the selection, tracing and the zoom of the canvas.

What a tool did is read from the image that the page sends to the server.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.browser.visit import ROOF, Place, Visit, violations

Ink = NDArray[np.bool_]

FLOWER_SKETCH = Path(__file__).parents[2] / "demo" / "sketches" / "flower.png"

#: Two strokes that do not meet.
LEFT: tuple[Place, ...] = ((0.2, 0.2), (0.2, 0.5), (0.35, 0.5))
RIGHT: tuple[Place, ...] = ((0.7, 0.2), (0.7, 0.8))
NEAR = 6  # units of the canvas


def test_lines_are_straight(visit: Visit) -> None:
    keys = visit.page.keyboard
    wavy: tuple[Place, ...] = ((0.1, 0.3), (0.4, 0.7), (0.6, 0.2), (0.9, 0.5))
    freehand = ink_after(visit, lambda: visit.stroke(wavy))
    _clear(visit)

    def with_shift() -> None:
        keys.down("Shift")
        visit.stroke(wavy)
        keys.up("Shift")

    by_shift = ink_after(visit, with_shift)
    _clear(visit)
    keys.press("n")
    assert visit.page.get_by_role("radio", name="Straight line").is_checked()
    by_tool = ink_after(visit, lambda: visit.stroke(wavy))
    for ink in (by_shift, by_tool):
        assert _from_line(ink, (100, 300), (900, 500)) < NEAR
        assert ink_box(ink) == pytest.approx((95, 295, 905, 505), abs=NEAR)
    assert _from_line(freehand, (100, 300), (900, 500)) > 100
    _clear(visit)
    # With Shift, the tool draws at multiples of 15 degrees.
    level = ((0.1, 0.5), (0.9, 0.55))

    def level_line() -> None:
        keys.down("Shift")
        visit.stroke(level)
        keys.up("Shift")

    assert _from_line(ink_after(visit, level_line), (100, 500), (900, 500)) < NEAR


def test_a_stroke_goes_on_after_a_straight_part(visit: Visit) -> None:
    keys = visit.page.keyboard

    def corner() -> None:
        visit.press((0.2, 0.8))
        visit.move(((0.2, 0.2),))
        keys.down("Shift")
        visit.move(((0.5, 0.6), (0.8, 0.2)))
        keys.up("Shift")
        visit.move(((0.8, 0.8),))
        visit.page.mouse.up()

    ink = ink_after(visit, corner)
    assert _from_line(ink[:300, 250:750], (0, 200), (500, 200)) < NEAR
    assert not ink[320:, 260:740].any()
    assert visit.page.get_by_role("button", name="Undo").is_enabled()
    visit.page.get_by_role("button", name="Undo").click()
    visit.wait_for_recent()


def test_the_stroke_eraser_removes_whole_strokes(visit: Visit) -> None:
    left = ink_after(visit, lambda: visit.stroke(LEFT))
    both = ink_after(visit, lambda: visit.stroke(RIGHT))
    visit.page.keyboard.press("Shift+E")
    assert visit.page.get_by_role("radio", name="Stroke eraser").is_checked()
    assert (ink_after(visit, lambda: visit.stroke(((0.6, 0.7), (0.8, 0.75)))) == left).all()
    assert (ink_after(visit, lambda: visit.page.keyboard.press("Control+z")) == both).all()
    assert (ink_after(visit, lambda: visit.page.keyboard.press("Control+y")) == left).all()
    before = len(visit.queries)
    visit.stroke(((0.9, 0.9), (0.95, 0.95)))  # touches nothing
    assert visit.page.get_by_role("button", name="Redo").is_disabled()
    assert len(visit.queries) == before
    # One sweep removes all strokes that it crosses, and is one step.
    visit.page.keyboard.press("Control+z")
    visit.stroke(((0.05, 0.35), (0.95, 0.36)), steps=1)
    visit.wait_for_recent()
    assert visit.ink() == 0
    assert (ink_after(visit, lambda: visit.page.keyboard.press("Control+z")) == both).all()


def test_strokes_are_selected_and_moved_scaled_and_rotated(visit: Visit) -> None:
    left = ink_box(ink_after(visit, lambda: visit.stroke(LEFT)))
    both = ink_after(visit, lambda: visit.stroke(RIGHT))
    visit.page.keyboard.press("v")
    bar = visit.page.get_by_role("group", name="Selected strokes")
    # A click selects a stroke, a drag moves it.
    moved = ink_after(visit, lambda: visit.stroke(((0.2, 0.3), (0.3, 0.6))))
    assert ink_box(moved[:, :600]) == pytest.approx(
        (left[0] + 100, left[1] + 300, left[2] + 100, 805), abs=NEAR
    )
    assert (moved[:, 600:] == both[:, 600:]).all()
    assert bar.is_visible()
    assert (ink_after(visit, lambda: visit.page.keyboard.press("Control+z")) == both).all()
    assert not bar.is_visible()
    # A box marks strokes; its corner scales them, about the opposite corner.
    visit.stroke(((0.1, 0.1), (0.4, 0.6)))
    visit.page.get_by_role("status").filter(has_text="1 stroke selected.").wait_for(
        state="attached"
    )
    pad = 0.018  # between strokes and their frame
    corner = (left[2] / 1000 + pad, left[3] / 1000 + pad)
    scaled = ink_after(visit, lambda: visit.stroke((corner, (corner[0] + 0.1, corner[1] + 0.2))))
    x0, y0, x1, y1 = ink_box(scaled[:, :600])
    assert (x0, y0) == pytest.approx(left[:2], abs=2 * NEAR)
    assert (x1 - x0) / (left[2] - left[0]) == pytest.approx(
        (y1 - y0) / (left[3] - left[1]), abs=0.08
    )
    assert y1 - y0 > 1.4 * (left[3] - left[1])
    visit.page.keyboard.press("Control+z")
    # The handle above the frame rotates, with Shift in steps of 15 degrees.
    visit.stroke(((0.1, 0.1), (0.4, 0.6)))
    middle = ((left[0] + left[2]) / 2000, (left[1] + left[3]) / 2000)
    handle = (middle[0], left[1] / 1000 - pad - 0.06)

    def turn() -> None:
        visit.page.keyboard.down("Shift")
        visit.stroke((handle, (middle[0] + 0.3, middle[1] + 0.01)))
        visit.page.keyboard.up("Shift")

    turned = ink_box(ink_after(visit, turn)[:, :650])
    assert turned[2] - turned[0] == pytest.approx(left[3] - left[1], abs=NEAR)
    assert turned[3] - turned[1] == pytest.approx(left[2] - left[0], abs=NEAR)


def test_the_selection_by_keyboard_alone(visit: Visit) -> None:
    keys = visit.page.keyboard
    visit.stroke(LEFT)
    both = ink_after(visit, lambda: visit.stroke(RIGHT))
    left = ink_box(both[:, :500])
    for key in ("v", "d", "PageDown"):
        keys.press(key)
    down = ink_box(ink_after(visit, lambda: keys.press("Shift+ArrowDown"))[:, :500])
    assert down == pytest.approx((left[0], left[1] + 100, left[2], left[3] + 100), abs=NEAR)
    flipped = ink_after(visit, lambda: keys.press("Shift+H"))
    # The foot of the stroke now points to the left.
    assert flipped[400:500, 335:360].any() and not flipped[400:500, 190:210].any()
    smaller = ink_box(ink_after(visit, lambda: keys.press("<"))[:, :500])
    assert smaller[3] - smaller[1] < 0.95 * (left[3] - left[1])
    for _ in range(6):
        keys.press(".")
    turned = ink_box(ink_after(visit, lambda: keys.press("ArrowRight"))[:, :500])
    assert turned[2] - turned[0] > 1.3 * (turned[3] - turned[1])
    twice = ink_after(visit, lambda: keys.press("Control+d"))
    assert twice.sum() > 1.2 * both.sum()
    keys.press("Control+a")
    visit.page.get_by_role("status").filter(has_text="3 strokes selected.").wait_for(
        state="attached"
    )
    keys.press("Delete")
    visit.wait_for_recent()
    assert visit.ink() == 0
    for _ in range(11):  # deleting, duplicating, a step, six rotations, scaling, flipping
        keys.press("Control+z")
    assert (ink_after(visit, lambda: keys.press("Control+z")) == both).all()


def test_lines_and_the_stroke_eraser_by_keyboard_alone(visit: Visit) -> None:
    keys = visit.page.keyboard
    for key in ("n", "d", "Space", *["Shift+ArrowRight"] * 3, "Shift+ArrowDown"):
        keys.press(key)
    line = ink_after(visit, lambda: keys.press("Space"))
    assert _from_line(line, (500, 500), (800, 600)) < NEAR
    for key in ("Shift+E", "Shift+ArrowUp", "Space", *["Shift+ArrowDown"] * 2):
        keys.press(key)
    keys.press("Space")
    visit.wait_for_recent()
    assert visit.ink() == 0
    assert (ink_after(visit, lambda: keys.press("Control+z")) == line).all()


def test_the_tools_fit_beside_an_opened_image(visit: Visit) -> None:
    with visit.new_hits(), visit.page.expect_file_chooser() as chosen:
        visit.page.get_by_role("button", name="Open image").click()
        chosen.value.set_files(FLOWER_SKETCH)
    for width, height in ((360, 640), (390, 844), (844, 390), (1024, 768)):
        visit.page.set_viewport_size({"width": width, "height": height})
        assert visit.fits()
        _assert_tools_fit(visit, width, height)


def _assert_tools_fit(visit: Visit, width: int, height: int) -> None:
    script = """labels => labels.map((label) => label.getBoundingClientRect())
        .filter(({ width }) => width > 0).map(({ x, y, width, height }) => [x, y, width, height])"""
    boxes = visit.page.eval_on_selector_all("#sketch-panel :is(.tool, .button, .switch)", script)
    assert len(boxes) == 11 + 2 + 3 + 1
    for x, y, wide, high in boxes:
        assert wide >= 24 and high >= 24
        assert x >= 0 and x + wide <= width and y + high <= height
    others = [*boxes]
    while others:
        x, y, wide, high = others.pop()
        apart = [
            x + wide <= a + 0.5 or a + w <= x + 0.5 or y + high <= b + 0.5 or b + h <= y + 0.5
            for a, b, w, h in others
        ]
        assert all(apart), "two controls overlap"


def test_what_was_erased_stays_erased_when_strokes_move(visit: Visit) -> None:
    visit.stroke(RIGHT)
    visit.page.get_by_role("radio", name="Eraser", exact=True).check(force=True)
    cut = ink_after(visit, lambda: visit.stroke(((0.6, 0.5), (0.8, 0.5))))
    gap = ~cut[300:700, 695:705].any(axis=1)
    assert 20 < gap.sum() < 80
    visit.page.keyboard.press("v")
    visit.press((0.7, 0.3))
    moved = ink_after(visit, lambda: _release_at(visit, (0.4, 0.35)))
    assert not moved[:, 650:750].any()
    gap_moved = ~moved[350:750, 395:405].any(axis=1)
    assert gap_moved.sum() == pytest.approx(gap.sum(), abs=NEAR)
    # A stroke in the place of the eraser's stroke is not erased by it.
    assert ink_after(visit, lambda: _drag(visit, (0.4, 0.35), (0.7, 0.47)))[440:540, 695:705].any()


def test_an_image_is_traced_and_only_strokes_are_searched_for(visit: Visit, photos: Path) -> None:
    trace = visit.page.get_by_role("button", name="Trace")
    assert not trace.is_visible()
    with visit.new_hits(), visit.page.expect_file_chooser() as chosen:
        visit.page.get_by_role("button", name="Open image").click()
        chosen.value.set_files(photos / "places" / "china.jpg")
    assert visit.page.get_by_role("radio", name="Photo").is_checked()
    trace.click()
    visit.wait_for_recent()
    assert trace.get_attribute("aria-pressed") == "true"
    assert visit.page.get_by_role("radio", name="Sketch").is_checked()
    assert not visit.page.get_by_role("button", name="Crop").is_visible()
    assert visit.page.locator("#traced-layer").is_visible()
    with_image = ink_after(visit, lambda: visit.stroke(ROOF))
    assert "as=sketch" in visit.queries[-1].url
    # Erasing leaves the image.
    visit.page.keyboard.press("Shift+E")
    visit.stroke(((0.1, 0.5), (0.5, 0.5)))
    visit.wait_for_recent()
    assert visit.page.locator("#traced-layer").is_visible()
    visit.page.keyboard.press("Control+z")
    visit.page.keyboard.press("b")
    # Clearing leaves the image at first.
    visit.page.get_by_role("button", name="Clear").click()
    visit.wait_for_recent()
    assert trace.is_visible()
    without = ink_after(visit, lambda: visit.stroke(ROOF))
    assert (without == with_image).mean() > 0.995
    with visit.new_hits():
        visit.page.keyboard.press("o")
    assert visit.page.get_by_role("radio", name="Photo").is_checked()
    assert visit.sent_ink().mean() > 0.05  # the photo, with the strokes over it


def test_the_address_names_an_example_to_trace(visit: Visit) -> None:
    visit.page.goto("about:blank")
    visit.open("/#trace=cat")
    visit.page.locator("#traced-layer").wait_for()
    assert visit.page.get_by_role("button", name="Trace").get_attribute("aria-pressed") == "true"
    assert "trace" not in visit.page.url
    assert visit.ink() == 0
    assert not visit.queries
    with visit.new_hits():
        visit.stroke(ROOF)
    assert "as=sketch" in visit.queries[-1].url
    assert visit.sent_ink().mean() < 0.05  # the stroke alone
    # The example itself can be searched for, too.
    with visit.new_hits():
        visit.page.get_by_role("button", name="Trace").click()
    assert visit.sent_ink().mean() > 0.06
    _clear(visit)
    visit.page.goto("about:blank")
    visit.open("/#trace=toString")
    visit.wait_for_recent()
    assert not visit.page.locator("#traced-layer").is_visible()


def test_the_canvas_zooms(visit: Visit) -> None:
    group = visit.page.get_by_role("group", name="Zoom of the canvas")
    zoom_in = group.get_by_role("button", name="Zoom in")
    assert group.get_by_role("button", name="Zoom out").is_disabled()
    whole = ink_after(visit, lambda: visit.stroke(ROOF))
    for _ in range(2):
        zoom_in.click()
    # The middle 1000 / 2.25 units are shown.
    side = 1000 / 2.25
    start = (1000 - side) / 2
    drawn = ink_after(visit, lambda: visit.stroke(((0.1, 0.5), (0.4, 0.5))))
    added = ink_box(drawn & ~whole)
    assert added[0] == pytest.approx(start + 0.1 * side, abs=2 * NEAR)
    assert added[2] == pytest.approx(start + 0.4 * side, abs=2 * NEAR)
    visit.page.keyboard.press("0")
    assert not group.get_by_role("button", name="Whole canvas").is_visible()
    # The wheel with Ctrl keeps what is under the pointer; without, it moves the view.
    visit.page.mouse.move(*visit.on_screen((0.2, 0.8)))
    visit.page.keyboard.down("Control")
    visit.page.mouse.wheel(0, -400)
    visit.page.keyboard.up("Control")
    visit.wait_until("() => !document.getElementById('canvas-zoom-whole').hidden")
    dotted = ink_after(visit, lambda: visit.stroke(((0.2, 0.8), (0.2, 0.8))))
    assert dotted[790:810, 190:210].any()
    visit.page.keyboard.press("0")


def test_erasing_by_geometry_leaves_what_erasing_pixels_leaves(visit: Visit) -> None:
    shares = visit.page.evaluate(_CUT_STROKES)
    assert len(shares) == 24
    assert max(shares) < 0.02


def test_transforms_and_views_are_undone_by_their_inverses(visit: Visit) -> None:
    away = visit.page.evaluate(_INVERSES)
    assert away["transforms"] == pytest.approx([0] * 40, abs=1e-2)
    assert away["views"] == pytest.approx([0] * 40, abs=1e-2)


def test_edited_strokes_survive_a_reload(visit: Visit) -> None:
    visit.stroke(LEFT)
    visit.page.keyboard.press("v")
    moved = ink_after(visit, lambda: _drag(visit, (0.2, 0.3), (0.5, 0.5)))
    visit.open()
    visit.page.wait_for_selector('#results[data-shown="sketch"][aria-busy="false"]')
    assert (visit.sent_ink() == moved).mean() > 0.999


def test_axe_finds_nothing_with_the_tools_in_use(visit: Visit) -> None:
    visit.stroke(ROOF)
    visit.page.keyboard.press("Control+a")
    visit.page.keyboard.press("+")
    visit.page.get_by_role("group", name="Selected strokes").wait_for()
    for scheme in ("light", "dark"):
        visit.use_scheme(scheme)
        assert violations(visit) == []


# Random strokes and erasers: the share of pixels that differ between erased strokes, and the parts
# that are computed from the same strokes.
_CUT_STROKES = """async () => {
    const { drawMarks } = await import("/static/rendering.js");
    const { visibleParts } = await import("/static/stroke_geometry.js");
    let seed = 7;
    const random = () => (seed = (seed * 16807) % 2147483647) / 2147483647;
    const stroke = (tool, width) => {
        let [x, y, angle] = [200 + 600 * random(), 200 + 600 * random(), 6 * random()];
        return { kind: "stroke", tool, points: Array.from({ length: 40 }, () => {
            angle += random() - 0.5;
            [x, y] = [x + 12 * Math.cos(angle), y + 12 * Math.sin(angle)];
            return { x, y, width };
        }) };
    };
    const pixels = (marks) => {
        const context = new OffscreenCanvas(1000, 1000).getContext("2d");
        drawMarks(context, marks, "#000");
        return context.getImageData(0, 0, 1000, 1000).data.filter((_, index) => index % 4 === 3);
    };
    return Array.from({ length: 12 }, () => {
        const pens = [stroke("pen", 10), stroke("pen", 22), stroke("pen", 10)];
        const erasers = [stroke("eraser", 40), stroke("eraser", 88)];
        // The last pen stroke is not erased, because it was drawn later.
        const marks = [...pens.slice(0, 2), ...erasers, pens[2]];
        const [erased, ink] = [pixels(marks), pixels(pens).filter((value) => value > 200).length];
        const parts = visibleParts(marks);
        const left = pixels([...parts.values()].flat());
        const lost = erased.filter((value, index) => value > 200 && left[index] < 50).length;
        // Ends of parts are round, and what was erased has hollow edges.
        parts.delete(pens[2]);
        const before = [...parts.values()].flat();
        const deep = erasers.map((eraser) => ({ ...eraser, points: eraser.points.map(
            (point) => ({ ...point, width: point.width - 8 })) }));
        const [within, outside] = [pixels(before), pixels([...before, ...deep])];
        const back = within.filter((value, index) => Math.abs(value - outside[index]) > 50).length;
        return [lost / ink, back / ink];
    }).flat();
}"""
_INVERSES = """async () => {
    const geometry = await import("/static/stroke_geometry.js");
    const { gripped, shownAt, WHOLE } = await import("/static/canvas_view.js");
    const random = (low, high) => low + (high - low) * Math.random();
    const away = (a, b) => Math.hypot(a.x - b.x, a.y - b.y);
    const point = () => ({ x: random(0, 1000), y: random(0, 1000), width: 10 });
    const found = { transforms: [], views: [] };
    for (let index = 0; index < 40; index += 1) {
        const stroke = { kind: "stroke", tool: "pen", points: [point(), point(), point()] };
        const about = point();
        const [x, y, degrees] = [random(-3, -0.2), random(0.2, 3), random(-360, 360)];
        const there = geometry.rotation(about, degrees).multiply(geometry.scaling(about, x, y));
        const straight = geometry.rotation(about, -degrees);
        const back = geometry.scaling(about, 1 / x, 1 / y).multiply(straight);
        const again = geometry.transformed(geometry.transformed(stroke, there), back);
        const errors = again.points.map((one, at) => away(one, stroke.points[at]));
        found.transforms.push(Math.max(...errors));
        // What is under a grip stays under it, where the canvas is large enough.
        const start = gripped(WHOLE, { x: 0.5, y: 0.5, spread: 1 }, { x: 0.5, y: 0.5, spread: 4 });
        const from = { x: random(0.4, 0.6), y: random(0.4, 0.6), spread: random(0.2, 0.3) };
        const to = { x: random(0.4, 0.6), y: random(0.4, 0.6), spread: random(0.2, 0.4) };
        found.views.push(away(shownAt(start, from), shownAt(gripped(start, from, to), to)));
    }
    return found;
}"""


def ink_after(visit: Visit, draw: Callable[[], object]) -> Ink:
    """Return the ink that is searched for after `draw`."""
    with visit.new_hits():
        draw()
    return visit.sent_ink()


def _drag(visit: Visit, start: Place, end: Place) -> None:
    visit.press(start)
    _release_at(visit, end)


def _release_at(visit: Visit, place: Place) -> None:
    visit.move((place,))
    visit.page.mouse.up()


def _clear(visit: Visit) -> None:
    visit.page.get_by_role("button", name="Clear").click()
    visit.wait_for_recent()


def ink_box(ink: Ink) -> tuple[int, int, int, int]:
    """Return left, top, right and bottom of the ink."""
    rows, columns = (np.flatnonzero(ink.any(axis=axis)) for axis in (1, 0))
    return int(columns[0]), int(rows[0]), int(columns[-1]), int(rows[-1])


def _from_line(ink: Ink, start: tuple[int, int], end: tuple[int, int]) -> float:
    """Return the largest distance of ink from a line, in units, less half the line's width."""
    rows, columns = np.nonzero(ink)
    along = np.subtract(end, start) / np.hypot(*np.subtract(end, start))
    away = np.abs((columns - start[0]) * along[1] - (rows - start[1]) * along[0])
    return float(away.max()) - 5
