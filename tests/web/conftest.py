"""A gallery of small photos, served by a real process, with the expected hits."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from PIL import Image

from sbtk_runtime.embedding.embedder import Embedder
from sbtk_runtime.gallery.gallery import Gallery, Hit
from sbtk_runtime.preprocess import Kind
from tests.serve_process import ServeProcess, serving
from tests.tiny import tiny_bundle, tiny_photo, write_photos
from tests.tiny_gallery import index

#: A name that is no UTF-8, and one that would be markup.
ODD_NAMES = (b"not \xff utf-8.png", b"<b onclick=alert(1)>.png")
#: What makes servers quick to start and their answers those of `Workplace.hits`.
ENGINE = ("--engine", "onnxruntime", "--threads", "1")


@dataclass(frozen=True)
class Workplace:
    """A folder with `bundle/`, `photos/` and `gallery.sbtk/`."""

    folder: Path

    @property
    def bundle(self) -> Path:
        """The model."""
        return self.folder / "bundle"

    @property
    def photos(self) -> Path:
        """The photos, some in folders of their own."""
        return self.folder / "photos"

    @property
    def gallery(self) -> Path:
        """The gallery."""
        return self.folder / "gallery.sbtk"

    def embedder(self) -> Embedder:
        """Return an embedder like the servers', for a `with` block."""
        return Embedder(self.bundle, engine="onnxruntime", threads=1)

    def hits(self, image: bytes, kind: Kind = "sketch", k: int = 24) -> list[Hit]:
        """Return what Python finds."""
        with self.embedder() as embedder, Gallery.open(self.gallery) as gallery:
            return gallery.query(image, embedder, k, kind)

    def index(self) -> None:
        """Bring the gallery up to date."""
        index(self.gallery, self.photos, self.bundle)

    def serving(self, *options: str) -> contextlib.AbstractContextManager[ServeProcess]:
        """Return a server of the gallery, for a `with` block."""
        everything = ("--model", str(self.bundle), *ENGINE, *options)
        return serving(self.gallery, *everything, log=self.folder / "log")


@pytest.fixture
def workplace(tmp_path: Path) -> Workplace:
    """Return a workplace of 8 photos, to change."""
    place = _furnished(tmp_path, 8)
    place.index()
    return place


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    """Return a workplace of 34 photos that tests leave as it is."""
    place = _furnished(tmp_path_factory.mktemp("web"), 24)
    write_photos(place.photos / "album", 6, seed=7)
    for seed, name in enumerate(ODD_NAMES, start=900):
        tiny_photo(seed).save(place.photos / os.fsdecode(name), "PNG")
    turned = Image.Exif()
    turned[0x0112] = 6
    turned[0x010E] = "who took this, and where"
    tiny_photo(950).resize((400, 200)).save(place.photos / "turned.jpg", exif=turned)
    tiny_photo(951).resize((900, 600)).save(place.photos / "large.webp", quality=90)
    place.index()
    return place


@pytest.fixture(scope="session")
def server(shared: Workplace) -> Iterator[ServeProcess]:
    """Return a server of the shared gallery, ready, which every test must leave whole."""
    with shared.serving("--read-only") as process:
        process.wait_until_ready()
        yield process
        assert process.health()[0] == 200
    assert "Traceback" not in (log := process.log.read_text()), log


def _furnished(folder: Path, count: int) -> Workplace:
    place = Workplace(folder)
    tiny_bundle(place.bundle)
    write_photos(place.photos, count)
    return place
