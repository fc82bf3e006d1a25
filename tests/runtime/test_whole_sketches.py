"""Models of whole sketches: every way to a query prepares them so, and photos do not change."""

from __future__ import annotations

import ast
import dataclasses
import io
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from sbtk_cli.main import main
from sbtk_runtime.bundle import Bundle
from sbtk_runtime.contact_sheet import contact_sheet
from sbtk_runtime.embedding.embedder import Embedder
from sbtk_runtime.embedding.stream import Embedded
from sbtk_runtime.errors import BadModel, EmptySketch, ModelMismatch
from sbtk_runtime.evaluation.bench.interleave import measure_stages
from sbtk_runtime.gallery.gallery import Gallery
from sbtk_runtime.gallery.update import update_gallery
from sbtk_runtime.manifest import read_bundle_manifest, read_gallery_manifest
from sbtk_runtime.preprocess import (
    CROPPED,
    PREPROCESSINGS,
    SIZE_PX,
    WHOLE,
    Kind,
    Pixels,
    Preprocessing,
)
from sbtk_runtime.web.uploads import Upload, _prepare_if_small
from tests.serve_client import query
from tests.serve_process import serving
from tests.tiny import tiny_bundle, tiny_photo, tiny_sketch, write_photos

Rows = NDArray[np.float32]

REPOSITORY = Path(__file__).parents[2]
ENGINE = ("--engine", "onnxruntime", "--threads", "1")


def ring(page: tuple[int, int], box: tuple[int, int, int, int], width: int = 6) -> Image.Image:
    """Return a white page with an ellipse that fills the box."""
    image = Image.new("L", page, 255)
    ImageDraw.Draw(image).ellipse(box, outline=0, width=width)
    return image


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def ink_box(pixels: Pixels) -> tuple[int, int, int, int]:
    """Return left, top, right and bottom of the ink, the last ones excluded."""
    ink = pixels[:, :, 0] < 128
    rows, columns = np.flatnonzero(ink.any(axis=1)), np.flatnonzero(ink.any(axis=0))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


@st.composite
def drawings(draw: st.DrawFn) -> tuple[tuple[int, int], tuple[int, int, int, int]]:
    """A page and the box of a drawing on it."""
    width, height = draw(st.integers(100, 900)), draw(st.integers(100, 900))
    left, top = draw(st.integers(0, width - 70)), draw(st.integers(0, height - 70))
    right, bottom = draw(st.integers(left + 60, width - 1)), draw(st.integers(top + 60, height - 1))
    return (width, height), (left, top, right, bottom)


@settings(max_examples=40)
@given(drawings())
def test_a_whole_sketch_keeps_its_place_and_a_cropped_one_fills_the_square(
    drawing: tuple[tuple[int, int], tuple[int, int, int, int]],
) -> None:
    page, box = drawing
    sketch = ring(page, box)
    side = max(page)
    scale = SIZE_PX / side
    margins = [(side - length) / 2 for length in page]
    places = [box[0], box[1], box[2] + 1, box[3] + 1]
    wanted = [(place + margins[number % 2]) * scale for number, place in enumerate(places)]
    whole, cropped = (each.sketch_pixels(sketch).pixels for each in (WHOLE, CROPPED))
    assert np.abs(np.subtract(ink_box(whole), wanted)).max() <= 2
    found = ink_box(cropped)
    longest = max(found[2] - found[0], found[3] - found[1])
    if max(box[2] - box[0], box[3] - box[1]) * 1.12 >= min(page) // 4:
        assert abs(longest - SIZE_PX / 1.12) <= 3
    for axis in (0, 1):
        assert abs(found[axis] + found[axis + 2] - SIZE_PX) <= 3


@settings(max_examples=25)
@given(drawings(), st.integers(10, 400))
def test_paper_around_a_drawing_changes_a_whole_sketch_but_not_a_cropped_one(
    drawing: tuple[tuple[int, int], tuple[int, int, int, int]], paper_px: int
) -> None:
    page, box = drawing
    sketch = ring(page, box)
    larger = Image.new("L", (page[0] + paper_px, page[1] + paper_px), 255)
    larger.paste(sketch, (0, 0))
    longest = max(box[2] - box[0], box[3] - box[1])
    if longest >= min(larger.size) // 4:  # smaller drawings stay small
        one, other = (CROPPED.sketch_pixels(each).pixels for each in (sketch, larger))
        assert np.array_equal(one, other)
    one, other = (WHOLE.sketch_pixels(each).pixels for each in (sketch, larger))
    assert not np.array_equal(one, other)


def test_a_whole_sketch_of_the_right_size_is_what_was_drawn() -> None:
    page = Image.new("L", (SIZE_PX, SIZE_PX), 255)
    ImageDraw.Draw(page).rectangle((150, 20, 200, 90), outline=0, width=3)
    assert np.array_equal(WHOLE.sketch_pixels(page).pixels[:, :, 1], np.asarray(page))


def test_paper_with_specks_stays_white_around_a_whole_sketch() -> None:
    clean = ring((640, 640), (400, 60, 560, 200))
    specks = np.random.default_rng(0).integers(0, 9, (640, 640))
    dirty = Image.fromarray(np.minimum(np.asarray(clean), 255 - specks).astype(np.uint8))
    one, other = (WHOLE.sketch_pixels(page).pixels.astype(int) for page in (clean, dirty))
    assert np.abs(one - other).max() < 24


def test_photos_are_prepared_alike_and_empty_sketches_refused_alike() -> None:
    for seed in range(3):
        photo = png(tiny_photo(seed))
        one, other = (each.prepare(photo, "photo").pixels for each in (CROPPED, WHOLE))
        assert np.array_equal(one, other)
    faint = Image.new("L", (300, 300), 250)
    ImageDraw.Draw(faint).line((10, 10, 200, 200), fill=240, width=3)
    for each in PREPROCESSINGS.values():
        with pytest.raises(EmptySketch, match="the sketch is empty"):
            each.prepare(png(faint), "sketch")


@pytest.mark.parametrize("preprocessing", PREPROCESSINGS.values(), ids=PREPROCESSINGS)
def test_an_image_decoded_in_another_process_is_prepared_alike(
    preprocessing: Preprocessing,
) -> None:
    sketch = png(ring((700, 500), (400, 60, 560, 200)))
    here = preprocessing.prepare(sketch, "sketch", 96)
    there = preprocessing.prepare(sketch, "sketch", 96, max_bytes=1)
    assert np.array_equal(here.pixels, there.pixels)
    assert here.notices == there.notices


def test_the_names_tell_both_ways_apart_and_have_not_changed() -> None:
    assert {name: each.ink_crop for name, each in PREPROCESSINGS.items()} == {
        "sbtk-1": True,
        "sbtk-1-whole": False,
    }


def test_no_package_prepares_sketches_without_asking_the_model() -> None:
    """`prepare` and `prepare_input` are for photos, as far as packages call them."""
    wrong, files = [], 0
    for package in ("sbtk_runtime", "sbtk_train", "sbtk_export", "cli", "demo"):
        for path in sorted((REPOSITORY / package).rglob("*.py")):
            nodes = list(ast.walk(ast.parse(path.read_text("utf-8"))))
            imported = {
                alias.name
                for node in nodes
                if isinstance(node, ast.ImportFrom) and node.module == "sbtk_runtime.preprocess"
                for alias in node.names
            } & {"prepare", "prepare_input"}
            files += bool(imported)
            wrong += [
                f"{path.relative_to(REPOSITORY)}:{node.lineno}"
                for node in nodes
                if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
                if node.func.id in imported and not _is_of_photos(node)
            ]
    assert wrong == []
    assert files, "nothing was checked"


def _is_of_photos(call: ast.Call) -> bool:
    second = call.args[1] if len(call.args) > 1 else None
    return isinstance(second, ast.Constant) and second.value == "photo"


@dataclass(frozen=True)
class Place:
    """A model of whole sketches, a gallery made by it, and a sketch in a corner of its page."""

    bundle: Path
    gallery: Path
    photos: Path
    sketch: Path

    def expected(self, sketch: bytes, preprocessing: Preprocessing) -> Rows:
        """Return the embedding `(D,)` of a sketch, by the engine itself."""
        with Embedder(self.bundle, engine="onnxruntime", threads=1) as embedder:
            pixels = preprocessing.prepare(sketch, "sketch").pixels
            row: Rows = embedder.embed_prepared(pixels, "sketch")
            return row


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    root = tmp_path_factory.mktemp("whole")
    bundle = make_whole(tiny_bundle(root / "bundle", name="whole"))
    write_photos(root / "photos", 12)
    sketch = root / "sketch.png"
    ring((400, 300), (300, 20, 380, 90)).save(sketch)
    with Embedder(bundle, engine="onnxruntime", threads=1) as embedder:
        update_gallery(root / "g.sbtk", [root / "photos"], embedder)
    found = Place(bundle, root / "g.sbtk", root / "photos", sketch)
    data = sketch.read_bytes()
    # Otherwise a test could not tell one from the other.
    assert found.expected(data, WHOLE) @ found.expected(data, CROPPED) < 0.95
    return found


def make_whole(folder: Path) -> Path:
    """Return the bundle in a folder after changing what its manifest says of sketches."""
    manifest = read_bundle_manifest(folder)
    dataclasses.replace(manifest, preprocessing=WHOLE.name).write(folder)
    return folder


def test_the_embedder_follows_the_manifest(place: Place) -> None:
    data = place.sketch.read_bytes()
    wanted = place.expected(data, WHOLE)
    with Embedder(place.bundle, engine="onnxruntime", threads=1) as embedder:
        assert embedder.bundle.preprocessing == WHOLE
        row, _ = embedder.embed_one(place.sketch, "sketch")
        [item] = embedder.stream([place.sketch], "sketch")
    assert isinstance(item, Embedded)
    np.testing.assert_allclose(row, wanted, atol=1e-5)
    np.testing.assert_allclose(item.row, wanted, atol=1e-5)


def test_the_gallery_is_searched_for_the_whole_sketch(place: Place) -> None:
    wanted = place.expected(place.sketch.read_bytes(), WHOLE)
    with (
        Embedder(place.bundle, engine="onnxruntime", threads=1) as embedder,
        Gallery.open(place.gallery) as gallery,
    ):
        hits = [(hit.path, hit.score) for hit in gallery.search(wanted, 12)]
        for found in (
            gallery.query(place.sketch, embedder, 12),
            *gallery.query_many([place.sketch], embedder, 12),
        ):
            assert [hit.path for hit in found] == [path for path, _ in hits]
            np.testing.assert_allclose(
                [hit.score for hit in found], [score for _, score in hits], atol=1e-4
            )


def test_commands_follow_the_manifest(
    place: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wanted = place.expected(place.sketch.read_bytes(), WHOLE)
    model = ["--model", str(place.bundle), *ENGINE]
    out = tmp_path / "e.npz"
    words = ["embed", str(place.sketch), "--as", "sketch", "-o", str(out), *model]
    assert main(words) == 0, capsys.readouterr().err
    np.testing.assert_allclose(np.load(out)["embeddings"][0], wanted, atol=1e-5)
    capsys.readouterr()
    asked = ["query", str(place.sketch), "--gallery", str(place.gallery), "-k", "12", "--json"]
    assert main([*asked, *model]) == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    with Gallery.open(place.gallery) as gallery:
        assert [hit["path"] for hit in found] == [hit.path for hit in gallery.search(wanted, 12)]


@pytest.mark.slow
def test_the_server_follows_the_manifest(place: Place, tmp_path: Path) -> None:
    sketch = place.sketch.read_bytes()
    with Gallery.open(place.gallery) as gallery:
        wanted = [hit.path for hit in gallery.search(place.expected(sketch, WHOLE), 12)]
    model = ("--model", str(place.bundle), *ENGINE)
    with serving(place.gallery, *model, log=tmp_path / "log") as server:
        for kind in ("", "&as=sketch"):
            answer = query(server.port, sketch, f"?k=12{kind}")
            assert answer.status == 200, answer
            assert [hit["path"] for hit in answer.json()["hits"]] == wanted


def test_uploads_and_contact_sheets_show_what_the_model_sees() -> None:
    dark = png(Image.eval(tiny_sketch(2), lambda value: 255 - value))
    sheets = set()
    for preprocessing in PREPROCESSINGS.values():
        upload = _prepare_if_small(dark, None, preprocessing)
        assert isinstance(upload, Upload)
        pixels = preprocessing.prepare(dark, "sketch").pixels
        assert np.array_equal(upload.prepared.pixels, pixels)
        sheets.add(contact_sheet(dark, [], name="x", preprocessing=preprocessing))
    assert len(sheets) == 2


def test_the_benchmark_times_what_the_model_needs() -> None:
    sketch, photo = png(ring((400, 300), (300, 20, 380, 90))), png(tiny_photo(1))
    seen: list[Pixels] = []

    def run(pixels: Pixels, kind: Kind) -> Rows:
        if kind == "sketch":
            seen.append(pixels[0])
        return np.ones((1, 4), np.float32)

    measure_stages([sketch], [photo], run, len, WHOLE, samples=1)
    assert seen
    assert all(np.array_equal(each, WHOLE.prepare(sketch, "sketch").pixels) for each in seen)


def test_a_gallery_of_other_preprocessing_is_refused(place: Place, tmp_path: Path) -> None:
    manifest = read_gallery_manifest(place.gallery)
    assert manifest.preprocessing == WHOLE.name
    # The same model, from a time when it was said to see cropped sketches.
    older = tiny_bundle(tmp_path / "older", name="whole")
    assert read_bundle_manifest(older).model_id == manifest.model_id
    with (
        Embedder(older, engine="onnxruntime", threads=1) as embedder,
        Gallery.open(place.gallery) as gallery,
    ):
        for use in (
            lambda: gallery.query(place.sketch, embedder, 1),
            lambda: update_gallery(place.gallery, [place.photos], embedder),
        ):
            with pytest.raises(ModelMismatch) as caught:
                use()
            assert caught.value.found == f"preprocessing sbtk-1 did not make {place.gallery}"
            assert caught.value.expected.startswith("preprocessing sbtk-1-whole")


def test_a_bundle_of_unknown_preprocessing_is_refused(tmp_path: Path) -> None:
    folder = tiny_bundle(tmp_path / "bundle")
    manifest = read_bundle_manifest(folder)
    dataclasses.replace(manifest, preprocessing="sbtk-1-round").write(folder)
    with pytest.raises(BadModel, match="'sbtk-1-round'") as caught:
        Bundle.open(folder)
    assert caught.value.expected.startswith("'sbtk-1' or 'sbtk-1-whole'")
