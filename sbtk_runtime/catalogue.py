"""The catalogue: one row per photo in SQLite, the truth about what a gallery holds.

A photo keeps its id for as long as it is in the gallery. What is known of it comes in versions,
each visible from the generation `born` until before the generation `gone`, so a reader sees one
generation while a writer prepares the next. `row` is the number of the photo's embedding in the
vectors. Paths are the bytes that the file system has.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import numpy as np
from numpy.typing import NDArray

from sbtk_runtime.errors import BadGallery, DiskFull, SbtkError
from sbtk_runtime.shards import Batch

CATALOGUE_NAME = "catalogue.sqlite"
SCHEMA_VERSION = 1

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
_VISIBLE = "born <= :generation AND (gone IS NULL OR gone > :generation)"
_OUT_OF_SPACE_BYTES = 1 << 20


@dataclass(frozen=True)
class Photo:
    """One photo of a gallery, as of one generation."""

    id: int
    path: bytes
    size_bytes: int
    mtime_ns: int
    sha256: str
    row: int


@dataclass(frozen=True)
class Origin:
    """What made a gallery's embeddings; the same for all of them."""

    model_id: str
    precision: str
    dim: int
    preprocessing: str


@dataclass(frozen=True)
class Embedding:
    """A photo whose embedding was written: where it lies and which bytes it is of."""

    path: bytes
    size_bytes: int
    mtime_ns: int
    sha256: str
    row: int


@dataclass(frozen=True)
class Failure:
    """A photo that could not be read. The stamps are `None` where it could not be looked at."""

    path: bytes
    reason: str
    size_bytes: int | None = None
    mtime_ns: int | None = None
    ctime_ns: int | None = None


class CatalogueView:
    """The photos of one generation; what a writer does meanwhile does not show.

    It holds a snapshot of the database until it is closed. Any thread may ask it.
    """

    def __init__(self, folder: Path, generation: int) -> None:
        self._path = folder / CATALOGUE_NAME
        self._generation = {"generation": generation}
        with catalogue_errors(self._path):
            self._connection = connect_reader(self._path)

    def close(self) -> None:
        """Lets the snapshot go."""
        self._connection.close()

    def dim(self) -> int:
        """Returns the length of an embedding that the catalogue was made for."""
        with catalogue_errors(self._path):
            found = self._connection.execute("SELECT value FROM facts WHERE name = 'dim'")
            (value,) = found.fetchone() or (0,)
        return int(value)

    def rows(self, under: bytes | None = None) -> NDArray[np.int64]:
        """Returns the rows of the photos, or of those in the folder `under`, ascending."""
        query = f"SELECT row FROM photos WHERE {_VISIBLE}"  # noqa: S608 -- constants only
        values: dict[str, object] = dict(self._generation)
        if under is not None:
            query += " AND path >= :low AND path < :high"
            values["low"], values["high"] = below(under)
        with catalogue_errors(self._path):
            found = self._connection.execute(query + " ORDER BY row", values)
            return np.fromiter((row for (row,) in found), dtype=np.int64)

    def name_of(self, row: int) -> tuple[int, bytes] | None:
        """Returns id and path of the photo whose embedding is at `row`, if there is one."""
        query = f"SELECT id, path FROM photos WHERE row = :row AND {_VISIBLE}"  # noqa: S608
        with catalogue_errors(self._path):
            found = self._connection.execute(query, {"row": row, **self._generation}).fetchone()
        return None if found is None else (int(found[0]), bytes(found[1]))

    def photos(self) -> Iterator[Photo]:
        """Yields the photos by ascending row."""
        query = f"""SELECT id, path, size_bytes, mtime_ns, sha256, row FROM photos
            WHERE {_VISIBLE} ORDER BY row"""  # noqa: S608
        with catalogue_errors(self._path):
            for photo_id, path, size_bytes, mtime_ns, sha256, row in self._connection.execute(
                query, self._generation
            ):
                yield Photo(photo_id, path, size_bytes, mtime_ns, sha256.hex(), row)

    def batches(self) -> Iterator[Batch]:
        """Yields what was written to the vectors, by row."""
        query = "SELECT first_row, count, sha256 FROM batches ORDER BY first_row"
        with catalogue_errors(self._path):
            for first_row, count, sha256 in self._connection.execute(query):
                yield Batch(first_row, count, sha256.hex())

    def damage(self) -> str | None:
        """Returns what SQLite's own check complains about; `None` if it is content."""
        with catalogue_errors(self._path):
            (answer,) = self._connection.execute("PRAGMA quick_check(1)").fetchone()
        return None if answer == "ok" else str(answer)


def below(path: bytes) -> tuple[bytes, bytes]:
    """Returns the interval of paths (end excluded) that lie in the folder `path`."""
    folder = path.rstrip(b"/")
    return folder + b"/", folder + b"0"  # "0" is the character after "/"


def exactly(path: bytes) -> tuple[bytes, bytes]:
    """Returns the interval of paths (end excluded) that holds `path` alone."""
    return path, path + b"\0"


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
                connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
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
        BadGallery: the catalogue is damaged, or cannot be read or written.
    """
    try:
        yield
    except sqlite3.Error as problem:
        raise _told(problem, path) from problem


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
    if code in (sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_PERM):
        return BadGallery(f"{path} cannot be opened: {problem}", "a gallery that may be written")
    return BadGallery(
        f"{path} is damaged: {problem}", "the catalogue of a gallery", _make_anew(path)
    )


def _make_anew(path: Path) -> str:
    return f"put {path.parent} aside and make it again with sbtk index PHOTOS"


def _version(connection: sqlite3.Connection, path: Path) -> int:
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    if version > SCHEMA_VERSION:
        raise BadGallery(
            f"{path} has format {version}: it was made by a newer sbtk",
            f"format {SCHEMA_VERSION} or older",
            "pip install --upgrade sbtk",
        )
    return int(version)
