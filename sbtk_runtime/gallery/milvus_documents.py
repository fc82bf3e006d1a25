"""Documents that describe a collection in Milvus, in the rows of NAME_info.

Milvus has no transactions, but the rows of one request become visible together. A text has at most
65,535 bytes, so a document may take several rows.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable
from typing import Any

from pymilvus import DataType, MilvusClient
from pymilvus.exceptions import MilvusException

from sbtk_runtime.gallery.milvus_connection import ANSWER_S, READY_S, MilvusConnection, quoted
from sbtk_runtime.gallery.remote import RemoteUnavailable, of_another_program

Document = dict[str, Any]

_PIECE = 60_000
_FIELDS = ["kind", "name", "number", "pieces", "version", "content"]


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
        make_collection(self._connection, self.collection, schema, "vector", "FLAT", "L2")

    def read(self, kind: str, *, consistency: str = "Bounded") -> dict[str, Document]:
        """Return the documents of a kind, by name."""
        rows = self._connection.query(
            self.collection, f"kind == {quoted(kind)}", _FIELDS, consistency=consistency
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


def make_collection(
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
    require_fields(connection, name, {one.name for one in schema.fields})


def require_fields(connection: MilvusConnection, name: str, fields: set[str]) -> bool:
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
