"""What changed between the photos on disk and the catalogue, worked out in SQLite, not in memory.

Everything lives in temporary tables of the writer's connection, which SQLite keeps in a small
cache and spills to a file, so a million photos take no more memory than a thousand.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
from collections.abc import Callable, Iterable, Iterator, Sequence

import PIL

from sbtk_runtime.errors import BadImage
from sbtk_runtime.gallery.catalogue import Failure, below, exactly
from sbtk_runtime.gallery.catalogue_database import catalogue_errors, transaction
from sbtk_runtime.gallery.catalogue_writer import Catalogue
from sbtk_runtime.images import read_image_bytes
from sbtk_runtime.preprocess import PREPROCESSING
from sbtk_runtime.walk import Found, Skipped

_TABLES = """
CREATE TEMP TABLE roots (low BLOB, high BLOB);
CREATE TEMP TABLE hidden (low BLOB, high BLOB);
CREATE TEMP TABLE walked (
    path BLOB PRIMARY KEY, size_bytes INTEGER, mtime_ns INTEGER, ctime_ns INTEGER
) WITHOUT ROWID;
CREATE TEMP TABLE skipped (path BLOB PRIMARY KEY, reason TEXT) WITHOUT ROWID;
CREATE TEMP TABLE todo (
    path BLOB PRIMARY KEY, size_bytes INTEGER, mtime_ns INTEGER, ctime_ns INTEGER
) WITHOUT ROWID;
CREATE TEMP TABLE absent (
    id INTEGER PRIMARY KEY, path BLOB, size_bytes INTEGER, sha256 BLOB, is_vanished INTEGER
);
CREATE INDEX temp.absent_by_content ON absent (size_bytes, sha256);
"""
_IS_BELOW_ROOTS = "EXISTS (SELECT 1 FROM roots AS r WHERE {0}.path >= r.low AND {0}.path < r.high)"
_FILL_TODO = """
INSERT INTO todo SELECT w.* FROM walked AS w
LEFT JOIN photos AS p ON p.path = w.path AND p.gone IS NULL
LEFT JOIN failures AS f ON f.path = w.path
WHERE (:checksum OR p.id IS NULL OR p.size_bytes != w.size_bytes OR p.mtime_ns != w.mtime_ns)
AND NOT (f.path IS NOT NULL AND f.size_bytes IS w.size_bytes
    AND f.mtime_ns IS w.mtime_ns AND f.ctime_ns IS w.ctime_ns)
"""
# Where nothing is known about a photo it is neither vanished nor moved.
_FILL_ABSENT = f"""
INSERT INTO absent SELECT p.id, p.path, p.size_bytes, p.sha256, {_IS_BELOW_ROOTS.format("p")}
FROM photos AS p WHERE p.gone IS NULL
AND NOT EXISTS (SELECT 1 FROM walked AS w WHERE w.path = p.path)
AND NOT EXISTS (SELECT 1 FROM hidden AS h WHERE p.path >= h.low AND p.path < h.high)
"""  # noqa: S608
_NOT_TODO = "NOT EXISTS (SELECT 1 FROM todo AS t WHERE t.path = w.path)"
_IS_LIVE = "EXISTS (SELECT 1 FROM photos AS p WHERE p.path = w.path AND p.gone IS NULL)"
_IS_FAILED = "EXISTS (SELECT 1 FROM failures AS f WHERE f.path = w.path)"
_UNCHANGED = f"walked AS w WHERE {_NOT_TODO} AND {_IS_LIVE}"
_FAILED_BEFORE = f"walked AS w WHERE {_NOT_TODO} AND {_IS_FAILED}"
_UNACCOUNTED = f"walked AS w WHERE {_IS_LIVE} + {_IS_FAILED} != 1"
_SAME_SIZE = """
SELECT t.path, t.size_bytes, t.mtime_ns, p.sha256 FROM todo AS t
LEFT JOIN photos AS p ON p.path = t.path AND p.gone IS NULL AND p.size_bytes = t.size_bytes
WHERE t.path > ? AND (p.id IS NOT NULL
    OR EXISTS (SELECT 1 FROM absent AS a WHERE a.size_bytes = t.size_bytes))
ORDER BY t.path LIMIT 256
"""
_PAGE = 256


class Changes:
    """The difference between what lies below some roots and what the catalogue knows.

    `moved` counts the photos that `settle` found at another path, `replaced` those that lay there.
    `unchanged` counts the walked photos that need nothing, `failed_before` the walked files that
    failed in an earlier update and have not changed since.
    """

    def __init__(
        self,
        catalogue: Catalogue,
        roots: Sequence[str],
        items: Iterable[Found | Skipped],
        *,
        checksum: bool = False,
    ) -> None:
        """Takes in the walk's `items`; with `checksum` the stamps of files are not trusted."""
        self._catalogue = catalogue
        self._connection = catalogue.connection
        self.moved = 0
        self.replaced = 0
        catalogue.retry_failures_of_other(_reader())
        with catalogue_errors(catalogue.path):
            self._connection.executescript(_TABLES)
            with transaction(self._connection):
                for root in roots:
                    self._hide_or_root("roots", root)
                for item in items:
                    self._take(item)
                self._connection.execute(_FILL_TODO, {"checksum": checksum})
                self._connection.execute(_FILL_ABSENT)
            self.failed_before = self._count(_FAILED_BEFORE)
            self.unchanged = self._count(_UNCHANGED)

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
        """The number of files whose embedding is not known."""
        return self._count("todo")

    @property
    def unaccounted(self) -> int:
        """The number of walked files that are not exactly one of a photo and a failure."""
        return self._count(_UNACCOUNTED)

    @property
    def unreadable(self) -> int:
        """The number of recorded failures below the roots."""
        return self._count(f"failures AS f WHERE {_IS_BELOW_ROOTS.format('f')}")

    def settle(self, tick: Callable[[], None] = lambda: None) -> None:
        """Finds, by their bytes, the files that need no new embedding: touched and moved ones.

        Only files are read whose size is that of a photo with this path or of an absent one.
        """
        last = b""
        while True:
            page = self._connection.execute(_SAME_SIZE, (last,)).fetchall()
            if not page:
                return
            hashes = []
            for path, size_bytes, _, _ in page:
                hashes.append(_sha256(path, size_bytes))
                tick()
            with catalogue_errors(self._catalogue.path), transaction(self._connection):
                for (path, size_bytes, mtime_ns, known), sha256 in zip(page, hashes, strict=True):
                    if sha256 is not None and self._is_known(
                        path, size_bytes, mtime_ns, sha256, known
                    ):
                        self._connection.execute("DELETE FROM todo WHERE path = ?", (path,))
            last = page[-1][0]

    def paths_to_embed(self) -> Iterator[bytes]:
        """Yields the files to embed, by path."""
        last = b""
        while True:
            page = self._connection.execute(
                "SELECT path FROM todo WHERE path > ? ORDER BY path LIMIT ?", (last, _PAGE)
            ).fetchall()
            if not page:
                return
            for (last,) in page:
                yield last

    def failure(self, path: bytes, reason: str) -> Failure:
        """Returns the failure of a walked file, with the stamps that tell when to try again."""
        stamps = self._connection.execute(
            "SELECT size_bytes, mtime_ns, ctime_ns FROM walked WHERE path = ?", (path,)
        ).fetchone()
        return Failure(path, reason, *stamps)

    def vanished(self) -> list[int]:
        """Returns the ids of photos below the roots that are no longer there."""
        found = self._connection.execute("SELECT id FROM absent WHERE is_vanished ORDER BY id")
        return [photo_id for (photo_id,) in found]

    def record_skipped(self) -> None:
        """Makes the failures below the roots those of walked files, and of what was skipped."""
        with catalogue_errors(self._catalogue.path), transaction(self._connection):
            self._connection.execute(
                f"DELETE FROM failures AS f WHERE {_IS_BELOW_ROOTS.format('f')} "  # noqa: S608
                "AND NOT EXISTS (SELECT 1 FROM walked AS w WHERE w.path = f.path)"
            )
            self._connection.execute(
                "INSERT OR REPLACE INTO failures (path, reason) SELECT path, reason FROM skipped"
            )

    def _take(self, item: Found | Skipped) -> None:
        path = os.fsencode(item.path)
        if isinstance(item, Found):
            self._connection.execute(
                "INSERT OR REPLACE INTO walked VALUES (?, ?, ?, ?)",
                (path, item.size_bytes, item.mtime_ns, item.ctime_ns),
            )
            return
        self._connection.execute(
            "INSERT OR REPLACE INTO skipped VALUES (?, ?)", (path, item.reason)
        )
        if item.may_hide_photos:
            self._hide_or_root("hidden", item.path)

    def _hide_or_root(self, table: str, path: str) -> None:
        for interval in (below(os.fsencode(path)), exactly(os.fsencode(path))):
            self._connection.execute(f"INSERT INTO {table} VALUES (?, ?)", interval)  # noqa: S608

    def _is_known(
        self, path: bytes, size_bytes: int, mtime_ns: int, sha256: bytes, known: bytes | None
    ) -> bool:
        """Returns whether a file's bytes are in the gallery, after noting where they lie now."""
        if sha256 == known:
            self._catalogue.restamp(path, mtime_ns)
            self.unchanged += 1
            return True
        twins = self._connection.execute(
            "SELECT id, path, is_vanished FROM absent WHERE size_bytes = ? AND sha256 = ? "
            "ORDER BY is_vanished DESC, id",
            (size_bytes, sha256),
        ).fetchall()
        for photo_id, old_path, is_vanished in twins:
            # Outside the roots nobody has looked yet.
            if is_vanished or not os.path.lexists(old_path):
                self.replaced += self._catalogue.move(photo_id, path, mtime_ns)
                self._connection.execute("DELETE FROM absent WHERE id = ?", (photo_id,))
                self.moved += 1
                return True
        return False

    def _count(self, source: str) -> int:
        query = f"SELECT count(*) FROM {source}"  # noqa: S608 -- constants only
        return int(self._connection.execute(query).fetchone()[0])


def _sha256(path: bytes, size_bytes: int) -> bytes | None:
    """Returns the hash of a file that still has the size that was walked; else `None`."""
    try:
        data = read_image_bytes(os.fsdecode(path))
    except BadImage:
        return None  # the embedder will meet the same and tell
    return hashlib.sha256(data).digest() if len(data) == size_bytes else None


def _reader() -> str:
    """Returns what decides whether a file can be read: with the extra `photos` more can."""
    heif = importlib.util.find_spec("pillow_heif") is not None
    raw = importlib.util.find_spec("rawpy") is not None
    return f"{PREPROCESSING}, pillow {PIL.__version__}{', heif' * heif}{', raw' * raw}"
