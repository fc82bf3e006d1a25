"""Re-ranking: expansion, diffusion and feedback."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from sbtk_runtime.errors import BadConfig, BadData
from sbtk_runtime.evaluation.metrics import evaluate
from sbtk_runtime.evaluation.protocol import Distance, Protocol
from sbtk_runtime.gallery.gallery import Gallery
from sbtk_runtime.rerank import (
    RERANKS,
    Rerank,
    Reranker,
    diffuse,
    expand_query,
    nearest_rows,
    refine,
    require_rerank,
)
from tests.tiny_gallery import gallery_of, unit_rows

Rows = NDArray[np.float32]


def unit(rows: NDArray[np.float64]) -> Rows:
    return np.asarray(rows / np.linalg.norm(rows, axis=-1, keepdims=True), dtype=np.float32)


def random_rows(count: int, seed: int = 0, dim: int = 16) -> Rows:
    return unit(np.random.default_rng(seed).normal(size=(count, dim)))


def solved(scores: Rows, neighbours: NDArray[np.int64], similarities: Rows, seeds: int) -> Rows:
    """The same by a dense matrix and plain steps."""
    count = len(scores)
    weights = np.zeros((count, count))
    for i in range(count):
        for j, similarity in zip(neighbours[i], similarities[i], strict=True):
            if j >= 0 and j != i and similarity > 0:
                weights[i, j] = weights[j, i] = float(similarity) ** 3
    degrees = np.maximum(weights.sum(1), 1e-12)
    spread_by = weights / np.sqrt(degrees[:, None] * degrees[None])
    start = np.where(np.arange(count) < seeds, np.clip(scores, 0, None) ** 3.0, 0.0)
    found = start
    for _ in range(20):
        found = 0.9 * spread_by @ found + 0.1 * start
    found = found / found.max() if found.max() > 0 else found
    return np.asarray(found + 1e-3 * scores, dtype=np.float32)


@given(st.integers(0, 10_000), st.integers(2, 40), st.integers(1, 6), st.integers(1, 12))
def test_diffusion_equals_that_with_a_dense_matrix(
    seed: int, count: int, width: int, seeds: int
) -> None:
    gallery = random_rows(count, seed)
    near, similarities = nearest_rows(gallery, gallery, width, skip_self=True)
    lost = np.random.default_rng(seed).random(near.shape) < 0.2
    near = np.where(lost, -1, near)
    scores = np.sort(gallery @ random_rows(1, seed + 1)[0])[::-1].copy()
    found = diffuse(scores, near, similarities, seeds)
    np.testing.assert_allclose(found, solved(scores, near, similarities, seeds), atol=1e-5)


def test_without_neighbours_the_order_does_not_change() -> None:
    scores = np.linspace(0.9, -0.2, 30).astype(np.float32)
    none = np.full((30, 5), -1, dtype=np.int64)
    order = np.argsort(-diffuse(scores, none, np.zeros((30, 5), np.float32)), kind="stable")
    assert order.tolist() == list(range(30))
    assert diffuse(scores[:0], none[:0], np.zeros((0, 5), np.float32)).shape == (0,)


def test_nearest_rows_equal_a_loop() -> None:
    gallery, rows = random_rows(57, 1), random_rows(23, 2)
    places, scores = nearest_rows(rows, gallery, 7, block=5)
    for row in range(23):
        cosines = gallery @ rows[row]
        np.testing.assert_allclose(scores[row], np.sort(cosines)[::-1][:7], atol=1e-6)
        np.testing.assert_allclose(cosines[places[row]], scores[row], atol=1e-6)
    own, _ = nearest_rows(gallery, gallery, 100, skip_self=True)
    assert own.shape == (57, 56)
    assert not (own == np.arange(57)[:, None]).any()


def test_an_expanded_query_is_a_unit_row_nearer_to_its_hits() -> None:
    query, rows = random_rows(1, 3)[0], random_rows(9, 4)
    scores = rows @ query
    order = np.argsort(-scores)
    expanded = expand_query(query, rows[order], scores[order])
    assert float(np.linalg.norm(expanded)) == pytest.approx(1, abs=1e-6)
    assert rows[order[0]] @ expanded > scores[order[0]]


@pytest.mark.parametrize("rerank", ["expand", "diffusion"])
def test_diffusion_finds_similar_photos_from_a_poor_sketch(rerank: Rerank) -> None:
    rng = np.random.default_rng(5)
    centres = rng.normal(size=(8, 24))
    labels = np.repeat(np.arange(8), 12)
    photos = unit(centres[labels] + 0.5 * rng.normal(size=(96, 24)))
    others = random_rows(400, 6, 24)
    sketches = unit(centres[labels] + 1.4 * rng.normal(size=(96, 24)))
    gallery = np.concatenate([photos, others])
    gallery_labels = np.concatenate([labels, np.full(400, -1)])

    def mean_average_precision(how: Rerank) -> float:
        found = evaluate(sketches, labels, gallery, gallery_labels, rerank=how)
        return found.summary()["mAP@all"]

    scores = Reranker(gallery, "none").scores(sketches)
    np.testing.assert_array_equal(scores, sketches @ gallery.T)
    assert mean_average_precision(rerank) > mean_average_precision("none") + 0.02


def test_an_unknown_reranking_is_refused_by_name() -> None:
    with pytest.raises(BadConfig, match="'magic'"):
        require_rerank("magic")
    for known in RERANKS:
        require_rerank(known)


@pytest.mark.parametrize("distance", ["euclidean", "hamming"])
def test_only_rankings_by_cosine_can_be_reranked(distance: Distance) -> None:
    rows = random_rows(5)
    codes = np.zeros((5, 8), dtype=np.uint8)
    sides = codes if distance == "hamming" else rows
    with pytest.raises(BadConfig, match=f"--rerank diffusion with {distance}"):
        evaluate(sides, np.arange(5), sides, np.arange(5), distance=distance, rerank="diffusion")
    assert "RE-RANKED" in Protocol(rerank="diffusion").ranking
    assert "RE-RANKED" not in Protocol().ranking


NONE = np.empty((0, 8), dtype=np.float32)


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


def test_a_query_without_feedback_does_not_change() -> None:
    query = unit_rows(1, 8)[0]
    np.testing.assert_allclose(refine(query, NONE, NONE), query, atol=1e-6)


@pytest.mark.parametrize("seed", range(5))
def test_feedback_moves_the_query_towards_liked_and_away_from_disliked_photos(seed: int) -> None:
    query, liked, disliked = unit_rows(3, 8, seed)
    towards = refine(query, liked[None], NONE)
    away = refine(query, liked[None], disliked[None])
    assert cosine(towards, liked) > cosine(query, liked)
    assert cosine(away, disliked) < cosine(towards, disliked)
    np.testing.assert_allclose(refine(query, NONE, disliked[None]), query, atol=1e-6)
    assert np.linalg.norm(towards) == pytest.approx(1)
    assert towards.dtype == away.dtype == np.float32


def test_repeating_and_reordering_likes_changes_nothing() -> None:
    liked = unit_rows(4, 8)
    expected = refine(None, liked, NONE)
    np.testing.assert_allclose(refine(None, liked[::-1], NONE), expected, atol=1e-6)
    np.testing.assert_allclose(refine(None, np.tile(liked, (3, 1)), NONE), expected, atol=1e-6)


def test_likes_and_dislikes_of_the_same_photos_leave_the_query() -> None:
    query = unit_rows(1, 8)[0]
    assert np.isfinite(refine(None, query[None], query[None], disliked_weight=4)).all()


def test_feedback_without_a_query_or_likes_is_refused() -> None:
    with pytest.raises(BadConfig):
        refine(None, NONE, unit_rows(1, 8))


def test_a_gallery_refines_a_query_by_its_photos(tmp_path: Path) -> None:
    rows = unit_rows(40, 8)
    gallery_of(tmp_path / "gallery.sbtk", rows)
    with Gallery.open(tmp_path / "gallery.sbtk") as gallery:
        found = gallery.refined(None, [3, 5], [9])
        np.testing.assert_allclose(found, refine(None, rows[[2, 4]], rows[[8]]), atol=1e-3)
        with pytest.raises(BadData, match="no photo 99"):
            gallery.refined(rows[0], [99], [])
