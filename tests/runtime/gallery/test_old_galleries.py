"""Galleries of an older format are read as they are, and migrated without embedding anything."""

from __future__ import annotations

import shutil
import sqlite3
import zlib
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from sbtk_runtime.embedding.embedder import Embedder
from sbtk_runtime.gallery.catalogue import CatalogueView
from sbtk_runtime.gallery.export import export_gallery
from sbtk_runtime.gallery.folder import open_rows, published_manifest
from sbtk_runtime.gallery.gallery import Gallery
from sbtk_runtime.gallery.index import drop_photos
from sbtk_runtime.gallery.schema import CATALOGUE_NAME, EMBEDDINGS_SCHEMA
from sbtk_runtime.gallery.update import update_gallery
from sbtk_runtime.gallery.verify import verify_gallery
from sbtk_runtime.gallery.writer import Catalogue
from tests.tiny import write_photos
from tests.tiny_gallery import make_old, photo_gallery

BITS = 16


def answers(folder: Path) -> list[tuple[int, str, float]]:
    with Gallery.open(folder) as gallery:
        hits = gallery.search(np.ones(gallery.manifest.dim, np.float32), gallery.count)
        assert gallery.notices == []
        return [(hit.id, hit.path, hit.score) for hit in hits]


def version(folder: Path) -> int:
    with closing(sqlite3.connect(folder / CATALOGUE_NAME)) as connection:
        return int(connection.execute("PRAGMA user_version").fetchone()[0])


def require_checksums(folder: Path) -> None:
    manifest = published_manifest(folder)
    with closing(CatalogueView(folder, manifest.generation)) as view:
        rows = view.rows()
        content, _ = open_rows(folder, manifest.dim, manifest.bits).read_bytes(rows)
        expected = dict(zip(rows.tolist(), map(zlib.crc32, content), strict=True))
        assert view.checksums(np.arange(1_000)) == expected


@pytest.mark.parametrize("bits", [None, BITS])
@pytest.mark.parametrize("has_roots", [True, False])
def test_an_old_gallery_is_read_and_migrated(
    tmp_path: Path, embedder: Embedder, bits: int | None, has_roots: bool
) -> None:
    photos, folder = tmp_path / "photos", tmp_path / "g.sbtk"
    write_photos(photos, 9)
    (photos / "bad.jpg").write_bytes(b"junk")
    update_gallery(folder, [photos], embedder, bits=bits, commit_every=4)
    require_checksums(folder)
    expected, format_ = answers(folder), version(folder)
    make_old(folder)
    if not has_roots:
        with closing(sqlite3.connect(folder / CATALOGUE_NAME)) as connection:
            connection.execute("DROP TABLE roots")
    assert version(folder) == format_ - 2
    assert answers(folder) == expected
    with Gallery.open(folder) as gallery:
        assert len(gallery.roots()) == has_roots
    assert verify_gallery(folder).problems == ()
    assert export_gallery(folder, tmp_path / "out").count == 9
    assert version(folder) == format_ - 2
    before = embedder.timings.files
    with Gallery.open(folder) as reader:
        report = update_gallery(folder, [photos], embedder)
        assert len(reader.search(np.ones(16, np.float32), 9)) == 9
    assert (report.unchanged, report.unreadable, report.live) == (9, 1, 9)
    assert embedder.timings.files == before
    assert version(folder) == format_
    assert answers(folder) == expected
    with Gallery.open(folder) as gallery:
        assert gallery.roots() == [str(photos)]
    require_checksums(folder)
    query = "SELECT count(*) FROM photos WHERE ctime_ns IS NULL OR inode IS NULL"
    with closing(sqlite3.connect(folder / CATALOGUE_NAME)) as connection:
        assert connection.execute(query).fetchone() == (0,)
    report = update_gallery(folder, [photos], embedder)
    assert (report.unchanged, embedder.timings.files) == (9, before)


def test_damaged_rows_of_an_old_gallery_get_no_checksums(
    tmp_path: Path, embedder: Embedder
) -> None:
    photos, folder = photo_gallery(tmp_path, 6, embedder)
    make_old(folder)
    shard = folder / "vectors" / "000000.f16"
    shard.write_bytes(bytes(10) + shard.read_bytes()[10:])
    update_gallery(folder, [photos], embedder)
    assert version(folder) == EMBEDDINGS_SCHEMA
    with closing(CatalogueView(folder, published_manifest(folder).generation)) as view:
        assert view.checksums(view.rows()) == {}
    assert not verify_gallery(folder).is_good


def give_rows_of_their_own(folder: Path, sha256: str) -> None:
    """Give photos of the same bytes a row each but for the first, as an older sbtk did."""
    manifest = published_manifest(folder)
    with Catalogue(folder, manifest.generation + 1) as catalogue:
        vectors = open_rows(folder, manifest.dim, manifest.bits)
        first = catalogue.embedding_of(sha256)
        assert first is not None
        with closing(CatalogueView(folder, manifest.generation)) as view:
            copies = [path for _, path in view.names_at(first.row)][1:]
        rows, _ = vectors.read(np.full(len(copies), first.row))
        first_row = catalogue.committed_rows()
        batches = vectors.append(first_row, rows)  # type: ignore[arg-type]
        photos = [replace(first, path=path, row=first_row + i) for i, path in enumerate(copies)]
        catalogue.commit(photos, [], batches)
    drop_photos(folder, is_missing_only=True)  # publishes
    make_old(folder)


@pytest.mark.parametrize("bits", [None, BITS])
@pytest.mark.parametrize("is_damaged", [False, True])
def test_identical_photos_of_an_old_gallery_are_merged_without_embedding(
    tmp_path: Path, embedder: Embedder, bits: int | None, is_damaged: bool
) -> None:
    photos, folder = tmp_path / "photos", tmp_path / "g.sbtk"
    paths = write_photos(photos, 4)
    for number in range(5):
        shutil.copy2(paths[1], photos / f"z{number}.png")
    update_gallery(folder, [photos], embedder, bits=bits)
    with Gallery.open(folder) as gallery:
        (hit,) = gallery.query(paths[1], embedder, 1, "photo")
        photo = gallery.photo(hit.id)
        assert photo is not None
    give_rows_of_their_own(folder, photo.sha256)
    query = np.ones(16, np.float32)
    with Gallery.open(folder) as gallery:
        assert [hit.copies for hit in gallery.search(query, 9)] == [()] * 9
    if is_damaged:
        shard = next((folder / "vectors").iterdir())
        shard.write_bytes(b"\x3c" + shard.read_bytes()[1:])
    (photos / "z4.png").rename(tmp_path / "away.png")
    before = embedder.timings.files
    report = update_gallery(folder, [photos], embedder)
    assert (report.unchanged, report.missing, report.live) == (8, 1, 8)
    assert "5 photos now share the embedding of an identical one" in report.notices
    with Gallery.open(folder) as gallery:
        assert max(len(hit.copies) for hit in gallery.search(query, 9)) == 4
    (tmp_path / "away.png").rename(photos / "z4.png")
    report = update_gallery(folder, [photos], embedder)
    assert (report.revived, report.live, report.notices) == (1, 9, ())
    assert embedder.timings.files == before
    with Gallery.open(folder) as gallery:
        hits = gallery.search(query, 9)
        assert sorted(len(hit.copies) for hit in hits) == ([5] if is_damaged else [0, 0, 0, 5])
    if not is_damaged:
        assert verify_gallery(folder).problems == ()
