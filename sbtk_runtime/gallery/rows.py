"""Rows of bytes on disk: append-only shards, each of `SHARD_ROWS` rows and nothing else.

Rows are numbered across all shards, and numbers are never reused. Only rows that the catalogue has
committed are valid; rows after them are leftovers of a killed writer.

Shards are read, not memory-mapped: truncating a mapped file kills the processes that read it, and
mapped pages count as their memory. Reading costs some 0.15 ms per MB more.
"""

from __future__ import annotations

import errno
import hashlib
import itertools
import os
import shlex
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sbtk_runtime.binary_codes import Codes, Itq
from sbtk_runtime.errors import BadData
from sbtk_runtime.files import disk_full_explained, fsync_folder, open_regular, printable_name

Rows = NDArray[np.int64]
RowBytes = NDArray[np.uint8]

SHARD_ROWS = 65_536

_READ_BYTES = 1 << 20
_UNREADABLE = (
    *(errno.EACCES, errno.EPERM, errno.EIO, errno.ELOOP, errno.EINVAL, errno.ESTALE),
    *(errno.ENOENT, errno.ENOTDIR),
)

# Gaps up to this size are read, too, because a second read would cost more.
_READ_THROUGH_ROWS = 16


@dataclass(frozen=True)
class Batch:
    """Rows that were written together to one shard, with the SHA-256 of their bytes.

    `crc32s` has the CRC-32 of each row, if the batch has just been written.
    """

    first_row: int
    count: int
    sha256: str
    crc32s: tuple[int, ...] = ()


class Shards:
    """The shards in a gallery's `vectors/` folder.

    After `hold()`, a reader keeps its shards even if a writer removes them. Any number of threads
    may read.

    Args:
        folder: the folder of the shards.
        row_bytes: length of a row.
        suffix: suffix of the shards' names, which shows the type of their rows.
    """

    def __init__(self, folder: Path, row_bytes: int, suffix: str) -> None:
        self.folder = folder
        self._row_bytes = row_bytes
        self._suffix = suffix
        self._descriptors: dict[int, int] = {}
        #: The reasons why shards could not be read, by the shard's number.
        self.problems: dict[int, str] = {}
        #: The command that helps if this user may not read the shards; `None` otherwise.
        self.remedy: str | None = None

    def hold(self) -> None:
        """Open every shard and keep it open until `close`.

        Shards that cannot be read count as empty; `problems` has the reasons.
        """
        try:
            shards = self._shards()
        except OSError as problem:
            self._note_unreadable(0, problem)
            return
        for index, path in shards:
            try:
                self._descriptors[index] = open_regular(path)
            except OSError as problem:
                self._note_unreadable(index, problem)

    def close(self) -> None:
        """Close the shards that `hold` opened."""
        while self._descriptors:
            os.close(self._descriptors.popitem()[1])

    def append_bytes(self, first_row: int, content: RowBytes) -> list[Batch]:
        """Write rows `(N, row_bytes) uint8` from row `first_row` on, durably.

        Raises:
            DiskFull: no space is left; committed rows are unchanged.
        """
        self.folder.mkdir(exist_ok=True)
        batches = []
        for low, high in cut_at_shards(first_row, first_row + len(content)):
            data = content[low - first_row : high - first_row].tobytes()
            self._write(low, data)
            digest = hashlib.sha256(data).hexdigest()
            crc32s = tuple(map(zlib.crc32, content[low - first_row : high - first_row]))
            batches.append(Batch(low, high - low, digest, crc32s))
        return batches

    def read_bytes(self, rows: Rows) -> tuple[RowBytes, NDArray[np.bool_]]:
        """Return rows `(N, row_bytes) uint8` and which of them the shards hold, `(N,) bool`.

        Missing rows are zeros. `rows` is ascending.
        """
        content = np.zeros((len(rows), self._row_bytes), dtype=np.uint8)
        is_held = np.zeros(len(rows), dtype=np.bool_)
        view = content.data.cast("B") if content.size else memoryview(b"")
        size = self._row_bytes
        numbers = rows.tolist()
        for low, high in _runs(rows):
            if high - low == 1 and self._read_one(numbers[low], view[low * size : high * size]):
                is_held[low] = True
            else:
                self._read_into(content[low:high], is_held[low:high], rows[low:high])
        return content, is_held

    def is_intact(self, batch: Batch) -> bool:
        """Return whether a batch's bytes are unchanged since they were written."""
        if batch.first_row < 0 or not 0 < batch.count <= SHARD_ROWS:
            return False
        digest = hashlib.sha256()
        step = max(1, _READ_BYTES // self._row_bytes)
        for first in range(batch.first_row, batch.first_row + batch.count, step):
            rows = min(step, batch.first_row + batch.count - first)
            data = self._read(first, rows)
            if len(data) < rows * self._row_bytes:
                return False
            digest.update(data)
        return digest.hexdigest() == batch.sha256

    def held_rows(self, index: int) -> int:
        """Return the number of complete rows in a shard; 0 if the shard is missing."""
        try:
            descriptor = self._descriptors.get(index)
            status = self._path(index).stat() if descriptor is None else os.fstat(descriptor)
        except FileNotFoundError:
            return 0
        except OSError as problem:
            self._note_unreadable(index, problem)
            return 0
        return 0 if index in self.problems else status.st_size // self._row_bytes

    def checksums(self, rows: Rows) -> list[int | None]:
        """Return the CRC-32 of each of ascending `rows (N,) int64`; `None` if it is missing."""
        content, is_held = self.read_bytes(rows)
        return [
            zlib.crc32(row) if is_there else None
            for row, is_there in zip(content, is_held.tolist(), strict=True)
        ]

    def cut(self, committed_rows: int) -> None:
        """Remove uncommitted rows, which a killed writer left.

        Without committed rows, shards with other suffixes are removed, too.
        """
        if not committed_rows and self.folder.is_dir():
            for path in self.folder.iterdir():
                if path.stem.isdecimal():
                    path.unlink()
        for index, path in self._shards():
            rows_here = min(SHARD_ROWS, committed_rows - index * SHARD_ROWS)
            if rows_here <= 0:
                path.unlink()
            elif path.stat().st_size > rows_here * self._row_bytes:
                os.truncate(path, rows_here * self._row_bytes)

    def missing(self, committed_rows: int) -> list[tuple[int, int]]:
        """Return the intervals of committed rows (end excluded) that no shard holds."""
        intervals = []
        for low, high in cut_at_shards(0, committed_rows):
            held = self.held_rows(low // SHARD_ROWS)
            if low + held < high:
                intervals.append((low + held, high))
        return intervals

    def remove_shards(self, indices: Iterable[int]) -> None:
        """Remove whole shards; readers that hold them keep them."""
        for index in indices:
            self._path(index).unlink(missing_ok=True)

    def shard_indices(self) -> list[int]:
        """Return the numbers of the shards that exist."""
        return [index for index, _ in self._shards()]

    def _shards(self) -> list[tuple[int, Path]]:
        if not self.folder.is_dir():
            return []
        return sorted(
            (int(path.stem), path)
            for path in self.folder.iterdir()
            if path.suffix == self._suffix and path.stem.isdecimal()
        )

    def _path(self, index: int) -> Path:
        return self.folder / f"{index:06d}{self._suffix}"

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

    def _read_one(self, row: int, target: memoryview) -> bool:
        """Read a row of a held shard; return whether that succeeded."""
        index, place = divmod(row, SHARD_ROWS)
        descriptor = self._descriptors.get(index)
        if descriptor is None:
            return False
        try:
            return os.preadv(descriptor, [target], place * self._row_bytes) == self._row_bytes
        except OSError:
            return False  # `_read` tries again, and records the error

    def _read_into(self, content: RowBytes, is_held: NDArray[np.bool_], rows: Rows) -> None:
        first, count = int(rows[0]), int(rows[-1] - rows[0]) + 1
        data = self._read(first, count)
        # Copying a row as one item is several times faster than as single bytes.
        row_type = np.dtype((np.void, self._row_bytes))
        held = np.frombuffer(data, dtype=row_type, count=len(data) // self._row_bytes)
        items = content.view(row_type)[:, 0]
        if len(held) == count == len(rows):
            items[:] = held
            is_held[:] = True
            return
        wanted = rows - first
        is_held[:] = wanted < len(held)
        items[is_held] = held[wanted[is_held]]

    def _read(self, first_row: int, count: int) -> bytes:
        """Return the bytes of rows that lie in one shard; fewer when the shard is short."""
        index, offset = first_row // SHARD_ROWS, first_row % SHARD_ROWS * self._row_bytes
        descriptor = self._descriptors.get(index)
        try:
            if descriptor is not None:
                return _pread(descriptor, count * self._row_bytes, offset)
            opened = open_regular(self._path(index))
            try:
                return _pread(opened, count * self._row_bytes, offset)
            finally:
                os.close(opened)
        except FileNotFoundError:
            return b""
        except OSError as problem:
            self._note_unreadable(index, problem)
            return b""

    def _note_unreadable(self, index: int, problem: OSError) -> None:
        """Record why a shard cannot be read.

        Raises:
            OSError: the cause is not the shard, but for example too many open files.
        """
        if problem.errno not in _UNREADABLE:
            raise problem
        if problem.errno in (errno.EACCES, errno.EPERM):
            self.remedy = f"chmod -R u+rX {shlex.quote(printable_name(self.folder))}, as its owner"
        name = f"{self.folder.name}/{self._path(index).name}"
        self.problems[index] = f"{name} cannot be read: {problem.strerror}"


def _pread(descriptor: int, size_bytes: int, offset: int) -> bytes:
    """Return bytes of a file; fewer only at its end."""
    data = os.pread(descriptor, size_bytes, offset)
    while len(data) < size_bytes:
        more = os.pread(descriptor, size_bytes - len(data), offset + len(data))
        if not more:
            break
        data += more
    return data


def _runs(rows: Rows) -> Iterator[tuple[int, int]]:
    """Yield index intervals of ascending `rows` that are close together in one shard."""
    if len(rows) == 0:
        return
    is_far = np.diff(rows) > _READ_THROUGH_ROWS
    is_far |= np.diff(rows // SHARD_ROWS) > 0
    bounds = [0, *(np.flatnonzero(is_far) + 1).tolist(), len(rows)]
    yield from itertools.pairwise(bounds)


def make_row_mask(rows: Rows) -> NDArray[np.bool_]:
    """Return ascending `rows (N,) int64` as `(last row + 1,) bool`."""
    mask = np.zeros(int(rows[-1]) + 1 if len(rows) else 0, dtype=np.bool_)
    mask[rows] = True
    return mask


def cut_at_shards(low: int, high: int) -> Iterator[tuple[int, int]]:
    """Yield the intervals (end excluded) of rows `low` to `high` that lie in one shard each."""
    while low < high:
        end = min(high, (low // SHARD_ROWS + 1) * SHARD_ROWS)
        yield low, end
        low = end


Embeddings = NDArray[np.float32]

#: Rows that are read, converted and scored at a time: some 3 MB at 512 dimensions.
CHUNK_ROWS = 512

# Rounding to float16 changes the length of a unit row by less than this.
_NORM_TOLERANCE = 0.01


class Vectors(Shards):
    """The embeddings of a gallery, `dim` numbers each."""

    def __init__(self, folder: Path, dim: int) -> None:
        super().__init__(folder, 2 * dim, ".f16")
        self.dim = dim

    def append(self, first_row: int, embeddings: Embeddings) -> list[Batch]:
        """Write unit rows `(N, D) float32` from row `first_row` on, durably; return the batches.

        Raises:
            BadData: a row is not finite or not of length 1; nothing is written.
            DiskFull: no space is left; committed rows are unchanged.
        """
        require_unit_rows(embeddings, self.dim)
        halves = np.ascontiguousarray(embeddings, dtype="<f2")
        return self.append_bytes(first_row, halves.view(np.uint8))

    def read(self, rows: Rows) -> tuple[Embeddings, NDArray[np.bool_]]:
        """Return unit rows `(N, D) float32` and which of them are usable, `(N,) bool`.

        Missing and unusable rows are zeros. `rows` is ascending.
        """
        return self.decode(self.read_bytes(rows)[0])

    def embeddings(self, rows: Rows) -> Embeddings:
        """Return unit rows `(N, D) float32` of `rows` in any order; unusable ones are zeros."""
        order = np.argsort(rows)
        found = np.empty((len(rows), self.dim), dtype=np.float32)
        found[order] = self.read(rows[order])[0]
        return found

    def decode(self, content: RowBytes) -> tuple[Embeddings, NDArray[np.bool_]]:
        """Return the bytes of rows, `(N, 2 D) uint8`, as `read` returns them."""
        return _unit_rows(content.view("<i2"))

    def chunks(self, rows: Iterable[int]) -> Iterator[tuple[Rows, Embeddings, NDArray[np.bool_]]]:
        """Yield row numbers, unit rows and which are usable, `CHUNK_ROWS` at a time."""
        if isinstance(rows, np.ndarray):
            parts: Iterator[Rows] = (
                rows[start : start + CHUNK_ROWS] for start in range(0, len(rows), CHUNK_ROWS)
            )
        else:
            parts = _chunk(rows)
        for part in parts:
            embeddings, is_whole = self.read(part)
            yield part, embeddings, is_whole


def require_unit_rows(embeddings: Embeddings, dim: int) -> None:
    """Check that embeddings can be stored in a gallery.

    Raises:
        BadData: they are not `(N, dim)`, or a row is not finite or not of length 1.
    """
    if embeddings.ndim != 2 or embeddings.shape[1] != dim:
        raise BadData(f"embeddings of shape {embeddings.shape}", f"(N, {dim})")
    lengths = np.linalg.norm(embeddings.astype(np.float64), axis=1)
    if not np.all(np.abs(lengths - 1.0) < _NORM_TOLERANCE):
        raise BadData("an embedding that is not finite or not of length 1", "unit rows")


def unit_row(embedding: NDArray[np.generic], dim: int) -> Embeddings:
    """Return an embedding `(dim,)` of any length as one of length 1, float32.

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
    """Return the float16 bit patterns `(N, D)` as float32 rows of length 1, and which are usable.

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


def _chunk(rows: Iterable[int]) -> Iterator[Rows]:
    part: list[int] = []
    for row in rows:
        part.append(row)
        if len(part) == CHUNK_ROWS:
            yield np.array(part, dtype=np.int64)
            part = []
    if part:
        yield np.array(part, dtype=np.int64)


#: Bytes that are read and compared at a time: 131,072 codes of 64 bits.
CHUNK_BYTES = 1 << 20


class CodeShards(Shards):
    """The codes of a gallery, `bits` bits each, packed as `numpy.packbits` does."""

    def __init__(self, folder: Path, bits: int) -> None:
        super().__init__(folder, bits // 8, ".bits")
        self.bits = bits

    def append(self, first_row: int, codes: Codes) -> list[Batch]:
        """Write codes `(N, bits / 8) uint8` from row `first_row` on, durably.

        Raises:
            BadData: the codes have another length.
            DiskFull: no space is left; committed rows are unchanged.
        """
        if codes.dtype != np.uint8 or codes.ndim != 2 or codes.shape[1] != self.bits // 8:
            raise BadData(
                f"codes {codes.shape} {codes.dtype}", f"(N, {self.bits // 8}) uint8, packed"
            )
        return self.append_bytes(first_row, codes)

    def read(self, rows: Rows) -> tuple[Codes, NDArray[np.bool_]]:
        """Return codes `(N, bits / 8) uint8` and which exist, `(N,) bool`; missing ones are zeros.

        `rows` is ascending.
        """
        return self.read_bytes(rows)

    def chunks(self, rows: Rows) -> Iterator[tuple[Rows, Codes, NDArray[np.bool_]]]:
        """Read the codes at `rows (N,) int64` in parts of `CHUNK_BYTES`, in constant memory.

        Yields:
            Row numbers `(n,) int64`, codes `(n, bits / 8) uint8`, and which exist, `(n,) bool`.
        """
        step = CHUNK_BYTES // (self.bits // 8)
        for start in range(0, len(rows), step):
            part = rows[start : start + step]
            codes, is_held = self.read(part)
            yield part, codes, is_held


def codes_of(embeddings: Embeddings, itq: Itq) -> Codes:
    """Return the codes `(N, bits / 8) uint8` of unit rows `(N, D) float32`.

    Raises:
        BadData: a row has another width, is not finite or not of length 1, which its code would
            not show.
    """
    require_unit_rows(embeddings, itq.dim)
    return itq.codes(embeddings)
