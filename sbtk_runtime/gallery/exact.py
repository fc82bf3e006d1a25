"""Exact search: every allowed row is scored, in chunks, so memory stays flat."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from sbtk_runtime.gallery.codes import CodeShards
from sbtk_runtime.gallery.shards import Rows
from sbtk_runtime.gallery.vectors import Embeddings, Vectors
from sbtk_runtime.hamming import Codes, Distances, hamming_distances

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


def hamming_search(codes: CodeShards, rows: Rows, query: Codes, k: int) -> tuple[Rows, Distances]:
    """Returns rows and Hamming distances of the `k` nearest among ascending `rows`, nearest first.

    Many codes are equally near, so all that are as near as the last of them come too, by row: who
    knows the photos cuts. Rows that are not there are never found.

    Args:
        codes: where the codes are.
        rows: which may be found.
        query: `(W,) uint8`, packed as the codes are.
        k: how many, at least 1; fewer are returned when there are fewer.
    """
    near_rows = np.empty(0, dtype=np.int64)
    near = np.empty(0, dtype=np.uint16)
    farthest = np.iinfo(np.uint16).max
    for numbers, part, is_held in codes.chunks(rows):
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
