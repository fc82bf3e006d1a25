"""Changes to a catalogue: the one writer's side, in durable transactions."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Self

from sbtk_runtime.gallery.catalogue import Embedding, Failure, Origin
from sbtk_runtime.gallery.catalogue_check import connect_sound
from sbtk_runtime.gallery.catalogue_codes import store_itq, stored_bits, stored_itq
from sbtk_runtime.gallery.catalogue_database import (
    CATALOGUE_NAME,
    catalogue_errors,
    transaction,
    write_snapshot,
)
from sbtk_runtime.gallery.catalogue_roots import (
    store_roots,
    store_rules,
    stored_roots,
    stored_rules,
)
from sbtk_runtime.gallery.catalogue_values import integer, text, values_checked
from sbtk_runtime.gallery.shards import SHARD_ROWS, Batch
from sbtk_runtime.itq import Itq
from sbtk_runtime.manifest import SnapshotRecord
from sbtk_runtime.walk_rules import WalkRules

# A photo that only moved has the row that it had.
_TO_ADD = """FROM photos AS p WHERE born = ?1 AND gone IS NULL
    AND NOT EXISTS (SELECT 1 FROM photos WHERE row = p.row AND born < ?1)"""


class Catalogue:
    """The catalogue, open for the one writer that prepares generation `generation`.

    Nothing that is changed here is seen by readers until the manifest names the generation. In a
    `with` block SQLite's errors become ours.

    Args:
        folder: the gallery's.
        generation: the one after the published one. If the catalogue knows a later one (somebody
            removed the manifest), then that is prepared.

    Raises:
        BadGallery: the catalogue is damaged; nothing is built on it.
    """

    def __init__(self, folder: Path, generation: int) -> None:
        self.path = folder / CATALOGUE_NAME
        self.connection = connect_sound(self.path)
        newest = self._number(
            "SELECT max(coalesce(max(born), 0), coalesce(max(gone), 0)) FROM photos"
        )
        self.generation = max(generation, newest)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        with catalogue_errors(self.path):
            self.connection.close()
            if isinstance(error, sqlite3.Error):
                raise error

    def origin(self) -> Origin | None:
        """Returns what made the embeddings; `None` while there are none."""
        with values_checked(self.path):
            facts = dict(self.connection.execute("SELECT name, value FROM facts"))
            if "model_id" not in facts:
                return None
            return Origin(
                text(facts["model_id"]),
                text(facts["precision"]),
                integer(facts["dim"]),
                text(facts["preprocessing"]),
                stored_bits(self.connection),
            )

    def itq(self) -> Itq:
        """Returns what makes the codes of a binary gallery.

        Raises:
            BadGallery: it is damaged.
        """
        with catalogue_errors(self.path):
            return stored_itq(self.connection, self.path)

    def claim(self, origin: Origin, itq: Itq | None = None) -> None:
        """Records what makes the embeddings of a new gallery, and what makes codes of them."""
        with catalogue_errors(self.path), transaction(self.connection):
            for name in ("model_id", "precision", "dim", "preprocessing"):
                self._set_fact(name, getattr(origin, name))
            store_itq(self.connection, itq)

    def record_roots(self, roots: Iterable[bytes]) -> None:
        """Notes what photos are looked for below, as absolute paths."""
        with catalogue_errors(self.path), transaction(self.connection):
            store_roots(self.connection, roots)

    def roots(self) -> list[bytes]:
        """Returns what photos were looked for below, as absolute paths."""
        with values_checked(self.path):
            return stored_roots(self.connection)

    def rules(self) -> WalkRules:
        """Returns what is left out of the walks."""
        with values_checked(self.path):
            return stored_rules(self.connection)

    def record_rules(self, rules: WalkRules) -> None:
        """Notes what is left out of this walk, and of those to come."""
        with catalogue_errors(self.path), transaction(self.connection):
            store_rules(self.connection, rules)

    def committed_rows(self) -> int:
        """Returns the number of rows of the vectors that count, dead ones included."""
        return self._fact("rows")

    def live(self) -> int:
        """Returns the number of photos that the next generation will have."""
        return self._number("SELECT count(*) FROM photos WHERE gone IS NULL")

    def is_changed(self) -> bool:
        """Returns whether anything in the catalogue waits for its generation to be published."""
        query = "SELECT EXISTS (SELECT 1 FROM photos WHERE born = ?1 OR gone = ?1)"
        return bool(self._number(query, (self.generation,)))

    def commit(
        self,
        embeddings: Sequence[Embedding],
        failures: Sequence[Failure],
        batches: Sequence[Batch],
    ) -> tuple[int, int]:
        """Adds what was embedded, durably; the rows must be on disk. Returns new and changed."""
        changed = 0
        with catalogue_errors(self.path), transaction(self.connection):
            next_id = self._fact("next_id", default=1)
            for photo in embeddings:
                known = self._id_at(photo.path)
                changed += known is not None
                self._put(next_id if known is None else known, photo)
                next_id += known is None
            for failure in failures:
                self._end_at(failure.path)
                self._add_failure(failure)
            for batch in batches:
                self._add_batch(batch)
                self._set_fact("rows", batch.first_row + batch.count)
            self._set_fact("next_id", next_id)
        return len(embeddings) - changed, changed

    def move(self, photo_id: int, path: bytes, mtime_ns: int) -> bool:
        """Gives a photo another path; returns whether that ended another photo there."""
        is_replaced = self._end_at(path)
        size_bytes, sha256, row = self.connection.execute(
            "SELECT size_bytes, sha256, row FROM photos WHERE id = ? AND gone IS NULL", (photo_id,)
        ).fetchone()
        self._put(photo_id, Embedding(path, size_bytes, mtime_ns, sha256.hex(), row))
        return is_replaced

    def restamp(self, path: bytes, mtime_ns: int) -> None:
        """Notes the new time of a file whose bytes are the same."""
        self.connection.execute(
            "UPDATE photos SET mtime_ns = ? WHERE path = ? AND gone IS NULL", (mtime_ns, path)
        )

    def remove(self, ids: Iterable[int]) -> int:
        """Drops photos; returns how many."""
        removed = 0
        with catalogue_errors(self.path), transaction(self.connection):
            for photo_id in ids:
                self._end(photo_id)
                removed += 1
        return removed

    def remove_at_rows(self, low: int, high: int) -> int:
        """Drops the photos at rows `low` to `high` (end excluded), and the others of their batches.

        A batch's hash vouches for all of its rows or for none.
        """
        found = self.connection.execute(
            """SELECT id FROM photos WHERE row >= :low AND row < :high AND gone IS NULL
            UNION SELECT p.id FROM batches AS b
            JOIN photos AS p ON p.row >= b.first_row AND p.row < b.first_row + b.count
            WHERE b.first_row < :high AND b.first_row + b.count > :low AND p.gone IS NULL""",
            {"low": low, "high": high},
        )
        return self.remove([photo_id for (photo_id,) in found])

    def live_rows(self) -> Iterator[int]:
        """Yields the rows of the next generation's photos, ascending."""
        query = "SELECT row FROM photos WHERE gone IS NULL ORDER BY row"
        for (row,) in self.connection.execute(query):
            yield row

    def sample_rows(self, count: int) -> list[int]:
        """Returns up to `count` of `live_rows`, spread evenly, ascending."""
        query = "SELECT row FROM photos WHERE gone IS NULL ORDER BY row LIMIT 1 OFFSET ?"
        live = self.live()
        offsets = sorted({live * index // count for index in range(count)}) if live else []
        return [self._number(query, (offset,)) for offset in offsets]

    def rows_to_add(self) -> Iterator[int]:
        """Yields, ascending, the rows that the published generation does not have."""
        query = f"SELECT row {_TO_ADD} ORDER BY row"
        for (row,) in self.connection.execute(query, (self.generation,)):
            yield row

    def count_to_add(self) -> int:
        """Returns the number of `rows_to_add`."""
        return self._number(f"SELECT count(*) {_TO_ADD}", (self.generation,))

    def rows_to_drop(self) -> Iterator[int]:
        """Yields, ascending, the rows that the next generation no longer has."""
        query = """SELECT row FROM photos AS p WHERE gone = ?1
            AND NOT EXISTS (SELECT 1 FROM photos WHERE row = p.row AND gone IS NULL)
            ORDER BY row"""
        for (row,) in self.connection.execute(query, (self.generation,)):
            yield row

    def failures(self) -> Iterator[tuple[bytes, str]]:
        """Yields paths and reasons, by path."""
        yield from self.connection.execute("SELECT path, reason FROM failures ORDER BY path")

    def shards(self) -> set[int]:
        """Returns the numbers of the shards that hold committed rows."""
        query = f"SELECT DISTINCT first_row / {SHARD_ROWS} FROM batches"  # noqa: S608
        return {shard for (shard,) in self.connection.execute(query)}

    def retry_failures_of_other(self, reader: str) -> None:
        """Makes failures be tried again if they were met by another reader of images."""
        found = self.connection.execute("SELECT value FROM facts WHERE name = 'reader'").fetchone()
        if found == (reader,):
            return
        with catalogue_errors(self.path), transaction(self.connection):
            self.connection.execute("UPDATE failures SET size_bytes = NULL")
            self._set_fact("reader", reader)

    def write_snapshot(self) -> SnapshotRecord:
        """Writes the copy of the catalogue that readers of the next generation use, durably."""
        name = f"catalogue-{self.generation}.sqlite"
        return SnapshotRecord(name, write_snapshot(self.connection, self.path.with_name(name)))

    def purge(self, published: int) -> None:
        """Forgets versions that generation `published` no longer has, and shards without photos.

        Whoever reads an older generation holds a snapshot.
        """
        with catalogue_errors(self.path), transaction(self.connection):
            self.connection.execute("DELETE FROM photos WHERE gone <= ?", (published,))
            dead = """SELECT first_row / :shard FROM batches
                EXCEPT SELECT row / :shard FROM photos EXCEPT SELECT :last"""
            # The last shard is still being filled.
            last = self.committed_rows() // SHARD_ROWS
            self.connection.execute(
                f"DELETE FROM batches WHERE first_row / :shard IN ({dead})",  # noqa: S608
                {"shard": SHARD_ROWS, "last": last},
            )

    def _put(self, photo_id: int, photo: Embedding) -> None:
        """Gives a photo a version in the next generation."""
        self._end(photo_id)
        self.connection.execute("DELETE FROM failures WHERE path = ?", (photo.path,))
        self.connection.execute(
            "INSERT INTO photos (id, born, path, size_bytes, mtime_ns, sha256, row) "
            "VALUES (?, ?, ?, ?, ?, ?, ?)",
            (
                photo_id,
                self.generation,
                photo.path,
                photo.size_bytes,
                photo.mtime_ns,
                bytes.fromhex(photo.sha256),
                photo.row,
            ),
        )

    def _end(self, photo_id: int) -> None:
        """Ends a photo's current version; one that nobody has seen is forgotten."""
        self.connection.execute(
            "DELETE FROM photos WHERE id = ? AND born = ?", (photo_id, self.generation)
        )
        self.connection.execute(
            "UPDATE photos SET gone = ? WHERE id = ? AND gone IS NULL", (self.generation, photo_id)
        )

    def _end_at(self, path: bytes) -> bool:
        known = self._id_at(path)
        if known is not None:
            self._end(known)
        return known is not None

    def _id_at(self, path: bytes) -> int | None:
        found = self.connection.execute(
            "SELECT id FROM photos WHERE path = ? AND gone IS NULL", (path,)
        ).fetchone()
        return None if found is None else integer(found[0])

    def _add_failure(self, failure: Failure) -> None:
        self.connection.execute(
            "INSERT OR REPLACE INTO failures VALUES (:path, :size_bytes, :mtime_ns, :ctime_ns, "
            ":reason)",
            asdict(failure),
        )

    def _add_batch(self, batch: Batch) -> None:
        self.connection.execute(
            "INSERT OR REPLACE INTO batches VALUES (?, ?, ?)",
            (batch.first_row, batch.count, bytes.fromhex(batch.sha256)),
        )

    def _fact(self, name: str, default: int = 0) -> int:
        with values_checked(self.path):
            found = self.connection.execute("SELECT value FROM facts WHERE name = ?", (name,))
            return integer((found.fetchone() or (default,))[0])

    def _set_fact(self, name: str, value: object) -> None:
        self.connection.execute("INSERT OR REPLACE INTO facts VALUES (?, ?)", (name, value))

    def _number(self, query: str, values: tuple[int, ...] = ()) -> int:
        with values_checked(self.path):
            return integer(self.connection.execute(query, values).fetchone()[0])
