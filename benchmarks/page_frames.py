"""Frames per second of the page while drawing and editing many strokes, measured in the browser.

    python -m benchmarks.page_frames [--photos FOLDER] [--count 1000] [--seconds 4]

A headless Chromium (Debian's `chromium`, or SBTK_CHROMIUM) uses the tools on the page of
`sbtk serve` with default options and the pretrained model: it draws on a canvas of many strokes,
and selects and drags all of them. The pointer moves once a frame. Time is measured between
animation frames.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from benchmarks.chromium import open_chromium, open_page
from benchmarks.result import Result, percentiles, print_result
from benchmarks.serving import Server, make_parser, serve_gallery

if TYPE_CHECKING:
    from playwright.sync_api import Page

_FRAME_MS = 1000 / 60
#: Examples on the canvas: some 60 strokes each, with 500 points.
_EXAMPLES = 3

# Dispatches pointer events itself, one for each frame: Playwright's own take longer than a frame.
_DRAG = """async ([tool, from, seconds]) => {
    document.querySelector(`input[name="tool"][value="${tool}"]`).click();
    const canvas = document.getElementById("input-layer");
    canvas.setPointerCapture = () => {};
    const box = canvas.getBoundingClientRect();
    const send = (type, x, y) => canvas.dispatchEvent(new PointerEvent(type, {
        bubbles: true, isPrimary: true, pointerId: 1, pointerType: "mouse", button: 0,
        clientX: box.left + x * box.width, clientY: box.top + y * box.height }));
    const frame = () => new Promise(requestAnimationFrame);
    const gaps = [];
    send("pointerdown", ...from);
    let last = await frame();
    const begun = last;
    while (last - begun < 1000 * seconds) {
        const angle = (last - begun) / 300;
        const [dx, dy] = [0.12 * Math.sin(angle), 0.12 * (1 - Math.cos(angle))];
        send("pointermove", from[0] + dx, from[1] + dy);
        const now = await frame();
        gaps.push(now - last);
        last = now;
    }
    send("pointerup", ...from);
    return gaps;
}"""
_ZOOM = """async (seconds) => {
    const canvas = document.getElementById("input-layer");
    const box = canvas.getBoundingClientRect();
    const frame = () => new Promise(requestAnimationFrame);
    const gaps = [];
    let last = await frame();
    const begun = last;
    while (last - begun < 1000 * seconds) {
        canvas.dispatchEvent(new WheelEvent("wheel", {
            cancelable: true, ctrlKey: true, deltaY: -25 * Math.sin((last - begun) / 300),
            clientX: box.left + 0.4 * box.width, clientY: box.top + 0.4 * box.height }));
        const now = await frame();
        gaps.push(now - last);
        last = now;
    }
    return gaps;
}"""
_STROKES = "() => document.getElementById('announcer').textContent.match(/\\d+/)?.[0]"


def main() -> None:
    """Measure and print."""
    parser = make_parser(__doc__)
    parser.add_argument("--seconds", type=float, default=4, help="of each movement")
    options = parser.parse_args()
    with serve_gallery(options) as (server, note):
        result = measure(server, options.seconds, note)
    print_result(result, "benchmarks.page_frames", as_json=options.json)


def measure(server: Server, seconds: float, note: str) -> Result:
    """Measure the intervals between frames while drawing, dragging and zooming."""
    with open_chromium() as browser:
        page = open_page(browser, server.port)
        gaps = {
            "nothing (the machine's own rate)": _drag(page, "stroke-eraser", (0.5, 0.5), seconds)
        }
        for index in range(_EXAMPLES):
            page.locator(".example").nth(index).dispatch_event("click")
        gaps["drawing"] = _drag(page, "pen", (0.5, 0.4), seconds)
        page.keyboard.press("Control+a")
        page.wait_for_timeout(300)
        strokes = int(page.evaluate(_STROKES))
        gaps[f"moving {strokes} strokes"] = _drag(page, "select", (0.5, 0.5), seconds)
        gaps["zooming"] = page.evaluate(_ZOOM, seconds)
        version = browser.version
    figures = {name: _figures(times) for name, times in gaps.items()}
    return Result(
        title="Frames while drawing and editing, in the browser",
        columns=["while", "frames a second", "median", "p95", "in time"],
        rows=[
            [
                name,
                f"{one['fps']:.1f}",
                f"{one['p50']:.1f} ms",
                f"{one['p95']:.1f} ms",
                f"{one['in_time']:.0%}",
            ]
            for name, one in figures.items()
        ],
        figures={"frames": figures, "strokes": strokes},
        notes=[
            f"{seconds:g} s of each; in time: within 1.5 frames of 60 a second",
            f"a gallery of {note}; the server and the browser share the machine",
            f"Chromium {version}, headless, 1,280 x 900, no GPU",
        ],
    )


def _drag(page: Page, tool: str, start: tuple[float, float], seconds: float) -> list[float]:
    gaps: list[float] = page.evaluate(_DRAG, [tool, list(start), seconds])
    return gaps


def _figures(gaps_ms: list[float]) -> dict[str, Any]:
    in_time = sum(gap <= 1.5 * _FRAME_MS for gap in gaps_ms) / len(gaps_ms)
    return {"fps": 1000 * len(gaps_ms) / sum(gaps_ms), "in_time": in_time} | percentiles(gaps_ms)


if __name__ == "__main__":
    main()
