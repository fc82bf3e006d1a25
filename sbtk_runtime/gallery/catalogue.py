"""The catalogue: one row per photo in SQLite, the truth about what a gallery holds.

A photo keeps its id for as long as it is in the gallery. What is known of it comes in versions,
each valid from the generation `added_in` until before the generation `removed_in`, so a reader sees
one generation while a writer prepares the next. From the generation `missing_in` on the photo was
not found on disk: readers do not see it, but its embedding is kept. `row` is the number of the
photo's embedding in the vectors; photos of the same bytes share it. Paths are the bytes that the
file system has.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sbtk_runtime.gallery.catalogue_check import soundness_problem
from sbtk_runtime.gallery.catalogue_codes import stored_bits, stored_itq
from sbtk_runtime.gallery.catalogue_database import (
    CATALOGUE_NAME,
    connect_reader,
    connect_snapshot,
    show_as_current,
)
from sbtk_runtime.gallery.catalogue_roots import stored_roots
from sbtk_runtime.gallery.catalogue_values import blob, integer, text, values_checked
from sbtk_runtime.gallery.shards import Batch
from sbtk_runtime.itq import Itq
from sbtk_runtime.manifest import SnapshotRecord

_VISIBLE = (
    "added_in <= :generation AND (removed_in IS NULL OR removed_in > :generation) "
    "AND (missing_in IS NULL OR missing_in > :generation)"
)
# Kept, but hidden, as in `CatalogueView`.
_MISSING = (
    "added_in <= :generation AND (removed_in IS NULL OR removed_in > :generation) "
    "AND missing_in <= :generation"
)
_PHOTO = "id, path, size_bytes, mtime_ns, sha256, row, partial"
_ROWS_PER_QUESTION = 500


@dataclass(frozen=True)
class Photo:
    """One photo of a gallery, as of one generation.

    `partial` says what could not be read of a photo that was read in part, else it is `None`.
    """

    id: int
    path: bytes
    size_bytes: int
    mtime_ns: int
    sha256: str
    row: int
    partial: str | None = None


@dataclass(frozen=True)
class Origin:
    """What made a gallery's embeddings; the same for all of them.

    `bits` is the length of the codes that a binary gallery keeps in their place.
    """

    model_id: str
    precision: str
    dim: int
    preprocessing: str
    bits: int | None = None


@dataclass(frozen=True)
class Embedding:
    """A photo whose embedding was written: where it lies and which bytes it is of.

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
    """A photo that could not be read. The stamps are `None` where it could not be looked at."""

    path: bytes
    reason: str
    size_bytes: int | None = None
    mtime_ns: int | None = None
    ctime_ns: int | None = None
    inode: int | None = None


class CatalogueView:
    """The photos of one generation; what a writer does meanwhile does not show.

    It holds a snapshot of the database until it is closed. Any thread may ask it.

    Args:
        folder: the gallery's.
        generation: which one.
        snapshot: the copy that was published with it; without one the writer's own is read.

    Raises:
        BadGallery: the snapshot or the catalogue is missing, damaged, or cannot be read.
    """

    def __init__(
        self, folder: Path, generation: int, snapshot: SnapshotRecord | None = None
    ) -> None:
        self._path = folder / (CATALOGUE_NAME if snapshot is None else snapshot.file)
        self._generation = {"generation": generation}
        with values_checked(self._path):
            self._connection = (
                connect_reader(self._path)
                if snapshot is None
                else connect_snapshot(self._path, snapshot.sha256)
            )
            show_as_current(self._connection)

    def close(self) -> None:
        """Lets the snapshot go."""
        self._connection.close()

    def dim(self) -> int:
        """Returns the length of an embedding that the catalogue was made for."""
        with values_checked(self._path):
            found = self._connection.execute("SELECT value FROM facts WHERE name = 'dim'")
            (value,) = found.fetchone() or (0,)
            return integer(value)

    def bits(self) -> int | None:
        """Returns the length of the codes; `None` if the catalogue is of embeddings."""
        with values_checked(self._path):
            return stored_bits(self._connection)

    def itq(self) -> Itq:
        """Returns what makes the codes of a binary gallery.

        Raises:
            BadGallery: it is damaged.
        """
        with values_checked(self._path):
            return stored_itq(self._connection, self._path)

    def count(self) -> int:
        """Returns the number of photos; photos of the same bytes share a row."""
        query = f"SELECT count(*) FROM photos WHERE {_VISIBLE}"
        with values_checked(self._path):
            return integer(self._connection.execute(query, self._generation).fetchone()[0])

    def rows(self, under: bytes | None = None) -> NDArray[np.int64]:
        """Returns the rows of the photos, or of those in the folder `under`: ascending, unique."""
        query = f"SELECT DISTINCT row FROM photos WHERE {_VISIBLE}"
        values: dict[str, object] = dict(self._generation)
        if under is not None:
            query += " AND path >= :low AND path < :high"
            values["low"], values["high"] = below(under)
        elif (dense := self._dense_rows()) is not None:
            return dense
        with values_checked(self._path):
            found = self._connection.execute(query + " ORDER BY row", values)
            # NumPy would cut a fraction off; `index` refuses all but whole numbers.
            rows = np.fromiter(
                map(operator.index, map(operator.itemgetter(0), found)), dtype=np.int64
            )
            if len(rows) and (rows[0] < 0 or (np.diff(rows) < 0).any()):
                raise ValueError("rows that are not in order")
            return rows

    def ids(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Returns the ids of the photos at `rows`, `(N,) int64`; 0 where there is none.

        Of photos that share a row it is the lowest.
        """
        query = (
            f"SELECT row, id FROM photos WHERE row IN ({{rows}}) AND {_VISIBLE} ORDER BY id DESC"
        )
        ids = self._by_row(query, rows)
        return np.array([ids.get(row, 0) for row in rows.tolist()], dtype=np.int64)

    def checksums(self, rows: NDArray[np.int64]) -> dict[int, int]:
        """Returns the committed CRC-32 of each of `rows (N,) int64`, by row.

        Rows that an older sbtk wrote are left out until the next 'sbtk index'.
        """
        return self._by_row("SELECT row, crc32 FROM row_checksums WHERE row IN ({rows})", rows)

    def count_between(self, low: int, high: int) -> int:
        """Returns the number of photos at rows `low` to `high` (end excluded)."""
        query = f"""SELECT count(*) FROM photos
            WHERE row >= :low AND row < :high AND {_VISIBLE}"""
        with values_checked(self._path):
            values = {"low": low, "high": high, **self._generation}
            (count,) = self._connection.execute(query, values).fetchone()
            return integer(count)

    def count_at(self, rows: NDArray[np.int64]) -> int:
        """Returns the number of photos at `rows (N,) int64`."""
        query = f"""SELECT row, count(*) FROM photos
            WHERE row IN ({{rows}}) AND {_VISIBLE} GROUP BY row"""
        return sum(self._by_row(query, rows).values())

    def names_at(self, row: int, under: bytes | None = None) -> list[tuple[int, bytes]]:
        """Returns ids and paths of the photos whose embedding is at `row`, by id.

        With `under` only those in that folder.
        """
        query = f"SELECT id, path FROM photos WHERE row = :row AND {_VISIBLE}"
        values: dict[str, object] = {"row": row, **self._generation}
        if under is not None:
            query += " AND path >= :low AND path < :high"
            values["low"], values["high"] = below(under)
        with values_checked(self._path):
            found = self._connection.execute(f"{query} ORDER BY id", values)
            return [(integer(photo_id), blob(path)) for photo_id, path in found]

    def photo(self, photo_id: int) -> Photo | None:
        """Returns the photo with that id, if there is one."""
        if not 0 < photo_id < 1 << 63:
            return None
        query = f"""SELECT {_PHOTO} FROM photos
            WHERE id = :id AND {_VISIBLE}"""
        with values_checked(self._path):
            found = self._connection.execute(query, {"id": photo_id, **self._generation}).fetchone()
            return None if found is None else _photo(found)

    def folders(self) -> Counter[bytes]:
        """Returns how many photos lie in each folder itself, not below it."""
        query = f"SELECT path FROM photos WHERE {_VISIBLE}"
        with values_checked(self._path):
            found = self._connection.execute(query, self._generation)
            return Counter(blob(path).rpartition(b"/")[0] or b"/" for (path,) in found)

    def knows(self, path: bytes) -> bool:
        """Returns whether a folder or file was indexed, or photos below it are known."""
        query = """SELECT EXISTS (SELECT 1 FROM photos
            WHERE removed_in IS NULL AND path >= ? AND path < ?)"""
        with values_checked(self._path):
            return path in stored_roots(self._connection) or any(
                self._connection.execute(query, interval).fetchone()[0]
                for interval in (below(path), exactly(path))
            )

    def paths(self, *, missing: bool = False) -> Iterator[bytes]:
        """Yields the paths of the photos, or of those that are missing."""
        query = f"SELECT path FROM photos WHERE {_MISSING if missing else _VISIBLE}"
        with values_checked(self._path):
            for (path,) in self._connection.execute(query, self._generation):
                yield blob(path)

    def roots(self) -> list[bytes]:
        """Returns the folders and files that photos were found below; none if it is unknown."""
        with values_checked(self._path):
            return stored_roots(self._connection)

    def photos(self) -> Iterator[Photo]:
        """Yields the photos by ascending row."""
        query = f"SELECT {_PHOTO} FROM photos WHERE {_VISIBLE} ORDER BY row, id"
        with values_checked(self._path):
            for found in self._connection.execute(query, self._generation):
                yield _photo(found)

    def partly_readable(self) -> Iterator[tuple[bytes, str]]:
        """Yields the paths of photos that were read in part only, and what could not be read."""
        query = f"""SELECT path, partial FROM photos
            WHERE partial NOT NULL AND {_VISIBLE} ORDER BY path"""
        with values_checked(self._path):
            for path, partial in self._connection.execute(query, self._generation):
                yield blob(path), text(partial)

    def batches(self) -> Iterator[Batch]:
        """Yields what was written to the vectors, by row."""
        query = "SELECT first_row, count, sha256 FROM batches ORDER BY first_row"
        with values_checked(self._path):
            for first_row, count, sha256 in self._connection.execute(query):
                yield Batch(integer(first_row), integer(count), blob(sha256).hex())

    def damage(self) -> str | None:
        """Returns what is wrong with the whole catalogue, in words; `None` if nothing is."""
        with values_checked(self._path):
            return soundness_problem(self._connection)

    def _by_row(self, query: str, rows: NDArray[np.int64]) -> dict[int, int]:
        """Returns what a query with `{rows}` in it answers, as numbers by row."""
        answers: dict[int, int] = {}
        for start in range(0, len(rows), _ROWS_PER_QUESTION):
            part = ",".join(map(str, rows[start : start + _ROWS_PER_QUESTION].tolist()))
            with values_checked(self._path):
                found = self._connection.execute(query.format(rows=part), self._generation)
                answers.update((integer(row), integer(value)) for row, value in found)
        return answers

    def _dense_rows(self) -> NDArray[np.int64] | None:
        """Returns the photos' rows if none between the first and the last is without a photo.

        Counting takes a third of the time of handing out rows one by one.
        """
        query = f"""SELECT count(*), min(row), max(row)
            FROM (SELECT DISTINCT row FROM photos WHERE {_VISIBLE})"""
        with values_checked(self._path):
            count, first, last = self._connection.execute(query, self._generation).fetchone()
            if not count or integer(first) < 0 or integer(last) - first + 1 != count:
                return None
            return np.arange(first, last + 1, dtype=np.int64)


def below(path: bytes) -> tuple[bytes, bytes]:
    """Returns the interval of paths (end excluded) that lie in the folder `path`."""
    folder = path.rstrip(b"/")
    return folder + b"/", folder + b"0"  # "0" is the character after "/"


def exactly(path: bytes) -> tuple[bytes, bytes]:
    """Returns the interval of paths (end excluded) that holds `path` alone."""
    return path, path + b"\0"


def _photo(found: tuple[object, ...]) -> Photo:
    photo_id, path, size_bytes, mtime_ns, sha256, row, partial = found
    return Photo(
        integer(photo_id),
        blob(path),
        integer(size_bytes),
        integer(mtime_ns),
        blob(sha256).hex(),
        integer(row),
        None if partial is None else text(partial),
    )
