"""The results: cards, viewer, similar photos, folder filter."""

from __future__ import annotations

import datetime
import json
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import parse_qs, urlsplit

import pytest
from PIL import Image

from sbtk_runtime.embedding.embedder import Embedder
from sbtk_runtime.gallery.update import update_gallery
from tests.browser.conftest import GENERATED
from tests.browser.visit import DOOR, NO_TOUCH, ROOF, Visit, violations
from tests.serve_client import ask
from tests.serve_process import ServeProcess, serving
from tests.tiny import tiny_bundle, write_photos
from tests.tiny_gallery import index

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Locator

ALL_PHOTOS = GENERATED + 3
_SCROLL = """() => new Promise((resolve) => {
    scrollBy({ top: innerHeight * 0.8, behavior: "instant" });
    requestAnimationFrame(() => requestAnimationFrame(resolve));
})"""

_COPIED_SIZE = """async () => {
    const [item] = await navigator.clipboard.read();
    const { width, height } = await createImageBitmap(await item.getType("image/png"));
    return [width, height];
}"""

# The model decides which matches are weak, so the ratings of the responses are replaced.
_RATE_HITS = """() => {
    const plain = window.fetch;
    window.fetch = async (address, options) => {
        const response = await plain(address, options);
        if (!address.startsWith("v1/query")) return response;
        const { no_close_match, ...content } = await response.json();
        const hits = content.hits.map(({ match, ...hit }) => hit);
        if (window.good === null) return Response.json({ ...content, hits });
        for (const hit of hits) hit.match = window.good.includes(hit.rank) ? "good" : "weak";
        return Response.json({ ...content, hits, no_close_match: window.good.length === 0 });
    };
}"""


@pytest.fixture
def found(visit: Visit) -> Visit:
    """Return the page with a sketch and its hits."""
    with visit.new_hits():
        visit.stroke(ROOF)
    return visit


def test_scrolling_loads_every_photo_once(found: Visit) -> None:
    shown = _scroll_to_end(found)
    assert len(shown) == ALL_PHOTOS
    assert list(shown) == list(range(1, ALL_PHOTOS + 1))
    assert len(set(shown.values())) == ALL_PHOTOS
    assert not found.page.get_by_role("button", name="Show more").is_visible()


@pytest.mark.firefox
def test_the_viewer_shows_a_photo_and_copies_its_path(found: Visit, photos: Path) -> None:
    found.allow_clipboard()
    name = found.names()[2]
    _card(found, 2).click()
    dialog = found.page.get_by_role("dialog", name=name)
    path = str(next(photos.rglob(name)))
    assert dialog.locator("code").text_content() == path
    found.wait_until("() => document.getElementById('viewer-image').naturalWidth > 80")
    dialog.get_by_role("button", name="Copy path").click()
    # In the dialog, because it covers the page.
    dialog.get_by_role("status").filter(has_text="Path copied.").wait_for()
    assert found.page.evaluate("navigator.clipboard.readText()") == path
    dialog.get_by_role("button", name="Copy image").click()
    with Image.open(path) as image:
        width, height = image.size
    said = re.compile(f"Image copied: {width} . {height} pixels")
    dialog.get_by_role("status").filter(has_text=said).wait_for()
    if not found.is_firefox:  # without a window, its clipboard gives no images back
        assert found.page.evaluate(_COPIED_SIZE) == [width, height]
    dialog.get_by_role("button", name="Next photo").click()
    found.page.get_by_role("dialog", name=found.names()[3]).wait_for()
    found.go(-1)
    found.page.locator("dialog[open]").wait_for(state="detached")
    assert found.names()[2] == name


def test_the_viewer_steps_by_buttons_and_keys(found: Visit) -> None:
    first, second = found.names()[:2]
    _card(found, 1).click()
    found.page.get_by_role("dialog", name=second).get_by_role(
        "button", name="Previous photo"
    ).click()
    dialog = found.page.get_by_role("dialog", name=first)
    dialog.get_by_role("button", name="Previous photo").wait_for(state="hidden")
    # The pressed button is hidden; the keys still work.
    found.page.keyboard.press("ArrowRight")
    found.page.get_by_role("dialog", name=second).wait_for()
    found.page.keyboard.press("ArrowLeft")
    dialog.wait_for()
    found.page.keyboard.press("Escape")
    found.wait_until("() => location.hash === ''")
    assert not found.page.locator("dialog[open]").count()


def test_a_photo_opens_again_after_the_browser_closed_it(found: Visit) -> None:
    name = found.names()[0]
    for _ in range(2):
        _card(found, 0).click()
        found.page.get_by_role("dialog", name=name).wait_for()
        # As on a second Escape, which fires no "cancel" event.
        found.page.evaluate("document.getElementById('viewer').close()")
        found.wait_until("() => location.hash === ''")
    assert found.page.evaluate("location.href") == f"{found.origin}/"


def test_open_file_serves_the_original_file(found: Visit, photos: Path) -> None:
    name = found.names()[0]
    _card(found, 0).click()
    address = found.page.get_by_role("link", name="Open file").get_attribute("href")
    answer = found.context.request.get(f"{found.origin}/{address}")
    assert answer.body() == next(photos.rglob(name)).read_bytes()
    assert answer.headers["x-content-type-options"] == "nosniff"


def test_more_like_this_shows_similar_photos(found: Visit) -> None:
    before, name = found.ids(), found.names()[0]
    _card(found, 0).click()
    with found.new_hits():
        found.page.get_by_role("button", name="More like this", exact=True).click()
    assert not found.page.locator("dialog[open]").count()
    assert f"/v1/photos/{before[0]}/similar" in found.queries[-1].url
    alike = found.ids()
    assert before[0] not in alike
    assert found.count() == 24
    assert found.page.locator("#likes").inner_text().split("\n") == ["Similar to", name]
    with found.new_hits():
        found.page.get_by_role("button", name="Back to the sketch").click()
    assert found.ids() == before


def test_feedback_is_shown_as_chips_that_can_be_removed(found: Visit) -> None:
    before = found.ids()
    for position, name in ((0, "More like this"), (2, "Less like this"), (1, "More like this")):
        _card(found, position).click()
        with found.new_hits():
            found.page.get_by_role("button", name=name, exact=True).click()
    assert "/v1/similar?like=" in found.queries[-1].url
    assert "unlike=" in found.queries[-1].url
    assert found.page.locator("#likes li").count() == 2
    assert found.page.locator("#unlikes li").count() == 1
    judged = set(found.page.url.partition("#")[2].replace("&unlike", "").split("=")[1].split(","))
    assert not judged & set(map(str, found.ids()))
    assert violations(found) == []
    with found.new_hits():
        found.page.locator("#unlikes").get_by_role("button").click()
    assert found.page.locator("#unlikes").is_hidden()
    with found.new_hits():
        found.page.get_by_role("button", name="Back to the sketch").click()
    assert found.ids() == before


def test_a_photo_is_zoomed_and_its_details_are_shown(found: Visit) -> None:
    _card(found, 0).click()
    found.page.get_by_text("pixels").wait_for()
    image = found.page.locator("#viewer-image")
    found.page.keyboard.press("+")
    assert "scale(1.5)" in (image.get_attribute("style") or "")
    found.page.get_by_role("dialog").get_by_role("button", name="Zoom in").click()
    assert "scale(2.25)" in (image.get_attribute("style") or "")
    found.page.keyboard.press("0")
    assert "scale" not in (image.get_attribute("style") or "")
    assert violations(found) == []


@pytest.mark.chromium_only(NO_TOUCH)
def test_fingers_turn_to_the_next_photo_and_zoom(browser: Browser, server: ServeProcess) -> None:
    phone = {"width": 390, "height": 844}
    with Visit(browser, server.origin, viewport=phone, has_touch=True, is_mobile=True) as visit:
        visit.open()
        first, second = visit.names()[:2]
        _card(visit, 0).click()
        visit.page.get_by_role("dialog", name=first).wait_for()
        for start, end, name in ((300, 100, second), (100, 300, first)):
            visit.touch([(start, 150)], [(200, 155)], [(end, 150)])
            visit.page.get_by_role("dialog", name=name).wait_for()
        visit.touch([(180, 150), (210, 150)], [(150, 150), (240, 150)], [(120, 150), (270, 150)])
        # A zoomed photo is moved, not exchanged.
        zoom = re.compile(r"scale\((4\.9|5)")
        style = visit.page.locator("#viewer-image").get_attribute("style") or ""
        assert zoom.search(style), style
        visit.touch([(300, 150)], [(200, 155)], [(100, 150)])
        assert visit.page.get_by_role("dialog", name=first).is_visible()


def test_the_collection_page_lists_folders(visit: Visit, photos: Path) -> None:
    visit.page.goto(f"{visit.origin}/collection")
    visit.page.get_by_text(str(photos)).wait_for()
    visit.page.get_by_text("All files could be read.").wait_for()
    assert visit.page.get_by_role("button", name="Update all").is_visible()
    assert violations(visit) == []
    assert visit.fits()


def test_a_card_shows_similar_photos_and_back_returns(found: Visit) -> None:
    before = found.ids()
    card = _card(found, 1)
    card.hover()
    with found.new_hits():
        found.page.get_by_role("button", name=f"More like {found.names()[1]}").click()
    assert before[1] not in found.ids()
    with found.new_hits():
        found.go(-1)
    assert found.ids() == before
    with found.new_hits():
        found.go(1)
    with found.new_hits():
        found.stroke(DOOR)
    assert "/v1/query" in found.queries[-1].url


def test_a_photo_that_does_not_exist_is_reported(visit: Visit) -> None:
    with visit.new_hits():
        visit.stroke(ROOF)
    before = visit.ids()
    visit.page.evaluate("location.hash = '#like=99999'")
    visit.page.get_by_role("heading", name="no longer in the gallery").wait_for()
    visit.expect_message("404")
    with visit.new_hits():
        visit.page.get_by_role("button", name="Back to the sketch").click()
    assert visit.ids() == before


def test_the_folder_filter_restricts_the_hits(found: Visit, photos: Path) -> None:
    choice = found.page.get_by_label("Folder")
    with found.new_hits():
        choice.select_option(str(photos / "places"))
    assert parse_qs(urlsplit(found.queries[-1].url).query)["under"] == [str(photos / "places")]
    assert found.names() == ["china.jpg"]
    with found.new_hits():
        choice.select_option(str(photos / "shapes"))
    assert set(found.names()) <= {path.name for path in (photos / "shapes").iterdir()}
    assert found.count() == 24
    with found.new_hits():
        choice.select_option("")
    assert found.count() == 24


def test_the_dates_restrict_the_photos(found: Visit) -> None:
    tomorrow = datetime.date.today() + datetime.timedelta(days=1)
    found.page.get_by_role("button", name="All dates").click()
    dates = found.page.get_by_role("group", name="Photos taken")
    dates.get_by_label("From").fill(tomorrow.isoformat())
    found.page.get_by_role("heading", name="No photos of these days").wait_for()
    # Two days in any order are the period between them.
    with found.new_hits():
        dates.get_by_label("Until").fill("1990-01-01")
    query = parse_qs(urlsplit(found.queries[-1].url).query)
    assert query["taken_from"] == ["1990-01-01"]
    assert query["taken_to"] == [tomorrow.isoformat()]
    assert found.count() > 0
    assert "their files count" in (found.page.locator("#notices").text_content() or "")
    assert violations(found) == []
    with found.new_hits():
        dates.get_by_role("button", name="All dates").click()
    assert not dates.is_visible()
    assert "taken_from" not in found.queries[-1].url


def test_identical_photos_are_one_card_and_the_viewer_lists_them(
    browser: Browser, tmp_path: Path
) -> None:
    first, *_ = write_photos(tmp_path / "photos", 4)
    copies = [tmp_path / "photos" / f"copy <b>{number}.jpg" for number in range(3)]
    for copy in copies:
        shutil.copy(first, copy)
    with Embedder(engine="onnxruntime", threads=1) as embedder:
        update_gallery(tmp_path / "g.sbtk", [tmp_path / "photos"], embedder)
    options = ("--engine", "onnxruntime", "--threads", "1")
    with serving(tmp_path / "g.sbtk", *options, log=tmp_path / "log") as served:
        served.wait_until_ready()
        with Visit(browser, served.origin) as visit:
            visit.open()
            with visit.new_hits():
                visit.stroke(ROOF)
            assert len(visit.ids()) == 4
            cards = visit.page.locator("#hits a")
            assert cards.locator(".photo-copies:visible").all_text_contents() == ["+3 identical"]
            cards.filter(has_text="+3 identical").click()
            dialog = visit.page.locator("dialog[open]")
            assert not dialog.locator("li").first.is_visible()
            dialog.get_by_text("+3 identical").click()
            shown = {dialog.locator("#viewer-path").text_content()}
            assert shown | set(dialog.locator("li").all_text_contents()) == {
                str(path) for path in (first, *copies)
            }
            is_last = str(visit.page.evaluate("location.href")).endswith(f"{visit.ids()[-1]}")
            visit.page.keyboard.press("ArrowLeft" if is_last else "ArrowRight")
            visit.page.wait_for_function("() => document.getElementById('viewer-copies').hidden")
            # Whichever of them is liked, the chip shows it, and the results need not.
            listed = ask(served.port, "/v1/photos").json()["photos"]
            [folded] = [photo for photo in listed if "copies" in photo]
            for one in (folded, *folded["copies"]):
                visit.page.goto("about:blank")
                visit.open(f"/#like={one['id']}&unlike=3")
                visit.page.wait_for_selector('#results[data-shown="similar"][aria-busy="false"]')
                assert len(visit.ids()) == 2


def test_photos_keep_their_aspect_ratios_in_rows_of_full_width(found: Visit) -> None:
    width = found.page.eval_on_selector("#hits", "list => list.clientWidth")
    rows: dict[float, list[tuple[float, float]]] = {}
    short = set()
    script = """items => items.map(item => {
        const { x, y, width, height } = item.getBoundingClientRect();
        const { naturalWidth, naturalHeight } = item.querySelector("img");
        const isLast = !item.nextElementSibling?.matches(".photo");
        return [Math.round(y), x, width, height, naturalWidth / naturalHeight, isLast];
    })"""
    found.wait_until("() => [...document.images].every(image => image.complete)")
    found.page.wait_for_timeout(300)
    photos_shown = found.page.eval_on_selector_all("#hits > li.photo", script)
    for y, x, item_width, height, ratio, is_last in photos_shown:
        assert item_width / height == pytest.approx(ratio, rel=0.03)
        rows.setdefault(y, []).append((x, item_width))
        # The last row, and one before a divider, may be short.
        short |= {y} if is_last else set()
    full = [row for y, row in rows.items() if y not in short]
    assert len(full) > 2
    for row in full:
        assert row[-1][0] + row[-1][1] - row[0][0] == pytest.approx(width, abs=2)


def test_names_and_scores_appear_on_hover_and_focus(found: Visit) -> None:
    found.page.mouse.move(5, 5)
    info = found.page.locator("#hits li .photo-info")
    opacity = "element => getComputedStyle(element).opacity"
    found.page.wait_for_timeout(300)
    assert {info.nth(index).evaluate(opacity) for index in range(5)} == {"0"}
    _card(found, 1).hover()
    found.page.wait_for_timeout(300)
    assert info.nth(1).evaluate(opacity) == "1"
    assert info.nth(1).inner_text().split()[0] == found.names()[1]
    found.page.keyboard.press("r")
    found.page.wait_for_timeout(300)
    assert info.nth(0).evaluate(opacity) == "1"


def test_photos_keep_their_order_until_the_pen_rests(found: Visit) -> None:
    before, sent = found.ids(), len(found.queries)
    found.page.evaluate(
        """() => {
            window.moves = [];
            window.updates = [];
            addEventListener("pointermove", () => window.moves.push(performance.now()), true);
            new PerformanceObserver((list) => {
                const marks = list.getEntries().filter(({ name }) => name === "sbtk:shown");
                window.updates.push(...marks.map(({ startTime }) => startTime));
            }).observe({ type: "mark" });
        }"""
    )
    with found.new_hits():
        found.press(DOOR[0])
        for step in range(40):
            found.move([(0.3 + 0.01 * step, 0.6 + 0.1 * (step % 2))], steps=2)
            found.page.wait_for_timeout(20)
        found.page.mouse.up()
    moves, updates = found.page.evaluate("[moves, updates]")
    assert len(found.queries) > sent + 1, "searches continue while the pen moves"
    assert updates
    for update in updates:
        assert update - max(move for move in moves if move < update) > 290
    assert found.ids() != before
    assert found.ids() == found.resend_last()


def test_weak_matches_are_set_apart(visit: Visit) -> None:
    items = visit.page.locator("#hits > li")
    dividers = items.and_(visit.page.locator(".divider"))
    visit.page.evaluate(_RATE_HITS)
    for good, text in (
        ([], "No close match. Best guesses:"),
        ([1, 2, 3, 4, 5], "Weaker matches"),
        ([1, 3], "Weaker matches"),  # reranked
    ):
        visit.page.evaluate("good => { window.good = good; }", good)
        with visit.new_hits():
            visit.stroke(ROOF)
        assert dividers.all_inner_texts() == [text]
        said = "24 photos found. Best match: " if good else "No close match. Best guess: "
        visit.page.get_by_role("status").filter(has_text=said).wait_for(state="attached")
        last = max(good, default=0)
        assert items.nth(last).inner_text() == text
        assert _bottom(items.nth(last)) < _bottom(items.nth(last + 1))
        if last:
            assert _bottom(items.nth(last - 1)) < _bottom(items.nth(last))
    visit.page.evaluate("window.good = null")
    with visit.new_hits():
        visit.stroke(ROOF)
    assert dividers.count() == 0


def test_recent_photos_are_shown_before_anything_is_drawn(visit: Visit, photos: Path) -> None:
    newest = sorted(
        (path for path in photos.rglob("*") if path.is_file()),
        key=lambda path: -path.stat().st_mtime,
    )
    visit.wait_for_recent()
    assert visit.page.get_by_role("heading", name="Recent photos").is_visible()
    assert set(visit.names()[:3]) <= {path.name for path in newest[:40]}
    shown = _scroll_to_end(visit)
    assert len(set(shown.values())) == len(shown) == ALL_PHOTOS
    visit.page.get_by_label("Folder").select_option(str(photos / "places"))
    visit.wait_until("() => document.querySelectorAll('#hits > li').length === 1")
    assert visit.names() == ["china.jpg"]
    visit.page.get_by_role("link", name="china.jpg").click()
    visit.page.get_by_role("dialog", name="china.jpg").wait_for()


def test_an_example_is_drawn_and_searched_for(visit: Visit) -> None:
    visit.wait_for_recent()
    with visit.new_hits():
        visit.page.get_by_role("button", name="Draw the example: flower").click()
    assert visit.names()[0] == "flower.jpg"
    assert visit.ids() == visit.resend_last()
    assert not visit.page.locator("#welcome").is_visible()
    visit.page.get_by_role("button", name="Clear").click()
    visit.wait_for_recent()
    assert visit.page.locator("#examples button").count() == 3


def test_the_popover_shows_the_engine_and_the_duration_of_a_search(found: Visit) -> None:
    found.page.get_by_role("button", name=f"{ALL_PHOTOS} photos").click()
    info = found.page.locator("#info")
    health = json.loads(found.context.request.get(f"{found.origin}/healthz").text())
    assert f"{health['engine']['name']} {health['engine']['version']}" in info.inner_text()
    assert re.fullmatch(r"\d+ ms", info.locator("#info-duration").inner_text())
    found.page.keyboard.press("Escape")
    assert not info.is_visible()


def test_a_large_gallery_scrolls_to_its_end_with_few_cards(
    browser: Browser, tmp_path: Path
) -> None:
    bundle = tiny_bundle(tmp_path / "tiny")
    write_photos(tmp_path / "photos", 500)
    index(tmp_path / "g.sbtk", tmp_path / "photos", bundle, commit_every=256)
    with serving(tmp_path / "g.sbtk", "--model", str(bundle), log=tmp_path / "log") as served:
        served.wait_until_ready()
        with Visit(browser, served.origin) as visit:
            visit.open()
            with visit.new_hits():
                visit.stroke(ROOF)
            shown = _scroll_to_end(visit)
            assert list(shown) == list(range(1, 501))
            assert len(set(shown.values())) == 500
            assert visit.page.locator("#hits > li").count() < 150
            # The keyboard reaches both ends.
            visit.page.keyboard.press("r")
            focused = "() => Number(document.activeElement.closest('li').ariaPosInSet)"
            for key, position in (("End", 500), ("Home", 1), ("ArrowRight", 2)):
                visit.page.keyboard.press(key)
                assert visit.page.evaluate(focused) == position
            assert visit.page.evaluate("scrollY") < 200


def _scroll_to_end(visit: Visit) -> dict[int, int]:
    """Scroll until no new photos appear; return their ids by position."""
    script = "items => items.map(item => [Number(item.ariaPosInSet), Number(item.dataset.id)])"
    seen: dict[int, int] = {}
    for _ in range(400):
        shown = dict(visit.page.eval_on_selector_all("#hits > li.photo", script))
        is_end = "() => scrollY + innerHeight >= document.documentElement.scrollHeight - 2"
        is_loaded = visit.page.locator("#load-more").is_hidden()
        if is_loaded and not shown.keys() - seen.keys() and visit.page.evaluate(is_end):
            return dict(sorted(seen.items()))
        seen |= shown
        visit.page.evaluate(_SCROLL)
        visit.page.wait_for_timeout(50)
    raise AssertionError(f"{len(seen)} photos, and no end")


def _bottom(item: Locator) -> float:
    box = item.bounding_box()
    assert box is not None
    return box["y"] + box["height"]


def _card(visit: Visit, index: int) -> Locator:
    return visit.page.locator("#hits li a").nth(index)
