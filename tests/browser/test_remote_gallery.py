"""The page over a collection in PostgreSQL, whose ids have more digits than a JavaScript number."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from sbtk_runtime.gallery.push import push_gallery
from sbtk_runtime.gallery.remote import open_store
from tests.browser.visit import ROOF, Visit
from tests.postgres_server import PostgresServer
from tests.serve_process import ServeProcess, serving
from tests.tiny_remote import POSTGRES, server_fixture

if TYPE_CHECKING:
    from playwright.sync_api import Browser

pytestmark = pytest.mark.browser

server = server_fixture(POSTGRES)


@pytest.fixture(scope="module")
def there(
    server: PostgresServer, gallery: Path, photos: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ServeProcess]:
    url = server.url()
    push_gallery(gallery, open_store(url), "nas")
    words = ("--engine", "onnxruntime", "--threads", "1", "--at", url)
    log = tmp_path_factory.mktemp("log") / "log"
    with serving(None, *words, "--photos", f"nas={photos}", log=log) as process:
        process.wait_until_ready()
        yield process


def test_a_photo_of_a_collection_is_enlarged_and_finds_others(
    browser: Browser, there: ServeProcess, photos: Path
) -> None:
    with Visit(browser, there.origin) as visit:
        visit.open()
        with visit.new_hits():
            visit.stroke(ROOF)
        name = visit.names()[1]
        visit.page.locator("#hits a").nth(1).click()
        dialog = visit.page.get_by_role("dialog", name=name)
        assert dialog.locator("code").text_content() == str(next(photos.rglob(name)))
        visit.wait_until("() => document.getElementById('viewer-image').naturalWidth > 80")
        address = visit.page.url
        assert len(address.rpartition("photo=")[2]) > 15
        # A link to the photo opens it again.
        visit.page.reload()
        dialog = visit.page.get_by_role("dialog", name=name)
        dialog.wait_for()
        with visit.new_hits():
            dialog.get_by_role("button", name="More like this").click()
        assert name not in visit.names()
