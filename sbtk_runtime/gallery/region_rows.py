"""The rows of regions in a catalogue: several for each photo, in addition to its whole frame.

Regions belong to the row of a whole frame, so identical photos share them, and a photo that is
moved, missing or found again keeps them. They are not versioned, because readers hold snapshots.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sbtk_runtime.embedding.stream import Embedded
from sbtk_runtime.gallery.rows import Rows
from sbtk_runtime.gallery.schema import blob, has_regions, integer
from sbtk_runtime.regions import Boxes


@dataclass(frozen=True)
class RegionRows:
    """The regions of a photo: rows `first_row` to `first_row + len(boxes) - 1`.

    Attributes:
        photo_row: row of its whole frame.
        first_row: row of its first region.
        boxes: `(R, 4) float32`: x, y, width and height of each, 0 to 1 of the upright photo.
    """

    photo_row: int
    first_row: int
    boxes: Boxes


@dataclass(frozen=True)
class RegionSpans:
    """Where the regions of a generation's photos are: one entry for each photo, by first row.

    Attributes:
        photo_rows: `(P,) int64`, rows of whole frames.
        first_rows: `(P,) int64`, ascending.
        counts: `(P,) int64`, each at least 1.
    """

    photo_rows: Rows
    first_rows: Rows
    counts: Rows

    def rows(self) -> Rows:
        """Return the rows of all regions, `(M,) int64`, ascending."""
        starts = np.cumsum(self.counts) - self.counts
        shifts = np.repeat(self.first_rows - starts, self.counts)
        return np.asarray(np.arange(len(shifts), dtype=np.int64) + shifts)

    def owners(self, rows: Rows) -> Rows:
        """Return the places of the photos whose regions are at `rows (N,) int64`; -1 for none."""
        places = np.searchsorted(self.first_rows, rows, side="right") - 1
        is_after = places >= 0
        ends = (self.first_rows + self.counts)[places] if len(self.counts) else rows
        return np.where(is_after & (rows < ends), places, -1)

    def among(self, photo_rows: Rows) -> RegionSpans:
        """Return those of the photos at `photo_rows (N,) int64`."""
        kept = np.isin(self.photo_rows, photo_rows)
        return RegionSpans(self.photo_rows[kept], self.first_rows[kept], self.counts[kept])


def encode_boxes(boxes: Boxes) -> bytes:
    """Return boxes `(R, 4) float32` as the catalogue stores them."""
    return np.ascontiguousarray(boxes, dtype="<f4").tobytes()


def decode_boxes(content: bytes) -> Boxes:
    """Return boxes `(R, 4) float32` from the bytes that the catalogue stores.

    Raises:
        ValueError: a box is not within its photo.
    """
    boxes = np.frombuffer(content, dtype="<f4").reshape(-1, 4).astype(np.float32)
    ends = boxes[:, :2] + boxes[:, 2:]
    if not (np.isfinite(boxes).all() and (boxes >= 0).all() and (ends <= 1 + 1e-4).all()):
        raise ValueError("a region outside its photo")
    return boxes


def load_region_count(connection: sqlite3.Connection) -> int | None:
    """Return the number of regions of a photo; `None` if the gallery keeps none."""
    if not has_regions(connection):
        return None
    found = connection.execute("SELECT value FROM facts WHERE name = 'regions'").fetchone()
    return None if found is None else integer(found[0])


def load_region_sum(connection: sqlite3.Connection, dim: int) -> tuple[NDArray[np.float64], int]:
    """Return the sum `(dim,)` of the embeddings of all regions ever written, and their number."""
    query = "SELECT name, value FROM facts WHERE name IN ('region_sum', 'region_rows')"
    facts = dict(connection.execute(query))
    if not facts:
        return np.zeros(dim), 0
    total = np.frombuffer(blob(facts.get("region_sum")), dtype="<f8")
    if total.shape != (dim,) or not np.isfinite(total).all():
        raise ValueError(f"a sum of {total.shape} numbers")
    return total, integer(facts.get("region_rows"))


def load_spans(
    connection: sqlite3.Connection, visible: str, values: Mapping[str, object]
) -> RegionSpans:
    """Return where the regions are of the photos for which the condition `visible` is true."""
    found: list[tuple[int, int, int]] = []
    if load_region_count(connection) is not None:
        query = f"""SELECT photo_row, first_row, count FROM regions WHERE count > 0
            AND EXISTS (SELECT 1 FROM photos WHERE row = photo_row AND {visible})
            ORDER BY first_row"""
        found = connection.execute(query, values).fetchall()
    numbers = np.array(found, dtype=np.int64).reshape(-1, 3)
    spans = RegionSpans(*np.ascontiguousarray(numbers.T))
    if (np.diff(spans.first_rows) < spans.counts[:-1]).any():
        raise ValueError("regions of two photos in one row")
    return spans


def load_regions(connection: sqlite3.Connection, photo_row: int) -> RegionRows | None:
    """Return the regions of the photo at `photo_row`; `None` if they were not embedded yet."""
    if load_region_count(connection) is None:
        return None
    query = "SELECT first_row, boxes FROM regions WHERE photo_row = ?"
    found = connection.execute(query, (photo_row,)).fetchone()
    if found is None:
        return None
    return RegionRows(photo_row, integer(found[0]), decode_boxes(blob(found[1])))


def place_regions(
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


def sum_regions(embedded: Sequence[Embedded]) -> NDArray[np.float64] | None:
    """Return the sum `(D,)` of the regions' embeddings; `None` if there are no regions."""
    parts = [item.regions for item in embedded if item.regions is not None]
    return np.concatenate(parts).sum(axis=0, dtype=np.float64) if parts else None


def put_regions(
    connection: sqlite3.Connection,
    regions: Iterable[RegionRows],
    region_sum: NDArray[np.float64],
) -> None:
    """Store regions, and add the sum of their embeddings, `(D,)`. Call it in a transaction."""
    values = [
        (each.photo_row, each.first_row, len(each.boxes), encode_boxes(each.boxes))
        for each in regions
    ]
    connection.executemany("INSERT OR REPLACE INTO regions VALUES (?, ?, ?, ?)", values)
    total, count = load_region_sum(connection, len(region_sum))
    facts = {
        "region_sum": (total + region_sum).astype("<f8").tobytes(),
        "region_rows": count + sum(value[2] for value in values),
    }
    connection.executemany("INSERT OR REPLACE INTO facts VALUES (?, ?)", facts.items())
