"""The page while the server starts, stops, restarts, or the gallery changes."""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from sbtk_runtime.bundle import Bundle
from sbtk_runtime.gallery.catalogue import Origin
from sbtk_runtime.gallery.folder import VECTORS_NAME
from sbtk_runtime.gallery.publish import update_graph
from sbtk_runtime.gallery.rows import Vectors
from sbtk_runtime.gallery.writer import Catalogue
from sbtk_runtime.manifest import GalleryManifest
from tests.browser.visit import DOOR, ROOF, Visit, violations
from tests.serve_process import ServeProcess, serving
from tests.tiny import tiny_bundle, tiny_photo, write_photos, write_tiny_manifest
from tests.tiny_gallery import index

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Route

#: Markup, bytes that are not UTF-8, a right-to-left override, a line break, a URL, and the longest
#: name that file systems allow.
ODD_NAMES = (
    b"<img src=x onerror='document.title=1'>.png",
    b"caf\xe9.png",
    "\u202egnp.png".encode(),
    b'two\nlines, a "quote" & more.png',
    b"%2e..%2f#photo=1?as=photo.png",
    b"x" * 251 + b".png",
)
FLOWER_SKETCH = Path(__file__).parents[2] / "demo" / "sketches" / "flower.png"
#: One emoji of several characters.
FAMILY = "\N{MAN}\u200d\N{WOMAN}\u200d\N{GIRL}.png"


# Storage of a tab that is full but for 100 characters.
_FILL_STORAGE = """() => {
    let free = "x".repeat(1 << 24);
    for (let i = 0; free.length > 0; ) {
        try {
            sessionStorage.setItem(`other-${i}`, free);
            i += 1;
        } catch {
            free = free.slice(0, free.length >> 1);
        }
    }
    sessionStorage.setItem("other-0", sessionStorage.getItem("other-0").slice(100));
}"""
# Firefox restores form fields on reload, while it parses the page.
_AS_FIREFOX_RELOADS = """{
    const observer = new MutationObserver(() => {
        const radio = document.querySelector("input[value='photo']");
        if (radio !== null) radio.checked = true;
        if (radio !== null) observer.disconnect();
    });
    observer.observe(document, { childList: true, subtree: true });
}"""


# Phones end pages that are hidden, without further events.
_AS_A_PHONE = """{
    Object.defineProperty(document, "visibilityState", {
        get: () => window.isHidden ? "hidden" : "visible",
    });
    window.addEventListener("pagehide", (event) => event.stopImmediatePropagation(), true);
}"""


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """Return a folder with `tiny`, `photos` and `gallery.sbtk` of them."""
    tiny_bundle(tmp_path / "tiny")
    write_photos(tmp_path / "photos", 6)
    index(tmp_path / "gallery.sbtk", tmp_path / "photos", tmp_path / "tiny")
    return tmp_path


@contextlib.contextmanager
def _visiting(browser: Browser, place: Path) -> Iterator[tuple[ServeProcess, Visit]]:
    """Serve the gallery of `place`, and open its page."""
    options = ("--model", str(place / "tiny"))
    with serving(place / "gallery.sbtk", *options, log=place / "log") as served:
        served.wait_until_ready()
        with Visit(browser, served.origin) as visit:
            visit.open()
            yield served, visit


def test_a_sketch_drawn_while_the_engine_loads_is_searched_afterwards(
    browser: Browser, place: Path
) -> None:
    _make_slow_to_load(place / "tiny")
    options = ("--model", str(place / "tiny"), "--engine", "onnxruntime", "--threads", "1")
    with (
        serving(place / "gallery.sbtk", *options, log=place / "log") as served,
        Visit(browser, served.origin) as visit,
    ):
        visit.open(status="loading")
        visit.page.get_by_role("heading", name="The engine is starting").wait_for()
        with visit.new_hits():
            visit.stroke(ROOF)
            visit.wait_for_status("ok")
        assert len(visit.ids()) == 6
        visit.expect_message("503")


def test_a_restarted_server_loses_no_stroke(browser: Browser, place: Path) -> None:
    options: dict[str, Any] = {"log": place / "log"}
    with serving(place / "gallery.sbtk", "--model", str(place / "tiny"), **options) as served:
        served.wait_until_ready()
        with Visit(browser, served.origin) as visit:
            visit.open()
            assert served.stop() == 0
            visit.stroke(ROOF)
            visit.wait_for_status("unreachable")
            visit.page.get_by_role("heading", name="Cannot reach the server").wait_for()
            command = visit.page.locator("#empty-state code").inner_text()
            gallery, port = place / "gallery.sbtk", served.port
            assert command.startswith(f"sbtk serve --gallery {gallery} --port {port} --model ")
            options["port"] = served.port
            with (
                visit.new_hits(),
                serving(place / "gallery.sbtk", "--model", str(place / "tiny"), **options),
            ):
                visit.wait_for_status("ok")
                visit.page.wait_for_selector("#hits > li")
            assert len(visit.ids()) == 6
            assert visit.ink() > 500
            visit.expect_message("ERR_")
            # A server that is stopping responds with 503.
            visit.allow_message("503")


def test_a_new_generation_of_the_gallery_is_used(browser: Browser, place: Path) -> None:
    with _visiting(browser, place) as (_, visit):
        with visit.new_hits():
            visit.stroke(ROOF)
        before = visit.ids()
        write_photos(place / "photos" / "more", 4, seed=9)
        # Its thumbnail may be requested until the folder is indexed again.
        (place / "photos" / visit.names()[0]).unlink()
        visit.allow_message("404.*/thumbnail")
        index(place / "gallery.sbtk", place / "photos", place / "tiny")
        for x in np.linspace(0.3, 0.7, 20):
            with visit.new_hits():
                visit.stroke(((x, 0.3), (x, 0.4)), steps=1)
            # A response belongs to one generation, the old or the new one.
            assert sorted(visit.ids()) == sorted(before) or before[0] not in visit.ids()
            if len(visit.ids()) == 9:
                break
        assert set(before[1:]) < set(visit.ids())
        visit.page.get_by_text("9 photos", exact=True).wait_for()


def test_a_removed_folder_is_deselected(browser: Browser, place: Path) -> None:
    write_photos(place / "photos" / "more", 4, seed=9)
    index(place / "gallery.sbtk", place / "photos", place / "tiny")
    with _visiting(browser, place) as (_, visit):
        with visit.new_hits():
            visit.stroke(ROOF)
        folder = visit.page.get_by_label("Folder")
        with visit.new_hits():
            folder.select_option(str(place / "photos" / "more"))
        assert len(visit.ids()) == 4
        visit.allow_message("404.*/thumbnail")
        shutil.rmtree(place / "photos" / "more")
        index(place / "gallery.sbtk", place / "photos", place / "tiny")
        with visit.new_hits():
            # Makes the page check the server.
            visit.look()
            visit.page.get_by_text("6 photos", exact=True).wait_for()
            visit.wait_until("() => document.querySelectorAll('#hits > li').length === 6")
        assert folder.input_value() == ""


def test_an_unreadable_generation_is_reported(browser: Browser, place: Path) -> None:
    with _visiting(browser, place) as (served, visit):
        with visit.new_hits():
            visit.stroke(ROOF)
        whole = (place / "gallery.sbtk" / "manifest.json").read_bytes()
        (place / "gallery.sbtk" / "manifest.json").write_bytes(whole[:40])
        while served.health()[1]["problem"] is None:
            visit.page.wait_for_timeout(50)
        visit.look()
        visit.page.get_by_role("heading", name="manifest.json").wait_for()
        # The previous generation is still served.
        with visit.new_hits():
            visit.stroke(((0.3, 0.3), (0.6, 0.4)))
        assert len(visit.ids()) == 6
        (place / "gallery.sbtk" / "manifest.json").write_bytes(whole)
        visit.page.locator("#empty-state").wait_for(state="hidden")


def test_a_late_status_does_not_replace_a_newer_one(visit: Visit) -> None:
    held: list[Route] = []

    def hold_the_first(route: Route) -> None:
        if held:
            route.continue_()
        else:
            held.append(route)

    visit.context.route("**/healthz", hold_the_first)
    for _ in range(2):
        with visit.page.expect_request("**/healthz"):
            visit.look()
    visit.page.wait_for_timeout(300)
    # As a proxy answers for a server that is gone. Firefox does not tell why a request was aborted.
    held[0].fulfill(status=503)
    visit.expect_message("503")
    visit.page.wait_for_timeout(100)
    assert visit.page.locator("#server-status").get_attribute("data-status") == "ok"


def test_a_sketch_survives_a_reload(browser: Browser, place: Path) -> None:
    with _visiting(browser, place) as (_, visit):
        with visit.new_hits():
            visit.stroke(ROOF)
        before = visit.ink()
        visit.page.reload()
        visit.page.wait_for_selector("#hits > li")
        assert len(visit.ids()) == 6
        assert visit.ink() == pytest.approx(before, rel=0.02)
        # The page requests no more hits than there are photos.
        assert visit.page.locator("#notices").text_content() == ""
        visit.page.get_by_role("button", name="Undo").click()
        visit.wait_for_recent()
        assert visit.ink() == 0


@pytest.mark.parametrize("is_traced", [False, True])
def test_an_image_and_the_strokes_over_it_survive_a_reload(visit: Visit, is_traced: bool) -> None:
    visit.context.add_init_script(_AS_A_PHONE)
    visit.open()
    with visit.new_hits(), visit.page.expect_file_chooser() as chosen:
        visit.page.get_by_role("button", name="Open image").click()
        chosen.value.set_files(FLOWER_SKETCH)
    if is_traced:
        visit.page.get_by_role("button", name="Trace").click()
        visit.wait_for_recent()
    with visit.new_hits():
        visit.stroke(ROOF)
    before, ink = visit.ids(), visit.ink()
    visit.page.evaluate("window.isHidden = true")
    visit.page.evaluate("document.dispatchEvent(new Event('visibilitychange'))")
    visit.page.reload()
    visit.page.wait_for_selector('#results[data-shown="sketch"][aria-busy="false"]')
    assert visit.ids() == before
    assert visit.ink() == pytest.approx(ink, rel=0.02)
    trace = visit.page.get_by_role("button", name="Trace")
    assert trace.get_attribute("aria-pressed") == str(is_traced).lower()
    with visit.new_hits(are_recent=is_traced):
        visit.page.get_by_role("button", name="Undo").click()
    assert visit.page.locator("#traced-layer").is_visible() == is_traced


def test_a_large_image_survives_a_reload(visit: Visit, tmp_path: Path) -> None:
    # A drawing on paper, photographed: its grain makes a PNG larger than what browsers store.
    paper = np.random.default_rng(5).integers(200, 248, (1024, 1024, 3), dtype=np.uint8)
    paper[300:340, 200:800] = 30
    Image.fromarray(paper).save(tmp_path / "paper.png")
    assert (tmp_path / "paper.png").stat().st_size > 2_000_000
    with visit.new_hits(), visit.page.expect_file_chooser() as chosen:
        visit.page.get_by_role("button", name="Open image").click()
        chosen.value.set_files(tmp_path / "paper.png")
    ink = visit.ink()
    visit.page.reload()
    visit.page.wait_for_selector('#results[data-shown="sketch"][aria-busy="false"]')
    assert visit.ink() == pytest.approx(ink, rel=0.05)
    assert "too large" not in visit.page.locator("body").inner_text()


def test_a_sketch_that_storage_has_no_room_for_is_reported_as_lost(visit: Visit) -> None:
    with visit.new_hits():
        visit.stroke(ROOF)
    visit.page.evaluate(_FILL_STORAGE)
    visit.page.reload()
    visit.page.get_by_text("too large to keep").wait_for()
    assert visit.ink() == 0


def test_restored_radio_buttons_are_reset(browser: Browser, server: ServeProcess) -> None:
    with Visit(browser, server.origin) as visit:
        visit.context.add_init_script(_AS_FIREFOX_RELOADS)
        visit.open()
        assert visit.page.get_by_role("radio", name="Sketch").is_checked()
        with visit.new_hits():
            visit.stroke(ROOF)
        assert "as=sketch" in visit.queries[-1].url


def test_a_missing_photo_shows_an_error_on_its_card(browser: Browser, place: Path) -> None:
    options = ("--model", str(place / "tiny"))
    with serving(place / "gallery.sbtk", *options, log=place / "log") as served:
        served.wait_until_ready()
        shutil.move(place / "photos" / "photo-0002.jpg", place / "elsewhere.jpg")
        (place / "photos" / "photo-0002.jpg").symlink_to(place / "elsewhere.jpg")
        with Visit(browser, served.origin) as visit:
            visit.open()
            with visit.new_hits():
                visit.stroke(ROOF)
            missing = visit.page.get_by_role("link", name="photo-0002.jpg")
            missing.get_by_text("Cannot display this photo").wait_for()
            assert len(visit.ids()) == 6
            assert visit.page.locator("#hits li.is-failed").count() == 1
            visit.expect_message("404")
            # The next search loads the thumbnail again.
            shutil.move(place / "elsewhere.jpg", place / "photos" / "photo-0002.jpg")
            visit.page.get_by_role("button", name="Clear").click()
            visit.wait_for_recent()
            with visit.new_hits():
                visit.page.get_by_role("button", name="Undo").click()
            missing.get_by_text("Cannot display this photo").wait_for(state="hidden")


def test_file_names_are_shown_as_text(browser: Browser, place: Path) -> None:
    for seed, odd in enumerate((*ODD_NAMES, FAMILY.encode())):
        tiny_photo(500 + seed).save(place / "photos" / os.fsdecode(odd), "PNG")
    index(place / "gallery.sbtk", place / "photos", place / "tiny")
    with _visiting(browser, place) as (_, visit):
        with visit.new_hits():
            visit.stroke(ROOF)
        names = visit.names()
        assert len(names) == 13
        assert ODD_NAMES[0].decode() in names
        assert FAMILY in names
        assert r'two\x0alines, a "quote" & more.png' in names
        assert not any("\u202e" in name for name in names)
        assert visit.fits()
        for name in names:
            visit.page.locator("#hits li a").nth(names.index(name)).click()
            visit.page.get_by_role("dialog", name=name, exact=True).wait_for()
            visit.wait_until("() => document.getElementById('viewer-image').naturalWidth > 0")
            visit.page.keyboard.press("Escape")
            visit.page.locator("dialog[open]").wait_for(state="detached")
        assert visit.page.title() == "sbtk: search photos by sketch"


def test_an_empty_gallery_shows_the_command_to_index(browser: Browser, tmp_path: Path) -> None:
    bundle = tiny_bundle(tmp_path / "tiny")
    _empty_gallery(tmp_path / "gallery.sbtk", bundle)
    options = ("--model", str(bundle))
    with serving(tmp_path / "gallery.sbtk", *options, log=tmp_path / "log") as served:
        served.wait_until_ready()
        with Visit(browser, served.origin) as visit:
            visit.open()
            visit.page.get_by_role("heading", name="This gallery has no photos yet").wait_for()
            assert visit.page.get_by_text(
                f"sbtk index PHOTOS --gallery {tmp_path / 'gallery.sbtk'}", exact=True
            ).is_visible()
            visit.stroke(ROOF)
            assert visit.ids() == []
            visit.page.get_by_role("link", name="Add a folder").click()
            visit.page.get_by_label("Add a folder").wait_for()


@pytest.mark.firefox
def test_a_token_signs_in_from_the_form_or_the_url(browser: Browser, place: Path) -> None:
    options = ("--model", str(place / "tiny"), "--token", "a-token-of-ours")
    with serving(place / "gallery.sbtk", *options, log=place / "log") as served:
        with Visit(browser, served.origin) as visit:
            answer = visit.page.goto(served.origin)
            assert answer is not None and answer.status == 401
            assert violations(visit) == []
            visit.page.get_by_label("Token").fill("another-token")
            visit.page.get_by_role("button", name="Sign in").click()
            wrong = visit.page.get_by_text("The token is wrong.")
            wrong.wait_for()
            for scheme in ("light", "dark"):
                visit.use_scheme(scheme)
                assert _is_red(wrong.evaluate("element => getComputedStyle(element).color"))
                assert violations(visit) == []
            visit.page.get_by_label("Token").fill("a-token-of-ours")
            visit.page.keyboard.press("Enter")
            visit.wait_for_status("ok")
            assert visit.page.url == f"{served.origin}/"
            visit.expect_message("401")
        with Visit(browser, served.origin) as visit:
            visit.open("/?token=a-token-of-ours")
            assert visit.page.url == f"{served.origin}/"
            with visit.new_hits():
                visit.stroke(ROOF)
            assert len(visit.ids()) == 6
            assert visit.page.evaluate("document.cookie") == ""


def test_another_token_is_asked_for_and_the_sketch_is_kept(browser: Browser, place: Path) -> None:
    gallery, options = place / "gallery.sbtk", ("--model", str(place / "tiny"))
    with serving(gallery, "--token", "first-token-1", *options, log=place / "log") as first:
        first.wait_until_ready()
        with Visit(browser, first.origin) as visit:
            visit.open("/?token=first-token-1")
            visit.stroke(ROOF)
            ink = visit.ink()
            first.stop()
            with serving(
                gallery, "--token", "second-token-2", *options, log=place / "log2", port=first.port
            ) as second:
                second.wait_until_ready()
                field = visit.page.get_by_label("Token")
                field.fill("second-token-2")
                field.press("Enter")
                with visit.new_hits():
                    visit.wait_for_status("ok")
                assert visit.ink() == ink
            visit.expect_message("401")
            visit.allow_message("ERR_|Failed to fetch")


def test_two_windows_have_sketches_of_their_own(visit: Visit) -> None:
    with visit.new_hits():
        visit.stroke(ROOF)
    first = visit.page
    ink, hits = visit.ink(), visit.ids()
    # As a link opened in a new window, which starts with a copy of the session.
    with visit.context.expect_page() as opened:
        first.evaluate("window.open(location.href)")
    visit.page = opened.value
    visit.wait_for_status("ok")
    with visit.new_hits():
        visit.stroke(DOOR)
    assert visit.ink() != ink
    visit.page.reload()
    visit.wait_for_status("ok")
    visit.page = first
    visit.page.reload()
    visit.wait_for_status("ok")
    visit.wait_until("() => document.getElementById('results').dataset.shown === 'sketch'")
    assert visit.ink() == ink
    assert visit.ids() == hits


def test_a_phone_that_was_asleep_shows_what_has_changed(browser: Browser, place: Path) -> None:
    with (
        serving(
            place / "gallery.sbtk", "--model", str(place / "tiny"), log=place / "log"
        ) as served,
        Visit(browser, served.origin, viewport={"width": 390, "height": 844}) as visit,
    ):
        visit.open()
        visit.context.set_offline(True)
        visit.stroke(ROOF)
        visit.wait_for_status("unreachable")
        write_photos(place / "photos" / "later", 3, seed=77)
        index(place / "gallery.sbtk", place / "photos", place / "tiny")
        with visit.new_hits():
            visit.context.set_offline(False)
            visit.wait_for_status("ok")
        visit.page.get_by_role("button", name="photos").click()
        visit.page.locator("#info-photos").filter(has_text="9").wait_for()
        visit.expect_message("ERR_")


def test_the_page_opens_while_the_server_is_stopped(browser: Browser, place: Path) -> None:
    options: dict[str, Any] = {"log": place / "log"}
    shutil.copytree(place / "gallery.sbtk", place / "other.sbtk")
    several = ("--model", str(place / "tiny"), "--gallery", str(place / "other.sbtk"))
    with serving(place / "gallery.sbtk", *several, **options) as served:
        served.wait_until_ready()
        with Visit(browser, served.origin, service_workers="allow") as visit:
            visit.open()
            manifest = visit.page.locator("link[rel=manifest]").get_attribute("href")
            content = visit.context.request.get(f"{served.origin}/{manifest}").json()
            for icon in content["icons"]:
                url = f"{served.origin}/static/{icon['src']}"
                assert visit.context.request.get(url).headers["content-type"] == icon["type"]
            cached = """async () => {
                const cache = await caches.open("sbtk-page");
                const urls = (await cache.keys()).map(({ url }) => new URL(url).pathname);
                const expected = ["/", "/static/main.js", "/static/page.css"];
                return expected.every((url) => urls.includes(url));
            }"""
            visit.wait_until(cached)
            visit.page.goto(f"{served.origin}/collection")
            visit.page.get_by_text("photos searchable").wait_for()
            visit.open("/g/other/")
            visit.wait_until(cached.replace('"/"', '"/g/other/"').replace("/s", "/g/other/s"))
            assert served.stop() == 0
            # Firefox sometimes asks for an icon, which is not kept.
            visit.allow_message("ServiceWorker passed an Error Response")
            visit.page.goto(f"{served.origin}/collection")
            visit.page.get_by_role("heading", name="Folders", exact=True).wait_for()
            visit.page.goto(f"{served.origin}/g/other/")
            visit.page.get_by_role("heading", name="Cannot reach the server").wait_for()
            visit.page.goto(served.origin)
            visit.page.get_by_role("heading", name="Cannot reach the server").wait_for()
            visit.stroke(ROOF)
            assert visit.ink() > 500
            kept = "caches.open('sbtk-page').then(cache => cache.keys())"
            urls = visit.page.evaluate(f"{kept}.then(keys => keys.map(({{ url }}) => url))")
            assert not [url for url in urls if "/v1/" in url or "?" in url]
            options["port"] = served.port
            with (
                visit.new_hits(),
                serving(place / "gallery.sbtk", "--model", str(place / "tiny"), **options),
            ):
                visit.wait_for_status("ok")
            visit.expect_message("ERR_|Failed to fetch|service-worker")
            visit.allow_message("503")


@pytest.mark.chromium_only("Playwright cannot limit its storage")
def test_the_page_opens_while_the_browser_has_no_room(browser: Browser, place: Path) -> None:
    options = ("--model", str(place / "tiny"))
    with serving(place / "gallery.sbtk", *options, log=place / "log") as served:
        served.wait_until_ready()
        with Visit(browser, served.origin, service_workers="allow") as visit:
            session = visit.context.new_cdp_session(visit.page)
            limit = {"origin": served.origin, "quotaSize": 1}
            session.send("Storage.overrideQuotaForOrigin", limit)
            visit.open()
            visit.wait_until("() => navigator.serviceWorker.controller !== null")
            assert visit.page.evaluate(
                "caches.open('sbtk-page').then(cache => cache.put('/x', new Response('x')))"
                ".then(() => 'kept', error => error.name)"
            ).startswith("QuotaExceeded")
            visit.open()
            visit.page.goto(f"{served.origin}/collection")
            visit.page.get_by_text("photos searchable").wait_for()


def _is_red(colour: str) -> bool:
    """Return whether a colour, such as `rgb(160, 20, 20)`, is mostly red."""
    red, green, blue = (float(value) for value in re.findall(r"[\d.]+", colour)[:3])
    return red > 60 + max(green, blue)


def _make_slow_to_load(bundle: Path) -> None:
    """Add large constant products to a bundle's model, which are computed when it loads."""
    manifest = Bundle.open(bundle).manifest
    model = onnx.load(bundle / "model.int8.onnx")
    graph = model.graph
    graph.initializer.append(numpy_helper.from_array(np.array([1500, 1500]), "sides"))
    graph.initializer.append(numpy_helper.from_array(np.zeros((), np.float32), "nought"))
    small = helper.make_tensor("small", TensorProto.FLOAT, [1], [1e-3])
    names = [f"product-{index}" for index in range(90)]
    late = [helper.make_node("ConstantOfShape", ["sides"], names[:1], value=small)]
    late += [
        helper.make_node("MatMul", [before, names[0]], [after])
        for before, after in itertools.pairwise(names)
    ]
    late.append(helper.make_node("ReduceMin", names[-1:], ["least"], keepdims=0))
    late.append(helper.make_node("Mul", ["least", "nought"], ["nothing"]))
    late.append(helper.make_node("Add", ["feature", "nothing"], ["late feature"]))
    norm = graph.node.pop()
    norm.input[0] = "late feature"
    graph.node.extend([*late, norm])
    for precision in ("fp32", "int8"):
        (bundle / f"model.{precision}.onnx").write_bytes(model.SerializeToString())
    slow = write_tiny_manifest(bundle, dim=manifest.dim, name=manifest.name)
    replace(slow, model_id=manifest.model_id).write(bundle)


def _empty_gallery(folder: Path, bundle_folder: Path) -> None:
    """Write a gallery without photos."""
    folder.mkdir()
    bundle = Bundle.open(bundle_folder).manifest
    with Catalogue(folder, 1) as catalogue:
        catalogue.claim(Origin(bundle.model_id, "int8", bundle.dim, bundle.preprocessing))
        vectors = Vectors(folder / VECTORS_NAME, bundle.dim)
        catalogue.commit([], [], vectors.append(0, np.zeros((0, bundle.dim), np.float32)))
        graph = update_graph(folder, catalogue, vectors, None, lambda text: None)
    GalleryManifest(
        generation=1,
        model_id=bundle.model_id,
        precision="int8",
        dim=bundle.dim,
        preprocessing=bundle.preprocessing,
        live=0,
        graph=graph,
    ).write(folder)
