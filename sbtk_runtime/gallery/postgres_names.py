"""The names of a collection's tables, and the clauses that its queries share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from psycopg import sql

from sbtk_runtime.gallery.photo_filter import EVER, PeriodBounds
from sbtk_runtime.gallery.postgres_connection import Connection
from sbtk_runtime.gallery.remote import EXACT_BELOW, RemoteFilter, RemotePhoto
from sbtk_runtime.manifest import path_hash

#: Characters of a path in an index, whose entries may have 2,700 bytes.
INDEXED = 400
#: The columns that `photo_of` takes.
PHOTO = sql.SQL("id, source, path, size_bytes, mtime_ns, sha256, partial")
#: pgvector from which on an index is searched on until enough photos pass a filter.
_ITERATIVE_PGVECTOR = (0, 8)
_LEAST_EF, _MOST_EF = 100, 1000


class Names:
    """The names of a collection's tables and indices."""

    def __init__(self, collection: str) -> None:
        self.collection = collection
        self.photos = sql.Identifier(collection)
        self.info = sql.Identifier(f"{collection}_info")
        self.parts = sql.Identifier(f"{collection}_parts")
        self.regions = sql.Identifier(f"{collection}_regions")

    def index(self, suffix: str) -> sql.Identifier:
        """Return the name of an index."""
        return sql.Identifier(f"{self.collection}_{suffix}")

    def lock(self, *parts: str) -> int:
        """Return the number of a lock."""
        return path_hash("\0".join(["sbtk", self.collection, *parts]).encode())


def pgvector_version(connection: Connection) -> tuple[int, ...] | None:
    """Return the version of pgvector in the database; `None` if it is not installed there."""
    query = "SELECT extversion FROM pg_extension WHERE extname = 'vector'"
    found = connection.execute(query).fetchone()
    return None if found is None else tuple(map(int, found[0].split(".")))


def set_index_options(connection: Connection, candidates: int) -> None:
    """Let the index find that many candidates, and go on while a filter leaves too few."""
    width = min(max(candidates, _LEAST_EF), _MOST_EF)
    connection.execute(f"SET LOCAL hnsw.ef_search = {width}")
    version = pgvector_version(connection)
    if version is not None and version >= _ITERATIVE_PGVECTOR:
        connection.execute("SET LOCAL hnsw.iterative_scan = relaxed_order")


def where_of(among: RemoteFilter) -> tuple[sql.Composable, list[Any]]:
    """Return the condition for photos that a filter accepts, and its values."""
    where: sql.Composable = sql.SQL("true")
    values: list[Any] = []
    if among.source is not None:
        where += sql.SQL(" AND source = %s")
        values.append(among.source)
    if (interval := among.interval()) is not None:
        where += sql.SQL(
            " AND left(path, {0}) >= left(%s, {0}) AND left(path, {0}) <= left(%s, {0})"
            " AND path >= %s AND path < %s"
        ).format(sql.Literal(INDEXED))
        values += [*interval, *interval]
    if among.period != EVER:
        where += sql.SQL(
            " AND (taken >= %s AND taken < %s"
            " OR taken IS NULL AND mtime_ns >= %s AND mtime_ns < %s)"
        )
        values += PeriodBounds.of(among.period)
    return where, values


def holds_few(
    connection: Connection, names: Names, where: sql.Composable, values: Sequence[Any]
) -> bool:
    """Return whether so few photos meet a condition of `where_of` that all can be compared."""
    return count_up_to(EXACT_BELOW + 1, connection, names, where, values) <= EXACT_BELOW


def count_up_to(
    most: int,
    connection: Connection,
    names: Names,
    where: sql.Composable,
    values: Sequence[Any],
) -> int:
    """Return the number of photos that meet a condition of `where_of`, or `most`."""
    query = sql.SQL("SELECT count(*) FROM (SELECT 1 FROM {} WHERE {} LIMIT %s) AS few")
    found = connection.execute(query.format(names.photos, where), [*values, most]).fetchone()
    assert found is not None
    return int(found[0])


def photo_of(row: Sequence[Any]) -> RemotePhoto:
    """Return the photo of a row of the columns `PHOTO`."""
    photo_id, source, path, size_bytes, mtime_ns, sha256, partial = row
    return RemotePhoto(photo_id, source, path, size_bytes, mtime_ns, bytes(sha256).hex(), partial)
