"""Updates of a gallery that keeps regions of its photos."""

from __future__ import annotations

import os
import shlex
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sbtk_runtime.embedding.embedder import Embedded, Embedder
from sbtk_runtime.errors import BadConfig, BadGallery
from sbtk_runtime.files import printable_name
from sbtk_runtime.gallery.catalogue import Origin
from sbtk_runtime.gallery.region_rows import RegionRows
from sbtk_runtime.gallery.rows import Vectors
from sbtk_runtime.gallery.writer import Catalogue
from sbtk_runtime.regions import RegionGrid, grid_of


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
