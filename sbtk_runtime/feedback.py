"""Relevance feedback: a query that moves towards photos that are liked, and away from others."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from sbtk_runtime.errors import BadConfig

Embeddings = NDArray[np.float32]

#: Weights of the means beside that of the query, which is 1; benchmarks/feedback.py compares
#: others on validation classes.
LIKED_WEIGHT = 4.0
DISLIKED_WEIGHT = 1.0


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
