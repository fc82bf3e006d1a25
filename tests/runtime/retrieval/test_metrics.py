"""Evaluation of embeddings and codes against scikit-learn, plain loops and cases done by hand."""

from __future__ import annotations

import itertools
import math
import tracemalloc
from typing import get_args

import numpy as np
import pytest
from numpy.typing import NDArray

from sbtk_runtime.errors import BadData
from sbtk_runtime.itq import fit_itq
from sbtk_runtime.retrieval import metrics
from sbtk_runtime.retrieval.protocol import DIVISORS, Distance, Measure
from tests.retrieval_loops import (
    loop_ap,
    loop_ap_at,
    loop_ap_voc,
    loop_precision,
    mean_over_orders,
)


def unit_rows(rng: np.random.Generator, count: int, dim: int) -> NDArray[np.float32]:
    rows = rng.standard_normal((count, dim)).astype(np.float32)
    return np.asarray(rows / np.linalg.norm(rows, axis=1, keepdims=True), dtype=np.float32)


def test_evaluate_equals_scikit_learn_on_the_same_vectors() -> None:
    from sklearn.metrics import average_precision_score

    rng = np.random.default_rng(0)
    queries, gallery = unit_rows(rng, 40, 16), unit_rows(rng, 230, 16)
    query_labels, gallery_labels = rng.integers(0, 6, 40), rng.integers(0, 6, 230)
    result = metrics.evaluate(queries, query_labels, gallery, gallery_labels)
    scores = queries @ gallery.T
    for index, label in enumerate(query_labels):
        expected = average_precision_score(gallery_labels == label, scores[index])
        assert result.ap_all[index] == pytest.approx(expected, abs=1e-9)
    assert result.unanswerable == 0
    assert {measure.cut for measure in result.values if measure.kind == "P"} == {10, 100, 200}


def test_evaluate_equals_loops_over_each_query_for_every_figure() -> None:
    rng = np.random.default_rng(1)
    queries, gallery = unit_rows(rng, 12, 8), unit_rows(rng, 210, 8)
    query_labels, gallery_labels = rng.integers(0, 4, 12), rng.integers(0, 4, 210)
    result = metrics.evaluate(queries, query_labels, gallery, gallery_labels)
    for index, label in enumerate(query_labels):
        order = sorted(range(210), key=lambda row: (-float(queries[index] @ gallery[row]), row))
        relevant = [bool(gallery_labels[row] == label) for row in order]
        assert result.ap_all[index] == pytest.approx(loop_ap(relevant))
        found = {measure: values[index] for measure, values in result.values.items()}
        assert found[Measure("AP", is_voc=True)] == pytest.approx(loop_ap_voc(relevant))
        cut = Measure("AP", 200, "strict", is_voc=True)
        assert found[cut] == pytest.approx(loop_ap_voc(relevant, 200))
        for divisor in DIVISORS:
            expected = loop_ap_at(relevant, 200, divisor)
            assert found[Measure("AP", 200, divisor)] == pytest.approx(expected)
        for k in (10, 100, 200):
            assert found[Measure("P", k)] == pytest.approx(loop_precision(relevant, k))


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
    whole = metrics.evaluate(queries, labels, gallery, gallery_labels, distance="euclidean")
    monkeypatch.setattr(metrics, "_CHUNK_SCORES", 100)
    parts = metrics.evaluate(queries, labels, gallery, gallery_labels, distance="euclidean")
    np.testing.assert_array_equal(whole.ap_all, parts.ap_all)
    assert whole.summary() == parts.summary()


def test_the_cosine_takes_rows_of_any_length() -> None:
    rng = np.random.default_rng(6)
    queries, gallery = unit_rows(rng, 9, 5), unit_rows(rng, 40, 5)
    labels, gallery_labels = rng.integers(0, 3, 9), rng.integers(0, 3, 40)
    longer = gallery * rng.uniform(0.2, 5, (40, 1)).astype(np.float32)
    longer[3] = 0
    gallery[3] = 0
    expected = metrics.evaluate(queries, labels, gallery, gallery_labels)
    found = metrics.evaluate(queries * 3, labels, longer, gallery_labels)
    np.testing.assert_allclose(found.ap_all, expected.ap_all)


def test_euclidean_distance_ranks_raw_rows_as_their_differences_do() -> None:
    rng = np.random.default_rng(7)
    queries = rng.integers(-9, 10, (11, 4)).astype(np.float32)
    gallery = rng.integers(-9, 10, (60, 4)).astype(np.float32)
    labels, gallery_labels = rng.integers(0, 3, 11), rng.integers(0, 3, 60)
    found = metrics.evaluate(queries, labels, gallery, gallery_labels, distance="euclidean")
    cosine = metrics.evaluate(queries, labels, gallery, gallery_labels)
    for index in range(11):
        far = ((queries[index] - gallery) ** 2).sum(axis=1)
        order = np.lexsort((np.arange(60), far))
        relevant = (gallery_labels[order] == labels[index]).tolist()
        assert found.ap_all[index] == pytest.approx(loop_ap(relevant))
    assert not np.allclose(found.ap_all, cosine.ap_all)


def test_on_unit_rows_cosine_and_euclidean_distance_agree() -> None:
    rng = np.random.default_rng(8)
    queries, gallery = unit_rows(rng, 20, 8), unit_rows(rng, 90, 8)
    labels, gallery_labels = rng.integers(0, 3, 20), rng.integers(0, 3, 90)
    by_cosine = metrics.evaluate(queries, labels, gallery, gallery_labels)
    by_distance = metrics.evaluate(queries, labels, gallery, gallery_labels, distance="euclidean")
    np.testing.assert_allclose(by_cosine.ap_all, by_distance.ap_all, atol=1e-6)


def test_codes_rank_as_counted_bits_by_index_and_by_expected_value() -> None:
    rng = np.random.default_rng(9)
    itq = fit_itq(unit_rows(rng, 100, 16), 8)
    queries, gallery = unit_rows(rng, 6, 16), unit_rows(rng, 10, 16)
    labels, gallery_labels = rng.integers(0, 2, 6), np.array([0, 1] * 5)
    bits = [np.unpackbits(itq.codes(rows), axis=1).astype(int) for rows in (queries, gallery)]
    by_index, expected = (
        metrics.evaluate(
            itq.codes(queries),
            labels,
            itq.codes(gallery),
            gallery_labels,
            distance="hamming",
            ties=ties,
            ap_cuts=(3,),
            precision_cuts=(3,),
        )
        for ties in ("index", "expected")
    )
    for index in range(6):
        far = np.abs(bits[0][index] - bits[1]).sum(axis=1).tolist()
        relevant = (gallery_labels == labels[index]).tolist()
        ranked = [relevant[row] for row in sorted(range(10), key=lambda row: (far[row], row))]
        assert by_index.ap_all[index] == pytest.approx(loop_ap(ranked))
        near = [-distance for distance in far]
        assert len(set(near)) < 8
        assert expected.ap_all[index] == pytest.approx(mean_over_orders(near, relevant, loop_ap))
        cut = expected.values[Measure("AP", 3, "lenient")][index]
        assert cut == pytest.approx(
            mean_over_orders(near, relevant, lambda order: loop_ap_at(order, 3, "lenient"))
        )
    assert not any(measure.is_voc for measure in expected.values)


def test_expected_values_and_order_agree_where_no_scores_are_equal() -> None:
    rng = np.random.default_rng(10)
    queries, gallery = unit_rows(rng, 20, 8), unit_rows(rng, 230, 8)
    labels, gallery_labels = rng.integers(0, 3, 20), rng.integers(0, 3, 230)
    by_index, expected = (
        metrics.evaluate(queries, labels, gallery, gallery_labels, ties=ties)
        for ties in ("index", "expected")
    )
    for measure, values in expected.values.items():
        np.testing.assert_allclose(values, by_index.values[measure], rtol=1e-9)
    assert set(by_index.values) - set(expected.values) == {
        measure for measure in by_index.values if measure.is_voc
    }


@pytest.mark.parametrize("distance", get_args(Distance))
def test_memory_does_not_grow_with_the_queries(
    distance: Distance, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A 16th of the usual chunk; 400 x 6,000 scores are more than ten such, 10 MB as float32.
    monkeypatch.setattr(metrics, "_CHUNK_SCORES", metrics._CHUNK_SCORES // 16)
    rng = np.random.default_rng(11)
    gallery = rng.standard_normal((6_000, 16), dtype=np.float32)
    gallery_labels = rng.integers(0, 6, len(gallery))
    itq = fit_itq(gallery[:100], 8)
    peaks = []
    for count in (120, 400):
        queries, labels = gallery[:count], gallery_labels[:count]
        is_coded = distance == "hamming"
        asked, searched = (itq.codes(rows) if is_coded else rows for rows in (queries, gallery))
        tracemalloc.start()
        metrics.evaluate(asked, labels, searched, gallery_labels, distance=distance)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] - peaks[0] < 1_000_000
    assert peaks[1] < 5_000_000


def test_numbers_that_are_not_finite_are_named() -> None:
    rng = np.random.default_rng(12)
    rows, labels = unit_rows(rng, 6, 4), np.zeros(6, dtype=np.int64)
    broken = rows.copy()
    broken[2, 1] = np.nan
    for queries, gallery in itertools.permutations([rows, broken]):
        with pytest.raises(BadData, match="not finite"):
            metrics.evaluate(queries, labels, gallery, labels)


def test_codes_and_embeddings_are_not_taken_for_each_other() -> None:
    rows, codes = np.ones((3, 8), dtype=np.float32), np.ones((3, 8), dtype=np.uint8)
    labels = np.zeros(3, dtype=np.int64)
    with pytest.raises(BadData, match="uint8 rows for cosine"):
        metrics.evaluate(rows, labels, codes, labels)
    with pytest.raises(BadData, match="float32 rows for hamming"):
        metrics.evaluate(rows, labels, rows, labels, distance="hamming")


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
