"""The retrieval metrics against scikit-learn, torchmetrics, plain loops and cases done by hand."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray
from sklearn.metrics import average_precision_score
from torchmetrics.functional.retrieval import retrieval_average_precision, retrieval_precision

from sbtk_runtime import metrics
from sbtk_runtime.errors import BadData

Relevance = NDArray[np.bool_]
relevances = arrays(np.bool_, st.tuples(st.integers(1, 5), st.integers(1, 40)))


def loop_ap(relevant: Sequence[bool]) -> float:
    """Returns plain AP by the definition, or NaN without a relevant photo."""
    hits, total = 0, 0.0
    for rank, is_relevant in enumerate(relevant, start=1):
        if is_relevant:
            hits += 1
            total += hits / rank
    return total / hits if hits else math.nan


def loop_ap_voc(relevant: Sequence[bool]) -> float:
    """Returns VOC AP as SAKE and DSN do: the precision envelope summed over recall steps."""
    total = sum(relevant)
    if not total:
        return math.nan
    recalls, precisions, hits = [0.0], [0.0], 0
    for rank, is_relevant in enumerate(relevant, start=1):
        hits += is_relevant
        recalls.append(hits / total)
        precisions.append(hits / rank)
    recalls.append(1.0)
    precisions.append(0.0)
    for index in range(len(precisions) - 1, 0, -1):
        precisions[index - 1] = max(precisions[index - 1], precisions[index])
    return sum(
        (recalls[index + 1] - recalls[index]) * precisions[index + 1]
        for index in range(len(recalls) - 1)
        if recalls[index + 1] != recalls[index]
    )


def loop_ap_at(relevant: Sequence[bool], k: int, divisor: metrics.Divisor) -> float:
    hits, total = 0, 0.0
    for rank, is_relevant in enumerate(relevant[:k], start=1):
        if is_relevant:
            hits += 1
            total += hits / rank
    count = sum(relevant)
    by = {"strict": min(k, count), "lenient": hits, "literal": count}[divisor]
    return total / by if hits else 0.0


def unit_rows(rng: np.random.Generator, count: int, dim: int) -> NDArray[np.float32]:
    rows = rng.standard_normal((count, dim)).astype(np.float32)
    return np.asarray(rows / np.linalg.norm(rows, axis=1, keepdims=True), dtype=np.float32)


def test_plain_ap_of_a_case_worked_by_hand() -> None:
    # Relevant at ranks 1, 3 and 6: (1/1 + 2/3 + 3/6) / 3.
    relevant = np.array([[1, 0, 1, 0, 0, 1]], dtype=np.bool_)
    assert metrics.average_precision(relevant) == pytest.approx([(1 + 2 / 3 + 1 / 2) / 3])


def test_voc_ap_of_a_case_worked_by_hand() -> None:
    # Precisions at the hits are 1/2, 2/4 and 3/5; the envelope lifts all three to 3/5.
    relevant = np.array([[0, 1, 0, 1, 1]], dtype=np.bool_)
    assert metrics.average_precision(relevant) == pytest.approx([(1 / 2 + 2 / 4 + 3 / 5) / 3])
    assert metrics.average_precision_voc(relevant) == pytest.approx([3 / 5])


def test_ap_at_k_of_a_case_worked_by_hand_by_all_three_divisors() -> None:
    # Four relevant, two of them within k = 3: the sum is 1/1 + 2/3.
    relevant = np.array([[1, 0, 1, 0, 1, 1]], dtype=np.bool_)
    total = 1 + 2 / 3
    assert metrics.average_precision_at(relevant, 3, "strict") == pytest.approx([total / 3])
    assert metrics.average_precision_at(relevant, 3, "lenient") == pytest.approx([total / 2])
    assert metrics.average_precision_at(relevant, 3, "literal") == pytest.approx([total / 4])


@given(relevances)
@settings(max_examples=200, deadline=None)
def test_plain_and_voc_ap_equal_straightforward_loops(relevant: Relevance) -> None:
    np.testing.assert_allclose(
        metrics.average_precision(relevant), [loop_ap(list(row)) for row in relevant]
    )
    np.testing.assert_allclose(
        metrics.average_precision_voc(relevant), [loop_ap_voc(list(row)) for row in relevant]
    )


@given(relevances, st.integers(1, 50), st.sampled_from(["strict", "lenient", "literal"]))
@settings(max_examples=200, deadline=None)
def test_ap_at_k_equals_a_straightforward_loop(
    relevant: Relevance, k: int, divisor: metrics.Divisor
) -> None:
    np.testing.assert_allclose(
        metrics.average_precision_at(relevant, k, divisor),
        [loop_ap_at(list(row), k, divisor) for row in relevant],
    )


@given(relevances)
@settings(max_examples=100, deadline=None)
def test_plain_ap_equals_scikit_learn(relevant: Relevance) -> None:
    relevant = relevant[relevant.any(axis=1)]
    scores = np.arange(relevant.shape[1], 0, -1, dtype=np.float64)
    expected = [average_precision_score(row, scores) for row in relevant]
    np.testing.assert_allclose(metrics.average_precision(relevant), expected)


@given(relevances, st.integers(1, 50))
@settings(max_examples=100, deadline=None)
def test_ap_and_precision_equal_torchmetrics(relevant: Relevance, k: int) -> None:
    k = min(k, relevant.shape[1])
    scores = torch.arange(relevant.shape[1], 0, -1, dtype=torch.float64)
    for row in relevant:
        target = torch.from_numpy(row.copy())
        one = row[None, :]
        if row.any():
            whole = float(retrieval_average_precision(scores, target))
            assert metrics.average_precision(one)[0] == pytest.approx(whole, abs=1e-6)
        # torchmetrics divides AP@k by the hits within k: the lenient rule.
        cut = float(retrieval_average_precision(scores, target, top_k=k))
        assert metrics.average_precision_at(one, k, "lenient")[0] == pytest.approx(cut, abs=1e-6)
        share = float(retrieval_precision(scores, target, top_k=k))
        assert metrics.precision_at(one, k)[0] == pytest.approx(share, abs=1e-6)


@given(relevances)
@settings(max_examples=100, deadline=None)
def test_the_rules_are_ordered_and_agree_when_nothing_is_cut(relevant: Relevance) -> None:
    relevant = relevant[relevant.any(axis=1)]
    count = relevant.shape[1]
    plain, voc = metrics.average_precision(relevant), metrics.average_precision_voc(relevant)
    assert (voc >= plain - 1e-12).all()
    assert (voc <= 1 + 1e-12).all()
    for divisor in ("strict", "lenient", "literal"):
        np.testing.assert_allclose(
            metrics.average_precision_at(relevant, count, divisor),
            plain,
        )
    k = max(1, count // 2)
    lenient = metrics.average_precision_at(relevant, k, "lenient")
    strict = metrics.average_precision_at(relevant, k, "strict")
    literal = metrics.average_precision_at(relevant, k, "literal")
    assert (lenient >= strict - 1e-12).all()
    assert (strict >= literal - 1e-12).all()


def test_a_query_without_a_relevant_photo_is_nan_alone_and_zero_at_k() -> None:
    none = np.zeros((1, 5), dtype=np.bool_)
    assert np.isnan(metrics.average_precision(none)).all()
    assert np.isnan(metrics.average_precision_voc(none)).all()
    for divisor in ("strict", "lenient", "literal"):
        assert metrics.average_precision_at(none, 3, divisor) == [0.0]


def test_evaluate_equals_scikit_learn_on_the_same_vectors() -> None:
    rng = np.random.default_rng(0)
    queries, gallery = unit_rows(rng, 40, 16), unit_rows(rng, 230, 16)
    query_labels, gallery_labels = rng.integers(0, 6, 40), rng.integers(0, 6, 230)
    result = metrics.evaluate(queries, query_labels, gallery, gallery_labels)
    scores = queries @ gallery.T
    for index, label in enumerate(query_labels):
        expected = average_precision_score(gallery_labels == label, scores[index])
        assert result.ap_all[index] == pytest.approx(expected, abs=1e-9)
    assert result.unanswerable == 0
    assert sorted(result.precision_at) == [10, 100, 200]


def test_evaluate_equals_loops_over_each_query_for_every_figure() -> None:
    rng = np.random.default_rng(1)
    queries, gallery = unit_rows(rng, 12, 8), unit_rows(rng, 210, 8)
    query_labels, gallery_labels = rng.integers(0, 4, 12), rng.integers(0, 4, 210)
    result = metrics.evaluate(queries, query_labels, gallery, gallery_labels)
    for index, label in enumerate(query_labels):
        order = sorted(range(210), key=lambda row: (-float(queries[index] @ gallery[row]), row))
        relevant = [bool(gallery_labels[row] == label) for row in order]
        assert result.ap_all[index] == pytest.approx(loop_ap(relevant))
        assert result.ap_voc[index] == pytest.approx(loop_ap_voc(relevant))
        for divisor, values in result.ap_at_200.items():
            assert values[index] == pytest.approx(loop_ap_at(relevant, 200, divisor))
        for k, values in result.precision_at.items():
            assert values[index] == pytest.approx(sum(relevant[:k]) / k)


def test_ties_are_ordered_by_gallery_index() -> None:
    query = np.array([[1.0, 0.0]], dtype=np.float32)
    gallery = np.array([[0.0, 1.0], [1.0, 0.0], [1.0, 0.0], [1.0, 0.0]], dtype=np.float32)
    wrong_first = metrics.evaluate(query, np.array([1]), gallery, np.array([0, 0, 0, 1]))
    right_first = metrics.evaluate(query, np.array([1]), gallery, np.array([0, 1, 0, 0]))
    assert wrong_first.ap_all == pytest.approx([1 / 3])
    assert right_first.ap_all == pytest.approx([1.0])


def test_a_gallery_of_equal_rows_ranks_as_it_stands() -> None:
    gallery = np.tile(np.array([[0.6, 0.8]], dtype=np.float32), (7, 1))
    labels = np.array([0, 1, 0, 0, 1, 0, 0])
    result = metrics.evaluate(gallery[:1], np.array([1]), gallery, labels)
    assert result.ap_all == pytest.approx([(1 / 2 + 2 / 5) / 2])


def test_unanswerable_queries_are_counted_and_left_out_of_the_means() -> None:
    rng = np.random.default_rng(2)
    queries, gallery = unit_rows(rng, 6, 4), unit_rows(rng, 20, 4)
    labels = np.array([0, 9, 1, 9, 0, 1])
    gallery_labels = rng.integers(0, 2, 20)
    result = metrics.evaluate(queries, labels, gallery, gallery_labels)
    kept = labels != 9
    alone = metrics.evaluate(queries[kept], labels[kept], gallery, gallery_labels)
    assert result.unanswerable == 2
    assert result.labels.tolist() == [0, 1, 0, 1]
    assert result.summary() == alone.summary()
    assert not any(math.isnan(figure) for figure in result.summary().values())


def test_only_unanswerable_queries_are_an_error() -> None:
    rows = unit_rows(np.random.default_rng(3), 3, 4)
    with pytest.raises(BadData, match="no query has a relevant photo"):
        metrics.evaluate(rows, np.array([5, 5, 5]), rows, np.array([0, 1, 2]))


@pytest.mark.parametrize(
    ("queries", "query_labels", "gallery"),
    [((3, 4), 2, (5, 4)), ((3, 4), 3, (5, 6)), ((12,), 12, (5, 4))],
)
def test_shapes_that_do_not_fit_are_named(
    queries: tuple[int, ...], query_labels: int, gallery: tuple[int, ...]
) -> None:
    with pytest.raises(BadData):
        metrics.evaluate(
            np.ones(queries, dtype=np.float32),
            np.zeros(query_labels, dtype=np.int64),
            np.ones(gallery, dtype=np.float32),
            np.zeros(gallery[0], dtype=np.int64),
        )


def test_chunks_of_queries_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    # Whole numbers, so that a product is the same in every blocking of the multiplication.
    rng = np.random.default_rng(4)
    queries = rng.integers(-3, 4, (17, 6)).astype(np.float32)
    gallery = rng.integers(-3, 4, (50, 6)).astype(np.float32)
    labels, gallery_labels = rng.integers(0, 3, 17), rng.integers(0, 3, 50)
    whole = metrics.evaluate(queries, labels, gallery, gallery_labels)
    monkeypatch.setattr(metrics, "_CHUNK_SCORES", 100)
    parts = metrics.evaluate(queries, labels, gallery, gallery_labels)
    np.testing.assert_array_equal(whole.ap_all, parts.ap_all)
    assert whole.summary() == parts.summary()


def test_class_mean_weighs_classes_and_not_queries() -> None:
    values = np.array([1.0, 1.0, 1.0, 0.0])
    assert metrics.class_mean(values, np.array([7, 7, 7, 2])) == pytest.approx(0.5)
    assert float(values.mean()) == pytest.approx(0.75)


def test_summary_names_the_rule_of_every_figure() -> None:
    rng = np.random.default_rng(5)
    gallery = unit_rows(rng, 30, 4)
    labels = rng.integers(0, 3, 30)
    names = set(metrics.evaluate(gallery, labels, gallery, labels).summary())
    assert names == {
        "mAP@all",
        "mAP@all (VOC)",
        "mAP@all (class mean)",
        "mAP@200 (strict)",
        "mAP@200 (lenient)",
        "mAP@200 (literal)",
        "P@10",
    }


def test_perfect_and_reversed_rankings_reach_the_ends() -> None:
    gallery = np.array([[1, 0], [1, 0], [-1, 0], [-1, 0]], dtype=np.float32)
    labels = np.array([0, 0, 1, 1])
    perfect = metrics.evaluate(gallery[:1], np.array([0]), gallery, labels)
    assert perfect.summary()["mAP@all"] == pytest.approx(1.0)
    reversed_ = metrics.evaluate(gallery[:1], np.array([1]), gallery, labels)
    assert reversed_.summary()["mAP@all"] == pytest.approx((1 / 3 + 2 / 4) / 2)


def test_recall_by_score_forgives_ties_and_nothing_else() -> None:
    exact = np.array([[0.9, 0.8, 0.7]], dtype=np.float32)
    other_of_equal_score = np.array([[0.9, 0.8, 0.7]], dtype=np.float32)
    one_missed = np.array([[0.9, 0.8, 0.6]], dtype=np.float32)
    nothing = np.full((1, 3), -np.inf, dtype=np.float32)
    assert metrics.recall_at_k(other_of_equal_score, exact) == 1.0
    assert metrics.recall_at_k(one_missed, exact) == pytest.approx(2 / 3)
    assert metrics.recall_at_k(nothing, exact) == 0.0


def test_percentiles_of_known_latencies() -> None:
    figures = metrics.percentiles(list(range(101)))
    assert figures == {"p50_ms": 50.0, "p95_ms": 95.0, "p99_ms": 99.0}
