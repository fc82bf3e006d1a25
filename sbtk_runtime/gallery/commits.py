"""What an update commits: embedded photos, copies that wait for them, regions and dates.

The catalogue keeps a date, from the photo's file, with the row of each embedding, since photos with
the same bytes share both. Galleries of older versions get dates at the next update, and regions if
they are asked for, without embedding whole frames again.
"""

from __future__ import annotations

import os
import shlex
import sqlite3
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import NDArray

from sbtk_runtime.embedding.embedder import Embedded, Embedder, Failed, Known
from sbtk_runtime.errors import BadConfig, BadGallery
from sbtk_runtime.exif import read_taken
from sbtk_runtime.files import open_regular, printable_name
from sbtk_runtime.gallery.catalogue import Embedding, Failure, Origin
from sbtk_runtime.gallery.changes import Changes
from sbtk_runtime.gallery.region_rows import RegionRows
from sbtk_runtime.gallery.rows import Vectors
from sbtk_runtime.gallery.schema import blob, catalogue_errors, integer
from sbtk_runtime.gallery.writer import Catalogue, Stamps
from sbtk_runtime.regions import RegionGrid, grid_of

_IS_KNOWN = "SELECT EXISTS (SELECT 1 FROM photos WHERE sha256 = ? AND removed_in IS NULL)"
_DATES_PAGE = 1000
_DATE_THREADS = 4
# Of photos with the same bytes one is enough. Those that are missing get no date.
_UNDATED = """SELECT row, path, size_bytes, mtime_ns FROM photos
    WHERE removed_in IS NULL AND missing_in IS NULL AND row > ?
    AND NOT EXISTS (SELECT 1 FROM dates WHERE dates.row = photos.row)
    GROUP BY row ORDER BY row LIMIT ?"""


class Copies:
    """Finds files of an update that are identical, so that each content is embedded once.

    The first file with a content that is not in the catalogue is embedded, and later ones wait for
    it. Only uncommitted and failed files are in memory.

    Attributes:
        waiting: copies of files that are not committed yet.
    """

    def __init__(self, catalogue: Catalogue) -> None:
        self._path = catalogue.path
        self._lock = threading.Lock()
        # A separate connection, for the threads of the decoders.
        self._connection = sqlite3.connect(
            catalogue.path, isolation_level=None, check_same_thread=False, timeout=30
        )
        self._first: set[str] = set()
        self._failed: dict[str, str] = {}
        self.waiting: list[Known] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._connection.close()

    def is_known(self, sha256: str) -> bool:
        """Return whether a content is in the catalogue, is being embedded, or has failed."""
        with self._lock, catalogue_errors(self._path):
            if sha256 in self._first or sha256 in self._failed:
                return True
            content = bytes.fromhex(sha256)
            if self._connection.execute(_IS_KNOWN, (content,)).fetchone()[0]:
                return True
            self._first.add(sha256)
            return False

    def note_failed(self, item: Failed) -> None:
        """Record that a file, and so its copies, cannot be embedded."""
        if item.source is not None:
            with self._lock:
                self._failed[item.source.sha256] = item.reason
                self._first.discard(item.source.sha256)

    def note_committed(self, items: list[Embedded]) -> None:
        """Record that files are in the catalogue."""
        with self._lock:
            self._first.difference_update(item.source.sha256 for item in items)

    def why_failed(self, item: Known) -> str | None:
        """Return why the original of a copy could not be embedded; `None` if it could."""
        return self._failed.get(item.source.sha256)


class PendingCommit:
    """Results of an update that its next commit writes."""

    def __init__(self, copies: Copies) -> None:
        self._copies = copies
        self.embedded: list[Embedded] = []
        self.failures: list[Failure] = []

    @property
    def size(self) -> int:
        """The number of files that wait."""
        return len(self.embedded) + len(self.failures) + len(self._copies.waiting)

    def take(self, item: Embedded | Failed | Known, changes: Changes) -> None:
        """Add a result of the embedder."""
        if isinstance(item, Embedded):
            self.embedded.append(item)
        elif isinstance(item, Known):
            self._copies.waiting.append(item)
        else:
            self._copies.note_failed(item)
            path = os.fsencode(item.path)
            self.failures.append(
                changes.failure(path, item.reason, was_read=item.source is not None)
            )

    def copies(
        self, catalogue: Catalogue, photos: list[Embedding], changes: Changes
    ) -> list[Embedding]:
        """Return the copies of photos that are in the catalogue or in this commit.

        Copies of failed files fail, too. Copies of files that are not embedded yet keep waiting.
        """
        here = {photo.sha256: photo for photo in photos}
        found, waiting = [], []
        for item in self._copies.waiting:
            path, sha256 = os.fsencode(item.path), item.source.sha256
            first = here.get(sha256) or catalogue.embedding_of(sha256)
            if first is not None:
                found.append(_copy(item, first, changes.stamps(path)))
            elif (reason := self._copies.why_failed(item)) is not None:
                self.failures.append(changes.failure(path, reason, was_read=True))
            else:
                waiting.append(item)
        self._copies.waiting[:] = waiting
        return found

    def clear(self) -> None:
        """Drop what was committed; copies keep waiting."""
        self._copies.note_committed(self.embedded)
        self.embedded.clear()
        self.failures.clear()


def embedding_of(item: Embedded, row: int, stamps: Stamps) -> Embedding:
    """Return what the catalogue stores of a photo whose embedding is at `row`."""
    mtime_ns, ctime_ns, inode = stamps
    return Embedding(
        path=os.fsencode(item.path),
        size_bytes=item.source.size_bytes,
        mtime_ns=mtime_ns,
        sha256=item.source.sha256,
        row=row,
        ctime_ns=ctime_ns,
        inode=inode,
        partial="; ".join(item.notices) or None,
    )


def take_regions(
    folder: Path, catalogue: Catalogue, origin: Origin, asked: int | None, embedder: Embedder
) -> RegionGrid | None:
    """Return the grid of the gallery's regions, and make the gallery keep regions if `asked`.

    Returns `None` if it keeps none.

    Raises:
        BadConfig: the gallery is binary.
        BadGallery: the gallery keeps another number of regions.
        BadModel: the model embeds no regions.
    """
    kept = catalogue.region_count()
    if asked is None and kept is None:
        return None
    name = shlex.quote(printable_name(folder))
    if origin.bits is not None:
        raise BadConfig(
            f"{name} keeps {origin.bits}-bit codes",
            "regions in a gallery of embeddings",
            "make another: sbtk index PHOTOS --regions --gallery regions.sbtk",
        )
    if kept is not None and asked not in (None, kept):
        raise BadGallery(
            f"{name} keeps {kept} regions of each photo, not {asked}",
            "the same for all photos of a gallery, as it was made",
            f"sbtk index PHOTOS --regions {asked} --gallery regions-{asked}.sbtk",
        )
    grid = grid_of(kept or asked or 0)
    if kept is None:
        embedder.open_regions(grid)
        catalogue.keep_regions(len(grid))
    return grid


def region_rows(
    embedded: Sequence[Embedded], photo_rows: Sequence[int], first_row: int
) -> list[RegionRows]:
    """Return the rows of the photos' regions, which are consecutive.

    Args:
        embedded: the photos.
        photo_rows: rows of their whole frames.
        first_row: row of the first region.
    """
    found = []
    for item, photo_row in zip(embedded, photo_rows, strict=True):
        if item.boxes is not None:
            found.append(RegionRows(photo_row, first_row, item.boxes))
            first_row += len(item.boxes)
    return found


def region_sum(embedded: Sequence[Embedded]) -> NDArray[np.float64] | None:
    """Return the sum `(D,)` of the regions' embeddings; `None` if there are no regions."""
    parts = [item.regions for item in embedded if item.regions is not None]
    return np.concatenate(parts).sum(axis=0, dtype=np.float64) if parts else None


def add_regions(
    catalogue: Catalogue,
    vectors: Vectors,
    embedder: Embedder,
    grid: RegionGrid,
    wanted: Sequence[tuple[bytes, str, int]],
    *,
    commit_every: int,
    progress: Callable[[int, int | None, float], None],
) -> int:
    """Embed the regions of photos of the gallery; return the number of photos that failed.

    Photos that have changed since they were embedded fail, too.

    Args:
        catalogue: the gallery's catalogue.
        vectors: the gallery's embeddings.
        embedder: an embedder of the gallery's model.
        grid: the regions.
        wanted: path, SHA-256 and row of each photo.
        commit_every: photos between two commits.
        progress: called after every photo; if it raises `KeyboardInterrupt`, finished photos are
            committed.
    """
    done: list[Embedded] = []
    rows: list[int] = []
    left = 0
    paths = (Path(os.fsdecode(path)) for path, _, _ in wanted)
    started = time.perf_counter()
    with closing(embedder.stream_unknown(paths, "photo", None, grid)) as stream:
        try:
            for count, item in enumerate(stream, start=1):
                _, sha256, row = wanted[count - 1]
                if isinstance(item, Embedded) and item.source.sha256 == sha256:
                    done.append(item)
                    rows.append(row)
                else:
                    left += 1
                if len(done) >= commit_every:
                    _commit(catalogue, vectors, done, rows)
                progress(count, len(wanted), count / (time.perf_counter() - started))
        except KeyboardInterrupt:
            _commit(catalogue, vectors, done, rows)
            raise
    _commit(catalogue, vectors, done, rows)
    return left


def add_dates(catalogue: Catalogue, progress: Callable[[int], None]) -> None:
    """Read the dates of photos whose dates are not known, and commit them in batches.

    Photos that have changed since they were embedded are left out; the next update has their dates.

    Args:
        catalogue: the gallery's.
        progress: called with the number of photos after each full batch; what it raises ends the
            work.
    """
    last = -1
    count = 0
    with ThreadPoolExecutor(_DATE_THREADS, thread_name_prefix="sbtk-dates") as threads:
        while True:
            with catalogue_errors(catalogue.path):
                found = catalogue.connection.execute(_UNDATED, (last, _DATES_PAGE)).fetchall()
            if not found:
                return
            last = integer(found[-1][0])
            dates = [date for date in threads.map(_read_date, found) if date is not None]
            catalogue.store_dates(dates)
            count += len(found)
            if len(found) < _DATES_PAGE:
                return
            progress(count)


def _copy(item: Known, first: Embedding, stamps: Stamps) -> Embedding:
    mtime_ns, ctime_ns, inode = stamps
    path = os.fsencode(item.path)
    return replace(first, path=path, mtime_ns=mtime_ns, ctime_ns=ctime_ns, inode=inode)


def _commit(catalogue: Catalogue, vectors: Vectors, done: list[Embedded], rows: list[int]) -> None:
    """Write the regions of the photos at `rows`, and empty both lists."""
    if not done:
        return
    first_row = catalogue.committed_rows()
    embeddings = np.concatenate([item.regions for item in done if item.regions is not None])
    batches = vectors.append(first_row, embeddings) if len(embeddings) else []
    catalogue.commit((), (), batches, region_rows(done, rows, first_row), region_sum(done))
    done.clear()
    rows.clear()


def _read_date(found: tuple[object, ...]) -> tuple[int, str | None] | None:
    """Return row and date of a photo; `None` if its file is not the one that was embedded."""
    row, path, size_bytes, mtime_ns = found
    try:
        with os.fdopen(open_regular(Path(os.fsdecode(blob(path)))), "rb") as file:
            status = os.fstat(file.fileno())
            if (status.st_size, status.st_mtime_ns) != (size_bytes, mtime_ns):
                return None
            taken = read_taken(file)
    except OSError:
        return None
    return integer(row), None if taken is None else taken.isoformat()
