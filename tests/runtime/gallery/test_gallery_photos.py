"""A gallery's photos, their folders, and similar photos."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from sbtk_runtime.errors import BadConfig, BadData, BadGallery
from sbtk_runtime.gallery.folder import VECTORS_NAME
from sbtk_runtime.gallery.gallery import Gallery
from tests.tiny import tiny_bundle, write_photos
from tests.tiny_gallery import code_gallery_of, gallery_of, index, photo_path, tiny_itq, unit_rows

COUNT, DIM = 60, 16


@pytest.fixture(scope="module")
def made_up(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A gallery of 60 random rows, ten photos to a folder; photo n has row n - 1."""
    folder = tmp_path_factory.mktemp("made-up") / "g.sbtk"
    gallery_of(folder, unit_rows(COUNT, DIM))
    return folder


def test_a_photo_is_found_by_its_id(made_up: Path) -> None:
    with Gallery.open(made_up) as gallery:
        photo = gallery.photo(7)
        assert photo is not None
        assert (photo.id, photo.path, photo.size_bytes, photo.mtime_ns, photo.row) == (
            *(7, os.fsdecode(photo_path(6))),
            *(1006, 6, 6),
        )
        assert len(photo.sha256) == 64
        assert [gallery.photo(wrong) for wrong in (0, -1, COUNT + 1, 1 << 63, 10**30)] == [None] * 5


def test_folders_are_counted_and_sorted(made_up: Path) -> None:
    with Gallery.open(made_up) as gallery:
        folders = gallery.folders()
    assert folders == {f"/photos/{number:04d}": 10 for number in range(6)}
    assert list(folders) == sorted(folders)


def test_similar_photos_are_the_nearest_embeddings_without_the_photo_itself(made_up: Path) -> None:
    rows = unit_rows(COUNT, DIM)
    truth = np.argsort(-(rows @ rows[11]), kind="stable")[1:6]
    with Gallery.open(made_up) as gallery:
        for search in ("auto", "hnsw", "exact"):
            answer = gallery.similar(12, 5, search)
            assert [hit.id - 1 for hit in answer.hits] == truth.tolist()
            assert [hit.rank for hit in answer.hits] == [1, 2, 3, 4, 5]
            assert answer.notices == ()


def test_similar_photos_can_be_limited_to_a_folder(made_up: Path) -> None:
    with Gallery.open(made_up) as gallery:
        own = gallery.similar(12, 20, under="/photos/0001")
        assert {hit.id for hit in own.hits} == set(range(11, 21)) - {12}
        assert "only 10 photos are searchable below /photos/0001" in own.notices[0]
        other = gallery.similar(12, 10, under="/photos/0002")
        assert {hit.id for hit in other.hits} == set(range(21, 31))
        assert other.notices == ()
        assert gallery.notices == []


def test_similar_photos_in_a_binary_gallery_are_those_of_near_codes(tmp_path: Path) -> None:
    itq = tiny_itq(64, 64)
    codes = itq.codes(unit_rows(40, 64))
    code_gallery_of(tmp_path / "g.sbtk", codes, itq)
    differing = np.unpackbits(codes ^ codes[3], axis=1).sum(axis=1)
    order = [row for row in np.lexsort((np.arange(40), differing)).tolist() if row != 3]
    with Gallery.open(tmp_path / "g.sbtk") as gallery:
        assert [hit.id - 1 for hit in gallery.similar(4, 6).hits] == order[:6]


def test_similar_photos_of_unknown_or_damaged_photos_are_refused(
    tmp_path: Path, made_up: Path
) -> None:
    with Gallery.open(made_up) as gallery:
        with pytest.raises(BadData, match="no photo 1000"):
            gallery.similar(1000)
        with pytest.raises(BadConfig, match="0 hits"):
            gallery.similar(1, 0)
    damaged = tmp_path / "g.sbtk"
    gallery_of(damaged, unit_rows(4, DIM))
    shard = next((damaged / VECTORS_NAME).iterdir())
    shard.write_bytes(bytes(2 * DIM) + shard.read_bytes()[2 * DIM :])
    with Gallery.open(damaged) as gallery, pytest.raises(BadGallery, match="photo 1 is damaged"):
        gallery.similar(1)


def test_a_gallery_of_one_photo_has_no_similar_ones(tmp_path: Path) -> None:
    gallery_of(tmp_path / "g.sbtk", unit_rows(1, DIM))
    with Gallery.open(tmp_path / "g.sbtk") as gallery:
        assert gallery.similar(1).hits == []


def test_notices_go_to_the_caller_of_the_query(made_up: Path) -> None:
    query = unit_rows(1, DIM, seed=5)[0]
    with Gallery.open(made_up) as gallery:
        answer = gallery.answer(query, 100)
        assert len(answer.hits) == COUNT
        assert answer.notices == ("only 60 photos are searchable, so there are fewer hits",)
        assert gallery.notices == []
        assert gallery.search(query, 100) == answer.hits
        assert gallery.notices == list(answer.notices)


def test_each_update_adds_its_roots(tmp_path: Path) -> None:
    bundle = tiny_bundle(tmp_path / "bundle")
    write_photos(tmp_path / "a", 2)
    single = write_photos(tmp_path / "b", 1, seed=1)[0]
    linked = tmp_path / "linked"
    linked.symlink_to("a")
    gallery = tmp_path / "g.sbtk"
    for root in (tmp_path / "a", single, tmp_path / "a", linked):
        index(gallery, root, bundle)
    with Gallery.open(gallery) as opened:
        assert opened.roots() == sorted(map(str, (tmp_path / "a", single, linked)))
