"""Drives the page in a browser, and checks the console and the requests."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import re
import time
import urllib.request
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

if TYPE_CHECKING:
    from playwright.sync_api import Browser, ConsoleMessage, Page, Request, Response, WebError

#: A point on the canvas, as fractions of its width and height.
Place = tuple[float, float]

#: Strokes for which two photos have different scores.
ROOF: Sequence[Place] = ((0.2, 0.8), (0.2, 0.4), (0.5, 0.15), (0.8, 0.4), (0.8, 0.8), (0.2, 0.8))
DOOR: Sequence[Place] = ((0.45, 0.8), (0.45, 0.6), (0.6, 0.6), (0.6, 0.8))

# Reasons for tests that run in Chromium only: Playwright sends these to no Firefox as released.
NO_TOUCH = "Playwright sends it no touches and no pens"
NO_MEDIA = "Playwright cannot change its system's colour scheme"
NO_KEY_CODES = "Playwright sends it no keys of other layouts"

# The hash of "body {}", which Playwright adds for a moment before each screenshot in Firefox.
_SCREENSHOT_STYLE = r"sha256-YjaKGiklmzC6wjXA513HAMmzus8VE61XCOT\+SmwNZWA="
_TIMEOUT_S = 30
_COMPARED = 12

# The page sets performance marks when the drawing changes and when hits are shown. Cards must have
# stopped moving, because a click on a moving card can hit another one.
_HITS_ARE_SHOWN = """begun => {
    const last = (name) => performance.getEntriesByName(name).at(-1)?.startTime ?? 0;
    const isCard = ({ effect }) => effect.target.matches("li");
    return last("sbtk:shown") > Math.max(begun, last("sbtk:drawn")) &&
        document.getElementById("results").ariaBusy === "false" &&
        !document.getElementById("hits").getAnimations({ subtree: true }).some(isCard);
}"""

# Playwright cannot read the body of a request if it is a Blob.
_RECORD_BODIES = """{
    const plain = window.fetch;
    window.fetch = (address, options) => {
        if (options?.body) window.lastSent = { address, body: options.body };
        return plain(address, options);
    };
}"""
_LAST_SENT = """async () => {
    const { address, body } = window.lastSent;
    const bytes = new Uint8Array(await body.arrayBuffer());
    const text = Array.from(bytes, (byte) => String.fromCharCode(byte)).join("");
    return { address, type: body.type, bytes: btoa(text) };
}"""


class Visit:
    """The page in a fresh browser profile.

    On exit, asserts that there were no console errors or warnings, no uncaught exceptions, and no
    requests to other origins.

    Attributes:
        page: the Playwright page.
        is_firefox: whether the browser is Firefox.
        queries: the search requests, oldest first.
    """

    def __init__(self, browser: Browser, origin: str, **settings: Any) -> None:
        """Create a profile with Playwright settings such as `viewport`."""
        self.origin = origin
        self.is_firefox = browser.browser_type.name == "firefox"
        self.queries: list[Request] = []
        self._messages: list[str] = []
        self._expected: list[str] = [
            "Service Worker registration blocked by Playwright",
            _SCREENSHOT_STYLE,
        ]
        self._foreign_requests: list[str] = []
        chosen: dict[str, Any] = {
            "viewport": {"width": 1280, "height": 900},
            # Playwright cannot intercept requests that go through a service worker.
            "service_workers": "block",
        }
        self.context = browser.new_context(**(chosen | settings))
        self.context.set_default_timeout(1000 * _TIMEOUT_S)
        self.context.add_init_script(_RECORD_BODIES)
        if self.is_firefox and (chosen | settings)["service_workers"] == "block":
            # Playwright's setting does nothing in a Firefox that it has not patched.
            self.context.add_init_script("delete Navigator.prototype.serviceWorker")
        self.context.on("request", self._on_request)
        self.context.on("weberror", self._on_error)
        self.context.on("console", self._on_console)
        if self.is_firefox:
            # Its driver tells of no failed requests in the console.
            self.context.on("response", self._on_response)
            self.context.on("requestfailed", self._on_failed_request)
        self.page: Page = self.context.new_page()

    def __enter__(self) -> Visit:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.context.close()
        if error is None:
            assert not self._foreign_requests, self._foreign_requests
            unexpected = self._unexpected_messages()
            assert not unexpected, unexpected

    def open(self, path: str = "/", status: str = "ok") -> None:
        """Open the page and wait until it shows this status of the server, and photos if ok."""
        self.page.goto(self.origin + path)
        self.wait_for_status(status)
        if status == "ok":
            self.page.wait_for_selector('#results[data-shown][aria-busy="false"]')

    def wait_for_status(self, status: str) -> None:
        """Wait until the page shows the status `ok`, `loading`, `unreachable` ..."""
        self.page.wait_for_selector(f'#server-status[data-status="{status}"]')

    def go(self, steps: int) -> None:
        """Go back (-1) or forward (1) in the page's history, within the page.

        In Firefox, Playwright's own methods wait for the page to load, which it does not.
        """
        self.page.evaluate("steps => history.go(steps)", steps)

    def allow_clipboard(self) -> None:
        """Let the page read and write the clipboard, which in Firefox it always may."""
        if not self.is_firefox:
            self.context.grant_permissions(["clipboard-read", "clipboard-write"])

    def use_scheme(self, scheme: str) -> None:
        """Show the page in `light` or `dark`, as the choice of the theme does."""
        script = "scheme => { document.documentElement.dataset.theme = scheme; }"
        self.page.evaluate(script, scheme)

    def look(self) -> None:
        """Make the page check the server, as it does every 20 seconds."""
        self.page.evaluate("window.dispatchEvent(new Event('online'))")

    @contextlib.contextmanager
    def new_hits(self, *, are_recent: bool = False) -> Iterator[None]:
        """Wait, after the body, until its hits are shown and have stopped moving.

        Args:
            are_recent: they are the recent photos, without a search.
        """
        begun, before = self.page.evaluate("performance.now()"), len(self.queries)
        yield
        # Until an opened image is decoded, recent photos may be shown.
        end = time.monotonic() + _TIMEOUT_S
        while not are_recent and len(self.queries) == before:
            assert time.monotonic() < end, f"no search within {_TIMEOUT_S} s"
            self.page.wait_for_timeout(20)
        self.wait_until(_HITS_ARE_SHOWN, begun)

    def wait_until(self, script: str, argument: object = None) -> None:
        """Wait until a JavaScript function returns true.

        Playwright's `wait_for_function` needs `eval`, which the page's policy forbids.
        """
        end = time.monotonic() + _TIMEOUT_S
        while not self.page.evaluate(script, argument):
            assert time.monotonic() < end, f"not within {_TIMEOUT_S} s: {script}"
            self.page.wait_for_timeout(20)

    def stroke(self, places: Sequence[Place], steps: int = 4) -> None:
        """Draw a stroke with the mouse."""
        self.press(places[0])
        self.move(places[1:], steps)
        self.page.mouse.up()

    def press(self, place: Place) -> None:
        """Press the mouse button on the canvas."""
        self.page.mouse.move(*self.on_screen(place))
        self.page.mouse.down()

    def move(self, places: Sequence[Place], steps: int = 4) -> None:
        """Move the mouse over the canvas."""
        for place in places:
            self.page.mouse.move(*self.on_screen(place), steps=steps)

    def on_screen(self, place: Place) -> tuple[float, float]:
        """Return a point on the canvas in pixels of the window."""
        box = self.page.locator("#input-layer").bounding_box()
        assert box is not None
        return box["x"] + place[0] * box["width"], box["y"] + place[1] * box["height"]

    def touch(self, *steps: Sequence[Place]) -> None:
        """Put fingers on the window, move them from step to step, and lift them.

        A step has the pixels of each finger. Only in Chromium.
        """
        session = self.context.new_cdp_session(self.page)
        for index, fingers in enumerate(steps):
            points = [{"x": x, "y": y, "id": finger} for finger, (x, y) in enumerate(fingers)]
            kind = "touchMove" if index else "touchStart"
            session.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": points})
        session.send("Input.dispatchTouchEvent", {"type": "touchEnd", "touchPoints": []})

    def wait_for_recent(self) -> None:
        """Wait until the page shows the recent photos, because there is nothing to search for."""
        self.page.wait_for_selector('#results[data-shown="recent"][aria-busy="false"]')

    def ids(self) -> list[int]:
        """Return the ids of the first photos, best first, at most 12.

        Photos far from the viewport are not in the document.
        """
        script = "items => items.map(item => [Number(item.ariaPosInSet), Number(item.dataset.id)])"
        shown = self.page.eval_on_selector_all("#hits > li.photo", script)
        return [photo_id for position, photo_id in shown if position <= _COMPARED]

    def count(self) -> int:
        """Return the number of photos in the results, in the document or not."""
        script = "items => items.length && Number(items[0].ariaSetSize)"
        return int(self.page.eval_on_selector_all("#hits > li.photo", script))

    def names(self) -> list[str]:
        """Return the names of the photos in the document, best first."""
        return self.page.locator("#hits .photo-name").all_text_contents()

    def resend_last(self) -> list[int]:
        """Send the last image again, and return the first ids that the server finds."""
        sent = self.page.evaluate(_LAST_SENT)
        body, headers = base64.b64decode(sent["bytes"]), {"Content-Type": sent["type"]}
        request = urllib.request.Request(f"{self.origin}/{sent['address']}", body, headers)
        with urllib.request.urlopen(request, timeout=20) as response:
            return [hit["id"] for hit in json.load(response)["hits"]][:_COMPARED]

    def sent_image(self) -> Image.Image:
        """Return the image that was sent last."""
        sent = self.page.evaluate(_LAST_SENT)
        return Image.open(io.BytesIO(base64.b64decode(sent["bytes"])))

    def sent_ink(self) -> NDArray[np.bool_]:
        """Return `(1000, 1000) bool`: where the image that was sent last is dark."""
        return np.asarray(self.sent_image().convert("L").resize((1000, 1000))) < 160

    def ink(self) -> int:
        """Return the number of canvas pixels with ink."""
        script = """canvas => {
            const { width, height } = canvas;
            const context = new OffscreenCanvas(width, height).getContext("2d");
            context.drawImage(canvas, 0, 0);
            const { data } = context.getImageData(0, 0, width, height);
            let count = 0;
            for (let index = 3; index < data.length; index += 4) count += data[index] > 32;
            return count;
        }"""
        return int(self.page.eval_on_selector("#strokes-layer", script))

    def fits(self) -> bool:
        """Return whether the page needs no horizontal scrolling, when it is laid out."""
        script = """async () => {
            const frame = () => new Promise(done => requestAnimationFrame(done));
            await frame();
            await frame();
            const beyond = (element) => element.scrollWidth - element.clientWidth;
            return beyond(document.documentElement) <= 0 && beyond(document.body) === 0;
        }"""
        return bool(self.page.evaluate(script))

    def expect_message(self, pattern: str) -> None:
        """Wait for a console message that matches, and allows further ones."""
        end = time.monotonic() + _TIMEOUT_S
        while not any(re.search(pattern, text) for text in self._messages):
            assert time.monotonic() < end, f"no {pattern!r} among {self._messages}"
            self.page.wait_for_timeout(20)
        self.allow_message(pattern)

    def allow_message(self, pattern: str) -> None:
        """Allow console messages that match."""
        self._expected.append(pattern)

    def _unexpected_messages(self) -> list[str]:
        return [
            text
            for text in self._messages
            if not any(re.search(pattern, text) for pattern in self._expected)
        ]

    def _on_request(self, request: Request) -> None:
        if not request.url.startswith((f"{self.origin}/", "data:", f"blob:{self.origin}/")):
            self._foreign_requests.append(request.url)
        if re.search(r"/v1/(query|similar|photos/\d+/similar)", request.url):
            self.queries.append(request)

    def _on_error(self, error: WebError) -> None:
        self._messages.append(f"uncaught: {error.error}")

    def _on_response(self, response: Response) -> None:
        if response.status >= 400:
            self._messages.append(f"{response.status} ({response.url})")

    def _on_failed_request(self, request: Request) -> None:
        if request.failure is not None and "ABORT" not in request.failure:
            self._messages.append(f"ERR_ {request.failure} ({request.url})")

    def _on_console(self, message: ConsoleMessage) -> None:
        if message.type in ("error", "warning", "assert"):
            self._messages.append(f"{message.text} ({message.location['url']})")


def violations(visit: Visit) -> list[str]:
    """Return the serious and critical violations that axe-core finds."""
    axe = pytest.importorskip("axe_playwright_python.sync_playwright")
    found: dict[str, Any] = axe.Axe().run(visit.page).response
    assert len(found["passes"]) > 5
    return [
        f"{one['id']}: {node['target']} {node['failureSummary']}"
        for one in found["violations"]
        for node in one["nodes"]
        if one["impact"] in ("serious", "critical")
    ]
