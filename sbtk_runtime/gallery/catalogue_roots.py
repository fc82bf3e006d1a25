"""The folders and files that 'sbtk index' was given, and what it leaves out below them.

Links in a root's own path are its user's; below it none is followed to a folder. Whoever opens a
photo for somebody else must know where the one ends and the other begins.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterable
from dataclasses import asdict

from sbtk_runtime.gallery.catalogue_values import blob, text
from sbtk_runtime.walk_rules import WalkRules


def store_roots(connection: sqlite3.Connection, roots: Iterable[bytes]) -> None:
    """Adds absolute paths to those that are known. Call it in a transaction."""
    connection.executemany("INSERT OR IGNORE INTO roots VALUES (?)", ((root,) for root in roots))


def stored_roots(connection: sqlite3.Connection) -> list[bytes]:
    """Returns the paths, sorted; none if an sbtk that knew no roots made the catalogue."""
    return [blob(path) for (path,) in connection.execute("SELECT path FROM roots ORDER BY path")]


def store_rules(connection: sqlite3.Connection, rules: WalkRules) -> None:
    """Notes what the walk leaves out. Call it in a transaction."""
    connection.execute(
        "INSERT OR REPLACE INTO facts VALUES ('walk_rules', ?)", (json.dumps(asdict(rules)),)
    )


def stored_rules(connection: sqlite3.Connection) -> WalkRules:
    """Returns what the walk left out the last time; by default the usual."""
    found = connection.execute("SELECT value FROM facts WHERE name = 'walk_rules'").fetchone()
    if found is None:
        return WalkRules()
    value = json.loads(text(found[0]))
    rules = WalkRules(
        tuple(value["exclude"]), bool(value["include_hidden"]), bool(value["follow_links"])
    )
    if not all(isinstance(pattern, str) for pattern in rules.exclude):
        raise TypeError("patterns that are not text")
    return rules
