"""What an update adds to photos that a gallery has: regions, dates, checksums and shared rows.

Galleries of older versions lack them, and get them without embedding whole frames again. Dates
come from the photos' files, and are kept with the rows of embeddings, since photos with the same
bytes share both.
"""

from __future__ import annotations

import os
import shlex
import time
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import partial
from pathlib import Path

import numpy as np

from sbtk_runtime.embedding.embedder import Embedder
from sbtk_runtime.embedding.stream import Embedded, EmbeddingStream
from sbtk_runtime.errors import BadConfig, BadGallery
from sbtk_runtime.exif import read_taken
from sbtk_runtime.files import open_regular, printable_name
from sbtk_runtime.gallery.catalogue import Origin
from sbtk_runtime.gallery.changes import Progress
from sbtk_runtime.gallery.region_rows import place_regions, sum_regions
from sbtk_runtime.gallery.rows import Batch, Shards, Vectors
from sbtk_runtime.gallery.schema import blob, catalogue_errors, integer, values_checked
from sbtk_runtime.gallery.writer import Catalogue
from sbtk_runtime.regions import RegionGrid, grid_of

_DATES_PAGE = 1000
_DATE_THREADS = 4
# Of photos with the same bytes one is enough. Those that are missing get no date.
_UNDATED = """SELECT row, path, size_bytes, mtime_ns FROM photos
    WHERE removed_in IS NULL AND missing_in IS NULL AND row > ?
    AND NOT EXISTS (SELECT 1 FROM dates WHERE dates.row = photos.row)
    GROUP BY row ORDER BY row LIMIT ?"""
_WITHOUT_CHECKSUMS = """SELECT first_row, count, sha256 FROM batches AS b WHERE NOT EXISTS
    (SELECT 1 FROM row_checksums AS r
     WHERE r.row >= b.first_row AND r.row < b.first_row + b.count)"""


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


def add_regions(
    catalogue: Catalogue,
    vectors: Vectors,
    stream: EmbeddingStream,
    wanted: Sequence[tuple[bytes, str, int]],
    *,
    commit_every: int,
    progress: Progress,
) -> int:
    """Embed the regions of photos of the gallery; return the number of photos that failed.

    Photos that have changed since they were embedded fail, too.

    Args:
        catalogue: the gallery's catalogue.
        vectors: the gallery's embeddings.
        stream: of the gallery's model and regions.
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
    with closing(stream.embed(paths, "photo")) as items:
        try:
            for count, item in enumerate(items, start=1):
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


def add_checksums(catalogue: Catalogue, vectors: Shards) -> None:
    """Store the checksums of intact rows that older versions wrote."""
    with values_checked(catalogue.path):
        found = catalogue.connection.execute(_WITHOUT_CHECKSUMS).fetchall()
        batches = [Batch(integer(first), integer(n), blob(sha).hex()) for first, n, sha in found]
    for batch in batches:
        if vectors.is_intact(batch):
            rows = np.arange(batch.first_row, batch.first_row + batch.count)
            content, _ = vectors.read_bytes(rows)
            catalogue.store_checksums(batch.first_row, [zlib.crc32(row) for row in content])


def share_rows(catalogue: Catalogue, vectors: Shards) -> int:
    """Let photos with the same bytes share an embedding; return how many got that of another."""
    return catalogue.share_rows(partial(_first_intact, catalogue, vectors))


def _commit(catalogue: Catalogue, vectors: Vectors, done: list[Embedded], rows: list[int]) -> None:
    """Write the regions of the photos at `rows`, and empty both lists."""
    if not done:
        return
    first_row = catalogue.committed_rows()
    embeddings = np.concatenate([item.regions for item in done if item.regions is not None])
    batches = vectors.append(first_row, embeddings) if len(embeddings) else []
    catalogue.commit((), (), batches, place_regions(done, rows, first_row), sum_regions(done))
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


def _first_intact(catalogue: Catalogue, vectors: Shards, rows: list[int]) -> int | None:
    """Return the first row that matches its checksum; `None` if there is none."""
    known = catalogue.checksums(rows)
    content, is_whole = vectors.read_bytes(np.array(rows, dtype=np.int64))
    for row, data, whole in zip(rows, content, is_whole, strict=True):
        if whole and known.get(row) == zlib.crc32(data):
            return row
    return None
