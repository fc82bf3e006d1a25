"""Photos with the same bytes are embedded once and are one hit with copies."""

from __future__ import annotations

import csv
import json
import os
import shutil
from contextlib import closing
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sbtk_runtime.embedding.embedder import Embedder
from sbtk_runtime.gallery.catalogue import CatalogueView
from sbtk_runtime.gallery.export import export_gallery
from sbtk_runtime.gallery.folder import VECTORS_NAME, published_manifest
from sbtk_runtime.gallery.gallery import Gallery
from sbtk_runtime.gallery.update import update_gallery
from sbtk_runtime.gallery.verify import verify_gallery
from tests.tiny import tiny_photo, write_photos

BITS = 16
QUERY = np.ones(16, np.float32)


def stored_rows(folder: Path, bits: int | None) -> int:
    row_bytes = 32 if bits is None else bits // 8
    return sum(path.stat().st_size for path in (folder / VECTORS_NAME).iterdir()) // row_bytes


@pytest.mark.parametrize("bits", [None, BITS])
@pytest.mark.parametrize("commit_every", [1, 3, 256])
def test_copies_share_one_embedding_and_one_hit(
    tmp_path: Path, embedder: Embedder, bits: int | None, commit_every: int
) -> None:
    photos, folder = tmp_path / "photos", tmp_path / "g.sbtk"
    paths = write_photos(photos, 4)
    (photos / "copies").mkdir()
    for number in range(20):
        shutil.copy(paths[1], photos / "copies" / f"{number:02d}.png")
    (photos / "junk.jpg").write_bytes(b"junk")
    for number in range(3):
        shutil.copy(photos / "junk.jpg", photos / "copies" / f"junk-{number}.jpg")
    report = update_gallery(folder, [photos], embedder, commit_every=commit_every, bits=bits)
    assert (report.new, report.unreadable, report.live) == (24, 4, 24)
    assert stored_rows(folder, bits) == 4
    assert verify_gallery(folder).problems == ()
    same = {str(paths[1]), *map(str, (photos / "copies").glob("??.png"))}
    with Gallery.open(folder) as gallery:
        answer = gallery.answer(QUERY, 10)
        assert len(answer.hits) == 4
        assert [hit.rank for hit in answer.hits] == [1, 2, 3, 4]
        assert answer.notices == (
            "only 4 different photos are searchable, so there are fewer hits",
        )
        (folded,) = [hit for hit in answer.hits if hit.copies]
        assert {folded.path, *(copy.path for copy in folded.copies)} == same
        assert len(folded.to_json()["copies"]) == 20
        json.dumps(folded.to_json())
        single = gallery.answer(QUERY, 10, fold=False).hits
        assert len(single) == 10
        assert not any(hit.copies for hit in single)
        every = gallery.search(QUERY, 24, fold=False)
        assert [hit.rank for hit in every] == list(range(1, 25))
        assert len({hit.id for hit in every}) == 24
        pages = [gallery.search(QUERY, 3, offset=at) for at in (0, 3, 6)]
        assert [*chain(*pages)] == answer.hits
        for under in (None, photos / "copies"):
            every = gallery.search(QUERY, 24, fold=False, under=under)
            parts = [
                gallery.search(QUERY, 7, fold=False, under=under, offset=at)
                for at in range(0, 28, 7)
            ]
            assert [*chain(*parts)] == every
        copied = folded.copies[0].id
        for fold in (True, False):
            alike = gallery.similar(copied, 30, fold=fold).hits
            assert copied not in {hit.id for hit in alike}
            assert len(alike) == (3 if fold else 23)
            parts = [
                gallery.similar(copied, 2, fold=fold, offset=at).hits for at in range(0, 24, 2)
            ]
            assert [*chain(*parts)] == alike
        below = gallery.search(QUERY, 5, under=photos / "copies")
        assert [len(hit.copies) for hit in below] == [19]
        assert below[0].path.startswith(str(photos / "copies"))
        for photo_id in (folded.id, folded.copies[3].id):
            similar = gallery.similar(photo_id, 3)
            assert len(similar.hits) == 3
            assert not any(hit.copies for hit in similar.hits)
            assert similar.notices == ()
    export_gallery(folder, tmp_path / "out")
    with (tmp_path / "out" / "photos.csv").open(newline="", encoding="utf-8") as file:
        table = list(csv.DictReader(file))
    rows = np.load(tmp_path / "out" / ("embeddings.npy" if bits is None else "codes.npy"))
    assert len(rows) == len(table) == 24
    by_hash: dict[str, np.ndarray[tuple[int, ...], np.dtype[np.generic]]] = {}
    for line, row in zip(table, rows, strict=True):
        np.testing.assert_array_equal(by_hash.setdefault(line["sha256"], row), row)
    assert update_gallery(folder, [photos], embedder).unchanged == 24


def test_a_copy_outlives_its_original(tmp_path: Path, embedder: Embedder) -> None:
    photos, folder = tmp_path / "photos", tmp_path / "g.sbtk"
    paths = write_photos(photos, 3)
    update_gallery(folder, [photos], embedder)
    shutil.copy(paths[0], photos / "zcopy.jpg")
    engine_s = embedder.timings.engine_s
    assert update_gallery(folder, [photos], embedder).new == 1
    assert embedder.timings.engine_s == engine_s
    tiny_photo(99).save(paths[0])
    assert update_gallery(folder, [photos], embedder).changed == 1
    with Gallery.open(folder) as gallery:
        (hit,) = gallery.query(photos / "zcopy.jpg", embedder, 1, "photo")
        assert (hit.path, hit.copies) == (str(photos / "zcopy.jpg"), ())
        assert hit.score > 0.999
    paths[1].unlink()
    (photos / "zcopy.jpg").unlink()
    report = update_gallery(folder, [photos], embedder)
    assert (report.missing, report.live) == (2, 2)
    assert verify_gallery(folder).problems == ()


def test_copies_survive_edits_of_their_original_and_an_interruption(
    tmp_path: Path, embedder: Embedder
) -> None:
    photos, folder = tmp_path / "photos", tmp_path / "g.sbtk"
    paths = write_photos(photos, 3)
    update_gallery(folder, [photos], embedder)
    for number in range(8):
        shutil.copy(paths[0], photos / f"z{number}.jpg")
    tiny_photo(99).save(paths[0])

    def interrupt(done: int, total: int | None, rate: float) -> None:
        if done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        update_gallery(folder, [photos], embedder, commit_every=1, progress=interrupt)
    tiny_photo(98).save(paths[0])
    report = update_gallery(folder, [photos], embedder, commit_every=1)
    assert report.live == 11
    with Gallery.open(folder) as gallery:
        (hit,) = gallery.query(photos / "z3.jpg", embedder, 1, "photo")
        assert len(hit.copies) == 7
    assert verify_gallery(folder).problems == ()


@pytest.mark.parametrize("form", ["jpg", "png"])
def test_partly_readable_photos_are_recorded_also_for_their_copies(
    tmp_path: Path, embedder: Embedder, form: str
) -> None:
    photos, folder = tmp_path / "photos", tmp_path / "g.sbtk"
    photos.mkdir()
    noise = np.random.default_rng(0).integers(0, 256, (300, 200, 3), np.uint8)
    Image.fromarray(noise).save(photos / f"whole.{form}")
    data = (photos / f"whole.{form}").read_bytes()
    (photos / f"cut.{form}").write_bytes(data[: len(data) * 95 // 100])
    (photos / f"cut again.{form}").write_bytes(data[: len(data) * 95 // 100])
    (photos / f"half.{form}").write_bytes(data[: len(data) // 2])
    see_through = Image.new("RGBA", (40, 40), (200, 10, 10, 128))
    see_through.save(photos / "see-through.png")
    report = update_gallery(folder, [photos], embedder)
    assert (report.live, report.unreadable) == (4, 1)
    manifest = published_manifest(folder)
    with closing(CatalogueView(folder, manifest.generation, manifest.snapshot)) as view:
        partial = {Path(photo.path).stem: photo.partial for photo in view.photos()}
    reason = partial["cut"]
    assert reason is not None
    assert "partly readable" in reason
    assert partial == {"whole": None, "see-through": None, "cut": reason, "cut again": reason}
    (photos / f"cut.{form}").rename(photos / f"moved.{form}")
    update_gallery(folder, [photos], embedder)
    manifest = published_manifest(folder)
    with closing(CatalogueView(folder, manifest.generation, manifest.snapshot)) as view:
        assert sorted(os.fsencode(each.path) for each in view.photos() if each.partial) == [
            os.fsencode(photos / f"cut again.{form}"),
            os.fsencode(photos / f"moved.{form}"),
        ]
    (photos / f"moved.{form}").write_bytes(data)
    assert update_gallery(folder, [photos], embedder).changed == 1
    manifest = published_manifest(folder)
    with closing(CatalogueView(folder, manifest.generation, manifest.snapshot)) as view:
        assert sum(photo.partial is not None for photo in view.photos()) == 1
