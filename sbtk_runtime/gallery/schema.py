"""The catalogue's database: its tables, connections, migration and errors."""

from __future__ import annotations

import contextlib
import errno
import os
import reprlib
import shutil
import sqlite3
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar
from urllib.parse import quote

from sbtk_runtime.errors import BadGallery, GalleryBusy, SbtkError
from sbtk_runtime.files import (
    atomic_path,
    file_size_limit,
    free_bytes,
    is_as_written,
    open_regular,
    read_refused,
    sha256_of_file,
    write_error,
)
from sbtk_runtime.manifest import SnapshotRecord

CATALOGUE_NAME = "catalogue.sqlite"
#: All have the same tables, but codes must not be mistaken for embeddings, and an sbtk without
#: regions must not reuse their rows.
EMBEDDINGS_SCHEMA, CODES_SCHEMA, REGIONS_SCHEMA = 3, 4, 5
#: Earlier formats and their successors; readers read them as they are, the next writer migrates.
OLD_SCHEMAS = {1: EMBEDDINGS_SCHEMA, 2: CODES_SCHEMA}

_SCHEMA = """
CREATE TABLE facts (name TEXT PRIMARY KEY, value ANY) STRICT, WITHOUT ROWID;
CREATE TABLE photos (
    id INTEGER NOT NULL,
    added_in INTEGER NOT NULL,
    removed_in INTEGER,
    missing_in INTEGER,
    path BLOB NOT NULL,
    size_bytes INTEGER NOT NULL,
    mtime_ns INTEGER NOT NULL,
    ctime_ns INTEGER,
    inode INTEGER,
    sha256 BLOB NOT NULL,
    row INTEGER NOT NULL,
    partial TEXT,
    PRIMARY KEY (id, added_in)
) STRICT, WITHOUT ROWID;
CREATE UNIQUE INDEX photo_by_path ON photos (path) WHERE removed_in IS NULL;
CREATE INDEX photo_by_row ON photos (row, added_in, removed_in, missing_in);
CREATE INDEX photo_by_content ON photos (sha256) WHERE removed_in IS NULL;
CREATE TABLE batches (
    first_row INTEGER PRIMARY KEY,
    count INTEGER NOT NULL,
    sha256 BLOB NOT NULL
) STRICT;
CREATE TABLE row_checksums (row INTEGER PRIMARY KEY, crc32 INTEGER NOT NULL) STRICT;
CREATE TABLE failures (
    path BLOB NOT NULL PRIMARY KEY,
    size_bytes INTEGER,
    mtime_ns INTEGER,
    ctime_ns INTEGER,
    inode INTEGER,
    reason TEXT NOT NULL
) STRICT, WITHOUT ROWID;
CREATE TABLE roots (path BLOB NOT NULL PRIMARY KEY) STRICT, WITHOUT ROWID;
"""
# The rows and boxes of the regions of the photo whose whole frame is at `photo_row`.
_REGIONS_TABLE = """CREATE TABLE IF NOT EXISTS regions (
    photo_row INTEGER PRIMARY KEY,
    first_row INTEGER NOT NULL,
    count INTEGER NOT NULL,
    boxes BLOB NOT NULL
) STRICT"""
# When the photo whose whole frame is at `row` was taken, in ISO 8601 without a zone; NULL if its
# file does not say so.
_DATES_COLUMNS = "(row INTEGER PRIMARY KEY, taken TEXT)"
_DATES_TABLE = f"CREATE TABLE IF NOT EXISTS dates {_DATES_COLUMNS} STRICT"
_OUT_OF_SPACE_BYTES = _PROBE_BYTES = 1 << 20
_COPY_ATTEMPTS, _COPY_PAUSE_S = 50, 0.02

#: SQLite's codes for refusals of the operating system.
_SYSTEM = (
    *(sqlite3.SQLITE_IOERR, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN),
    *(sqlite3.SQLITE_PERM, sqlite3.SQLITE_NOLFS, sqlite3.SQLITE_AUTH),
)
_READING = (
    *(sqlite3.SQLITE_IOERR_READ, sqlite3.SQLITE_IOERR_FSTAT, sqlite3.SQLITE_IOERR_ACCESS),
    sqlite3.SQLITE_IOERR_SEEK,
)
_OLD_TABLES = {
    "facts": "SELECT name, value",
    "photos": """SELECT id, born AS added_in, gone AS removed_in, NULL AS missing_in, path,
        size_bytes, mtime_ns, NULL AS ctime_ns, NULL AS inode, sha256, row, NULL AS partial""",
    "batches": "SELECT first_row, count, sha256",
    "failures": "SELECT path, size_bytes, mtime_ns, ctime_ns, NULL AS inode, reason",
    "roots": "SELECT path",
}
_OLDEST_SQLITE = (3, 37, 0)


def connect_writer(path: Path) -> sqlite3.Connection:
    """Return a connection that commits durably; create the tables of a new catalogue."""
    if sqlite3.sqlite_version_info < _OLDEST_SQLITE:
        raise BadGallery(
            f"Python here uses SQLite {sqlite3.sqlite_version}, which cannot write {path}",
            f"SQLite {'.'.join(map(str, _OLDEST_SQLITE))} or newer",
            "use a newer Python, such as those of conda or uv",
        )
    connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=30)
    try:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = FULL")
        with transaction(connection):
            version = _version(connection, path)
            if version == 0:
                _make_tables(connection)
                connection.execute(f"PRAGMA user_version = {EMBEDDINGS_SCHEMA}")
            # Catalogues of older versions lack these tables, and older versions ignore them.
            connection.execute(_REGIONS_TABLE)
            connection.execute(_DATES_TABLE)
    except BaseException:
        connection.close()
        raise
    return connection


def connect_reader(path: Path) -> sqlite3.Connection:
    """Return a read-only connection that holds a snapshot of a catalogue in use.

    Without write permission, a reader can neither lock the catalogue nor read its log, so it copies
    both. Galleries that are published with a snapshot (`connect_snapshot`) are not read this way.

    Raises:
        BadGallery: there is no catalogue, or a newer sbtk made it.
        GalleryBusy: it changes faster than it can be copied.
    """
    if not path.is_file():
        raise BadGallery(f"{path} is missing", "the catalogue of a gallery", _advise_rebuild(path))
    if os.access(path.parent, os.W_OK, effective_ids=os.access in os.supports_effective_ids):
        try:
            return _open(path, "mode=ro")
        except sqlite3.OperationalError as problem:
            no_locks = (sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN)
            if problem.sqlite_errorcode & 0xFF not in no_locks:
                raise
    with _temporary_folder() as place:
        copy = Path(place) / path.name
        _copy_consistently(path, copy)
        connection = sqlite3.connect(copy)
        with contextlib.closing(connection):
            # Merge the log into the file, which stays open after its name is removed.
            connection.execute("PRAGMA journal_mode = DELETE")
        return _open(copy, "mode=ro")


def connect_snapshot(
    path: Path, record: SnapshotRecord, *, is_hashed: bool = False
) -> sqlite3.Connection:
    """Return a connection to the published copy of a catalogue, which never changes.

    It needs no locks and no other files, so any number of readers can use it on any file system.

    Args:
        path: the copy.
        record: its record; the whole file is read only if its size or time of modification differs.
        is_hashed: always compare the SHA-256.

    Raises:
        BadGallery: the copy is missing, cannot be read, or has changed.
    """
    found = record.sha256
    try:
        is_same = is_as_written(path.stat(), record.size_bytes, record.mtime_ns)
        if is_hashed or not is_same or path.is_symlink():
            found = sha256_of_file(path)
    except FileNotFoundError as problem:
        raise BadGallery(f"{path} is missing", "the catalogue of a gallery") from problem
    except OSError as problem:
        raise BadGallery(*read_refused(path, problem)) from problem
    if found != record.sha256:
        raise BadGallery(f"{path} is damaged: SHA-256 {found}", record.sha256)
    return _open(path, "immutable=1")


def write_snapshot(connection: sqlite3.Connection, path: Path) -> SnapshotRecord:
    """Write the committed state to a self-contained file, and return its record.

    Raises:
        DiskFull: no space is left.
        BadGallery: the file cannot be written or read back.
    """
    with atomic_path(path) as temporary:
        temporary.unlink(missing_ok=True)
        with catalogue_errors(temporary), contextlib.closing(sqlite3.connect(temporary)) as copy:
            copy.execute("PRAGMA journal_mode = OFF")
            copy.execute("PRAGMA synchronous = OFF")
            connection.backup(copy)
            # The header is copied too, and says that there is a log.
            copy.execute("PRAGMA journal_mode = DELETE")
            copy.execute("PRAGMA journal_mode = OFF")
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        status = temporary.stat()
        return SnapshotRecord(
            path.name, sha256_of_file(temporary), status.st_size, status.st_mtime_ns
        )


def _open(path: Path, mode: str) -> sqlite3.Connection:
    location = f"file:{quote(os.fsencode(path.absolute()))}?{mode}"
    connection = sqlite3.connect(
        location, uri=True, isolation_level=None, check_same_thread=False, timeout=30
    )
    try:
        # Otherwise large sorts need a writable temporary folder.
        connection.execute("PRAGMA temp_store = MEMORY")
        connection.execute("BEGIN")
        if _version(connection, path) == 0:
            raise BadGallery(
                f"{path} is empty", "the catalogue of a gallery", _advise_rebuild(path)
            )
        connection.execute("SELECT 1 FROM facts LIMIT 1").fetchone()
    except BaseException:
        connection.close()
        raise
    return connection


def migrate(connection: sqlite3.Connection) -> None:
    """Convert an older catalogue to the current tables, in one transaction.

    Values that were not recorded are `NULL`. Open readers keep their snapshots.
    """
    version = user_version(connection)
    if version not in OLD_SCHEMAS:
        return
    for kind, name in connection.execute("SELECT type, name FROM temp.sqlite_master").fetchall():
        if kind in ("table", "view"):
            connection.execute(f"DROP {kind} temp.{name}")
    with transaction(connection):
        old = _tables(connection)
        for index in ("photo_by_path", "photo_by_row"):
            connection.execute(f"DROP INDEX IF EXISTS {index}")
        for table in old:
            connection.execute(f"ALTER TABLE {table} RENAME TO old_{table}")
        _make_tables(connection)
        for table, columns in old.items():
            connection.execute(f"INSERT INTO {table} {columns} FROM old_{table}")
            connection.execute(f"DROP TABLE old_{table}")
        connection.execute(f"PRAGMA user_version = {OLD_SCHEMAS[version]}")


def show_as_current(connection: sqlite3.Connection) -> None:
    """Show an older catalogue in the current tables, by temporary views and tables."""
    if not connection.execute("SELECT 1 FROM main.sqlite_master WHERE name = 'dates'").fetchone():
        connection.execute(f"CREATE TEMP TABLE dates {_DATES_COLUMNS}")
    if user_version(connection) not in OLD_SCHEMAS:
        return
    for table, columns in _tables(connection).items():
        if table in ("photos", "failures"):
            connection.execute(f"CREATE TEMP VIEW {table} AS {columns} FROM main.{table}")
    connection.execute("CREATE TEMP TABLE row_checksums (row INTEGER PRIMARY KEY, crc32 INTEGER)")
    if "roots" not in _tables(connection):
        connection.execute("CREATE TEMP TABLE roots (path BLOB PRIMARY KEY)")


@contextlib.contextmanager
def _temporary_folder() -> Iterator[str]:
    try:
        place = tempfile.TemporaryDirectory(prefix="sbtk-", ignore_cleanup_errors=True)
    except OSError as problem:
        raise BadGallery(
            f"there is no folder for temporary files: {problem}",
            "a temporary folder, because an older sbtk made this gallery and it is read-only",
            "set TMPDIR, or run 'sbtk index' on its photos once, as its owner",
        ) from problem
    with place as name:
        yield name


def _copy_consistently(path: Path, copy: Path) -> None:
    """Copy a consistent state of a catalogue and its log.

    Both are read twice. The log only grows until it restarts with other salts, and still has what
    was moved into the catalogue, so the copies are consistent if nothing changed in between.
    """
    names = ((path, copy), (Path(f"{path}-wal"), Path(f"{copy}-wal")))
    for _ in range(_COPY_ATTEMPTS):
        try:
            for source, target in names:
                _copy(source, target)
            if all(_sha256(source) == _sha256(target) for source, target in names):
                return
        except OSError as problem:
            if isinstance(problem.filename, str | bytes | os.PathLike):
                path = Path(os.fsdecode(problem.filename))
            raise BadGallery(*read_refused(path, problem)) from problem
        time.sleep(_COPY_PAUSE_S)
    raise GalleryBusy(
        f"{path} changes faster than it can be copied", "one writer at a time", "try again"
    )


def _copy(source: Path, target: Path) -> None:
    """Copy a file; without one, remove `target`."""
    target.unlink(missing_ok=True)
    with (
        contextlib.suppress(FileNotFoundError),
        os.fdopen(open_regular(source), "rb") as file,
        target.open("wb") as copy,
    ):
        shutil.copyfileobj(file, copy)


def _sha256(path: Path) -> str | None:
    """Return the SHA-256 of a file; `None` if there is none."""
    try:
        return sha256_of_file(path)
    except FileNotFoundError:
        return None


@contextlib.contextmanager
def transaction(connection: sqlite3.Connection) -> Iterator[None]:
    """Commit all changes of the block, or none."""
    connection.execute("BEGIN IMMEDIATE")
    with connection:
        yield


@contextlib.contextmanager
def catalogue_errors(path: Path, *, is_writer: bool = True) -> Iterator[None]:
    """Translate SQLite's errors inside the block.

    The catalogue is damaged only if SQLite could read it. For refusals of the operating system, the
    error has the system's reason. The one writer finds that by rewriting existing bytes.

    Raises:
        DiskFull: no space is left for the catalogue.
        GalleryBusy: another program has locked it for too long.
        BadGallery: the catalogue is damaged, or cannot be read or written.
        MemoryError: there is not enough memory.
    """
    try:
        yield
    except sqlite3.Error as problem:
        code = getattr(problem, "sqlite_errorcode", None)
        if code is None and not isinstance(problem, sqlite3.OperationalError):
            raise  # a wrong call, not the catalogue's fault
        raise _translate(problem, code or sqlite3.SQLITE_CORRUPT, path, is_writer) from problem
    # SQLite's message may quote damaged bytes, which Python cannot decode.
    except UnicodeDecodeError as problem:
        raise damaged(path, problem) from problem


def damaged(path: Path, problem: object) -> BadGallery:
    """Return the error for a catalogue whose content sbtk has not written."""
    return BadGallery(
        f"{path} is damaged: {problem}", "the catalogue of a gallery", _advise_rebuild(path)
    )


def _translate(problem: sqlite3.Error, code: int, path: Path, is_writer: bool) -> Exception:
    primary = code & 0xFF
    if primary == sqlite3.SQLITE_NOMEM or code == sqlite3.SQLITE_IOERR_NOMEM:
        return MemoryError(str(problem))
    if primary in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_PROTOCOL):
        return GalleryBusy(
            f"{path} is locked by another program: {problem}",
            "one writer at a time",
            "close the program that has it open, then run the same command again",
        )
    if primary == sqlite3.SQLITE_FULL:
        return _no_space(path)
    if code == sqlite3.SQLITE_IOERR_SHORT_READ or primary not in _SYSTEM:
        return damaged(path, problem)
    is_read = code in _READING or not is_writer
    if (reason := _system_error(path, is_read=is_read)) is not None:
        if reason.errno == errno.ENOMEM:
            return MemoryError(str(problem))
        if is_read:
            return BadGallery(*read_refused(path, reason))
        return write_error(path, reason, BadGallery)
    name = getattr(problem, "sqlite_errorname", "")
    return BadGallery(
        f"{path} cannot be {'read' if is_read else 'written'}: {problem} ({name})",
        "nothing that was committed before is lost",
        "check the drive, its mount and its permissions, then run the same command again",
    )


def _no_space(path: Path) -> SbtkError:
    """Return the error for a full disk: the catalogue's, or that of SQLite's temporary files."""
    fullest = min(path.parent, Path(tempfile.gettempdir()), key=free_bytes)
    full = path if fullest == path.parent else fullest / "temporary files of SQLite"
    return write_error(full, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))


def _system_error(path: Path, *, is_read: bool) -> OSError | None:
    """Return why the system refused an operation, which SQLite does not report, by repeating it.

    Writing repeats the same bytes, and a temporary file that is removed.
    """
    try:
        for file in (path, Path(f"{path}-wal")):
            if file == path or file.exists():
                _read_and_rewrite(file, is_rewritten=not is_read)
        if is_read:
            return None
        with tempfile.TemporaryFile(dir=path.parent) as probe:
            probe.write(bytes(_PROBE_BYTES))
            os.fsync(probe.fileno())
        if free_bytes(path.parent) < _OUT_OF_SPACE_BYTES:
            return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        # Only this limit can have refused the write: SQLite reports a full disk itself.
        if file_size_limit() is not None:
            return OSError(errno.EFBIG, os.strerror(errno.EFBIG))
    except OSError as problem:
        return problem
    return None


def _read_and_rewrite(file: Path, *, is_rewritten: bool) -> None:
    descriptor = os.open(file, (os.O_RDWR if is_rewritten else os.O_RDONLY) | os.O_CLOEXEC)
    try:
        last, offset = b"", 0
        while part := os.pread(descriptor, 1 << 20, offset):
            offset, last = offset + len(part), part
        if is_rewritten:
            os.pwrite(descriptor, last or b"\0", offset - len(last))
            os.ftruncate(descriptor, offset)
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _advise_rebuild(path: Path) -> str:
    return f"put {path.parent} aside and make it again with sbtk index PHOTOS"


def _make_tables(connection: sqlite3.Connection) -> None:
    for statement in _SCHEMA.split(";"):
        connection.execute(statement)


def _tables(connection: sqlite3.Connection) -> dict[str, str]:
    """Return the tables of an older catalogue, with the queries that convert them."""
    names = {name for (name,) in connection.execute("SELECT name FROM main.sqlite_master")}
    return {table: columns for table, columns in _OLD_TABLES.items() if table in names}


def has_regions(connection: sqlite3.Connection) -> bool:
    """Return whether the gallery keeps regions of its photos."""
    return user_version(connection) == REGIONS_SCHEMA


def user_version(connection: sqlite3.Connection) -> int:
    """Return the number of the catalogue's format."""
    return int(connection.execute("PRAGMA user_version").fetchone()[0])


def _version(connection: sqlite3.Connection, path: Path) -> int:
    version = user_version(connection)
    if version > REGIONS_SCHEMA:
        raise BadGallery(
            f"{path} has format {version}, of a newer version of sbtk",
            f"format {REGIONS_SCHEMA} or older",
            "pip install --upgrade sbtk",
        )
    if version < 0:
        raise damaged(path, f"format {version}")
    return version


_T = TypeVar("_T")


def integer(value: object) -> int:
    """Return `value`; raise `ValueError` unless it is a whole number."""
    return _expect(value, int, "a whole number")


def blob(value: object) -> bytes:
    """Return `value`, such as a path or a hash; raise `ValueError` unless it is bytes."""
    return _expect(value, bytes, "bytes")


def text(value: object) -> str:
    """Return `value`; raise `ValueError` unless it is text."""
    return _expect(value, str, "a text")


def _expect(value: object, kind: type[_T], expected: str) -> _T:
    if not isinstance(value, kind):
        raise ValueError(f"{reprlib.repr(value)} where {expected} belongs")
    return value


@contextlib.contextmanager
def values_checked(path: Path, *, is_writer: bool = False) -> Iterator[None]:
    """Translate the errors of SQLite, and of values that sbtk has not written.

    Raises:
        BadGallery: the catalogue at `path` is damaged, or cannot be read.
    """
    with catalogue_errors(path, is_writer=is_writer):
        try:
            yield
        except (KeyError, OverflowError, TypeError, ValueError) as problem:
            raise damaged(path, problem) from problem
