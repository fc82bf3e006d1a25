"""Exact search: every allowed row is scored, in chunks, so memory stays flat."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from sbtk_runtime.vectors import Embeddings, Rows, Vectors

Scores = NDArray[np.float32]


def exact_search(vectors: Vectors, rows: Rows, query: Embeddings, k: int) -> tuple[Rows, Scores]:
    """Returns rows and cosines of the `k` best among ascending `rows`, best first.

    Equal scores are ordered by row. Damaged rows are never found.

    Args:
        vectors: where the rows are.
        rows: which may be found.
        query: `(D,) float32`, of length 1.
        k: how many; fewer are returned when there are fewer.
    """
    best_rows = np.empty(0, dtype=np.int64)
    best_scores = np.empty(0, dtype=np.float32)
    for numbers, embeddings, is_whole in vectors.chunks(rows):
        scores = (embeddings @ query)[is_whole]
        best_rows = np.concatenate([best_rows, numbers[is_whole]])
        best_scores = np.concatenate([best_scores, scores])
        if len(best_scores) > k:
            # The k-th best score and all its equals stay, so that ties are cut by row at the end.
            is_kept = best_scores >= np.partition(best_scores, -k)[-k]
            best_rows, best_scores = best_rows[is_kept], best_scores[is_kept]
    order = np.lexsort((best_rows, -best_scores))[:k]
    return best_rows[order], best_scores[order]
