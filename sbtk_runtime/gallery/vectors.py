"""Embeddings on disk: shards of little-endian float16 unit rows, the truth about embeddings."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sbtk_runtime.errors import BadData
from sbtk_runtime.gallery.shards import Batch, Rows, Shards

Embeddings = NDArray[np.float32]

#: Rows that are read, converted and scored at a time; some 3 MB in all at 512 dimensions.
CHUNK_ROWS = 512

# float16 rounding moves the length of a unit row by less than this.
_NORM_TOLERANCE = 0.01


class Vectors(Shards):
    """The embeddings of a gallery, `dim` numbers each."""

    def __init__(self, folder: Path, dim: int) -> None:
        super().__init__(folder, 2 * dim, ".f16")
        self.dim = dim

    def append(self, first_row: int, embeddings: Embeddings) -> list[Batch]:
        """Writes unit rows `(N, D) float32` from row `first_row` on, durably; returns the batches.

        Raises:
            BadData: a row is not finite or not of length 1; such rows never get in.
            DiskFull: there is no space; what was committed is untouched.
        """
        require_unit_rows(embeddings, self.dim)
        halves = np.ascontiguousarray(embeddings, dtype="<f2")
        return self.append_bytes(first_row, halves.view(np.uint8))

    def read(self, rows: Rows) -> tuple[Embeddings, NDArray[np.bool_]]:
        """Returns unit rows `(N, D) float32` and which of them are whole, `(N,) bool`.

        Rows that are missing or damaged beyond use come as zeros. `rows` is ascending.
        """
        return _unit_rows(self.read_bytes(rows)[0].view("<i2"))

    def chunks(self, rows: Iterable[int]) -> Iterator[tuple[Rows, Embeddings, NDArray[np.bool_]]]:
        """Yields row numbers, unit rows and which are whole, by `CHUNK_ROWS`, in flat memory."""
        if isinstance(rows, np.ndarray):
            parts: Iterator[Rows] = (
                rows[start : start + CHUNK_ROWS] for start in range(0, len(rows), CHUNK_ROWS)
            )
        else:
            parts = _chunked(rows)
        for part in parts:
            embeddings, is_whole = self.read(part)
            yield part, embeddings, is_whole


def require_unit_rows(embeddings: Embeddings, dim: int) -> None:
    """Makes sure that embeddings may get into a gallery.

    Raises:
        BadData: they are not `(N, dim)`, or a row is not finite or not of length 1.
    """
    if embeddings.ndim != 2 or embeddings.shape[1] != dim:
        raise BadData(f"embeddings of shape {embeddings.shape}", f"(N, {dim})")
    lengths = np.linalg.norm(embeddings.astype(np.float64), axis=1)
    if not np.all(np.abs(lengths - 1.0) < _NORM_TOLERANCE):
        raise BadData("an embedding that is not finite or not of length 1", "unit rows")


def unit_row(embedding: NDArray[np.generic], dim: int) -> Embeddings:
    """Returns an embedding `(dim,)` of any length as one of length 1, float32.

    Raises:
        BadData: it has another width, is not finite, or zero.
    """
    if embedding.shape != (dim,):
        raise BadData(f"an embedding of shape {embedding.shape}", f"({dim},), as the gallery has")
    row = embedding.astype(np.float64)
    length = float(np.linalg.norm(row))
    if not np.isfinite(length) or length < 1e-6:
        raise BadData("the embedding is not finite or zero", "a row of length 1")
    return np.asarray(row / length, dtype=np.float32)


def _unit_rows(halves: NDArray[np.int16]) -> tuple[Embeddings, NDArray[np.bool_]]:
    """Returns the float16 bit patterns `(N, D)` as float32 rows of length 1, and which are whole.

    A float16's fifteen low bits, moved to the top of a float32's mantissa and exponent, are its
    value times 2**-112; this is ten times faster than NumPy's conversion. Infinity and NaN become
    numbers of 65,536 and more, which the check of the length finds.
    """
    bits = halves.astype(np.int32)
    bits <<= 13
    bits &= np.int32(-0x70002000)  # sign, and the fifteen bits: 0x8fffe000
    rows = bits.view(np.float32)
    rows *= np.float32(2.0**112)
    lengths = np.sqrt(np.einsum("ij,ij->i", rows, rows))
    is_whole = np.abs(lengths - 1.0) < _NORM_TOLERANCE
    rows *= np.divide(1.0, lengths, out=np.zeros_like(lengths), where=is_whole)[:, None]
    return rows, is_whole


def _chunked(rows: Iterable[int]) -> Iterator[Rows]:
    part: list[int] = []
    for row in rows:
        part.append(row)
        if len(part) == CHUNK_ROWS:
            yield np.array(part, dtype=np.int64)
            part = []
    if part:
        yield np.array(part, dtype=np.int64)
