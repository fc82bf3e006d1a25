"""Indexing while the page is open: its progress, lost connections, and folders that come and go."""

from __future__ import annotations

import contextlib
import itertools
import re
import socket
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from tests.browser.visit import Visit
from tests.serve_process import ServeProcess, free_port, serving
from tests.tiny import tiny_bundle, write_photos, write_tiny_manifest
from tests.tiny_gallery import index

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Route

#: Photos to index while the page is open: several batches of 32.
_MANY = 192
_POSTS = "performance.getEntriesByName(`${location.origin}/v1/indexing`).length"
_AS_A_HIDDEN_PAGE = """Object.defineProperty(document, "visibilityState", {
    get: () => window.isShown ? "visible" : "hidden",
})"""
_PROGRESS = re.compile(r"Indexing (\d+) of (\d+) photos")


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """Return a folder with `tiny`, and `photos` with subfolders `home` and `drive` in a gallery."""
    tiny_bundle(tmp_path / "tiny")
    write_photos(tmp_path / "photos" / "home", 4)
    for path in write_photos(tmp_path / "photos" / "drive", 3, seed=5):
        path.rename(path.with_stem(f"drive-{path.stem}"))
    roots = [tmp_path / "photos" / name for name in ("home", "drive")]
    for root in roots:
        index(tmp_path / "gallery.sbtk", root, tmp_path / "tiny")
    return tmp_path


@pytest.fixture
def slow_place(tmp_path: Path) -> Path:
    """Return a folder with a slow `tiny`, and `photos`, of which two are in a gallery."""
    make_slow(tiny_bundle(tmp_path / "tiny"))
    write_photos(tmp_path / "photos", 2, seed=5)
    index(tmp_path / "gallery.sbtk", tmp_path / "photos", tmp_path / "tiny")
    write_photos(tmp_path / "photos", _MANY + 2)
    return tmp_path


@contextlib.contextmanager
def served(place: Path, port: int | None = None) -> Iterator[ServeProcess]:
    options = ("--model", str(place / "tiny"), "--engine", "onnxruntime", "--threads", "1")
    with serving(place / "gallery.sbtk", *options, log=place / "log", port=port) as process:
        process.wait_until_ready()
        yield process


def test_the_progress_goes_on_after_a_lost_connection_and_a_restart(
    browser: Browser, slow_place: Path
) -> None:
    port = free_port()
    with Relay(port) as relay, Visit(browser, f"http://127.0.0.1:{relay.port}") as visit:
        progress = visit.page.locator("#indexing-text")
        with served(slow_place, port):
            visit.open()
            update_all(port)
            visit.look()
            before = indexed(visit)
            relay.cut()
            progress.filter(has_text="reconnecting to the server").wait_for()
            relay.resume()
            progress.filter(has_not_text="reconnecting").wait_for()
            assert before <= indexed(visit) < _MANY
        progress.filter(has_text="reconnecting to the server").wait_for()
        visit.wait_for_status("unreachable")
        with served(slow_place, port) as server:
            visit.page.get_by_text("The server was stopped before all photos were").wait_for()
            assert not visit.page.locator("#indexing").is_visible()
            visit.page.goto(f"{visit.origin}/collection")
            visit.page.get_by_role("button", name="Update all").click()
            assert indexed(visit) < _MANY
            server.process.kill()  # a stop would wait for batches of the slow engine
        visit.expect_message("ERR_")
        visit.allow_message("50[23]|Failed to fetch")


def test_progress_is_shown_whatever_a_slow_connection_still_delivers(
    browser: Browser, slow_place: Path
) -> None:
    port = free_port()
    with Relay(port) as relay, Visit(browser, f"http://127.0.0.1:{relay.port}") as visit:
        with served(slow_place, port) as server:
            # The page asks for events when nothing is indexed, and is told so after "Update all".
            relay.held = b"GET /v1/indexing/events"
            visit.page.goto(f"{visit.origin}/collection")
            visit.page.get_by_role("button", name="Update all").wait_for()
            assert relay.is_holding.wait(20)
            visit.page.get_by_role("button", name="Update all").click()
            visit.wait_until(f"() => {_POSTS} > 0")
            relay.release()
            assert indexed(visit) < _MANY
            server.process.kill()  # a stop would wait for batches of the slow engine
        visit.expect_message("ERR_")


def test_a_drive_is_unplugged_and_comes_back(browser: Browser, place: Path) -> None:
    drive, away = place / "photos" / "drive", place / "away"
    with served(place) as process, Visit(browser, process.origin) as visit:
        visit.open()
        assert visit.count() == 7
        settings = visit.context.new_page()
        settings.goto(f"{process.origin}/collection")
        row = settings.locator("#folders li").filter(has_text="drive")
        row.get_by_text("3 photos", exact=True).wait_for()
        names = {path.name for path in drive.iterdir()}

        # The open page says so of each photo, and goes on.
        drive.rename(away)
        visit.allow_message("404.*/(thumbnail|details)")
        visit.page.reload()
        visit.wait_until("() => document.querySelectorAll('#hits li.is-failed').length === 3")
        assert {*visit.page.locator("#hits li.is-failed .photo-name").all_inner_texts()} == names
        visit.page.locator("#hits li.is-failed a").first.click()
        visit.page.get_by_text("The file may have been moved or deleted.").wait_for()
        visit.page.keyboard.press("Escape")

        # After an update its photos are hidden, but not forgotten.
        settings.get_by_role("button", name="Update all").click()
        row.get_by_text("0 photos · 3 missing · not found: is a drive unplugged?").wait_for()
        settings.locator("#remarks").get_by_text(f"No photos were found in {drive}").wait_for()
        visit.look()
        visit.page.get_by_text("4 photos", exact=True).wait_for()
        visit.wait_until("() => document.querySelectorAll('#hits > li').length === 4")
        assert not names & {*visit.names()}

        away.rename(drive)
        settings.get_by_role("button", name=f"Update {drive}").click()
        row.get_by_text("3 photos", exact=True).wait_for()
        visit.look()
        visit.wait_until("() => document.querySelectorAll('#hits > li').length === 7")
        visit.wait_until("() => document.querySelectorAll('#hits li.is-failed').length === 0")


def test_a_hidden_page_keeps_no_connection(browser: Browser, place: Path) -> None:
    with served(place) as process, Visit(browser, process.origin) as visit:
        events: list[str] = []
        visit.context.on("request", lambda one: events.extend(re.findall("events$", one.url)))
        visit.context.add_init_script(_AS_A_HIDDEN_PAGE)
        visit.page.goto(f"{visit.origin}/collection")
        visit.page.locator("#folders li").first.wait_for()
        visit.page.get_by_role("button", name="Update all").click()
        visit.wait_until(f"() => {_POSTS} > 0")
        assert events == []
        visit.page.evaluate("window.isShown = true")
        visit.page.evaluate("document.dispatchEvent(new Event('visibilitychange'))")
        visit.page.get_by_text("7 photos searchable: nothing new").wait_for()
        assert events != []


def test_the_last_folder_is_removed(browser: Browser, place: Path) -> None:
    with served(place) as process, Visit(browser, process.origin) as visit:
        visit.open()
        settings = visit.context.new_page()
        settings.goto(f"{process.origin}/collection")
        for name in ("home", "drive"):
            folder = place / "photos" / name
            settings.get_by_role("button", name=f"Remove {folder}").click()
            settings.get_by_role("dialog").get_by_role("button", name="Remove").click()
            settings.locator("#folders li").filter(has_text=name).wait_for(state="detached")
        settings.get_by_text("0 photos searchable").wait_for()
        assert not settings.get_by_role("button", name="Update all").is_visible()
        visit.look()
        visit.page.get_by_role("heading", name="This gallery has no photos yet").wait_for()
        assert visit.count() == 0
        assert len(list((place / "photos").rglob("*.*"))) == 7
        # The description of the gallery may be older than its list of photos.
        visit.context.route("**/v1/gallery", late)
        settings.get_by_label("Add a folder").fill(str(place / "photos" / "drive"))
        settings.get_by_role("button", name="Add", exact=True).click()
        settings.locator("#folders li").filter(has_text="3 photos").wait_for()
        visit.look()
        visit.wait_until("() => document.querySelectorAll('#hits > li').length === 3")


def late(route: Route) -> None:
    time.sleep(0.5)
    route.continue_()


def update_all(port: int) -> None:
    request = urllib.request.Request(f"http://127.0.0.1:{port}/v1/indexing", method="POST")
    with urllib.request.urlopen(request, timeout=20) as response:
        assert response.status == 202


def indexed(visit: Visit) -> int:
    """Wait for the progress in photos, and return the number that are done."""
    text = visit.page.locator("#indexing-text").filter(has_text=_PROGRESS).text_content()
    found = _PROGRESS.search(text or "")
    assert found is not None, text
    return int(found[1])


def make_slow(bundle: Path) -> None:
    """Add products of matrices to a bundle's model, so that a batch takes about a second here."""
    matrix = np.ones((800, 800), np.float32)
    begun = time.perf_counter()
    for _ in range(3):
        matrix @ matrix
    count = max(2, round(3 / (time.perf_counter() - begun)))
    model = onnx.load(bundle / "model.int8.onnx")
    graph = model.graph
    graph.initializer.append(numpy_helper.from_array(np.array(matrix.shape), "sides"))
    graph.initializer.append(numpy_helper.from_array(np.zeros((), np.float32), "nought"))
    names = [f"product-{index}" for index in range(count + 1)]
    # They depend on the images, or they would be computed once, when the model loads.
    nodes = [
        helper.make_node("ReduceMax", ["feature"], ["most"], keepdims=0),
        helper.make_node("Mul", ["most", "nought"], ["zero"]),
        helper.make_node("Expand", ["zero", "sides"], names[:1]),
        *(
            helper.make_node("MatMul", [before, names[0]], [after])
            for before, after in itertools.pairwise(names)
        ),
        helper.make_node("ReduceMax", names[-1:], ["nothing"], keepdims=0),
        helper.make_node("Add", ["feature", "nothing"], ["late feature"]),
    ]
    norm = graph.node.pop()
    norm.input[0] = "late feature"
    graph.node.extend([*nodes, norm])
    for precision in ("fp32", "int8"):
        (bundle / f"model.{precision}.onnx").write_bytes(model.SerializeToString())
    write_tiny_manifest(bundle)


class Relay:
    """Forwards connections to a port of this machine, until they are cut."""

    def __init__(self, target: int) -> None:
        self._target = target
        #: Answers to requests that begin so are held back until they are released.
        self.held = b""
        self.is_holding = threading.Event()
        self._gates: list[threading.Event] = []
        self._is_cut = False
        self._sockets: list[socket.socket] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])

    def __enter__(self) -> Relay:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.cut()
        self._listener.close()

    def cut(self) -> None:
        """End all connections, and accept no others."""
        self._is_cut = True
        self.release()
        for one in self._sockets:
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)

    def release(self) -> None:
        """Deliver what was held back, and hold back nothing more."""
        self.held = b""
        for gate in self._gates:
            gate.set()

    def resume(self) -> None:
        """Accept connections again."""
        self._sockets.clear()
        self._is_cut = False

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                threading.Thread(target=self._forward, args=(client,), daemon=True).start()

    def _forward(self, client: socket.socket) -> None:
        with client, contextlib.suppress(OSError):
            if self._is_cut:
                return
            with socket.create_connection(("127.0.0.1", self._target)) as server:
                self._sockets += [client, server]
                gate = threading.Event()
                gate.set()
                back = threading.Thread(target=_pump, args=(server, client, gate), daemon=True)
                back.start()
                for data in _received(client):
                    if self.held and data.startswith(self.held):
                        self._gates.append(gate)
                        gate.clear()
                        self.is_holding.set()
                    server.sendall(data)
                _shut(server)
                back.join()


def _pump(source: socket.socket, sink: socket.socket, gate: threading.Event) -> None:
    with contextlib.suppress(OSError):
        for data in _received(source):
            gate.wait()
            sink.sendall(data)
    _shut(sink)


def _received(source: socket.socket) -> Iterator[bytes]:
    return iter(lambda: source.recv(1 << 16), b"")


def _shut(sink: socket.socket) -> None:
    with contextlib.suppress(OSError):
        sink.shutdown(socket.SHUT_WR)
