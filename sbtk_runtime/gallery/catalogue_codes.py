"""What makes a binary gallery's codes, kept in its catalogue beside the photos.

A gallery has its own copy of the ITQ, written in the transaction that claims the gallery: codes of
two ITQs cannot be compared, and a bundle that is exported again may have learnt another one.
"""

from __future__ import annotations

import hashlib
import sqlite3
from pathlib import Path

from sbtk_runtime.errors import BadGallery, BadModel
from sbtk_runtime.gallery.catalogue_database import CODES_SCHEMA, EMBEDDINGS_SCHEMA
from sbtk_runtime.gallery.catalogue_values import integer
from sbtk_runtime.itq import Itq

_NAMES = ("bits", "itq", "itq_sha256")


def store_itq(connection: sqlite3.Connection, itq: Itq | None) -> None:
    """Makes the catalogue that of a binary gallery, or with `None` of one of embeddings.

    A version of sbtk that knows no codes refuses the catalogue of a binary gallery. Call it in a
    transaction.
    """
    connection.executemany("DELETE FROM facts WHERE name = ?", [(name,) for name in _NAMES])
    version = EMBEDDINGS_SCHEMA
    if itq is not None:
        content = itq.to_bytes()
        values = (itq.bits, content, hashlib.sha256(content).hexdigest())
        connection.executemany("INSERT INTO facts VALUES (?, ?)", zip(_NAMES, values, strict=True))
        version = CODES_SCHEMA
    connection.execute(f"PRAGMA user_version = {version}")


def stored_bits(connection: sqlite3.Connection) -> int | None:
    """Returns the length of the gallery's codes; `None` if it holds embeddings."""
    found = connection.execute("SELECT value FROM facts WHERE name = 'bits'").fetchone()
    return None if found is None else integer(found[0])


def stored_itq(connection: sqlite3.Connection, path: Path) -> Itq:
    """Returns what makes the codes of a binary gallery whose catalogue is at `path`.

    Raises:
        BadGallery: it is not what was stored.
    """
    facts = dict(
        connection.execute("SELECT name, value FROM facts WHERE name IN (?, ?, ?)", _NAMES)
    )
    content = facts.get("itq", b"")
    if (
        not isinstance(content, bytes)
        or hashlib.sha256(content).hexdigest() != facts.get("itq_sha256")
        or (itq := _itq_of(content)) is None
        or itq.bits != facts.get("bits")
    ):
        raise BadGallery(
            f"{path} holds a damaged ITQ, which makes the gallery's codes",
            "the one that was stored with the gallery",
            f"put {path.parent} aside and make it again with sbtk index PHOTOS --bits BITS",
        )
    return itq


def _itq_of(content: bytes) -> Itq | None:
    try:
        return Itq.from_bytes(content)
    except BadModel:
        return None
