"""Photos of the gallery that a walk does not find: moved, left out by its rules, or lost."""

from __future__ import annotations

import os
import shlex
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from sbtk_runtime.files import printable_name
from sbtk_runtime.gallery.catalogue import exactly
from sbtk_runtime.gallery.photo_filter import below
from sbtk_runtime.gallery.writer import Catalogue, Stamps

#: Whether the path of a row of a table is below the roots of the walk.
IS_BELOW_ROOTS = (
    "EXISTS (SELECT 1 FROM walk_roots AS r WHERE {0}.path >= r.low AND {0}.path < r.high)"
)
# Photos in places that cannot be read are neither missing nor moved. In the order of paths, this
# takes a fifth of the time that the order of SQLite's choice takes.
_MAKE = (
    """CREATE TEMP TABLE absent (
        id INTEGER PRIMARY KEY, path BLOB, size_bytes INTEGER, sha256 BLOB,
        is_below_roots INTEGER, is_missing INTEGER
    )""",
    "CREATE INDEX temp.absent_by_content ON absent (size_bytes, sha256)",
    f"""INSERT INTO absent
    SELECT p.id, p.path, p.size_bytes, p.sha256, {IS_BELOW_ROOTS.format("p")},
        p.missing_in NOT NULL
    FROM photos AS p INDEXED BY photo_by_path WHERE p.removed_in IS NULL
    AND NOT EXISTS (SELECT 1 FROM walked AS w WHERE w.path = p.path)
    AND NOT EXISTS (SELECT 1 FROM hidden AS h WHERE p.path >= h.low AND p.path < h.high)""",
)


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


class AbsentPhotos:
    """The photos of a catalogue that are not among the files of a walk.

    They are in a temporary table, which is made here from those of `Changes`: `walk_roots`,
    `walked`, and `hidden`, the places that could not be read.

    Attributes:
        moved: the number of photos that were found at another path.
        replaced: the number of photos that were at those paths before.
    """

    def __init__(self, catalogue: Catalogue, roots: Sequence[str]) -> None:
        self._catalogue = catalogue
        self._connection = catalogue.connection
        self._roots = list(map(os.fsencode, roots))
        self.moved = 0
        self.replaced = 0
        self._known_below = {root: self._count_below("photos", root) for root in self._roots}
        for query in _MAKE:
            self._connection.execute(query)

    def find_moved(self, path: bytes, size_bytes: int, stamps: Stamps, sha256: bytes) -> bool:
        """Record that a file is an absent photo, by its content; return whether it is one."""
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

    def lost(self) -> list[int]:
        """Return the ids of photos below the roots that were found before, but not now."""
        query = "SELECT id FROM absent WHERE is_below_roots AND NOT is_missing ORDER BY id"
        return [photo_id for (photo_id,) in self._connection.execute(query)]

    def lost_though_there(self) -> int:
        """Return how many of the `lost` photos exist, but are left out of the walk."""
        query = "SELECT path FROM absent WHERE is_below_roots AND NOT is_missing"
        return sum(os.path.lexists(path) for (path,) in self._connection.execute(query))

    def losses(self, roots_of_others: Collection[bytes]) -> list[Loss]:
        """Return the roots and folders that look like disks that are not mounted.

        These are roots without photos, roots with more than half of their photos missing, and empty
        folders that had photos until now. Files that exist, but are left out of the walk, are not
        lost.

        Args:
            roots_of_others: roots in which photos of other shards were found.
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
            before = self._known_below[root] - sum(_is_in(path, root) for path in left_out_before)
            lost_here = sum(_is_in(path, root) for path in (*lost_before, *lost))
            is_empty = not self._count_below("walked", root) and not os.path.isfile(root)  # noqa: PTH113
            # If photos are only left out, no disk is missing.
            is_bare = is_empty and (lost_here > 0 or not before) and not self._is_hidden(root)
            if 2 * lost_here > before or is_bare:
                losses.append(Loss(root, lost_here, before, is_empty))
        reported = [loss.path for loss in losses]
        emptied: Counter[bytes] = Counter()
        for folder, count in Counter(_parent(path) for path in lost).items():
            if not any(_is_in(folder, root) for root in reported):
                emptied[_nearest_existing(folder)] += count
        losses += [Loss(path, n, n, True) for path, n in emptied.items() if _is_empty(path)]
        return [loss for loss in losses if loss.lost or loss.path not in roots_of_others]

    def _count_below(self, table: str, root: bytes) -> int:
        is_known = "removed_in IS NULL AND" if table == "photos" else ""
        query = f"SELECT count(*) FROM {table} WHERE {is_known} path >= ? AND path < ?"
        return sum(
            int(self._connection.execute(query, interval).fetchone()[0])
            for interval in (below(root), exactly(root))
        )

    def _is_hidden(self, path: bytes) -> bool:
        query = "SELECT EXISTS (SELECT 1 FROM hidden WHERE ?1 >= low AND ?1 < high)"
        return bool(self._connection.execute(query, (path,)).fetchone()[0])


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
