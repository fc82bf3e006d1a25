"""The Python API: names, examples, and every form of an image."""

from __future__ import annotations

import datetime
import doctest
import inspect
import io
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import sbtk_runtime
from sbtk_runtime import Bundle, Embedder, Gallery, add_photos, index, remove_photos
from sbtk_runtime.errors import BadConfig, BadData, BadGallery, BadImage, EmptySketch, ModelMismatch
from sbtk_runtime.preprocess import ImageInput, prepare_input
from tests.processes import run_python
from tests.runtime.gallery.test_regions import CORNERS, scene, thing
from tests.tiny import tiny_bundle, tiny_photo, write_photos, write_sketch
from tests.tiny_regions import tiny_map_bundle

PUBLIC = {name: getattr(sbtk_runtime, name) for name in sbtk_runtime.__all__}
#: What users call: functions, and the classes that do the work.
CALLED = {
    name: value
    for name, value in PUBLIC.items()
    if inspect.isfunction(value) or value in (Bundle, Embedder, Gallery)
}


@pytest.fixture(scope="module")
def embedder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Embedder]:
    with Embedder(tiny_bundle(tmp_path_factory.mktemp("api") / "tiny")) as opened:
        yield opened


@pytest.fixture
def photos(tmp_path: Path) -> list[Path]:
    return write_photos(tmp_path / "photos", 6)


@pytest.fixture
def gallery(tmp_path: Path, photos: list[Path], embedder: Embedder) -> Path:
    folder = tmp_path / "gallery.sbtk"
    assert index(str(tmp_path / "photos"), folder, embedder).live == 6
    return folder


@pytest.fixture
def sketch(tmp_path: Path) -> Path:
    return write_sketch(tmp_path / "sketch.png")


def test_regions_are_indexed_and_found(tmp_path: Path) -> None:
    for number, box in enumerate(CORNERS):
        scene(tmp_path / "photos" / f"{number}.png", "red", box, number)
    with Embedder(tiny_map_bundle(tmp_path / "map")) as embedder:
        report = index(tmp_path / "photos", tmp_path / "g.sbtk", embedder, regions=9)
        assert (report.live, report.regions) == (4, 36)
        with Gallery.open(tmp_path / "g.sbtk") as opened:
            hits = opened.query(thing("red"), embedder, 4, "photo")
        assert all(hit.region is not None for hit in hits)
        with pytest.raises(BadConfig, match="7 regions"):
            index(tmp_path / "photos", tmp_path / "other.sbtk", embedder, regions=7)
        assert not (tmp_path / "other.sbtk").exists()


def test_the_package_shows_its_public_names_and_imports_them_on_first_use() -> None:
    assert dir(sbtk_runtime) == sorted(sbtk_runtime.__all__)
    assert {"Embedder", "Gallery", "Hit", "index"} <= set(dir(sbtk_runtime))
    code = "import sys, sbtk_runtime; dir(sbtk_runtime); print('numpy' in sys.modules)"
    assert run_python(code) == "False\n"
    with pytest.raises(AttributeError, match="no attribute 'Galery'"):
        _ = sbtk_runtime.Galery


@pytest.mark.parametrize("name", CALLED)
def test_the_examples_in_docstrings_run(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "photos").mkdir()
    for number in range(6):
        tiny_photo(number).save(tmp_path / "photos" / f"{number}.jpg")
    tiny_photo(6).save(tmp_path / "new.jpg")
    write_sketch(tmp_path / "sketch.png")
    monkeypatch.chdir(tmp_path)
    if name in ("Gallery", "add_photos", "remove_photos"):
        index("photos")
    if name == "remove_photos":
        add_photos("gallery.sbtk", "new.jpg")
    value = CALLED[name]
    namespace = {"np": np, **vars(sys.modules[value.__module__])}
    finder = doctest.DocTestFinder(exclude_empty=False)
    found = finder.find(value, name, globs=namespace)
    for base in value.__mro__[1:-1] if isinstance(value, type) else ():
        if base.__module__.startswith("sbtk_runtime"):
            found += finder.find(base, base.__name__, globs=namespace)
    assert any(test.examples for test in found)
    for test in found:
        output: list[str] = []
        runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
        assert runner.run(test, out=output.append).failed == 0, "".join(output)


def test_public_functions_have_examples() -> None:
    documented: dict[str, Any] = dict(CALLED)
    for owner in (Embedder, Gallery):
        for name, value in inspect.getmembers(owner, callable):
            if not name.startswith("_"):
                documented[f"{owner.__name__}.{name}"] = value
    without = {n for n, value in documented.items() if ">>> " not in (inspect.getdoc(value) or "")}
    # The parts of which `query`, `search`, `index` and the server are made.
    parts = {"Gallery.answer", "Gallery.choose_rerank", "Gallery.close", "Embedder.close"}
    parts |= {"Embedder.embed_prepared", "Embedder.open_stream", "Embedder.open_regions"}
    assert without == parts


def _forms(file: Path) -> dict[str, ImageInput]:
    image = Image.open(file)
    pixels = np.asarray(image.convert("RGB"))
    return {
        "str": str(file),
        "path": file,
        "bytes": file.read_bytes(),
        "bytearray": bytearray(file.read_bytes()),
        "memoryview": memoryview(file.read_bytes()),
        "file": file.open("rb"),
        "memory file": io.BytesIO(file.read_bytes()),
        "pillow": image,
        "(H, W, 3)": pixels,
        "(H, W, 1)": np.ascontiguousarray(pixels[:, :, :1]),
        "(H, W)": np.asarray(image.convert("L")),
        "not contiguous": np.asfortranarray(pixels),
    }


def test_an_image_can_be_given_in_any_form(gallery: Path, sketch: Path, embedder: Embedder) -> None:
    expected, _ = embedder.embed_one(sketch.read_bytes(), "sketch")
    with Gallery.open(gallery) as opened:
        hits = opened.query(sketch, embedder, k=3)
        for form, image in _forms(sketch).items():
            assert np.array_equal(embedder.embed_one(image, "sketch")[0], expected), form
        for form, image in _forms(sketch).items():
            assert opened.query(image, embedder, k=3) == hits, form


def test_a_pillow_image_is_prepared_as_its_file_is(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    colours = Image.fromarray(random.integers(0, 256, (30, 40, 4), dtype=np.uint8))
    images = [colours.convert(mode) for mode in ("RGB", "RGBA", "L", "LA", "1")]
    images.append(images[0].quantize())
    images.append(Image.fromarray(random.integers(0, 65536, (30, 40)).astype(np.uint16)))
    for image in images:
        file = tmp_path / "image.png"
        image.save(file, exif=exif)
        with Image.open(file) as opened:
            from_pillow = prepare_input(opened, "photo").pixels
        assert np.array_equal(from_pillow, prepare_input(file, "photo").pixels), image.mode


def test_other_objects_are_refused_as_images(tmp_path: Path) -> None:
    [photo] = write_photos(tmp_path, 1)
    closed = io.BytesIO(photo.read_bytes())
    closed.close()
    refused: list[tuple[Any, str]] = [
        (np.zeros((4, 4, 4), np.uint8), r"\(4, 4, 4\) uint8"),
        (np.zeros((4, 4, 3), np.float32), r"\(4, 4, 3\) float32"),
        (np.zeros((0, 4), np.uint8), r"\(0, 4\) uint8"),
        (np.zeros(4, np.uint8), r"\(4,\) uint8"),
        (7, "given as int"),
        (io.BytesIO(), "nothing left to read"),
        (io.StringIO("x"), "'rb'"),
        (closed, "closed file"),
        (photo.open(encoding="utf-8"), "'rb'"),
        ((tmp_path / "new").open("wb"), "'rb'"),
        (Image.new("RGB", (0, 5)), "0 x 5 pixels"),
        (b"", "not an image"),
        (tmp_path / "missing.png", "No such file"),
    ]
    for image, match in refused:
        with pytest.raises(BadImage, match=match):
            prepare_input(image, "photo")
    with pytest.raises(EmptySketch):
        prepare_input(np.full((20, 20), 255, np.uint8), "sketch")


def test_an_unknown_kind_is_an_error_everywhere(
    gallery: Path, sketch: Path, embedder: Embedder
) -> None:
    pixels = prepare_input(sketch, "sketch").pixels
    phto: Any = "phto"
    with Gallery.open(gallery) as opened:
        for call in (
            lambda: opened.query(sketch, embedder, kind=phto),
            lambda: opened.query_many([sketch], embedder, kind=phto),
            lambda: embedder.embed_one(sketch, phto),
            lambda: embedder.embed_prepared(pixels, phto),
            lambda: embedder.embed_images(pixels[None], phto),
            lambda: list(embedder.stream([sketch], phto)),
        ):
            with pytest.raises(BadConfig, match="unknown kind of image 'phto'") as caught:
                call()
            assert caught.value.expected == "'sketch' or 'photo'"


def test_one_image_is_not_several(gallery: Path, sketch: Path, embedder: Embedder) -> None:
    with Gallery.open(gallery) as opened:
        for form, image in _forms(sketch).items():
            single: Any = image
            with pytest.raises(BadConfig, match="one image"):
                opened.query_many(single, embedder)
            if form in ("str", "path"):
                with pytest.raises(BadConfig, match="one image"):
                    list(embedder.stream(single, "sketch"))
        stack = np.stack([np.asarray(Image.open(sketch).convert("RGB"))] * 2)
        assert len(opened.query_many(stack, embedder)) == 2
    assert len(list(embedder.stream(np.array([str(sketch)] * 2), "sketch"))) == 2


def test_numbers_of_numpy_are_numbers_and_others_are_errors_that_do_not_blame_the_gallery(
    gallery: Path, embedder: Embedder
) -> None:
    ids: list[Any] = list(np.arange(1, 7))
    with Gallery.open(gallery) as opened:
        for photo_id in ids:
            assert opened.photo(photo_id) == opened.photo(int(photo_id)) is not None
            assert opened.similar(photo_id, ids[1]) == opened.similar(int(photo_id), 2)
        assert len(opened.recent(ids[1], ids[0])) == 2
        assert len(opened.recent(1 << 70)) == 6
        assert opened.recent(5, 1 << 70) == []
        wrong: Any
        for wrong in (1.5, "2", None):
            for call in (opened.photo, opened.recent, partial(opened.similar, 1)):
                with pytest.raises(TypeError, match="interpreted as an integer"):
                    call(wrong)
        day = datetime.date(2026, 1, 1)
        now = datetime.datetime(2026, 1, 1)
        for wrong in (("2026-01-01", None), (day, now), (day,), "ab"):
            with pytest.raises(BadConfig, match="a period of"):
                opened.recent(taken=wrong)


def test_pixels_of_another_shape_are_not_blamed_on_the_engine(embedder: Embedder) -> None:
    wrong: Any
    for wrong in (np.zeros((8, 8, 3), np.uint8), np.zeros((224, 224, 3))):
        with pytest.raises(BadData) as caught:
            embedder.embed_prepared(wrong, "photo")
        assert caught.value.expected == "(N, 224, 224, 3) uint8"


def test_query_many_gives_the_answers_of_single_queries(
    gallery: Path, sketch: Path, photos: list[Path], tmp_path: Path
) -> None:
    with (
        Embedder(tiny_bundle(tmp_path / "tiny"), batch=2) as embedder,
        Gallery.open(gallery) as opened,
    ):
        asked: list[ImageInput] = [sketch, *photos[:4]]
        found = opened.query_many(iter(asked), embedder, k=2)
        assert len(found) == 5
        for image, hits in zip(asked, found, strict=True):
            alone = opened.query(image, embedder, k=2)
            assert [hit.path for hit in hits] == [hit.path for hit in alone]
            assert [hit.score for hit in hits] == pytest.approx([hit.score for hit in alone])
        assert opened.query_many([], embedder) == []
        with pytest.raises(BadImage, match="image 2: not an image"):
            opened.query_many([sketch, sketch, b"no image"], embedder)
    other = tiny_bundle(tmp_path / "other", seed=1)
    with (
        Embedder(other) as embedder,
        Gallery.open(gallery) as opened,
        pytest.raises(ModelMismatch),
    ):
        opened.query_many([sketch], embedder)


def test_single_photos_are_added_and_removed(
    gallery: Path, photos: list[Path], tmp_path: Path, embedder: Embedder
) -> None:
    more = write_photos(tmp_path / "more", 3, seed=9)
    with Gallery.open(gallery) as opened:
        report = add_photos(opened, more[:2], embedder)
        assert (report.new, report.live) == (2, 8)
        assert len(opened) == 6
    assert add_photos(str(gallery), str(more[2]), embedder).live == 9
    with pytest.raises(BadData, match="no photo below"):
        remove_photos(gallery, [more[0], tmp_path / "elsewhere.jpg"])
    assert remove_photos(gallery, [more[0], photos[0]]).live == 7
    with Gallery.open(gallery) as opened:
        assert len(opened) == opened.count == 7
        photo = opened.photo(1 + len(photos) + 1)
        assert photo is not None and photo.path == str(more[1])
        assert list(opened.folders()) == sorted({str(photos[1].parent), str(more[1].parent)})
        assert str(tmp_path / "photos") in opened.roots()
    with pytest.raises(BadGallery):
        add_photos(tmp_path / "none.sbtk", more, embedder)
    assert not (tmp_path / "none.sbtk").exists()


def test_an_empty_gallery_is_not_false(gallery: Path, photos: list[Path]) -> None:
    remove_photos(gallery, photos[0].parent)
    with Gallery.open(gallery) as opened:
        assert len(opened) == 0 and opened
