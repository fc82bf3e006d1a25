"""Find photos by their regions: by the things in them rather than by whole frames.

The score of a region is its product with `query - COMMONNESS * mean`, where `mean` is the mean
region of the gallery, shortened if all photos of the gallery are alike. Without this correction,
plain regions such as sky, which resemble each other and, a little, most sketches, would match many
sketches. A photo's score is the higher one of its whole frame and its best region.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sbtk_runtime.errors import BadRegion
from sbtk_runtime.gallery.catalogue import CatalogueView
from sbtk_runtime.gallery.queries import Box
from sbtk_runtime.gallery.region_rows import RegionSpans
from sbtk_runtime.gallery.row_check import RowCheck
from sbtk_runtime.gallery.rows import Embeddings, Rows, Vectors, make_row_mask, unit_row
from sbtk_runtime.gallery.search import OnLost, Scores
from sbtk_runtime.gallery.sign_codes import SignCodes
from sbtk_runtime.regions import Boxes
from sbtk_runtime.rerank import NEIGHBOURS, diffuse, nearest_rows

#: How many times the mean region is subtracted from a query. Chosen on scenes and photos of classes
#: held out from training: less is better for small things, more for whole photos.
COMMONNESS = 3.0
#: Maximum length of the subtracted vector: its length for the mean region of photos of all kinds.
MOST_COMMON = 1.0

#: Minimum number of rows among the candidates by sign codes, and their number per hit. A photo may
#: have several.
LEAST_CANDIDATES, CANDIDATES_PER_HIT = 800, 16
#: Of these, only some are scored exactly: for each photo the first by the codes' estimates, and
#: among the photos those whose first region comes early, a minimum number and a number per hit.
_SCORED_OF_A_PHOTO, _LEAST_SCORED, _SCORED_PER_HIT = 3, 200, 2

#: Number of photos that diffusion reorders; whole photos are found better than with 400.
RERANKED = 600
#: The share of whole frames in how alike two photos are. Without it, things of a third of the side
#: are found a little better, and whole photos less well than without regions.
_WHOLE_SHARE = np.float32(0.4)


@dataclass(frozen=True)
class Found:
    """Photos, best first.

    Attributes:
        rows: `(N,) int64`, the rows of their whole frames.
        scores: `(N,) float32`, at most 1.
        regions: `(N,) int64`, the rows of their best regions; -1 where the whole frame is better.
    """

    rows: Rows
    scores: Scores
    regions: Rows


class RegionSearch:
    """The regions of one generation of a gallery; any number of threads may search them.

    Args:
        view: the generation's photos.
        vectors: the embeddings.
        check: of their checksums.
        on_lost: called with the rows of all photos that turned out to have damaged regions.
        codes: returns the gallery's sign codes, or `None` if it has no usable ones.
        exact_below: score all regions if there are fewer.
    """

    def __init__(
        self,
        view: CatalogueView,
        vectors: Vectors,
        check: RowCheck,
        on_lost: OnLost,
        codes: Callable[[], SignCodes | None],
        *,
        exact_below: int,
    ) -> None:
        self._view = view
        self._vectors = vectors
        self._check = check
        self._on_lost = on_lost
        self._codes = codes
        self._exact_below = exact_below
        self._spans = view.region_spans()
        self._common = common_part(view.region_mean(vectors.dim))
        self._mask = make_row_mask(self._spans.rows())
        self._bad = np.empty(0, dtype=np.int64)
        self._lock = threading.Lock()

    def __len__(self) -> int:
        """The number of regions."""
        return int(self._spans.counts.sum())

    def improve(
        self,
        rows: Rows,
        scores: Scores,
        embedding: NDArray[np.generic],
        k: int,
        among: Rows | None,
        search: str,
    ) -> Found:
        """Return the `k` best photos by whole frame or region.

        Args:
            rows: `(n,) int64`, at least `k` photos with the whole frames nearest to `embedding`,
                best first; fewer if there are fewer.
            scores: `(n,) float32`, their cosines.
            embedding: `(D,)`, of any length but zero.
            k: number of photos.
            among: ascending rows of the photos to search; `None` for all.
            search: `exact`, or anything else to use sign codes in large galleries.
        """
        regions, theirs = self._nearest(unit_row(embedding, self._vectors.dim), k, among, search)
        owners = self._spans.photo_rows[self._spans.owners(regions)]
        # A photo that is missing from one of the lists has a lower score there.
        every = np.concatenate([rows, owners])
        whole = np.full(len(rows), -1, dtype=np.int64)
        best = np.concatenate([scores, theirs])
        order = np.lexsort((every, -best))
        first = np.sort(np.unique(every[order], return_index=True)[1])[:k]
        chosen = order[first]
        shown = np.minimum(best[chosen], np.float32(1.0))
        return Found(every[chosen], shown, np.concatenate([whole, regions])[chosen])

    def diffuse(self, found: Found) -> Found:
        """Return the first photos in another order, in which similar photos pull each other up.

        They are compared by the regions, or whole frames, that they were found by, since photos of
        the same thing need not resemble each other as a whole, and also by their whole frames.
        """
        rows = found.rows[:RERANKED]
        parts = np.where(found.regions < 0, found.rows, found.regions)[:RERANKED]
        # The cosine of these rows is the weighted mean of both cosines.
        both = np.concatenate(
            [
                self._vectors.embeddings(parts) * np.sqrt(1 - _WHOLE_SHARE),
                self._vectors.embeddings(rows) * np.sqrt(_WHOLE_SHARE),
            ],
            axis=1,
        )
        near = nearest_rows(both, both, NEIGHBOURS, skip_self=True)
        keys = diffuse(found.scores[:RERANKED], *near)
        best = np.argsort(-keys, kind="stable")
        order = np.concatenate([best, np.arange(len(best), len(found.rows))])
        return Found(found.rows[order], found.scores[order], found.regions[order])

    def box(self, region: int) -> Box | None:
        """Return the box of the region at that row; `None` if there is none."""
        place = int(self._spans.owners(np.array([region]))[0])
        if region < 0 or place < 0:
            return None
        boxes = self._view.region_boxes(int(self._spans.photo_rows[place]))
        x, y, width, height = boxes[region - int(self._spans.first_rows[place])].tolist()
        return x, y, width, height

    def row_of(self, photo_row: int, box: Box) -> int:
        """Return the row of the region of a photo that covers `box` best.

        Raises:
            BadRegion: the photo has no regions.
        """
        boxes = self._view.region_boxes(photo_row)
        place = np.flatnonzero(self._spans.photo_rows == photo_row)
        if not len(boxes) or not len(place):
            raise BadRegion(
                "a region of a photo that is kept as a whole frame only",
                "a photo of 224 x 224 pixels or more, in a gallery with regions",
                "sbtk index PHOTOS --regions",
            )
        return int(self._spans.first_rows[place[0]]) + best_place(boxes, box)

    def _nearest(
        self, query: Embeddings, k: int, among: Rows | None, search: str
    ) -> tuple[Rows, Scores]:
        """Return the rows of the best regions of the `k` best photos by regions, and scores."""
        spans = self._spans if among is None else self._spans.among(among)
        if not k or not len(spans.counts):
            return np.empty(0, dtype=np.int64), np.empty(0, dtype=np.float32)
        turned = query - self._common
        is_large = int(spans.counts.sum()) >= self._exact_below
        codes = self._codes() if is_large and search != "exact" else None
        if codes is not None:
            mask = self._mask if among is None else make_row_mask(spans.rows())
            rows, scores = self._by_codes(codes, turned, k, spans, mask)
            if len(rows) == min(k, len(spans.counts)):
                return rows, scores
        while True:
            rows, scores = self._exactly(turned, k, spans)
            is_intact = self._check.is_hit_intact(rows)
            if is_intact.all():
                return rows, scores
            self._leave_out(rows[~is_intact])

    def _leave_out(self, rows: Rows) -> None:
        """Record that the regions at `rows (N,) int64` are damaged or missing."""
        with self._lock:
            bad = np.union1d(self._bad, rows)
            if len(bad) > len(self._bad):
                self._bad = bad
                self._on_lost(np.unique(self._spans.photo_rows[self._spans.owners(bad)]))

    def _by_codes(
        self,
        codes: SignCodes,
        query: Embeddings,
        k: int,
        spans: RegionSpans,
        mask: NDArray[np.bool_],
    ) -> tuple[Rows, Scores]:
        """Return what `_nearest` returns, but among candidates, which may be of fewer photos."""
        count = max(LEAST_CANDIDATES, CANDIDATES_PER_HIT * k)
        rows = codes.candidates(query, count, mask)
        kept = first_of_each(
            spans.owners(rows), _SCORED_OF_A_PHOTO, max(_LEAST_SCORED, _SCORED_PER_HIT * k)
        )
        rows = np.sort(rows[kept])
        content, is_intact = self._check.read_checked(rows)
        scores = self._vectors.decode(content)[0] @ query
        self._leave_out(rows[~is_intact])
        rows, scores = rows[is_intact], scores[is_intact]
        order = np.lexsort((rows, -scores))
        owners = spans.owners(rows[order])
        first = np.sort(np.unique(owners, return_index=True)[1])[:k]
        return rows[order[first]], scores[order[first]]

    def _exactly(self, query: Embeddings, k: int, spans: RegionSpans) -> tuple[Rows, Scores]:
        rows = spans.rows()
        scores = np.full(len(rows), -np.inf, dtype=np.float32)
        start = 0
        for numbers, embeddings, is_whole in self._vectors.chunks(rows):
            part = slice(start, start + len(numbers))
            scores[part][is_whole] = embeddings[is_whole] @ query
            self._leave_out(numbers[~is_whole])
            start = part.stop
        scores[np.isin(rows, self._bad)] = -np.inf
        starts = np.cumsum(spans.counts) - spans.counts
        best = np.maximum.reduceat(scores, starts)
        order = np.lexsort((spans.photo_rows, -best))[:k]
        order = order[np.isfinite(best[order])]
        within = [
            int(np.argmax(scores[low : low + count]))
            for low, count in zip(starts[order].tolist(), spans.counts[order].tolist(), strict=True)
        ]
        return spans.first_rows[order] + np.array(within, dtype=np.int64), best[order]


def first_of_each(owners: Rows, count: int, most: int) -> NDArray[np.bool_]:
    """Return which of `owners (N,) int64` to keep, `(N,) bool`.

    These are the first `count` places of each of the first `most` different owners.
    """
    _, first, which = np.unique(owners, return_index=True, return_inverse=True)
    order = np.argsort(which, kind="stable")
    sizes = np.bincount(which)
    turn = np.empty(len(owners), dtype=np.int64)
    turn[order] = np.arange(len(owners)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    arrival = np.empty(len(first), dtype=np.int64)
    arrival[np.argsort(first)] = np.arange(len(first))
    return np.asarray((turn < count) & (arrival[which] < most))


def common_part(mean: Embeddings) -> Embeddings:
    """Return the vector `(D,) float32` to subtract from queries, given the mean region."""
    length = COMMONNESS * float(np.linalg.norm(mean))
    factor = COMMONNESS * min(1.0, MOST_COMMON / max(length, 1e-12))
    return np.asarray(mean * np.float32(factor))


def best_place(boxes: Boxes, box: Box) -> int:
    """Return the place of the one of `boxes (R, 4) float32` that covers `box` best."""
    return int(np.argmax(_overlaps(boxes.astype(np.float64), np.array(box, dtype=np.float64))))


def require_within(region: Box) -> None:
    """Make sure that a region is within a photo.

    Raises:
        BadRegion: it is not.
    """
    x, y, width, height = region
    # NaN fails, too.
    is_within = x >= 0 and y >= 0 and x + width <= 1 + 1e-3 and y + height <= 1 + 1e-3
    if not (is_within and width > 0 and height > 0):
        raise BadRegion(
            f"the region {', '.join(f'{part:g}' for part in region)}",
            "x, y, width and height as shares of the photo, 0 to 1",
        )


def _overlaps(boxes: NDArray[np.float64], box: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the intersection over union of each of `boxes (R, 4)` with `box (4,)`."""
    low = np.maximum(boxes[:, :2], box[:2])
    high = np.minimum(boxes[:, :2] + boxes[:, 2:], box[:2] + box[2:])
    shared = np.prod(np.maximum(high - low, 0.0), axis=1)
    areas = np.prod(boxes[:, 2:], axis=1) + np.prod(box[2:])
    return np.asarray(shared / np.maximum(areas - shared, 1e-12))
