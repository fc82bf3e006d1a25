"""Embeddings on disk: append-only shards of float16 unit rows, the truth about embeddings.

A shard is `SHARD_ROWS` rows of little-endian float16 and nothing else. Rows have one number over
all shards, given once and never again. Only rows that the catalogue has committed count; what
lies beyond them is what a killed writer left.

Shards are read, not memory-mapped: a mapped file that is cut short kills the process that looks
at it, and mapped pages would count as its memory. Reading costs some 0.15 ms per 1,000 rows more.
"""

from __future__ import annotations

import hashlib
import itertools
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sbtk_runtime.errors import BadData
from sbtk_runtime.files import disk_full_explained, fsync_folder

Embeddings = NDArray[np.float32]
Rows = NDArray[np.int64]

SHARD_ROWS = 65_536
#: Rows that are read, converted and scored at a time; some 3 MB in all at 512 dimensions.
CHUNK_ROWS = 512

# float16 rounding moves the length of a unit row by less than this.
_NORM_TOLERANCE = 0.01
# A gap that is read through, because a second read would cost more.
_READ_THROUGH_ROWS = 16
_SUFFIX = ".f16"


@dataclass(frozen=True)
class Batch:
    """Rows that were written together, in one shard, and the SHA-256 of their bytes."""

    first_row: int
    count: int
    sha256: str


class Vectors:
    """The shards in a gallery's `vectors/` folder.

    A reader that was opened with `hold()` keeps its shards even when a writer removes them.
    Reading is safe from any number of threads.
    """

    def __init__(self, folder: Path, dim: int) -> None:
        self.folder = folder
        self.dim = dim
        self._row_bytes = 2 * dim
        self._descriptors: dict[int, int] = {}

    def hold(self) -> None:
        """Opens every shard and keeps it open until `close`."""
        for index, path in self._shards():
            self._descriptors[index] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def close(self) -> None:
        """Closes the shards that `hold` opened."""
        while self._descriptors:
            os.close(self._descriptors.popitem()[1])

    def append(self, first_row: int, embeddings: Embeddings) -> list[Batch]:
        """Writes unit rows `(N, D) float32` from row `first_row` on, durably; returns the batches.

        Raises:
            BadData: a row is not finite or not of length 1; such rows never get in.
            DiskFull: there is no space; what was committed is untouched.
        """
        if embeddings.ndim != 2 or embeddings.shape[1] != self.dim:
            raise BadData(f"embeddings of shape {embeddings.shape}", f"(N, {self.dim})")
        lengths = np.linalg.norm(embeddings.astype(np.float64), axis=1)
        if not np.all(np.abs(lengths - 1.0) < _NORM_TOLERANCE):
            raise BadData("an embedding that is not finite or not of length 1", "unit rows")
        self.folder.mkdir(exist_ok=True)
        halves = embeddings.astype("<f2")
        batches = []
        for low, high in _cut_at_shards(first_row, first_row + len(halves)):
            data = halves[low - first_row : high - first_row].tobytes()
            self._write(low, data)
            batches.append(Batch(low, high - low, hashlib.sha256(data).hexdigest()))
        return batches

    def read(self, rows: Rows) -> tuple[Embeddings, NDArray[np.bool_]]:
        """Returns unit rows `(N, D) float32` and which of them are whole, `(N,) bool`.

        Rows that are missing or damaged beyond use come as zeros. `rows` is ascending.
        """
        halves = np.zeros((len(rows), self.dim), dtype="<i2")
        for low, high in _runs(rows):
            self._read_into(halves[low:high], rows[low:high])
        return _unit_rows(halves)

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

    def is_intact(self, batch: Batch) -> bool:
        """Returns whether a batch's bytes are still those that were written."""
        data = self._read_bytes(batch.first_row, batch.count)
        return hashlib.sha256(data).hexdigest() == batch.sha256

    def cut(self, committed_rows: int) -> None:
        """Removes what a killed writer left beyond the committed rows."""
        for index, path in self._shards():
            rows_here = min(SHARD_ROWS, committed_rows - index * SHARD_ROWS)
            if rows_here <= 0:
                path.unlink()
            elif path.stat().st_size > rows_here * self._row_bytes:
                os.truncate(path, rows_here * self._row_bytes)

    def missing(self, committed_rows: int) -> list[tuple[int, int]]:
        """Returns the intervals of committed rows (end excluded) that no shard holds."""
        intervals = []
        for low, high in _cut_at_shards(0, committed_rows):
            path = self._path(low // SHARD_ROWS)
            held = path.stat().st_size // self._row_bytes if path.exists() else 0
            if low + held < high:
                intervals.append((low + held, high))
        return intervals

    def remove_shards(self, indices: Iterable[int]) -> None:
        """Removes whole shards; readers that hold them keep them."""
        for index in indices:
            self._path(index).unlink(missing_ok=True)

    def shard_indices(self) -> list[int]:
        """Returns the numbers of the shards that exist."""
        return [index for index, _ in self._shards()]

    def _shards(self) -> list[tuple[int, Path]]:
        if not self.folder.is_dir():
            return []
        return sorted(
            (int(path.stem), path)
            for path in self.folder.iterdir()
            if path.suffix == _SUFFIX and path.stem.isdecimal()
        )

    def _path(self, index: int) -> Path:
        return self.folder / f"{index:06d}{_SUFFIX}"

    def _write(self, first_row: int, data: bytes) -> None:
        path = self._path(first_row // SHARD_ROWS)
        offset = first_row % SHARD_ROWS * self._row_bytes
        with disk_full_explained(path):
            is_new = not path.exists()
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o644)
            try:
                view = memoryview(data)
                while view:
                    written = os.pwrite(descriptor, view, offset)
                    view, offset = view[written:], offset + written
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
            if is_new:
                fsync_folder(self.folder)

    def _read_into(self, halves: NDArray[np.int16], rows: Rows) -> None:
        first = int(rows[0])
        data = self._read_bytes(first, int(rows[-1]) + 1 - first)
        held = np.frombuffer(data, dtype="<i2", count=len(data) // self._row_bytes * self.dim)
        wanted = rows - first
        is_held = wanted < len(held) // self.dim
        halves[is_held] = held.reshape(-1, self.dim)[wanted[is_held]]

    def _read_bytes(self, first_row: int, count: int) -> bytes:
        """Returns the bytes of rows that lie in one shard; fewer when the shard is short."""
        index, offset = first_row // SHARD_ROWS, first_row % SHARD_ROWS * self._row_bytes
        descriptor = self._descriptors.get(index)
        if descriptor is not None:
            return os.pread(descriptor, count * self._row_bytes, offset)
        try:
            with self._path(index).open("rb") as file:
                file.seek(offset)
                return file.read(count * self._row_bytes)
        except FileNotFoundError:
            return b""


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


def _runs(rows: Rows) -> Iterator[tuple[int, int]]:
    """Yields index intervals of ascending `rows` that one read serves: near and in one shard."""
    if len(rows) == 0:
        return
    is_far = np.diff(rows) > _READ_THROUGH_ROWS
    is_far |= np.diff(rows // SHARD_ROWS) > 0
    bounds = [0, *(np.flatnonzero(is_far) + 1).tolist(), len(rows)]
    yield from itertools.pairwise(bounds)


def _cut_at_shards(low: int, high: int) -> Iterator[tuple[int, int]]:
    while low < high:
        end = min(high, (low // SHARD_ROWS + 1) * SHARD_ROWS)
        yield low, end
        low = end


def _chunked(rows: Iterable[int]) -> Iterator[Rows]:
    part: list[int] = []
    for row in rows:
        part.append(row)
        if len(part) == CHUNK_ROWS:
            yield np.array(part, dtype=np.int64)
            part = []
    if part:
        yield np.array(part, dtype=np.int64)
