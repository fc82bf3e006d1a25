"""Binary galleries: nearest codes in order, stored bits, and errors."""

from __future__ import annotations

import csv
import json
import os
import sqlite3
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sbtk_runtime.binary_codes import Itq
from sbtk_runtime.embedding.embedder import Embedder
from sbtk_runtime.errors import BadConfig, BadData, BadGallery, BadModel, ModelMismatch
from sbtk_runtime.gallery.export import export_gallery
from sbtk_runtime.gallery.gallery import Gallery
from sbtk_runtime.gallery.schema import CATALOGUE_NAME
from sbtk_runtime.gallery.update import update_gallery
from sbtk_runtime.gallery.verify import verify_gallery
from tests.tiny import tiny_bundle, tiny_photo, write_photos, write_sketch
from tests.tiny_gallery import (
    code_gallery_of,
    gallery_of,
    photo_path,
    tiny_code_bundle,
    tiny_itq,
    unit_rows,
)

COUNT, DIM, BITS = 300, 64, 64


@pytest.fixture(scope="module")
def itq() -> Itq:
    return tiny_itq(DIM, BITS)


@pytest.fixture(scope="module")
def made_up(tmp_path_factory: pytest.TempPathFactory, itq: Itq) -> Path:
    """A gallery of the 64-bit codes of 300 random rows, ten photos to a folder."""
    folder = tmp_path_factory.mktemp("made-up") / "g.sbtk"
    code_gallery_of(folder, itq.codes(unit_rows(COUNT, DIM)), itq)
    return folder


@pytest.fixture(scope="module")
def embedder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Embedder]:
    bundle = tiny_code_bundle(tmp_path_factory.mktemp("bundle"), 8, 64, dim=DIM)
    with Embedder(bundle, engine="onnxruntime", threads=1, batch=4) as opened:
        yield opened


def bits_that_differ(codes: np.ndarray, code: np.ndarray) -> list[int]:
    unpacked = np.unpackbits(codes, axis=1) != np.unpackbits(code)
    return [int(count) for count in unpacked.sum(axis=1)]


@pytest.mark.parametrize("as_code", [False, True])
def test_hits_are_the_nearest_codes_with_ties_by_id(made_up: Path, itq: Itq, as_code: bool) -> None:
    query = unit_rows(1, DIM, seed=5)[0]
    distances = bits_that_differ(itq.codes(unit_rows(COUNT, DIM)), itq.codes(query[None])[0])
    truth = sorted((distance, index + 1) for index, distance in enumerate(distances))[:30]
    with Gallery.open(made_up) as gallery:
        asked = itq.codes(query[None])[0] if as_code else 3.7 * query
        hits = gallery.search(asked, 30)
        assert gallery.search(asked, 30, "exact") == hits
        assert gallery.notices == []
    assert len({distance for distance, _ in truth}) < 15  # many are equally near
    assert [hit.id for hit in hits] == [photo_id for _, photo_id in truth]
    assert [hit.rank for hit in hits] == list(range(1, 31))
    assert [hit.score for hit in hits] == [1 - 2 * distance / 64 for distance, _ in truth]
    assert [os.fsencode(h.path) for h in hits] == [photo_path(h.id - 1) for h in hits]


def test_a_changed_photo_keeps_its_place_among_ties(tmp_path: Path, embedder: Embedder) -> None:
    photos, folder = tmp_path / "photos", tmp_path / "g.sbtk"
    photos.mkdir()
    for name, seed in (("a", 7), ("b", 7), ("c", 7), ("d", 9)):
        tiny_photo(seed).save(photos / f"{name}.png")
    update_gallery(folder, [photos], embedder, bits=8)
    for seed in (8, 7):
        tiny_photo(seed).save(photos / "a.png")
        update_gallery(folder, [photos], embedder)
    with Gallery.open(folder) as gallery:
        hits = gallery.query(photos / "a.png", embedder, 3, "photo", fold=False)
    assert [hit.score for hit in hits] == [1.0] * 3
    # Copies get their ids after the photos that were embedded: d has 2.
    assert [hit.id for hit in hits] == [1, 3, 4]


def test_a_search_can_be_limited_to_a_folder(made_up: Path) -> None:
    query = unit_rows(1, DIM, seed=5)[0]
    with Gallery.open(made_up) as gallery:
        hits = gallery.search(query, 5, under="/photos/0003")
        assert {Path(hit.path).parent.name for hit in hits} == {"0003"}
        assert len(gallery.search(query, 50, under="/photos/0003")) == 10
        assert gallery.search(query, 5, under="/elsewhere") == []
        assert len(gallery.search(query, 10**6)) == COUNT
        assert len(gallery.notices) == 3


def test_invalid_queries_are_refused(made_up: Path) -> None:
    row = unit_rows(1, DIM)[0]
    with Gallery.open(made_up) as gallery:
        with pytest.raises(BadConfig, match="no HNSW graph") as caught:
            gallery.search(row, 1, "hnsw")
        assert "exactly" in caught.value.expected
        for bad in (np.ones(17, np.float32), np.ones(17, np.uint8)):
            with pytest.raises(BadData, match=r"\(17,\)"):
                gallery.search(bad, 1)
        for value in (0.0, np.nan, np.inf):
            with pytest.raises(BadData, match="finite"):
                gallery.search(np.full(DIM, value, dtype=np.float32), 1)


def test_photos_find_themselves_and_sketches_find_something(
    tmp_path: Path, embedder: Embedder
) -> None:
    photos = write_photos(tmp_path / "photos", 12)
    sketch = write_sketch(tmp_path / "sketch.png")
    folder = tmp_path / "g.sbtk"
    report = update_gallery(folder, [tmp_path / "photos"], embedder, bits=64)
    assert (report.new, report.live) == (12, 12)
    with Gallery.open(folder) as gallery:
        assert gallery.query(photos[3], embedder, 1, "photo")[0].score == 1.0
        assert len(gallery.query(sketch, embedder, 5)) == 5
    assert [path.name for path in (folder / "vectors").iterdir()] == ["000000.bits"]
    assert list(folder.glob("graph-*")) == []
    assert (folder / "vectors" / "000000.bits").stat().st_size == 12 * 8
    verified = verify_gallery(folder)
    assert (verified.problems, verified.bits) == ((), 64)
    assert verified.found == verified.sampled == 12


@settings(max_examples=20)
@given(
    seed=st.integers(0, 1000),
    groups=st.integers(1, 4),
    count=st.integers(1, 400),
    damaged=st.integers(0, 30),
)
def test_verify_counts_damaged_codes_among_equal_ones(
    seed: int, groups: int, count: int, damaged: int
) -> None:
    random = np.random.default_rng(seed)
    itq = tiny_itq(16, 16)
    codes = itq.codes(unit_rows(groups, 16, seed))[random.integers(groups, size=count)]
    bad = random.choice(count, min(damaged, count), replace=False)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "g.sbtk"
        code_gallery_of(folder, codes, itq)
        shard = folder / "vectors" / "000000.bits"
        content = np.frombuffer(shard.read_bytes(), np.uint8).reshape(count, 2).copy()
        content[bad, 1] ^= 4
        shard.write_bytes(content.tobytes())
        report = verify_gallery(folder)
        photos = "photo" if len(bad) == 1 else "photos"
        expected = f"the embeddings of {len(bad)} {photos} are damaged or missing"
        assert report.problems == ((expected,) if len(bad) else ())
        assert report.found == report.sampled == min(256, count - len(bad))
        assert verify_gallery(folder, repair=True).repaired == len(bad)


def test_an_update_keeps_the_codes_without_an_option(tmp_path: Path, embedder: Embedder) -> None:
    paths = write_photos(tmp_path / "photos", 6)
    folder = tmp_path / "g.sbtk"
    update_gallery(folder, [tmp_path / "photos"], embedder, bits=64)
    first = (folder / "manifest.json").read_bytes()
    assert update_gallery(folder, [tmp_path / "photos"], embedder, bits=64).unchanged == 6
    assert (folder / "manifest.json").read_bytes() == first
    paths[0].unlink()
    tiny_photo(1000).save(tmp_path / "photos" / "new.png")
    report = update_gallery(folder, [tmp_path / "photos"], embedder)
    assert (report.new, report.missing, report.live) == (1, 1, 6)
    with Gallery.open(folder) as gallery:
        assert gallery.manifest.bits == 64
        (hit,) = gallery.query(tmp_path / "photos" / "new.png", embedder, 1, "photo")
        assert (Path(hit.path).name, hit.score) == ("new.png", 1.0)
    assert verify_gallery(folder).problems == ()


def test_a_gallery_keeps_using_its_own_itq(tmp_path: Path, embedder: Embedder) -> None:
    """A bundle that was exported again embeds alike, but its codes would mean something else."""
    photos, folder = tmp_path / "photos", tmp_path / "g.sbtk"
    write_photos(photos, 6)
    update_gallery(folder, [photos], embedder, bits=64)
    again = tiny_code_bundle(tmp_path / "again", 64, dim=DIM, itq_seed=9)
    without = tiny_bundle(tmp_path / "without", DIM)
    tiny_photo(1000).save(photos / "new.png")
    for bundle in (again, without):
        with Embedder(bundle, engine="onnxruntime", threads=1) as other:
            assert other.model_id == embedder.model_id
            update_gallery(folder, [photos], other)
            with Gallery.open(folder) as gallery:
                (hit,) = gallery.query(photos / "new.png", other, 1, "photo")
                assert (Path(hit.path).name, hit.score) == ("new.png", 1.0)
    export_gallery(folder, tmp_path / "exported")
    kept = (tmp_path / "exported" / "itq64.npz").read_bytes()
    assert kept != (again / "itq64.npz").read_bytes()


def test_a_gallery_cannot_change_between_codes_and_embeddings(
    tmp_path: Path, embedder: Embedder
) -> None:
    photos = tmp_path / "photos"
    write_photos(photos, 2)
    for folder, made, asked, kept in (
        (tmp_path / "floats.sbtk", None, 64, "embeddings"),
        (tmp_path / "codes.sbtk", 8, 64, "8-bit codes"),
    ):
        update_gallery(folder, [photos], embedder, bits=made)
        before = {path: path.read_bytes() for path in folder.rglob("*.[bfj]*") if path.is_file()}
        with pytest.raises(BadGallery) as caught:
            update_gallery(folder, [photos], embedder, bits=asked)
        assert caught.value.found == f"{folder} keeps {kept}, not 64-bit codes"
        other = folder.with_name(f"{folder.stem}-64bit.sbtk")
        assert caught.value.next_step == f"sbtk index {photos} --bits 64 --gallery {other}"
        assert {path: path.read_bytes() for path in before} == before


def test_the_error_for_a_bundle_without_codes_says_how_to_export_them(
    tmp_path: Path, embedder: Embedder
) -> None:
    write_photos(tmp_path / "photos", 1)
    with pytest.raises(BadModel) as caught:
        update_gallery(tmp_path / "g.sbtk", [tmp_path / "photos"], embedder, bits=32)
    assert "no 32-bit codes" in caught.value.found
    assert caught.value.expected == "--bits 8 or --bits 64"
    assert "sbtk export RUN --bits 32" in caught.value.next_step
    assert not (tmp_path / "g.sbtk").exists()


def test_another_model_is_refused(tmp_path: Path, embedder: Embedder) -> None:
    write_photos(tmp_path / "photos", 2)
    update_gallery(tmp_path / "g.sbtk", [tmp_path / "photos"], embedder, bits=8)
    other = tiny_bundle(tmp_path / "other", DIM, seed=3)
    with Embedder(other, engine="onnxruntime", threads=1) as stranger:
        with pytest.raises(ModelMismatch):
            update_gallery(tmp_path / "g.sbtk", [tmp_path / "photos"], stranger)
        with Gallery.open(tmp_path / "g.sbtk") as gallery, pytest.raises(ModelMismatch):
            gallery.query(tmp_path / "photos" / "photo-0000.jpg", stranger, 1)


def test_versions_without_codes_refuse_a_binary_gallery(tmp_path: Path, made_up: Path) -> None:
    """It refuses formats that it does not know, of manifest and catalogue."""
    gallery_of(tmp_path / "g.sbtk", unit_rows(3, 16))
    for folder, manifest, catalogue in ((tmp_path / "g.sbtk", 3, 3), (made_up, 2, 4)):
        assert json.loads((folder / "manifest.json").read_text())["format"] == manifest
        connection = sqlite3.connect(folder / CATALOGUE_NAME)
        assert connection.execute("PRAGMA user_version").fetchone() == (catalogue,)
        connection.close()


def test_a_manifest_from_before_codes_is_read(tmp_path: Path) -> None:
    manifest = gallery_of(tmp_path / "g.sbtk", unit_rows(3, 16), is_old=True)
    old = asdict(manifest)
    del old["bits"], old["snapshot"]
    (tmp_path / "g.sbtk" / "manifest.json").write_text(json.dumps(old))
    with Gallery.open(tmp_path / "g.sbtk") as gallery:
        assert gallery.manifest == manifest
        assert len(gallery.search(unit_rows(1, 16)[0], 3)) == 3


def test_an_export_has_the_codes_and_their_itq(made_up: Path, tmp_path: Path, itq: Itq) -> None:
    report = export_gallery(made_up, tmp_path)
    names = [path.name for path in report.files]
    assert names[:3] == ["codes.npy", "photos.csv", "itq64.npz"]
    assert (report.count, report.left_out) == (COUNT, 0)
    codes = np.load(tmp_path / "codes.npy")
    assert codes.dtype == np.uint8
    np.testing.assert_array_equal(codes, itq.codes(unit_rows(COUNT, DIM)))
    exported = np.load(tmp_path / "itq64.npz")
    bits = (unit_rows(COUNT, DIM) - exported["mean"]) @ exported["projection"] > 0
    np.testing.assert_array_equal(np.packbits(bits, axis=1), codes)
    with (tmp_path / "photos.csv").open(encoding="utf-8", newline="") as file:
        assert [int(row["id"]) for row in csv.DictReader(file)] == list(range(1, COUNT + 1))


def test_embeddings_of_64_dimensions_make_an_ordinary_gallery(
    tmp_path: Path, embedder: Embedder
) -> None:
    photos = write_photos(tmp_path / "photos", 5)
    update_gallery(tmp_path / "g.sbtk", [tmp_path / "photos"], embedder)
    with Gallery.open(tmp_path / "g.sbtk") as gallery:
        assert (gallery.manifest.dim, gallery.manifest.bits) == (64, None)
        for search in ("auto", "hnsw", "exact"):
            (hit,) = gallery.query(photos[2], embedder, 1, "photo", search=search)
            assert (hit.path, hit.id) == (str(photos[2]), 3)
            assert hit.score > 0.999
    assert (tmp_path / "g.sbtk" / "vectors" / "000000.f16").stat().st_size == 5 * 2 * 64
    assert verify_gallery(tmp_path / "g.sbtk").problems == ()
