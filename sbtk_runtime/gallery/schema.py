"""The catalogue's database: its tables, how it is opened, changed and complained about."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import shutil
import sqlite3
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

from sbtk_runtime.errors import BadGallery, GalleryBusy, SbtkError
from sbtk_runtime.files import (
    atomic_path,
    file_size_limit,
    is_as_written,
    open_regular,
    read_refused,
    sha256_of_file,
    write_error,
)
from sbtk_runtime.gallery.rows import SHARD_ROWS
from sbtk_runtime.manifest import SnapshotRecord

CATALOGUE_NAME = "catalogue.sqlite"
#: The tables of all are the same, but codes must not be taken for embeddings, and an sbtk that
#: knows no regions must not take their rows for unused ones.
EMBEDDINGS_SCHEMA, CODES_SCHEMA, REGIONS_SCHEMA = 3, 4, 5
#: What earlier versions wrote: it is read as it is, and migrated by the next writer.
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
# Of the photo whose whole frame is at `photo_row`: where its regions are, and their boxes.
_REGIONS_TABLE = """CREATE TABLE IF NOT EXISTS regions (
    photo_row INTEGER PRIMARY KEY,
    first_row INTEGER NOT NULL,
    count INTEGER NOT NULL,
    boxes BLOB NOT NULL
) STRICT"""
_OUT_OF_SPACE_BYTES = _PROBE_BYTES = 1 << 20
_COPY_ATTEMPTS, _COPY_PAUSE_S = 50, 0.02

#: What SQLite says when the system refuses something.
_SYSTEM = (
    *(sqlite3.SQLITE_IOERR, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN),
    *(sqlite3.SQLITE_PERM, sqlite3.SQLITE_NOLFS, sqlite3.SQLITE_AUTH),
)
_NO_LOCKS = (sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN)
_READING = (
    *(sqlite3.SQLITE_IOERR_READ, sqlite3.SQLITE_IOERR_FSTAT, sqlite3.SQLITE_IOERR_ACCESS),
    sqlite3.SQLITE_IOERR_SEEK,
)
_OLD_PHOTOS = """SELECT id, born AS added_in, gone AS removed_in, NULL AS missing_in, path,
    size_bytes, mtime_ns, NULL AS ctime_ns, NULL AS inode, sha256, row, NULL AS partial"""
_OLD_FAILURES = "SELECT path, size_bytes, mtime_ns, ctime_ns, NULL AS inode, reason"
_OLD_TABLES = {
    "facts": "SELECT name, value",
    "photos": _OLD_PHOTOS,
    "batches": "SELECT first_row, count, sha256",
    "failures": _OLD_FAILURES,
    "roots": "SELECT path",
}
_OLD_INDICES = ("photo_by_path", "photo_by_row")
_OLDEST_SQLITE = (3, 37, 0)


def connect_writer(path: Path) -> sqlite3.Connection:
    """Return a connection that commits durably, and make the tables of a new catalogue."""
    _require_strict_tables(path)
    connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=30)
    try:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = FULL")
        with transaction(connection):
            version = _version(connection, path)
            if version == 0:
                _make_tables(connection)
                connection.execute(f"PRAGMA user_version = {EMBEDDINGS_SCHEMA}")
            # An older sbtk made the catalogue without it, and leaves it alone.
            connection.execute(_REGIONS_TABLE)
    except BaseException:
        connection.close()
        raise
    return connection


def connect_reader(path: Path) -> sqlite3.Connection:
    """Return a connection that changes nothing and holds a snapshot of a catalogue in use.

    A reader that may not write beside the catalogue can neither lock it nor see what its writer
    has not yet moved from the log, so it takes a copy of its own. Galleries that are published
    with a snapshot (`connect_snapshot`) are not read this way.

    Raises:
        BadGallery: there is no catalogue, or a newer sbtk made it.
        GalleryBusy: it changes faster than it can be copied.
    """
    if not path.is_file():
        raise BadGallery(f"{path} is missing", "the catalogue of a gallery", _make_anew(path))
    if os.access(path.parent, os.W_OK, effective_ids=os.access in os.supports_effective_ids):
        try:
            return _opened(path, "mode=ro")
        except sqlite3.OperationalError as problem:
            if problem.sqlite_errorcode & 0xFF not in _NO_LOCKS:
                raise
    with _temporary_folder() as place:
        copy = Path(place) / path.name
        _copy_consistently(path, copy)
        connection = sqlite3.connect(copy)
        with contextlib.closing(connection):
            # Moves the log into the file, which can then be opened after its name is removed.
            connection.execute("PRAGMA journal_mode = DELETE")
        return _opened(copy, "mode=ro")


def connect_snapshot(
    path: Path, record: SnapshotRecord, *, is_hashed: bool = False
) -> sqlite3.Connection:
    """Return a connection to the published copy of a catalogue, which nobody ever changes.

    It needs neither locks nor files beside it: any number of readers, on any file system.

    Args:
        path: of the copy.
        record: what was published. As long as size and time of modification are those of the
            record, the file is not read as a whole.
        is_hashed: compare the SHA-256 in any case.

    Raises:
        BadGallery: it is missing, cannot be read, or is not the one that was published.
    """
    sha256 = found = record.sha256
    try:
        is_same = is_as_written(path.stat(), record.size_bytes, record.mtime_ns)
        if is_hashed or not is_same or path.is_symlink():
            found = sha256_of_file(path)
    except FileNotFoundError as problem:
        raise BadGallery(f"{path} is missing", "the catalogue of a gallery") from problem
    except OSError as problem:
        raise BadGallery(*read_refused(path, problem)) from problem
    if found != sha256:
        raise BadGallery(f"{path} is damaged: SHA-256 {found}", sha256)
    return _opened(path, "immutable=1")


def write_snapshot(connection: sqlite3.Connection, path: Path) -> SnapshotRecord:
    """Write what is committed to a file that is complete in itself; return its record.

    Raises:
        DiskFull: there is no space for it.
        BadGallery: the system refused to write it, or it cannot be read back.
    """
    with atomic_path(path) as temporary:
        temporary.unlink(missing_ok=True)
        with catalogue_errors(temporary), contextlib.closing(sqlite3.connect(temporary)) as copy:
            copy.execute("PRAGMA journal_mode = OFF")
            copy.execute("PRAGMA synchronous = OFF")
            connection.backup(copy)
            # Backup copies the header too, which says that there is a log.
            copy.execute("PRAGMA journal_mode = DELETE")
            copy.execute("PRAGMA journal_mode = OFF")
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        status = temporary.stat()
        return SnapshotRecord(
            path.name, sha256_of_file(temporary), status.st_size, status.st_mtime_ns
        )


def _opened(path: Path, mode: str) -> sqlite3.Connection:
    location = f"file:{quote(os.fsencode(path.absolute()))}?{mode}"
    connection = sqlite3.connect(
        location, uri=True, isolation_level=None, check_same_thread=False, timeout=30
    )
    try:
        # Large sorts would need a temporary folder that may be written.
        connection.execute("PRAGMA temp_store = MEMORY")
        connection.execute("BEGIN")
        if _version(connection, path) == 0:
            raise BadGallery(f"{path} is empty", "the catalogue of a gallery", _make_anew(path))
        connection.execute("SELECT 1 FROM facts LIMIT 1").fetchone()
    except BaseException:
        connection.close()
        raise
    return connection


def migrate(connection: sqlite3.Connection) -> None:
    """Give an older catalogue the tables of today, in one transaction; else does nothing.

    What was not noted then is `NULL`. Readers that are open keep what they have open.
    """
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    if version not in OLD_SCHEMAS:
        return
    for kind, name in connection.execute("SELECT type, name FROM temp.sqlite_master").fetchall():
        if kind in ("table", "view"):
            connection.execute(f"DROP {kind} temp.{name}")
    with transaction(connection):
        old = _tables(connection)
        for index in _OLD_INDICES:
            connection.execute(f"DROP INDEX IF EXISTS {index}")
        for table in old:
            connection.execute(f"ALTER TABLE {table} RENAME TO old_{table}")
        _make_tables(connection)
        for table, columns in old.items():
            connection.execute(f"INSERT INTO {table} {columns} FROM old_{table}")
            connection.execute(f"DROP TABLE old_{table}")
        connection.execute(f"PRAGMA user_version = {OLD_SCHEMAS[version]}")


def show_as_current(connection: sqlite3.Connection) -> None:
    """Make a reader's connection to an older catalogue answer as one of today's would."""
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    if version not in OLD_SCHEMAS:
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
            "one, since this gallery was made by an older sbtk and may not be written",
            "name one with TMPDIR, or run 'sbtk index' on its photos once, as its owner",
        ) from problem
    with place as name:
        yield name


def _copy_consistently(path: Path, copy: Path) -> None:
    """Copy a catalogue and its log as they were at one moment.

    Both are read twice. The log only grows until it begins again with other salts, and what is
    moved into the catalogue is still in the log: so if nothing has changed in between, the copies
    are of one moment.
    """
    names = [(path, copy), (Path(f"{path}-wal"), Path(f"{copy}-wal"))]
    for _ in range(_COPY_ATTEMPTS):
        try:
            copied = [_copied(source, target) for source, target in names]
            if copied == [_copied(source, None) for source, _ in names]:
                return
        except OSError as problem:
            if isinstance(problem.filename, str | bytes | os.PathLike):
                path = Path(os.fsdecode(problem.filename))
            raise BadGallery(*read_refused(path, problem)) from problem
        time.sleep(_COPY_PAUSE_S)
    raise GalleryBusy(
        f"{path} changes faster than it can be copied", "one writer at a time", "try again"
    )


def _copied(source: Path, target: Path | None) -> bytes | None:
    """Copy a file and return its SHA-256; `None` if there is none. Without a target, only that.

    Raises:
        OSError: it cannot be read, or the copy not be written.
    """
    digest = hashlib.sha256()
    try:
        with os.fdopen(open_regular(source), "rb") as file:
            output = target.open("wb") if target is not None else contextlib.nullcontext(None)
            with output as written:
                while part := file.read(1 << 20):
                    digest.update(part)
                    if written is not None:
                        written.write(part)
    except FileNotFoundError:
        if target is not None:
            target.unlink(missing_ok=True)
        return None
    return digest.digest()


@contextlib.contextmanager
def transaction(connection: sqlite3.Connection) -> Iterator[None]:
    """Make the block's changes together, or not at all."""
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise


@contextlib.contextmanager
def catalogue_errors(path: Path, *, is_writer: bool = True) -> Iterator[None]:
    """Turn SQLite's errors inside the block into ours.

    Only what SQLite read and found wrong is damage. What the system refused to read or write is
    told by the system's reason, which a writer finds by writing what is there again. Only the one
    writer may do that.

    Raises:
        DiskFull: there is no space for the catalogue.
        GalleryBusy: another program has locked it for longer than can be waited.
        BadGallery: the catalogue is damaged, or cannot be read or written.
        MemoryError: there is not enough.
    """
    try:
        yield
    except sqlite3.Error as problem:
        code = getattr(problem, "sqlite_errorcode", None)
        if code is None and not isinstance(problem, sqlite3.OperationalError):
            raise  # a call that is wrong, which is not the catalogue's fault
        raise _told(problem, code or sqlite3.SQLITE_CORRUPT, path, is_writer) from problem
    # SQLite's complaint may quote damaged bytes, which Python then cannot decode.
    except UnicodeDecodeError as problem:
        raise damaged(path, problem) from problem


def damaged(path: Path, problem: object) -> BadGallery:
    """Return the error of a catalogue that holds what nobody has written."""
    return BadGallery(
        f"{path} is damaged: {problem}", "the catalogue of a gallery", _make_anew(path)
    )


def _told(problem: sqlite3.Error, code: int, path: Path, is_writer: bool) -> Exception:
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
    reason = _system_error(path, is_read=is_read)
    if reason is not None and reason.errno == errno.ENOMEM:
        return MemoryError(str(problem))
    if reason is not None and is_read:
        return BadGallery(*read_refused(path, reason))
    if reason is not None:
        return write_error(path, reason, BadGallery)
    name = getattr(problem, "sqlite_errorname", "")
    return BadGallery(
        f"{path} cannot be {'read' if is_read else 'written'}: {problem} ({name})",
        "nothing that was committed before is lost",
        "check the drive, its mount and its permissions, then run the same command again",
    )


def _no_space(path: Path) -> SbtkError:
    """Return the error of a full disk: the catalogue's, or the one of SQLite's temporary files."""
    folders = [path.parent, Path(tempfile.gettempdir())]
    fullest = min(folders, key=_free_bytes)
    full = path if fullest == path.parent else fullest / "temporary files of SQLite"
    return write_error(full, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))


def _free_bytes(folder: Path) -> int:
    try:
        return shutil.disk_usage(folder).free
    except OSError:
        return 0


def _system_error(path: Path, *, is_read: bool) -> OSError | None:
    """Return why the system refused what SQLite tried, found by trying the same.

    SQLite keeps the system's reason to itself. What is written are the same bytes again, and a file
    that is removed.
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
        if _free_bytes(path.parent) < _OUT_OF_SPACE_BYTES:
            return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        # Nothing else refuses a write here, and SQLite names "no space" itself.
        if file_size_limit() is not None:
            return OSError(errno.EFBIG, os.strerror(errno.EFBIG))
    except OSError as problem:
        return problem
    return None


def _read_and_rewrite(file: Path, *, is_rewritten: bool) -> None:
    descriptor = os.open(file, (os.O_RDWR if is_rewritten else os.O_RDONLY) | os.O_CLOEXEC)
    try:
        part = last = b""
        offset = 0
        while part := os.pread(descriptor, 1 << 20, offset):
            offset, last = offset + len(part), part
        if is_rewritten:
            os.pwrite(descriptor, last or b"\0", offset - len(last))
            os.ftruncate(descriptor, offset)
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _make_anew(path: Path) -> str:
    return f"put {path.parent} aside and make it again with sbtk index PHOTOS"


def _make_tables(connection: sqlite3.Connection) -> None:
    for statement in _SCHEMA.split(";"):
        connection.execute(statement)


def _tables(connection: sqlite3.Connection) -> dict[str, str]:
    """Return which tables an older catalogue has, and what is copied from each."""
    names = {name for (name,) in connection.execute("SELECT name FROM main.sqlite_master")}
    return {table: columns for table, columns in _OLD_TABLES.items() if table in names}


def _require_strict_tables(path: Path) -> None:
    if sqlite3.sqlite_version_info < _OLDEST_SQLITE:
        raise BadGallery(
            f"Python here uses SQLite {sqlite3.sqlite_version}, which cannot write {path}",
            f"SQLite {'.'.join(map(str, _OLDEST_SQLITE))} or newer",
            "use a newer Python, such as those of conda or uv",
        )


def _version(connection: sqlite3.Connection, path: Path) -> int:
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    if version > REGIONS_SCHEMA:
        raise BadGallery(
            f"{path} has format {version}, of a newer version of sbtk",
            f"format {REGIONS_SCHEMA} or older",
            "pip install --upgrade sbtk",
        )
    if version < 0:
        raise damaged(path, f"format {version}")
    return int(version)


_SHOWN = 40


def integer(value: object) -> int:
    """Return a whole number as it is.

    Raises:
        ValueError: it is something else.
    """
    if type(value) is not int:
        raise _strange(value, "a whole number")
    return value


def blob(value: object) -> bytes:
    """Return bytes, such as a path or a hash, as they are.

    Raises:
        ValueError: it is something else.
    """
    if not isinstance(value, bytes):
        raise _strange(value, "bytes")
    return value


def text(value: object) -> str:
    """Return a text as it is.

    Raises:
        ValueError: it is something else.
    """
    if not isinstance(value, str):
        raise _strange(value, "a text")
    return value


@contextlib.contextmanager
def values_checked(path: Path, *, is_writer: bool = False) -> Iterator[None]:
    """Turn SQLite's errors into ours, and those of values that no sbtk has written.

    Raises:
        BadGallery: the catalogue at `path` is damaged, or cannot be read.
    """
    with catalogue_errors(path, is_writer=is_writer):
        try:
            yield
        except (KeyError, OverflowError, TypeError, ValueError) as problem:
            raise damaged(path, problem) from problem


def _strange(value: object, expected: str) -> ValueError:
    shown = repr(value)
    shown = shown if len(shown) <= _SHOWN else f"{shown[:_SHOWN]}..."
    return ValueError(f"{shown} where {expected} belongs")


_NUMBERS = ("dim", "rows", "next_id")
_TEXTS = ("model_id", "precision", "preprocessing")
_MOST_GENERATIONS = 1 << 48
_MOST_ROWS = 1 << 32


def open_verified(path: Path) -> sqlite3.Connection:
    """Return a writer's connection to a catalogue that may be built on; make a new one.

    Raises:
        BadGallery: the catalogue is damaged, or cannot be written.
        DiskFull: there is no space for it.
    """
    with values_checked(path, is_writer=True):
        connection = connect_writer(path)
        try:
            show_as_current(connection)
            if problem := soundness_problem(connection):
                raise damaged(path, problem)
            migrate(connection)
        except BaseException:
            connection.close()
            raise
        return connection


def soundness_problem(connection: sqlite3.Connection) -> str | None:
    """Return what is wrong with a catalogue, in words; `None` if nothing is.

    Call it inside `catalogue_values.values_checked`.

    Raises:
        ValueError: a fact about the gallery is of another type than sbtk writes.
        sqlite3.Error: the database is damaged beyond a look.
    """
    (answer,) = connection.execute("PRAGMA integrity_check(1)").fetchone()
    if answer != "ok":
        return str(answer)
    return _wrong_photo(connection) or _wrong_regions(connection) or _wrong_fact(connection)


def _wrong_photo(connection: sqlite3.Connection) -> str | None:
    query = """SELECT min(row), min(added_in), max(added_in), min(removed_in), max(removed_in),
        min(missing_in), max(missing_in) FROM photos"""
    lowest_row, *generations = connection.execute(query).fetchone()
    if lowest_row is not None and lowest_row < 0:
        return f"a photo is at row {lowest_row}"
    strange = [
        number
        for number in generations
        if number is not None and not 0 < number < _MOST_GENERATIONS
    ]
    return f"a photo is of generation {strange[0]}" if strange else None


def _wrong_regions(connection: sqlite3.Connection) -> str | None:
    if not has_regions(connection):
        return None
    query = "SELECT photo_row, first_row, count, length(boxes) FROM regions WHERE "
    wrong = "photo_row < 0 OR first_row < 0 OR count < 0 OR length(boxes) != 16 * count LIMIT 1"
    found = connection.execute(query + wrong).fetchone()
    return None if found is None else f"the regions of row {found[0]} are {found[1:]}"


def has_regions(connection: sqlite3.Connection) -> bool:
    """Return whether the gallery keeps regions of its photos."""
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    return bool(version == REGIONS_SCHEMA)


def _wrong_fact(connection: sqlite3.Connection) -> str | None:
    """Return what the facts say that cannot be, of themselves and beside the tables."""
    facts: dict[str, Any] = dict(connection.execute("SELECT name, value FROM facts"))
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    if ("bits" in facts) != (OLD_SCHEMAS.get(version, version) == CODES_SCHEMA):
        return f"format {version} with{'' if 'bits' in facts else 'out'} a length of codes"
    newest_id = connection.execute("SELECT max(id) FROM photos").fetchone()[0] or 0
    query = "SELECT first_row + count FROM batches ORDER BY first_row DESC LIMIT 1"
    (last_end,) = connection.execute(query).fetchone() or (0,)
    if newest_id or last_end:
        numbers = {name: integer(facts.get(name)) for name in _NUMBERS}
        for name in _TEXTS:
            text(facts.get(name))
        if numbers["next_id"] <= newest_id:
            return f"the photo with the id {newest_id} is younger than the next one"
        if numbers["dim"] < 1:
            return f"embeddings of {numbers['dim']} numbers"
    rows = integer(facts.get("rows", 0))
    # The last batch may have been forgotten where its shard was full.
    is_full = rows % SHARD_ROWS == 0 and last_end <= rows <= _MOST_ROWS
    return None if rows == last_end or is_full else f"{rows} rows, of which {last_end} were written"
