"""Search a gallery by cosine (exactly, by sign codes or by its HNSW graph), or by its codes."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sbtk_runtime.binary_codes import Codes, Distances, Itq, hamming_distances
from sbtk_runtime.errors import BadConfig, BadData, BadGallery
from sbtk_runtime.gallery import hnsw
from sbtk_runtime.gallery.catalogue import CatalogueView
from sbtk_runtime.gallery.hnsw import Graph, build_graph, has_hnswlib, import_hnswlib
from sbtk_runtime.gallery.neighbours import NEIGHBOURS_NAME, Neighbours, load_neighbours
from sbtk_runtime.gallery.row_check import RowCheck, UsableRows
from sbtk_runtime.gallery.rows import CodeShards, Embeddings, Rows, Vectors, make_row_mask, unit_row
from sbtk_runtime.gallery.sign_codes import SignCodes
from sbtk_runtime.manifest import GalleryManifest
from sbtk_runtime.rerank import CANDIDATES, EXPAND_HITS, Rerank, diffuse, expand_query

Scores = NDArray[np.float32]

#: Minimum number of candidates by sign codes that are scored exactly, and their number per hit.
LEAST_CANDIDATES, CANDIDATES_PER_HIT = 200, 4
#: For more hits than this, exact search takes hardly longer.
MOST_BY_CODES = 1000

# With a smaller share of live rows among the candidates, all dead rows are masked.
_LEAST_LIVE = 0.75


class EmbeddingSearch:
    """The embeddings of one generation of a gallery, their sign codes, and its graph.

    Args:
        folder: the gallery's.
        manifest: of the generation.
        view: the generation's photos.
        vectors: the embeddings.
        check: of their checksums.
        live_rows: the rows of all photos whose embeddings are intact.
        exact_below: `auto` searches galleries and folders with fewer photos exactly. For larger
            galleries, graph or codes are loaded at once.
        note: called with a sentence for the user.
    """

    def __init__(
        self,
        folder: Path,
        manifest: GalleryManifest,
        view: CatalogueView,
        vectors: Vectors,
        check: RowCheck,
        live_rows: UsableRows,
        *,
        exact_below: int,
        note: Callable[[str], None],
    ) -> None:
        self._folder = folder
        self._manifest = manifest
        self._view = view
        self._vectors = vectors
        self._check = check
        self._live_rows = live_rows
        self._exact_below = exact_below
        self._note = note
        self._auto = "exact"
        self._problems: list[str] = []
        self._graph: Graph | None = None
        self._codes: SignCodes | None = None
        self._is_live: NDArray[np.bool_] | None = None
        self._neighbours: Neighbours | None = None
        self._lock = threading.Lock()
        if manifest.live >= exact_below:
            self._load()

    def nearest(
        self, embedding: NDArray[np.generic], k: int, among: Rows | None, search: str
    ) -> tuple[Rows, Scores]:
        """Return rows and cosines of the `k` nearest, best first; fewer if there are fewer.

        Args:
            embedding: `(D,)` numbers of any length but zero.
            k: may be 0.
            among: ascending rows that may be found; `None` for all photos.
            search: `auto`, `hnsw`, `codes` or `exact`.

        Raises:
            BadData: the embedding has another width, is not finite, or zero.
            MissingExtra: hnswlib, which `hnsw` needs, is not installed.
        """
        if search == "hnsw":
            import_hnswlib()
        query = unit_row(embedding, self._vectors.dim)
        way = self._way(search, k, among)
        if way == "hnsw":
            rows, scores = self._usable_graph().search(query, k)
            if len(rows) == k:
                return rows, scores
        elif way == "codes":
            rows, scores = self._by_codes(query, k, among)
            if len(rows) == k:
                return rows, scores
        rows = self._live_rows() if among is None else among
        return exact_search(self._vectors, rows, query, k, self._live_rows.leave_out)

    def rerank(
        self,
        embedding: NDArray[np.generic],
        k: int,
        among: Rows | None,
        search: str,
        rerank: Rerank,
    ) -> tuple[Rows, Scores, float]:
        """Return the rows of `nearest` in another order, their cosines, and the best of all.

        The cosines are of `embedding (D,)`; the photo that is closest to it need not be returned.

        Raises:
            BadGallery: the gallery has no list of neighbours, which diffusion needs.
        """
        if rerank == "diffusion":
            rows, scores = self.nearest(embedding, max(k, CANDIDATES), among, search)
            near = self._usable_neighbours().among(rows[:CANDIDATES])
            order = np.argsort(-diffuse(scores[:CANDIDATES], *near), kind="stable")
            order = np.concatenate([order, np.arange(len(order), len(rows))])[:k]
            return rows[order], scores[order], best_score(scores)
        rows, scores = self.nearest(embedding, EXPAND_HITS, among, search)
        query = unit_row(embedding, self._vectors.dim)
        expanded = expand_query(query, self._vectors.embeddings(rows), scores)
        found, _ = self.nearest(expanded, k, among, search)
        return found, self._vectors.embeddings(found) @ query, best_score(scores)

    def has_neighbours(self) -> bool:
        """Return whether there are neighbours to rerank by; a damaged list is a fault to note."""
        if not (self._folder / NEIGHBOURS_NAME).exists():
            return False
        try:
            self._usable_neighbours()
        except BadGallery as problem:
            self._note(f"{problem.found}: {problem.next_step}; hits are not reranked")
            return False
        return True

    def _usable_neighbours(self) -> Neighbours:
        with self._lock:
            if self._neighbours is None:
                self._neighbours = load_neighbours(self._folder, self._vectors.dim)
            return self._neighbours

    def _way(self, search: str, k: int, among: Rows | None) -> str:
        """Return the index to use: `hnsw`, `codes` or `exact`."""
        way = search
        if search == "auto":
            is_narrow = among is not None and len(among) < self._exact_below
            way = "exact" if is_narrow else self._auto
            if way == "hnsw" and (among is not None or self._graph is None or k > self._graph.ef):
                way = "codes"
            if way == "codes" and self._codes is None:
                way = "exact"
        if (way == "codes" and not 0 < k <= MOST_BY_CODES) or (way == "hnsw" and among is not None):
            way = "exact"
        return way

    def _by_codes(self, query: Embeddings, k: int, among: Rows | None) -> tuple[Rows, Scores]:
        """Return rows and cosines of the `k` best of the candidates; none if one is damaged."""
        codes = self._usable_codes()
        count = max(LEAST_CANDIDATES, CANDIDATES_PER_HIT * k)
        is_allowed = self._is_live if among is None else make_row_mask(among)
        rows = codes.candidates(query, count, is_allowed)
        if is_allowed is None:
            # Most galleries have few dead rows, so that only those of the candidates are looked up.
            is_live = self._view.is_live(rows)
            if is_live.sum() < _LEAST_LIVE * len(rows):
                self._is_live = make_row_mask(self._view.rows())
                rows = codes.candidates(query, count, self._is_live)
            else:
                rows = rows[is_live]
        rows = np.sort(rows)
        content, is_intact = self._check.read_checked(rows)
        if not is_intact.all():
            return rows[:0], np.empty(0, dtype=np.float32)
        scores = self._vectors.decode(content)[0] @ query
        order = np.lexsort((rows, -scores))[:k]
        return rows[order], scores[order]

    def _load(self) -> None:
        """Load the graph or codes of a large gallery; note what makes searches slower."""
        live, has_graph = self._manifest.live, self._manifest.graph is not None
        if has_graph and live >= hnsw.GRAPH_FROM:
            self._load_graph()
        if self._graph is None:
            self._load_codes()
        if has_graph and self._codes is None and live < hnsw.GRAPH_FROM:
            self._load_graph()  # of an older sbtk
        if self._graph is not None:
            self._auto = "hnsw"
        elif self._codes is not None:
            self._auto = "codes"
        elif not self._problems:
            self._note(
                f"{live:,} photos have no sign codes yet, so each search takes longer: "
                "'sbtk index' on your photos makes them"
            )

    def _usable_codes(self) -> SignCodes:
        """Return the sign codes from disk, or computed if their files cannot be used."""
        self.loaded_codes()
        with self._lock:
            if self._codes is None:
                self._codes = SignCodes.of_vectors(self._vectors, self._view.rows())
            return self._codes

    def loaded_codes(self) -> SignCodes | None:
        """Return the sign codes from disk; `None` if there are none that can be used."""
        with self._lock:
            if self._codes is None and not self._problems:
                self._load_codes()
            return self._codes

    def _usable_graph(self) -> Graph:
        """Return the graph from disk, or built in memory if its file cannot be used."""
        with self._lock:
            if self._graph is None and not self._problems:
                self._load_graph()
            if self._graph is None:
                rows = self._live_rows()
                self._graph = build_graph(self._vectors, rows)
            return self._graph

    def _load_codes(self) -> None:
        record = self._manifest.codes
        if record is None:
            return
        try:
            self._codes = SignCodes.load(self._folder, record, self._manifest.dim)
        except (BadGallery, MemoryError) as problem:
            self._note_problem(problem, "sign codes", "makes them again")

    def _load_graph(self) -> None:
        record = self._manifest.graph
        if record is None or not has_hnswlib():
            return
        try:
            self._graph = Graph.load(self._folder, record, self._manifest.dim)
        except (BadGallery, MemoryError) as problem:
            self._note_problem(problem, "search graph", "builds it again")

    def _note_problem(self, problem: BadGallery | MemoryError, what: str, remedy: str) -> None:
        text, advice = f"there is not enough memory for the {what}", ""
        if isinstance(problem, BadGallery):
            text, advice = problem.found, f"; 'sbtk index' on your photos {remedy}"
        self._problems.append(text)
        self._note(f"{text}: searching without the {what}, which may take longer{advice}")


class CodeSearch:
    """The codes of one generation of a gallery, and the ITQ that makes them.

    Args:
        view: the generation's photos.
        codes: their codes.
        live_rows: the rows of all photos.
    """

    def __init__(self, view: CatalogueView, codes: CodeShards, live_rows: UsableRows) -> None:
        self._view = view
        self._codes = codes
        self._live_rows = live_rows
        self._itq: Itq | None = None
        self._lock = threading.Lock()

    def nearest(
        self, embedding: NDArray[np.generic], k: int, among: Rows | None, search: str
    ) -> tuple[Rows, Scores]:
        """Return rows and scores of the `k` nearest, nearest first, equally near ones by id.

        The score of a Hamming distance h is `1 - 2 h / bits`, the cosine of the codes taken as
        rows of 1 and -1.

        Args:
            embedding: `(D,)` numbers of any length but zero, or a code, `(bits / 8,) uint8`.
            k: may be 0.
            among: ascending rows that may be found; `None` for all photos.
            search: `auto` or `exact`.

        Raises:
            BadConfig: `search` is `hnsw` or `codes`.
            BadData: the embedding or code has another width; the embedding is not finite, or zero.
            BadGallery: the ITQ is damaged.
        """
        bits = self._codes.bits
        if search in ("hnsw", "codes"):
            what = "HNSW graph" if search == "hnsw" else "embeddings to score candidates by"
            raise BadConfig(
                f"a gallery of {bits}-bit codes has no {what}",
                "auto or exact: Hamming distances are searched exactly, and fast",
                "--search exact",
            )
        code = self._code(embedding)
        if not k:
            return np.empty(0, dtype=np.int64), np.empty(0, dtype=np.float32)
        rows = self._live_rows() if among is None else among
        found, distances = hamming_search(self._codes, rows, code, k, self._live_rows.leave_out)
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


def best_score(scores: Scores) -> float:
    """Return the best of scores `(N,) float32`, best first; below all others if there are none."""
    return float(scores[0]) if len(scores) else -math.inf


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
