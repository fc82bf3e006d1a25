"""Sign codes find the candidates, follow updates, and are rebuilt when damaged."""

from __future__ import annotations

import hashlib
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from sbtk_runtime.binary_codes import Itq, code_words, word_distances
from sbtk_runtime.embedding.embedder import Embedder
from sbtk_runtime.errors import BadConfig, BadGallery
from sbtk_runtime.gallery import gallery as reading
from sbtk_runtime.gallery import search as searching
from sbtk_runtime.gallery import sign_codes
from sbtk_runtime.gallery.folder import VECTORS_NAME
from sbtk_runtime.gallery.gallery import Gallery, Search
from sbtk_runtime.gallery.neighbours import (
    NEIGHBOURS_NAME,
    load_neighbours,
    update_neighbours,
)
from sbtk_runtime.gallery.rows import SHARD_ROWS, Vectors
from sbtk_runtime.gallery.schema import CATALOGUE_NAME
from sbtk_runtime.gallery.sign_codes import SignCodes, drift, make_rotation
from sbtk_runtime.gallery.update import update_gallery
from sbtk_runtime.gallery.verify import verify_gallery
from sbtk_runtime.gallery.writer import Catalogue
from sbtk_runtime.generated_inputs import clustered_vectors
from sbtk_runtime.manifest import CodesRecord, read_gallery_manifest
from tests.tiny import write_photos
from tests.tiny_gallery import (
    code_gallery_of,
    gallery_of,
    make_old,
    photo_gallery,
    tiny_itq,
    unit_rows,
)

COUNT, DIM = 600, 24
QUERY = unit_rows(1, DIM, seed=9)[0]


def codes_of(folder: Path) -> CodesRecord:
    record = read_gallery_manifest(folder).codes
    assert record is not None
    return record


def expected_ids(rows: NDArray[np.float32], k: int = 10) -> list[int]:
    return [int(row) + 1 for row in np.argsort(-(rows @ QUERY), kind="stable")[:k]]


def shard_of(folder: Path) -> Path:
    return folder / codes_of(folder).folder / "000000.bits"


def damage(path: Path, *, is_hidden: bool = False) -> None:
    """Flip a bit of a file; when hidden, its time of modification stays what it was."""
    status = path.stat()
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    if is_hidden:
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def some_codes(count: int, dim: int) -> tuple[SignCodes, NDArray[np.float32]]:
    rows = clustered_vectors(count, dim, seed=1)
    rotation = replace(_rotation(rows), mean=rows.mean(axis=0))
    return SignCodes(rotation, [(0, rotation.codes(rows))]), rows


def _rotation(rows: NDArray[np.float32]) -> Itq:
    class Held(Vectors):
        def __init__(self) -> None:
            super().__init__(Path(), rows.shape[1])

        def read_bytes(
            self, numbers: NDArray[np.int64]
        ) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
            halves = np.ascontiguousarray(rows[numbers], dtype="<f2")
            return halves.view(np.uint8), np.ones(len(numbers), dtype=np.bool_)

    return make_rotation(Held(), np.arange(len(rows)))


@pytest.mark.parametrize("bits", [8, 24, 64, 72, 512])
def test_distances_equal_a_loop_over_bits(bits: int) -> None:
    codes = np.random.default_rng(bits).integers(0, 256, (9001, bits // 8), dtype=np.uint8)
    distances = word_distances(code_words(codes[:1]), code_words(codes))
    loop = (np.unpackbits(codes, axis=1) != np.unpackbits(codes[:1], axis=1)).sum(axis=1)
    np.testing.assert_array_equal(distances, loop)


@pytest.mark.parametrize("dim", [13, 24, 100])
def test_the_rotation_keeps_lengths_and_is_the_same_each_time(dim: int) -> None:
    rows = unit_rows(50, dim)
    first, again = _rotation(rows), _rotation(rows)
    assert first.to_bytes() == again.to_bytes()
    assert first.bits == -(-dim // 8) * 8
    turned = rows @ first.projection
    np.testing.assert_allclose(np.linalg.norm(turned, axis=1), 1.0, atol=1e-5)
    np.testing.assert_allclose(first.mean, rows.mean(axis=0), atol=1e-3)


def test_the_nearest_rows_are_among_the_candidates() -> None:
    codes, rows = some_codes(20_000, 128)
    queries = clustered_vectors(50, 128, seed=1, of=20_000)
    found = 0
    for query in queries:
        truth = np.argsort(-(rows @ query), kind="stable")[:10]
        found += len(set(codes.candidates(query, 200).tolist()) & set(truth.tolist()))
    assert found >= 0.99 * 10 * len(queries)


def test_candidates_equal_a_plain_loop() -> None:
    codes, rows = some_codes(3000, 40)
    query = unit_rows(1, 40, seed=3)[0]
    allowed = np.random.default_rng(0).random(2500) < 0.5
    rotation = codes.rotation
    bits = (rows - rotation.mean) @ rotation.projection > 0
    asked = (query - rotation.mean) @ rotation.projection > 0
    distances = (bits != asked).sum(axis=1)
    possible = [row for row in range(3000) if row < 2500 and allowed[row]]
    near = sorted(possible, key=lambda row: (distances[row], row))[: 7 * sign_codes.ESTIMATES]
    estimates = {row: float(bits[row] @ (query @ rotation.projection)) for row in near}
    truth = sorted(near, key=lambda row: -estimates[row])[:7]
    found = codes.candidates(query, 7, allowed).tolist()
    np.testing.assert_allclose(
        [estimates[row] for row in found], [estimates[row] for row in truth], atol=1e-5
    )


def test_fewer_rows_than_candidates_are_all_returned() -> None:
    codes, _ = some_codes(30, 16)
    query = unit_rows(1, 16)[0]
    assert sorted(codes.candidates(query, 500).tolist()) == list(range(30))
    assert codes.candidates(query, 5, np.zeros(30, dtype=np.bool_)).tolist() == []
    assert codes.candidates(query, 5, np.zeros(0, dtype=np.bool_)).tolist() == []


def test_not_all_of_many_identical_codes_are_scored() -> None:
    rotation = _rotation(unit_rows(50, 16))
    same = np.repeat(rotation.codes(unit_rows(1, 16)), 5000, axis=0)
    codes = SignCodes(rotation, [(0, same)])
    assert codes.candidates(unit_rows(1, 16)[0], 3).tolist() == [0, 1, 2]


def test_rows_of_several_shards_keep_their_numbers(tmp_path: Path) -> None:
    rows = unit_rows(90, 16)
    vectors = Vectors(tmp_path / "vectors", 16)
    vectors.append(SHARD_ROWS - 40, rows)
    numbers = np.arange(SHARD_ROWS - 40, SHARD_ROWS + 50)
    codes = SignCodes.of_vectors(vectors, numbers)
    assert len(codes) == 90
    assert codes.has_codes(np.array([3, SHARD_ROWS - 40, SHARD_ROWS + 50])).tolist() == [0, 1, 0]
    for place in (0, 39, 40, 89):
        assert codes.candidates(rows[place], 1)[0] == numbers[place]
        np.testing.assert_array_equal(
            codes.codes(numbers[place : place + 1]), codes.rotation.codes(rows[place : place + 1])
        )


def test_hits_by_codes_equal_exact_search(good: Path) -> None:
    rows = unit_rows(COUNT, DIM)
    with Gallery.open(good) as gallery:
        for k in (1, 10, 150, COUNT, 10**6):
            by_codes, exact = (gallery.search(QUERY, k, way) for way in ("codes", "exact"))
            assert [hit.id for hit in exact][:10] == expected_ids(rows, min(k, 10))
            assert by_codes == exact
        below = gallery.search(QUERY, 5, "codes", under="/photos/0003")
        assert below == gallery.search(QUERY, 5, "exact", under="/photos/0003")


def test_many_hits_are_searched_exactly(good: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(searching, "MOST_BY_CODES", 20)
    with Gallery.open(good) as gallery:
        assert len(gallery.search(QUERY, 21, "codes")) == 21
        assert len(gallery.search(QUERY, 10, "codes", offset=20)) == 10


def test_deleted_rows_are_not_candidates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "EXACT_BELOW", 50)
    rows = unit_rows(1100, DIM)
    order = np.argsort(-(rows @ QUERY), kind="stable")
    folder = tmp_path / "g.sbtk"
    manifest = gallery_of(folder, rows)
    with Catalogue(folder, 2) as catalogue:
        # The nearest thousand leave.
        catalogue.remove((order[:1000] + 1).tolist())
        vectors = Vectors(folder / "vectors", DIM)
        codes = sign_codes.update_codes(folder, catalogue, vectors, manifest.codes, print)
        snapshot = catalogue.write_snapshot()
    replace(manifest, generation=2, live=100, codes=codes, snapshot=snapshot).write(folder)
    with Gallery.open(folder) as gallery:
        exact = gallery.search(QUERY, 20, "exact")
        assert exact[0].id == order[1000] + 1
        for _ in range(2):
            assert gallery.search(QUERY, 20) == exact
        assert gallery.notices == []


def test_deleted_rows_are_no_candidates_of_verify(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    # Deleted rows and, after them, those that stay: four groups with few codes each.
    rows = np.tile(unit_rows(4, DIM), (275, 1)) + random.normal(scale=0.02, size=(1100, DIM))
    rows = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)
    folder = tmp_path / "g.sbtk"
    manifest = gallery_of(folder, rows)
    with Catalogue(folder, 2) as catalogue:
        catalogue.remove(range(1, 1001))
        vectors = Vectors(folder / "vectors", DIM)
        codes = sign_codes.update_codes(folder, catalogue, vectors, manifest.codes, print)
        snapshot = catalogue.write_snapshot()
    changed = replace(manifest, generation=2, live=100, codes=codes, snapshot=snapshot, graph=None)
    changed.write(folder)
    report = verify_gallery(folder)
    assert (report.problems, report.found) == ((), 100)


def test_verify_allows_more_photos_that_are_nearly_the_same_than_candidates(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    # Two groups, whose photos differ, but have few codes.
    rows = np.tile(unit_rows(2, 16), (1100, 1)) + random.normal(scale=0.02, size=(2200, 16))
    rows = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)
    folder = tmp_path / "g.sbtk"
    gallery_of(folder, rows, commit_every=1100)
    report = verify_gallery(folder)
    assert (report.problems, report.found) == ((), 256)


def test_codes_are_appended_and_nothing_else_is_written(tmp_path: Path, embedder: Embedder) -> None:
    photos, folder = photo_gallery(tmp_path, 20, embedder)
    first = codes_of(folder)
    rotation = (folder / first.folder / "rotation.npz").stat()
    head = shard_of(folder).read_bytes()
    write_photos(photos, 23)
    update_gallery(folder, [photos], embedder)
    second = codes_of(folder)
    assert (second.folder, second.rows, second.centred_rows) == (first.folder, 23, 20)
    assert shard_of(folder).read_bytes()[: len(head)] == head
    assert (folder / second.folder / "rotation.npz").stat() == rotation
    assert second.files["rotation.npz"] == first.files["rotation.npz"]
    for name, stamp in second.files.items():
        content = (folder / second.folder / name).read_bytes()
        assert (hashlib.sha256(content).hexdigest(), len(content)) == (
            stamp.sha256,
            stamp.size_bytes,
        )
    assert verify_gallery(folder).problems == ()
    update_gallery(folder, [photos], embedder)
    assert codes_of(folder) == second


def test_a_reader_of_an_older_generation_keeps_its_codes(
    tmp_path: Path, embedder: Embedder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "EXACT_BELOW", 4)
    photos, folder = photo_gallery(tmp_path, 6, embedder)
    manifest = read_gallery_manifest(folder)
    with Gallery.open(folder) as gallery:
        write_photos(photos, 8)
        update_gallery(folder, [photos], embedder)
        assert len(gallery.search(QUERY, 10, "codes")) == 6
    # Its shard has grown since, so its first rows are hashed.
    assert len(SignCodes.load(folder, manifest.codes or pytest.fail(), DIM)) == 6
    with Gallery.open(folder) as gallery:
        assert len(gallery.search(QUERY, 10, "codes")) == 8


@pytest.mark.parametrize("is_far", [False, True])
def test_the_centre_is_updated_after_many_changes(tmp_path: Path, is_far: bool) -> None:
    folder = tmp_path / "g.sbtk"
    # The first photos are all alike, as those of one day may be.
    first = unit_rows(50, DIM, seed=1) + (3.0 if is_far else 0.0)
    first /= np.linalg.norm(first, axis=1, keepdims=True)
    manifest = gallery_of(folder, first.astype(np.float32))
    vectors = Vectors(folder / "vectors", DIM)
    messages: list[str] = []
    with Catalogue(folder, 2) as catalogue:
        for batch in vectors.append(50, unit_rows(150, DIM, seed=2)):
            catalogue.commit([], [], [batch])
        catalogue.connection.execute(
            "INSERT INTO photos SELECT id + 50 * n, 2, NULL, NULL, CAST(path || n AS BLOB), "
            "size_bytes, mtime_ns, ctime_ns, inode, sha256, row + 50 * n, partial FROM photos, "
            "(SELECT 1 AS n UNION SELECT 2 UNION SELECT 3)"
        )
        record = sign_codes.update_codes(
            folder, catalogue, vectors, manifest.codes, messages.append
        )
    assert (record.folder, record.rows, record.centred_rows) == (
        "codes-2" if is_far else "codes-1",
        200,
        200,
    )
    assert bool(messages) == is_far
    codes = SignCodes.load(folder, record, DIM, is_hashed=True)
    assert drift(codes.rotation, vectors, np.arange(200)) < sign_codes.MOST_DRIFT


@pytest.mark.parametrize("name", ["000000.bits", "rotation.npz"])
@pytest.mark.parametrize("kind", ["missing", "short", "flipped", "of another gallery", "a link"])
def test_unusable_codes_are_reported_and_rebuilt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, embedder: Embedder, name: str, kind: str
) -> None:
    monkeypatch.setattr(reading, "EXACT_BELOW", 4)
    photos, folder = photo_gallery(tmp_path, 9, embedder)
    path = folder / codes_of(folder).folder / name
    content = path.read_bytes()
    if kind == "flipped":
        damage(path)
    elif kind == "short":
        path.write_bytes(content[:-1])
    else:
        path.unlink()
        if kind == "of another gallery":
            other = tmp_path / "other.sbtk"
            gallery_of(other, unit_rows(9, DIM, seed=3))
            shutil.copy(other / "codes-1" / name, path)
        if kind == "a link":
            path.symlink_to(tmp_path / "nowhere")
    with Gallery.open(folder) as gallery:
        (notice,) = gallery.notices
        assert name in notice and "sbtk index" in notice
        exact = gallery.search(QUERY, 5, "exact")
        assert gallery.search(QUERY, 5) == exact
        # Asked for by name, they are computed.
        assert gallery.search(QUERY, 5, "codes") == exact
        assert gallery.notices == [notice]
    (problem,) = verify_gallery(folder).problems
    assert name in problem
    messages: list[str] = []
    report = update_gallery(folder, [photos], embedder, notify=messages.append)
    assert (report.new, report.unchanged) == (0, 9)
    assert any("made again" in text for text in messages)
    assert codes_of(folder).folder == "codes-2"
    assert verify_gallery(folder).problems == ()


@pytest.mark.parametrize("is_stopped", [False, True])
def test_codes_are_made_again_when_the_catalogue_is_from_a_backup(
    tmp_path: Path, embedder: Embedder, is_stopped: bool
) -> None:
    photos, folder = photo_gallery(tmp_path, 9, embedder)
    shutil.copy(folder / CATALOGUE_NAME, tmp_path)
    update_gallery(folder, write_photos(tmp_path / "more", 3, seed=1), embedder)
    shutil.copy(tmp_path / CATALOGUE_NAME, folder)
    # They get the rows of those that the catalogue has lost.
    others = write_photos(tmp_path / "others", 4, seed=2)

    def stop(done: int, total: int | None, rate: float) -> None:
        if done == total:
            raise KeyboardInterrupt

    if is_stopped:
        with pytest.raises(KeyboardInterrupt):
            update_gallery(folder, [photos, *others], embedder, progress=stop)
    report = update_gallery(folder, [photos, *others], embedder)
    assert (report.new, report.live) == (0 if is_stopped else 4, 13)
    assert any("9 of 12 rows" in text for text in report.notices) != is_stopped
    assert verify_gallery(folder).problems == ()
    found = load_neighbours(folder, embedder.dim)
    (folder / NEIGHBOURS_NAME).unlink()
    vectors = Vectors(folder / VECTORS_NAME, embedder.dim)
    update_neighbours(folder, vectors, found.rows, lambda text: None)
    assert np.array_equal(found.near, load_neighbours(folder, embedder.dim).near)
    assert update_gallery(folder, [photos], embedder).notices == ()


def test_hidden_damage_is_found_by_verify_and_repaired(tmp_path: Path, embedder: Embedder) -> None:
    photos, folder = photo_gallery(tmp_path, 9, embedder)
    damage(shard_of(folder), is_hidden=True)
    update_gallery(folder, [photos], embedder)
    (problem,) = verify_gallery(folder).problems
    assert "000000.bits" in problem and "--repair" in problem
    verify_gallery(folder, repair=True)
    assert update_gallery(folder, [photos], embedder).unchanged == 9
    assert verify_gallery(folder).problems == ()


def test_an_append_does_not_certify_hidden_damage(tmp_path: Path, embedder: Embedder) -> None:
    photos, folder = photo_gallery(tmp_path, 9, embedder)
    damage(shard_of(folder), is_hidden=True)
    write_photos(photos, 10)
    update_gallery(folder, [photos], embedder)
    assert codes_of(folder).folder == "codes-2"
    assert verify_gallery(folder).problems == ()


def test_hidden_damage_of_the_snapshot_is_found_by_verify_and_repaired(
    tmp_path: Path, embedder: Embedder
) -> None:
    photos, folder = photo_gallery(tmp_path, 9, embedder)
    snapshot = folder / "catalogue-1.sqlite"
    damage(snapshot, is_hidden=True)
    assert any(snapshot.name in text for text in verify_gallery(folder).problems)
    verify_gallery(folder, repair=True)
    update_gallery(folder, [photos], embedder)
    assert verify_gallery(folder).problems == ()


def test_codes_of_other_embeddings_are_found_by_verify(folder: Path) -> None:
    rows = unit_rows(COUNT, DIM)
    record = codes_of(folder)
    rotation = SignCodes.load(folder, record, DIM).rotation
    path = shard_of(folder)
    path.write_bytes(rotation.codes(rows[::-1].copy()).tobytes())
    stamp = sign_codes._stamp(path)
    manifest = read_gallery_manifest(folder)
    replace(manifest, codes=replace(record, files={**record.files, path.name: stamp})).write(folder)
    (problem,) = verify_gallery(folder).problems
    assert "sign codes" in problem and "wrong" in problem


def test_a_file_with_its_timestamps_unchanged_is_not_hashed(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "EXACT_BELOW", 10)

    def refuse(path: Path) -> str:
        raise AssertionError(f"{path} is hashed")

    from sbtk_runtime.gallery import schema

    monkeypatch.setattr(schema, "sha256_of_file", refuse)
    with Gallery.open(folder) as gallery:
        assert len(gallery.search(QUERY, 3)) == 3
    os.utime(folder / "catalogue-1.sqlite")
    with pytest.raises(AssertionError, match="catalogue-1"):
        Gallery.open(folder)


@pytest.mark.parametrize("search", ["codes", "exact"])
def test_vectors_truncated_during_a_search_give_no_wrong_hits(
    folder: Path, monkeypatch: pytest.MonkeyPatch, search: Search
) -> None:
    monkeypatch.setattr(reading, "EXACT_BELOW", 10)
    with Gallery.open(folder) as gallery:
        assert len(gallery.search(QUERY, 10, search)) == 10
        os.truncate(folder / "vectors" / "000000.f16", 100 * 2 * DIM)
        hits = gallery.search(QUERY, 10, search)
        left = unit_rows(COUNT, DIM)[:100]
        assert [hit.id for hit in hits] == expected_ids(left)
        assert any(f"{COUNT - 100} of {COUNT} photos" in text for text in gallery.notices)


def test_an_older_gallery_gets_codes_without_embedding_anything(
    tmp_path: Path, embedder: Embedder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "EXACT_BELOW", 4)
    photos, folder = photo_gallery(tmp_path, 9, embedder)
    make_old(folder)
    assert read_gallery_manifest(folder).format == 1
    with Gallery.open(folder) as gallery:
        exact = gallery.search(QUERY, 5)
        assert "no sign codes yet" in gallery.notices[0]
        assert gallery.search(QUERY, 5, "codes") == exact
    report = update_gallery(folder, [photos], embedder)
    assert (report.new, report.changed, report.unchanged) == (0, 0, 9)
    manifest = read_gallery_manifest(folder)
    assert (manifest.format, manifest.live) == (3, 9)
    with Gallery.open(folder) as gallery:
        assert gallery.search(QUERY, 5) == exact
        assert gallery.notices == []


def test_binary_galleries_have_no_sign_codes(tmp_path: Path) -> None:
    itq = tiny_itq(DIM, 16)
    manifest = code_gallery_of(tmp_path / "g", itq.codes(unit_rows(30, DIM)), itq)
    assert (manifest.format, manifest.codes) == (2, None)
    with Gallery.open(tmp_path / "g") as gallery, pytest.raises(BadConfig, match="no embeddings"):
        gallery.search(QUERY, 3, "codes")


def test_a_record_of_another_width_is_refused(folder: Path) -> None:
    record = codes_of(folder)
    with pytest.raises(BadGallery, match="codes of 24 numbers"):
        SignCodes.load(folder, record, DIM + 8)
    with pytest.raises(BadGallery, match="24-bit codes of 24 numbers"):
        SignCodes.load(folder, replace(record, bits=16), DIM)
