"""Which rows of a generation are undamaged, by the catalogue's checksums."""

from __future__ import annotations

import threading
import zlib

import numpy as np
from numpy.typing import NDArray

from sbtk_runtime.gallery.catalogue import CatalogueView
from sbtk_runtime.gallery.rows import SHARD_ROWS, RowBytes, Rows, Shards

_UNKNOWN, _INTACT, _DAMAGED = 0, 1, 2

#: The command that repairs damaged embeddings.
REPAIR = "run 'sbtk index --verify --repair', then 'sbtk index' on your photos"


class RowCheck:
    """Checks rows of one generation, and caches the results; any number of threads may use it.

    A batch is hashed when one of its rows is first read, which takes about as long as reading it.
    If its hash differs, its rows are checked one by one, or all count as damaged if the catalogue
    has no checksums of rows.

    Args:
        view: the generation's photos.
        shards: their embeddings or codes.
    """

    def __init__(self, view: CatalogueView, shards: Shards) -> None:
        self._view = view
        self._shards = shards
        self._batches = list(view.batches())
        self._first = np.array([batch.first_row for batch in self._batches], dtype=np.int64)
        # Clipped, so that a damaged number does not overflow.
        counts = [min(max(batch.count, 0), SHARD_ROWS) for batch in self._batches]
        self._end = self._first + np.array(counts, dtype=np.int64)
        self._state = np.zeros(len(self._batches), dtype=np.int8)
        self._intact_rows: dict[int, NDArray[np.bool_]] = {}
        self._lock = threading.Lock()

    def missing(self) -> list[tuple[int, int]]:
        """Return the intervals of committed rows (end excluded) that the shards lack."""
        held: dict[int, int] = {}
        found = []
        for first, end in zip(self._first.tolist(), self._end.tolist(), strict=True):
            index = first // SHARD_ROWS
            if index not in held:
                held[index] = index * SHARD_ROWS + self._shards.held_rows(index)
            if end > held[index]:
                found.append((max(first, held[index]), end))
        return found

    def is_intact(self, rows: Rows) -> NDArray[np.bool_]:
        """Return which of the ascending `rows (N,) int64` are intact, `(N,) bool`."""
        which = np.searchsorted(self._first, rows, side="right") - 1
        is_covered = which >= 0
        if len(self._end):
            is_covered &= rows < self._end[which]
        is_intact = np.zeros(len(rows), dtype=np.bool_)
        with self._lock:
            for batch in np.unique(which[is_covered]).tolist():
                self._check_batch(batch)
            is_intact[is_covered] = self._state[which[is_covered]] == _INTACT
            for batch, intact_rows in self._intact_rows.items():
                low, high = np.searchsorted(rows, (self._first[batch], self._end[batch]))
                is_intact[low:high] = intact_rows[rows[low:high] - self._first[batch]]
        return is_intact

    def is_hit_intact(self, rows: Rows) -> NDArray[np.bool_]:
        """Read `rows (N,) int64` again, and return which are intact, `(N,) bool`."""
        order = np.argsort(rows)
        is_intact = np.zeros(len(rows), dtype=np.bool_)
        is_intact[order] = self.read_checked(rows[order])[1]
        return is_intact

    def read_checked(self, rows: Rows) -> tuple[RowBytes, NDArray[np.bool_]]:
        """Return ascending rows `(N, row_bytes) uint8`, and which of them are intact, `(N,) bool`.

        Batches with damaged rows are checked again by the next `is_intact`.
        """
        expected = self._view.checksums(rows)
        content, is_held = self._shards.read_bytes(rows)
        found = map(zlib.crc32, content)
        same = [
            expected.get(row) == checksum
            for row, checksum in zip(rows.tolist(), found, strict=True)
        ]
        is_intact = is_held & np.array(same, dtype=np.bool_)
        if len(expected) < len(rows):  # by an older sbtk
            unknown = np.array([row not in expected for row in rows.tolist()], dtype=np.bool_)
            is_intact[unknown] = self.is_intact(rows[unknown])
        self._forget(rows[~is_intact])
        return content, is_intact

    def _check_batch(self, index: int) -> None:
        if self._state[index] != _UNKNOWN:
            return
        batch = self._batches[index]
        if self._shards.is_intact(batch):
            self._state[index] = _INTACT
            return
        self._state[index] = _DAMAGED
        rows = np.arange(self._first[index], self._end[index], dtype=np.int64)
        expected = self._view.checksums(rows)
        found = self._shards.checksums(rows)
        self._intact_rows[index] = np.array(
            [
                checksum is not None and checksum == expected.get(row)
                for row, checksum in zip(rows.tolist(), found, strict=True)
            ],
            dtype=np.bool_,
        )

    def _forget(self, rows: Rows) -> None:
        which = np.searchsorted(self._first, rows, side="right") - 1
        with self._lock:
            for batch in np.unique(which[which >= 0]).tolist():
                if self._state[batch] == _INTACT:
                    self._state[batch] = _UNKNOWN


class UsableRows:
    """The undamaged rows of all photos, looked up and checked once.

    Searches refer to this object instead of the gallery, because a reference cycle would keep the
    graph of a closed gallery in memory until the next garbage collection.
    """

    def __init__(
        self,
        view: CatalogueView,
        check: RowCheck,
        count: int,
        shards: Shards,
        faults: list[str],
    ) -> None:
        self._view = view
        self._check = check
        self._count = count
        self._shards = shards
        self._faults = faults
        self._rows: Rows | None = None
        self._bad = np.empty(0, dtype=np.int64)
        self._bad_photos = 0
        self._photos_without_regions = 0
        self._missing = sum(view.count_between(low, high) for low, high in check.missing())
        self.issued: set[str] = set()

    @property
    def unusable(self) -> int:
        """The number of photos whose rows are damaged or missing, as far as known."""
        return max(self._missing, self._bad_photos)

    @property
    def remedy(self) -> str:
        """The command that makes them searchable again."""
        return self._shards.remedy or REPAIR

    @property
    def notice(self) -> str:
        """A sentence about how many photos cannot be found, and why."""
        reasons = sorted(set(self._shards.problems.values()))
        return (
            f"the embeddings of {self.unusable:,} of {self._count:,} photos "
            f"{'cannot be used' if self._shards.remedy else 'are damaged or missing'}"
            f"{''.join(f' ({reason})' for reason in reasons[:1])}"
        )

    def notices(self) -> tuple[str, ...]:
        """Return the notices for every answer."""
        texts = [self.notice] if self.unusable else []
        if self._photos_without_regions:
            texts.append(
                f"regions of {self._photos_without_regions:,} of {self._count:,} photos are "
                "damaged or missing, so these may rank too low"
            )
        notices = tuple(f"{text}: {self.remedy}" for text in texts)
        self.issued.update(notices)
        return notices

    def among(self, rows: Rows) -> Rows:
        """Return the undamaged ones of ascending `rows (N,) int64`."""
        is_intact = self._check.is_intact(rows)
        if len(self._bad):
            is_intact &= ~np.isin(rows, self._bad)
        if is_intact.all():
            return rows
        self.leave_out(rows[~is_intact])
        return rows[is_intact]

    def leave_out(self, rows: Rows) -> None:
        """Record that `rows (N,) int64` are damaged."""
        self._rows = None
        self._bad = np.union1d(self._bad, rows)
        self._bad_photos = self._view.count_at(self._bad)

    def leave_out_regions(self, owners: Rows) -> None:
        """Record all photos known to have damaged regions, by their ascending rows `(N,) int64`."""
        self._photos_without_regions = self._view.count_at(owners)

    def __call__(self) -> Rows:
        """Return the undamaged rows of all photos, ascending `(N,) int64`."""
        rows = self._rows
        if rows is None:
            rows = self._view.rows()
            count = self._view.count()
            if count != self._count:
                text = (
                    f"the catalogue has {count:,} photos and the manifest {self._count:,}: "
                    "run 'sbtk index --verify'"
                )
                if text not in self._faults:
                    self._faults.append(text)
            self._rows = rows = self.among(rows)
        return rows
