"""Sign codes: one bit for each dimension, to find the candidates of an exact search.

The signs are those of centred embeddings after a fixed random rotation, because on the embeddings'
own axes, which are principal axes, most signs carry no information. A query is compared with all
codes by Hamming distance; the nearest are ordered by the estimate `query @ (rotation * signs)`, and
the best of these are scored exactly, by their embeddings.

The folder `codes-<generation>` has the rotation with the centre, and append-only shards with the
row numbers of the vectors, from which everything can be rebuilt. When a shard is read, it is hashed
only if its size or time of modification has changed.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import NDArray

from sbtk_runtime.binary_codes import Codes, Itq, code_words, word_distances
from sbtk_runtime.engines.base import Notify
from sbtk_runtime.errors import BadGallery, BadModel
from sbtk_runtime.files import (
    is_as_written,
    open_regular,
    printable_name,
    read_refused,
    write_atomically,
)
from sbtk_runtime.gallery.folder import CODES_PREFIX
from sbtk_runtime.gallery.rows import (
    SHARD_ROWS,
    CodeShards,
    Embeddings,
    Rows,
    Vectors,
    cut_at_shards,
)
from sbtk_runtime.gallery.writer import Catalogue
from sbtk_runtime.manifest import CodesRecord, FileStamp

ROTATION_NAME = "rotation.npz"
#: Number of estimates that are computed for each returned candidate.
ESTIMATES = 5
# More estimates take longer than they gain; re-ranking requests 1,000 candidates.
_MOST_ESTIMATES = 2_000
#: When the rows have doubled, the codes are rebuilt if their centre is off by more than this
#: share of the embeddings' spread.
MOST_DRIFT = 0.3

_SEED = 20_241
# Sums of 512 products of float32 may differ by this between processors.
_SIGN_TOLERANCE = 1e-4


class SignCodes:
    """The sign codes of a gallery's rows, in memory: `bits / 8` bytes a row.

    Args:
        rotation: makes codes of embeddings.
        parts: first rows, ascending, and the codes `(n, bits / 8) uint8` from each of them on.
    """

    def __init__(self, rotation: Itq, parts: Sequence[tuple[int, Codes]]) -> None:
        self.rotation = rotation
        self._words = [code_words(codes) for _, codes in parts]
        sizes = [len(codes) for _, codes in parts]
        self._first = np.array([first for first, _ in parts], dtype=np.int64)
        self._start = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])

    @classmethod
    def load(cls, folder: Path, record: CodesRecord, dim: int, *, is_hashed: bool = False) -> Self:
        """Return the codes that `record` describes.

        Args:
            folder: the gallery's folder.
            record: the codes of the generation that is read.
            dim: length of an embedding.
            is_hashed: compare the SHA-256 also of files with unchanged size and time.

        Raises:
            BadGallery: a file is missing, cannot be read, or has changed.
        """
        rotation = _load_rotation(folder, record, dim, is_hashed=is_hashed)
        parts = []
        for name, stamp in sorted(record.files.items()):
            if name == ROTATION_NAME:
                continue
            path = folder / record.folder / name
            index = Path(name).stem
            count, rest = divmod(stamp.size_bytes, record.bits // 8)
            if rest or count > SHARD_ROWS or not index.isdecimal():
                raise BadGallery(f"{path} is not a shard of {record.bits}-bit codes")
            content = _read(path, stamp, is_hashed=is_hashed)
            codes = np.frombuffer(content, dtype=np.uint8).reshape(count, -1)
            parts.append((int(index) * SHARD_ROWS, codes))
        return cls(rotation, parts)

    @classmethod
    def of_vectors(cls, vectors: Vectors, rows: Rows) -> Self:
        """Return the codes of ascending `rows (N,) int64`, computed now."""
        rotation = make_rotation(vectors, rows)
        spans = cut_at_shards(int(rows[0]), int(rows[-1]) + 1) if len(rows) else ()
        return cls(rotation, [(low, _codes(rotation, vectors, low, high)) for low, high in spans])

    def __len__(self) -> int:
        """The number of rows that have codes."""
        return int(self._start[-1])

    def candidates(
        self, query: Embeddings, count: int, is_allowed: NDArray[np.bool_] | None = None
    ) -> Rows:
        """Return up to `count` rows `(n,) int64` that are probably nearest to `query`, best first.

        Args:
            query: `(D,) float32`, of length 1.
            count: at least 1.
            is_allowed: `(R,) bool` by row; only rows for which it is true are returned.
        """
        words = code_words(self.rotation.codes(query[None]))
        distances = np.concatenate([word_distances(words, part) for part in self._words])
        if is_allowed is not None:
            for first, low, high in self._spans():
                allowed = is_allowed[first : first + high - low]
                distances[low : low + len(allowed)][~allowed] = _FAR
                distances[low + len(allowed) : high] = _FAR
        places = _smallest(distances, max(count, min(ESTIMATES * count, _MOST_ESTIMATES)))
        turned = query @ self.rotation.projection
        signs = np.unpackbits(self._codes_at(places), axis=1)[:, : len(turned)]
        estimates = signs.astype(np.float32) @ turned
        best = places[np.argsort(-estimates, kind="stable")[:count]]
        part = np.searchsorted(self._start, best, side="right") - 1
        return np.asarray(self._first[part] + best - self._start[part], dtype=np.int64)

    def codes(self, rows: Rows) -> Codes:
        """Return the codes `(N, bits / 8) uint8` of rows that have codes."""
        part = np.searchsorted(self._first, rows, side="right") - 1
        return self._codes_at(rows - self._first[part] + self._start[part])

    def has_codes(self, rows: Rows) -> NDArray[np.bool_]:
        """Return which of `rows (N,) int64` have codes, `(N,) bool`."""
        part = np.searchsorted(self._first, rows, side="right") - 1
        sizes = np.diff(self._start)
        return np.asarray(
            (part >= 0) & (rows - self._first[part] < sizes[part]) if len(sizes) else rows < 0
        )

    def _spans(self) -> Iterator[tuple[int, int, int]]:
        """Yield the first row of each part, and the interval of its places."""
        yield from zip(
            self._first.tolist(), self._start[:-1].tolist(), self._start[1:].tolist(), strict=True
        )

    def _codes_at(self, places: Rows) -> Codes:
        part = np.searchsorted(self._start, places, side="right") - 1
        codes = np.empty((len(places), self.rotation.bits // 8), dtype=np.uint8)
        for index in np.unique(part).tolist():
            is_here = part == index
            words = self._words[index][:, places[is_here] - self._start[index]]
            packed = np.ascontiguousarray(words.T).view(np.uint8)
            codes[is_here] = packed[:, : codes.shape[1]]
        return codes


def make_rotation(vectors: Vectors, rows: Rows) -> Itq:
    """Return a fixed random rotation about the mean of the embeddings at `rows (N,) int64`."""
    # Codes are whole bytes, so there may be more bits than dimensions.
    bits = -(-vectors.dim // 8) * 8
    normal = np.random.default_rng(_SEED).standard_normal((bits, bits))
    turn = np.linalg.qr(normal)[0][: vectors.dim]
    mean = mean_of(vectors, rows)
    return Itq(mean=mean.astype(np.float32), projection=turn.astype(np.float32))


def mean_of(vectors: Vectors, rows: Rows) -> NDArray[np.float64]:
    """Return the mean `(D,)` of the embeddings at ascending `rows`; damaged ones are left out."""
    total, count = np.zeros(vectors.dim), 0
    for _, embeddings, is_whole in vectors.chunks(rows):
        total += embeddings[is_whole].sum(axis=0, dtype=np.float64)
        count += int(is_whole.sum())
    return total / max(count, 1)


def update_codes(
    folder: Path,
    catalogue: Catalogue,
    vectors: Vectors,
    previous: CodesRecord | None,
    notify: Notify,
) -> CodesRecord:
    """Write the codes of the catalogue's generation, and return their record.

    Codes of new rows are appended. All codes are rebuilt if the previous ones are damaged or their
    centre is far off.

    Args:
        folder: the gallery's folder.
        catalogue: a catalogue with at least one photo.
        vectors: the embeddings.
        previous: the record of the published generation; `None` if it has no codes.
        notify: called with a sentence before a step that takes long.

    Raises:
        DiskFull: no space is left.
    """
    if previous is not None:
        try:
            record = _append_codes(folder, catalogue, vectors, previous)
        except BadGallery as problem:
            notify(f"{problem.found}: the sign codes are made again from the embeddings")
        else:
            if record is not None:
                return record
            notify("the photos have changed much: the sign codes are made again")
    name = f"{CODES_PREFIX}{catalogue.generation}"
    (folder / name).mkdir(exist_ok=True)
    rotation = make_rotation(vectors, catalogue.live_rows())
    write_atomically(folder / name / ROTATION_NAME, rotation.to_bytes())
    files = {ROTATION_NAME: _stamp(folder / name / ROTATION_NAME)}
    rows = catalogue.committed_rows()
    files |= _append(folder / name, rotation, vectors, catalogue.shards(), 0, rows)
    return CodesRecord(name, rotation.bits, rows, rows, files)


def _append_codes(
    folder: Path, catalogue: Catalogue, vectors: Vectors, previous: CodesRecord
) -> CodesRecord | None:
    """Append the codes of new rows to the previous ones; return `None` if the centre is far off.

    Raises:
        BadGallery: the previous codes cannot be used.
    """
    where, rows, shards = folder / previous.folder, catalogue.committed_rows(), catalogue.shards()
    rotation = _load_rotation(folder, previous, vectors.dim, is_hashed=False)
    if rows < previous.rows:
        raise BadGallery(f"{printable_name(where)} has {previous.rows:,} codes, not {rows:,}")
    files = {
        name: stamp
        for name, stamp in previous.files.items()
        if name == ROTATION_NAME or int(Path(name).stem) in shards
    }
    last = f"{(previous.rows - 1) // SHARD_ROWS:06d}.bits"
    for name, stamp in files.items():
        # The new hash must not cover earlier damage.
        _check(where / name, stamp, is_hashed=name == last and rows > previous.rows)
    centred_rows = previous.centred_rows
    if rows >= 2 * centred_rows:
        live = catalogue.live_rows()
        if drift(rotation, vectors, live) > MOST_DRIFT:
            return None
        centred_rows = rows
    if rows > previous.rows:
        CodeShards(where, previous.bits).cut(previous.rows)
        files |= _append(where, rotation, vectors, shards, previous.rows, rows)
    return CodesRecord(previous.folder, previous.bits, rows, centred_rows, files)


def drift(rotation: Itq, vectors: Vectors, rows: Rows) -> float:
    """Return how far the centre is from the mean of the embeddings at `rows (N,) int64`.

    In units of their spread about the mean, the root of their mean squared distance from it.
    """
    mean = mean_of(vectors, rows)
    spread = np.sqrt(max(1.0 - float(mean @ mean), 1e-12))
    return float(np.linalg.norm(mean - rotation.mean) / spread)


def count_wrong_codes(codes: SignCodes, vectors: Vectors, rows: Rows) -> int:
    """Return how many of ascending `rows (N,) int64` have no codes, or wrong ones.

    Signs of numbers near zero may differ between processors and are ignored.
    """
    wrong = 0
    for numbers, embeddings, is_whole in vectors.chunks(rows):
        is_coded = codes.has_codes(numbers)
        wrong += int((is_whole & ~is_coded).sum())
        chosen = is_whole & is_coded
        values = (embeddings[chosen] - codes.rotation.mean) @ codes.rotation.projection
        bits = np.unpackbits(codes.codes(numbers[chosen]), axis=1).astype(np.bool_)
        is_wrong = (bits != (values > 0)) & (np.abs(values) > _SIGN_TOLERANCE)
        wrong += int(is_wrong.any(axis=1).sum())
    return wrong


_FAR = np.iinfo(np.uint16).max


def _smallest(distances: NDArray[np.uint16], count: int) -> Rows:
    """Return the places of the `count` smallest distances, ascending; ties go to the first.

    Distances of `_FAR` are left out.
    """
    totals = np.cumsum(np.bincount(distances)[:_FAR])
    if not len(totals) or not totals[-1]:
        return np.empty(0, dtype=np.int64)
    limit = int(np.searchsorted(totals, min(count, int(totals[-1]))))
    nearer = np.flatnonzero(distances < limit)
    equal = np.flatnonzero(distances == limit)[: count - len(nearer)]
    return np.sort(np.concatenate([nearer, equal]))


def _append(
    where: Path, rotation: Itq, vectors: Vectors, shards: set[int], low: int, high: int
) -> dict[str, FileStamp]:
    """Write the codes of rows `low` to `high` (end excluded); return stamps of changed files.

    Shards that the vectors lack are left out.
    """
    codes = CodeShards(where, rotation.bits)
    stamps = {}
    for first, end in cut_at_shards(low, high):
        index = first // SHARD_ROWS
        if index not in shards:
            continue
        codes.append(first, _codes(rotation, vectors, first, end))
        name = f"{index:06d}.bits"
        stamps[name] = _stamp(where / name)
    return stamps


def _codes(rotation: Itq, vectors: Vectors, low: int, high: int) -> Codes:
    """Return the codes `(high - low, bits / 8) uint8` of rows `low` to `high` (end excluded).

    Damaged rows have codes, too, but are never hits.
    """
    rows = np.arange(low, high, dtype=np.int64)
    parts = [rotation.codes(embeddings) for _, embeddings, _ in vectors.chunks(rows)]
    return np.concatenate(parts)


def _load_rotation(folder: Path, record: CodesRecord, dim: int, *, is_hashed: bool) -> Itq:
    path = folder / record.folder / ROTATION_NAME
    if ROTATION_NAME not in record.files:
        raise BadGallery(f"the manifest does not name {path}")
    try:
        content = _read(path, record.files[ROTATION_NAME], is_hashed=is_hashed)
        rotation = Itq.from_bytes(content, printable_name(path))
    except BadModel as problem:
        raise BadGallery(problem.found) from problem
    if (rotation.dim, rotation.bits) != (dim, record.bits):
        raise BadGallery(
            f"{printable_name(path)} makes {rotation.bits}-bit codes of {rotation.dim} numbers",
            f"{record.bits}-bit codes of {dim} numbers",
        )
    return rotation


def _stamp(path: Path) -> FileStamp:
    content = path.read_bytes()
    status = path.stat()
    return FileStamp(hashlib.sha256(content).hexdigest(), len(content), status.st_mtime_ns)


def _read(path: Path, stamp: FileStamp, *, is_hashed: bool) -> bytes:
    """Return the content that a file had when it was stamped, without rows appended since.

    Raises:
        BadGallery: it is missing, cannot be read, or has changed.
    """
    try:
        with os.fdopen(open_regular(path), "rb") as file:
            is_same = is_as_written(os.fstat(file.fileno()), stamp.size_bytes, stamp.mtime_ns)
            content = file.read(stamp.size_bytes)
    except FileNotFoundError as problem:
        raise BadGallery(f"{printable_name(path)} is missing") from problem
    except OSError as problem:
        raise BadGallery(*read_refused(path, problem)) from problem
    if len(content) < stamp.size_bytes:
        raise BadGallery(
            f"{printable_name(path)} has {len(content):,} of {stamp.size_bytes:,} bytes"
        )
    if is_hashed or not is_same:
        found = hashlib.sha256(content).hexdigest()
        if found != stamp.sha256:
            raise BadGallery(f"{printable_name(path)} is damaged: SHA-256 {found}", stamp.sha256)
    return content


def _check(path: Path, stamp: FileStamp, *, is_hashed: bool) -> None:
    """Check that a file is as it was stamped; read it only if its size or time has changed."""
    try:
        status = path.lstat()
    except OSError:
        status = None
    if is_hashed or status is None or not is_as_written(status, stamp.size_bytes, stamp.mtime_ns):
        _read(path, stamp, is_hashed=is_hashed)
