"""One visit to the page: what a person does there, and what is watched meanwhile."""

from __future__ import annotations

import base64
import contextlib
import json
import re
import time
import urllib.request
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from playwright.sync_api import Browser, ConsoleMessage, Page, Request, WebError

#: A place on the paper, in shares of its width and height.
Place = tuple[float, float]

#: A few lines that any two photos look differently like.
ROOF: Sequence[Place] = ((0.2, 0.8), (0.2, 0.4), (0.5, 0.15), (0.8, 0.4), (0.8, 0.8), (0.2, 0.8))
DOOR: Sequence[Place] = ((0.45, 0.8), (0.45, 0.6), (0.6, 0.6), (0.6, 0.8))

_PATIENCE_S = 30

# The page marks the moments at which the drawing changed and at which hits were shown. Cards that
# still glide lie over others: who points at one would hit another, and then Playwright scrolls.
_HAS_ANSWER = """begun => {
    const last = (name) => performance.getEntriesByName(name).at(-1)?.startTime ?? 0;
    const glides = ({ effect }) => effect.target.matches("li");
    return last("sbtk:shown") > Math.max(begun, last("sbtk:drawn")) &&
        document.getElementById("finds").ariaBusy === "false" &&
        !document.getElementById("hits").getAnimations({ subtree: true }).some(glides);
}"""

# Browsers do not show what a request carries when it is a Blob.
_KEEP_BODIES = """{
    const plain = window.fetch;
    window.fetch = (address, options) => {
        if (options?.body) window.sentLast = { address, body: options.body };
        return plain(address, options);
    };
}"""
_SENT_LAST = """async () => {
    const { address, body } = window.sentLast;
    const bytes = new Uint8Array(await body.arrayBuffer());
    return { address, type: body.type, bytes: btoa(String.fromCharCode(...bytes)) };
}"""


class Visit:
    """A fresh browser profile with the page in it.

    Leaving it checks that the console had nothing to complain about, nothing was thrown, and no
    request went anywhere else than to the page's own origin.

    Attributes:
        page: Playwright's page.
        queries: the requests for hits, oldest first.
    """

    def __init__(self, browser: Browser, origin: str, **settings: Any) -> None:
        """Opens a profile with Playwright's settings for it, such as `viewport`."""
        self.origin = origin
        self.queries: list[Request] = []
        self._complaints: list[str] = []
        self._forgiven: list[str] = []
        self._foreign: list[str] = []
        chosen: dict[str, Any] = {"viewport": {"width": 1280, "height": 900}}
        self.context = browser.new_context(**(chosen | settings))
        self.context.set_default_timeout(1000 * _PATIENCE_S)
        self.context.add_init_script(_KEEP_BODIES)
        self.context.on("request", self._saw_request)
        self.context.on("weberror", self._saw_error)
        self.context.on("console", self._heard)
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
            assert not self._foreign, self._foreign
            complaints = self._unforgiven()
            assert not complaints, complaints

    def open(self, path: str = "/", condition: str = "ok") -> None:
        """Opens the page and waits until it knows how its server is."""
        self.page.goto(self.origin + path)
        self.wait_for_condition(condition)

    def wait_for_condition(self, condition: str) -> None:
        """Waits until the page says of its server that it is `ok`, `loading`, `gone` ..."""
        self.page.wait_for_selector(f'#server[data-condition="{condition}"]')

    @contextlib.contextmanager
    def new_hits(self) -> Iterator[None]:
        """Waits, after what is done inside, until the hits for it are shown and lie still."""
        begun = self.page.evaluate("performance.now()")
        yield
        self.wait_until(_HAS_ANSWER, begun)

    def wait_until(self, script: str, argument: object = None) -> None:
        """Waits until a function of the page returns true.

        Playwright's own way needs `eval`, which the page's policy forbids.
        """
        end = time.monotonic() + _PATIENCE_S
        while not self.page.evaluate(script, argument):
            assert time.monotonic() < end, f"not within {_PATIENCE_S} s: {script}"
            self.page.wait_for_timeout(20)

    def stroke(self, places: Sequence[Place], steps: int = 4) -> None:
        """Draws a line with the mouse, and lifts it."""
        self.press(places[0])
        self.move(places[1:], steps)
        self.page.mouse.up()

    def press(self, place: Place) -> None:
        """Puts the mouse down on the paper."""
        self.page.mouse.move(*self.on_screen(place))
        self.page.mouse.down()

    def move(self, places: Sequence[Place], steps: int = 4) -> None:
        """Moves the mouse over the paper."""
        for place in places:
            self.page.mouse.move(*self.on_screen(place), steps=steps)

    def on_screen(self, place: Place) -> tuple[float, float]:
        """Returns a place on the paper in pixels of the window."""
        box = self.page.locator("#pen").bounding_box()
        assert box is not None
        return box["x"] + place[0] * box["width"], box["y"] + place[1] * box["height"]

    def ids(self) -> list[int]:
        """Returns the ids of the photos that are shown, best first."""
        script = "cards => cards.map(card => Number(card.dataset.id))"
        return list(self.page.eval_on_selector_all("#hits > li", script))

    def names(self) -> list[str]:
        """Returns the names of the photos that are shown, best first."""
        return self.page.locator("#hits .card-name").all_text_contents()

    def asked_again(self) -> list[int]:
        """Returns the ids that the server finds for the image that the page sent last."""
        sent = self.page.evaluate(_SENT_LAST)
        body, headers = base64.b64decode(sent["bytes"]), {"Content-Type": sent["type"]}
        request = urllib.request.Request(f"{self.origin}/{sent['address']}", body, headers)
        with urllib.request.urlopen(request, timeout=20) as answer:
            return [hit["id"] for hit in json.load(answer)["hits"]]

    def ink(self) -> int:
        """Returns how many pixels of the paper are drawn on."""
        script = """canvas => {
            const { width, height } = canvas;
            const context = new OffscreenCanvas(width, height).getContext("2d");
            context.drawImage(canvas, 0, 0);
            const { data } = context.getImageData(0, 0, width, height);
            let count = 0;
            for (let index = 3; index < data.length; index += 4) count += data[index] > 32;
            return count;
        }"""
        return int(self.page.eval_on_selector("#ink", script))

    def fits(self) -> bool:
        """Whether nothing on the page is wider than the window, less the place of its scrollbar."""
        script = """() => {
            const beyond = (element) => element.scrollWidth - element.clientWidth;
            return beyond(document.documentElement) <= 0 && beyond(document.body) === 0;
        }"""
        return bool(self.page.evaluate(script))

    def forgive(self, pattern: str) -> None:
        """Takes complaints that the test provokes off the list; there has to be one.

        Later ones go too: a browser complains of a page first, and then of its icon.
        """
        end = time.monotonic() + _PATIENCE_S
        while not any(re.search(pattern, text) for text in self._complaints):
            assert time.monotonic() < end, f"no {pattern!r} among {self._complaints}"
            self.page.wait_for_timeout(20)
        self.tolerate(pattern)

    def tolerate(self, pattern: str) -> None:
        """Takes complaints off the list that may come or not."""
        self._forgiven.append(pattern)

    def _unforgiven(self) -> list[str]:
        return [
            text
            for text in self._complaints
            if not any(re.search(pattern, text) for pattern in self._forgiven)
        ]

    def _saw_request(self, request: Request) -> None:
        if not request.url.startswith((f"{self.origin}/", "data:", f"blob:{self.origin}/")):
            self._foreign.append(request.url)
        if re.search(r"/v1/(query|photos/\d+/similar)", request.url):
            self.queries.append(request)

    def _saw_error(self, error: WebError) -> None:
        self._complaints.append(f"thrown: {error.error}")

    def _heard(self, message: ConsoleMessage) -> None:
        if message.type in ("error", "warning", "assert"):
            self._complaints.append(f"{message.text} ({message.location['url']})")
