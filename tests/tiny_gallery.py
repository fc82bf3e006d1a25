"""Galleries for tests: of given embeddings or codes, or of photos by a tiny model, and compared."""

from __future__ import annotations

import hashlib
import multiprocessing
import shutil
import sqlite3
from contextlib import closing
from dataclasses import replace
from multiprocessing.context import ForkServerContext
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sbtk_runtime.binary_codes import Codes, Itq, fit_itq
from sbtk_runtime.bundle import itq_name
from sbtk_runtime.embedding.embedder import Embedder
from sbtk_runtime.files import sha256_of_file
from sbtk_runtime.gallery.catalogue import Embedding, Origin
from sbtk_runtime.gallery.folder import CODES_PREFIX, VECTORS_NAME, open_rows
from sbtk_runtime.gallery.publish import update_graph
from sbtk_runtime.gallery.rows import Vectors
from sbtk_runtime.gallery.schema import CATALOGUE_NAME
from sbtk_runtime.gallery.sign_codes import update_codes
from sbtk_runtime.gallery.update import IndexReport, update_gallery
from sbtk_runtime.gallery.writer import Catalogue
from sbtk_runtime.manifest import (
    FileRecord,
    GalleryManifest,
    read_bundle_manifest,
    read_gallery_manifest,
)
from sbtk_runtime.preprocess import PREPROCESSING
from tests.tiny import tiny_bundle, write_photos


def unit_rows(count: int, dim: int, seed: int = 0) -> NDArray[np.float32]:
    """Return random rows `(count, dim) float32` of length 1."""
    rows = np.random.default_rng(seed).standard_normal((count, dim)).astype(np.float32)
    return np.asarray(rows / np.linalg.norm(rows, axis=1, keepdims=True), dtype=np.float32)


def photo_path(index: int) -> bytes:
    """Return the path that `gallery_of` gives its photos: ten to a folder."""
    return f"/photos/{index // 10:04d}/{index:06d}.jpg".encode()


def gallery_of(
    folder: Path,
    embeddings: NDArray[np.float32],
    *,
    commit_every: int = 25,
    is_old: bool = False,
    changed: int = 0,
) -> GalleryManifest:
    """Make a gallery of generation 1 that holds the given rows; ids start with 1.

    The first `changed` photos have other bytes than in a gallery in which none are.
    An old one is as sbtk made them before there were snapshots and checksums of rows.
    """
    folder.mkdir()
    dim = embeddings.shape[1]
    with Catalogue(folder, 1) as catalogue:
        catalogue.claim(Origin("made-up@0123456789ab", "fp32", dim, PREPROCESSING))
        vectors = Vectors(folder / VECTORS_NAME, dim)
        batches = [
            batch
            for first in range(0, len(embeddings), commit_every)
            for batch in vectors.append(first, embeddings[first : first + commit_every])
        ]
        catalogue.commit(
            [
                Embedding(
                    photo_path(i),
                    1000 + i,
                    i,
                    hashlib.sha256(bytes([i % 256]) * (1 + (i < changed))).hexdigest(),
                    i,
                )
                for i in range(len(embeddings))
            ],
            [],
            batches,
        )
        graph = update_graph(folder, catalogue, vectors, None, lambda text: None)
        codes = (
            None if is_old else update_codes(folder, catalogue, vectors, None, lambda text: None)
        )
        snapshot = None if is_old else catalogue.write_snapshot()
    manifest = GalleryManifest(
        generation=1,
        model_id="made-up@0123456789ab",
        precision="fp32",
        dim=dim,
        preprocessing=PREPROCESSING,
        live=len(embeddings),
        graph=graph,
        snapshot=snapshot,
        codes=codes,
    )
    manifest.write(folder)
    if is_old:
        make_old(folder)
    return manifest


def contents(folder: Path) -> dict[str, object]:
    """Return all that must not depend on interruptions: the catalogue and the vectors."""
    connection = sqlite3.connect(folder / CATALOGUE_NAME)
    tables = {
        table: connection.execute(f"SELECT * FROM {table} ORDER BY 1, 2").fetchall()
        for table in ("facts", "photos", "failures")
    }
    connection.close()
    shards = {path.name: path.read_bytes() for path in sorted((folder / VECTORS_NAME).iterdir())}
    return {**tables, **shards}


def make_old(folder: Path) -> None:
    """Give a gallery's catalogue the format that sbtk wrote first: 1, or 2 of a binary one."""
    with closing(sqlite3.connect(folder / CATALOGUE_NAME, isolation_level=None)) as connection:
        (version,) = connection.execute("PRAGMA user_version").fetchone()
        tables = ("facts", "photos", "batches", "failures", "roots")
        for name in ("photo_by_path", "photo_by_row", "photo_by_content"):
            connection.execute(f"DROP INDEX {name}")
        for table in tables:
            connection.execute(f"ALTER TABLE {table} RENAME TO new_{table}")
        connection.executescript(_OLD_SCHEMA)
        for table in tables:
            columns = _OLD_COLUMNS[table]
            connection.execute(f"INSERT INTO {table} SELECT {columns} FROM new_{table}")
            connection.execute(f"DROP TABLE new_{table}")
        connection.execute("DROP TABLE row_checksums")
        connection.execute("DELETE FROM facts WHERE name = 'rows_shared'")
        connection.execute(f"PRAGMA user_version = {version - 2}")
    older = replace(read_gallery_manifest(folder), snapshot=None, codes=None)
    older.write(folder)
    for path in folder.glob(f"{CODES_PREFIX}*"):
        shutil.rmtree(path)


_OLD_SCHEMA = """
CREATE TABLE facts (name TEXT PRIMARY KEY, value) WITHOUT ROWID;
CREATE TABLE photos (
    id INTEGER NOT NULL, born INTEGER NOT NULL, gone INTEGER, path BLOB NOT NULL,
    size_bytes INTEGER NOT NULL, mtime_ns INTEGER NOT NULL, sha256 BLOB NOT NULL,
    row INTEGER NOT NULL, PRIMARY KEY (id, born)
) WITHOUT ROWID;
CREATE UNIQUE INDEX photo_by_path ON photos (path) WHERE gone IS NULL;
CREATE INDEX photo_by_row ON photos (row, born, gone);
CREATE TABLE batches (first_row INTEGER PRIMARY KEY, count INTEGER NOT NULL, sha256 BLOB NOT NULL);
CREATE TABLE failures (
    path BLOB PRIMARY KEY, size_bytes INTEGER, mtime_ns INTEGER, ctime_ns INTEGER,
    reason TEXT NOT NULL
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS roots (path BLOB PRIMARY KEY) WITHOUT ROWID;
"""


_OLD_COLUMNS = {
    "facts": "*",
    "photos": "id, added_in, removed_in, path, size_bytes, mtime_ns, sha256, row",
    "batches": "*",
    "failures": "path, size_bytes, mtime_ns, ctime_ns, reason",
    "roots": "*",
}


def index(
    folder: Path, photos: Path, bundle: Path, commit_every: int = 4, bits: int | None = None
) -> IndexReport:
    """Update a gallery with an embedder of its own, in small batches."""
    with Embedder(bundle, engine="onnxruntime", threads=1, batch=2) as embedder:
        return update_gallery(folder, [photos], embedder, commit_every=commit_every, bits=bits)


def photo_gallery(root: Path, count: int, embedder: Embedder) -> tuple[Path, Path]:
    """Return a new folder of `count` photos below `root`, and a gallery of them."""
    photos, folder = root / "photos", root / "g.sbtk"
    write_photos(photos, count)
    update_gallery(folder, [photos], embedder)
    return photos, folder


def processes() -> ForkServerContext:
    """Return a way to start processes that takes no second for each."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.tiny_gallery"])
    return context


def tiny_itq(dim: int, bits: int, seed: int = 0) -> Itq:
    """Return an ITQ of random rows."""
    return fit_itq(unit_rows(300, dim, seed), bits, iterations=5)


def tiny_code_bundle(folder: Path, *bits: int, dim: int = 16, itq_seed: int = 0) -> Path:
    """Return the tiny bundle with an ITQ for each of `bits`; other seeds give other ITQs."""
    tiny_bundle(folder, dim)
    manifest = read_bundle_manifest(folder)
    files = dict(manifest.files)
    for length in bits:
        path = folder / itq_name(length)
        path.write_bytes(tiny_itq(dim, length, itq_seed).to_bytes())
        files[path.name] = FileRecord(sha256_of_file(path), path.stat().st_size)
    replace(manifest, files=files).write(folder)
    return folder


def code_gallery_of(
    folder: Path,
    codes: Codes,
    itq: Itq,
    *,
    commit_every: int = 25,
    is_old: bool = False,
    changed: int = 0,
) -> GalleryManifest:
    """Make a binary gallery of generation 1 that holds the given codes; ids start with 1.

    The first `changed` photos have other bytes than in a gallery in which none are.
    """
    folder.mkdir()
    origin = Origin("made-up@0123456789ab", "fp32", itq.dim, PREPROCESSING, itq.bits)
    with Catalogue(folder, 1) as catalogue:
        catalogue.claim(origin, itq)
        shards = open_rows(folder, itq.dim, itq.bits)
        batches = [
            batch
            for first in range(0, len(codes), commit_every)
            for batch in shards.append_bytes(first, codes[first : first + commit_every])
        ]
        contents = [("01" if i < changed else "00") * 32 for i in range(len(codes))]
        photos = [
            Embedding(photo_path(i), 1000 + i, i, sha256, i) for i, sha256 in enumerate(contents)
        ]
        catalogue.commit(photos, [], batches)
        snapshot = None if is_old else catalogue.write_snapshot()
    manifest = GalleryManifest(
        generation=1,
        model_id=origin.model_id,
        precision=origin.precision,
        dim=origin.dim,
        preprocessing=PREPROCESSING,
        live=len(codes),
        bits=itq.bits,
        snapshot=snapshot,
    )
    manifest.write(folder)
    if is_old:
        make_old(folder)
    return manifest
