"""Collections in PostgreSQL with pgvector: a table of photos, searched exactly or by HNSW.

A collection NAME has the tables NAME (photos), NAME_info (model) and NAME_parts (what each push has
left). Embeddings are `halfvec`, codes `bit`. Tables and index are ordinary ones, so that other
programs can read, replicate and back them up.
"""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from pgvector import Bit, HalfVector
from pgvector.psycopg import register_vector
from psycopg import sql
from psycopg.types.json import Jsonb

from sbtk_runtime.gallery.postgres_connection import ANSWER_S, Connection, Locked, Session
from sbtk_runtime.gallery.postgres_tables import (
    PHOTO,
    Names,
    count_up_to,
    exists,
    holds_few,
    photo_of,
    prepare,
    put_regions,
    read_state,
    regions_of,
    search_regions,
    set_index_options,
    where_of,
)
from sbtk_runtime.gallery.queries import Box
from sbtk_runtime.gallery.remote import (
    EVERY_PHOTO,
    EXACT_BELOW,
    MOST_COUNTED,
    WHOLE,
    CollectionInfo,
    Notify,
    Part,
    RemoteError,
    RemoteFilter,
    RemotePhoto,
    RemoteQuery,
    RemoteRegions,
    RemoteState,
    unescape_path,
)
from sbtk_runtime.gallery.remote_address import Address
from sbtk_runtime.gallery.rows import Embeddings
from sbtk_runtime.manifest import PhotoShard, path_hash

Result = TypeVar("Result")

#: The widest embeddings and codes that pgvector's index takes.
_WIDEST_HALFVEC, _WIDEST_BIT = 4000, 64_000
#: Candidates by the index, which works with float16, for each photo that is wanted.
_CANDIDATES = 4
_PAGE_ROWS = 10_000


class PostgresStore:
    """A collection in PostgreSQL.

    Args:
        address: where it is.
        patience_s: for how long requests to a server that does not answer are repeated.
    """

    def __init__(self, address: Address, patience_s: float) -> None:
        self._address = address
        self._patience_s = patience_s
        self._names = Names(address.collection)

    @property
    def address(self) -> Address:
        """Where the collection is."""
        return self._address

    def reader(self) -> _Reader:
        """Return what answers queries; see `RemoteStore`."""
        reader = _Reader(self._address, self._names, self._patience_s)
        reader.state()
        return reader

    @contextlib.contextmanager
    def writing(
        self, info: CollectionInfo, source: str, shard: PhotoShard, notify: Notify
    ) -> Iterator[_Writer]:
        """Yield what changes the photos of a source, or of a shard; see `RemoteStore`."""
        writer = _Writer(self._address, self._names, self._patience_s, source, shard, notify)
        try:
            writer.prepare(info)
            yield writer
        finally:
            writer.close()

    def publish(self, part: Part, notify: Notify) -> None:
        """Record what a push has left, and build the index where one is due."""
        publisher = Session(self._address, self._patience_s, notify)
        try:
            publisher.run(lambda connection: _record(connection, self._names, part))
            publisher.run(
                lambda connection: _build_index(connection, self._names, notify), autocommit=True
            )
        finally:
            publisher.close()

    def forget(self, source: str, notify: Notify) -> None:
        """Record that nothing is left of a source."""
        with contextlib.closing(Session(self._address, self._patience_s, notify)) as session:
            session.run(lambda connection: _forget(connection, self._names, source))


class _Reading(Session):
    """A connection on which no answer is waited for longer than `ANSWER_S`."""

    limit_s = ANSWER_S + 5  # the server says so itself before that, unless it stands still

    def on_connect(self, connection: Connection) -> None:
        connection.execute(f"SET statement_timeout = '{ANSWER_S}s'")


class _Reader:
    """What answers queries; see `RemoteReader`."""

    def __init__(self, address: Address, names: Names, patience_s: float) -> None:
        self._address = address
        self._names = names
        self._patience_s = patience_s
        self._idle: list[Session] = []
        self._lock = threading.Lock()

    def state(self) -> RemoteState:
        return self._run(lambda connection: read_state(connection, self._names, self._address))

    def search(
        self, query: RemoteQuery, count: int, among: RemoteFilter, *, exact: bool
    ) -> list[tuple[RemotePhoto, float]]:
        return self._run(
            lambda connection: _search(connection, self._names, query, count, among, exact=exact)
        )

    def search_regions(
        self, query: Embeddings, count: int, among: RemoteFilter, *, exact: bool
    ) -> list[tuple[RemotePhoto, float, Box]]:
        return self._run(
            lambda connection: search_regions(
                *(connection, self._names, query, count, among), exact=exact
            )
        )

    def regions(self, photo_id: int) -> RemoteRegions:
        return self._run(lambda connection: regions_of(connection, self._names, photo_id))

    def photos(
        self,
        *,
        ids: Sequence[int] = (),
        sha256s: Sequence[str] = (),
        among: RemoteFilter = EVERY_PHOTO,
        limit: int | None = None,
        offset: int = 0,
    ) -> list[RemotePhoto]:
        where, values = where_of(among)
        order = sql.SQL("mtime_ns DESC, id")
        for column, wanted in (("id", list(ids)), ("sha256", list(map(bytes.fromhex, sha256s)))):
            if wanted:
                where += sql.SQL(" AND {} = ANY(%s)").format(sql.Identifier(column))
                values.append(wanted)
                order = sql.SQL("id")
        query = sql.SQL("SELECT {} FROM {} WHERE {} ORDER BY {} LIMIT %s OFFSET %s").format(
            PHOTO, self._names.photos, where, order
        )
        values += [limit, offset]
        return self._run(
            lambda connection: [photo_of(row) for row in connection.execute(query, values)]
        )

    def count(self, among: RemoteFilter, *, undated: bool = False) -> int:
        where, values = where_of(among)
        if undated:
            where += sql.SQL(" AND taken IS NULL")
        return self._run(
            lambda connection: count_up_to(MOST_COUNTED, connection, self._names, where, values)
        )

    def embeddings(self, ids: Sequence[int]) -> dict[int, Embeddings]:
        query = sql.SQL("SELECT id, embedding::text FROM {} WHERE id = ANY(%s)").format(
            self._names.photos
        )
        found = self._run(lambda connection: connection.execute(query, (list(ids),)).fetchall())
        return {number: np.array(json.loads(text), dtype=np.float32) for number, text in found}

    def close(self) -> None:
        with self._lock:
            while self._idle:
                self._idle.pop().close()

    def _run(self, work: Callable[[Connection], Result]) -> Result:
        with self._lock:
            session = self._idle.pop() if self._idle else _Reading(self._address, self._patience_s)
        try:
            return session.run(work)
        finally:
            with self._lock:
                self._idle.append(session)


class _Writer(Session):
    """What a push changes; see `RemoteWriter`. Its connection holds the lock of the push."""

    def __init__(
        self,
        address: Address,
        names: Names,
        patience_s: float,
        source: str,
        shard: PhotoShard,
        notify: Notify,
    ) -> None:
        super().__init__(address, patience_s, notify)
        self._names = names
        self._source = source
        self._shard = shard
        self._bits: int | None = None

    def prepare(self, info: CollectionInfo) -> None:
        """Make the tables, or check that they are of the same model."""
        self._bits = info.bits
        self.run(lambda connection: prepare(connection, self._names, info, self._address))
        # The adapters of pgvector's types, which a new database did not have yet.
        self.run(register_vector, autocommit=True)

    def stamps(self) -> Iterator[tuple[int, int]]:
        hashes = self._shard.hashes()
        query = sql.SQL(
            "SELECT path_hash, id, stamp FROM {} WHERE source = %s AND path_hash BETWEEN %s AND %s "
            "AND (path_hash, id) > (%s, %s) ORDER BY path_hash, id LIMIT %s"
        ).format(self._names.photos)
        last = (-1, -1)
        while True:
            values = (self._source, hashes.start, hashes.stop - 1, *last, _PAGE_ROWS)
            page = self.run(lambda connection: connection.execute(query, values).fetchall())  # noqa: B023
            for _, photo_id, stamp in page:
                yield photo_id, stamp
            if len(page) < _PAGE_ROWS:
                return
            last = page[-1][:2]

    def put(
        self,
        photos: Sequence[RemotePhoto],
        rows: NDArray[np.generic],
        regions: Sequence[RemoteRegions] = (),
    ) -> int:
        def work(connection: Connection) -> int:
            put = _put(connection, self._names, photos, rows, self._bits)
            if regions:
                put_regions(connection, self._names, photos, regions, put)
            return len(put)

        return self.run(work)

    def delete(self, ids: Sequence[int]) -> None:
        query = sql.SQL("DELETE FROM {} WHERE id = ANY(%s) AND source = %s").format(
            self._names.photos
        )
        self.run(lambda connection: connection.execute(query, (list(ids), self._source)) and None)

    def on_connect(self, connection: Connection) -> None:
        """Take the lock, which ends with the connection, also if this process is killed."""
        whole = self._names.lock(self._source)
        own = self._names.lock(self._source, str(self._shard))
        # The shards of a source exclude a push of the whole source, but not each other.
        way = "" if self._shard == WHOLE else "_shared"
        query = f"SELECT pg_try_advisory_lock{way}(%s) AND pg_try_advisory_lock(%s)"
        if connection.execute(query, (whole, own)).fetchone() != (True,):
            raise Locked


def _put(
    connection: Connection,
    names: Names,
    photos: Sequence[RemotePhoto],
    rows: NDArray[np.generic],
    bits: int | None,
) -> set[int]:
    """Insert or replace photos, and return their ids, without those that are another photo's."""
    incoming = sql.Identifier(f"{names.collection}_incoming")
    connection.execute(
        sql.SQL("CREATE TEMP TABLE IF NOT EXISTS {} (LIKE {}) ON COMMIT DELETE ROWS").format(
            incoming, names.photos
        )
    )
    columns = [
        *("id", "source", "path", "path_hash", "stamp", "size_bytes", "mtime_ns", "sha256"),
        *("partial", "taken", "embedding"),
    ]
    listed = sql.SQL(", ").join(map(sql.Identifier, columns))
    kept = "halfvec" if bits is None else "bit"
    with connection.cursor().copy(
        sql.SQL("COPY {} ({}) FROM STDIN (FORMAT BINARY)").format(incoming, listed)
    ) as copy:
        types = [
            "int8",
            "text",
            "text",
            "int8",
            "int8",
            "int8",
            "int8",
            "bytea",
            "text",
            "text",
            kept,
        ]
        copy.set_types(types)
        for photo, row in zip(photos, rows, strict=True):
            copy.write_row(
                (
                    *(photo.id, photo.source, photo.path),
                    *(path_hash(unescape_path(photo.path)), photo.stamp),
                    *(photo.size_bytes, photo.mtime_ns, bytes.fromhex(photo.sha256)),
                    *(photo.partial, photo.taken),
                    HalfVector(row) if bits is None else Bit(row.tobytes()),
                )
            )
    changes = sql.SQL(", ").join(
        sql.SQL("{0} = excluded.{0}").format(sql.Identifier(column)) for column in columns[1:]
    )
    # A photo with the id of another one is left out, and counted by the caller.
    done = connection.execute(
        sql.SQL(
            "INSERT INTO {photos} AS p ({listed}) SELECT {listed} FROM {incoming} "
            "ON CONFLICT (id) DO UPDATE SET {changes} "
            "WHERE p.source = excluded.source AND p.path = excluded.path RETURNING id"
        ).format(photos=names.photos, listed=listed, incoming=incoming, changes=changes)
    )
    return {number for (number,) in done}


def _record(connection: Connection, names: Names, part: Part) -> None:
    # Other divisions of the source are outdated.
    connection.execute(
        sql.SQL("DELETE FROM {} WHERE source = %s AND NOT shard LIKE %s").format(names.parts),
        (part.source, f"%/{part.shard.count}"),
    )
    connection.execute(
        sql.SQL(
            "INSERT INTO {} (source, shard, photos, folders, has_dates) "
            "VALUES (%s, %s, %s, %s, %s) "
            "ON CONFLICT (source, shard) DO UPDATE SET photos = excluded.photos, "
            "folders = excluded.folders, has_dates = excluded.has_dates, pushed = excluded.pushed"
        ).format(names.parts),
        (part.source, str(part.shard), part.photos, Jsonb(part.folders), part.has_dates),
    )
    if part.region_mean is not None:
        connection.execute(
            sql.SQL(
                "UPDATE {} SET regions = %s, region_mean = %s WHERE source = %s AND shard = %s"
            ).format(names.parts),
            (part.regions, part.region_mean.astype("<f4").tobytes(), part.source, str(part.shard)),
        )
    connection.execute(sql.SQL("UPDATE {} SET generation = generation + 1").format(names.info))


def _forget(connection: Connection, names: Names, source: str) -> None:
    connection.execute(sql.SQL("DELETE FROM {} WHERE source = %s").format(names.parts), (source,))
    connection.execute(sql.SQL("UPDATE {} SET generation = generation + 1").format(names.info))


def _build_index(connection: Connection, names: Names, notify: Notify) -> None:
    """Build the index of a large collection that has none, while others read and write."""
    state = connection.execute(
        sql.SQL("SELECT dim, bits, (SELECT sum(photos) FROM {}) FROM {}").format(
            names.parts, names.info
        )
    ).fetchone()
    assert state is not None
    dim, bits, photos = state
    if photos < EXACT_BELOW:
        return
    if dim > _WIDEST_HALFVEC if bits is None else bits > _WIDEST_BIT:
        notify("pgvector has no index for embeddings this wide: searches stay exact")
        return
    operators = "halfvec_cosine_ops" if bits is None else "bit_hamming_ops"
    what = f"{photos:,} photos"
    _build(connection, names, names.photos, "by_embedding", operators, what, notify)
    if exists(connection, names.regions):
        what = f"the regions of {what}"
        _build(connection, names, names.regions, "by_region", operators, what, notify)


def _build(
    connection: Connection,
    names: Names,
    table: sql.Identifier,
    suffix: str,
    operators: str,
    what: str,
    notify: Notify,
) -> None:
    is_valid = connection.execute(
        "SELECT indisvalid FROM pg_index WHERE indexrelid = to_regclass(%s)",
        (names.index(suffix).as_string(connection),),
    ).fetchone()
    if is_valid == (True,):
        return
    lock = connection.execute(
        "SELECT pg_try_advisory_lock(%s)", (names.lock("", "index"),)
    ).fetchone()
    if lock != (True,):
        notify("another push is building the index")
        return
    notify(f"building the index of {what} on the server")
    connection.execute("SET lock_timeout = 0")
    connection.execute("SET statement_timeout = 0")
    index = names.index(suffix)
    # What a build that was interrupted has left is not valid.
    connection.execute(sql.SQL("DROP INDEX CONCURRENTLY IF EXISTS {}").format(index))
    connection.execute(
        sql.SQL("CREATE INDEX CONCURRENTLY {} ON {} USING hnsw (embedding {})").format(
            index, table, sql.SQL(operators)
        )
    )
    connection.execute(sql.SQL("ANALYZE {}").format(table))


def _search(
    connection: Connection,
    names: Names,
    query: RemoteQuery,
    count: int,
    among: RemoteFilter,
    *,
    exact: bool,
) -> list[tuple[RemotePhoto, float]]:
    wanted = _query_text(connection, names, query)
    is_binary = not wanted.startswith("[")
    where, values = where_of(among)
    if among and not exact:
        exact = holds_few(connection, names, where, values)
    # Scores are computed with all digits of the query, as those of a gallery on disk.
    score = (
        sql.SQL("1 - 2 * (embedding <~> {0}::bit({1})) / {1}").format(
            sql.Literal(wanted), sql.Literal(len(wanted))
        )
        if is_binary
        else sql.SQL("1 - (embedding::vector <=> {}::vector)").format(sql.Literal(wanted))
    )
    candidates = sql.SQL("SELECT {}, embedding FROM {} WHERE {}").format(PHOTO, names.photos, where)
    if not exact:
        distance = sql.SQL("<~> {}::bit({})") if is_binary else sql.SQL("<=> {}::halfvec")
        parts = (sql.Literal(wanted), sql.Literal(len(wanted)))
        candidates += sql.SQL(" ORDER BY embedding ") + distance.format(*parts[: 1 + is_binary])
        candidates += sql.SQL(" LIMIT {}").format(sql.Literal(_CANDIDATES * count))
        set_index_options(connection, _CANDIDATES * count)
    # Materialised, so that an exact search of some photos does not use the index of all.
    ranked = sql.SQL(
        "WITH candidate AS MATERIALIZED ({}) SELECT {}, {} AS score FROM candidate "
        "ORDER BY score DESC, id LIMIT {}"
    ).format(candidates, PHOTO, score, sql.Literal(count))
    return [(photo_of(row[:-1]), float(row[-1])) for row in connection.execute(ranked, values)]


def _query_text(connection: Connection, names: Names, query: RemoteQuery) -> str:
    """Return a query as PostgreSQL reads it: "[0.1,0.2]", or "0110" of a code."""
    if isinstance(query, int):
        found = connection.execute(
            sql.SQL("SELECT embedding::text FROM {} WHERE id = %s").format(names.photos), (query,)
        ).fetchone()
        if found is None:
            raise RemoteError(f"the collection has no photo {query}", "the id of a hit")
        return str(found[0])
    if query.dtype == np.uint8:
        return "".join(map(str, np.unpackbits(query.view(np.uint8)).tolist()))
    return "[" + ",".join(map(repr, query.tolist())) + "]"
