"""Hits of a gallery, and exact searches among its rows."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from sbtk_runtime.binary_codes import Codes, Distances, hamming_distances
from sbtk_runtime.gallery.catalogue import Photo
from sbtk_runtime.gallery.folder import path_fields
from sbtk_runtime.gallery.rows import CodeShards, Embeddings, Rows, Vectors
from sbtk_runtime.manifest import MatchRule

Scores = NDArray[np.float32]

#: x, y, width and height of a part of a photo, each 0 to 1 of the upright photo.
Box = tuple[float, float, float, float]

#: Whether a hit is close enough to show the same thing, by the model's `MatchRule`.
Match = Literal["good", "weak"]


@dataclass(frozen=True)
class Copy:
    """A photo with the same content as a hit."""

    id: int
    path: str


@dataclass(frozen=True)
class Hit:
    """One photo that was found.

    Attributes:
        rank: place among the hits, from 1.
        score: at most 1: the cosine; for binary codes, the cosine of codes as rows of 1 and -1.
        id: the photo's id in the gallery.
        path: absolute, with surrogates for bytes that are not UTF-8.
        copies: other photos with the same content, by id, if they are folded.
        match: `None` if the model has no rule, for photo queries and in binary galleries.
        region: the part of the photo that matches; `None` for the whole frame. Its score is the
            cosine less what all regions have in common, see `region_search`: that of a region
            unlike all others may be above 1.
    """

    rank: int
    score: float
    id: int
    path: str
    copies: tuple[Copy, ...] = ()
    match: Match | None = None
    region: Box | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the hit as a JSON object; a path that is not UTF-8 comes as `path_bytes`."""
        known: dict[str, Any] = {"rank": self.rank, "score": round(self.score, 6), "id": self.id}
        known |= path_fields(os.fsencode(self.path))
        if self.match:
            known["match"] = self.match
        if self.region:
            known["region"] = [round(part, 4) for part in self.region]
        if self.copies:
            known["copies"] = [
                {"id": copy.id, **path_fields(os.fsencode(copy.path))} for copy in self.copies
            ]
        return known


@dataclass(frozen=True)
class PhotoCopies:
    """A photo, and other photos with the same content, by id."""

    photo: Photo
    copies: tuple[Copy, ...]


@dataclass(frozen=True)
class Answer:
    """The answer to one query.

    Attributes:
        hits: best first.
        notices: sentences about them for the user.
        no_close_match: whether no photo is a close match, so that the gallery may lack what was
            drawn; `None` if that is unknown.
    """

    hits: list[Hit]
    notices: tuple[str, ...] = ()
    no_close_match: bool | None = None

    def judged(self, closest: float | None, rule: MatchRule, photos: int) -> Answer:
        """Return the answer to a sketch with its `no_close_match`, and the hits' `match`.

        Args:
            closest: the best score of all photos, which re-ranking may leave out of the hits;
                `None` if it is unknown.
            rule: of the model that embedded the sketch.
            photos: the number of photos that were compared, at least 1.
        """
        lowest = rule.lowest_close(photos)
        hits = [replace(hit, match="good" if hit.score >= lowest else "weak") for hit in self.hits]
        is_doubtful = None if closest is None else closest < lowest
        return replace(self, hits=hits, no_close_match=is_doubtful)


def best_score(scores: Scores) -> float:
    """Return the best of scores `(N,) float32`, best first; below all others if there are none."""
    return float(scores[0]) if len(scores) else -math.inf


def count_compared(photos: int, regions: int, of_photos: int) -> int:
    """Return how many photos a `MatchRule` counts, at least 1, where regions are compared too.

    The best of many regions is as good by chance as the best of as many photos.

    Args:
        photos: the number of photos that a query was compared with.
        regions: the number of regions of all photos; 0 if whole frames are compared.
        of_photos: the number of all photos.
    """
    return max(1, photos + round(regions * photos / max(1, of_photos)))


#: Called with rows `(N,) int64` that turned out to be damaged or missing.
OnLost = Callable[[Rows], None]


def exact_search(
    vectors: Vectors,
    rows: Rows,
    query: Embeddings,
    k: int,
    on_lost: OnLost = lambda rows: None,
) -> tuple[Rows, Scores]:
    """Return rows and cosines of the `k` best among ascending `rows`, best first.

    Equal scores are ordered by row. Damaged rows are never found.

    Args:
        vectors: the embeddings.
        rows: `(N,) int64`, the rows to search.
        query: `(D,) float32`, of length 1.
        k: number of results; fewer if there are fewer rows.
        on_lost: called with the damaged ones of `rows`.
    """
    best_rows = np.empty(0, dtype=np.int64)
    best_scores = np.empty(0, dtype=np.float32)
    for numbers, embeddings, is_whole in vectors.chunks(rows):
        if not is_whole.all():
            on_lost(numbers[~is_whole])
        scores = (embeddings @ query)[is_whole]
        best_rows = np.concatenate([best_rows, numbers[is_whole]])
        best_scores = np.concatenate([best_scores, scores])
        if len(best_scores) > k:
            # Keep all scores equal to the k-th best, so that ties are broken by row at the end.
            is_kept = best_scores >= np.partition(best_scores, -k)[-k]
            best_rows, best_scores = best_rows[is_kept], best_scores[is_kept]
    order = np.lexsort((best_rows, -best_scores))[:k]
    return best_rows[order], best_scores[order]


def hamming_search(
    codes: CodeShards,
    rows: Rows,
    query: Codes,
    k: int,
    on_lost: OnLost = lambda rows: None,
) -> tuple[Rows, Distances]:
    """Return rows and Hamming distances of the `k` nearest among ascending `rows`, nearest first.

    All rows as near as the last one are returned, too, ordered by row, so that the caller can break
    ties. Missing rows are never found.

    Args:
        codes: the codes.
        rows: `(N,) int64`, the rows to search.
        query: `(W,) uint8`, packed like the codes.
        k: number of results, at least 1; fewer if there are fewer rows.
        on_lost: called with the missing ones of `rows`.
    """
    near_rows = np.empty(0, dtype=np.int64)
    near = np.empty(0, dtype=np.uint16)
    farthest = np.iinfo(np.uint16).max
    for numbers, part, is_held in codes.chunks(rows):
        if not is_held.all():
            on_lost(numbers[~is_held])
        distances = hamming_distances(query[None], part)[0]
        chosen = np.flatnonzero(is_held & (distances <= farthest))
        near_rows = np.concatenate([near_rows, numbers[chosen]])
        near = np.concatenate([near, distances[chosen]])
        if len(near) > k:
            farthest = np.partition(near, k - 1)[k - 1]
            is_near = near <= farthest
            near_rows, near = near_rows[is_near], near[is_near]
    order = np.lexsort((near_rows, near))
    return near_rows[order], near[order]
