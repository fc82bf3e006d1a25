"""Recall and latency of methods of searching; exact scores against a plain loop."""

from __future__ import annotations

import numpy as np
import pytest

from sbtk_runtime.errors import BadConfig
from sbtk_runtime.evaluation.bench import search
from sbtk_runtime.evaluation.bench.search import Embeddings, Method, Scores
from sbtk_runtime.generated_inputs import clustered_vectors


def test_exact_scores_equal_a_full_sort_in_every_chunking(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    vectors, queries = clustered_vectors(300, 16), clustered_vectors(11, 16, of=300)
    expected = -np.sort(-(queries @ vectors.T), axis=1)[:, :7]
    np.testing.assert_allclose(search.search_exactly(vectors, queries, 7), expected, atol=1e-6)
    monkeypatch.setattr(search, "_CHUNK_SCORES", 700)
    np.testing.assert_allclose(search.search_exactly(vectors, queries, 7), expected, atol=1e-6)
    all_of_them = search.search_exactly(vectors, queries, 300)
    assert all_of_them.shape == (11, 300)


def test_recall_compares_scores_and_missing_hits_lower_it() -> None:
    vectors, queries = clustered_vectors(200, 16), clustered_vectors(10, 16, of=200)
    truth = search.search_exactly(vectors, queries, 4)

    def exact(query: Embeddings, k: int) -> Scores:
        return -np.sort(-(vectors @ query))[:k]

    points = search.measure_searches(
        [
            Method("exact", None, exact),
            Method("half", 1, lambda query, k: exact(query, k)[: k // 2]),
            Method("wrong", 2, lambda query, k: exact(query, len(vectors))[-k:]),
        ],
        queries,
        truth,
        passes=2,
    )
    assert [point.recall for point in points] == [1.0, 0.5, 0.0]
    assert [point.samples for point in points] == [20, 20, 20]
    for point in points:
        assert point.p50_ms <= point.p95_ms <= point.p99_ms
        assert point.queries_per_s > 0


def test_faiss_as_a_peer_finds_nearly_all() -> None:
    pytest.importorskip("faiss")
    vectors, queries = clustered_vectors(1000, 16), clustered_vectors(20, 16, of=1000)
    build, methods = search.build_faiss_hnsw(
        vectors, m=16, ef_construction=100, threads=1, efs=(16, 128)
    )
    truth = search.search_exactly(vectors, queries, 10)
    points = search.measure_searches(methods, queries, truth, passes=1)
    assert build.name == "faiss-cpu HNSW"
    assert [point.ef for point in points] == [16, 128]
    assert points[1].recall > 0.95


def test_recall_at_more_hits_than_vectors_is_refused() -> None:
    assert search.check_k(10, 10) == 10
    with pytest.raises(BadConfig, match="recall at 11 over 10 vectors"):
        search.check_k(11, 10)
