"""Memory of the page while a large gallery is scrolled to its end, measured in the browser.

    python -m benchmarks.page_scroll [--photos FOLDER] [--count 20000]

A headless Chromium (Debian's `chromium`, or SBTK_CHROMIUM) shows the recent photos of a gallery on
the page of `sbtk serve`, and scrolls until the last of them is shown. Nothing is searched, so a
model of a few pixels indexes the photos, which would take the included one longer than the rest.
JavaScript's memory is measured after garbage collections, the browser's as the proportional set
sizes of its processes. Its profile is on disk, as a user's is. No program stays connected to its
debugger, for which it would keep the bytes of all thumbnails.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from benchmarks.chromium import chromium_path
from benchmarks.result import Result, print_result
from benchmarks.serving import make_parser, serve_gallery
from tests.tiny import tiny_bundle

#: Measurements on the way.
_STOPS = 10
#: Without another photo for so long, the page has stopped.
_STALLED_S = 60.0
_STARTED_WITHIN_S = 60.0
_POLL_S = 0.2
# Scrolls almost a screen at a time, and shows in the title: the position of the last photo on the
# screen, cards and elements in the document, bytes of JavaScript, screens, and thumbnails that were
# not loaded after five seconds.
_SCROLL = """() => {
    let blank = 0, screens = 0, last = 0;
    const frame = () => new Promise((resolve) => requestAnimationFrame(resolve));
    const images = () => [...document.querySelectorAll("#hits img")];
    const step = async () => {
        scrollBy({ top: innerHeight * 0.9, behavior: "instant" });
        await frame();
        await frame();
        const end = performance.now() + 5000;
        while (performance.now() < end && !images().every((image) => image.complete)) await frame();
        blank += images().filter((image) => image.naturalWidth === 0).length;
        const items = [...document.querySelectorAll("#hits > li.photo")];
        const shown = items.filter((item) => item.getBoundingClientRect().top < innerHeight);
        const reached = Math.max(...shown.map((item) => Number(item.ariaPosInSet)));
        if (reached > last) screens += 1;
        last = reached;
        gc();
        const elements = document.getElementsByTagName("*").length;
        const bytes = performance.memory.usedJSHeapSize;
        document.title = JSON.stringify([last, items.length, elements, bytes, screens, blank]);
        setTimeout(step, 20);
    };
    step();
}"""
_FLAGS = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--window-size=1280,900"),
    *("--no-first-run", "--disable-extensions", "--js-flags=--expose-gc"),
    "--enable-precise-memory-info",
)


def main() -> None:
    """Measure and print."""
    parser = make_parser(__doc__)
    parser.set_defaults(count=20_000)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        options.model = options.model or str(tiny_bundle(Path(folder)))
        with serve_gallery(options) as (server, note):
            result = measure(server.port, options.count, note)
    print_result(result, "benchmarks.page_scroll", as_json=options.json)


def measure(port: int, count: int, note: str) -> Result:
    """Scroll to the end, and measure at even distances on the way."""
    found: list[dict[str, float]] = []
    with _scrolling_chromium(f"http://127.0.0.1:{port}/") as (pid, debugger):
        begun = moved = time.monotonic()
        position, screens, blank = 0.0, 0.0, 0.0
        while position < count:
            time.sleep(_POLL_S)
            state = _title(debugger)
            if state is None:
                continue
            reached, cards, elements, script_bytes, screens, blank = state
            if reached > position:
                position, moved = reached, time.monotonic()
            elif time.monotonic() - moved > _STALLED_S:
                sys.exit(f"the page shows {position:,.0f} of {count:,} photos, and no more")
            if len(found) * count <= _STOPS * position:
                figures = {"photo": position, "cards": cards, "elements": elements}
                figures |= {"javascript_mb": script_bytes / 1e6, "browser_mb": _memory_mb(pid)}
                found.append(figures)
        seconds = time.monotonic() - begun
        version = _ask(debugger, "version")["Browser"]
    return Result(
        title="Memory while scrolling a large gallery to its end, in the browser",
        columns=["photo", "cards in the page", "elements", "JavaScript", "all of the browser"],
        rows=[
            [
                f"{one['photo']:,.0f}",
                f"{one['cards']:.0f}",
                f"{one['elements']:,.0f}",
                f"{one['javascript_mb']:.1f} MB",
                f"{one['browser_mb']:.0f} MB",
            ]
            for one in found
        ],
        figures={"scroll": found, "screens": screens, "seconds": seconds, "blank": blank},
        notes=[
            f"a gallery of {note}, the most recent first",
            f"{screens:,.0f} screens in {seconds:.0f} s; "
            f"{blank:,.0f} thumbnails not loaded after 5 s",
            f"{version}, headless, 1,280 x 900, no GPU",
        ],
    )


@contextlib.contextmanager
def _scrolling_chromium(url: str) -> Iterator[tuple[int, str]]:
    """Yield the process and the debugger's address of a browser that scrolls the page."""
    from playwright.sync_api import sync_playwright

    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        command = [chromium_path(), *_FLAGS, f"--user-data-dir={profile}"]
        process = subprocess.Popen(
            [*command, "--remote-debugging-port=0", url], stderr=subprocess.DEVNULL
        )
        try:
            debugger = f"http://127.0.0.1:{_debugging_port(Path(profile))}"
            with sync_playwright() as driver:
                browser = driver.chromium.connect_over_cdp(debugger)
                page = browser.contexts[0].pages[0]
                page.wait_for_selector("#hits > li.photo")
                page.evaluate(_SCROLL)
                browser.close()  # only disconnects
            yield process.pid, debugger
        finally:
            process.terminate()
            process.wait()


def _debugging_port(profile: Path) -> int:
    end = time.monotonic() + _STARTED_WITHIN_S
    while time.monotonic() < end:
        with contextlib.suppress(OSError, ValueError, IndexError):
            return int((profile / "DevToolsActivePort").read_text().split()[0])
        time.sleep(_POLL_S)
    sys.exit("Chromium did not start")


def _ask(debugger: str, what: str) -> dict[str, str]:
    with urllib.request.urlopen(f"{debugger}/json/{what}", timeout=30) as response:
        found: dict[str, str] = json.load(response)
    return found


def _title(debugger: str) -> list[float] | None:
    """Return what the page shows in its title; `None` before the first screen."""
    with urllib.request.urlopen(f"{debugger}/json/list", timeout=30) as response:
        pages = json.load(response)
    titles = [each["title"] for each in pages if each["type"] == "page"]
    found = [json.loads(title) for title in titles if title.startswith("[")]
    return found[0] if found else None


def _memory_mb(pid: int) -> float:
    """Return the memory of a process and its descendants; of shared pages their share."""
    parents = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            stat = (folder / "stat").read_text().rpartition(")")[2].split()
            parents[int(folder.name)] = int(stat[1])
    family = {pid}
    while more := {one for one, parent in parents.items() if parent in family} - family:
        family |= more
    total = 0
    for one in family:
        with contextlib.suppress(OSError, IndexError):
            rollup = Path("/proc", str(one), "smaps_rollup").read_text()
            total += int(rollup.partition("\nPss:")[2].split()[0]) * 1024
    return total / 1e6


if __name__ == "__main__":
    main()
