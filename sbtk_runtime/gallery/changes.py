"""Compare the photos on disk with the catalogue, in SQLite instead of in memory.

The data are in temporary tables of the writer's connection, which SQLite keeps in a small cache and
spills to a file. A million photos take no more memory than a thousand.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shlex
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import PIL

from sbtk_runtime.errors import BadImage
from sbtk_runtime.files import printable_name
from sbtk_runtime.gallery.catalogue import Failure, exactly
from sbtk_runtime.gallery.photo_filter import below
from sbtk_runtime.gallery.schema import catalogue_errors, transaction
from sbtk_runtime.gallery.walk import Found, Repeated, Skipped
from sbtk_runtime.gallery.writer import Catalogue, Stamps
from sbtk_runtime.images import read_image_bytes
from sbtk_runtime.preprocess import PREPROCESSING

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
CREATE TEMP TABLE absent (
    id INTEGER PRIMARY KEY, path BLOB, size_bytes INTEGER, sha256 BLOB, is_below_roots INTEGER,
    is_missing INTEGER
);
CREATE INDEX temp.absent_by_content ON absent (size_bytes, sha256);
"""
_IS_BELOW_ROOTS = (
    "EXISTS (SELECT 1 FROM walk_roots AS r WHERE {0}.path >= r.low AND {0}.path < r.high)"
)
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
# Photos in places that cannot be read are neither missing nor moved. In the order of paths, this
# takes a fifth of the time that the order of SQLite's choice takes.
_FILL_ABSENT = f"""
INSERT INTO absent
SELECT p.id, p.path, p.size_bytes, p.sha256, {_IS_BELOW_ROOTS.format("p")}, p.missing_in NOT NULL
FROM photos AS p INDEXED BY photo_by_path WHERE p.removed_in IS NULL
AND NOT EXISTS (SELECT 1 FROM walked AS w WHERE w.path = p.path)
AND NOT EXISTS (SELECT 1 FROM hidden AS h WHERE p.path >= h.low AND p.path < h.high)
"""
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


@dataclass(frozen=True)
class Loss:
    """A root or folder whose photos are no longer found; a disk may not be mounted.

    Attributes:
        path: absolute.
        lost: the number of missing photos.
        before: the number of photos that the gallery has there, found or missing.
        is_empty: whether no photo is found there now.
    """

    path: bytes
    lost: int
    before: int
    is_empty: bool

    def warning(self, folder: Path) -> str:
        """Return a sentence for the user of the gallery in `folder`."""
        what = "no photos were found in" if self.is_empty else "most photos were not found in"
        lost = f" ({self.lost:,} of {self.before:,} are missing)" if self.before else ""
        kept = (
            f": if a disk is not mounted, mount it and index again; otherwise 'sbtk index --prune "
            f"--gallery {shlex.quote(printable_name(folder))}' removes the missing photos"
        )
        return f"{what} {printable_name(self.path)}{lost}{kept if self.before else ''}"


class Changes:
    """The differences between the photos below some roots and the catalogue.

    Attributes:
        moved: the number of photos that `settle` found at another path.
        replaced: the number of photos that were at those paths before.
        revived: the number of missing photos that are back at their paths.
        unchanged: the number of walked photos that need no work.
        failed_before: the number of walked files that failed in an earlier update and have not
            changed since.
    """

    def __init__(
        self,
        catalogue: Catalogue,
        roots: Sequence[str],
        items: Iterator[Found | Skipped | Repeated],
        *,
        checksum: bool = False,
    ) -> None:
        """Read the walk's `items`; with `checksum`, the stamps of files are not trusted."""
        self._catalogue = catalogue
        self._connection = catalogue.connection
        self.moved = 0
        self.replaced = 0
        self._roots = list(roots)
        catalogue.retry_failures_of_other(_reader())
        with catalogue_errors(catalogue.path):
            self._connection.executescript(_TABLES)
            with transaction(self._connection):
                for root in roots:
                    self._hide_or_root("walk_roots", root)
                while chunk := list(islice(items, _PAGE)):
                    self._take(chunk)
                self._known_below = {root: self._count_below("photos", root) for root in roots}
                self._connection.execute(_FILL_TODO, {"checksum": checksum})
                self._connection.execute(_FILL_ABSENT)
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
        return self._count(f"failures AS f WHERE {_IS_BELOW_ROOTS.format('f')}")

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
            with catalogue_errors(self._catalogue.path), transaction(self._connection):
                for (path, size_bytes, *stamps, known), sha256 in zip(page, hashes, strict=True):
                    if sha256 is not None and self._is_known(
                        path, size_bytes, tuple(stamps), sha256, known
                    ):
                        self._connection.execute("DELETE FROM todo WHERE path = ?", (path,))
            last = page[-1][0]

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

    def lost(self) -> list[int]:
        """Return the ids of photos below the roots that were found before, but not now."""
        query = "SELECT id FROM absent WHERE is_below_roots AND NOT is_missing ORDER BY id"
        return [photo_id for (photo_id,) in self._connection.execute(query)]

    def lost_though_there(self) -> int:
        """Return how many of the `lost` photos exist, but are left out of the walk."""
        query = "SELECT path FROM absent WHERE is_below_roots AND NOT is_missing"
        return sum(os.path.lexists(path) for (path,) in self._connection.execute(query))

    def losses(self) -> list[Loss]:
        """Return the roots and folders that look like disks that are not mounted.

        These are roots without photos, roots with more than half of their photos missing, and empty
        folders that had photos until now. Files that exist, but are left out of the walk, are not
        lost.
        """
        lost: list[bytes] = []
        lost_before: list[bytes] = []
        left_out_before: list[bytes] = []
        for path, is_missing in self._connection.execute(
            "SELECT path, is_missing FROM absent WHERE is_below_roots ORDER BY path"
        ):
            if not os.path.lexists(path):
                (lost_before if is_missing else lost).append(path)
            elif is_missing:
                left_out_before.append(path)
        losses = []
        for root in self._roots:
            name = os.fsencode(root)
            before = self._known_below[root] - sum(_is_in(path, name) for path in left_out_before)
            lost_here = sum(_is_in(path, name) for path in (*lost_before, *lost))
            is_empty = not self._count_below("walked", root) and not os.path.isfile(root)  # noqa: PTH113
            # If photos are only left out, no disk is missing.
            is_bare = is_empty and (lost_here > 0 or not before) and not self._is_hidden(name)
            if 2 * lost_here > before or is_bare:
                losses.append(Loss(name, lost_here, before, is_empty))
        reported = [loss.path for loss in losses]
        emptied: Counter[bytes] = Counter()
        for folder, count in Counter(_parent(path) for path in lost).items():
            if not any(_is_in(folder, root) for root in reported):
                emptied[_nearest_existing(folder)] += count
        losses += [Loss(path, n, n, True) for path, n in emptied.items() if _is_empty(path)]
        return losses

    def record_skipped(self) -> None:
        """Replace the failures below the roots by those of walked files and skipped paths."""
        with catalogue_errors(self._catalogue.path), transaction(self._connection):
            self._connection.execute(
                f"DELETE FROM failures AS f WHERE {_IS_BELOW_ROOTS.format('f')} "
                "AND NOT EXISTS (SELECT 1 FROM walked AS w WHERE w.path = f.path)"
            )
            self._connection.execute(
                "INSERT OR REPLACE INTO failures (path, reason) SELECT path, reason FROM skipped"
            )

    def _take(self, items: Sequence[Found | Skipped | Repeated]) -> None:
        found = [(os.fsencode(item.path), *item[1:]) for item in items if isinstance(item, Found)]
        query = "INSERT OR REPLACE INTO walked VALUES (?, ?, ?, ?, ?)"
        try:
            self._connection.executemany(query, found)
        except OverflowError:  # SQLite's integers have 64 bits
            self._connection.executemany(query, map(_storable_numbers, found))
        for item in items:
            if isinstance(item, Repeated):
                self._hide_or_root("hidden", item.path)
            elif isinstance(item, Skipped):
                self._connection.execute(
                    "INSERT OR REPLACE INTO skipped VALUES (?, ?)",
                    (os.fsencode(item.path), _storable(item.reason)),
                )
                if item.may_hide_photos:
                    self._hide_or_root("hidden", item.path)

    def _record_known(self) -> int:
        """Take photos that only have to be recorded from `todo`; return how many were missing."""
        known = self._connection.execute(_KNOWN)
        revived = sum(self._catalogue.keep(path, tuple(stamps)) for path, *stamps in known)
        self._connection.execute("DELETE FROM todo WHERE known_id NOT NULL")
        return revived

    def _hide_or_root(self, table: str, path: str) -> None:
        for interval in (below(os.fsencode(path)), exactly(os.fsencode(path))):
            self._connection.execute(f"INSERT INTO {table} VALUES (?, ?)", interval)

    def _is_known(
        self, path: bytes, size_bytes: int, stamps: Stamps, sha256: bytes, known: bytes | None
    ) -> bool:
        """Return whether the gallery has a file's content; record its path and stamps."""
        if sha256 == known:
            is_back = self._catalogue.keep(path, stamps)
            self.revived += is_back
            self.unchanged += not is_back
            return True
        twins = self._connection.execute(
            "SELECT id, path, is_missing OR is_below_roots FROM absent "
            "WHERE size_bytes = ? AND sha256 = ? ORDER BY is_below_roots DESC, id",
            (size_bytes, sha256),
        ).fetchall()
        for photo_id, old_path, is_lost in twins:
            # Outside the roots, the old path has not been checked.
            if is_lost or not os.path.lexists(old_path):
                self.replaced += self._catalogue.move(photo_id, path, stamps)
                self._connection.execute("DELETE FROM absent WHERE id = ?", (photo_id,))
                self.moved += 1
                return True
        return False

    def _count_below(self, table: str, root: str) -> int:
        is_known = "removed_in IS NULL AND" if table == "photos" else ""
        query = f"SELECT count(*) FROM {table} WHERE {is_known} path >= ? AND path < ?"
        path = os.fsencode(root)
        return sum(
            int(self._connection.execute(query, interval).fetchone()[0])
            for interval in (below(path), exactly(path))
        )

    def _is_hidden(self, path: bytes) -> bool:
        query = "SELECT EXISTS (SELECT 1 FROM hidden WHERE ?1 >= low AND ?1 < high)"
        return bool(self._connection.execute(query, (path,)).fetchone()[0])

    def _count(self, source: str) -> int:
        query = f"SELECT count(*) FROM {source}"
        return int(self._connection.execute(query).fetchone()[0])


def _is_in(path: bytes, folder: bytes) -> bool:
    low, high = below(folder)
    return path == folder or low <= path < high


def _parent(path: bytes) -> bytes:
    return path.rpartition(b"/")[0] or b"/"


def _nearest_existing(folder: bytes) -> bytes:
    while not os.path.lexists(folder) and folder != b"/":
        folder = _parent(folder)
    return folder


def _is_empty(folder: bytes) -> bool:
    try:
        with os.scandir(folder) as entries:
            return next(entries, None) is None
    except OSError:
        return False


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
