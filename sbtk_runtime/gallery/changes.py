"""The changed photos of an update: found by a walk, embedded, and committed in batches.

The photos on disk are compared with the catalogue in SQLite instead of in memory: in temporary
tables of the writer's connection, which SQLite keeps in a small cache and spills to a file. A
million photos take no more memory than a thousand.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Self

import numpy as np
import PIL

from sbtk_runtime.binary_codes import Itq
from sbtk_runtime.embedding.stream import Embedded, EmbeddingStream, Failed, Known
from sbtk_runtime.errors import BadImage, InternalError
from sbtk_runtime.gallery.absent import IS_BELOW_ROOTS, AbsentPhotos, Loss
from sbtk_runtime.gallery.catalogue import Embedding, Failure, exactly
from sbtk_runtime.gallery.folder import relative_path, roots_above
from sbtk_runtime.gallery.photo_filter import below
from sbtk_runtime.gallery.region_rows import place_regions, sum_regions
from sbtk_runtime.gallery.rows import Batch, CodeShards, Embeddings, Vectors, codes_of
from sbtk_runtime.gallery.schema import catalogue_errors, transaction
from sbtk_runtime.gallery.walk import (
    Followed,
    Found,
    LeftOut,
    LeftOutTally,
    Repeated,
    Skipped,
)
from sbtk_runtime.gallery.writer import Catalogue, Stamps
from sbtk_runtime.images import read_image_bytes
from sbtk_runtime.manifest import PhotoShard
from sbtk_runtime.preprocess import PREPROCESSING

#: Called with the number of photos done, their total (`None` while they are being found), and
#: images/s.
Progress = Callable[[int, int | None, float], None]

_TABLES = """
CREATE TEMP TABLE walk_roots (low BLOB, high BLOB);
CREATE TEMP TABLE hidden (low BLOB, high BLOB);
CREATE TEMP TABLE walked (
    path BLOB PRIMARY KEY, size_bytes INTEGER, mtime_ns INTEGER, ctime_ns INTEGER, inode INTEGER
) WITHOUT ROWID;
CREATE TEMP TABLE skipped (path BLOB PRIMARY KEY, reason TEXT) WITHOUT ROWID;
CREATE TEMP TABLE todo (
    path BLOB PRIMARY KEY, size_bytes INTEGER, mtime_ns INTEGER, ctime_ns INTEGER, inode INTEGER,
    known_id INTEGER
) WITHOUT ROWID;
"""
# Older versions did not store ctime and inode; then only size and mtime are compared.
_HAS_ITS_STAMPS = """(p.size_bytes = w.size_bytes AND p.mtime_ns = w.mtime_ns
    AND coalesce(p.ctime_ns = w.ctime_ns, 1) AND coalesce(p.inode = w.inode, 1))"""
# Walked files that need work, and for a while also photos with `known_id`, which only have to be
# recorded: as found again, or with stamps that older versions did not store.
_FILL_TODO = f"""
INSERT INTO todo SELECT w.*, CASE
    WHEN NOT :checksum AND {_HAS_ITS_STAMPS} AND (p.missing_in IS NULL OR f.path IS NULL)
    THEN p.id END AS known_id
FROM walked AS w
LEFT JOIN photos AS p ON p.path = w.path AND p.removed_in IS NULL
LEFT JOIN failures AS f ON f.path = w.path
WHERE (known_id IS NULL OR p.missing_in NOT NULL OR p.ctime_ns IS NULL)
AND NOT (f.path IS NOT NULL AND f.size_bytes IS w.size_bytes
    AND f.mtime_ns IS w.mtime_ns AND f.ctime_ns IS w.ctime_ns
    AND coalesce(f.inode = w.inode, 1))
"""
_KNOWN = "SELECT path, mtime_ns, ctime_ns, inode FROM todo WHERE known_id NOT NULL"
_IS_LIVE = """EXISTS (SELECT 1 FROM photos AS p WHERE p.path = w.path AND p.removed_in IS NULL
    AND p.missing_in IS NULL)"""
_IS_FAILED = "EXISTS (SELECT 1 FROM failures AS f WHERE f.path = w.path)"
# There are few failures: a cross join reads them first.
_FAILED_BEFORE = """failures AS f CROSS JOIN walked AS w ON w.path = f.path
WHERE NOT EXISTS (SELECT 1 FROM todo AS t WHERE t.path = w.path)"""
_UNACCOUNTED = f"walked AS w WHERE {_IS_LIVE} + {_IS_FAILED} != 1"
_SAME_SIZE = """
SELECT t.path, t.size_bytes, t.mtime_ns, t.ctime_ns, t.inode, p.sha256 FROM todo AS t
LEFT JOIN photos AS p ON p.path = t.path AND p.removed_in IS NULL AND p.size_bytes = t.size_bytes
WHERE t.path > ? AND (p.id IS NOT NULL
    OR EXISTS (SELECT 1 FROM absent AS a WHERE a.size_bytes = t.size_bytes))
ORDER BY t.path LIMIT 256
"""
_LARGEST = (1 << 63) - 1
_PAGE = 256
_WALK_TICK = 1000
_IS_KNOWN = "SELECT EXISTS (SELECT 1 FROM photos WHERE sha256 = ? AND removed_in IS NULL)"


class Changes:
    """The differences between the photos below some roots and the catalogue, until committed.

    Args:
        catalogue: the writer's.
        roots: absolute paths.
        items: of the walk of the roots, which is finished here.
        checksum: detect changes by content; the stamps of files are not trusted.
        shard: the part of the photos that the gallery holds; `None` for all.
        progress: called now and then with the number of items.

    Attributes:
        absent: the photos of the catalogue that were not walked.
        left_out: what the rules of the walk left out.
        followed: the paths of links to folders that were followed.
        repeated: folders that were walked by another path.
        other_shards: the number of photos that belong to other shards.
        revived: the number of missing photos that are back at their paths.
        unchanged: the number of walked photos that need no work.
        failed_before: the number of walked files that failed in an earlier update and have not
            changed since.
        new, changed: the numbers of photos that were embedded, at a new or a known path.
        failed: the number of files that could not be embedded.
    """

    def __init__(
        self,
        catalogue: Catalogue,
        roots: Sequence[str],
        items: Iterator[Found | Skipped | LeftOut | Followed | Repeated],
        *,
        checksum: bool = False,
        shard: PhotoShard | None = None,
        progress: Progress = lambda done, total, rate: None,
    ) -> None:
        self.catalogue = catalogue
        self._connection = catalogue.connection
        self._shard = shard
        self._progress = progress
        self._every_root = frozenset(catalogue.roots())
        self._roots_of_others: set[bytes] = set()
        self._items = 0
        self.left_out = LeftOutTally()
        self.followed: list[str] = []
        self.repeated: list[str] = []
        self.other_shards = 0
        self.new = self.changed = self.failed = 0
        catalogue.retry_failures_of_other(_reader())
        with catalogue_errors(catalogue.path):
            self._connection.executescript(_TABLES)
            with transaction(self._connection):
                for root in roots:
                    self._hide_or_root("walk_roots", root)
                while chunk := list(islice(items, _PAGE)):
                    self._take(chunk)
                self._connection.execute(_FILL_TODO, {"checksum": checksum})
                self.absent = AbsentPhotos(catalogue, roots)
                self.revived = self._record_known()
                self.failed_before = self._count(_FAILED_BEFORE)
                others = self.to_embed + self.revived + self.failed_before
                self.unchanged = self.walked - others

    @property
    def walked(self) -> int:
        """The number of files that were found."""
        return self._count("walked")

    @property
    def skipped(self) -> int:
        """The number of paths that could not be walked."""
        return self._count("skipped")

    @property
    def to_embed(self) -> int:
        """The number of files to embed."""
        return self._count("todo")

    @property
    def unaccounted(self) -> int:
        """The number of walked files that are neither a photo nor a failure, or both."""
        return self._count(_UNACCOUNTED)

    @property
    def unreadable(self) -> int:
        """The number of recorded failures below the roots."""
        return self._count(f"failures AS f WHERE {IS_BELOW_ROOTS.format('f')}")

    def settle(self) -> None:
        """Find files that need no new embedding by their content: touched and moved ones.

        Reads only files with the size of the photo at the same path, or of an absent photo.
        """
        last = b""
        while True:
            page = self._connection.execute(_SAME_SIZE, (last,)).fetchall()
            if not page:
                return
            hashes = [_sha256(path, size_bytes) for path, size_bytes, *_ in page]
            with catalogue_errors(self.catalogue.path), transaction(self._connection):
                for (path, size_bytes, *stamps, known), sha256 in zip(page, hashes, strict=True):
                    if sha256 is not None and self._is_known(
                        path, size_bytes, tuple(stamps), sha256, known
                    ):
                        self._connection.execute("DELETE FROM todo WHERE path = ?", (path,))
            last = page[-1][0]

    def embed(
        self,
        stream: EmbeddingStream,
        vectors: Vectors | CodeShards,
        itq: Itq | None,
        *,
        commit_every: int,
        is_publication_due: Callable[[], bool],
        publish: Callable[[], None],
    ) -> None:
        """Embed the changed photos and commit them in batches.

        If anything called here raises `KeyboardInterrupt`, finished photos are committed.

        Args:
            stream: of the gallery's model.
            vectors: the rows of the gallery.
            itq: makes the codes of a binary gallery.
            commit_every: photos between two commits.
            is_publication_due: asked after every photo; if it is, there is a commit, then `publish`
                is called.
            publish: publishes what is committed.
        """
        total = self.to_embed
        paths = (Path(os.fsdecode(path)) for path in self.paths_to_embed())
        started = time.perf_counter()
        with _Commits(self, vectors, itq) as commits:
            with closing(stream.embed(paths, "photo", commits.is_known)) as items:
                try:
                    for done, item in enumerate(items, start=1):
                        commits.take(item)
                        is_due = is_publication_due()
                        if is_due or commits.size >= commit_every:
                            commits.commit()
                        if is_due:
                            publish()
                        self._progress(done, total, done / (time.perf_counter() - started))
                except KeyboardInterrupt:
                    commits.commit()
                    raise
            commits.commit()
            # The originals of these copies were replaced while they were read.
            if left := [item.path for item in commits.waiting]:
                commits.waiting.clear()
                for item in stream.embed(left, "photo"):
                    commits.take(item)
                commits.commit()

    def paths_to_embed(self) -> Iterator[bytes]:
        """Yield the paths of the files to embed, in order."""
        last = b""
        while True:
            page = self._connection.execute(
                "SELECT path FROM todo WHERE path > ? ORDER BY path LIMIT ?", (last, _PAGE)
            ).fetchall()
            if not page:
                return
            for (last,) in page:
                yield last

    def stamps(self, path: bytes) -> Stamps:
        """Return the stamps of a walked file from before it was read."""
        query = "SELECT mtime_ns, ctime_ns, inode FROM walked WHERE path = ?"
        mtime_ns, ctime_ns, inode = self._connection.execute(query, (path,)).fetchone()
        return mtime_ns, ctime_ns, inode

    def failure(self, path: bytes, reason: str, *, was_read: bool) -> Failure:
        """Return the failure of a walked file.

        If the file could be read, the failure has its stamps, and is kept until they change. Other
        files are tried again in the next update.
        """
        if not was_read:
            return Failure(path, _storable(reason))
        query = "SELECT size_bytes, mtime_ns, ctime_ns, inode FROM walked WHERE path = ?"
        stamps = self._connection.execute(query, (path,)).fetchone()
        return Failure(path, _storable(reason), *stamps)

    def losses(self) -> list[Loss]:
        """Return the roots and folders that look like disks that are not mounted."""
        return self.absent.losses(self._roots_of_others)

    def record_skipped(self) -> None:
        """Replace the failures below the roots by those of walked files and skipped paths."""
        with catalogue_errors(self.catalogue.path), transaction(self._connection):
            self._connection.execute(
                f"DELETE FROM failures AS f WHERE {IS_BELOW_ROOTS.format('f')} "
                "AND NOT EXISTS (SELECT 1 FROM walked AS w WHERE w.path = f.path)"
            )
            self._connection.execute(
                "INSERT OR REPLACE INTO failures (path, reason) SELECT path, reason FROM skipped"
            )

    def check_accounts(self) -> None:
        """Check that every walked file is a photo or a failure, and was counted once.

        Raises:
            InternalError: it is not.
        """
        counts = {
            "unchanged": self.unchanged,
            "moved": self.absent.moved,
            "found again": self.revived,
            "embedded": self.new + self.changed,
            "failed": self.failed + self.failed_before,
        }
        walked, unaccounted = self.walked, self.unaccounted
        if sum(counts.values()) == walked and not unaccounted:
            return
        parts = ", ".join(f"{count:,} {word}" for word, count in counts.items())
        raise InternalError(
            f"internal error: {walked:,} files were found, but {parts}; "
            f"{unaccounted:,} are unaccounted for",
            "every file in one of these numbers; the published gallery is unchanged",
            "please report this message",
        )

    def _take(self, items: Sequence[Found | Skipped | LeftOut | Followed | Repeated]) -> None:
        found: list[tuple[bytes, int, int, int, int]] = []
        for item in items:
            self._items += 1
            if self._items % _WALK_TICK == 0:
                self._progress(self._items, None, 0.0)
            if isinstance(item, Found):
                path = os.fsencode(item.path)
                if self._is_of_other_shard(path):
                    self.other_shards += 1
                else:
                    found.append((path, *item[1:]))
            elif isinstance(item, LeftOut):
                self.left_out.add(item)
            elif isinstance(item, Followed):
                self.followed.append(item.path)
            elif isinstance(item, Repeated):
                self.repeated.append(item.path)
                self._hide_or_root("hidden", item.path)
            else:
                self._connection.execute(
                    "INSERT OR REPLACE INTO skipped VALUES (?, ?)",
                    (os.fsencode(item.path), _storable(item.reason)),
                )
                if item.may_hide_photos:
                    self._hide_or_root("hidden", item.path)
        query = "INSERT OR REPLACE INTO walked VALUES (?, ?, ?, ?, ?)"
        try:
            self._connection.executemany(query, found)
        except OverflowError:  # SQLite's integers have 64 bits
            self._connection.executemany(query, map(_storable_numbers, found))

    def _is_of_other_shard(self, path: bytes) -> bool:
        if self._shard is None:
            return False
        roots = roots_above(path, self._every_root)
        if self._shard.has(relative_path(path, roots[-1])):
            return False
        self._roots_of_others.update(roots)
        return True

    def _record_known(self) -> int:
        """Take photos that only have to be recorded from `todo`; return how many were missing."""
        known = self._connection.execute(_KNOWN)
        revived = sum(self.catalogue.keep(path, tuple(stamps)) for path, *stamps in known)
        self._connection.execute("DELETE FROM todo WHERE known_id NOT NULL")
        return revived

    def _hide_or_root(self, table: str, path: str) -> None:
        for interval in (below(os.fsencode(path)), exactly(os.fsencode(path))):
            self._connection.execute(f"INSERT INTO {table} VALUES (?, ?)", interval)

    def _is_known(
        self, path: bytes, size_bytes: int, stamps: Stamps, sha256: bytes, known: bytes | None
    ) -> bool:
        """Return whether the gallery has a file's content; record its path and stamps."""
        if sha256 != known:
            return self.absent.find_moved(path, size_bytes, stamps, sha256)
        is_back = self.catalogue.keep(path, stamps)
        self.revived += is_back
        self.unchanged += not is_back
        return True

    def _count(self, source: str) -> int:
        query = f"SELECT count(*) FROM {source}"
        return int(self._connection.execute(query).fetchone()[0])


class _Commits:
    """What was embedded or failed, which is committed in batches; copies of files wait for them.

    Each content is embedded once: the first file with one that is not in the catalogue is embedded,
    and later ones wait for it. Only uncommitted and failed files are in memory.

    Attributes:
        waiting: copies of files that are not committed yet.
    """

    def __init__(self, changes: Changes, vectors: Vectors | CodeShards, itq: Itq | None) -> None:
        self._changes = changes
        self._catalogue = changes.catalogue
        self._vectors = vectors
        self._itq = itq
        self._embedded: list[Embedded] = []
        self._failures: list[Failure] = []
        self.waiting: list[Known] = []
        # Contents that are being embedded, and why others failed.
        self._first: set[str] = set()
        self._reasons: dict[str, str] = {}
        self._lock = threading.Lock()
        # A separate connection, for the threads of the decoders.
        self._connection = sqlite3.connect(
            self._catalogue.path, isolation_level=None, check_same_thread=False, timeout=30
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._connection.close()

    @property
    def size(self) -> int:
        """The number of files that wait."""
        return len(self._embedded) + len(self._failures) + len(self.waiting)

    def is_known(self, sha256: str) -> bool:
        """Return whether a content is in the catalogue, is being embedded, or has failed."""
        with self._lock, catalogue_errors(self._catalogue.path):
            if sha256 in self._first or sha256 in self._reasons:
                return True
            content = bytes.fromhex(sha256)
            if self._connection.execute(_IS_KNOWN, (content,)).fetchone()[0]:
                return True
            self._first.add(sha256)
            return False

    def take(self, item: Embedded | Failed | Known) -> None:
        """Add what became of a file."""
        if isinstance(item, Embedded):
            self._embedded.append(item)
        elif isinstance(item, Known):
            self.waiting.append(item)
        else:
            if item.source is not None:
                with self._lock:
                    self._reasons[item.source.sha256] = item.reason
                    self._first.discard(item.source.sha256)
            self._fail(item.path, item.reason, was_read=item.source is not None)

    def commit(self) -> None:
        """Write rows, then the catalogue; copies of files that are not embedded keep waiting."""
        done = self._embedded
        first_row = self._catalogue.committed_rows()
        first_region = first_row + len(done)
        regions = place_regions(done, range(first_row, first_region), first_region)
        rows = [item.row[None] for item in done]
        rows += [item.regions for item in done if item.regions is not None]
        batches = self._write(first_row, np.concatenate(rows)) if rows else []
        photos = [self._photo(item, row) for row, item in enumerate(done, start=first_row)]
        photos += self._copies(photos)
        if not photos and not self._failures:
            return
        new, changed = self._catalogue.commit(
            photos, self._failures, batches, regions, sum_regions(done)
        )
        self._changes.new += new
        self._changes.changed += changed
        self._changes.failed += len(self._failures)
        with self._lock:
            self._first.difference_update(item.source.sha256 for item in done)
        done.clear()
        self._failures.clear()

    def _write(self, first_row: int, embeddings: Embeddings) -> list[Batch]:
        """Write embeddings, or their codes, durably."""
        if isinstance(self._vectors, Vectors):
            return self._vectors.append(first_row, embeddings)
        assert self._itq is not None
        return self._vectors.append(first_row, codes_of(embeddings, self._itq))

    def _photo(self, item: Embedded, row: int) -> Embedding:
        """Return what the catalogue stores of a photo whose embedding is at `row`."""
        path = os.fsencode(item.path)
        mtime_ns, ctime_ns, inode = self._changes.stamps(path)
        return Embedding(
            path=path,
            size_bytes=item.source.size_bytes,
            mtime_ns=mtime_ns,
            sha256=item.source.sha256,
            row=row,
            ctime_ns=ctime_ns,
            inode=inode,
            partial="; ".join(item.notices) or None,
        )

    def _copies(self, photos: Sequence[Embedding]) -> list[Embedding]:
        """Return the copies of photos that are in the catalogue or among `photos`.

        Copies of failed files fail, too.
        """
        here = {photo.sha256: photo for photo in photos}
        found, waiting = [], []
        for item in self.waiting:
            path, sha256 = os.fsencode(item.path), item.source.sha256
            first = here.get(sha256) or self._catalogue.embedding_of(sha256)
            if first is not None:
                mtime_ns, ctime_ns, inode = self._changes.stamps(path)
                found.append(
                    replace(first, path=path, mtime_ns=mtime_ns, ctime_ns=ctime_ns, inode=inode)
                )
            elif sha256 in self._reasons:
                self._fail(item.path, self._reasons[sha256], was_read=True)
            else:
                waiting.append(item)
        self.waiting[:] = waiting
        return found

    def _fail(self, path: Path, reason: str, *, was_read: bool) -> None:
        self._failures.append(self._changes.failure(os.fsencode(path), reason, was_read=was_read))


def _storable_numbers(
    found: tuple[bytes, int, int, int, int],
) -> tuple[bytes, int, int, int, int]:
    """Return a found file as SQLite can store it: with times in the years 1677 to 2262."""
    path, size_bytes, *times, inode = found
    mtime_ns, ctime_ns = (max(-_LARGEST, min(time_ns, _LARGEST)) for time_ns in times)
    return path, size_bytes, mtime_ns, ctime_ns, signed_inode(inode)


def signed_inode(value: int) -> int:
    """Return an inode as a signed 64-bit integer, which SQLite can store."""
    return ((value + _LARGEST + 1) & ((1 << 64) - 1)) - _LARGEST - 1


def _storable(reason: str) -> str:
    """Return the text as valid UTF-8, whatever file names it quotes."""
    return reason.encode("utf-8", "backslashreplace").decode("utf-8")


def _sha256(path: bytes, size_bytes: int) -> bytes | None:
    """Return the SHA-256 of a file; `None` if its size has changed since the walk."""
    try:
        data = read_image_bytes(os.fsdecode(path))
    except BadImage:
        return None  # the embedder reports it
    return hashlib.sha256(data).digest() if len(data) == size_bytes else None


def _reader() -> str:
    """Return a text that changes when other files can be read, as with the extra `photos`."""
    heif = importlib.util.find_spec("pillow_heif") is not None
    raw = importlib.util.find_spec("rawpy") is not None
    return f"{PREPROCESSING}, pillow {PIL.__version__}{', heif' * heif}{', raw' * raw}"
