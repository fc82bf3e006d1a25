"""Time from lifting the pen to photos on the page, measured in the browser.

    python -m benchmarks.page_latency [--photos FOLDER] [--count 1000] [--lifts 60]

A headless Chromium (Debian's `chromium`, or SBTK_CHROMIUM) draws on the page of `sbtk serve` with
default options and the pretrained model: strokes of some 300 ms, a new sketch every few strokes.
Playwright moves the mouse; the page's clock measures. The page keeps the order of the photos until
the pen has rested for 300 ms, which the figures include.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from typing import TYPE_CHECKING

from benchmarks.chromium import open_chromium, open_page
from benchmarks.result import Result, percentiles, print_result
from benchmarks.serving import Server, make_parser, serve_gallery

if TYPE_CHECKING:
    from playwright.sync_api import Page

_WARM_UP = 4
_STROKES_A_SKETCH = 4
_MOVES = 20
_MOVE_MS = 15
_PAUSE_MS = 700

# `lifted` is the time of the pointer event by the browser's clock; an interval ends when the next
# frame has been painted. The page sets a mark when its list of hits has changed.
_CLOCK = """{
    const painted = (then) => requestAnimationFrame(() => setTimeout(then));
    const isInSight = (image) => image.getBoundingClientRect().top < innerHeight;
    let lifted = Infinity;
    window.found = null;
    addEventListener("pointerup", (event) => {
        lifted = event.timeStamp;
        window.found = null;
    }, true);
    new PerformanceObserver((list) => {
        for (const mark of list.getEntriesByName("sbtk:shown")) {
            if (mark.startTime < lifted || window.found !== null) continue;
            const begun = lifted;
            const found = window.found = { changed: mark.startTime - begun };
            painted(() => { found.hits = performance.now() - begun; });
            const watch = () => {
                const images = [...document.querySelectorAll("#hits img")].filter(isInSight);
                if (images.every((image) => image.complete && image.naturalWidth > 0)) {
                    painted(() => { found.thumbnails = performance.now() - begun; });
                } else {
                    requestAnimationFrame(watch);
                }
            };
            watch();
        }
    }).observe({ type: "mark" });
}"""
_NAMES = {
    "changed": "hits in the page's list",
    "hits": "hits painted",
    "thumbnails": "all thumbnails in sight painted",
}


def main() -> None:
    """Measure and print."""
    parser = make_parser(__doc__)
    parser.add_argument("--lifts", type=int, default=60, help="strokes to measure")
    options = parser.parse_args()
    with serve_gallery(options) as (server, note):
        result = measure(server, options.lifts, note)
    print_result(result, "benchmarks.page_latency", as_json=options.json)


def measure(server: Server, lifts: int, note: str) -> Result:
    """Measure the times from lifting the pen to hits and thumbnails."""
    with open_chromium() as browser:
        page = open_page(browser, server.port, _CLOCK)
        found = [_draw(page, index) for index in range(_WARM_UP + lifts)][_WARM_UP:]
        version = browser.version
    figures = {name: percentiles([one[name] for one in found]) for name in _NAMES}
    engine = server.health()["engine"]
    return Result(
        title="From the pen's lift to photos, in the browser",
        columns=["until", "p50", "p95", "slowest"],
        rows=[
            [_NAMES[name], *(f"{one[key]:.0f} ms" for key in ("p50", "p95", "max"))]
            for name, one in figures.items()
        ],
        figures={"ms": figures, "engine": engine},
        notes=[
            f"{lifts} strokes after {_WARM_UP} to warm up, {_STROKES_A_SKETCH} to a sketch; the "
            "server and the browser share the machine",
            f"a gallery of {note}",
            f"{engine['name']} {engine['version']}, {engine['precision']}, "
            f"{engine['threads']} threads; Chromium {version}, headless, 1,280 x 900, no GPU",
        ],
    )


def _draw(page: Page, index: int) -> dict[str, float]:
    """Draw a stroke, the first of a sketch on a cleared canvas; return milliseconds by name."""
    if index % _STROKES_A_SKETCH == 0 and page.locator("#clear").is_enabled():
        page.locator("#clear").click()
    box = page.locator("#input-layer").bounding_box()
    assert box is not None
    at = [(box["x"] + x * box["width"], box["y"] + y * box["height"]) for x, y in _stroke(index)]
    page.mouse.move(*at[0])
    page.mouse.down()
    for place in at[1:]:
        page.mouse.move(*place)
        page.wait_for_timeout(_MOVE_MS)
    page.mouse.up()
    page.wait_for_timeout(_PAUSE_MS)
    while not page.evaluate("window.found?.hits && window.found?.thumbnails"):
        page.wait_for_timeout(50)
    found: dict[str, float] = page.evaluate("window.found")
    return found


def _stroke(index: int) -> Iterator[tuple[float, float]]:
    """Yield a random arc, in shares of the canvas."""
    rng = random.Random(index)
    x, y, radius = (rng.uniform(*ends) for ends in ((0.3, 0.7), (0.3, 0.7), (0.1, 0.28)))
    start, turn = rng.uniform(0, 2 * math.pi), rng.uniform(1.5, 5.5)
    for step in range(_MOVES + 1):
        angle = start + turn * step / _MOVES
        yield x + radius * math.cos(angle), y + radius * math.sin(angle)


if __name__ == "__main__":
    main()
