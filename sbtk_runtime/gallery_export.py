"""A gallery's embeddings and photos in formats that any tool reads."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sbtk_runtime.catalogue import CatalogueView, Photo
from sbtk_runtime.files import atomic_path
from sbtk_runtime.gallery_folder import VECTORS_NAME, path_fields, published_manifest
from sbtk_runtime.vectors import CHUNK_ROWS, Vectors

EMBEDDINGS_NAME = "embeddings.npy"
TABLE_NAME = "photos.csv"
PARQUET_NAME = "photos.parquet"

_COLUMNS = ("id", "path", "path_bytes", "size_bytes", "mtime_ns", "sha256")


@dataclass(frozen=True)
class ExportReport:
    """What was written: the files, and the photos left out because their rows are damaged."""

    files: tuple[Path, ...]
    count: int
    left_out: int


def export_gallery(folder: Path, out_folder: Path) -> ExportReport:
    """Writes the embeddings and, in the same order, a table of the photos.

    `embeddings.npy` is `(N, D) float32`, unit rows. The tables, `photos.csv` and where pyarrow is
    installed `photos.parquet`, have the columns id, path, path_bytes (base64, and path empty, where
    the path is not UTF-8), size_bytes, mtime_ns and sha256. Memory does not grow with N.

    Raises:
        BadGallery: there is no gallery in `folder`.
        DiskFull: there is no space for the files.
    """
    manifest = published_manifest(folder)
    out_folder.mkdir(parents=True, exist_ok=True)
    with (
        closing(CatalogueView(folder, manifest.generation)) as view,
        closing(Vectors(folder / VECTORS_NAME, manifest.dim)) as vectors,
    ):
        vectors.hold()
        rows = view.rows()
        is_whole = np.concatenate(
            [np.empty(0, dtype=np.bool_), *(whole for _, _, whole in vectors.chunks(rows))]
        )
        kept = rows[is_whole]
        _write_embeddings(out_folder / EMBEDDINGS_NAME, vectors, kept)
        _write_csv(out_folder / TABLE_NAME, _table(view, set(rows[~is_whole].tolist())))
        files = [out_folder / EMBEDDINGS_NAME, out_folder / TABLE_NAME]
        if _write_parquet(out_folder / PARQUET_NAME, _table(view, set(rows[~is_whole].tolist()))):
            files.append(out_folder / PARQUET_NAME)
    return ExportReport(tuple(files), len(kept), len(rows) - len(kept))


def _write_embeddings(path: Path, vectors: Vectors, rows: np.ndarray) -> None:
    header = {
        "descr": "<f4",
        "fortran_order": False,
        "shape": (len(rows), vectors.dim),
    }
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
        for _, embeddings, _ in vectors.chunks(rows):
            file.write(embeddings.astype("<f4", copy=False).tobytes())


def _table(view: CatalogueView, left_out: set[int]) -> Iterator[dict[str, object]]:
    for photo in view.photos():
        if photo.row not in left_out:
            yield _record(photo)


def _record(photo: Photo) -> dict[str, object]:
    return {
        "id": photo.id,
        **{"path": None, "path_bytes": None},
        **path_fields(photo.path),
        "size_bytes": photo.size_bytes,
        "mtime_ns": photo.mtime_ns,
        "sha256": photo.sha256,
    }


def _write_csv(path: Path, table: Iterator[dict[str, object]]) -> None:
    with (
        atomic_path(path) as temporary,
        temporary.open("w", encoding="utf-8", newline="") as file,
    ):
        writer = csv.DictWriter(file, _COLUMNS)
        writer.writeheader()
        writer.writerows(table)


def _write_parquet(path: Path, table: Iterator[dict[str, object]]) -> bool:
    """Writes the table if pyarrow is installed; returns whether it is."""
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
            if len(part) == CHUNK_ROWS:
                writer.write_table(pyarrow.Table.from_pylist(part, schema))
                part.clear()
        writer.write_table(pyarrow.Table.from_pylist(part, schema))
    return True
