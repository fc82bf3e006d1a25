"""The catalogue's database: its tables, how it is opened, changed and complained about."""

from __future__ import annotations

import contextlib
import os
import shutil
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

from sbtk_runtime.errors import BadGallery, DiskFull, GalleryBusy, SbtkError

CATALOGUE_NAME = "catalogue.sqlite"
#: Their tables are the same, but codes must not be taken for embeddings by a sbtk that knows none.
EMBEDDINGS_SCHEMA, CODES_SCHEMA = 1, 2

_SCHEMA = """
CREATE TABLE facts (name TEXT PRIMARY KEY, value) WITHOUT ROWID;
CREATE TABLE photos (
    id INTEGER NOT NULL,
    born INTEGER NOT NULL,
    gone INTEGER,
    path BLOB NOT NULL,
    size_bytes INTEGER NOT NULL,
    mtime_ns INTEGER NOT NULL,
    sha256 BLOB NOT NULL,
    row INTEGER NOT NULL,
    PRIMARY KEY (id, born)
) WITHOUT ROWID;
CREATE UNIQUE INDEX photo_by_path ON photos (path) WHERE gone IS NULL;
CREATE INDEX photo_by_row ON photos (row, born, gone);
CREATE TABLE batches (
    first_row INTEGER PRIMARY KEY,
    count INTEGER NOT NULL,
    sha256 BLOB NOT NULL
);
CREATE TABLE failures (
    path BLOB PRIMARY KEY,
    size_bytes INTEGER,
    mtime_ns INTEGER,
    ctime_ns INTEGER,
    reason TEXT NOT NULL
) WITHOUT ROWID;
"""
_OUT_OF_SPACE_BYTES = 1 << 20


def connect_writer(path: Path) -> sqlite3.Connection:
    """Returns a connection that commits durably, and makes the tables of a new catalogue."""
    connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=30)
    try:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = FULL")
        with transaction(connection):
            version = _version(connection, path)
            if version == 0:
                for statement in _SCHEMA.split(";"):
                    connection.execute(statement)
                connection.execute(f"PRAGMA user_version = {EMBEDDINGS_SCHEMA}")
    except BaseException:
        connection.close()
        raise
    return connection


def connect_reader(path: Path) -> sqlite3.Connection:
    """Returns a connection that changes nothing and holds a snapshot of the database.

    Raises:
        BadGallery: there is no catalogue, or a newer sbtk made it.
    """
    if not path.is_file():
        raise BadGallery(f"{path} is missing", "the catalogue of a gallery", _make_anew(path))
    # SQLite's locks need files beside the catalogue; where there can be none it is read as it is.
    is_fixed = not os.access(path.parent, os.W_OK) and not Path(f"{path}-wal").exists()
    mode = "immutable=1" if is_fixed else "mode=ro"
    location = f"file:{quote(os.fsencode(path.absolute()))}?{mode}"
    connection = sqlite3.connect(
        location, uri=True, isolation_level=None, check_same_thread=False, timeout=30
    )
    try:
        connection.execute("BEGIN")
        if _version(connection, path) == 0:
            raise BadGallery(f"{path} is empty", "the catalogue of a gallery", _make_anew(path))
        connection.execute("SELECT 1 FROM facts LIMIT 1").fetchone()
    except BaseException:
        connection.close()
        raise
    return connection


@contextlib.contextmanager
def transaction(connection: sqlite3.Connection) -> Iterator[None]:
    """Makes the block's changes together, or not at all."""
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise


@contextlib.contextmanager
def catalogue_errors(path: Path) -> Iterator[None]:
    """Turns SQLite's errors inside the block into ours.

    Raises:
        DiskFull: there is no space for the catalogue.
        GalleryBusy: another program has locked it for longer than can be waited.
        BadGallery: the catalogue is damaged, or cannot be read or written.
    """
    try:
        yield
    except sqlite3.Error as problem:
        raise _told(problem, path) from problem
    # SQLite's complaint may quote damaged bytes, which Python then cannot decode.
    except UnicodeDecodeError as problem:
        raise damaged(path, problem) from problem


def damaged(path: Path, problem: object) -> BadGallery:
    """Returns the error of a catalogue that holds what nobody has written."""
    return BadGallery(
        f"{path} is damaged: {problem}", "the catalogue of a gallery", _make_anew(path)
    )


def _told(problem: sqlite3.Error, path: Path) -> SbtkError:
    code = getattr(problem, "sqlite_errorcode", 0) & 0xFF
    free_bytes = shutil.disk_usage(path.parent).free
    is_full = code == sqlite3.SQLITE_IOERR and free_bytes < _OUT_OF_SPACE_BYTES
    if code == sqlite3.SQLITE_FULL or is_full:
        return DiskFull(
            f"no space left while writing {path} ({free_bytes:,} bytes free)",
            "nothing that was committed before is lost",
            "free some space and run the same command again; it goes on where it stopped",
        )
    if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
        return GalleryBusy(
            f"{path} is locked by another program: {problem}",
            "one writer at a time",
            "close the program that has it open, then run the same command again",
        )
    if code in (sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_PERM):
        return BadGallery(f"{path} cannot be opened: {problem}", "a gallery that may be written")
    return damaged(path, problem)


def _make_anew(path: Path) -> str:
    return f"put {path.parent} aside and make it again with sbtk index PHOTOS"


def _version(connection: sqlite3.Connection, path: Path) -> int:
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    if version > CODES_SCHEMA:
        raise BadGallery(
            f"{path} has format {version}: it was made by a newer sbtk",
            f"format {CODES_SCHEMA} or older",
            "pip install --upgrade sbtk",
        )
    if version < 0:
        raise damaged(path, f"format {version}")
    return int(version)
