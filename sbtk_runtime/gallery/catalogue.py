"""The catalogue: one row per photo in SQLite, the truth about what a gallery holds.

A photo keeps its id for as long as it is in the gallery. Its record has versions, each valid from
the generation `added_in` until before the generation `removed_in`, so a reader sees one generation
while a writer prepares the next. From the generation `missing_in` on, the photo was not found on
disk: readers do not see it, but its embedding is kept. `row` is the number of the photo's embedding
in the vectors; photos with the same bytes share it. Paths are bytes, as in the file system.
"""

from __future__ import annotations

import hashlib
import json
import operator
import os
import sqlite3
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from sbtk_runtime.binary_codes import Itq
from sbtk_runtime.errors import BadGallery, BadModel
from sbtk_runtime.gallery.photo_filter import ALL_PHOTOS, PhotoFilter, below
from sbtk_runtime.gallery.region_rows import (
    RegionRows,
    RegionSpans,
    decode_boxes,
    load_region_count,
    load_region_sum,
    load_regions,
    load_spans,
)
from sbtk_runtime.gallery.rows import Batch
from sbtk_runtime.gallery.schema import (
    CATALOGUE_NAME,
    CODES_SCHEMA,
    EMBEDDINGS_SCHEMA,
    blob,
    connect_reader,
    connect_snapshot,
    integer,
    show_as_current,
    text,
    values_checked,
)
from sbtk_runtime.gallery.soundness import soundness_problem
from sbtk_runtime.gallery.walk_rules import WalkRules
from sbtk_runtime.manifest import PhotoShard, SnapshotRecord
from sbtk_runtime.regions import Boxes

_VISIBLE = (
    "added_in <= :generation AND (removed_in IS NULL OR removed_in > :generation) "
    "AND (missing_in IS NULL OR missing_in > :generation)"
)
# Kept, but hidden from readers.
_MISSING = (
    "added_in <= :generation AND (removed_in IS NULL OR removed_in > :generation) "
    "AND missing_in <= :generation"
)
_PHOTO = "id, path, size_bytes, mtime_ns, sha256, row, partial, ctime_ns, inode"
_ROWS_PER_QUERY = 500

T = TypeVar("T")


@dataclass(frozen=True)
class Photo:
    """One photo of a gallery, as of one generation.

    Attributes:
        id: stays the same for as long as the photo is in the gallery.
        path: absolute; bytes that are not UTF-8 are surrogates.
        size_bytes: of the file.
        mtime_ns: when the file was last modified, in nanoseconds since 1970.
        sha256: of the file, as 64 hexadecimal digits.
        row: of the photo's embedding; photos with the same bytes share it.
        partial: which part of the file could not be read; `None` if all of it could.
        ctime_ns: when the file, or what is known of it, last changed; `None` if unknown.
        inode: of the file, signed; `None` if unknown.
    """

    id: int
    path: str
    size_bytes: int
    mtime_ns: int
    sha256: str
    row: int
    partial: str | None = None
    ctime_ns: int | None = None
    inode: int | None = None

    def has_changed(self, status: os.stat_result) -> bool:
        """Return whether a file is no longer as it was when it was indexed, by size and time."""
        return (status.st_size, status.st_mtime_ns) != (self.size_bytes, self.mtime_ns)


@dataclass(frozen=True)
class Origin:
    """The model and preprocessing that made all embeddings of a gallery.

    `bits` is the length of the codes that a binary gallery stores instead, `shard` the part of the
    photos that it holds.
    """

    model_id: str
    precision: str
    dim: int
    preprocessing: str
    bits: int | None = None
    shard: PhotoShard | None = None


@dataclass(frozen=True)
class Embedding:
    """A photo whose embedding was written at `row`, and the file that it was made from.

    `ctime_ns` and `inode` are `None` where they are unknown; `partial` is as in `Photo`.
    """

    path: bytes
    size_bytes: int
    mtime_ns: int
    sha256: str
    row: int
    ctime_ns: int | None = None
    inode: int | None = None
    partial: str | None = None


@dataclass(frozen=True)
class Failure:
    """A photo that could not be read. The stamps are `None` if they could not be read either."""

    path: bytes
    reason: str
    size_bytes: int | None = None
    mtime_ns: int | None = None
    ctime_ns: int | None = None
    inode: int | None = None


class CatalogueView:
    """The photos of one generation, read-only, unaffected by later writes.

    It holds a snapshot of the database until it is closed. Safe from any thread.

    Args:
        folder: the gallery's.
        generation: which one.
        snapshot: the copy that was published with it; without one the writer's own is read.
        is_hashed: compare the SHA-256 of the snapshot even if it has size and time as written.

    Raises:
        BadGallery: the snapshot or the catalogue is missing, damaged, or cannot be read.
    """

    def __init__(
        self,
        folder: Path,
        generation: int,
        snapshot: SnapshotRecord | None = None,
        *,
        is_hashed: bool = False,
    ) -> None:
        self._path = folder / (CATALOGUE_NAME if snapshot is None else snapshot.file)
        self._generation: dict[str, object] = {"generation": generation}
        with values_checked(self._path):
            self._connection = (
                connect_reader(self._path)
                if snapshot is None
                else connect_snapshot(self._path, snapshot, is_hashed=is_hashed)
            )
            show_as_current(self._connection)

    def close(self) -> None:
        """Close the snapshot."""
        self._connection.close()

    def dim(self) -> int:
        """Return the length of an embedding that the catalogue was made for."""
        return next(self._select("SELECT value FROM facts WHERE name = 'dim'", integer), 0)

    def bits(self) -> int | None:
        """Return the length of the codes; `None` if the catalogue is of embeddings."""
        with values_checked(self._path):
            return load_bits(self._connection)

    def itq(self) -> Itq:
        """Return the ITQ that makes the codes of a binary gallery.

        Raises:
            BadGallery: it is damaged.
        """
        with values_checked(self._path):
            return load_itq(self._connection, self._path)

    def count(self) -> int:
        """Return the number of photos; photos with the same bytes share a row."""
        return next(self._select(f"SELECT count(*) FROM photos WHERE {_VISIBLE}", integer))

    def rows(self, among: PhotoFilter = ALL_PHOTOS) -> NDArray[np.int64]:
        """Return the rows `(N,) int64` of the photos of a filter, ascending, unique."""
        where, values = _visible(among)
        values = self._generation | values
        with values_checked(self._path):
            if not among and (dense := dense_rows(self._connection, where, values)) is not None:
                return dense
            found = self._connection.execute(
                f"SELECT DISTINCT row FROM photos WHERE {where} ORDER BY row", values
            )
            # NumPy would truncate a fraction; `index` accepts only whole numbers.
            rows = np.fromiter(
                map(operator.index, map(operator.itemgetter(0), found)), dtype=np.int64
            )
            if len(rows) and (rows[0] < 0 or (np.diff(rows) < 0).any()):
                raise ValueError("rows that are not in order")
            return rows

    def ids(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the ids of the photos at `rows`, `(N,) int64`; 0 where there is none.

        Of photos that share a row, it is the lowest.
        """
        query = (
            f"SELECT row, id FROM photos WHERE row IN ({{rows}}) AND {_VISIBLE} ORDER BY id DESC"
        )
        ids = self._by_row(query, rows)
        return np.array([ids.get(row, 0) for row in rows.tolist()], dtype=np.int64)

    def checksums(self, rows: NDArray[np.int64]) -> dict[int, int]:
        """Return the committed CRC-32 of each of `rows (N,) int64`, by row.

        Rows that an older sbtk wrote are left out until the next 'sbtk index'.
        """
        return self._by_row("SELECT row, crc32 FROM row_checksums WHERE row IN ({rows})", rows)

    def count_between(self, low: int, high: int) -> int:
        """Return the number of photos at rows `low` to `high` (end excluded)."""
        query = f"SELECT count(*) FROM photos WHERE row >= :low AND row < :high AND {_VISIBLE}"
        return next(self._select(query, integer, low=low, high=high))

    def is_live(self, rows: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Return which of `rows (N,) int64` are of photos, `(N,) bool`."""
        query = f"SELECT row, 1 FROM photos WHERE row IN ({{rows}}) AND {_VISIBLE}"
        live = self._by_row(query, rows)
        return np.array([row in live for row in rows.tolist()], dtype=np.bool_)

    def count_at(self, rows: NDArray[np.int64]) -> int:
        """Return the number of photos at `rows (N,) int64`."""
        query = f"""SELECT row, count(*) FROM photos
            WHERE row IN ({{rows}}) AND {_VISIBLE} GROUP BY row"""
        return sum(self._by_row(query, rows).values())

    def names_at(self, row: int, among: PhotoFilter = ALL_PHOTOS) -> list[tuple[int, bytes]]:
        """Return ids and paths of the photos whose embedding is at `row`, by id."""
        return self.names([row], among)[row]

    def names(
        self, rows: Sequence[int], among: PhotoFilter = ALL_PHOTOS
    ) -> dict[int, list[tuple[int, bytes]]]:
        """Return ids and paths of the photos whose embeddings are at `rows`, by row and id."""
        names: dict[int, list[tuple[int, bytes]]] = {row: [] for row in rows}
        where, values = _visible(among)
        for start in range(0, len(rows), _ROWS_PER_QUERY):
            part = ",".join(map(str, rows[start : start + _ROWS_PER_QUERY]))
            query = (
                f"SELECT row, id, path FROM photos WHERE row IN ({part}) AND {where} ORDER BY id"
            )
            with values_checked(self._path):
                for row, photo_id, path in self._connection.execute(
                    query, self._generation | values
                ):
                    names[row].append((integer(photo_id), blob(path)))
        return names

    def photo(self, photo_id: int) -> Photo | None:
        """Return the photo with that id, if there is one."""
        if not 0 < photo_id < 1 << 63:
            return None
        query = f"SELECT {_PHOTO} FROM photos WHERE id = :id AND {_VISIBLE}"
        return next(self._select(query, _photo, id=photo_id), None)

    def recent(self, limit: int, offset: int, among: PhotoFilter = ALL_PHOTOS) -> list[Photo]:
        """Return photos by modification time, newest first; one of those that share a row.

        Args:
            limit: at most this many.
            offset: the number of newest photos to leave out.
            among: only these photos.
        """
        where, values = _visible(among)
        # SQLite takes the other columns from the row that has the maximum.
        query = f"""SELECT {_PHOTO}, max(mtime_ns) AS newest FROM photos WHERE {where}
            GROUP BY row ORDER BY newest DESC, row LIMIT :limit OFFSET :offset"""
        values |= {"limit": limit, "offset": offset}
        return list(self._select(query, lambda *columns: _photo(*columns[:-1]), **values))

    def count_undated(self, among: PhotoFilter) -> tuple[int, int]:
        """Return how many photos have no date, and of how many of these it was not read yet."""
        where, values = _visible(among)
        query = f"""SELECT count(*), count(*) FILTER (WHERE row NOT IN (SELECT row FROM dates))
            FROM photos WHERE {where}
            AND row NOT IN (SELECT row FROM dates WHERE taken NOT NULL)"""
        return next(self._select(query, lambda all_, new: (integer(all_), integer(new)), **values))

    def taken(self, row: int) -> str | None:
        """Return the date of the photo whose embedding is at `row`, if it is known."""
        return next((date for _, date in self.dates([row])), None)

    def dates(self, rows: Iterable[int]) -> list[tuple[int, str | None]]:
        """Return the rows whose dates are known, and the dates; `None` where a file has none."""
        query = "SELECT taken FROM dates WHERE row = :row"
        return [
            (row, taken)
            for row in rows
            for taken in self._select(query, lambda date: date and text(date), row=row)
        ]

    def folders(self) -> Counter[bytes]:
        """Return the number of photos directly in each folder."""
        return Counter(path.rpartition(b"/")[0] or b"/" for path in self.paths())

    def knows(self, path: bytes) -> bool:
        """Return whether a folder or file was indexed, or photos below it are known."""
        with values_checked(self._path):
            return path in load_roots(self._connection) or has_photos(self._connection, path)

    def paths(self, *, missing: bool = False) -> Iterator[bytes]:
        """Yield the paths of the photos, or of those that are missing."""
        where = _MISSING if missing else _VISIBLE
        yield from self._select(f"SELECT path FROM photos WHERE {where}", blob)

    def roots(self) -> list[bytes]:
        """Return the folders and files that photos were found below; none if unknown."""
        with values_checked(self._path):
            return load_roots(self._connection)

    def photos(self) -> Iterator[Photo]:
        """Yield the photos by ascending row."""
        query = f"SELECT {_PHOTO} FROM photos WHERE {_VISIBLE} ORDER BY row, id"
        yield from self._select(query, _photo)

    def entries(self) -> Iterator[Embedding]:
        """Yield the photos by ascending row, with the stamps of their files."""
        query = f"""SELECT path, size_bytes, mtime_ns, sha256, row, ctime_ns, inode, partial
            FROM photos WHERE {_VISIBLE} ORDER BY row, id"""
        yield from self._select(query, _entry)

    def failures(self) -> Iterator[Failure]:
        """Yield the files that could not be read."""
        query = "SELECT path, reason, size_bytes, mtime_ns, ctime_ns, inode FROM failures"
        yield from self._select(
            query, lambda path, reason, *stamps: Failure(blob(path), text(reason), *stamps)
        )

    def shards(self) -> dict[bytes, frozenset[PhotoShard]]:
        """Return the shards whose photos a merged gallery holds, by the folder they are of."""
        found = self._select("SELECT value FROM facts WHERE name = 'shards'", parse_shards)
        return next(found, {})

    def rules(self) -> WalkRules:
        """Return the rules of the walk."""
        with values_checked(self._path):
            return load_rules(self._connection)

    def region_count(self) -> int | None:
        """Return the number of regions of a photo; `None` if the gallery keeps none."""
        with values_checked(self._path):
            return load_region_count(self._connection)

    def region_spans(self) -> RegionSpans:
        """Return where the regions of the photos are; photos without regions are left out."""
        with values_checked(self._path):
            return load_spans(self._connection, _VISIBLE, self._generation)

    def region_boxes(self, photo_row: int) -> Boxes:
        """Return the boxes `(R, 4) float32` of the regions of the photo at `photo_row`."""
        found = self.regions_of(photo_row)
        return decode_boxes(b"") if found is None else found.boxes

    def regions_of(self, photo_row: int) -> RegionRows | None:
        """Return the regions of the photo at `photo_row`; `None` if they were not embedded yet."""
        with values_checked(self._path):
            return load_regions(self._connection, photo_row)

    def region_mean(self, dim: int) -> NDArray[np.float32]:
        """Return the mean `(dim,) float32` of the embeddings of all regions ever written."""
        with values_checked(self._path):
            total, count = load_region_sum(self._connection, dim)
            return np.asarray(total / max(count, 1), dtype=np.float32)

    def partly_readable(self) -> Iterator[tuple[bytes, str]]:
        """Yield the paths of photos that were read in part only, and what could not be read."""
        query = f"""SELECT path, partial FROM photos
            WHERE partial NOT NULL AND {_VISIBLE} ORDER BY path"""
        yield from self._select(query, lambda path, partial: (blob(path), text(partial)))

    def batches(self) -> Iterator[Batch]:
        """Yield the batches that were written to the vectors, by row."""
        query = "SELECT first_row, count, sha256 FROM batches ORDER BY first_row"
        yield from self._select(
            query, lambda row, count, sha: Batch(integer(row), integer(count), blob(sha).hex())
        )

    def damage(self) -> str | None:
        """Return what is wrong with the whole catalogue, in words; `None` if nothing is."""
        with values_checked(self._path):
            return soundness_problem(self._connection)

    def _select(self, query: str, make: Callable[..., T], **values: object) -> Iterator[T]:
        """Yield `make(*columns)` of each row of a query's answer.

        Raises:
            BadGallery: the catalogue is damaged, or `make` refuses a value.
        """
        with values_checked(self._path):
            for columns in self._connection.execute(query, self._generation | values):
                yield make(*columns)

    def _by_row(self, query: str, rows: NDArray[np.int64]) -> dict[int, int]:
        """Return the result of a query with `{rows}` in it: numbers by row."""
        answers: dict[int, int] = {}
        for start in range(0, len(rows), _ROWS_PER_QUERY):
            part = ",".join(map(str, rows[start : start + _ROWS_PER_QUERY].tolist()))
            with values_checked(self._path):
                found = self._connection.execute(query.format(rows=part), self._generation)
                pairs = dict(found.fetchall())
                if not {*map(type, pairs), *map(type, pairs.values())} <= {int}:
                    raise ValueError("values that are not whole numbers")
                answers |= pairs
        return answers


def dense_rows(
    connection: sqlite3.Connection, where: str, values: Mapping[str, object]
) -> NDArray[np.int64] | None:
    """Return the rows `(N,) int64` of photos if they are consecutive; `None` if there are gaps.

    Counting takes a third of the time of reading rows one by one.
    """
    query = f"""SELECT count(*), min(row), max(row)
        FROM (SELECT DISTINCT row FROM photos WHERE {where})"""
    count, first, last = connection.execute(query, values).fetchone()
    if not count or integer(first) < 0 or integer(last) - first + 1 != count:
        return None
    return np.arange(first, last + 1, dtype=np.int64)


def has_photos(connection: sqlite3.Connection, path: bytes) -> bool:
    """Return whether photos in a folder, or a file, are known, including missing ones."""
    query = """SELECT EXISTS (SELECT 1 FROM photos
        WHERE removed_in IS NULL AND path >= ? AND path < ?)"""
    found = (connection.execute(query, interval) for interval in (below(path), exactly(path)))
    return any(integer(cursor.fetchone()[0]) for cursor in found)


def _visible(among: PhotoFilter) -> tuple[str, dict[str, object]]:
    """Return the condition on a filter's photos that readers see, and its values."""
    condition, values = among.condition()
    return _VISIBLE + condition, values


def exactly(path: bytes) -> tuple[bytes, bytes]:
    """Return the interval of paths (end excluded) that holds `path` alone."""
    return path, path + b"\0"


def _photo(*columns: object) -> Photo:
    photo_id, path, size_bytes, mtime_ns, sha256, row, partial, ctime_ns, inode = columns
    return Photo(
        integer(photo_id),
        os.fsdecode(blob(path)),
        integer(size_bytes),
        integer(mtime_ns),
        blob(sha256).hex(),
        integer(row),
        None if partial is None else text(partial),
        None if ctime_ns is None else integer(ctime_ns),
        None if inode is None else integer(inode),
    )


def parse_shards(value: object) -> dict[bytes, frozenset[PhotoShard]]:
    """Return what `Catalogue.record_shards` recorded."""
    content = text(value)
    if not content.startswith("{"):  # merged by an older version, which did not tell folders apart
        return {b"/": frozenset(map(PhotoShard.parse, content.split()))} if content else {}
    return {
        os.fsencode(folder): frozenset(map(PhotoShard.parse, names))
        for folder, names in json.loads(content).items()
    }


def _entry(
    path: object, size: object, mtime: object, sha: object, row: object, *rest: Any
) -> Embedding:
    numbers = (integer(size), integer(mtime))
    return Embedding(blob(path), *numbers, blob(sha).hex(), integer(row), *rest)


def store_roots(connection: sqlite3.Connection, roots: Iterable[bytes]) -> int:
    """Add absolute paths to those that are known; return how many are new. In a transaction."""
    rows = ((root,) for root in roots)
    return connection.executemany("INSERT OR IGNORE INTO roots VALUES (?)", rows).rowcount


def load_roots(connection: sqlite3.Connection) -> list[bytes]:
    """Return the paths, sorted; none if an older sbtk, which stored none, made the catalogue."""
    return [blob(path) for (path,) in connection.execute("SELECT path FROM roots ORDER BY path")]


def store_rules(connection: sqlite3.Connection, rules: WalkRules) -> None:
    """Store the rules of the walk. Call it in a transaction."""
    connection.execute(
        "INSERT OR REPLACE INTO facts VALUES ('walk_rules', ?)", (json.dumps(asdict(rules)),)
    )


def load_rules(connection: sqlite3.Connection) -> WalkRules:
    """Return the rules of the last walk, or the default ones."""
    found = connection.execute("SELECT value FROM facts WHERE name = 'walk_rules'").fetchone()
    if found is None:
        return WalkRules()
    value = json.loads(text(found[0]))
    rules = WalkRules(
        tuple(value["exclude"]), bool(value["include_hidden"]), bool(value["follow_links"])
    )
    if not all(isinstance(pattern, str) for pattern in rules.exclude):
        raise TypeError("patterns that are not text")
    return rules


_NAMES = ("bits", "itq", "itq_sha256")


def store_itq(connection: sqlite3.Connection, itq: Itq | None) -> None:
    """Make the catalogue one of codes, or with `None` one of embeddings. Call it in a transaction.

    Versions of sbtk without codes refuse the catalogue of a binary gallery.
    """
    connection.executemany("DELETE FROM facts WHERE name = ?", [(name,) for name in _NAMES])
    version = EMBEDDINGS_SCHEMA
    if itq is not None:
        content = itq.to_bytes()
        values = (itq.bits, content, hashlib.sha256(content).hexdigest())
        connection.executemany("INSERT INTO facts VALUES (?, ?)", zip(_NAMES, values, strict=True))
        version = CODES_SCHEMA
    connection.execute(f"PRAGMA user_version = {version}")


def load_bits(connection: sqlite3.Connection) -> int | None:
    """Return the length of the gallery's codes; `None` if it holds embeddings."""
    found = connection.execute("SELECT value FROM facts WHERE name = 'bits'").fetchone()
    return None if found is None else integer(found[0])


def load_itq(connection: sqlite3.Connection, path: Path) -> Itq:
    """Return the ITQ of a binary gallery whose catalogue is at `path`.

    Raises:
        BadGallery: it is damaged.
    """
    facts = dict(
        connection.execute("SELECT name, value FROM facts WHERE name IN (?, ?, ?)", _NAMES)
    )
    content = facts.get("itq", b"")
    if (
        not isinstance(content, bytes)
        or hashlib.sha256(content).hexdigest() != facts.get("itq_sha256")
        or (itq := _itq_of(content)) is None
        or itq.bits != facts.get("bits")
    ):
        raise BadGallery(
            f"{path} holds a damaged ITQ, which makes the gallery's codes",
            "the one that was stored with the gallery",
            f"put {path.parent} aside and make it again with sbtk index PHOTOS --bits BITS",
        )
    return itq


def _itq_of(content: bytes) -> Itq | None:
    try:
        return Itq.from_bytes(content)
    except BadModel:
        return None
