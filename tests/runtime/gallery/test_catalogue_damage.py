"""A catalogue with values that no sbtk writes is told as damage, on both sides, and kept as it is.

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
from pathlib import Path

import pytest

from sbtk_runtime.embedding.embedder import Embedder
from sbtk_runtime.errors import BadGallery, SbtkError
from sbtk_runtime.gallery.catalogue import CatalogueView
from sbtk_runtime.gallery.gallery import Gallery
from sbtk_runtime.gallery.photo_filter import PhotoFilter
from sbtk_runtime.gallery.schema import CATALOGUE_NAME
from sbtk_runtime.gallery.soundness import STAMP_NAME, record_sound
from sbtk_runtime.gallery.update import update_gallery
from sbtk_runtime.gallery.verify import verify_gallery
from sbtk_runtime.gallery.writer import Catalogue
from tests.tiny import write_photos
from tests.tiny_gallery import code_gallery_of, tiny_itq, unit_rows

COUNT, DIM = 12, 16
FLIPS = 60
QUERY = unit_rows(1, DIM, seed=9)[0]


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
    photos, folder = tmp_path / "photos", tmp_path / "g.sbtk"
    write_photos(photos, 3)
    update_gallery(folder, [photos], embedder)
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
