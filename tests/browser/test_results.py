"""The results: cards, viewer, similar photos, folder filter."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import parse_qs, urlsplit

import pytest

from sbtk_runtime.embedding.embedder import Embedder
from sbtk_runtime.gallery.update import update_gallery
from tests.browser.conftest import GENERATED
from tests.browser.visit import DOOR, ROOF, Visit
from tests.serve_process import serving
from tests.tiny import write_photos

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Locator

ALL_PHOTOS = GENERATED + 3


@pytest.fixture
def found(visit: Visit) -> Visit:
    """Returns the page with a sketch and its hits."""
    with visit.new_hits():
        visit.stroke(ROOF)
    return visit


def test_scrolling_loads_every_photo_once(found: Visit) -> None:
    first = found.ids()
    while len(found.ids()) < ALL_PHOTOS:
        with found.new_hits():
            found.page.mouse.move(1000, 500)
            found.page.mouse.wheel(0, 2000)
    shown = found.ids()
    assert sorted(shown) == sorted(set(shown))
    assert len(shown) == ALL_PHOTOS
    assert shown[: len(first)] == first
    ranks = found.page.locator("#hits .card-rank").all_text_contents()
    assert ranks == [str(rank) for rank in range(1, ALL_PHOTOS + 1)]
    assert not found.page.get_by_role("button", name="Show more").is_visible()


def test_the_viewer_shows_a_photo_and_copies_its_path(found: Visit, photos: Path) -> None:
    found.context.grant_permissions(["clipboard-read", "clipboard-write"])
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
    dialog.get_by_role("button", name="Next photo").click()
    found.page.get_by_role("dialog", name=found.names()[3]).wait_for()
    found.page.go_back()
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
    assert len(set(alike)) == 24
    assert found.page.locator("#similar-bar").inner_text().startswith(f"Similar to {name}")
    with found.new_hits():
        found.page.get_by_role("button", name="Back to the sketch").click()
    assert found.ids() == before


def test_a_card_shows_similar_photos_and_back_returns(found: Visit) -> None:
    before = found.ids()
    card = _card(found, 1)
    card.hover()
    with found.new_hits():
        found.page.get_by_role("button", name=f"More like {found.names()[1]}").click()
    assert before[1] not in found.ids()
    with found.new_hits():
        found.page.go_back()
    assert found.ids() == before
    with found.new_hits():
        found.page.go_forward()
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
    assert len(found.ids()) == 24
    with found.new_hits():
        choice.select_option("")
    assert len(found.ids()) == 24


def test_identical_photos_are_one_card_and_the_viewer_lists_them(
    chromium: Browser, tmp_path: Path
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
        with Visit(chromium, served.origin) as visit:
            visit.open()
            with visit.new_hits():
                visit.stroke(ROOF)
            assert len(visit.ids()) == 4
            cards = visit.page.locator("#hits a")
            assert cards.locator(".card-copies:visible").all_text_contents() == ["+3 identical"]
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


def _card(visit: Visit, index: int) -> Locator:
    return visit.page.locator("#hits li a").nth(index)
