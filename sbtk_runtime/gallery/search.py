"""Searching a gallery of embeddings by cosine: exactly, or by its HNSW graph."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sbtk_runtime.binary_codes import Codes, Itq
from sbtk_runtime.errors import BadConfig, BadData, BadGallery
from sbtk_runtime.gallery.catalogue import CatalogueView
from sbtk_runtime.gallery.hits import Scores, exact_search, hamming_search
from sbtk_runtime.gallery.hnsw import (
    INSTALL_HNSWLIB,
    Graph,
    build_graph,
    has_hnswlib,
    import_hnswlib,
)
from sbtk_runtime.gallery.neighbours import Neighbours, load_neighbours
from sbtk_runtime.gallery.rows import CodeShards, Embeddings, Rows, Vectors, unit_row
from sbtk_runtime.manifest import GalleryManifest
from sbtk_runtime.rerank import CANDIDATES, EXPAND_HITS, Rerank, diffused, expanded_query


class EmbeddingSearch:
    """The embeddings of one generation of a gallery, and its graph.

    Args:
        folder: the gallery's.
        manifest: of the generation.
        vectors: the embeddings.
        live_rows: returns the rows of all photos.
        is_large: the graph is what searches the gallery, so it is loaded at once.
        note: told, in a sentence, what the user should know.
    """

    def __init__(
        self,
        folder: Path,
        manifest: GalleryManifest,
        vectors: Vectors,
        live_rows: Callable[[], Rows],
        *,
        is_large: bool,
        note: Callable[[str], None],
    ) -> None:
        self._folder = folder
        self._manifest = manifest
        self._vectors = vectors
        self._live_rows = live_rows
        self._is_large = is_large
        self._note = note
        self._graph: Graph | None = None
        self._neighbours: Neighbours | None = None
        self._graph_lock = threading.Lock()
        self._graph_problem = "" if manifest.graph else "there is no graph"
        if is_large:
            self._load_graph()

    def nearest(
        self, embedding: NDArray[np.generic], k: int, among: Rows | None, search: str
    ) -> tuple[Rows, Scores]:
        """Returns rows and cosines of the `k` nearest, best first; fewer if there are fewer.

        Args:
            embedding: `(D,)` numbers of any length but zero.
            k: may be 0.
            among: ascending rows that may be found, by an exact search; `None` for all photos.
            search: `auto`, `hnsw` or `exact`.

        Raises:
            BadData: the embedding has another width, is not finite, or zero.
            MissingExtra: `hnsw` was asked for, and hnswlib is not installed.
        """
        if search == "hnsw":
            import_hnswlib()
        query = unit_row(embedding, self._vectors.dim)
        if among is None and self._takes_graph(search, k):
            rows, scores = self._usable_graph().search(query, k)
            if len(rows) == k:
                return rows, scores
        rows = self._live_rows() if among is None else among
        return exact_search(self._vectors, rows, query, k)

    def reranked(
        self,
        embedding: NDArray[np.generic],
        k: int,
        among: Rows | None,
        search: str,
        rerank: Rerank,
    ) -> tuple[Rows, Scores]:
        """Returns what `nearest` does, in another order; scores stay cosines of `embedding (D,)`.

        Raises:
            BadGallery: diffusion, and the gallery has no neighbours of its photos.
        """
        if rerank == "diffusion":
            rows, scores = self.nearest(embedding, max(k, CANDIDATES), among, search)
            near = self._usable_neighbours().among(rows[:CANDIDATES])
            order = np.argsort(-diffused(scores[:CANDIDATES], *near), kind="stable")
            order = np.concatenate([order, np.arange(len(order), len(rows))])[:k]
            return rows[order], scores[order]
        rows, scores = self.nearest(embedding, EXPAND_HITS, among, search)
        query = unit_row(embedding, self._vectors.dim)
        expanded = expanded_query(query, self._embeddings(rows), scores)
        rows, _ = self.nearest(expanded, k, among, search)
        return rows, self._embeddings(rows) @ query

    def _embeddings(self, rows: Rows) -> Embeddings:
        """Returns the unit rows `(N, D) float32` of `rows`, in their order."""
        order = np.argsort(rows)
        sorted_rows, _ = self._vectors.read(rows[order])
        embeddings = np.empty_like(sorted_rows)
        embeddings[order] = sorted_rows
        return embeddings

    def _usable_neighbours(self) -> Neighbours:
        with self._graph_lock:
            if self._neighbours is None:
                self._neighbours = load_neighbours(self._folder, self._vectors.dim)
            return self._neighbours

    def _takes_graph(self, search: str, k: int) -> bool:
        if search != "auto":
            return search == "hnsw"
        if self._graph_problem:
            return False
        return self._is_large and self._graph is not None and k <= self._graph.ef

    def _usable_graph(self) -> Graph:
        """Returns the graph, loaded or, when its file is no good, built anew in memory."""
        with self._graph_lock:
            if self._graph is None and not self._graph_problem:
                self._load_graph()
            if self._graph is None:
                rows = self._live_rows()
                self._graph = build_graph(self._vectors, rows, len(rows))
            return self._graph

    def _load_graph(self) -> None:
        record = self._manifest.graph
        if not has_hnswlib():
            self._graph_problem = "hnswlib is not installed"
            self._note(
                f"{self._manifest.live:,} photos are searched without a graph, which takes longer: "
                f"{INSTALL_HNSWLIB}, then 'sbtk index' on your photos"
            )
            return
        if record is None:
            self._note(
                f"{self._manifest.live:,} photos have no search graph yet, so each search takes "
                "longer: 'sbtk index' on your photos builds it"
            )
            return
        try:
            self._graph = Graph.load(self._folder, record, self._manifest.dim)
        except MemoryError:
            self._graph_problem = "not enough memory"
            self._note(
                "there is not enough memory for the search graph: searching the vectors instead, "
                "which takes longer"
            )
        except BadGallery as problem:
            self._graph_problem = problem.found
            self._note(
                f"{problem.found}: searching the vectors instead; "
                "'sbtk index' on your photos builds the graph again"
            )


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
