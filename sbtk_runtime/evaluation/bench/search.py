"""`sbtk bench search`: recall against exact search, latency, build time and memory.

All methods answer the same queries, one at a time on one thread. They alternate after each pass
over the queries.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sbtk_runtime.errors import BadConfig, MissingExtra
from sbtk_runtime.evaluation.metrics import percentiles, recall_at_k
from sbtk_runtime.gallery.rows import Vectors
from sbtk_runtime.gallery.search import CANDIDATES_PER_HIT, LEAST_CANDIDATES
from sbtk_runtime.gallery.sign_codes import SignCodes
from sbtk_runtime.machine import resident_bytes

Embeddings = NDArray[np.float32]
Scores = NDArray[np.float32]
#: Returns the scores `(k,)` of the best hits of a query `(D,) float32`, best first.
Answer = Callable[[Embeddings, int], Scores]
Progress = Callable[[str], None]

EF_SWEEP = (16, 32, 64, 128, 256)
_CHUNK_SCORES = 16_000_000
_WRITTEN_ROWS = 8192


@dataclass(frozen=True)
class IndexBuild:
    """The cost of building an index.

    Attributes:
        name: the library, or the kind of index.
        m, ef_construction: parameters of a graph; `None` for other indexes.
        threads: threads that built it.
        build_s: seconds to build it.
        resident_bytes: growth of the process; 0 if unknown, or if the graph was loaded.
    """

    name: str
    m: int | None
    ef_construction: int | None
    threads: int
    build_s: float
    resident_bytes: int


class BuildCost:
    """Measures the cost of building an index, from when this object is created."""

    def __init__(self) -> None:
        self._before_bytes, self._started = resident_bytes(), time.perf_counter()

    def of(
        self, name: str, threads: int, m: int | None = None, ef_construction: int | None = None
    ) -> IndexBuild:
        """Return the cost up to now."""
        build_s = time.perf_counter() - self._started
        grown_bytes = max(0, resident_bytes() - self._before_bytes)
        return IndexBuild(name, m, ef_construction, threads, build_s, grown_bytes)


@dataclass(frozen=True)
class SearchPoint:
    """The results of one method.

    Attributes:
        name: the library, or `exact`.
        ef: search width of a graph; `None` for exact search.
        recall: share of hits that score no worse than the k-th of exact search.
        samples: queries that were timed, in all passes.
        p50_ms, p95_ms, p99_ms: of one query.
        queries_per_s: one at a time on one thread.
        cpu_ms: processor time of one query, the mean; on a busy machine it says more than the
            latency.
    """

    name: str
    ef: int | None
    recall: float
    samples: int
    p50_ms: float
    p95_ms: float
    p99_ms: float
    queries_per_s: float
    cpu_ms: float


@dataclass(frozen=True)
class SearchReport:
    """Recall and latency of searching `count` vectors for the `k` nearest.

    Attributes:
        vectors: what was searched, in words; names generator and seed of synthetic ones.
        queries: description of the queries.
        count, dim, k: the size of the task.
        builds: one for each index.
        points: results of the methods.
    """

    vectors: str
    queries: str
    count: int
    dim: int
    k: int
    builds: tuple[IndexBuild, ...]
    points: tuple[SearchPoint, ...]

    def to_json(self) -> dict[str, Any]:
        """Return the report as a JSON object."""
        return asdict(self)


@dataclass(frozen=True)
class Method:
    """A search method to be measured."""

    name: str
    ef: int | None
    answer: Answer


def search_exactly(vectors: Embeddings, queries: Embeddings, k: int) -> Scores:
    """Return the k best cosines `(Q, k) float32` of unit rows, best first, without an index."""
    best = np.empty((len(queries), k), dtype=np.float32)
    step = max(1, _CHUNK_SCORES // len(vectors))
    for start in range(0, len(queries), step):
        scores = queries[start : start + step] @ vectors.T
        top = np.partition(scores, len(vectors) - k, axis=1)[:, -k:]
        best[start : start + step] = -np.sort(-top, axis=1)
    return best


def measure_searches(
    methods: Sequence[Method],
    queries: Embeddings,
    truth: Scores,
    *,
    passes: int = 3,
    progress: Progress = lambda _: None,
) -> list[SearchPoint]:
    """Measure recall and latency of each method.

    Args:
        methods: the methods; they alternate, one pass over all queries each.
        queries: `(Q, D) float32` unit rows.
        truth: `(Q, k) float32`, the scores of exact search.
        passes: timed passes over the queries, after an untimed one for recall.
        progress: called with a message before each pass.
    """
    k = truth.shape[1]
    found: list[Scores] = []
    for method in methods:
        progress(f"recall of {method.name}" + ("" if method.ef is None else f" at ef {method.ef}"))
        found.append(np.stack([_pad(method.answer(query, k), k) for query in queries]))
    latencies: list[list[float]] = [[] for _ in methods]
    cpu_ms = [0.0 for _ in methods]
    for index in range(passes):
        progress(f"latency, pass {index + 1} of {passes}")
        for number, (method, times_ms) in enumerate(zip(methods, latencies, strict=True)):
            cpu_started = time.thread_time()
            for query in queries:
                started = time.perf_counter()
                method.answer(query, k)
                times_ms.append((time.perf_counter() - started) * 1e3)
            cpu_ms[number] += (time.thread_time() - cpu_started) * 1e3
    return [
        SearchPoint(
            name=method.name,
            ef=method.ef,
            recall=recall_at_k(scores, truth),
            samples=len(times_ms),
            queries_per_s=len(times_ms) / sum(times_ms) * 1e3,
            cpu_ms=spent_ms / len(times_ms),
            **percentiles(times_ms),
        )
        for method, scores, times_ms, spent_ms in zip(
            methods, found, latencies, cpu_ms, strict=True
        )
    ]


def build_faiss_hnsw(
    vectors: Embeddings, *, m: int, ef_construction: int, threads: int, efs: Sequence[int]
) -> tuple[IndexBuild, list[Method]]:
    """Build faiss-cpu's HNSW over `vectors (N, D) float32` with the same parameters.

    Raises:
        MissingExtra: faiss is not installed.
    """
    faiss = _import_faiss()
    faiss.omp_set_num_threads(threads)
    cost = BuildCost()
    index = faiss.IndexHNSWFlat(vectors.shape[1], m, faiss.METRIC_INNER_PRODUCT)
    index.hnsw.efConstruction = ef_construction
    index.add(vectors)
    build = cost.of("faiss-cpu HNSW", threads, m, ef_construction)
    faiss.omp_set_num_threads(1)

    def method(ef: int) -> Method:
        def answer(query: Embeddings, k: int) -> Scores:
            index.hnsw.efSearch = ef
            scores, _ = index.search(query[None], k)
            return np.asarray(scores[0], dtype=np.float32)

        return Method(build.name, ef, answer)

    return build, [method(ef) for ef in efs]


def build_faiss_ivf(vectors: Embeddings, *, threads: int) -> tuple[IndexBuild, list[Method]]:
    """Build faiss-cpu's inverted lists of product codes over `vectors (N, D) float32`.

    Codes have four bits per four dimensions and are scanned with SIMD ("fast scan"); 200 candidates
    are scored with float16 vectors, which count as memory of the index.

    Raises:
        MissingExtra: faiss is not installed.
    """
    faiss = _import_faiss()
    count, dim = vectors.shape
    faiss.omp_set_num_threads(threads)
    cost = BuildCost()
    lists = max(1, min(count // 40, int(4 * count**0.5)))
    kind = f"IVF{lists},PQ{max(1, dim // 4)}x4fs,Refine(SQfp16)"
    index = faiss.index_factory(dim, kind, faiss.METRIC_INNER_PRODUCT)
    index.train(vectors[:: max(1, count // (64 * lists))])
    index.add(vectors)
    build = cost.of("faiss-cpu IVF-PQ", threads)
    faiss.omp_set_num_threads(1)

    def method(probes: int) -> Method:
        def answer(query: Embeddings, k: int) -> Scores:
            parameters = faiss.IndexRefineSearchParameters(
                k_factor=200 / k,
                base_index_params=faiss.SearchParametersIVF(nprobe=probes),
            )
            scores, rows = index.search(query[None], k, params=parameters)
            return np.asarray(scores[0][rows[0] >= 0], dtype=np.float32)

        return Method(f"{build.name}, {probes} lists", None, answer)

    return build, [method(probes) for probes in (4, 16, 64) if probes <= lists]


def build_usearch(
    vectors: Embeddings, *, m: int, ef_construction: int, threads: int, efs: Sequence[int]
) -> tuple[IndexBuild, list[Method]]:
    """Build usearch's HNSW over `vectors (N, D) float32`, which it keeps as float16.

    Raises:
        MissingExtra: usearch is not installed.
    """
    try:
        from usearch.index import Index
    except ImportError as problem:
        raise MissingExtra(
            "usearch is not installed", "usearch", "pip install usearch"
        ) from problem
    before, started = resident_bytes(), time.perf_counter()
    index: Any = Index(  # has a setter that mypy does not see
        ndim=vectors.shape[1],
        metric="ip",
        dtype="f16",
        connectivity=m,
        expansion_add=ef_construction,
    )
    index.add(np.arange(len(vectors)), vectors, threads=threads)
    build = IndexBuild(
        name="usearch",
        m=m,
        ef_construction=ef_construction,
        threads=threads,
        build_s=time.perf_counter() - started,
        resident_bytes=max(0, resident_bytes() - before),
    )

    def method(ef: int) -> Method:
        def answer(query: Embeddings, k: int) -> Scores:
            index.expansion_search = ef
            rows = index.search(query, k, threads=1).keys
            # Its scores are of float16 vectors, and would not match those of exact search.
            return np.asarray(-np.sort(-(vectors[rows.astype(np.int64)] @ query)), np.float32)

        return Method(build.name, ef, answer)

    return build, [method(ef) for ef in efs]


def build_sign_codes(vectors: Embeddings, folder: Path) -> tuple[IndexBuild, Method]:
    """Build a search of `vectors (N, D) float32` by sign codes, as in a gallery.

    Args:
        vectors: unit rows.
        folder: empty folder for the float16 vectors, from which candidates are read.
    """
    shards = Vectors(folder, vectors.shape[1])
    for start in range(0, len(vectors), _WRITTEN_ROWS):
        shards.append(start, vectors[start : start + _WRITTEN_ROWS])
    shards.hold()
    cost = BuildCost()
    codes = SignCodes.of_vectors(shards, np.arange(len(vectors)))
    build = cost.of("sign codes", 1)

    def answer(query: Embeddings, k: int) -> Scores:
        rows = np.sort(codes.candidates(query, max(LEAST_CANDIDATES, CANDIDATES_PER_HIT * k)))
        best = rows[np.argsort(-(shards.read(rows)[0] @ query))[:k]]
        # Select by float16 rows, as a gallery does, but compare scores of float32 rows.
        return np.asarray(-np.sort(-(vectors[best] @ query)), dtype=np.float32)

    return build, Method(build.name, None, answer)


def check_k(k: int, count: int) -> int:
    """Return `k`, after checking that there are as many vectors.

    Raises:
        BadConfig: there are fewer, so recall at k is undefined.
    """
    if k > count:
        raise BadConfig(f"recall at {k} over {count} vectors", f"at least {k} vectors")
    return k


def _pad(scores: Scores, k: int) -> Scores:
    """Return `(k,)` scores, with the worst possible score for missing hits."""
    return np.concatenate([scores, np.full(k - len(scores), -np.inf, dtype=np.float32)])


def _import_faiss() -> Any:
    try:
        import faiss
    except ImportError as problem:
        raise MissingExtra(
            "faiss is not installed", "faiss-cpu", "pip install faiss-cpu"
        ) from problem
    return faiss
