"""The regions of a collection in PostgreSQL, in a table of their own: NAME_regions."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
from pgvector import HalfVector
from psycopg import sql

from sbtk_runtime.gallery.hits import Box
from sbtk_runtime.gallery.postgres_connection import Connection
from sbtk_runtime.gallery.postgres_names import (
    PHOTO,
    Names,
    holds_few,
    photo_of,
    set_index_options,
    where_of,
)
from sbtk_runtime.gallery.region_search import CANDIDATES_PER_HIT, LEAST_CANDIDATES
from sbtk_runtime.gallery.remote import RemoteFilter, RemotePhoto, RemoteRegions
from sbtk_runtime.gallery.rows import Embeddings

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
