"""Scores of queries against a gallery: larger is nearer, whatever the distance."""

from __future__ import annotations

from typing import cast

import numpy as np
from numpy.typing import NDArray

from sbtk_runtime.errors import BadData
from sbtk_runtime.hamming import Codes, hamming_distances
from sbtk_runtime.rerank import Rerank, Reranker
from sbtk_runtime.retrieval.placing import Scores
from sbtk_runtime.retrieval.protocol import Distance, require_cosine

Embeddings = NDArray[np.float32]

_LENGTH_TOLERANCE = 1e-3
_MAX_DISTANCE = np.iinfo(np.int16).max


class Scorer:
    """A gallery that queries are scored against.

    Args:
        gallery: `(N, D) float32`, or packed codes `(N, W) uint8` for the Hamming distance. For the
            cosine, rows whose length is not 1 within 1e-3 are divided by it.
        distance: by which photos are near or far.

    Raises:
        BadData: rows of another type, or numbers that are not finite.
    """

    def __init__(self, gallery: Embeddings | Codes, distance: Distance) -> None:
        self.distance = distance
        self.dim = _checked_dim(gallery, distance)
        self._gallery = gallery
        self._offset: Embeddings | None = None
        if distance == "hamming":
            return
        squares = np.einsum("nd,nd->n", gallery, gallery)
        if distance == "euclidean":
            # |q - g|^2 / 2 is |g|^2 / 2 - q g, and a number of the query's own.
            self._offset = squares / 2
        elif (np.abs(np.sqrt(squares) - 1) > _LENGTH_TOLERANCE).any():
            lengths = np.sqrt(np.where(squares > 0, squares, 1))
            self._gallery = (gallery / lengths[:, None]).astype(np.float32)

    def scores(self, queries: Embeddings | Codes) -> Scores:
        """Returns the scores of `queries (q, D)`, `(q, N)`: float32, or whole numbers of codes.

        Raises:
            BadData: rows of another width or type, or numbers that are not finite.
        """
        if _checked_dim(queries, self.distance) != self.dim:
            shapes = f"{queries.shape} and {self._gallery.shape}"
            raise BadData(f"embeddings of shapes {shapes}", "equal widths")
        if self.distance == "hamming":
            distances = hamming_distances(cast(Codes, queries), cast(Codes, self._gallery))
            whole = np.int16 if 8 * self.dim <= _MAX_DISTANCE else np.int32
            nearness: Scores = np.negative(distances.astype(whole))
            return nearness
        scores: Scores = queries @ self._gallery.T
        if self._offset is not None:
            scores -= self._offset
        return scores


class RerankingScorer(Scorer):
    """A gallery of embeddings that is put in another order than the cosine's.

    Args:
        gallery: as `Scorer` takes it, ranked by the cosine.
        rerank: other than `none`.
    """

    def __init__(self, gallery: Embeddings | Codes, rerank: Rerank) -> None:
        super().__init__(gallery, "cosine")
        self._reranker = Reranker(cast(Embeddings, self._gallery), rerank)

    def scores(self, queries: Embeddings | Codes) -> Scores:
        """Returns what photos are ordered by, `(q, N) float32`, of unit `queries (q, D)`.

        Raises:
            BadData: rows of another width or type, or numbers that are not finite.
        """
        if _checked_dim(queries, self.distance) != self.dim:
            raise BadData(f"embeddings {self.dim} and {queries.shape[1]} wide", "equal widths")
        return self._reranker.scores(cast(Embeddings, queries))


def scorer_of(gallery: Embeddings | Codes, distance: Distance, rerank: Rerank) -> Scorer:
    """Returns what scores queries against the gallery, `(N, D) float32` or `(N, B) uint8` codes.

    Raises:
        BadConfig: there is no such re-ranking, or the distance is not the cosine.
        BadData: as `Scorer`.
    """
    if rerank == "none":
        return Scorer(gallery, distance)
    require_cosine(rerank, distance)
    return RerankingScorer(gallery, rerank)


def _checked_dim(rows: Embeddings | Codes, distance: Distance) -> int:
    if rows.ndim != 2:
        raise BadData(f"embeddings of shape {rows.shape}", "rows of equal width, (N, D)")
    if (rows.dtype == np.uint8) != (distance == "hamming"):
        raise BadData(
            f"{rows.dtype} rows for {distance} distance",
            "packed uint8 codes for the Hamming distance, float32 rows for any other",
        )
    if not np.isfinite(rows).all():
        raise BadData("embeddings with numbers that are not finite", "finite numbers")
    return int(rows.shape[1])
