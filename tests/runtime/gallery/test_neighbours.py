"""The nearest neighbours of photos, as stored for re-ranking."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from sbtk_runtime.errors import BadGallery
from sbtk_runtime.gallery.neighbours import (
    NEIGHBOURS_NAME,
    Neighbours,
    load_neighbours,
    update_neighbours,
)
from sbtk_runtime.gallery.rows import Vectors
from sbtk_runtime.rerank import NEIGHBOURS

DIM = 12


@pytest.fixture
def vectors(tmp_path: Path) -> Vectors:
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(90, DIM))
    vectors = Vectors(tmp_path / "vectors", DIM)
    vectors.append(0, (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32))
    return vectors


def expected(vectors: Vectors, rows: NDArray[np.int64]) -> list[set[int]]:
    """Return each row's nearest others with a positive cosine, by a plain loop."""
    embeddings, _ = vectors.read(rows)
    found = []
    for own, embedding in zip(rows, embeddings, strict=True):
        cosines = {int(r): float(c) for r, c in zip(rows, embeddings @ embedding, strict=True)}
        del cosines[int(own)]
        best = sorted((row for row in cosines if cosines[row] > 0), key=lambda r: -cosines[r])
        found.append(set(best[:NEIGHBOURS]))
    return found


def named(neighbours: Neighbours) -> list[set[int]]:
    return [{row for row in near if row >= 0} for near in neighbours.near.tolist()]


@settings(max_examples=25)
@given(chosen=st.sets(st.integers(0, 89), min_size=1, max_size=60), seed=st.integers(0, 10_000))
def test_incremental_neighbours_equal_those_computed_at_once(
    chosen: set[int], seed: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("gallery")
    rng = np.random.default_rng(seed)
    rows = rng.normal(size=(90, DIM))
    vectors = Vectors(folder / "vectors", DIM)
    vectors.append(0, (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32))
    every = np.array(sorted(chosen))
    for share in (0.3, 0.7, 1.0):
        part = every[: max(1, round(share * len(every)))]
        update_neighbours(folder, vectors, part, lambda text: None)
    assert named(load_neighbours(folder, DIM)) == expected(vectors, every)


def test_removed_photos_are_no_longer_neighbours(tmp_path: Path, vectors: Vectors) -> None:
    rows = np.arange(90)
    update_neighbours(tmp_path, vectors, rows, lambda text: None)
    left = rows[rows % 9 != 0]  # few enough that the others' neighbours are kept
    update_neighbours(tmp_path, vectors, left, lambda text: None)
    found = load_neighbours(tmp_path, DIM)
    assert found.rows.tolist() == left.tolist()
    best = expected(vectors, rows)
    for row, near in zip(left.tolist(), named(found), strict=True):
        assert near == {other for other in best[row] if other % 9}
    update_neighbours(tmp_path, vectors, np.arange(0, 90, 2), lambda text: None)
    assert named(load_neighbours(tmp_path, DIM)) == expected(vectors, np.arange(0, 90, 2))


def test_neighbours_are_given_by_their_places_among_the_hits(
    tmp_path: Path, vectors: Vectors
) -> None:
    update_neighbours(tmp_path, vectors, np.arange(80), lambda text: None)
    neighbours = load_neighbours(tmp_path, DIM)
    hits = np.random.default_rng(1).permutation(90)[:40]  # some are not known
    places, similarities = neighbours.among(hits)
    embeddings, _ = vectors.read(np.arange(90))
    assert places.shape == similarities.shape == (40, NEIGHBOURS)
    for hit, near, cosines in zip(hits.tolist(), places.tolist(), similarities, strict=True):
        if hit >= 80:
            assert set(near) == {-1}
            continue
        kept = [place for place in near if place >= 0]
        wanted = expected(vectors, np.arange(80))[hit] & set(hits.tolist())
        assert {int(hits[place]) for place in kept} == wanted
        for place, cosine in zip(near, cosines, strict=True):
            if place >= 0:
                assert cosine == pytest.approx(embeddings[hit] @ embeddings[hits[place]], abs=2e-3)


def test_an_empty_file_has_no_neighbours(tmp_path: Path, vectors: Vectors) -> None:
    update_neighbours(tmp_path, vectors, np.array([5]), lambda text: None)
    places, _ = load_neighbours(tmp_path, DIM).among(np.array([5, 6]))
    assert (places == -1).all()


def test_unchanged_neighbours_are_not_written_again(tmp_path: Path, vectors: Vectors) -> None:
    update_neighbours(tmp_path, vectors, np.arange(30), lambda text: None)
    before = (tmp_path / NEIGHBOURS_NAME).stat().st_mtime_ns
    update_neighbours(tmp_path, vectors, np.arange(30), lambda text: None)
    assert (tmp_path / NEIGHBOURS_NAME).stat().st_mtime_ns == before


def test_damage_is_detected_and_repaired(tmp_path: Path, vectors: Vectors) -> None:
    rows = np.arange(60)
    update_neighbours(tmp_path, vectors, rows, lambda text: None)
    path = tmp_path / NEIGHBOURS_NAME
    whole = path.read_bytes()
    good = named(load_neighbours(tmp_path, DIM))
    rng = np.random.default_rng(2)
    for _ in range(150):
        spoilt = bytearray(whole)
        where = int(rng.integers(len(spoilt)))
        spoilt[where] ^= int(rng.integers(1, 256))
        path.write_bytes(bytes(spoilt) if rng.random() < 0.8 else whole[:where])
        try:
            found = load_neighbours(tmp_path, DIM)
        except BadGallery:
            continue
        # Bytes of the archive that hold no data, such as a date, change nothing.
        assert named(found) == good
    path.write_bytes(whole[: len(whole) // 2])
    update_neighbours(tmp_path, vectors, rows, lambda text: None)
    assert named(load_neighbours(tmp_path, DIM)) == good


def test_missing_neighbours_and_those_of_another_width_are_refused(
    tmp_path: Path, vectors: Vectors
) -> None:
    with pytest.raises(BadGallery, match="has no neighbours"):
        load_neighbours(tmp_path, DIM)
    update_neighbours(tmp_path, vectors, np.arange(30), lambda text: None)
    with pytest.raises(BadGallery, match="another gallery or version of sbtk"):
        load_neighbours(tmp_path, DIM + 1)


def test_every_error_of_zipfile_counts_as_damage(tmp_path: Path, vectors: Vectors) -> None:
    update_neighbours(tmp_path, vectors, np.arange(20), lambda text: None)
    path = tmp_path / NEIGHBOURS_NAME
    whole = path.read_bytes()
    directory = whole.rindex(b"PK\1\2")
    for place in range(directory, directory + 46):
        for value in (1, 99, 255):
            path.write_bytes(whole[:place] + bytes([value]) + whole[place + 1 :])
            try:
                load_neighbours(tmp_path, DIM)
            except BadGallery as problem:
                assert problem.next_step


def test_the_error_for_another_file_does_not_advise_to_unpickle_it(tmp_path: Path) -> None:
    (tmp_path / NEIGHBOURS_NAME).write_text("text")
    with pytest.raises(BadGallery, match="is damaged: not a zip file"):
        load_neighbours(tmp_path, DIM)
