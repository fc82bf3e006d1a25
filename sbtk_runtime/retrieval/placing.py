"""Where a query's relevant photos stand in its ranking: all that retrieval metrics need to know.

A ranking is not written out: sorting the scores and looking the relevant ones up gives how many
photos stand above each, and how many share its score. This is several times quicker than ordering
the gallery, and needs no memory for ranks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sbtk_runtime.retrieval.protocol import Ties

Counts = NDArray[np.int64]
#: `(Q, N)`, larger is better: float32 of embeddings, or a signed integer for binary codes.
Scores = NDArray[Any]


@dataclass(frozen=True)
class Places:
    """The places of the R relevant photos of each of Q queries, best first.

    Attributes:
        above: `(Q, R) int64`: how many photos stand strictly above.
        tied: `(Q, R) int64`: how many share the place, the photo itself included; 1 where the
            rank is `above + 1` for sure.
    """

    above: Counts
    tied: Counts

    @property
    def has_ties(self) -> bool:
        """Whether some rank is uncertain."""
        return bool((self.tied > 1).any())


def places(scores: Scores, relevant: Counts, ties: Ties) -> Places:
    """Returns the places of the photos `relevant (R,) int64` in each row of `scores (Q, N)`.

    With ties by `index`, photos of equal score stand in the order of the gallery.
    """
    if ties == "index":
        scores = _all_different(scores)
    above = np.empty((len(scores), len(relevant)), dtype=np.int64)
    tied = np.empty_like(above)
    ordered = np.sort(scores, axis=1)
    for query, (row, in_order) in enumerate(zip(scores, ordered, strict=True)):
        own = np.sort(row[relevant])[::-1]
        not_above = np.searchsorted(in_order, own, side="right")
        above[query] = len(row) - not_above
        tied[query] = not_above - np.searchsorted(in_order, own, side="left")
    return Places(above, tied)


def places_in(ranking: NDArray[np.bool_]) -> Places:
    """Returns the places in one ranked list `(N,) bool` that says which photos are relevant."""
    above = np.flatnonzero(ranking)[None, :].astype(np.int64)
    return Places(above, np.ones_like(above))


def _all_different(scores: Scores) -> NDArray[np.int64]:
    """Returns whole numbers in the order of the scores, and of the gallery where these are equal.

    The bits of a positive float32 are in the order of its value; those of a negative one in
    reverse, but for the sign.
    """
    count = scores.shape[1]
    if scores.dtype.kind == "f":
        # Adding zero makes -0 and 0 the same bits.
        bits = (scores.astype(np.float32, copy=False) + np.float32(0)).view(np.int32)
        scores = np.where(bits < 0, bits ^ np.int32(0x7FFFFFFF), bits)
    return np.asarray(scores.astype(np.int64) * count - np.arange(count))
