"""The page in Firefox, which Playwright cannot drive over the protocol of Debian's."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.browser.conftest import GENERATED
from tests.browser.visit import ROOF
from tests.serve_process import ServeProcess

if TYPE_CHECKING:
    from tests.browser.firefox import Firefox

_IS_SHOWN = """document.getElementById("results").dataset.shown === "{}" &&
    document.getElementById("results").ariaBusy === "false" """
_HITS = "document.querySelectorAll('#hits > li.photo').length"
_INK = """(() => {
    const canvas = document.getElementById("strokes-layer");
    const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
    return data.filter((value, index) => index % 4 === 3 && value > 32).length;
})()"""


@pytest.fixture(scope="module")
def firefox(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Firefox]:
    """Start a headless Firefox."""
    names = [os.environ.get("SBTK_FIREFOX", "firefox-esr"), "firefox"]
    program = next(filter(None, map(shutil.which, names)), None)
    if program is None:
        pytest.skip("there is no Firefox: 'make test-browser' installs it, or SBTK_FIREFOX names")
    pytest.importorskip("websockets", reason="websockets is not installed")
    from tests.browser.firefox import Firefox

    with Firefox(program, tmp_path_factory.mktemp("firefox")) as browser:
        yield browser


def test_a_sketch_is_drawn_searched_for_and_restored(
    firefox: Firefox, server: ServeProcess
) -> None:
    firefox.open(f"{server.origin}/#trace=cat")
    firefox.wait_until(_IS_SHOWN.format("recent"))
    firefox.wait_until("!document.getElementById('traced-layer').hidden")
    assert firefox.evaluate(_INK) == 0
    firefox.drag("#input-layer", list(ROOF))
    firefox.wait_until(_IS_SHOWN.format("sketch"))
    ink = firefox.evaluate(_INK)
    assert ink > 500
    assert firefox.evaluate("Number(document.querySelector('#hits li').ariaSetSize)") > 20
    # Firefox restores what was chosen in forms, which the page must not let stand.
    firefox.evaluate("document.querySelector(\"input[value='photo']\").click()")
    firefox.wait_until(_IS_SHOWN.format("photo"))
    firefox.reload()
    firefox.wait_until(_IS_SHOWN.format("sketch"))
    assert firefox.evaluate("document.querySelector(\"input[value='sketch']\").checked")
    assert firefox.evaluate(_INK) == pytest.approx(ink, rel=0.02)
    firefox.click("#clear")
    firefox.wait_until(_IS_SHOWN.format("recent"))
    assert firefox.evaluate(_INK) == 0


def test_a_photo_is_enlarged_and_finds_others(
    firefox: Firefox, server: ServeProcess, photos: Path
) -> None:
    firefox.open(server.origin)
    firefox.wait_until(_IS_SHOWN.format("recent"))
    firefox.wait_until("document.querySelector('#hits img').complete")
    firefox.click("#hits li a")
    firefox.wait_until("document.getElementById('viewer').open")
    firefox.wait_until("document.getElementById('viewer-image').naturalWidth > 80")
    path = Path(firefox.evaluate("document.getElementById('viewer-path').textContent"))
    assert path.is_file() and path.is_relative_to(photos)
    firefox.wait_until("document.getElementById('viewer-exif').textContent.includes('pixels')")
    firefox.click("#viewer-like")
    firefox.wait_until(_IS_SHOWN.format("similar"))
    assert firefox.evaluate("document.getElementById('likes-list').textContent") == path.name
    assert firefox.evaluate(_HITS) > 10
    width = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
    assert firefox.evaluate(width) == 0

    firefox.open(f"{server.origin}/collection")
    firefox.wait_until("document.querySelectorAll('#folders li').length === 1")
    text = firefox.evaluate("document.getElementById('folders').textContent")
    assert f"{GENERATED + 3} photos" in text and str(photos) in text
