"""The collections of Milvus: photos, their regions, and documents that describe them.

Milvus has no transactions, but the rows of one request become visible together. A text has at most
65,535 bytes, so a document may take several rows.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pymilvus import DataType, MilvusClient
from pymilvus.exceptions import MilvusException

from sbtk_runtime.gallery.milvus_connection import (
    ANSWER_S,
    MOST_ROWS,
    READY_S,
    MilvusConnection,
    Row,
    condition,
    quoted,
)
from sbtk_runtime.gallery.queries import Box
from sbtk_runtime.gallery.remote import (
    CollectionInfo,
    RemoteFilter,
    RemotePhoto,
    RemoteRegions,
    RemoteUnavailable,
    of_another_program,
    unescape_path,
)
from sbtk_runtime.gallery.rows import Embeddings, unit_row
from sbtk_runtime.manifest import path_hash

#: The fields that `photo_of` takes.
PHOTO = ["id", "source", "path", "size_bytes", "mtime_ns", "sha256", "partial"]
BOX = ["x", "y", "width", "height"]
_NUMBERS = ["path_hash", "stamp", "size_bytes", "mtime_ns"]
# What the filters of `condition` compare; regions have it, too, as there are no joins.
_FILTERED = ["source", "path", "path_hash", "mtime_ns", "taken"]
_LONGEST = 65_535
_LENGTHS = {"source": 1024, "path": _LONGEST, "sha256": 64, "partial": _LONGEST, "taken": 64}
# As hnswlib's in a gallery on disk.
_HNSW = {"M": 16, "efConstruction": 200}
_LEAST_EF, _MOST_EF = 128, 32_768
# Bytes of a request; Milvus takes 64 MB by default.
_REQUEST_BYTES = 8_000_000
# Reading more photos than needed costs less than counting them.
_SLACK = 2000
_MOST = (1 << 63) - 1
#: Ids in a condition.
_IDS = 1000
_PIECE = 60_000
_DOCUMENT = ["kind", "name", "number", "pieces", "version", "content"]

Document = dict[str, Any]


class Documents:
    """The documents of a collection, by kind and name."""

    def __init__(self, connection: MilvusConnection) -> None:
        self._connection = connection
        self.address = connection.address
        self.collection = f"{connection.address.collection}_info"

    def make(self) -> None:
        """Make the collection of the documents if needed."""
        schema = MilvusClient.create_schema(auto_id=False, enable_dynamic_field=False)
        schema.add_field("id", DataType.VARCHAR, is_primary=True, max_length=4096)
        for name in ("kind", "version"):
            schema.add_field(name, DataType.VARCHAR, max_length=64)
        schema.add_field("name", DataType.VARCHAR, max_length=2048)
        for name in ("number", "pieces"):
            schema.add_field(name, DataType.INT64)
        schema.add_field("content", DataType.VARCHAR, max_length=65_535)
        # Milvus requires one.
        schema.add_field("vector", DataType.FLOAT_VECTOR, dim=2)
        _make_collection(self._connection, self.collection, schema, "vector", "FLAT", "L2")

    def read(self, kind: str, *, consistency: str = "Bounded") -> dict[str, Document]:
        """Return the documents of a kind, by name."""
        rows = self._connection.query(
            self.collection, f"kind == {quoted(kind)}", _DOCUMENT, consistency=consistency
        )
        pieces = {(row["name"], row["version"], row["number"]): row for row in rows}
        documents = {}
        for row in rows:
            if row["number"] != 0:
                continue
            keys = [(row["name"], row["version"], n) for n in range(row["pieces"])]
            if not all(key in pieces for key in keys):
                raise RemoteUnavailable(f"{self.address.shown} is being changed", "", "try again")
            documents[row["name"]] = json.loads("".join(pieces[key]["content"] for key in keys))
        return documents

    def write(self, kind: str, name: str, document: Document) -> None:
        """Write a document in place of the one of its name."""
        content = json.dumps(document)  # ASCII, so that pieces have as many bytes as characters
        pieces = [content[start : start + _PIECE] for start in range(0, len(content), _PIECE)]
        version = secrets.token_hex(8)
        rows = [
            {
                "id": f"{kind}/{name}/{number}",
                "kind": kind,
                "name": name,
                "number": number,
                "pieces": len(pieces),
                "version": version,
                "content": piece,
                "vector": [0.0, 0.0],
            }
            for number, piece in enumerate(pieces)
        ]
        self._connection.upsert(self.collection, rows)

    def delete(self, kind: str, name: str) -> None:
        """Delete a document."""
        where = f"kind == {quoted(kind)} and name == {quoted(name)}"
        self._connection.delete(self.collection, where)


def make_rows(connection: MilvusConnection, info: CollectionInfo) -> None:
    """Make the collections of photos and regions, unless there is one of photos.

    Raises:
        RemoteError: there is one of that name by another program.
    """
    name = connection.address.collection
    if not _require_fields(connection, name, {*PHOTO, "stamp", "embedding"}):
        if info.regions is not None:
            _make_regions(connection, f"{name}_regions", info)
        _make_photos(connection, name, info)


def _make_photos(connection: MilvusConnection, name: str, info: CollectionInfo) -> None:
    """Make the collection of photos if needed, and begin to load it."""
    schema = MilvusClient.create_schema(auto_id=False, enable_dynamic_field=False)
    schema.add_field("id", DataType.INT64, is_primary=True)
    for field in _NUMBERS:
        schema.add_field(field, DataType.INT64)
    for field, length in _LENGTHS.items():
        schema.add_field(field, DataType.VARCHAR, max_length=length)
    if info.bits is None:
        schema.add_field("embedding", DataType.FLOAT_VECTOR, dim=info.dim)
        _make_collection(connection, name, schema, "embedding", "HNSW", "IP", **_HNSW)
    else:
        schema.add_field("embedding", DataType.BINARY_VECTOR, dim=info.bits)
        _make_collection(connection, name, schema, "embedding", "BIN_FLAT", "HAMMING")


def _make_regions(connection: MilvusConnection, name: str, info: CollectionInfo) -> None:
    """Make the collection of regions if needed, and begin to load it."""
    schema = MilvusClient.create_schema(auto_id=False, enable_dynamic_field=False)
    schema.add_field("id", DataType.VARCHAR, is_primary=True, max_length=64)
    for field in ("photo", "number", "path_hash", "mtime_ns"):
        schema.add_field(field, DataType.INT64)
    for field in ("source", "path", "taken"):
        schema.add_field(field, DataType.VARCHAR, max_length=_LENGTHS[field])
    for field in BOX:
        schema.add_field(field, DataType.FLOAT)
    schema.add_field("embedding", DataType.FLOAT_VECTOR, dim=info.dim)
    _make_collection(connection, name, schema, "embedding", "HNSW", "IP", **_HNSW)


def photo_row(photo: RemotePhoto, row: NDArray[np.generic]) -> Row:
    """Return the row of a photo with its embedding `(D,) float16` or code `(bits / 8,) uint8`."""
    return {
        "id": photo.id,
        "source": photo.source,
        "path": photo.path,
        "path_hash": path_hash(unescape_path(photo.path)),
        "stamp": photo.stamp,
        "size_bytes": photo.size_bytes,
        "mtime_ns": photo.mtime_ns,
        "sha256": photo.sha256,
        "partial": photo.partial or "",
        "taken": photo.taken or "",
        "embedding": row.tobytes() if row.dtype == np.uint8 else unit_row(row, len(row)),
    }


def photo_of(row: Row) -> RemotePhoto:
    """Return the photo of a row with the fields `PHOTO`."""
    return RemotePhoto(
        **{field: row[field] for field in PHOTO} | {"partial": row["partial"] or None}
    )


def region_rows(photo: Row, regions: RemoteRegions) -> list[Row]:
    """Return the rows of the regions of a photo, which has the row `photo`."""
    same = {field: photo[field] for field in _FILTERED}
    return [
        {
            **same,
            **dict(zip(BOX, box, strict=True)),
            "id": f"{photo['id']}:{number}",
            "photo": photo["id"],
            "number": number,
            "embedding": unit_row(row, len(row)),
        }
        for number, (box, row) in enumerate(zip(regions.boxes.tolist(), regions.rows, strict=True))
    ]


def box_of(row: Row) -> Box:
    """Return the box of the row of a region."""
    x, y, width, height = (float(row[field]) for field in BOX)
    return x, y, width, height


def upsert(connection: MilvusConnection, collection: str, rows: Sequence[Row]) -> None:
    """Insert or replace rows, in requests that Milvus takes."""
    part: list[Row] = []
    size = 0
    for number, row in enumerate(rows, start=1):
        part.append(row)
        embedding = row["embedding"]
        size += 500 + 4 * len(row["path"])
        size += len(embedding) if isinstance(embedding, bytes) else embedding.nbytes
        if size >= _REQUEST_BYTES or number == len(rows):
            connection.upsert(collection, part)
            part, size = [], 0


def search(
    connection: MilvusConnection,
    collection: str,
    query: Embeddings | bytes,
    count: int,
    among: RemoteFilter,
    fields: Sequence[str],
) -> list[tuple[Row, float]]:
    """Return rows by the index with their products, or distances of codes, nearest first.

    Args:
        connection: to the server.
        collection: of photos or regions.
        query: an embedding `(D,) float32`, or the bytes of a code.
        count: at most so many.
        among: the filter.
        fields: of the rows.
    """
    count = min(count, MOST_ROWS)
    is_code = isinstance(query, bytes)
    width = min(max(2 * count, _LEAST_EF), _MOST_EF)
    parameters: dict[str, Any] = {
        "metric_type": "HAMMING" if is_code else "IP",
        "params": {} if is_code else {"ef": width},
    }
    found = connection.run(
        lambda client: client.search(
            collection,
            data=[query],
            filter=condition(among) if among else "",
            limit=count,
            output_fields=list(fields),
            search_params=parameters,
            anns_field="embedding",
            timeout=ANSWER_S,
        ),
        collection,
    )
    return [(dict(hit["entity"]), float(hit["distance"])) for hit in found[0]]


def search_all(
    connection: MilvusConnection,
    collection: str,
    query: Embeddings,
    count: int,
    among: RemoteFilter,
    group: str,
    fields: Sequence[str] = (),
) -> list[tuple[Row, float]]:
    """Return the best rows of all for `query (D,) float32`, compared here: one of each `group`.

    Milvus has no exact search of a collection with an index.
    """
    best: dict[object, tuple[float, Row]] = {}
    columns = [*dict.fromkeys([group, *fields]), "embedding"]
    for page in connection.rows(collection, condition(among), columns):
        if not page:
            continue
        embeddings = np.array([row.pop("embedding") for row in page], dtype=np.float32)
        for row, score in zip(page, (embeddings @ query).tolist(), strict=True):
            known = best.get(row[group])
            if known is None or score > known[0]:
                best[row[group]] = score, row
        if len(best) > 4 * count:
            best = dict(_first(best, count))
    return [(row, score) for _, (score, row) in _first(best, count)]


def _first(
    best: dict[object, tuple[float, Row]], count: int
) -> list[tuple[object, tuple[float, Row]]]:
    return sorted(best.items(), key=lambda one: (-one[1][0], one[0]))[:count]


class NewestFirst:
    """Photos in order of their times, newest first; Milvus cannot sort.

    Photos since a point in time are counted until their number is close enough.

    Args:
        connection: to the server.
        collection: of the photos.
        where: the condition of those that are listed.
    """

    def __init__(self, connection: MilvusConnection, collection: str, where: str) -> None:
        self._connection = connection
        self._collection = collection
        self._where = where

    def page(self, offset: int, limit: int) -> list[Row]:
        """Return rows of the fields `PHOTO`, by descending time, then by id."""
        total = self._count("path_hash >= 0")
        wanted = min(offset + limit, total)
        if offset >= wanted:
            return []
        where, skipped = self._first(wanted, total)[0], 0
        if offset > _SLACK:
            newer, skipped = self._first(offset - _SLACK, total)
            where = f"({where}) and not ({newer})"
        pages = self._connection.rows(
            self._collection, f"({self._where}) and ({where})", ["id", "mtime_ns"]
        )
        keys = sorted((-row["mtime_ns"], row["id"]) for page in pages for row in page)
        ids = [number for _, number in keys[offset - skipped : wanted - skipped]]
        rows = rows_of_ids(self._connection, self._collection, ids, PHOTO)
        return sorted(rows, key=lambda row: (-row["mtime_ns"], row["id"]))

    def _first(self, least: int, total: int) -> tuple[str, int]:
        """Return a condition for the first photos, at least so many and a few more, and how many.

        Photos with the same time are told apart by their ids, which are spread evenly.
        """
        if total <= least + _SLACK:
            return "path_hash >= 0", total
        time, count = self._bisect(lambda time: f"mtime_ns >= {-time}", -_MOST, _MOST, least, total)
        if count <= least + _SLACK:
            return f"mtime_ns >= {-time}", count
        newer = f"mtime_ns > {-time}"
        number, count = self._bisect(
            lambda number: f"{newer} or (mtime_ns == {-time} and id <= {number})",
            *(0, _MOST, least, count),
        )
        return f"{newer} or (mtime_ns == {-time} and id <= {number})", count

    def _bisect(
        self, where: Callable[[int], str], low: int, high: int, least: int, most: int
    ) -> tuple[int, int]:
        """Return the lowest bound for at least so many photos, or one for a few more.

        The number of photos grows with the bound; at `high` it is `most`.
        """
        while high - low > 1 and most > least + _SLACK:
            middle = (low + high) // 2
            count = self._count(where(middle))
            if count >= least:
                high, most = middle, count
            else:
                low = middle
        return high, most

    def _count(self, where: str) -> int:
        return self._connection.count(self._collection, f"({self._where}) and ({where})")


def rows_of_ids(
    connection: MilvusConnection,
    collection: str,
    ids: Sequence[int],
    fields: Sequence[str],
    *,
    consistency: str = "Bounded",
) -> list[Row]:
    """Return the rows with these ids that are there, in any order."""
    found = []
    for part in parts_of(ids):
        where = f"id in {part}"
        found += connection.query(collection, where, fields, consistency=consistency)
    return found


def parts_of(ids: Sequence[int], size: int = _IDS) -> Iterator[list[int]]:
    """Yield ids, as many as a condition may name."""
    for start in range(0, len(ids), size):
        yield [int(number) for number in ids[start : start + size]]


def _make_collection(
    connection: MilvusConnection,
    name: str,
    schema: Any,
    field: str,
    index: str,
    metric: str,
    **parameters: int,
) -> None:
    """Make a collection with an index of `field` if needed, and begin to load it.

    Raises:
        RemoteError: there is one of that name by another program.
    """
    indices = MilvusClient.prepare_index_params()
    indices.add_index(field, index_type=index, metric_type=metric, params=parameters)

    def work(client: MilvusClient) -> None:
        _unless_there(
            lambda: bool(client.has_collection(name, timeout=ANSWER_S)),
            lambda: client.create_collection(
                name, schema=schema, num_shards=1, consistency_level="Bounded", timeout=READY_S
            ),
        )
        _unless_there(
            lambda: bool(client.list_indexes(name, timeout=ANSWER_S)),
            lambda: client.create_index(name, index_params=indices, timeout=READY_S),
        )
        # Who queries it waits until it is loaded, see `MilvusConnection.run`.
        client.load_collection(name, timeout=READY_S, _async=True)

    connection.run(work)
    _require_fields(connection, name, {one.name for one in schema.fields})


def _require_fields(connection: MilvusConnection, name: str, fields: set[str]) -> bool:
    """Return whether there is a collection, and make sure that it has these fields.

    Raises:
        RemoteError: it is one of another program.
    """

    def known(client: MilvusClient) -> set[str] | None:
        if not client.has_collection(name, timeout=ANSWER_S):
            return None
        found = client.describe_collection(name, timeout=ANSWER_S)
        return {field["name"] for field in found["fields"]}

    found = connection.run(known)
    if found is not None and not fields <= found:
        raise of_another_program(connection.address, f"{name} has other fields")
    return found is not None


def _unless_there(is_there: Callable[[], bool], make: Callable[[], object]) -> None:
    """Make something that another push may make at the same moment."""
    if is_there():
        return
    try:
        make()
    except MilvusException:
        if not is_there():
            raise
