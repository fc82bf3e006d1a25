"""The folders and files that 'sbtk index' was given: what a photo was found below.

Links in a root's own path are its user's; below it none is followed to a folder. Whoever opens a
photo for somebody else must know where the one ends and the other begins.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable

from sbtk_runtime.gallery.catalogue_values import blob

# Made when it is first needed; an sbtk that knows no such table never looks at it.
_TABLE = "CREATE TABLE IF NOT EXISTS roots (path BLOB PRIMARY KEY) WITHOUT ROWID"


def store_roots(connection: sqlite3.Connection, roots: Iterable[bytes]) -> None:
    """Adds absolute paths to those that are known. Call it in a transaction."""
    connection.execute(_TABLE)
    connection.executemany("INSERT OR IGNORE INTO roots VALUES (?)", ((root,) for root in roots))


def stored_roots(connection: sqlite3.Connection) -> list[bytes]:
    """Returns the paths, sorted; none if an sbtk that knew no roots made the catalogue."""
    table = "SELECT 1 FROM sqlite_master WHERE type = 'table' AND name = 'roots'"
    if connection.execute(table).fetchone() is None:
        return []
    return [blob(path) for (path,) in connection.execute("SELECT path FROM roots ORDER BY path")]
