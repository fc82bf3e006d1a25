"""The tables of a collection in PostgreSQL: made, extended, and read for what is in them."""

from __future__ import annotations

import numpy as np
from psycopg import sql

from sbtk_runtime.binary_codes import Itq
from sbtk_runtime.gallery.postgres_connection import Connection
from sbtk_runtime.gallery.postgres_names import INDEXED, Names, pgvector_version
from sbtk_runtime.gallery.postgres_regions import make_regions
from sbtk_runtime.gallery.remote import (
    CollectionInfo,
    Part,
    RemoteError,
    RemoteState,
    require_same,
)
from sbtk_runtime.gallery.remote_address import Address
from sbtk_runtime.manifest import PhotoShard

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
