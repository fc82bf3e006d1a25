"""The undamaged rows of a gallery, and notices about damaged ones."""

from __future__ import annotations

import numpy as np

from sbtk_runtime.gallery.catalogue import CatalogueView
from sbtk_runtime.gallery.row_check import REPAIR, RowCheck
from sbtk_runtime.gallery.rows import Rows, Shards


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
        if not self.unusable:
            return ()
        text = f"{self.notice}: {self.remedy}"
        self.issued.add(text)
        return (text,)

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
