"""Whether a catalogue is as sbtk writes it: looked at whole, before anything is built on it.

A writer that believed a flipped bit would make it worse: by a number of rows that is too small, or
by another width, it would cut the embeddings off. SQLite checks pages, indices and the types of
values, the tables being strict.
"""

from __future__ import annotations

import sqlite3
from pathlib import Path
from typing import Any

from sbtk_runtime.gallery.catalogue_database import (
    CODES_SCHEMA,
    OLD_SCHEMAS,
    connect_writer,
    damaged,
    migrate,
    show_as_current,
)
from sbtk_runtime.gallery.catalogue_values import integer, text, values_checked
from sbtk_runtime.gallery.shards import SHARD_ROWS

_NUMBERS = ("dim", "rows", "next_id")
_TEXTS = ("model_id", "precision", "preprocessing")
_MOST_GENERATIONS = 1 << 48
_MOST_ROWS = 1 << 32


def connect_sound(path: Path) -> sqlite3.Connection:
    """Returns a writer's connection to a catalogue that may be built on; makes a new one.

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
    """Returns what is wrong with a catalogue, in words; `None` if nothing is.

    Call it inside `catalogue_values.values_checked`.

    Raises:
        ValueError: a fact about the gallery is of another type than sbtk writes.
        sqlite3.Error: the database is damaged beyond a look.
    """
    (answer,) = connection.execute("PRAGMA integrity_check(1)").fetchone()
    if answer != "ok":
        return str(answer)
    return _wrong_photo(connection) or _wrong_fact(connection)


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


def _wrong_fact(connection: sqlite3.Connection) -> str | None:
    """Returns what the facts say that cannot be, of themselves and beside the tables."""
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
