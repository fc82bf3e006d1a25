"""The contact sheet: self-contained, complete, and safe against hostile names."""

from __future__ import annotations

import base64
import io
import os
import re
from dataclasses import dataclass, replace
from html.parser import HTMLParser
from importlib import resources
from pathlib import Path
from urllib.parse import unquote_to_bytes, urlparse

import pytest
from PIL import Image

from sbtk_runtime.contact_sheet import INLINE_BYTES, contact_sheet
from sbtk_runtime.errors import BadImage
from sbtk_runtime.gallery.gallery import Copy, Hit
from tests.tiny import write_photos, write_sketch


class Page(HTMLParser):
    """Collects the elements of a page, and the text outside of its style sheet."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))

    def handle_data(self, data: str) -> None:
        if self.elements and self.elements[-1][0] != "style":
            self.words.append(data)

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.elements if name == tag]

    @property
    def policy(self) -> str:
        """The page's content security policy."""
        (policy,) = (meta["content"] for meta in self.all("meta") if "http-equiv" in meta)
        return policy

    @property
    def sources(self) -> list[str]:
        """Sources of the cards' images."""
        return [image["src"] for image in self.all("img")[1:]]


@dataclass(frozen=True)
class Sheet:
    sketch: bytes
    photos: list[Path]

    def page(self, paths: list[Path] | None = None, inline_bytes: int = INLINE_BYTES) -> Page:
        hits = hits_of(self.photos if paths is None else paths)
        facts = {"Model": "tiny@0"}
        page = contact_sheet(
            self.sketch, hits, name="cat.png", facts=facts, inline_bytes=inline_bytes
        )
        return Page(page)


def hits_of(paths: list[Path]) -> list[Hit]:
    return [Hit(i + 1, 0.9 - i / 10, i, str(path)) for i, path in enumerate(paths)]


@pytest.fixture
def sheet(tmp_path: Path) -> Sheet:
    sketch = write_sketch(tmp_path / "cat.png").read_bytes()
    return Sheet(sketch, write_photos(tmp_path / "photos", 4))


def test_every_hit_has_a_card_in_order(sheet: Sheet) -> None:
    page = sheet.page()
    assert len(page.all("li")) == 4
    paths = [Path(os.fsdecode(linked(link))) for link in page.all("a")]
    assert paths == sheet.photos
    text = " ".join(page.words)
    for shown in ("cat.png", "Model", "tiny@0", "0.900", "0.600", "photo-0003.png"):
        assert shown in text


def test_a_hit_shows_its_number_of_identical_photos(sheet: Sheet) -> None:
    first, second, *_ = hits_of(sheet.photos)
    copies = tuple(Copy(10 + i, f"/photos/{i}.jpg") for i in range(1_200))
    page = Page(contact_sheet(sheet.sketch, [replace(first, copies=copies), second], name="x"))
    assert [word for word in page.words if "identical" in word] == ["+1,200 identical"]


def test_images_are_inside_the_page_and_small(sheet: Sheet) -> None:
    images = sheet.page().all("img")
    assert len(images) == 5
    for attributes in images:
        assert attributes["alt"]
        image = Image.open(io.BytesIO(data_of(attributes["src"])))
        image.load()
        assert max(image.size) <= 720


def test_the_page_runs_no_scripts_and_fetches_nothing(sheet: Sheet) -> None:
    page = sheet.page()
    assert not page.all("script") + page.all("link")
    assert page.policy == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    urls = [a[key] for _, a in page.elements for key in ("src", "href") if key in a]
    assert all(url.startswith(("data:image/", "file:///")) for url in urls)


@pytest.mark.parametrize(
    "name",
    [
        b'"><script>alert(1)</script>.png',
        b"<img src=x onerror=alert(1)>.png",
        b"line\nend.png",
        b"not \xff utf-8.png",
        b"{style} %s.png",
        "caf\u00e9 \u202e gnp.png".encode(),
    ],
)
def test_hostile_names_are_escaped(sheet: Sheet, tmp_path: Path, name: bytes) -> None:
    path = tmp_path / os.fsdecode(name.replace(b"/", b"\xe2\x88\x95"))
    path.write_bytes(sheet.photos[1].read_bytes())
    page = sheet.page([path])
    assert not page.all("script")
    assert len(page.all("img")) == 2
    (link,) = page.all("a")
    assert linked(link) == os.fsencode(path)
    text = " ".join(page.words)
    assert text.encode("utf-8")
    assert "\u202e" not in text


def test_a_deleted_photo_keeps_its_card(sheet: Sheet) -> None:
    sheet.photos[0].unlink()
    sheet.photos[1].write_bytes(b"no image any more")
    page = sheet.page()
    assert len(page.all("li")) == 4
    assert len(page.all("img")) == 3
    assert "No such file" in " ".join(page.words)


def test_large_pages_link_to_image_files(sheet: Sheet) -> None:
    whole = sheet.page()
    sizes = [len(source) for source in whole.sources]
    page = sheet.page(inline_bytes=sum(sizes[:2]))
    assert page.sources == [*whole.sources[:2], *(photo.as_uri() for photo in sheet.photos[2:])]
    assert all(image["loading"] == "lazy" for image in page.all("img")[1:])
    assert "img-src data: file:;" in page.policy
    assert "the last 2 hits are loaded from their files" in " ".join(page.words)
    assert sheet.page(inline_bytes=sum(sizes)).sources == whole.sources


def test_images_stay_linked_after_a_large_one(sheet: Sheet) -> None:
    first = len(sheet.page().sources[0])
    small = sheet.photos[0].with_name("small.png")
    Image.new("RGB", (8, 8)).save(small)
    photos = [sheet.photos[0], sheet.photos[1], small]
    page = sheet.page(photos, inline_bytes=first + len(sheet.page([small]).sources[0]))
    assert [source.partition(":")[0] for source in page.sources] == ["data", "file", "file"]


def test_a_deleted_photo_is_not_linked(sheet: Sheet) -> None:
    sheet.photos[3].unlink()
    # In a closed folder, the system does not say whether the file exists.
    unknown = sheet.photos[3].with_name(300 * "x")
    page = sheet.page([*sheet.photos, unknown], inline_bytes=0)
    assert len(page.sources) == 3
    assert page.words.count("file not found") == 2


def test_the_sheet_uses_the_styles_of_the_served_page(sheet: Sheet) -> None:
    look = resources.files("sbtk_runtime").joinpath("web/static/theme.css").read_text()
    rules = re.sub(r"/\*.*?\*/", "", look, flags=re.DOTALL)
    assert not re.findall(r"url\(|@import|<", rules)
    page = contact_sheet(sheet.sketch, hits_of(sheet.photos), name="x")
    assert look in page
    used = {name for _, a in Page(page).elements for name in a.get("class", "").split()}
    assert used <= set(re.findall(r"\.([a-z][a-z-]+)", page.partition("</style>")[0]))
    assert {"cards", "card", "card-image", "card-rank", "card-name", "card-score"} <= used


def test_a_sketch_on_dark_ground_is_shown_as_the_model_saw_it(sheet: Sheet) -> None:
    image = Image.open(io.BytesIO(sheet.sketch)).convert("L").point(lambda value: 255 - value)
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    page = Page(contact_sheet(buffer.getvalue(), [], name="dark.png"))
    shown = Image.open(io.BytesIO(data_of(page.all("img")[0]["src"]))).convert("L")
    corner = shown.getpixel((0, 0))
    assert corner == 255
    assert "inverted" in " ".join(page.words)


def test_cards_have_the_aspect_ratios_of_their_photos(sheet: Sheet, tmp_path: Path) -> None:
    paths = []
    for width, height in ((300, 200), (200, 300), (1000, 100), (50, 500)):
        paths.append(tmp_path / f"{width}x{height}.png")
        Image.new("RGB", (width, height)).save(paths[-1])
    paths.append(tmp_path / "gone.png")
    cards = sheet.page(paths).all("li")
    shapes = [float(card["style"].removeprefix("--shape:")) for card in cards]
    assert shapes == pytest.approx([1.5, 2 / 3, 3.0, 0.6, 1.0], abs=0.01)


def test_a_photo_query_gives_a_sheet_too(sheet: Sheet) -> None:
    data = sheet.photos[0].read_bytes()
    page = Page(contact_sheet(data, hits_of(sheet.photos), name="a.jpg", kind="photo"))
    assert page.all("img")[0]["src"].startswith("data:image/jpeg;base64,")


def test_a_query_that_is_not_an_image_is_refused() -> None:
    with pytest.raises(BadImage):
        contact_sheet(b"nothing", [], name="x")


def data_of(uri: str) -> bytes:
    match = re.fullmatch(r"data:image/(?:png|jpeg);base64,(.+)", uri)
    assert match is not None
    return base64.b64decode(match.group(1), validate=True)


def linked(link: dict[str, str]) -> bytes:
    return unquote_to_bytes(urlparse(link["href"]).path)
