"""Readers see one generation, whatever a writer does; commits are whole or absent.

Values that no sbtk writes are reported as damage by readers and writers, and kept as they are.
Strict tables refuse such values, but a flipped bit does not ask them.
"""

from __future__ import annotations

import os
import random
import re
import shutil
import sqlite3
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from sbtk_runtime.embedding.embedder import Embedder
from sbtk_runtime.errors import BadGallery, GalleryBusy, SbtkError
from sbtk_runtime.gallery.catalogue import CatalogueView, Embedding, Failure, Origin
from sbtk_runtime.gallery.gallery import Gallery
from sbtk_runtime.gallery.photo_filter import PhotoFilter
from sbtk_runtime.gallery.rows import SHARD_ROWS, Batch
from sbtk_runtime.gallery.schema import (
    CATALOGUE_NAME,
    EMBEDDINGS_SCHEMA,
    catalogue_errors,
)
from sbtk_runtime.gallery.soundness import STAMP_NAME, record_sound
from sbtk_runtime.gallery.update import update_gallery
from sbtk_runtime.gallery.verify import verify_gallery
from sbtk_runtime.gallery.writer import Catalogue
from tests.tiny import write_photos
from tests.tiny_gallery import code_gallery_of, photo_gallery, tiny_itq, unit_rows

ORIGIN = Origin("tiny@0123456789ab", "fp32", 16, "sbtk-1")

COUNT, DIM = 12, 16
FLIPS = 60
QUERY = unit_rows(1, DIM, seed=9)[0]


def photo(name: str, row: int, content: int = 0) -> Embedding:
    return Embedding(f"/p/{name}".encode(), 100, 1, f"{content:064x}", row)


def batch(first_row: int, count: int) -> Batch:
    return Batch(first_row, count, "0" * 64)


def seen(folder: Path, generation: int) -> dict[int, tuple[bytes, int]]:
    with closing(CatalogueView(folder, generation)) as view:
        return {item.id: (item.path.encode(), item.row) for item in view.photos()}


@pytest.fixture
def first(tmp_path: Path) -> Path:
    """A catalogue with photos a, b, c of generation 1."""
    with Catalogue(tmp_path, 1) as catalogue:
        catalogue.claim(ORIGIN)
        counts = catalogue.commit([photo(n, i) for i, n in enumerate("abc")], [], [batch(0, 3)])
        assert counts == (3, 0)
    return tmp_path


def test_commits_are_visible_from_their_generation_on(first: Path) -> None:
    assert seen(first, 0) == {}
    assert seen(first, 1) == {1: (b"/p/a", 0), 2: (b"/p/b", 1), 3: (b"/p/c", 2)}
    with Catalogue(first, 2) as catalogue:
        assert catalogue.origin() == ORIGIN
        assert (catalogue.committed_rows(), catalogue.live()) == (3, 3)
        assert not catalogue.is_changed()


def test_changes_are_visible_only_in_the_next_generation(first: Path) -> None:
    before = seen(first, 1)
    with Catalogue(first, 2) as catalogue:
        assert catalogue.commit([photo("a", 3, content=7), photo("d", 4)], [], [batch(3, 2)]) == (
            1,
            1,
        )
        assert catalogue.remove([2]) == 1
        assert not catalogue.move(3, b"/q/c", (5, 6, 7))
        assert catalogue.is_changed()
        assert list(catalogue.rows_to_add()) == [3, 4]
        assert catalogue.count_to_add() == 2
        assert list(catalogue.rows_to_drop()) == [0, 1]
        assert list(catalogue.live_rows()) == [2, 3, 4]
        assert catalogue.sample_rows(32) == [2, 3, 4]
        assert seen(first, 1) == before
    after = seen(first, 2)
    assert after == {1: (b"/p/a", 3), 3: (b"/q/c", 2), 4: (b"/p/d", 4)}


def test_rows_and_ids_of_many_photos_are_right_with_and_without_gaps(tmp_path: Path) -> None:
    with Catalogue(tmp_path, 1) as catalogue:
        catalogue.claim(ORIGIN)
        photos = [photo(f"{n:04d}", 10 + n) for n in range(1200)]
        catalogue.commit(photos, [], [batch(10, 1200)])
    with Catalogue(tmp_path, 2) as catalogue:
        catalogue.remove([5, 900])
        catalogue.commit([photo("0000", 1210)], [], [batch(1210, 1)])
    with closing(CatalogueView(tmp_path, 1)) as view:
        assert view.rows().tolist() == list(range(10, 1210))
        assert view.ids(view.rows()).tolist() == list(range(1, 1201))
        assert view.ids(np.array([3, 11, 1210])).tolist() == [0, 2, 0]
        assert view.rows(PhotoFilter(b"/p/0007")).tolist() == []
    with closing(CatalogueView(tmp_path, 2)) as view:
        rows = [row for row in range(11, 1211) if row not in (14, 909)]
        assert view.rows().tolist() == rows
        assert view.ids(np.array([10, 11, 14, 1210])).tolist() == [0, 2, 0, 1]
    with closing(CatalogueView(tmp_path, 0)) as view:
        assert view.rows().tolist() == []


def test_a_catalogue_of_codes_stores_its_itq(tmp_path: Path) -> None:
    itq = tiny_itq(16, 8)
    origin = replace(ORIGIN, bits=8)
    with Catalogue(tmp_path, 1) as catalogue:
        catalogue.claim(origin, itq)
        assert catalogue.origin() == origin
        assert catalogue.itq().to_bytes() == itq.to_bytes()
    with closing(CatalogueView(tmp_path, 1)) as view:
        assert (view.dim(), view.bits()) == (16, 8)
        assert view.itq().to_bytes() == itq.to_bytes()
    # As long as there is no photo it may become one of embeddings.
    with Catalogue(tmp_path, 1) as catalogue:
        catalogue.claim(ORIGIN)
        assert catalogue.origin() == ORIGIN
        assert catalogue.connection.execute("PRAGMA user_version").fetchone() == (
            EMBEDDINGS_SCHEMA,
        )
        with pytest.raises(BadGallery, match="damaged ITQ"):
            catalogue.itq()


def test_missing_photos_are_hidden_and_can_come_back(first: Path) -> None:
    with Catalogue(first, 2) as catalogue:
        assert catalogue.lose([1, 3]) == 2
        assert catalogue.lose([1]) == 0
        assert (catalogue.live(), catalogue.missing()) == (1, 2)
        assert list(catalogue.rows_to_drop()) == [0, 2]
        catalogue.purge(2)
    assert seen(first, 1) == {1: (b"/p/a", 0), 2: (b"/p/b", 1), 3: (b"/p/c", 2)}
    assert seen(first, 2) == {2: (b"/p/b", 1)}
    with Catalogue(first, 3) as catalogue:
        assert not catalogue.is_changed()
        assert catalogue.keep(b"/p/a", (5, 6, 7))
        assert not catalogue.move(3, b"/q/c", (5, 6, 7))
        assert list(catalogue.rows_to_add()) == [0, 2]
        assert (list(catalogue.rows_to_drop()), catalogue.count_to_add()) == ([], 2)
        assert catalogue.lose([1]) == 1
        assert list(catalogue.rows_to_add()) == [2]
        assert catalogue.keep(b"/p/a", (5, 6, 7))
        catalogue.purge(2)
    assert seen(first, 2) == {2: (b"/p/b", 1)}
    assert seen(first, 3) == {1: (b"/p/a", 0), 2: (b"/p/b", 1), 3: (b"/q/c", 2)}


def test_photos_can_share_a_row(tmp_path: Path) -> None:
    with Catalogue(tmp_path, 1) as catalogue:
        catalogue.claim(ORIGIN)
        photos = [photo("a", 0), photo("b", 0), photo("c", 2), photo("d", 1), photo("e", 0)]
        catalogue.commit(photos, [], [batch(0, 3)])
        assert list(catalogue.live_rows()) == [0, 1, 2]
        assert (catalogue.live(), catalogue.count_live_rows()) == (5, 3)
        assert catalogue.sample_rows(32) == [0, 1, 2]
    with Catalogue(tmp_path, 2) as catalogue:
        catalogue.remove([1, 3])
        catalogue.commit([photo("f", 1)], [], [])
        assert list(catalogue.rows_to_drop()) == [2]
        assert list(catalogue.rows_to_add()) == []
    with closing(CatalogueView(tmp_path, 2)) as view:
        assert view.count() == 4
        assert view.rows().tolist() == [0, 1]
        assert view.ids(np.array([0, 1, 2])).tolist() == [2, 4, 0]
        assert view.names_at(0) == [(2, b"/p/b"), (5, b"/p/e")]


def test_ids_are_never_reused(first: Path) -> None:
    with Catalogue(first, 2) as catalogue:
        catalogue.remove([3])
        catalogue.commit([photo("d", 3)], [], [batch(3, 1)])
        catalogue.purge(2)
    assert sorted(seen(first, 2)) == [1, 2, 4]


def test_unpublished_changes_leave_no_version(first: Path) -> None:
    with Catalogue(first, 2) as catalogue:
        catalogue.commit([photo("d", 3)], [], [batch(3, 1)])
        catalogue.commit([photo("d", 4, content=9)], [], [batch(4, 1)])
        catalogue.remove([4])
        assert not catalogue.is_changed()
    assert len(seen(first, 2)) == 3


def test_a_move_onto_another_photo_replaces_it(first: Path) -> None:
    with Catalogue(first, 2) as catalogue:
        assert catalogue.move(1, b"/p/b", (5, 6, 7))
    assert seen(first, 2) == {1: (b"/p/b", 0), 3: (b"/p/c", 2)}


def test_a_failure_replaces_the_photo_and_a_success_the_failure(first: Path) -> None:
    with Catalogue(first, 2) as catalogue:
        catalogue.commit([], [Failure(b"/p/a", "damaged", 5, 6, 7)], [])
        assert list(catalogue.failures()) == [(b"/p/a", "damaged")]
        assert catalogue.live() == 2
        catalogue.commit([photo("a", 3)], [], [batch(3, 1)])
        assert list(catalogue.failures()) == []
        assert catalogue.live() == 3


def test_a_change_of_decoders_retries_failures(first: Path) -> None:
    with Catalogue(first, 2) as catalogue:
        catalogue.retry_failures_of_other("pillow 1")
        catalogue.commit([], [Failure(b"/p/a", "damaged", 5, 6, 7)], [])
        stamps = "SELECT size_bytes, mtime_ns FROM failures"
        catalogue.retry_failures_of_other("pillow 1")
        assert catalogue.connection.execute(stamps).fetchall() == [(5, 6)]
        catalogue.retry_failures_of_other("pillow 2")
        assert catalogue.connection.execute(stamps).fetchall() == [(None, 6)]


def test_a_view_keeps_its_snapshot_through_a_purge(first: Path) -> None:
    with closing(CatalogueView(first, 1)) as view, Catalogue(first, 2) as catalogue:
        catalogue.remove([1, 2, 3])
        catalogue.purge(2)
        assert view.rows().tolist() == [0, 1, 2]
        assert view.names_at(1) == [(2, b"/p/b")]
    assert seen(first, 1) == {}


def test_purge_forgets_shards_without_photos(tmp_path: Path) -> None:
    with Catalogue(tmp_path, 1) as catalogue:
        catalogue.claim(ORIGIN)
        for shard in range(3):
            row = shard * SHARD_ROWS
            catalogue.commit([photo(str(shard), row)], [], [batch(row, SHARD_ROWS)])
        catalogue.commit([photo("last", 3 * SHARD_ROWS)], [], [batch(3 * SHARD_ROWS, 1)])
        catalogue.remove([2, 4])
        assert catalogue.shards() == {0, 1, 2, 3}
        catalogue.purge(1)
        assert catalogue.shards() == {0, 2, 3}


def test_rows_can_be_limited_to_a_folder(tmp_path: Path) -> None:
    with Catalogue(tmp_path, 1) as catalogue:
        catalogue.claim(ORIGIN)
        names = ("a/1", "a/b/2", "ab/3", "a0/4", "a")
        catalogue.commit([photo(n, i) for i, n in enumerate(names)], [], [batch(0, 5)])
    with closing(CatalogueView(tmp_path, 1)) as view:
        assert view.rows(PhotoFilter(b"/p/a")).tolist() == [0, 1]
        assert view.rows(PhotoFilter(b"/p/a/")).tolist() == [0, 1]
        assert view.rows(PhotoFilter(b"/")).tolist() == [0, 1, 2, 3, 4]
        assert view.rows(PhotoFilter(b"/none")).tolist() == []


def test_a_failed_transaction_changes_nothing(first: Path) -> None:
    with Catalogue(first, 2) as catalogue:
        twice = [photo("x", 3), Embedding(b"/p/y", 1, 1, "not hexadecimal", 4)]
        with pytest.raises(ValueError, match="hexadecimal"):
            catalogue.commit(twice, [], [batch(3, 2)])
        assert (catalogue.live(), catalogue.committed_rows()) == (3, 3)


def test_a_lost_manifest_does_not_bring_old_versions_back(first: Path) -> None:
    with Catalogue(first, 2) as catalogue:
        catalogue.remove([1])
    with Catalogue(first, 1) as catalogue:
        assert catalogue.generation == 2
        assert catalogue.live() == 2


def test_a_newer_catalogue_is_refused(first: Path) -> None:
    connection = sqlite3.connect(first / CATALOGUE_NAME)
    connection.execute("PRAGMA user_version = 99")
    connection.close()
    with pytest.raises(BadGallery, match="newer version of sbtk"):
        CatalogueView(first, 1)
    with pytest.raises(BadGallery, match="newer version of sbtk"):
        Catalogue(first, 2)


@pytest.mark.parametrize("content", [b"no database at all, but long enough" * 99, b""])
def test_other_files_are_refused_as_catalogues(tmp_path: Path, content: bytes) -> None:
    (tmp_path / CATALOGUE_NAME).write_bytes(content)
    with pytest.raises(BadGallery) as caught:
        CatalogueView(tmp_path, 1)
    assert "sbtk index" in caught.value.next_step


def test_a_damaged_page_is_reported(first: Path) -> None:
    path = first / CATALOGUE_NAME
    data = bytearray(path.read_bytes())
    data[4096:] = b"\xa5" * (len(data) - 4096)
    path.write_bytes(data)
    with pytest.raises(BadGallery, match="damaged"):
        seen(first, 1)


def test_a_locked_catalogue_is_not_reported_as_damaged(first: Path) -> None:
    path = first / CATALOGUE_NAME
    with closing(sqlite3.connect(path)) as other, closing(sqlite3.connect(path, timeout=0)) as own:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(GalleryBusy) as caught, catalogue_errors(path):
            own.execute("BEGIN IMMEDIATE")
    assert "locked" in caught.value.found
    assert "run the same command again" in caught.value.next_step


def change(folder: Path, statement: str) -> None:
    """Run a statement on tables that take any value, and make them strict again."""
    path = folder / CATALOGUE_NAME
    with closing(sqlite3.connect(path)) as connection:
        strict = connection.execute("SELECT name, sql FROM sqlite_master WHERE sql LIKE '%STRICT%'")
        tables = strict.fetchall()
    lax = [(re.sub(" STRICT,?", "", sql).replace("ANY", ""), name) for name, sql in tables]
    _define(path, lax)
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute(statement)
    _define(path, [(sql, name) for name, sql in tables])


def _define(path: Path, tables: list[tuple[str, str]]) -> None:
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("PRAGMA writable_schema = ON")
        connection.executemany("UPDATE sqlite_master SET sql = ? WHERE name = ?", tables)


def require_told(error: SbtkError) -> None:
    assert f"{CATALOGUE_NAME} is damaged" in error.found
    assert error.expected
    assert "sbtk index PHOTOS" in error.next_step


READ: dict[str, tuple[str, Callable[[CatalogueView], object]]] = {
    "a fraction for a row": (
        "photos SET row = 2.5 WHERE id = 3",
        lambda view: view.rows(PhotoFilter(b"/")),
    ),
    "a number for a path": ("photos SET path = 7 WHERE id = 3", lambda view: view.names_at(2)),
    "a text for a path": ("photos SET path = '/p' WHERE id = 3", lambda view: view.photo(3)),
    "a number for a hash": ("photos SET sha256 = 1.5", lambda view: list(view.photos())),
    "a text for a size": ("photos SET size_bytes = 'x'", lambda view: view.photo(3)),
    "a text for an id": ("photos SET id = 'x' WHERE id = 3", lambda view: view.names_at(2)),
    "a text for the width": ("facts SET value = '16' WHERE name = 'dim'", CatalogueView.dim),
    "a fraction for a batch": ("batches SET count = 2.5", lambda view: list(view.batches())),
    "a number for a batch's hash": ("batches SET sha256 = 2.5", lambda view: list(view.batches())),
}


@pytest.mark.parametrize("name", READ)
def test_a_reader_reports_values_of_the_wrong_type(folder: Path, name: str) -> None:
    statement, read = READ[name]
    with closing(CatalogueView(folder, 1)) as view:
        read(view)
        assert view.damage() is None
    change(folder, f"UPDATE {statement}")
    with closing(CatalogueView(folder, 1)) as view, pytest.raises(BadGallery) as caught:
        read(view)
    require_told(caught.value)


@pytest.mark.parametrize(
    "statement",
    [
        *(f"UPDATE {statement}" for statement, _ in READ.values()),
        "UPDATE photos SET row = -7 WHERE id = 5",
        "UPDATE photos SET added_in = 'x' WHERE id = 5",
        "UPDATE photos SET removed_in = 'x' WHERE id = 5",
        "UPDATE photos SET removed_in = (1 << 62) WHERE id = 5",
        "UPDATE photos SET mtime_ns = x'00' WHERE id = 5",
        "INSERT INTO failures VALUES ('/p', 1, 1, 1, 1, 'damaged')",
        "INSERT INTO failures VALUES (x'2f', 'x', 1, 1, 1, 'damaged')",
        "INSERT INTO failures VALUES (x'2f', 1, 1, 1, 1, x'00')",
        "UPDATE facts SET value = '12' WHERE name = 'rows'",
        "UPDATE facts SET value = 4 WHERE name = 'rows'",
        "UPDATE facts SET value = (1 << 50) WHERE name = 'rows'",
        "UPDATE facts SET value = 5 WHERE name = 'next_id'",
        "UPDATE facts SET value = 0 WHERE name = 'dim'",
        "UPDATE facts SET value = 5 WHERE name = 'precision'",
        *(f"DELETE FROM facts WHERE name = '{name}'" for name in ("rows", "next_id", "model_id")),
        "INSERT INTO facts VALUES ('bits', 16)",
        "UPDATE photos SET missing_in = -1 WHERE id = 5",
        "UPDATE row_checksums SET crc32 = 'x' WHERE row = 5",
        *(f"PRAGMA user_version = {version}" for version in (1, 2, 4)),
        "PRAGMA user_version = -1",
    ],
)
def test_a_writer_builds_nothing_on_a_damaged_catalogue(
    folder: Path, tmp_path: Path, embedder: Embedder, statement: str
) -> None:
    vectors = folder / "vectors" / "000000.f16"
    before = vectors.read_bytes()
    change(folder, statement)
    with pytest.raises(BadGallery) as caught:
        Catalogue(folder, 2)
    require_told(caught.value)
    write_photos(tmp_path / "photos", 2)
    with pytest.raises(BadGallery) as caught:
        update_gallery(folder, [tmp_path / "photos"], embedder)
    require_told(caught.value)
    assert vectors.read_bytes() == before


def make_index_differ(folder: Path) -> None:
    with closing(sqlite3.connect(folder / CATALOGUE_NAME)) as connection, connection:
        sought = "SELECT sql FROM sqlite_master WHERE name = 'photo_by_row'"
        (index,) = connection.execute(sought).fetchone()
        connection.execute("DROP INDEX photo_by_row")
        connection.execute(index.replace("(row", "(row + 1"))
        # What holds the rows of other photos is said to be the index of these.
        connection.execute("PRAGMA writable_schema = ON")
        connection.execute("UPDATE sqlite_master SET sql = ? WHERE name = 'photo_by_row'", (index,))


def test_an_index_that_differs_from_its_table_is_damage(folder: Path) -> None:
    """Of rows that SQLite finds by one way and not by the other, no graph can be made."""
    path = folder / CATALOGUE_NAME
    before = path.stat()
    make_index_differ(folder)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(BadGallery) as caught:
        Catalogue(folder, 2)
    require_told(caught.value)
    with closing(CatalogueView(folder, 1)) as view:
        assert "photo_by_row" in (view.damage() or "")


def test_a_catalogue_is_compared_again_when_it_may_have_changed(folder: Path) -> None:
    make_index_differ(folder)
    record_sound(folder / CATALOGUE_NAME)
    Catalogue(folder, 2).connection.close()  # as it was left, when it was sound
    (folder / f"{CATALOGUE_NAME}-wal").write_bytes(bytes(32))  # as a killed writer leaves it
    with pytest.raises(BadGallery, match="photo_by_row"):
        Catalogue(folder, 2)


def test_verifying_does_not_let_the_next_writer_compare_the_catalogue(folder: Path) -> None:
    make_index_differ(folder)
    record_sound(folder / CATALOGUE_NAME)
    assert "photo_by_row" in verify_gallery(folder).problems[0]
    Catalogue(folder, 2).connection.close()


def test_repair_lets_the_next_writer_compare_the_catalogue(folder: Path) -> None:
    make_index_differ(folder)
    record_sound(folder / CATALOGUE_NAME)
    assert "photo_by_row" in verify_gallery(folder).problems[0]
    assert (folder / STAMP_NAME).exists()
    with pytest.raises(BadGallery, match="photo_by_row"):
        verify_gallery(folder, repair=True)
    assert not (folder / STAMP_NAME).exists()


def test_codes_without_a_length_are_not_read_as_embeddings(tmp_path: Path) -> None:
    itq = tiny_itq(DIM, 8)
    folder = tmp_path / "g.sbtk"
    code_gallery_of(folder, itq.codes(unit_rows(COUNT, DIM)), itq)
    change(folder, "DELETE FROM facts WHERE name = 'bits'")
    with pytest.raises(BadGallery) as caught:
        Catalogue(folder, 2)
    require_told(caught.value)


def test_a_wrong_width_does_not_truncate_embeddings(tmp_path: Path, embedder: Embedder) -> None:
    photos, folder = photo_gallery(tmp_path, 3, embedder)
    before = (folder / "vectors" / "000000.f16").read_bytes()
    change(folder, f"UPDATE facts SET value = {DIM // 2} WHERE name = 'dim'")
    with pytest.raises(BadGallery) as caught:
        update_gallery(folder, [photos], embedder)
    require_told(caught.value)
    assert (folder / "vectors" / "000000.f16").read_bytes() == before


def test_damage_found_while_writing_is_reported(folder: Path) -> None:
    with pytest.raises(BadGallery) as caught, Catalogue(folder, 2) as catalogue:
        catalogue.connection.execute("DROP TABLE failures")
        list(catalogue.failures())
    require_told(caught.value)


def test_any_flipped_bit_gives_an_answer_or_a_clear_error(
    tmp_path: Path, embedder: Embedder
) -> None:
    photos, good = tmp_path / "photos", tmp_path / "good.sbtk"
    paths = write_photos(photos, 6)
    (photos / "junk.jpg").write_bytes(b"junk")
    update_gallery(good, [photos], embedder)
    # The next update finds a photo that moved, one that changed, and two that are new.
    paths[3].rename(photos / "moved.png")
    write_photos(photos, 8)
    whole = (good / CATALOGUE_NAME).read_bytes()
    used = [place for place, byte in enumerate(whole) if byte]
    dice = random.Random(5)
    outcomes = []
    for _ in range(FLIPS):
        folder = tmp_path / "g.sbtk"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(good, folder)
        flipped = bytearray(whole)
        flipped[dice.choice(used)] ^= 1 << dice.randrange(8)
        (folder / CATALOGUE_NAME).write_bytes(flipped)
        outcomes += [
            _is_done(lambda: _read(folder)),  # noqa: B023 -- called at once
            _is_done(lambda: verify_gallery(folder, repair=True)),  # noqa: B023
            _is_done(lambda: update_gallery(folder, [photos], embedder)),  # noqa: B023
        ]
    assert any(outcomes)
    assert not all(outcomes)


def _read(folder: Path) -> None:
    with Gallery.open(folder) as gallery:
        for hit in gallery.search(QUERY, 8):
            gallery.photo(hit.id)
            gallery.similar(hit.id, 3)
        gallery.folders()
        gallery.roots()


def _is_done(action: Callable[[], object]) -> bool:
    """Return whether it was done; anything but an error of sbtk's own goes through."""
    try:
        action()
    except SbtkError as problem:
        assert problem.found
        return False
    return True
