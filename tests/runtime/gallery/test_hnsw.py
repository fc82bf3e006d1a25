"""The graph finds what exact search finds, and only files that sbtk wrote reach hnswlib."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from sbtk_runtime.errors import BadGallery, DiskFull
from sbtk_runtime.gallery.hnsw import Graph, build_graph, check_graph_file
from sbtk_runtime.gallery.rows import Vectors
from sbtk_runtime.gallery.search import exact_search
from sbtk_runtime.manifest import GraphRecord
from tests.tiny_gallery import unit_rows

COUNT, DIM = 700, 24


def built(seed: int = 0) -> tuple[Graph, NDArray[np.float32]]:
    rows = unit_rows(COUNT, DIM, seed)
    graph = Graph.new(DIM, COUNT)
    graph.add(np.arange(COUNT), rows)
    return graph, rows


def saved(folder: Path) -> tuple[GraphRecord, NDArray[np.float32]]:
    graph, rows = built()
    record = graph.save(folder / "graph-1.hnsw", (np.arange(0, COUNT, 99), rows[::99]))
    return record, rows


def test_recall_is_close_to_exact_search() -> None:
    graph, rows = built()
    recalls = []
    for query in unit_rows(50, DIM, seed=1):
        truth = np.argsort(-(rows @ query), kind="stable")[:10]
        found, scores = graph.search(query, 10)
        recalls.append(len(set(found) & set(truth)) / 10)
        np.testing.assert_allclose(scores, rows[found] @ query, atol=1e-5)
        assert (np.diff(scores) <= 1e-6).all()
    assert np.mean(recalls) > 0.99


def test_a_saved_graph_gives_the_same_hits_and_keeps_its_ef(tmp_path: Path) -> None:
    graph, rows = built()
    query = unit_rows(1, DIM, seed=2)[0]
    before = graph.search(query, 20)
    record = graph.save(tmp_path / "graph-1.hnsw", (np.array([3, 5]), rows[[3, 5]]))
    assert record.count == COUNT
    loaded = Graph.load(tmp_path, record, DIM)
    assert (loaded.ef, loaded.m, loaded.ef_construction) == (128, 16, 200)
    np.testing.assert_array_equal(loaded.search(query, 20)[0], before[0])
    assert [path.name for path in tmp_path.iterdir()] == ["graph-1.hnsw"]


def test_dropped_rows_are_never_found_even_after_a_save(tmp_path: Path) -> None:
    record, rows = saved(tmp_path)
    graph = Graph.load(tmp_path, record, DIM, room_for=5)
    dropped = list(range(0, COUNT, 2))
    graph.drop([*dropped, 10**6])
    graph.add(np.arange(COUNT, COUNT + 5), unit_rows(5, DIM, seed=9))
    second = graph.save(tmp_path / "graph-2.hnsw", (np.array([1]), rows[[1]]))
    loaded = Graph.load(tmp_path, second, DIM)
    assert loaded.count == COUNT + 5
    for query in rows[:40]:
        found, _ = loaded.search(query, 10)
        assert len(found) == 10
        assert not set(found) & set(dropped)
    assert loaded.search(unit_rows(5, DIM, seed=9)[2], 1)[0][0] == COUNT + 2


def test_more_hits_than_ef_or_rows_can_be_requested() -> None:
    graph = Graph.new(4, 30)
    graph.add(np.arange(30), unit_rows(30, 4))
    assert len(graph.search(unit_rows(1, 4, seed=1)[0], 30)[0]) == 30
    assert len(graph.search(unit_rows(1, 4, seed=1)[0], 500)[0]) <= 30
    wide, _ = built()
    found, _ = wide.search(unit_rows(1, DIM, seed=1)[0], 500)
    assert len(set(found)) == 500
    assert wide.ef == 128


def test_foreign_content_of_a_graph_is_detected(tmp_path: Path) -> None:
    graph, rows = built()
    with pytest.raises(BadGallery, match="does not hold"):
        graph.save(tmp_path / "graph-1.hnsw", (np.array([3]), rows[[4]]))
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    graph, rows = built()
    with pytest.raises((DiskFull, OSError)):
        graph.save(tmp_path / "missing" / "graph-1.hnsw", (np.array([3]), rows[[3]]))


@pytest.mark.parametrize("change", [{"count": COUNT - 1}, {"m": 32}])
def test_a_record_that_contradicts_the_header_is_refused(
    tmp_path: Path, change: dict[str, int]
) -> None:
    record, _ = saved(tmp_path)
    check_graph_file(tmp_path / record.file, record, DIM)
    other = dataclasses.replace(record, **change)  # type: ignore[arg-type]
    with pytest.raises(BadGallery, match="is not a graph of"):
        Graph.load(tmp_path, other, DIM)


@pytest.mark.parametrize("dim", [DIM - 1, DIM + 1, 512])
def test_another_width_is_refused_before_hnswlib_reads_past_a_row(tmp_path: Path, dim: int) -> None:
    record, _ = saved(tmp_path)
    with pytest.raises(BadGallery, match=f"of {dim} numbers"):
        Graph.load(tmp_path, record, dim)


def test_damaged_rows_are_not_added_to_the_graph(tmp_path: Path) -> None:
    vectors = Vectors(tmp_path / "vectors", DIM)
    vectors.append(0, unit_rows(100, DIM))
    path = tmp_path / "vectors" / "000000.f16"
    data = bytearray(path.read_bytes())
    data[2 * DIM * 7 : 2 * DIM * 8] = b"\x00" * (2 * DIM)
    path.write_bytes(data)
    graph = build_graph(vectors, np.arange(100))
    assert graph.count == 99
    assert 7 not in graph.search(unit_rows(100, DIM)[7], 99)[0]


def test_exact_search_breaks_ties_by_row(tmp_path: Path) -> None:
    vectors = Vectors(tmp_path / "vectors", 4)
    vectors.append(0, np.repeat(unit_rows(2, 4), 3000, axis=0))
    rows, scores = exact_search(vectors, np.arange(6000), unit_rows(2, 4)[1], 5)
    assert rows.tolist() == [3000, 3001, 3002, 3003, 3004]
    np.testing.assert_allclose(scores, 1.0, atol=1e-6)


def test_exact_search_equals_a_loop_over_all_rows(tmp_path: Path) -> None:
    vectors = Vectors(tmp_path / "vectors", DIM)
    vectors.append(0, unit_rows(3000, DIM))
    allowed = np.flatnonzero(np.random.default_rng(3).random(3000) < 0.1)
    query = unit_rows(1, DIM, seed=4)[0]
    rows, scores = exact_search(vectors, allowed, query, 50)
    truth = sorted(
        ((float(vectors.read(np.array([row]))[0][0] @ query), -row) for row in allowed.tolist()),
        reverse=True,
    )[:50]
    assert rows.tolist() == [-row for _, row in truth]
    np.testing.assert_allclose(scores, [score for score, _ in truth], atol=1e-6)
