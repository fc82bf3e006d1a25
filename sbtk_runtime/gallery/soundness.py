"""Whether a catalogue is sound, which a writer checks before it changes it.

Comparing all indexes with their tables takes most of the time of an update in which little is new.
A catalogue that is as its last writer left it, by size and times, was compared then.
"""

from __future__ import annotations

import contextlib
import sqlite3
from pathlib import Path
from typing import Any

from sbtk_runtime.errors import DiskFull
from sbtk_runtime.files import without_waiting, write_atomically
from sbtk_runtime.gallery.rows import SHARD_ROWS
from sbtk_runtime.gallery.schema import (
    CODES_SCHEMA,
    OLD_SCHEMAS,
    connect_writer,
    damaged,
    has_regions,
    integer,
    migrate,
    show_as_current,
    text,
    user_version,
    values_checked,
)

#: Size, times and inode of a catalogue that was sound when its writer closed it.
STAMP_NAME = ".sound"

_NUMBERS = ("dim", "rows", "next_id")
_TEXTS = ("model_id", "precision", "preprocessing")
_MOST_GENERATIONS = 1 << 48
_MOST_ROWS = 1 << 32


def open_verified(path: Path) -> sqlite3.Connection:
    """Return a writer's connection to an undamaged or new catalogue, in the current format.

    Raises:
        BadGallery: the catalogue is damaged, or cannot be written.
        DiskFull: there is no space for it.
    """
    with values_checked(path, is_writer=True):
        is_as_left = _is_as_left(path)
        connection = connect_writer(path)
        try:
            show_as_current(connection)
            if problem := soundness_problem(connection, is_quick=is_as_left):
                raise damaged(path, problem)
            migrate(connection)
        except BaseException:
            connection.close()
            raise
        return connection


def record_sound(path: Path) -> None:
    """Record that a catalogue, which is closed now, is sound."""
    # Without this record, the next writer compares everything.
    with contextlib.suppress(OSError, DiskFull):
        if (stamp := _stamp(path)) is not None:
            write_atomically(path.with_name(STAMP_NAME), stamp)


def _is_as_left(path: Path) -> bool:
    """Return whether nothing has changed a catalogue since `record_sound`."""
    try:
        with open(path.with_name(STAMP_NAME), "rb", opener=without_waiting) as file:
            return file.read(256) == _stamp(path)
    except OSError:
        return False


def _stamp(path: Path) -> bytes | None:
    """Return size, times and inode of a catalogue; `None` if its log holds something."""
    log = Path(f"{path}-wal")
    # A reader of the catalogue, such as `verify_gallery`, leaves an empty log.
    if log.exists() and log.stat().st_size:
        return None
    status = path.stat()
    numbers = (status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino)
    return " ".join(map(str, numbers)).encode()


def soundness_problem(connection: sqlite3.Connection, *, is_quick: bool = False) -> str | None:
    """Return what is wrong with a catalogue, in words; `None` if nothing is.

    Call it inside `values_checked`. With `is_quick`, indexes are not compared with their tables.

    Raises:
        ValueError: a fact about the gallery has an unexpected type.
        sqlite3.Error: the database is too damaged to be checked.
    """
    check = "quick_check" if is_quick else "integrity_check"
    (answer,) = connection.execute(f"PRAGMA {check}(1)").fetchone()
    if answer != "ok":
        return str(answer)
    return _wrong_photo(connection) or _wrong_regions(connection) or _wrong_fact(connection)


def _wrong_photo(connection: sqlite3.Connection) -> str | None:
    query = """SELECT id, row, added_in, removed_in, missing_in FROM photos
        WHERE row NOT BETWEEN 0 AND :rows OR added_in NOT BETWEEN 1 AND :generations OR
        removed_in NOT BETWEEN 1 AND :generations OR missing_in NOT BETWEEN 1 AND :generations"""
    most = {"rows": _MOST_ROWS, "generations": _MOST_GENERATIONS}
    found = connection.execute(query, most).fetchone()
    return found and f"photo {found[0]} is at row {found[1]}, of the generations {found[2:]}"


def _wrong_regions(connection: sqlite3.Connection) -> str | None:
    if not has_regions(connection):
        return None
    query = """SELECT photo_row, first_row, count, length(boxes) FROM regions
        WHERE photo_row < 0 OR first_row < 0 OR count < 0 OR length(boxes) != 16 * count"""
    found = connection.execute(query).fetchone()
    return found and f"the regions of row {found[0]} are {found[1:]}"


def _wrong_fact(connection: sqlite3.Connection) -> str | None:
    """Return what is wrong with the facts, by themselves or compared with the tables."""
    facts: dict[str, Any] = dict(connection.execute("SELECT name, value FROM facts"))
    version = user_version(connection)
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
    # The last batch may have been removed with its full shard.
    is_full = rows % SHARD_ROWS == 0 and last_end <= rows <= _MOST_ROWS
    return None if rows == last_end or is_full else f"{rows} rows, of which {last_end} were written"
