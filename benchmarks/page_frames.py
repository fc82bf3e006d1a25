"""Frames per second of the page while drawing, editing and zooming, measured in the browser.

    python -m benchmarks.page_frames [--photos FOLDER] [--count 1000] [--seconds 4]

A headless Chromium (Debian's `chromium`, or SBTK_CHROMIUM) uses the tools on the page of
`sbtk serve` with default options and the pretrained model: it draws on a canvas of many strokes,
selects and drags all of them, and zooms the canvas; then it enlarges the largest of the photos that
it shows, and zooms it and drags it. The pointer moves once a frame. Time is measured between
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
_DRAG = """async ([selector, from, seconds]) => {
    const target = document.querySelector(selector);
    target.setPointerCapture = () => {};
    const box = target.getBoundingClientRect();
    const send = (type, x, y) => target.dispatchEvent(new PointerEvent(type, {
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
_ZOOM = """async ([selector, seconds]) => {
    const target = document.querySelector(selector);
    const box = target.getBoundingClientRect();
    const frame = () => new Promise(requestAnimationFrame);
    const gaps = [];
    let last = await frame();
    const begun = last;
    while (last - begun < 1000 * seconds) {
        target.dispatchEvent(new WheelEvent("wheel", {
            bubbles: true, cancelable: true, ctrlKey: true,
            deltaY: -25 * Math.sin((last - begun) / 300),
            clientX: box.left + 0.4 * box.width, clientY: box.top + 0.4 * box.height }));
        const now = await frame();
        gaps.push(now - last);
        last = now;
    }
    return gaps;
}"""
_CANVAS, _STAGE, _PHOTO = "#input-layer", "#viewer-stage", "#viewer-image"
# Opens the shown photo whose file has the most bytes.
_OPEN_LARGEST = """async () => {
    const sizes = await Promise.all([...document.querySelectorAll("#hits > li.photo")].map(
        async (item) => {
            const { size_bytes } = await (await fetch(`v1/photos/${item.dataset.id}`)).json();
            return { item, size_bytes };
        }));
    sizes.sort((a, b) => b.size_bytes - a.size_bytes)[0].item.querySelector("a").click();
}"""
_PIXELS = """({ naturalWidth, naturalHeight }) => {
    return `${naturalWidth.toLocaleString("en")} x ${naturalHeight.toLocaleString("en")}`;
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
    """Measure the intervals between frames while drawing, editing and zooming."""
    with open_chromium() as browser:
        page = open_page(browser, server.port)
        _choose(page, "stroke-eraser")
        gaps = {"nothing (the machine's own rate)": _drag(page, _CANVAS, (0.5, 0.5), seconds)}
        for index in range(_EXAMPLES):
            page.locator(".example").nth(index).dispatch_event("click")
        _choose(page, "pen")
        gaps["drawing"] = _drag(page, _CANVAS, (0.5, 0.4), seconds)
        page.keyboard.press("Control+a")
        page.wait_for_timeout(300)
        strokes = int(page.evaluate(_STROKES))
        _choose(page, "select")
        gaps[f"moving {strokes} strokes"] = _drag(page, _CANVAS, (0.5, 0.5), seconds)
        gaps["zooming the canvas"] = page.evaluate(_ZOOM, [_CANVAS, seconds])
        page.evaluate(_OPEN_LARGEST)
        page.locator("#viewer-exif dt").first.wait_for()
        # Enlarged this much, the photo's own file is shown.
        for _ in range(3):
            page.keyboard.press("+")
        page.wait_for_timeout(2000)
        pixels = page.eval_on_selector(_PHOTO, _PIXELS)
        gaps[f"dragging a zoomed photo of {pixels} pixels"] = _drag(
            page, _PHOTO, (0.5, 0.5), seconds
        )
        gaps["zooming it"] = page.evaluate(_ZOOM, [_STAGE, seconds])
        version = browser.version
    figures = {name: _figures(times) for name, times in gaps.items()}
    return Result(
        title="Frames while drawing, editing and zooming, in the browser",
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


def _choose(page: Page, tool: str) -> None:
    page.locator(f'input[name="tool"][value="{tool}"]').dispatch_event("click")


def _drag(page: Page, selector: str, start: tuple[float, float], seconds: float) -> list[float]:
    gaps: list[float] = page.evaluate(_DRAG, [selector, list(start), seconds])
    return gaps


def _figures(gaps_ms: list[float]) -> dict[str, Any]:
    in_time = sum(gap <= 1.5 * _FRAME_MS for gap in gaps_ms) / len(gaps_ms)
    return {"fps": 1000 * len(gaps_ms) / sum(gaps_ms), "in_time": in_time} | percentiles(gaps_ms)


if __name__ == "__main__":
    main()
