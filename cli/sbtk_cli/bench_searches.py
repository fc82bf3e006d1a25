"""`sbtk bench search` over a gallery, given embeddings, or synthetic vectors."""

from __future__ import annotations

import tempfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from sbtk_cli.options import DEFAULT_GALLERY, existing_gallery
from sbtk_cli.output import notice
from sbtk_runtime.errors import BadConfig, BadData
from sbtk_runtime.evaluation.bench.search import (
    EF_SWEEP,
    Answer,
    BuildCost,
    Embeddings,
    IndexBuild,
    Method,
    Scores,
    SearchReport,
    build_faiss_hnsw,
    build_faiss_ivf,
    build_sign_codes,
    build_usearch,
    check_k,
    measure_searches,
    search_exactly,
)
from sbtk_runtime.gallery.catalogue import CatalogueView
from sbtk_runtime.gallery.folder import open_rows
from sbtk_runtime.gallery.gallery import Gallery
from sbtk_runtime.gallery.hnsw import EF_CONSTRUCTION, INSTALL_HNSWLIB, Graph, M, has_hnswlib
from sbtk_runtime.generated_inputs import clustered_named, clustered_vectors
from sbtk_runtime.machine import cpu_threads
from sbtk_runtime.manifest import MANIFEST_NAME, GalleryManifest

_SYNTHETIC = 20_000
_QUERIES = 1000
_CHUNK_ROWS = 4096
_NORM_TOLERANCE = 1e-2


@dataclass(frozen=True)
class _Task:
    """Vectors to search and queries, with their descriptions."""

    vectors: Embeddings
    vectors_named: str
    queries: Embeddings
    queries_named: str


def run_search(
    *,
    gallery: Path | None,
    synthetic: int | None,
    embeddings: Path | None,
    query_file: Path | None,
    dim: int,
    seed: int,
    k: int,
    efs: Sequence[int],
    peers: Sequence[str],
    has_graphs: bool,
    threads: int | None,
    quiet: bool,
) -> SearchReport:
    """Measure recall and latency over the vectors that the options select.

    Raises:
        BadConfig: the options contradict each other.
        BadData: a file has no embeddings.
    """
    if synthetic is not None and embeddings is not None:
        raise BadConfig("--synthetic and --embeddings", "one of the two")
    if synthetic is None and embeddings is None:
        if gallery is None and (DEFAULT_GALLERY / MANIFEST_NAME).is_file():
            gallery = DEFAULT_GALLERY
        if gallery is not None:
            return _search_gallery(existing_gallery(gallery), query_file, k, seed, quiet)
    task = _make_task(embeddings, query_file, synthetic or _SYNTHETIC, dim, seed)
    return _search_vectors(
        task, k, efs or EF_SWEEP, peers, has_graphs, threads or cpu_threads(), quiet
    )


def _search_vectors(
    task: _Task,
    k: int,
    efs: Sequence[int],
    peers: Sequence[str],
    has_graphs: bool,
    threads: int,
    quiet: bool,
) -> SearchReport:
    vectors = task.vectors
    check_k(k, len(vectors))
    efs = [ef for ef in efs if ef >= k]
    if not efs:
        raise BadConfig("every --ef is below k", f"an --ef of at least {k}")
    with tempfile.TemporaryDirectory(prefix="sbtk-") as place:
        notice(f"making sign codes of {len(vectors):,} rows", quiet=quiet)
        codes, by_codes = build_sign_codes(vectors, Path(place))
        builds, methods = [codes], [_exact_method(vectors), by_codes]
        for name, build_index in _indexes(vectors, efs, peers, has_graphs, threads, quiet):
            notice(f"building {name} of {len(vectors):,} rows on {threads} threads", quiet=quiet)
            build, others = build_index()
            builds.append(build)
            methods += others
        truth = search_exactly(vectors, task.queries, k)
        points = measure_searches(
            methods, task.queries, truth, progress=lambda text: notice(text, quiet=quiet)
        )
    return SearchReport(
        vectors=task.vectors_named,
        queries=task.queries_named,
        count=len(vectors),
        dim=vectors.shape[1],
        k=k,
        builds=tuple(builds),
        points=tuple(points),
    )


def _indexes(
    vectors: Embeddings,
    efs: Sequence[int],
    peers: Sequence[str],
    has_graphs: bool,
    threads: int,
    quiet: bool,
) -> Iterator[tuple[str, Callable[[], tuple[IndexBuild, list[Method]]]]]:
    """Yield what to measure beside sign codes, by name, as functions that build it."""
    graphs = {"faiss": build_faiss_hnsw, "usearch": build_usearch}
    if has_graphs and _can_measure_hnsw(quiet):
        yield "hnswlib's graph", partial(_build_hnsw, vectors, threads, efs)
    for peer in peers if has_graphs else ():
        yield (
            f"{peer}'s graph",
            partial(
                graphs[peer],
                vectors,
                m=M,
                ef_construction=EF_CONSTRUCTION,
                threads=threads,
                efs=efs,
            ),
        )
    if "faiss" in peers:
        yield "faiss's lists", partial(build_faiss_ivf, vectors, threads=threads)


def _can_measure_hnsw(quiet: bool) -> bool:
    """Return whether hnswlib is installed; if not, print a notice."""
    if has_hnswlib():
        return True
    notice(f"hnswlib not measured: it is not installed ({INSTALL_HNSWLIB})", quiet=quiet)
    return False


def _build_hnsw(
    vectors: Embeddings, threads: int, efs: Sequence[int]
) -> tuple[IndexBuild, list[Method]]:
    """Build a graph over the vectors, as `sbtk index` does."""
    cost = BuildCost()
    graph = Graph.new(vectors.shape[1], len(vectors))
    for start in range(0, len(vectors), _CHUNK_ROWS):
        chunk = vectors[start : start + _CHUNK_ROWS]
        graph.add(np.arange(start, start + len(chunk), dtype=np.int64), chunk, threads)
    build = cost.of("hnswlib", threads, graph.m, graph.ef_construction)

    def method(ef: int) -> Method:
        def answer(query: Embeddings, k: int) -> Scores:
            graph.set_ef(ef)
            return graph.search(query, k)[1]

        return Method(build.name, ef, answer)

    return build, [method(ef) for ef in efs]


def _exact_method(vectors: Embeddings) -> Method:
    def answer(query: Embeddings, k: int) -> Scores:
        scores = vectors @ query
        return -np.sort(-np.partition(scores, len(scores) - k)[-k:])

    return Method("exact (NumPy)", None, answer)


def _search_gallery(
    folder: Path, query_file: Path | None, k: int, seed: int, quiet: bool
) -> SearchReport:
    """Measure a gallery through `Gallery.search`, as `sbtk query` does."""
    with Gallery.open(folder) as gallery:
        manifest = gallery.manifest
        check_k(k, gallery.count)
        queries: NDArray[Any]
        if query_file is not None:
            queries, queries_named = _read_queries(query_file, manifest.dim)
        else:
            queries = _read_rows(folder, manifest, seed)
            queries_named = f"{len(queries):,} of its photos, drawn with seed {seed}"

        def method(search: Literal["codes", "hnsw", "exact"]) -> Answer:
            def answer(query: Embeddings, k: int) -> Scores:
                hits = gallery.search(query, k, search)
                return np.array([hit.score for hit in hits], dtype=np.float32)

            return answer

        exact = method("exact")
        notice("exact search", quiet=quiet)
        truth = np.stack([exact(query, k) for query in queries])
        methods = [Method("exact", None, exact)]
        if manifest.bits is None:
            methods.append(Method("sign codes", None, method("codes")))
        if manifest.graph is not None and _can_measure_hnsw(quiet):
            methods.append(Method("hnswlib", manifest.graph.ef, method("hnsw")))
        points = measure_searches(
            methods, queries, truth, progress=lambda text: notice(text, quiet=quiet)
        )
        return SearchReport(
            vectors=f"the {gallery.count:,} photos of a gallery, {_describe_origin(manifest)}",
            queries=queries_named,
            count=gallery.count,
            dim=manifest.dim,
            k=k,
            builds=(),
            points=tuple(points),
        )


def _describe_origin(manifest: GalleryManifest) -> str:
    codes = "" if manifest.bits is None else f"{manifest.bits}-bit codes, "
    return f"{codes}embedded by {manifest.model_id}"


def _read_rows(folder: Path, manifest: GalleryManifest, seed: int) -> NDArray[Any]:
    """Return up to `_QUERIES` embeddings or codes of a gallery's photos."""
    view = CatalogueView(folder, manifest.generation, manifest.snapshot)
    with closing(view):
        rows = view.rows()
    chosen = np.random.default_rng(seed).choice(rows, min(_QUERIES, len(rows)), replace=False)
    kept, is_whole = open_rows(folder, manifest.dim, manifest.bits).read(np.sort(chosen))
    return kept[is_whole]


def _make_task(
    embeddings: Path | None, query_file: Path | None, count: int, dim: int, seed: int
) -> _Task:
    if embeddings is not None:
        vectors = _read_embeddings(embeddings)
        dim, named = vectors.shape[1], f"{len(vectors):,} embeddings of {embeddings.name}"
    else:
        vectors, named = clustered_vectors(count, dim, seed=seed), clustered_named(count, dim, seed)
    if query_file is not None:
        return _Task(vectors, named, *_read_queries(query_file, dim))
    if embeddings is None:
        queries = clustered_vectors(_QUERIES, dim, seed=seed, of=count)
        return _Task(vectors, named, queries, f"{_QUERIES:,} more vectors around the same centres")
    # Queries are removed from the searched rows, or each would find itself.
    order = np.random.default_rng(seed).permutation(len(vectors))
    held = min(_QUERIES, len(vectors) // 10)
    queries, rest = vectors[order[:held]], vectors[np.sort(order[held:])]
    if not held:
        raise BadData(f"{named}", "at least 10, of which a tenth are queries", "or --queries FILE")
    return _Task(rest, named, queries, f"{held:,} of them, drawn with seed {seed} and removed")


def _read_queries(path: Path, dim: int) -> tuple[Embeddings, str]:
    queries = _read_embeddings(path)
    if queries.shape[1] != dim:
        raise BadData(f"{path} has embeddings of length {queries.shape[1]}", f"length {dim}")
    return queries[
        :_QUERIES
    ], f"the first {min(_QUERIES, len(queries)):,} embeddings of {path.name}"


def _read_embeddings(path: Path) -> Embeddings:
    """Read unit rows from a `.npz` of `sbtk embed`, or from a `.npy`.

    Raises:
        BadData: the file is neither, or its rows are not of unit length.
    """
    try:
        loaded = np.load(path, allow_pickle=False)
        rows = loaded if isinstance(loaded, np.ndarray) else loaded["embeddings"]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as problem:
        # NumPy takes any other file for a pickle, and advises to load it unsafely.
        reason = "not a NumPy file" if "pickle" in str(problem) else problem
        raise BadData(
            f"{path} cannot be read as embeddings: {reason}",
            "a .npz with 'embeddings', or a .npy",
            "sbtk embed FILES --as photo -o OUT.npz",
        ) from problem
    if rows.ndim != 2 or not len(rows) or not np.issubdtype(rows.dtype, np.floating):
        raise BadData(f"{path} has {rows.dtype} of shape {rows.shape}", "(N, D) float32")
    rows = np.ascontiguousarray(rows, dtype=np.float32)
    if not (np.abs(np.linalg.norm(rows, axis=1) - 1.0) < _NORM_TOLERANCE).all():
        raise BadData(f"{path} has rows that are not of unit length", "unit rows")
    return rows
