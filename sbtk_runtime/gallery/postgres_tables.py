"""The tables of a collection in PostgreSQL: their names, how they are made, read and searched.

Regions are in a separate table, NAME_regions.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
from pgvector import HalfVector
from psycopg import sql

from sbtk_runtime.binary_codes import Itq
from sbtk_runtime.gallery.photo_filter import EVER, PeriodBounds
from sbtk_runtime.gallery.postgres_connection import Connection
from sbtk_runtime.gallery.queries import Box
from sbtk_runtime.gallery.region_search import CANDIDATES_PER_HIT, LEAST_CANDIDATES
from sbtk_runtime.gallery.remote import (
    EXACT_BELOW,
    CollectionInfo,
    Part,
    RemoteError,
    RemoteFilter,
    RemotePhoto,
    RemoteRegions,
    RemoteState,
    require_same,
)
from sbtk_runtime.gallery.remote_address import Address
from sbtk_runtime.gallery.rows import Embeddings
from sbtk_runtime.manifest import PhotoShard, path_hash

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
    places: list[sql.Composable] = []
    for place in among.places:
        text: sql.Composable = sql.SQL("source = %s")
        values.append(place.source)
        if (interval := place.interval()) is not None:
            text += sql.SQL(
                " AND left(path, {0}) >= left(%s, {0}) AND left(path, {0}) <= left(%s, {0})"
                " AND path >= %s AND path < %s"
            ).format(sql.Literal(INDEXED))
            values += [*interval, *interval]
        places.append(text)
    if places:
        where += sql.SQL(" AND ({})").format(sql.SQL(" OR ").join(places))
    if among.period != EVER:
        where += sql.SQL(
            " AND (taken >= %s AND taken < %s"
            " OR taken IS NULL AND mtime_ns >= %s AND mtime_ns <= %s)"
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


#: 1 without regions.
FORMAT = 2
#: pgvector from which on there are `halfvec` and `bit_hamming_ops`.
_OLDEST_PGVECTOR = (0, 7)


def prepare(connection: Connection, names: Names, info: CollectionInfo, address: Address) -> None:
    """Make the tables of a collection, or check that it is of the same model.

    Raises:
        ModelMismatch: it is of another one.
        RemoteError: pgvector is too old, or the format of the collection too new.
    """
    # Two pushes may make the tables at one moment.
    connection.execute("SELECT pg_advisory_xact_lock(%s)", (names.lock(),))
    version = pgvector_version(connection)
    if version is None:
        connection.execute("CREATE EXTENSION vector")
        version = pgvector_version(connection)
    if version is None or version < _OLDEST_PGVECTOR:
        shown = ".".join(map(str, version or ()))
        oldest = ".".join(map(str, _OLDEST_PGVECTOR))
        raise RemoteError(
            f"{address.shown} has pgvector {shown}",
            f"{oldest} or newer",
            "install a newer pgvector on the server, then: ALTER EXTENSION vector UPDATE;",
        )
    if exists(connection, names.info):
        require_same(read_state(connection, names, address).info, info, address)
        _add_dates(connection, names)
        return
    kept = f"halfvec({info.dim})" if info.bits is None else f"bit({info.bits})"
    for statement in _TABLES:
        connection.execute(
            sql.SQL(statement).format(
                photos=names.photos,
                info=names.info,
                parts=names.parts,
                kept=sql.SQL(kept),
                by_hash=names.index("by_hash"),
                by_path=names.index("by_path"),
                by_time=names.index("by_time"),
                by_content=names.index("by_content"),
                indexed=sql.Literal(INDEXED),
            )
        )
    connection.execute(
        sql.SQL("INSERT INTO {} VALUES (true, %s, %s, %s, %s, %s, %s, %s, 0, %s)").format(
            names.info
        ),
        (
            *(
                1 if info.regions is None else FORMAT,
                info.model_id,
                info.preprocessing,
                info.precision,
                info.dim,
                info.bits,
            ),
            None if info.itq is None else info.itq.to_bytes(),
            info.regions,
        ),
    )
    if info.regions is not None:
        make_regions(connection, names, info.dim)
    _add_dates(connection, names)


def _add_dates(connection: Connection, names: Names) -> None:
    """Add the dates of photos, which collections of older versions do not have."""
    known = connection.execute(
        "SELECT 1 FROM pg_attribute WHERE attrelid = to_regclass(%s) AND attname = 'taken'",
        (names.photos.as_string(connection),),
    )
    if known.fetchone():
        return
    for statement in (
        'ALTER TABLE {photos} ADD COLUMN taken text COLLATE "C"',
        "ALTER TABLE {parts} ADD COLUMN has_dates boolean NOT NULL DEFAULT false",
        "CREATE INDEX {by_taken} ON {photos} (taken)",
    ):
        connection.execute(
            sql.SQL(statement).format(
                photos=names.photos, parts=names.parts, by_taken=names.index("by_taken")
            )
        )


# Paths are compared by their bytes, whatever the database's language.
_TABLES = (
    """CREATE TABLE {info} (
    is_only boolean PRIMARY KEY CHECK (is_only), format integer NOT NULL, model_id text NOT NULL,
    preprocessing text NOT NULL, precision text NOT NULL, dim integer NOT NULL, bits integer,
    itq bytea, generation bigint NOT NULL, regions integer)""",
    """CREATE TABLE {parts} (
    source text NOT NULL, shard text NOT NULL, photos bigint NOT NULL, folders jsonb NOT NULL,
    pushed timestamptz NOT NULL DEFAULT now(), regions bigint NOT NULL DEFAULT 0,
    region_mean bytea, PRIMARY KEY (source, shard))""",
    """CREATE TABLE {photos} (
    id bigint PRIMARY KEY, source text COLLATE "C" NOT NULL, path text COLLATE "C" NOT NULL,
    path_hash bigint NOT NULL, stamp bigint NOT NULL, size_bytes bigint NOT NULL,
    mtime_ns bigint NOT NULL, sha256 bytea NOT NULL, partial text, embedding {kept} NOT NULL)""",
    "CREATE INDEX {by_hash} ON {photos} (source, path_hash, id) INCLUDE (stamp)",
    "CREATE INDEX {by_path} ON {photos} (source, left(path, {indexed}))",
    "CREATE INDEX {by_time} ON {photos} (mtime_ns DESC, id)",
    "CREATE INDEX {by_content} ON {photos} USING hash (sha256)",
)


def exists(connection: Connection, table: sql.Identifier) -> bool:
    """Return whether there is a table of that name."""
    name = table.as_string(connection)
    row = connection.execute("SELECT to_regclass(%s) IS NOT NULL", (name,)).fetchone()
    return bool(row and row[0])


def read_state(connection: Connection, names: Names, address: Address) -> RemoteState:
    """Return what a collection holds.

    Raises:
        RemoteError: its format is too new.
    """
    query = sql.SQL(
        # Collections that keep no regions may be older than that column.
        "SELECT format, model_id, preprocessing, precision, dim, bits, itq, generation, "
        "(to_jsonb(i) ->> 'regions')::integer FROM {} AS i"
    ).format(names.info)
    found = connection.execute(query).fetchone()
    if found is None or found[0] > FORMAT:
        what = "is incomplete" if found is None else f"has format {found[0]}"
        raise RemoteError(
            f"the collection {address.shown} {what}",
            f"one of format {FORMAT}, as this version of sbtk makes them",
            "update sbtk, or push to another collection: --at '...?collection=NAME'",
        )
    _, model_id, preprocessing, precision, dim, bits, itq, generation, regions = found
    codes = None if itq is None else Itq.from_bytes(itq)
    parts = connection.execute(
        sql.SQL(
            "SELECT source, shard, photos, folders{}, "
            "coalesce((to_jsonb(p) ->> 'has_dates')::boolean, false) "
            "FROM {} AS p ORDER BY source, shard"
        ).format(sql.SQL(", 0, NULL" if regions is None else ", regions, region_mean"), names.parts)
    )
    return RemoteState(
        CollectionInfo(model_id, preprocessing, precision, dim, bits, codes, regions),
        generation,
        tuple(
            Part(
                *(source, PhotoShard.parse(shard), photos, folders, count),
                None if mean is None else np.frombuffer(mean, dtype="<f4"),
                has_dates,
            )
            for source, shard, photos, folders, count, mean, has_dates in parts
        ),
    )


_TABLE = """CREATE TABLE {regions} (
    photo bigint NOT NULL REFERENCES {photos} ON DELETE CASCADE, number integer NOT NULL,
    box real[] NOT NULL, embedding halfvec({dim}) NOT NULL, PRIMARY KEY (photo, number))"""


def make_regions(connection: Connection, names: Names, dim: int) -> None:
    """Make the table of regions, which go when their photo does."""
    connection.execute(
        sql.SQL(_TABLE).format(regions=names.regions, photos=names.photos, dim=sql.Literal(dim))
    )


def put_regions(
    connection: Connection,
    names: Names,
    photos: Sequence[RemotePhoto],
    regions: Sequence[RemoteRegions],
    put: set[int],
) -> None:
    """Replace the regions of those of `photos` whose ids are in `put`."""
    connection.execute(
        sql.SQL("DELETE FROM {} WHERE photo = ANY(%s)").format(names.regions), (list(put),)
    )
    with connection.cursor().copy(
        sql.SQL("COPY {} (photo, number, box, embedding) FROM STDIN (FORMAT BINARY)").format(
            names.regions
        )
    ) as copy:
        copy.set_types(["int8", "int4", "float4[]", "halfvec"])
        for photo, one in zip(photos, regions, strict=True):
            if photo.id not in put:
                continue
            for number, (box, row) in enumerate(zip(one.boxes.tolist(), one.rows, strict=True)):
                copy.write_row((photo.id, number, box, HalfVector(row)))


def regions_of(connection: Connection, names: Names, photo_id: int) -> RemoteRegions:
    """Return the regions of a photo; see `RemoteReader`."""
    query = sql.SQL("SELECT box, embedding::text FROM {} WHERE photo = %s ORDER BY number")
    found = connection.execute(query.format(names.regions), (photo_id,)).fetchall()
    return RemoteRegions(
        np.array([box for box, _ in found], dtype=np.float32).reshape(-1, 4),
        np.array([json.loads(text) for _, text in found], dtype=np.float32),
    )


def search_regions(
    connection: Connection,
    names: Names,
    query: Embeddings,
    count: int,
    among: RemoteFilter,
    *,
    exact: bool,
) -> list[tuple[RemotePhoto, float, Box]]:
    """Return the photos with the best regions for `query (D,) float32`; see `RemoteReader`."""
    where, values = where_of(among)
    if among and not exact:
        exact = holds_few(connection, names, where, values)
    wanted = sql.Literal("[" + ",".join(map(repr, query.tolist())) + "]")
    candidates = sql.SQL("SELECT photo, number, box, embedding FROM {}").format(names.regions)
    if among:
        candidates += sql.SQL(" WHERE photo IN (SELECT id FROM {} WHERE {})").format(
            names.photos, where
        )
    if not exact:
        limit = max(LEAST_CANDIDATES, CANDIDATES_PER_HIT * count)
        # Regions have length 1, so the order is that of their products with the query.
        candidates += sql.SQL(" ORDER BY embedding <=> {}::halfvec LIMIT {}").format(
            wanted, sql.Literal(limit)
        )
        set_index_options(connection, limit)
    ranked = sql.SQL(
        "WITH candidate AS MATERIALIZED ({candidates}), scored AS ("
        "SELECT photo, number, box, -(embedding::vector <#> {wanted}::vector) AS score "
        "FROM candidate), best AS (SELECT DISTINCT ON (photo) photo, score, box FROM scored "
        "ORDER BY photo, score DESC, number) "
        "SELECT {columns}, score, box FROM best JOIN {photos} ON id = photo "
        "ORDER BY score DESC, id LIMIT {count}"
    ).format(
        candidates=candidates,
        wanted=wanted,
        columns=PHOTO,
        photos=names.photos,
        count=sql.Literal(count),
    )
    return [_found(row) for row in connection.execute(ranked, values)]


def _found(row: Sequence[Any]) -> tuple[RemotePhoto, float, Box]:
    x, y, width, height = row[-1]
    return photo_of(row[:-2]), float(row[-2]), (x, y, width, height)
