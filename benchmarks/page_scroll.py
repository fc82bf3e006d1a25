"""Memory of the page while a large gallery is scrolled to its end, measured in the browser.

    python -m benchmarks.page_scroll [--photos FOLDER] [--count 20000]

A headless Chromium (Debian's `chromium`, or SBTK_CHROMIUM) shows the recent photos of a gallery on
the page of `sbtk serve`, and scrolls until the last of them is shown. Nothing is searched, so a
model of a few pixels indexes the photos, which would take the included one longer than the rest.
JavaScript's memory is measured after garbage collections, the browser's as the proportional set
sizes of its processes: as they are, and after the browser was told that memory is short and its
HTTP cache was cleared. What is left is what the page holds; a headless window keeps that cache in
memory, a user's profile on disk.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.chromium import open_chromium, open_page
from benchmarks.result import Result, print_result
from benchmarks.serving import Server, make_parser, serve_gallery
from tests.tiny import tiny_bundle

if TYPE_CHECKING:
    from playwright.sync_api import CDPSession

#: Measurements on the way.
_STOPS = 10
#: Without another photo for so long, the page has stopped.
_STALLED_S = 60.0
#: The browser frees memory in the background.
_FREEING_S = 3.0
# Scrolls almost a screen, and returns the position of the last photo on the screen, the number in
# the document, and the number whose thumbnails are not loaded after five seconds.
_SCROLL = """async () => {
    scrollBy({ top: innerHeight * 0.9, behavior: "instant" });
    const frame = () => new Promise((resolve) => requestAnimationFrame(resolve));
    await frame();
    await frame();
    const images = () => [...document.querySelectorAll("#hits img")];
    const end = performance.now() + 5000;
    while (performance.now() < end && !images().every((image) => image.complete)) await frame();
    const items = [...document.querySelectorAll("#hits > li.photo")];
    const blank = images().filter((image) => image.naturalWidth === 0);
    const shown = items.filter((item) => item.getBoundingClientRect().top < innerHeight);
    const last = Math.max(...shown.map((item) => Number(item.ariaPosInSet)));
    return [last, items.length, blank.length];
}"""


def main() -> None:
    """Measure and print."""
    parser = make_parser(__doc__)
    parser.set_defaults(count=20_000)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        options.model = options.model or str(tiny_bundle(Path(folder)))
        with serve_gallery(options) as (server, note):
            result = measure(server, options.count, note)
    print_result(result, "benchmarks.page_scroll", as_json=options.json)


def measure(server: Server, count: int, note: str) -> Result:
    """Scroll to the end, and measure at even distances on the way."""
    found: list[dict[str, float]] = []
    with open_chromium() as browser:
        page = open_page(browser, server.port)
        page.wait_for_selector("#hits > li.photo")
        session = page.context.new_cdp_session(page)
        session.send("Performance.enable")
        processes = browser.new_browser_cdp_session()
        position, screens, blank = 0, 0, 0
        begun = moved = time.monotonic()
        while position < count:
            before = position
            position, cards, missed = page.evaluate(_SCROLL)
            blank += missed
            if len(found) * count <= _STOPS * position:
                figures = {"photo": position, "cards": cards} | _memory(session, processes)
                found.append(figures)
            if position > before:
                moved, screens = time.monotonic(), screens + 1
            elif time.monotonic() - moved > _STALLED_S:
                sys.exit(f"the page shows {position:,} of {count:,} photos, and no more")
            else:
                page.wait_for_timeout(50)
        seconds = time.monotonic() - begun
        version = browser.version
    return Result(
        title="Memory while scrolling a large gallery to its end, in the browser",
        columns=[
            *("photo", "cards in the page", "nodes", "JavaScript"),
            *("all of the browser", "without caches"),
        ],
        rows=[
            [
                f"{one['photo']:,.0f}",
                f"{one['cards']:.0f}",
                f"{one['nodes']:,.0f}",
                f"{one['javascript_mb']:.1f} MB",
                f"{one['browser_mb']:.0f} MB",
                f"{one['held_mb']:.0f} MB",
            ]
            for one in found
        ],
        figures={"scroll": found, "screens": screens, "seconds": seconds, "blank": blank},
        notes=[
            f"a gallery of {note}, the most recent first",
            f"{screens:,} screens in {seconds:.0f} s; {blank:,} thumbnails not loaded after 5 s",
            f"Chromium {version}, headless, 1,280 x 900, no GPU",
        ],
    )


def _memory(page: CDPSession, browser: CDPSession) -> dict[str, float]:
    page.send("HeapProfiler.collectGarbage")
    metrics: list[dict[str, Any]] = page.send("Performance.getMetrics")["metrics"]
    values = {metric["name"]: float(metric["value"]) for metric in metrics}
    browser_mb = _browser_mb(browser)
    page.send("Network.clearBrowserCache")
    page.send("Memory.simulatePressureNotification", {"level": "critical"})
    page.send("HeapProfiler.collectGarbage")
    time.sleep(_FREEING_S)
    return {
        "nodes": values["Nodes"],
        "javascript_mb": values["JSHeapUsedSize"] / 1e6,
        "browser_mb": browser_mb,
        "held_mb": _browser_mb(browser),
    }


def _browser_mb(browser: CDPSession) -> float:
    processes = browser.send("SystemInfo.getProcessInfo")["processInfo"]
    return sum(_proportional_mb(int(one["id"])) for one in processes)


def _proportional_mb(pid: int) -> float:
    """Return a process's memory, of which it has its share where others share it."""
    rollup = Path("/proc", str(pid), "smaps_rollup").read_text()
    return int(rollup.partition("\nPss:")[2].split()[0]) * 1024 / 1e6


if __name__ == "__main__":
    main()
