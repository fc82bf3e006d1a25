"""Rows and codes are read as written, damaged rows never; a search equals a loop."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from sbtk_runtime.binary_codes import Codes
from sbtk_runtime.errors import BadData
from sbtk_runtime.gallery import rows as module
from sbtk_runtime.gallery.rows import CHUNK_ROWS, CodeShards, Vectors, codes_of
from sbtk_runtime.gallery.search import hamming_search
from tests.tiny_gallery import tiny_itq, unit_rows


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SHARD_ROWS", 10)
    monkeypatch.setattr(module, "CHUNK_BYTES", 64)


def test_rows_are_the_written_ones_in_float16_with_unit_length(tmp_path: Path) -> None:
    store = Vectors(tmp_path / "vectors", 512)
    written = unit_rows(100, 512)
    store.append(0, written)
    rows, is_whole = store.read(np.arange(100))
    assert is_whole.all()
    halves = written.astype(np.float16).astype(np.float32)
    expected = halves / np.linalg.norm(halves, axis=1, keepdims=True)
    np.testing.assert_allclose(rows, expected, atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1.0, atol=1e-6)


def test_subnormal_halves_survive(tmp_path: Path) -> None:
    row = np.zeros((1, 4), dtype=np.float32)
    row[0] = (1.0, 3e-6, -3e-6, 0.0)
    store = Vectors(tmp_path / "vectors", 4)
    store.append(0, row)
    read, _ = store.read(np.array([0]))
    np.testing.assert_array_equal(read[0, 1:], row[0, 1:].astype(np.float16).astype(np.float32))


@pytest.mark.usefixtures("small_shards")
def test_appends_cross_shards_and_any_rows_can_be_read(tmp_path: Path) -> None:
    store = Vectors(tmp_path / "vectors", 8)
    written = unit_rows(47, 8)
    batches = [*store.append(0, written[:7]), *store.append(7, written[7:])]
    assert [batch.first_row for batch in batches] == [0, 7, 10, 20, 30, 40]
    assert all(store.is_intact(batch) for batch in batches)
    wanted = np.array([0, 3, 9, 10, 11, 39, 46])
    rows, is_whole = store.read(wanted)
    assert is_whole.all()
    np.testing.assert_allclose(rows, written[wanted], atol=1e-3)
    assert store.shard_indices() == [0, 1, 2, 3, 4]


def test_chunks_stream_any_number_of_rows(tmp_path: Path) -> None:
    store = Vectors(tmp_path / "vectors", 4)
    store.append(0, unit_rows(3 * CHUNK_ROWS + 100, 4))
    from_stream = list(store.chunks(iter(range(3 * CHUNK_ROWS + 100))))
    from_array = list(store.chunks(np.arange(3 * CHUNK_ROWS + 100)))
    assert [len(rows) for rows, _, _ in from_stream] == [CHUNK_ROWS] * 3 + [100]
    for one, other in zip(from_stream, from_array, strict=True):
        np.testing.assert_array_equal(one[1], other[1])


@pytest.mark.parametrize("bad", [np.nan, np.inf, 0.0])
def test_rows_without_unit_length_are_refused(tmp_path: Path, bad: float) -> None:
    store = Vectors(tmp_path / "vectors", 4)
    rows = unit_rows(3, 4)
    rows[1] = bad
    with pytest.raises(BadData):
        store.append(0, rows)
    assert store.shard_indices() == []


def test_another_width_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadData, match=r"\(2, 5\)"):
        Vectors(tmp_path / "vectors", 4).append(0, unit_rows(2, 5))


@pytest.mark.usefixtures("small_shards")
def test_cut_removes_uncommitted_rows(tmp_path: Path) -> None:
    store = Vectors(tmp_path / "vectors", 4)
    store.append(0, unit_rows(25, 4))
    store.cut(13)
    assert store.shard_indices() == [0, 1]
    assert store.missing(13) == []
    assert store.missing(15) == [(13, 15)]
    store.append(13, unit_rows(4, 4, seed=1))
    rows, is_whole = store.read(np.arange(17))
    assert is_whole.all()
    np.testing.assert_allclose(rows[13:], unit_rows(4, 4, seed=1), atol=1e-3)


def test_missing_and_damaged_rows_are_read_as_zeros(tmp_path: Path) -> None:
    store = Vectors(tmp_path / "vectors", 4)
    (batch,) = store.append(0, unit_rows(6, 4))
    path = tmp_path / "vectors" / "000000.f16"
    data = bytearray(path.read_bytes())
    data[8:16] = b"\xff" * 8  # row 1: NaN
    path.write_bytes(data[:44])  # row 5 is cut in half
    rows, is_whole = store.read(np.arange(8))
    assert is_whole.tolist() == [True, False, True, True, True, False, False, False]
    assert not rows[~is_whole].any()
    assert not store.is_intact(batch)


def test_a_reader_keeps_shards_that_a_writer_removed(tmp_path: Path) -> None:
    writer, reader = (Vectors(tmp_path / "vectors", 4) for _ in range(2))
    writer.append(0, unit_rows(3, 4))
    reader.hold()
    writer.remove_shards([0])
    assert reader.read(np.arange(3))[1].all()
    assert not writer.read(np.arange(3))[1].any()
    reader.close()
    assert not reader.read(np.arange(3))[1].any()
    assert list((tmp_path / "vectors").iterdir()) == []


def random_codes(count: int, bits: int, seed: int = 0) -> Codes:
    """Return packed codes of independent bits."""
    drawn = np.random.default_rng(seed).integers(0, 256, (count, bits // 8), dtype=np.uint8)
    return np.asarray(drawn)


def by_loop(codes: Codes, query: Codes, rows: list[int]) -> list[tuple[int, int]]:
    """Return (distance, row) of each row, nearest first, counted bit by bit."""
    wanted = [int(byte) for byte in query]
    return sorted(
        (sum((int(a) ^ b).bit_count() for a, b in zip(codes[row], wanted, strict=True)), row)
        for row in rows
    )


@pytest.mark.usefixtures("small_shards")
@pytest.mark.parametrize("bits", [8, 24, 64, 128])
def test_codes_cross_shards_and_take_one_bit_per_bit(tmp_path: Path, bits: int) -> None:
    store = CodeShards(tmp_path / "vectors", bits)
    written = random_codes(47, bits)
    batches = [*store.append(0, written[:7]), *store.append(7, written[7:])]
    assert [batch.first_row for batch in batches] == [0, 7, 10, 20, 30, 40]
    assert all(store.is_intact(batch) for batch in batches)
    wanted = np.array([0, 3, 9, 10, 11, 39, 46])
    codes, is_held = store.read(wanted)
    assert is_held.all()
    np.testing.assert_array_equal(codes, written[wanted])
    size_bytes = sum(path.stat().st_size for path in (tmp_path / "vectors").iterdir())
    assert size_bytes == 47 * bits // 8


@pytest.mark.usefixtures("small_shards")
def test_codes_beyond_a_truncated_shard_are_missing(tmp_path: Path) -> None:
    store = CodeShards(tmp_path / "vectors", 16)
    (batch,) = store.append(0, random_codes(6, 16))
    path = tmp_path / "vectors" / "000000.bits"
    path.write_bytes(path.read_bytes()[:7])  # row 3 is cut in half
    codes, is_held = store.read(np.arange(12))
    assert is_held.tolist() == [True] * 3 + [False] * 9
    assert not codes[~is_held].any()
    assert not store.is_intact(batch)
    assert store.missing(6) == [(3, 6)]


def test_missing_rows_of_a_truncated_shard_are_not_mistaken_for_others(tmp_path: Path) -> None:
    store = CodeShards(tmp_path / "vectors", 16)
    written = random_codes(12, 16)
    store.append(0, written)
    path = tmp_path / "vectors" / "000000.bits"
    path.write_bytes(path.read_bytes()[:6])  # as many rows as are asked for
    codes, is_held = store.read(np.array([0, 5, 9]))
    assert is_held.tolist() == [True, False, False]
    np.testing.assert_array_equal(codes[0], written[0])


def test_shards_from_before_the_first_commit_are_removed(tmp_path: Path) -> None:
    folder = tmp_path / "vectors"
    CodeShards(folder, 16).append(0, random_codes(6, 16))
    other = CodeShards(folder, 16)
    other.cut(6)
    assert other.shard_indices() == [0]
    (folder / "000000.f16").write_bytes(b"left behind")
    other.cut(0)
    assert list(folder.iterdir()) == []


@pytest.mark.usefixtures("small_shards")
@pytest.mark.parametrize("k", [1, 10, 40, 300])
def test_the_nearest_codes_equal_a_loop_and_include_all_ties(tmp_path: Path, k: int) -> None:
    # Codes of 8 bits tie everywhere. Some rows are not asked for.
    written = random_codes(100, 8)
    store = CodeShards(tmp_path / "vectors", 8)
    store.append(0, written)
    rows = np.array([row for row in range(100) if row % 7 or row > 60])
    query = random_codes(1, 8, seed=1)[0]
    expected = by_loop(written, query, rows.tolist())
    if k < len(rows):
        farthest = expected[k - 1][0]
        expected = [pair for pair in expected if pair[0] <= farthest]
        assert len(expected) > k or k == 1
    found, distances = hamming_search(store, rows, query, k)
    assert list(zip(distances.tolist(), found.tolist(), strict=True)) == expected


def test_missing_rows_are_never_found(tmp_path: Path) -> None:
    store = CodeShards(tmp_path / "vectors", 16)
    store.append(0, random_codes(5, 16))
    zeros = np.zeros(2, dtype=np.uint8)
    found, _ = hamming_search(store, np.arange(9), zeros, 9)
    assert sorted(found.tolist()) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("bad", [np.nan, np.inf, 0.0])
def test_rows_without_unit_length_give_no_code(bad: float) -> None:
    rows = unit_rows(3, 16)
    assert codes_of(rows, tiny_itq(16, 8)).shape == (3, 1)
    rows[1] = bad
    with pytest.raises(BadData, match="length 1"):
        codes_of(rows, tiny_itq(16, 8))


@pytest.mark.parametrize(
    "codes", [np.zeros((2, 3), np.uint8), np.zeros((2, 2), np.int8), np.zeros(2, np.uint8)]
)
def test_codes_of_another_shape_are_refused(tmp_path: Path, codes: Codes) -> None:
    with pytest.raises(BadData, match=r"\(N, 2\) uint8"):
        CodeShards(tmp_path / "vectors", 16).append(0, codes)
