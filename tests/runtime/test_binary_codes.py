"""Binary codes: ITQ against its definition and a plain version, Hamming against counted bits."""

from __future__ import annotations

import io
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from sbtk_runtime import binary_codes
from sbtk_runtime.binary_codes import Itq, Rotation, fit_itq, hamming_distances
from sbtk_runtime.errors import BadConfig, BadData, BadModel

Rows = NDArray[np.float32]


def _rows(count: int = 200, dim: int = 24, seed: int = 0) -> Rows:
    """Return rows of a few clusters, off centre, with axes of unequal variance."""
    random = np.random.default_rng(seed)
    centres = random.standard_normal((6, dim)) * np.linspace(3, 0.5, dim)
    rows = centres[random.integers(0, 6, count)] + random.standard_normal((count, dim))
    return np.asarray(rows + 5, dtype=np.float32)


def _published(
    fitted: Rows, other: Rows, bits: int, rotation: Rotation
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Return both sides' bits, each about its own mean, by the steps of method 1.5 as they read.

    The axes' signs are ITQ's own to choose: here as the product chooses them.
    """
    train = fitted - fitted.mean(axis=0, dtype=np.float64)
    test = other - other.mean(axis=0, dtype=np.float64)
    variances, axes = np.linalg.eigh(np.cov(train, rowvar=False))
    axes = axes[:, variances.argsort()[::-1]][:, :bits]
    axes = axes * np.sign(axes[np.abs(axes).argmax(axis=0), range(bits)])
    values = train @ axes
    np.random.seed(50)
    turn = np.linalg.svd(np.random.randn(bits, bits))[0]
    for _ in range(50):
        signs = np.sign(values @ turn)
        left, _, right = np.linalg.svd(signs.T @ values)
        turn = (right.T if rotation == "procrustes" else right) @ left.T
    return train @ axes @ turn > 0, test @ axes @ turn > 0


def _unpacked(codes: NDArray[np.uint8]) -> NDArray[np.bool_]:
    return np.unpackbits(codes, axis=1).astype(bool)


@pytest.mark.parametrize("rotation", ["procrustes", "released"])
def test_codes_follow_the_published_steps(rotation: Rotation) -> None:
    queries, gallery = _rows(), _rows(150, seed=1)
    itq = fit_itq(queries, 16, rotation=rotation)
    own, other = _published(queries, gallery, 16, rotation)
    agreement = (_unpacked(itq.codes(queries)) == own).mean()
    assert agreement > 0.999
    assert (_unpacked(itq.centred_on(gallery).codes(gallery)) == other).mean() > 0.999
    assert (_unpacked(itq.codes(gallery)) == other).mean() < 0.999


def test_the_rotation_has_a_lower_quantisation_error_than_axes_or_the_released_one() -> None:
    rows = _rows(400)

    def loss(itq: Itq) -> float:
        values = (rows - itq.mean) @ itq.projection
        return float(((np.sign(values) - values) ** 2).sum())

    fitted = loss(fit_itq(rows, 16))
    assert fitted < loss(fit_itq(rows, 16, iterations=0))
    assert fitted < loss(fit_itq(rows, 16, rotation="released"))
    assert fitted <= loss(fit_itq(rows, 16, iterations=5))


def test_the_projection_is_orthonormal_and_spans_the_largest_variances() -> None:
    rows = _rows()
    itq = fit_itq(rows, 8)
    assert itq.projection.shape == (24, 8)
    np.testing.assert_allclose(itq.projection.T @ itq.projection, np.eye(8), atol=1e-5)
    kept = float((((rows - itq.mean) @ itq.projection) ** 2).sum())
    variances = np.linalg.eigvalsh(np.cov(rows.astype(np.float64), rowvar=False))
    assert kept == pytest.approx(variances[-8:].sum() * (len(rows) - 1), rel=1e-4)


def test_codes_of_a_case_worked_by_hand() -> None:
    itq = Itq(np.full(8, 0.5, dtype=np.float32), np.eye(8, dtype=np.float32))
    rows = np.array([[1, 0, 0, 0, 0, 0, 0, 1], [0.5, 0.6, 0, 0, 0, 0, 0, 0]], dtype=np.float32)
    assert itq.codes(rows).tolist() == [[0b10000001], [0b01000000]]


def test_chunks_of_rows_do_not_change_codes() -> None:
    rows = np.tile(_rows(300), (30, 1))
    itq = fit_itq(rows, 16)
    assert len(rows) > 8192
    assert np.array_equal(itq.codes(rows), np.tile(itq.codes(rows[:300]), (30, 1)))


def test_the_same_rows_give_the_same_bytes_and_can_be_read_back() -> None:
    first, second = fit_itq(_rows(), 16), fit_itq(_rows(), 16)
    assert first.to_bytes() == second.to_bytes()
    back = Itq.from_bytes(first.to_bytes())
    assert np.array_equal(back.mean, first.mean)
    assert np.array_equal(back.projection, first.projection)
    assert (back.bits, back.dim) == (16, 24)


@pytest.mark.parametrize("at", [0, 5, 40, 200, -30])
def test_damaged_bytes_are_refused(at: int) -> None:
    data = fit_itq(_rows(), 16).to_bytes()
    broken = bytearray(data)
    broken[at] ^= 0xFF
    for bad in (data[: len(data) // 2], b"", bytes(broken)):
        try:
            again = Itq.from_bytes(bad, "itq16.npz")
        except BadModel as error:
            assert "itq16.npz" in str(error) or "binary codes" in str(error)
        else:
            assert bad == bytes(broken)
            assert np.isfinite(again.projection).all()


def test_arrays_that_claim_to_be_encrypted_are_refused() -> None:
    data = bytearray(fit_itq(_rows(), 16).to_bytes())
    data[data.index(b"PK\x01\x02") + 8] |= 1
    with pytest.raises(BadModel, match="encrypted"):
        Itq.from_bytes(bytes(data))


def test_pickled_arrays_are_refused() -> None:
    file = io.BytesIO()
    np.savez(file, mean=np.array([{}], dtype=object), projection=np.eye(8, dtype=np.float32))
    with pytest.raises(BadModel, match="cannot be read"):
        Itq.from_bytes(file.getvalue())


@pytest.mark.parametrize("bits", [0, -8, 12, 32])
def test_impossible_numbers_of_bits_are_named(bits: int) -> None:
    with pytest.raises(BadConfig, match=f"{bits} bits") as raised:
        fit_itq(_rows(), bits)
    assert "24" in raised.value.expected


def test_unsuitable_rows_are_named() -> None:
    with pytest.raises(BadData, match="16 embeddings"):
        fit_itq(_rows(16), 16)
    rows = _rows()
    rows[3, 4] = np.nan
    with pytest.raises(BadData, match="not finite"):
        fit_itq(rows, 16)
    with pytest.raises(BadData, match="shape"):
        fit_itq(_rows(), 16).codes(_rows(5, dim=23))


@given(st.integers(1, 7), st.integers(0, 9), st.integers(1, 19), st.integers(0, 2**32 - 1))
@settings(max_examples=60)
def test_hamming_distances_equal_counted_bits(
    queries: int, photos: int, width: int, seed: int
) -> None:
    random = np.random.default_rng(seed)
    left = random.integers(0, 256, (queries, width), dtype=np.uint8)
    right = random.integers(0, 256, (photos, width), dtype=np.uint8)
    distances = hamming_distances(left, right)
    assert distances.dtype == np.uint16
    assert distances.tolist() == [
        [sum((int(a) ^ int(b)).bit_count() for a, b in zip(x, y, strict=True)) for y in right]
        for x in left
    ]


def test_chunks_of_queries_do_not_change_distances(monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(3)
    left = random.integers(0, 256, (37, 8), dtype=np.uint8)
    right = random.integers(0, 256, (50, 8), dtype=np.uint8)
    whole = hamming_distances(left, right)
    monkeypatch.setattr(binary_codes, "_CHUNK_DISTANCES", 120)
    assert np.array_equal(whole, hamming_distances(left, right))


def test_long_codes_do_not_overflow() -> None:
    zeros, ones = np.zeros((1, 100), dtype=np.uint8), np.full((1, 100), 255, dtype=np.uint8)
    assert hamming_distances(zeros, ones).tolist() == [[800]]


def test_unpacked_codes_and_mixed_lengths_are_named() -> None:
    codes = np.zeros((2, 8), dtype=np.uint8)
    with pytest.raises(BadData, match="shapes"):
        hamming_distances(codes, codes[:, :4])
    with pytest.raises(BadData, match="float64"):
        hamming_distances(codes, codes.astype(np.float64))


def test_hamming_distances_need_little_extra_memory() -> None:
    codes = np.zeros((3000, 8), dtype=np.uint8)
    tracemalloc.start()
    answer = hamming_distances(codes, codes)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak - answer.nbytes < 80_000_000
