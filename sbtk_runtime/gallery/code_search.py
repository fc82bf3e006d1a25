"""Searching a binary gallery: exactly, by Hamming distance."""

from __future__ import annotations

import threading
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from sbtk_runtime.errors import BadConfig, BadData
from sbtk_runtime.gallery.catalogue import CatalogueView
from sbtk_runtime.gallery.codes import CodeShards
from sbtk_runtime.gallery.exact import Scores, hamming_search
from sbtk_runtime.gallery.shards import Rows
from sbtk_runtime.gallery.vectors import unit_row
from sbtk_runtime.hamming import Codes
from sbtk_runtime.itq import Itq


class CodeSearch:
    """The codes of one generation of a gallery, and what makes a code of an embedding.

    Args:
        view: the generation's photos.
        codes: their codes.
        live_rows: returns the rows of all photos.
    """

    def __init__(
        self, view: CatalogueView, codes: CodeShards, live_rows: Callable[[], Rows]
    ) -> None:
        self._view = view
        self._codes = codes
        self._live_rows = live_rows
        self._itq: Itq | None = None
        self._lock = threading.Lock()

    def nearest(
        self, embedding: NDArray[np.generic], k: int, among: Rows | None, search: str
    ) -> tuple[Rows, Scores]:
        """Returns rows and scores of the `k` nearest, nearest first, equally near ones by id.

        The score of a Hamming distance h is `1 - 2 h / bits`, the cosine of the codes taken as
        rows of 1 and -1.

        Args:
            embedding: `(D,)` numbers of any length but zero, or a code, `(bits / 8,) uint8`.
            k: may be 0.
            among: ascending rows that may be found; `None` for all photos.
            search: `auto` or `exact`.

        Raises:
            BadConfig: a graph was asked for.
            BadData: the embedding or code has another width; the embedding is not finite, or zero.
            BadGallery: what makes the gallery's codes is damaged.
        """
        bits = self._codes.bits
        if search == "hnsw":
            raise BadConfig(
                f"a gallery of {bits}-bit codes has no HNSW graph",
                "auto or exact: Hamming distances are searched exactly, and fast",
                "--search exact",
            )
        code = self._code(embedding)
        if not k:
            return np.empty(0, dtype=np.int64), np.empty(0, dtype=np.float32)
        rows = self._live_rows() if among is None else among
        found, distances = hamming_search(self._codes, rows, code, k)
        order = np.lexsort((self._view.ids(found), distances))[:k]
        scores = 1.0 - 2.0 * distances[order] / bits
        return found[order], scores.astype(np.float32)

    def _code(self, embedding: NDArray[np.generic]) -> Codes:
        if embedding.dtype == np.uint8:
            width = self._codes.bits // 8
            if embedding.shape != (width,):
                wanted = f"({width},) uint8: {self._codes.bits} bits, packed"
                raise BadData(f"a code of shape {embedding.shape}", wanted)
            return np.asarray(embedding, dtype=np.uint8)
        with self._lock:
            if self._itq is None:
                self._itq = self._view.itq()
        return np.asarray(self._itq.codes(unit_row(embedding, self._itq.dim)[None])[0])
