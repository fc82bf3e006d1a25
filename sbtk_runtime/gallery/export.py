"""A gallery's embeddings and photos in formats that any tool reads."""

from __future__ import annotations

import csv
import itertools
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sbtk_runtime.bundle import itq_name
from sbtk_runtime.files import atomic_path, write_atomically
from sbtk_runtime.gallery.catalogue import CatalogueView, Photo
from sbtk_runtime.gallery.folder import open_published, open_rows, path_fields
from sbtk_runtime.gallery.region_rows import RegionRows
from sbtk_runtime.gallery.row_check import RowCheck
from sbtk_runtime.gallery.rows import CodeShards, Rows, Vectors

EMBEDDINGS_NAME = "embeddings.npy"
CODES_NAME = "codes.npy"
TABLE_NAME = "photos.csv"
REGIONS_NAME, REGIONS_TABLE_NAME = "regions.npy", "regions.csv"
PARQUET_NAME = "photos.parquet"

_TABLE_ROWS = 512
_REGION_PHOTOS = 64
_REGION_COLUMNS = ("id", "x", "y", "width", "height")
_COLUMNS = ("id", "path", "path_bytes", "size_bytes", "mtime_ns", "sha256")


@dataclass(frozen=True)
class ExportReport:
    """What was written: the files, and the photos left out because their rows are damaged.

    `left_out_regions` counts photos whose regions were left out because one is damaged. `notices`
    are sentences for the user.
    """

    files: tuple[Path, ...]
    count: int
    left_out: int
    left_out_regions: int = 0
    notices: tuple[str, ...] = ()


def export_gallery(folder: Path, out_folder: Path) -> ExportReport:
    """Write the embeddings and, in the same order, a table of the photos.

    `embeddings.npy` is `(N, D) float32`, unit rows. A binary gallery has `codes.npy` instead,
    `(N, bits / 8) uint8` as `numpy.packbits` packs them, and `itq<bits>.npz`, which makes codes of
    embeddings: bit b is `(row - mean) @ projection[:, b] > 0`.

    The tables, `photos.csv` and where pyarrow is installed `photos.parquet`, have the columns id,
    path, path_bytes (base64, and path empty, where the path is not UTF-8), size_bytes, mtime_ns
    and sha256. Memory does not grow with N.

    A gallery with regions also has `regions.npy`, `(M, D) float32`, and in the same order
    `regions.csv` with the id of the photo and the box of each region, 0 to 1 of the upright photo.

    Raises:
        BadGallery: there is no gallery in `folder`, or what makes its codes is damaged.
        DiskFull: there is no space for the files.
    """
    notices: list[str] = []
    out_folder.mkdir(parents=True, exist_ok=True)
    manifest, view = open_published(folder, notices.append)
    with (
        closing(view),
        closing(open_rows(folder, manifest.dim, manifest.bits)) as vectors,
    ):
        vectors.hold()
        rows = view.rows()
        is_whole = RowCheck(view, vectors).is_intact(rows)
        left_out = set(rows[~is_whole].tolist())
        # Photos of the same bytes share a row, and each has a line in the table.
        photo_rows = np.fromiter((photo.row for photo in view.photos()), dtype=np.int64)
        kept = photo_rows[np.isin(photo_rows, rows[is_whole])]
        name = EMBEDDINGS_NAME if manifest.bits is None else CODES_NAME
        files = [out_folder / name, out_folder / TABLE_NAME]
        parts = (kept[start : start + _TABLE_ROWS] for start in range(0, len(kept), _TABLE_ROWS))
        _write_rows(files[0], vectors, len(kept), parts)
        if manifest.bits is not None:
            files.append(out_folder / itq_name(manifest.bits))
            write_atomically(files[-1], view.itq().to_bytes())
        _write_csv(out_folder / TABLE_NAME, _table(view, left_out))
        if _write_parquet(out_folder / PARQUET_NAME, _table(view, left_out)):
            files.append(out_folder / PARQUET_NAME)
        lost = 0
        if manifest.regions is not None:
            files += [out_folder / REGIONS_NAME, out_folder / REGIONS_TABLE_NAME]
            lost = _write_regions(files[-2], files[-1], view, vectors, left_out)
    return ExportReport(tuple(files), len(kept), len(photo_rows) - len(kept), lost, tuple(notices))


def _write_rows(
    path: Path, vectors: Vectors | CodeShards, count: int, parts: Iterable[Rows]
) -> None:
    """Write `count` rows in the order of `parts`."""
    if isinstance(vectors, Vectors):
        descr, width = "<f4", vectors.dim
    else:
        descr, width = "|u1", vectors.bits // 8
    header = {"descr": descr, "fortran_order": False, "shape": (count, width)}
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
        for rows in parts:
            part, places = np.unique(rows, return_inverse=True)
            content = vectors.read(part)[0][places]
            file.write(content.astype(descr, copy=False).tobytes())


def _write_regions(
    path: Path,
    table: Path,
    view: CatalogueView,
    vectors: Vectors | CodeShards,
    left_out: set[int],
) -> int:
    """Write the regions of the photos in the table; return of how many they are damaged."""
    spans = view.region_spans()
    rows = spans.rows()
    damaged = np.unique(spans.owners(rows[~RowCheck(view, vectors).is_intact(rows)]))
    lost = set(spans.photo_rows[damaged].tolist())
    counts = dict(zip(spans.photo_rows.tolist(), spans.counts.tolist(), strict=True))

    def photos() -> Iterator[tuple[Photo, RegionRows]]:
        for photo in view.photos():
            if photo.row in counts and photo.row not in left_out and photo.row not in lost:
                found = view.regions_of(photo.row)
                assert found is not None
                yield photo, found

    def parts() -> Iterator[Rows]:
        each = photos()
        while page := list(itertools.islice(each, _REGION_PHOTOS)):
            yield np.concatenate([own.first_row + np.arange(len(own.boxes)) for _, own in page])

    def lines() -> Iterator[dict[str, object]]:
        for photo, own in photos():
            for box in own.boxes.tolist():
                values = (photo.id, *(round(part, 6) for part in box))
                yield dict(zip(_REGION_COLUMNS, values, strict=True))

    _write_rows(path, vectors, sum(len(own.boxes) for _, own in photos()), parts())
    _write_csv(table, lines(), _REGION_COLUMNS)
    return sum(photo.row in lost for photo in view.photos())


def _table(view: CatalogueView, left_out: set[int]) -> Iterator[dict[str, object]]:
    for photo in view.photos():
        if photo.row not in left_out:
            yield _record(photo)


def _record(photo: Photo) -> dict[str, object]:
    return {
        "id": photo.id,
        **{"path": None, "path_bytes": None},
        **path_fields(os.fsencode(photo.path)),
        "size_bytes": photo.size_bytes,
        "mtime_ns": photo.mtime_ns,
        "sha256": photo.sha256,
    }


def _write_csv(
    path: Path, table: Iterator[dict[str, object]], columns: Sequence[str] = _COLUMNS
) -> None:
    with (
        atomic_path(path) as temporary,
        temporary.open("w", encoding="utf-8", newline="") as file,
    ):
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(table)


def _write_parquet(path: Path, table: Iterator[dict[str, object]]) -> bool:
    """Write the table if pyarrow is installed; return whether it is."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        return False
    text, number = pyarrow.string(), pyarrow.int64()
    schema = pyarrow.schema(
        [(name, number if name in ("id", "size_bytes", "mtime_ns") else text) for name in _COLUMNS]
    )
    with (
        atomic_path(path) as temporary,
        parquet.ParquetWriter(os.fspath(temporary), schema) as writer,
    ):
        part: list[dict[str, object]] = []
        for record in table:
            part.append(record)
            if len(part) == _TABLE_ROWS:
                writer.write_table(pyarrow.Table.from_pylist(part, schema))
                part.clear()
        writer.write_table(pyarrow.Table.from_pylist(part, schema))
    return True
