"""Drives Firefox over WebDriver BiDi, the protocol that it speaks itself."""

from __future__ import annotations

import contextlib
import json
import subprocess
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from websockets.sync.client import ClientConnection, connect

from tests.browser.visit import Place
from tests.serve_process import free_port

_TIMEOUT_S = 60


class Firefox:
    """A headless Firefox with one window.

    On exit, asserts that there were no errors in the console, and no uncaught exceptions.
    """

    def __init__(self, program: str, profile: Path, size: tuple[int, int] = (1280, 900)) -> None:
        """Start it with an empty profile and a window of `size` pixels."""
        port = free_port()
        command = [program, "--headless", "--no-remote", "--profile", str(profile)]
        command += ["--remote-debugging-port", str(port)]
        with (profile / "log").open("wb") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log)
        self._opened = contextlib.ExitStack()
        self._socket = _connected(self._opened, f"ws://127.0.0.1:{port}/session")
        self._count = 0
        self._errors: list[str] = []
        self._send("session.new", capabilities={})
        self._send("session.subscribe", events=["log.entryAdded"])
        self._window = self._send("browsingContext.getTree")["contexts"][0]["context"]
        viewport = dict(zip(("width", "height"), size, strict=True))
        self._send("browsingContext.setViewport", context=self._window, viewport=viewport)

    def __enter__(self) -> Firefox:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._opened.close()
        self._process.terminate()
        self._process.wait(_TIMEOUT_S)
        if error is None:
            assert not self._errors, self._errors

    def open(self, url: str) -> None:
        """Open a page and wait until it is loaded."""
        self._send("browsingContext.navigate", context=self._window, url=url, wait="complete")

    def reload(self) -> None:
        """Reload the page and wait until it is loaded."""
        self._send("browsingContext.reload", context=self._window, wait="complete")

    def evaluate(self, script: str) -> Any:
        """Return the string, number or boolean that an expression has."""
        target = {"context": self._window}
        answer = self._send("script.evaluate", expression=script, target=target, awaitPromise=True)
        assert answer["type"] == "success", answer
        return answer["result"].get("value")

    def wait_until(self, script: str) -> None:
        """Wait until an expression is true."""
        end = time.monotonic() + _TIMEOUT_S
        while not self.evaluate(script):
            assert time.monotonic() < end, f"not within {_TIMEOUT_S} s: {script}"
            time.sleep(0.05)

    def click(self, selector: str) -> None:
        """Click the middle of an element with the mouse."""
        self.drag(selector, [(0.5, 0.5)])

    def drag(self, selector: str, places: list[Place]) -> None:
        """Press the mouse button on an element, move to the other places on it, and release it."""
        box = json.loads(
            self.evaluate(
                f"JSON.stringify(document.querySelector({selector!r}).getBoundingClientRect())"
            )
        )
        moves: list[dict[str, Any]] = [
            {
                "type": "pointerMove",
                "x": round(box["x"] + x * box["width"]),
                "y": round(box["y"] + y * box["height"]),
                "duration": 40,
            }
            for x, y in places
        ]
        down, up = ({"type": f"pointer{way}", "button": 0} for way in ("Down", "Up"))
        mouse = {"type": "pointer", "id": "mouse", "actions": [moves[0], down, *moves[1:], up]}
        self._send("input.performActions", context=self._window, actions=[mouse])

    def _send(self, method: str, **parameters: Any) -> Any:
        self._count += 1
        self._socket.send(json.dumps({"id": self._count, "method": method, "params": parameters}))
        while True:
            message = json.loads(self._socket.recv(_TIMEOUT_S))
            if message.get("id") == self._count:
                assert message["type"] == "success", message
                return message["result"]
            entry = message.get("params", {})
            if message.get("method") == "log.entryAdded" and entry["level"] == "error":
                self._errors.append(entry["text"])


def _connected(opened: contextlib.ExitStack, url: str) -> ClientConnection:
    end = time.monotonic() + _TIMEOUT_S
    while True:
        try:
            return opened.enter_context(connect(url, max_size=None))
        except OSError:
            assert time.monotonic() < end, "Firefox does not listen"
            time.sleep(0.1)
