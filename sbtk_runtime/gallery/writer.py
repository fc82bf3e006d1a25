"""Changes to a catalogue by its only writer, in durable transactions."""

from __future__ import annotations

import contextlib
import json
import os
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import NDArray

from sbtk_runtime.binary_codes import Itq
from sbtk_runtime.gallery.catalogue import (
    Embedding,
    Failure,
    Origin,
    dense_rows,
    exactly,
    load_bits,
    load_itq,
    load_roots,
    load_rules,
    parse_shards,
    store_itq,
    store_roots,
    store_rules,
)
from sbtk_runtime.gallery.photo_filter import below
from sbtk_runtime.gallery.region_rows import RegionRows, load_region_count, put_regions
from sbtk_runtime.gallery.rows import SHARD_ROWS, Batch, Rows
from sbtk_runtime.gallery.schema import (
    CATALOGUE_NAME,
    REGIONS_SCHEMA,
    blob,
    catalogue_errors,
    integer,
    text,
    transaction,
    values_checked,
    write_snapshot,
)
from sbtk_runtime.gallery.soundness import open_verified, record_sound
from sbtk_runtime.gallery.walk_rules import WalkRules
from sbtk_runtime.manifest import PhotoShard, SnapshotRecord

#: mtime_ns, ctime_ns and inode.
Stamps = tuple[int, int | None, int | None]

# Photos that are known, including missing ones; and those that are not missing.
_KNOWN = "removed_in IS NULL"
_LIVE = "removed_in IS NULL AND missing_in IS NULL"
# Rows of live photos, rows of photos that were live in the generation before `:generation`, and
# rows for which the two may differ.
_IS_LIVE = f"EXISTS (SELECT 1 FROM photos AS p WHERE p.row = c.row AND {_LIVE})"
_WAS_LIVE = """EXISTS (SELECT 1 FROM photos AS p WHERE p.row = c.row AND added_in < :generation
    AND (removed_in IS NULL OR removed_in >= :generation)
    AND (missing_in IS NULL OR missing_in >= :generation))"""
_TOUCHED = """(SELECT DISTINCT row FROM photos
    WHERE :generation IN (added_in, removed_in, missing_in)) AS c"""
_TO_ADD = f"FROM {_TOUCHED} WHERE {_IS_LIVE} AND NOT {_WAS_LIVE}"
_TO_DROP = f"FROM {_TOUCHED} WHERE {_WAS_LIVE} AND NOT {_IS_LIVE}"


class Catalogue:
    """The catalogue, open for the one writer that prepares generation `generation`.

    Readers see no change until the manifest names the generation. A `with` block translates
    SQLite's errors.

    Args:
        folder: the gallery's folder.
        generation: the one after the published one. If the manifest was deleted, the catalogue may
            have a later one, which is then prepared instead.

    Raises:
        BadGallery: the catalogue is damaged.
    """

    def __init__(self, folder: Path, generation: int) -> None:
        self.path = folder / CATALOGUE_NAME
        self.connection = open_verified(self.path)
        newest = self._number(
            "SELECT max(coalesce(max(added_in), 0), coalesce(max(removed_in), 0), "
            "coalesce(max(missing_in), 0)) FROM photos"
        )
        self.generation = max(generation, newest)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, _kind: object, error: BaseException | None, _traceback: object) -> None:
        with catalogue_errors(self.path):
            self.connection.close()
            if isinstance(error, sqlite3.Error):
                raise error
        if error is None:
            record_sound(self.path)

    def origin(self) -> Origin | None:
        """Return what made the embeddings; `None` while there are none."""
        with values_checked(self.path):
            facts = dict(self.connection.execute("SELECT name, value FROM facts"))
            if "model_id" not in facts:
                return None
            return Origin(
                text(facts["model_id"]),
                text(facts["precision"]),
                integer(facts["dim"]),
                text(facts["preprocessing"]),
                load_bits(self.connection),
                PhotoShard.parse(text(facts["shard"])) if "shard" in facts else None,
            )

    def itq(self) -> Itq:
        """Return the ITQ that makes the codes of a binary gallery.

        Raises:
            BadGallery: it is damaged.
        """
        with catalogue_errors(self.path):
            return load_itq(self.connection, self.path)

    def claim(self, origin: Origin, itq: Itq | None = None) -> None:
        """Record the origin of a new gallery's embeddings, and the ITQ that makes their codes."""
        with self._transaction():
            for name in ("model_id", "precision", "dim", "preprocessing"):
                self._set_fact(name, getattr(origin, name))
            self.connection.execute("DELETE FROM facts WHERE name = 'shard'")
            if origin.shard is not None:
                self._set_fact("shard", str(origin.shard))
            store_itq(self.connection, itq)

    def mark(self, name: str) -> None:
        """Record a fact about the gallery that has no value."""
        with self._transaction():
            self._set_fact(name, 1)

    def is_marked(self, name: str) -> bool:
        """Return whether `mark` recorded a fact."""
        return bool(self._fact(name))

    def record_shards(self, shards: Mapping[bytes, Iterable[PhotoShard]]) -> None:
        """Record the shards whose photos a merged gallery holds, by the folder they are of."""
        listed = {os.fsdecode(folder): sorted(map(str, held)) for folder, held in shards.items()}
        known = json.dumps(listed, sort_keys=True)
        with self._transaction():
            if (self._stored("shards") or "{}") != known:
                self._set_fact("shards", known)
                self._set_fact("shards_changed_in", self.generation)

    def shards_of_folders(self) -> dict[bytes, frozenset[PhotoShard]]:
        """Return what `record_shards` recorded."""
        with values_checked(self.path):
            query = "SELECT value FROM facts WHERE name = 'shards'"
            found = self.connection.execute(query).fetchone()
            return {} if found is None else parse_shards(found[0])

    def record_roots(self, roots: Iterable[bytes]) -> None:
        """Record the absolute paths of indexed folders and files."""
        with self._transaction():
            if store_roots(self.connection, roots) > 0:
                self._set_fact("roots_changed_in", self.generation)

    def roots(self) -> list[bytes]:
        """Return the absolute paths of indexed folders and files."""
        with values_checked(self.path):
            return load_roots(self.connection)

    def rules(self) -> WalkRules:
        """Return the rules of the walk."""
        with values_checked(self.path):
            return load_rules(self.connection)

    def record_rules(self, rules: WalkRules) -> None:
        """Record the rules of this and later walks."""
        with self._transaction():
            store_rules(self.connection, rules)

    def committed_rows(self) -> int:
        """Return the number of committed rows, including dead ones."""
        return self._fact("rows")

    def live(self) -> int:
        """Return the number of photos that the next generation will have."""
        return self._number(f"SELECT count(*) FROM photos WHERE {_LIVE}")

    def missing(self) -> int:
        """Return the number of missing photos, which are kept but not shown."""
        return self._number(f"SELECT count(*) FROM photos WHERE {_KNOWN} AND missing_in NOT NULL")

    def partly_readable(self) -> int:
        """Return the number of photos of the next generation that were read only in part."""
        # SQLite would choose the order of contents, in which this takes five times as long.
        source = "photos INDEXED BY photo_by_path"
        return self._number(f"SELECT count(*) FROM {source} WHERE {_LIVE} AND partial NOT NULL")

    def is_changed(self) -> bool:
        """Return whether there are changes to publish."""
        query = """SELECT EXISTS (SELECT 1 FROM photos
            WHERE ?1 IN (added_in, removed_in, missing_in))"""
        facts = ("dates_added_in", "roots_changed_in", "stamps_changed_in", "shards_changed_in")
        is_fact_new = any(self._fact(name, default=-1) == self.generation for name in facts)
        return is_fact_new or bool(self._number(query, (self.generation,)))

    def store_dates(self, dates: Sequence[tuple[int, str | None]]) -> None:
        """Commit when photos were taken, by row; `None` if their files do not say so."""
        if dates:
            with self._transaction():
                self.connection.executemany("INSERT OR REPLACE INTO dates VALUES (?, ?)", dates)
                self._set_fact("dates_added_in", self.generation)

    def commit(
        self,
        embeddings: Sequence[Embedding],
        failures: Sequence[Failure],
        batches: Sequence[Batch],
        regions: Sequence[RegionRows] = (),
        region_sum: NDArray[np.float64] | None = None,
    ) -> tuple[int, int]:
        """Add embedded photos and failures, durably; their rows must already be on disk.

        Args:
            embeddings: the photos.
            failures: files that could not be read.
            batches: the rows that were written.
            regions: the regions of the photos.
            region_sum: `(D,)`, the sum of the embeddings of `regions`.

        Returns:
            The numbers of new and of changed photos.
        """
        changed = 0
        with self._transaction():
            next_id = self._fact("next_id", default=1)
            for photo in embeddings:
                known = self._id_at(photo.path)
                changed += known is not None
                self._put(next_id if known is None else known, photo)
                next_id += known is None
            for failure in failures:
                # Its earlier content may come back.
                if (lost := self._id_at(failure.path)) is not None:
                    self._lose(lost)
            self.connection.executemany(
                "INSERT OR REPLACE INTO failures VALUES (:path, :size_bytes, :mtime_ns, :ctime_ns, "
                ":inode, :reason)",
                map(asdict, failures),
            )
            for batch in batches:
                self.connection.execute(
                    "INSERT OR REPLACE INTO batches VALUES (?, ?, ?)",
                    (batch.first_row, batch.count, bytes.fromhex(batch.sha256)),
                )
                self._put_checksums(batch.first_row, batch.crc32s)
                self._set_fact("rows", batch.first_row + batch.count)
            if region_sum is not None:
                put_regions(self.connection, regions, region_sum)
            self._set_fact("next_id", next_id)
        return len(embeddings) - changed, changed

    def move(self, photo_id: int, path: bytes, stamps: Stamps) -> bool:
        """Change a photo's path; return whether that replaced another photo."""
        known = self._id_at(path)
        is_replaced = known not in (None, photo_id)
        if known is not None and is_replaced:
            self._end(known)
        self._put(photo_id, self._version(photo_id, path, stamps))
        return is_replaced

    def keep(self, path: bytes, stamps: Stamps) -> bool:
        """Record the new stamps of a photo with unchanged content; return whether it was missing.

        A missing photo becomes live again.
        """
        photo_id, is_missing = self.connection.execute(
            f"SELECT id, missing_in NOT NULL FROM photos WHERE path = ? AND {_KNOWN}", (path,)
        ).fetchone()
        if is_missing:
            self._put(photo_id, self._version(photo_id, path, stamps))
        else:
            changed = self.connection.execute(
                f"""UPDATE photos SET (mtime_ns, ctime_ns, inode) = (?1, ?2, ?3) WHERE path = ?4
                AND {_KNOWN} AND (mtime_ns, ctime_ns, inode) IS NOT (?1, ?2, ?3)""",
                (*stamps, path),
            )
            if changed.rowcount:
                # Readers filter by the time of a file, and compare linked files by all of them.
                self._set_fact("stamps_changed_in", self.generation)
        return bool(is_missing)

    def lose(self, ids: Iterable[int]) -> int:
        """Mark photos as missing, so that the next generation hides them; return how many."""
        with self._transaction():
            return sum(map(self._lose, ids))

    def remove(self, ids: Iterable[int]) -> int:
        """Remove photos permanently, including missing ones; return how many."""
        removed = list(ids)
        with self._transaction():
            for photo_id in removed:
                self._end(photo_id)
        return len(removed)

    def embedding_of(self, sha256: str) -> Embedding | None:
        """Return a live or missing photo whose content has that hash, if there is one."""
        found = self.connection.execute(
            f"SELECT id, path FROM photos WHERE sha256 = ? AND {_KNOWN} ORDER BY id",
            (bytes.fromhex(sha256),),
        ).fetchone()
        return None if found is None else self._version(found[0], found[1], (0, None, None))

    def ids_below(self, folder: bytes | None, *, missing: bool = False) -> list[int]:
        """Return the ids of the photos in a folder or of one file; with `None`, of all photos.

        Missing photos are included; with `missing`, only they are returned.
        """
        query = f"SELECT id FROM photos WHERE {_KNOWN}" + " AND missing_in NOT NULL" * missing
        if folder is None:
            return [photo_id for (photo_id,) in self.connection.execute(query + " ORDER BY id")]
        query += " AND path >= ? AND path < ? ORDER BY id"
        return [
            photo_id
            for interval in (below(folder), exactly(folder))
            for (photo_id,) in self.connection.execute(query, interval)
        ]

    def forget_below(self, folder: bytes) -> int:
        """Remove the photos, failures and roots of a folder or file; return how many photos."""
        removed = self.remove(self.ids_below(folder))
        with self._transaction():
            for table in ("failures", "roots"):
                for interval in (below(folder), exactly(folder)):
                    self.connection.execute(
                        f"DELETE FROM {table} WHERE path >= ? AND path < ?", interval
                    )
            self._set_fact("roots_changed_in", self.generation)
        return removed

    def remove_at_rows(self, low: int, high: int) -> int:
        """Remove the photos at rows `low` to `high` (end excluded), including missing ones.

        Without checksums of rows, the other rows of their batches are removed, too: the hash of a
        batch verifies all of its rows or none.
        """
        found = self.connection.execute(
            """SELECT id FROM photos WHERE row >= :low AND row < :high AND removed_in IS NULL
            UNION SELECT p.id FROM batches AS b
            JOIN photos AS p ON p.row >= b.first_row AND p.row < b.first_row + b.count
            WHERE b.first_row < :high AND b.first_row + b.count > :low AND p.removed_in IS NULL
            AND NOT EXISTS (SELECT 1 FROM row_checksums AS r WHERE r.row = p.row)""",
            {"low": low, "high": high},
        )
        return self.remove([photo_id for (photo_id,) in found])

    def kept_rows(self) -> Rows:
        """Return the rows `(N,) int64` of all photos, including missing ones, and of regions.

        They are ascending and unique.
        """
        query = "SELECT DISTINCT row FROM photos WHERE removed_in IS NULL ORDER BY row"
        blocks = "SELECT first_row, count FROM regions"
        with values_checked(self.path):
            rows = [integer(row) for (row,) in self.connection.execute(query)]
            for first_row, count in self.connection.execute(blocks):
                rows.extend(range(integer(first_row), first_row + integer(count)))
            return np.unique(np.array(rows, dtype=np.int64))

    def region_count(self) -> int | None:
        """Return the number of regions of a photo; `None` if the gallery keeps none."""
        with values_checked(self.path):
            return load_region_count(self.connection)

    def keep_regions(self, count: int) -> None:
        """Keep `count` regions of each photo from now on."""
        with self._transaction():
            self._set_fact("regions", count)
            self.connection.execute(f"PRAGMA user_version = {REGIONS_SCHEMA}")

    def live_region_rows(self) -> int:
        """Return the number of regions of the next generation's photos."""
        return self._number(
            f"""SELECT coalesce(sum(count), 0) FROM regions WHERE EXISTS
            (SELECT 1 FROM photos WHERE row = photo_row AND {_LIVE})"""
        )

    def photos_without_regions(self) -> list[tuple[bytes, str, int]]:
        """Return path, SHA-256 and row of photos without embedded regions, one for each row."""
        query = f"""SELECT path, sha256, row, min(id) FROM photos WHERE {_LIVE}
            AND row NOT IN (SELECT photo_row FROM regions) GROUP BY row ORDER BY id"""
        with values_checked(self.path):
            found = self.connection.execute(query)
            return [(blob(path), blob(sha).hex(), integer(row)) for path, sha, row, _ in found]

    def forget_regions_at(self, low: int, high: int) -> int:
        """Remove the regions of photos that have one at rows `low` to `high` (end excluded).

        The next update embeds them again. Returns the number of these photos.
        """
        query = "DELETE FROM regions WHERE first_row < ? AND first_row + count > ?"
        with self._transaction():
            return self.connection.execute(query, (high, low)).rowcount

    def live_rows(self) -> Rows:
        """Return the unique rows `(N,) int64` of the next generation's photos, ascending."""
        query = f"SELECT DISTINCT row FROM photos WHERE {_LIVE} ORDER BY row"
        with values_checked(self.path):
            dense = dense_rows(self.connection, _LIVE, {})
            return np.fromiter(self._rows(query), np.int64) if dense is None else dense

    def count_live_rows(self) -> int:
        """Return the number of `live_rows`."""
        return self._number(f"SELECT count(*) FROM (SELECT DISTINCT row FROM photos WHERE {_LIVE})")

    def sample_rows(self, count: int) -> list[int]:
        """Return up to `count` of `live_rows`, spread evenly, ascending."""
        query = f"SELECT DISTINCT row FROM photos WHERE {_LIVE} ORDER BY row LIMIT 1 OFFSET ?"
        live = self.count_live_rows()
        offsets = sorted({live * index // count for index in range(count)}) if live else []
        return [self._number(query, (offset,)) for offset in offsets]

    def rows_to_add(self) -> Iterator[int]:
        """Yield, ascending, the rows that the published generation does not show."""
        yield from self._rows(f"SELECT row {_TO_ADD} ORDER BY row")

    def count_to_add(self) -> int:
        """Return the number of `rows_to_add`."""
        return self._number(f"SELECT count(*) {_TO_ADD}", {"generation": self.generation})

    def rows_to_drop(self) -> Iterator[int]:
        """Yield, ascending, the rows that the next generation no longer shows."""
        yield from self._rows(f"SELECT row {_TO_DROP} ORDER BY row")

    def store_checksums(self, first_row: int, crc32s: Sequence[int]) -> None:
        """Record the CRC-32 of the bytes of consecutive rows."""
        with self._transaction():
            self._put_checksums(first_row, crc32s)

    def checksums(self, rows: Sequence[int]) -> dict[int, int]:
        """Return the committed CRC-32 of each of `rows`, by row, where it is known."""
        query = "SELECT crc32 FROM row_checksums WHERE row = ?"
        with values_checked(self.path):
            found = {row: self.connection.execute(query, (row,)).fetchone() for row in rows}
            return {row: integer(columns[0]) for row, columns in found.items() if columns}

    def share_rows(self, choose: Callable[[list[int]], int | None]) -> int:
        """Let photos with the same content share a row; return how many changed their row.

        This runs once for each catalogue: photos that are added later share rows from the start.

        Args:
            choose: returns which of ascending rows to keep, or `None` to change nothing.
        """
        if self._fact("rows_shared"):
            return 0
        query = f"SELECT sha256 FROM photos WHERE {_KNOWN} GROUP BY sha256 HAVING count(*) > 1"
        shared = 0
        with self._transaction():
            for (sha256,) in self.connection.execute(query).fetchall():
                found = self.connection.execute(
                    "SELECT id, row, path, mtime_ns, ctime_ns, inode, missing_in NOT NULL "
                    f"FROM photos WHERE sha256 = ? AND {_KNOWN} ORDER BY row, id",
                    (sha256,),
                ).fetchall()
                rows = sorted({row for _, row, *_ in found})
                kept = choose(rows) if len(rows) > 1 else None
                if kept is None:
                    continue
                for photo_id, row, path, *stamps, is_missing in found:
                    if row != kept:
                        photo = self._version(photo_id, path, tuple(stamps))
                        self._put(photo_id, replace(photo, row=kept))
                        if is_missing:
                            self._lose(photo_id)
                        shared += 1
            self._set_fact("rows_shared", 1)
        return shared

    def failures(self) -> Iterator[tuple[bytes, str]]:
        """Yield paths and reasons, by path."""
        yield from self.connection.execute("SELECT path, reason FROM failures ORDER BY path")

    def shards(self) -> set[int]:
        """Return the numbers of the shards that hold committed rows."""
        query = f"SELECT DISTINCT first_row / {SHARD_ROWS} FROM batches"
        return {shard for (shard,) in self.connection.execute(query)}

    def retry_failures_of_other(self, reader: str) -> None:
        """Retry earlier failures in this update if another image reader caused them."""
        if self._stored("reader") == reader:
            return
        with self._transaction():
            self.connection.execute("UPDATE failures SET size_bytes = NULL")
            self._set_fact("reader", reader)

    def write_snapshot(self) -> SnapshotRecord:
        """Write the snapshot for readers of the next generation, durably."""
        name = f"catalogue-{self.generation}.sqlite"
        return write_snapshot(self.connection, self.path.with_name(name))

    def purge(self, published: int) -> None:
        """Remove versions older than generation `published`, and shards without photos.

        Readers of older generations hold snapshots.
        """
        with self._transaction():
            self.connection.execute("DELETE FROM photos WHERE removed_in <= ?", (published,))
            for table, row in (("regions", "photo_row"), ("dates", "row")):
                self.connection.execute(
                    f"DELETE FROM {table} WHERE {row} NOT IN (SELECT row FROM photos)"
                )
            # The regions of a photo lie in two shards at most.
            dead = """SELECT first_row / :shard FROM batches
                EXCEPT SELECT row / :shard FROM photos
                EXCEPT SELECT first_row / :shard FROM regions
                EXCEPT SELECT (first_row + count - 1) / :shard FROM regions WHERE count > 0
                EXCEPT SELECT :last"""
            # The last shard is still being filled.
            values = {"shard": SHARD_ROWS, "last": self.committed_rows() // SHARD_ROWS}
            batches = f"DELETE FROM batches WHERE first_row / :shard IN ({dead})"
            self.connection.execute(batches, values)
            self.connection.execute(
                """DELETE FROM row_checksums WHERE row / :shard NOT IN
                (SELECT first_row / :shard FROM batches)""",
                values,
            )

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[None]:
        """Commit all changes of the block durably, or none; translate SQLite's errors."""
        with catalogue_errors(self.path), transaction(self.connection):
            yield

    def _put(self, photo_id: int, photo: Embedding) -> None:
        """Give a photo a version in the next generation."""
        self._end(photo_id)
        self.connection.execute("DELETE FROM failures WHERE path = ?", (photo.path,))
        values = asdict(photo) | {"id": photo_id, "added_in": self.generation}
        values["sha256"] = bytes.fromhex(photo.sha256)
        self.connection.execute(
            "INSERT INTO photos (id, added_in, path, size_bytes, mtime_ns, ctime_ns, inode, "
            "sha256, row, partial) VALUES (:id, :added_in, :path, :size_bytes, :mtime_ns, "
            ":ctime_ns, :inode, :sha256, :row, :partial)",
            values,
        )

    def _version(self, photo_id: int, path: bytes, stamps: Stamps) -> Embedding:
        """Return a known photo as it is, but at `path` with `stamps`."""
        size_bytes, sha256, row, partial = self.connection.execute(
            f"SELECT size_bytes, sha256, row, partial FROM photos WHERE id = ? AND {_KNOWN}",
            (photo_id,),
        ).fetchone()
        return Embedding(path, size_bytes, stamps[0], sha256.hex(), row, *stamps[1:], partial)

    def _end(self, photo_id: int) -> None:
        """End a photo's current version; an unpublished one is deleted."""
        values = self.generation, photo_id
        self.connection.execute("DELETE FROM photos WHERE added_in = ? AND id = ?", values)
        query = f"UPDATE photos SET removed_in = ? WHERE id = ? AND {_KNOWN}"
        self.connection.execute(query, values)

    def _lose(self, photo_id: int) -> bool:
        """Hide a photo from the next generation on; return whether it was there."""
        query = f"UPDATE photos SET missing_in = ? WHERE id = ? AND {_LIVE}"
        return self.connection.execute(query, (self.generation, photo_id)).rowcount > 0

    def _id_at(self, path: bytes) -> int | None:
        query = f"SELECT id FROM photos WHERE path = ? AND {_KNOWN}"
        found = self.connection.execute(query, (path,)).fetchone()
        return None if found is None else integer(found[0])

    def _rows(self, query: str) -> Iterator[int]:
        for (row,) in self.connection.execute(query, {"generation": self.generation}):
            yield row

    def _put_checksums(self, first_row: int, crc32s: Sequence[int]) -> None:
        query = "INSERT OR REPLACE INTO row_checksums VALUES (?, ?)"
        self.connection.executemany(query, enumerate(crc32s, first_row))

    def _fact(self, name: str, default: int = 0) -> int:
        with values_checked(self.path):
            value = self._stored(name)
            return default if value is None else integer(value)

    def _stored(self, name: str) -> object:
        """Return the value of a fact; `None` if there is none."""
        found = self.connection.execute("SELECT value FROM facts WHERE name = ?", (name,))
        return (found.fetchone() or (None,))[0]

    def _set_fact(self, name: str, value: object) -> None:
        self.connection.execute("INSERT OR REPLACE INTO facts VALUES (?, ?)", (name, value))

    def _number(self, query: str, values: tuple[int, ...] | dict[str, int] = ()) -> int:
        with values_checked(self.path):
            return integer(self.connection.execute(query, values).fetchone()[0])
