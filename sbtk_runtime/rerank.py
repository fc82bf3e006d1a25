"""Re-ranking by the similarity of hits to each other, and by feedback on them.

Unlike sketches, photos show colour and texture, so photos of one thing are closer to each other
than to a sketch of it. Expansion and diffusion use this; they change the order of hits, but not
their scores.
"""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from sbtk_runtime.errors import BadConfig

Rerank = Literal["none", "expand", "diffusion"]
RERANKS: tuple[Rerank, ...] = get_args(Rerank)
#: `auto` is what suits a gallery and a query, see `queries.Queries.choose_rerank`.
RerankChoice = Literal["auto", "none", "expand", "diffusion"]
#: Numbers of photos in a gallery for which `auto` diffuses the hits of a sketch. Galleries of 1,000
#: and more photos were measured; reading the neighbours of millions would delay a first query.
AUTO_FROM, AUTO_BELOW = 500, 200_000

Scores = NDArray[np.float32]
Embeddings = NDArray[np.float32]

#: Number of hits that are added to the query; their weights are cosines to this power.
EXPAND_HITS = 5
_POWER = 3
#: Numbers of stored neighbours of each photo, of best hits that scores spread from, and of hits
#: that are reordered; chosen on galleries with 1 to 25 photos of each class.
NEIGHBOURS = 10
SEEDS = 10
CANDIDATES = 1000
RERANK_WORDS: dict[Rerank, str] = {
    "none": "",
    "expand": f"query expanded by its first {EXPAND_HITS} hits",
    "diffusion": f"diffusion over the {NEIGHBOURS} nearest neighbours of each photo",
}
#: Weights of the means beside that of the query, which is 1; benchmarks/feedback.py compares
#: others on validation classes.
LIKED_WEIGHT = 4.0
DISLIKED_WEIGHT = 1.0
_ALPHA = 0.9
_STEPS = 20
#: Weight of the cosine, which orders hits that no score has spread to.
_COSINE_SHARE = 1e-3


def require_rerank(rerank: str) -> None:
    """Check the name of a re-ranking.

    Raises:
        BadConfig: there is no such re-ranking; the message lists all.
    """
    if rerank not in RERANKS:
        raise BadConfig(f"unknown re-ranking {rerank!r}", ", ".join(RERANKS))


def expand_query(query: Scores, rows: Scores, scores: Scores) -> Scores:
    """Add the best hits to a query, and return the unit row `(D,) float32`.

    This is alpha query expansion (Radenovic et al. 2019): each of the first `EXPAND_HITS` hits has
    the cube of its cosine as its weight.

    Args:
        query: `(D,) float32`, a unit row.
        rows: `(n, D) float32`, unit rows of the hits, best first.
        scores: `(n,) float32`, their cosines.
    """
    weights = np.clip(scores[:EXPAND_HITS], 0, None) ** _POWER
    together = query + weights @ rows[:EXPAND_HITS]
    return np.asarray(together / np.linalg.norm(together), dtype=np.float32)


def diffuse(
    scores: Scores, neighbours: NDArray[np.int64], similarities: Scores, seeds: int = SEEDS
) -> Scores:
    """Return the sort keys of the hits, `(n,) float32`; larger is better.

    Scores of the first hits spread over the graph of nearest neighbours: twenty steps towards the
    solution of `f = alpha S f + (1 - alpha) y`, where `y` holds the cubes of the first cosines and
    `S = D^(-1/2) W D^(-1/2)` with `W` the cubes of the neighbours' cosines, whichever of the two
    has the other as a neighbour (Zhou et al. 2004; Donoser and Bischof 2013; truncated to the best
    hits as by Iscen et al. 2018).

    Args:
        scores: `(n,) float32`, cosines of the hits, best first.
        neighbours: `(n, k) int64`, places of each hit's neighbours among the hits; -1 where a
            neighbour is not among them.
        similarities: `(n, k) float32`, their cosines.
        seeds: number of best hits that scores spread from.
    """
    count = len(scores)
    if not count:
        return np.zeros(0, dtype=np.float32)
    left, right, weights = _edges(neighbours, similarities)
    degrees = np.bincount(left, weights, count) + np.bincount(right, weights, count)
    root = 1 / np.sqrt(np.maximum(degrees, 1e-12))
    weights = weights * root[left] * root[right]
    start = np.zeros(count)
    start[:seeds] = np.clip(scores[:seeds], 0, None).astype(np.float64) ** _POWER
    spread = start
    for _ in range(_STEPS):
        moved = np.bincount(left, weights * spread[right], count)
        moved += np.bincount(right, weights * spread[left], count)
        spread = _ALPHA * moved + (1 - _ALPHA) * start
    largest = float(spread.max())
    share = spread / largest if largest > 0 else spread
    return np.asarray(share + _COSINE_SHARE * scores, dtype=np.float32)


class Reranker:
    """Re-ranks queries against a gallery in memory, as a gallery on disk does.

    Args:
        gallery: `(N, D) float32` unit rows.
        rerank: `none` scores by the cosine.
    """

    def __init__(self, gallery: Scores, rerank: Rerank) -> None:
        require_rerank(rerank)
        self._gallery = gallery
        self._rerank = rerank
        if rerank == "diffusion":
            self._near, self._near_scores = nearest_rows(
                gallery, gallery, NEIGHBOURS, skip_self=True
            )

    def scores(self, queries: Scores) -> Scores:
        """Return the sort keys of photos, `(Q, N) float32`, for unit rows `(Q, D) float32`."""
        cosines = queries @ self._gallery.T
        if self._rerank == "none":
            return cosines
        if self._rerank == "expand":
            best = np.argsort(-cosines, axis=1, kind="stable")[:, :EXPAND_HITS]
            expanded = [
                expand_query(query, self._gallery[hits], row[hits])
                for query, hits, row in zip(queries, best, cosines, strict=True)
            ]
            scores: Scores = np.stack(expanded) @ self._gallery.T
            return scores
        place = np.full(len(self._gallery), -1, dtype=np.int64)
        ordered = cosines - 4  # after all candidates, ordered by cosine
        for row, cosine in enumerate(cosines):
            hits = np.argsort(-cosine, kind="stable")[:CANDIDATES]
            place[hits] = np.arange(len(hits))
            near = place[self._near[hits]]
            ordered[row, hits] = diffuse(cosine[hits], near, self._near_scores[hits])
            place[hits] = -1
        return ordered


def nearest_rows(
    rows: Scores, gallery: Scores, count: int, *, skip_self: bool = False, block: int = 1024
) -> tuple[NDArray[np.int64], Scores]:
    """Return places `(Q, k)` in the gallery of the nearest rows, best first, and their cosines.

    Args:
        rows: `(Q, D) float32` unit rows.
        gallery: `(N, D) float32` unit rows.
        count: k, or less if the gallery is smaller.
        skip_self: leave out each row's own place; `rows` must be the gallery.
        block: number of rows that are compared at a time.
    """
    kept = min(count, len(gallery) - int(skip_self))
    places = np.zeros((len(rows), max(kept, 0)), dtype=np.int64)
    scores = np.zeros(places.shape, dtype=np.float32)
    for start in range(0, len(rows) if kept > 0 else 0, block):
        part = rows[start : start + block] @ gallery.T
        if skip_self:
            part[np.arange(len(part)), np.arange(start, start + len(part))] = -np.inf
        best = np.argpartition(-part, kept - 1, axis=1)[:, :kept]
        order = np.argsort(-np.take_along_axis(part, best, 1), axis=1, kind="stable")
        best = np.take_along_axis(best, order, 1)
        places[start : start + block] = best
        scores[start : start + block] = np.take_along_axis(part, best, 1)
    return places, scores


def _edges(
    neighbours: NDArray[np.int64], similarities: Scores
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]:
    """Return each pair of neighbours once: places `(e,)`, places `(e,)` and weights `(e,)`."""
    count, width = neighbours.shape
    start = np.repeat(np.arange(count), width)
    end, weight = neighbours.ravel(), similarities.ravel().astype(np.float64)
    is_edge = (end >= 0) & (end != start) & (weight > 0)
    start, end, weight = start[is_edge], end[is_edge], weight[is_edge] ** _POWER
    low, high = np.minimum(start, end), np.maximum(start, end)
    # Mutual neighbours occur twice, with weights that are equal up to rounding.
    keys, first = np.unique(low * count + high, return_index=True)
    return keys // count, keys % count, weight[first]


def refine(
    query: Embeddings | None,
    liked: Embeddings,
    disliked: Embeddings,
    *,
    liked_weight: float = LIKED_WEIGHT,
    disliked_weight: float = DISLIKED_WEIGHT,
) -> Embeddings:
    """Return a query of length 1 that takes feedback into account (Rocchio, 1971).

    It is the query, plus the mean of what is liked, less the mean of what is not, each weighted.
    What is not liked counts only beside something that is: alone, it makes results worse, because
    photos that are close to a query are close to the right ones, too.

    Args:
        query: of the sketch or photo, `(D,) float32` of length 1; `None` to start from what is
            liked.
        liked: `(N, D) float32` of length 1.
        disliked: `(M, D) float32` of length 1.
        liked_weight: of their mean.
        disliked_weight: of their mean.

    Raises:
        BadConfig: there is neither a query nor anything that is liked.
    """
    if query is None and not len(liked):
        raise BadConfig("nothing to start from", "a query, or a photo that is liked")
    found = np.zeros(liked.shape[1], dtype=np.float32) if query is None else query
    if len(liked):
        found = found + liked_weight * liked.mean(axis=0)
    if len(disliked) and len(liked):
        found = found - disliked_weight * disliked.mean(axis=0)
    length = float(np.linalg.norm(found))
    # Likes and dislikes of the same photos cancel out.
    if length < 1e-6:
        found = liked.mean(axis=0) if query is None else query
        length = float(np.linalg.norm(found))
    return np.asarray(found / max(length, 1e-6), dtype=np.float32)
