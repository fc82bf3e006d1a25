"""Evaluation of embeddings and codes, compared with scikit-learn, plain loops and manual cases."""

from __future__ import annotations

import itertools
import math
import tracemalloc
from typing import get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray

from sbtk_runtime.binary_codes import fit_itq
from sbtk_runtime.errors import BadConfig, BadData
from sbtk_runtime.evaluation import metrics
from sbtk_runtime.evaluation.metrics import (
    RelevantRanks,
    average_precision,
    precision_at,
    rank_relevant,
)
from sbtk_runtime.evaluation.protocol import DIVISORS, Distance, Divisor, Measure, Ties
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


def test_evaluate_equals_loops_over_each_query_for_every_metric() -> None:
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


def test_a_gallery_of_equal_rows_is_ranked_in_its_order() -> None:
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
    assert not any(math.isnan(metric) for metric in result.summary().values())


def test_only_unanswerable_queries_are_an_error() -> None:
    rows = unit_rows(np.random.default_rng(3), 3, 4)
    with pytest.raises(BadData, match="no query has a relevant photo"):
        metrics.evaluate(rows, np.array([5, 5, 5]), rows, np.array([0, 1, 2]))


@pytest.mark.parametrize(
    ("queries", "query_labels", "gallery"),
    [((3, 4), 2, (5, 4)), ((3, 4), 3, (5, 6)), ((12,), 12, (5, 4))],
)
def test_mismatched_shapes_are_named(
    queries: tuple[int, ...], query_labels: int, gallery: tuple[int, ...]
) -> None:
    with pytest.raises(BadData):
        metrics.evaluate(
            np.ones(queries, dtype=np.float32),
            np.zeros(query_labels, dtype=np.int64),
            np.ones(gallery, dtype=np.float32),
            np.zeros(gallery[0], dtype=np.int64),
        )


def test_chunks_of_queries_do_not_change_metrics(monkeypatch: pytest.MonkeyPatch) -> None:
    # Integers, so that products do not depend on the order of summation.
    rng = np.random.default_rng(4)
    queries = rng.integers(-3, 4, (17, 6)).astype(np.float32)
    gallery = rng.integers(-3, 4, (50, 6)).astype(np.float32)
    labels, gallery_labels = rng.integers(0, 3, 17), rng.integers(0, 3, 50)
    whole = metrics.evaluate(queries, labels, gallery, gallery_labels, distance="euclidean")
    monkeypatch.setattr(metrics, "_CHUNK_SCORES", 100)
    parts = metrics.evaluate(queries, labels, gallery, gallery_labels, distance="euclidean")
    np.testing.assert_array_equal(whole.ap_all, parts.ap_all)
    assert whole.summary() == parts.summary()


def test_the_cosine_accepts_rows_of_any_norm() -> None:
    rng = np.random.default_rng(6)
    queries, gallery = unit_rows(rng, 9, 5), unit_rows(rng, 40, 5)
    labels, gallery_labels = rng.integers(0, 3, 9), rng.integers(0, 3, 40)
    longer = gallery * rng.uniform(0.2, 5, (40, 1)).astype(np.float32)
    longer[3] = 0
    gallery[3] = 0
    expected = metrics.evaluate(queries, labels, gallery, gallery_labels)
    found = metrics.evaluate(queries * 3, labels, longer, gallery_labels)
    np.testing.assert_allclose(found.ap_all, expected.ap_all)


def test_euclidean_distance_ranks_rows_as_their_differences() -> None:
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
    # A 16th of the usual chunk; 400 x 6,000 scores are more than ten chunks, 10 MB as float32.
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


def test_codes_and_embeddings_are_not_confused() -> None:
    rows, codes = np.ones((3, 8), dtype=np.float32), np.ones((3, 8), dtype=np.uint8)
    labels = np.zeros(3, dtype=np.int64)
    with pytest.raises(BadData, match="uint8 rows for cosine"):
        metrics.evaluate(rows, labels, codes, labels)
    with pytest.raises(BadData, match="float32 rows for hamming"):
        metrics.evaluate(rows, labels, rows, labels, distance="hamming")


def test_the_class_mean_weights_classes_equally() -> None:
    values = np.array([1.0, 1.0, 1.0, 0.0])
    assert metrics.class_mean(values, np.array([7, 7, 7, 2])) == pytest.approx(0.5)
    assert float(values.mean()) == pytest.approx(0.75)


def test_the_summary_names_the_rule_of_every_metric() -> None:
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


def test_perfect_and_reversed_rankings_give_the_extreme_values() -> None:
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
    assert metrics.percentiles(list(range(101))) == {"p50_ms": 50.0, "p95_ms": 95.0, "p99_ms": 99.0}


rankings = arrays(np.bool_, st.integers(1, 40))
divisors = st.sampled_from(DIVISORS)
#: Few scores for few photos, so that many are equal and all orders can be tried.
tied_lists = st.lists(
    st.tuples(st.sampled_from([-3, 0, 0, 1, 2]), st.booleans()), min_size=1, max_size=7
)


def _ranking(*relevant: int) -> RelevantRanks:
    return _rank_listed(np.array(relevant, dtype=np.bool_))


def _rank_listed(relevant: NDArray[np.bool_]) -> RelevantRanks:
    above = np.flatnonzero(relevant)[None, :]
    return RelevantRanks(above, np.ones_like(above))


def _tied(scores: list[int], relevant: list[bool], ties: Ties = "expected") -> RelevantRanks:
    row = np.array([scores], dtype=np.float32)
    return rank_relevant(row, np.flatnonzero(relevant).astype(np.int64), ties)


def test_plain_ap_of_a_case_worked_by_hand() -> None:
    # Relevant at ranks 1, 3 and 6: (1/1 + 2/3 + 3/6) / 3.
    found = average_precision(_ranking(1, 0, 1, 0, 0, 1))
    assert found == pytest.approx([(1 + 2 / 3 + 1 / 2) / 3])


def test_voc_ap_of_a_case_worked_by_hand() -> None:
    # Precisions at the hits are 1/2, 2/4 and 3/5; the envelope lifts all three to 3/5.
    ranking = _ranking(0, 1, 0, 1, 1)
    assert average_precision(ranking) == pytest.approx([(1 / 2 + 2 / 4 + 3 / 5) / 3])
    assert average_precision(ranking, is_voc=True) == pytest.approx([3 / 5])


def test_voc_ap_at_k_sees_nothing_beyond_the_cut() -> None:
    # Cut after rank 4, hits at 2 and 4: both 1/2, and the 3/5 at rank 5 lifts neither.
    ranking = _ranking(0, 1, 0, 1, 1)
    assert average_precision(ranking, 4, "strict", is_voc=True) == pytest.approx([(2 / 2) / 3])


def test_ap_at_k_of_a_case_worked_by_hand_by_all_three_divisors() -> None:
    # Four relevant, two of them within k = 3: the sum is 1/1 + 2/3.
    ranking = _ranking(1, 0, 1, 0, 1, 1)
    total = 1 + 2 / 3
    assert average_precision(ranking, 3, "strict") == pytest.approx([total / 3])
    assert average_precision(ranking, 3, "lenient") == pytest.approx([total / 2])
    assert average_precision(ranking, 3, "literal") == pytest.approx([total / 4])


def test_expected_values_of_a_case_worked_by_hand() -> None:
    # One relevant among three of equal score: at rank 1, 2 or 3, each as likely.
    found = _tied([5, 5, 5], [False, True, False])
    assert average_precision(found) == pytest.approx([(1 + 1 / 2 + 1 / 3) / 3])
    assert average_precision(found, 2, "strict") == pytest.approx([(1 + 1 / 2) / 3])
    assert average_precision(found, 2, "lenient") == pytest.approx([(1 + 1 / 2 + 0) / 3])
    assert precision_at(found, 2) == pytest.approx([2 / 3 / 2])


@given(rankings)
@settings(max_examples=200)
def test_plain_and_voc_ap_equal_straightforward_loops(relevant: NDArray[np.bool_]) -> None:
    found = _rank_listed(relevant)
    np.testing.assert_allclose(average_precision(found), [loop_ap(list(relevant))])
    np.testing.assert_allclose(average_precision(found, is_voc=True), [loop_ap_voc(list(relevant))])


@given(rankings, st.integers(1, 50), divisors)
@settings(max_examples=200)
def test_metrics_at_k_equal_straightforward_loops(
    relevant: NDArray[np.bool_], k: int, divisor: Divisor
) -> None:
    found, listed = _rank_listed(relevant), list(relevant)
    np.testing.assert_allclose(
        average_precision(found, k, divisor), [loop_ap_at(listed, k, divisor)], atol=1e-12
    )
    np.testing.assert_allclose(precision_at(found, k), [loop_precision(listed, k)])
    if relevant.any():
        # The released codes' own AP@k: the envelope of the cut list, by min(k, R).
        expected = [loop_ap_voc(listed, k)]
        np.testing.assert_allclose(average_precision(found, k, "strict", is_voc=True), expected)


@given(tied_lists)
@settings(max_examples=150)
def test_expected_ap_is_the_mean_over_all_orders_of_equal_scores(
    photos: list[tuple[int, bool]],
) -> None:
    scores, relevant = [score for score, _ in photos], [is_hit for _, is_hit in photos]
    found = _tied(scores, relevant)
    if any(relevant):
        expected = mean_over_orders(scores, relevant, loop_ap)
        assert average_precision(found) == pytest.approx([expected])
    else:
        assert np.isnan(average_precision(found)).all()


@given(tied_lists, st.integers(1, 8), divisors)
@settings(max_examples=150)
def test_expected_metrics_at_k_are_means_over_all_orders_of_equal_scores(
    photos: list[tuple[int, bool]], k: int, divisor: Divisor
) -> None:
    scores, relevant = [score for score, _ in photos], [is_hit for _, is_hit in photos]
    found = _tied(scores, relevant)
    expected = mean_over_orders(scores, relevant, lambda order: loop_ap_at(order, k, divisor))
    assert average_precision(found, k, divisor) == pytest.approx([expected])
    share = mean_over_orders(scores, relevant, lambda order: loop_precision(order, k))
    assert precision_at(found, k) == pytest.approx([share])


@given(tied_lists)
@settings(max_examples=100)
def test_ties_by_index_follow_the_order_of_the_gallery(photos: list[tuple[int, bool]]) -> None:
    scores, relevant = [score for score, _ in photos], [is_hit for _, is_hit in photos]
    order = sorted(range(len(scores)), key=lambda row: (-scores[row], row))
    ranks = [rank for rank, row in enumerate(order) if relevant[row]]
    as_floats = _tied(scores, relevant, "index")
    as_whole = rank_relevant(
        np.array([scores], dtype=np.int16), np.flatnonzero(relevant).astype(np.int64), "index"
    )
    for found in (as_floats, as_whole):
        assert found.above.tolist() == [ranks]
        assert not found.has_ties


def test_ranks_equal_a_stable_sort_for_floats_of_any_sign_and_size() -> None:
    random = np.random.default_rng(1)
    scores = (random.standard_normal((5, 300)) * 10.0 ** random.integers(-40, 30, 300)).astype(
        np.float32
    )
    scores[:, ::7] = 0
    scores[:, ::11] = -0.0
    relevant = np.flatnonzero(random.random(300) < 0.5)
    found = rank_relevant(scores, relevant, "index")
    for row, above in zip(scores, found.above, strict=True):
        order = np.argsort(-row, kind="stable")
        assert above.tolist() == np.flatnonzero(np.isin(order, relevant)).tolist()


def test_expected_values_of_large_groups_equal_a_mean_over_many_random_orders() -> None:
    random = np.random.default_rng(0)
    scores = random.integers(0, 4, 400)
    relevant = random.random(400) < 0.1 + 0.1 * scores
    found = _tied(scores.tolist(), relevant.tolist())
    drawn: dict[str, list[float]] = {"all": [], "lenient": [], "strict": [], "P": []}
    for _ in range(1500):
        order = np.lexsort((random.random(400), -scores))
        ranking = _rank_listed(relevant[order])
        drawn["all"].append(float(average_precision(ranking)[0]))
        drawn["lenient"].append(float(average_precision(ranking, 50, "lenient")[0]))
        drawn["strict"].append(float(average_precision(ranking, 50, "strict")[0]))
        drawn["P"].append(float(precision_at(ranking, 50)[0]))
    expected = {
        "all": average_precision(found)[0],
        "lenient": average_precision(found, 50, "lenient")[0],
        "strict": average_precision(found, 50, "strict")[0],
        "P": precision_at(found, 50)[0],
    }
    for name, values in drawn.items():
        spread = float(np.std(values)) / math.sqrt(len(values))
        assert float(np.mean(values)) == pytest.approx(expected[name], abs=4 * spread)
        assert spread > 0


def test_the_closed_form_is_accurate_to_nine_digits_in_long_lists() -> None:
    # Two relevant among three of equal score, below fifty thousand photos.
    above = 50_000
    found = RelevantRanks(np.array([[above, above]]), np.array([[3, 3]]))
    orders = [(1, 2), (1, 3), (2, 3)]
    by_hand = [(1 / (above + first) + 2 / (above + second)) / 2 for first, second in orders]
    assert average_precision(found) == pytest.approx([sum(by_hand) / 3], abs=1e-9)


def test_the_envelope_of_shared_places_is_refused() -> None:
    with pytest.raises(BadConfig, match="envelope"):
        average_precision(_tied([1, 1], [True, False]), is_voc=True)


@given(rankings)
@settings(max_examples=100)
def test_plain_ap_equals_scikit_learn(relevant: NDArray[np.bool_]) -> None:
    from sklearn.metrics import average_precision_score

    if relevant.any():
        scores = np.arange(len(relevant), 0, -1, dtype=np.float64)
        expected = [average_precision_score(relevant, scores)]
        np.testing.assert_allclose(average_precision(_rank_listed(relevant)), expected)


@given(rankings, st.integers(1, 50))
@settings(max_examples=100)
def test_ap_and_precision_equal_torchmetrics(relevant: NDArray[np.bool_], k: int) -> None:
    import torch
    from torchmetrics.functional.retrieval import (
        retrieval_average_precision,
        retrieval_precision,
    )

    k = min(k, len(relevant))
    scores = torch.arange(len(relevant), 0, -1, dtype=torch.float64)
    target = torch.from_numpy(relevant.copy())
    found = _rank_listed(relevant)
    if relevant.any():
        whole = float(retrieval_average_precision(scores, target))
        assert average_precision(found)[0] == pytest.approx(whole, abs=1e-6)
    # torchmetrics divides AP@k by the hits within k: the lenient rule.
    cut = float(retrieval_average_precision(scores, target, top_k=k))
    assert average_precision(found, k, "lenient")[0] == pytest.approx(cut, abs=1e-6)
    share = float(retrieval_precision(scores, target, top_k=k))
    assert precision_at(found, k)[0] == pytest.approx(share, abs=1e-6)


@given(rankings, st.integers(1, 45))
@settings(max_examples=100)
def test_the_rules_are_ordered_and_agree_when_nothing_is_cut(
    relevant: NDArray[np.bool_], k: int
) -> None:
    found = _rank_listed(relevant)
    if not relevant.any():
        return
    plain, voc = average_precision(found), average_precision(found, is_voc=True)
    assert (plain - 1e-12 <= voc).all()
    assert (voc <= 1 + 1e-12).all()
    for divisor in DIVISORS:
        np.testing.assert_allclose(average_precision(found, len(relevant), divisor), plain)
    lenient, strict, literal = (
        average_precision(found, k, divisor) for divisor in ("lenient", "strict", "literal")
    )
    assert (lenient >= strict - 1e-12).all()
    assert (strict >= literal - 1e-12).all()


def test_a_query_without_a_relevant_photo_is_nan_alone_and_zero_at_k() -> None:
    none = _ranking(0, 0, 0, 0, 0)
    assert np.isnan(average_precision(none)).all()
    assert np.isnan(average_precision(none, is_voc=True)).all()
    for divisor in DIVISORS:
        assert average_precision(none, 3, divisor) == [0.0]
    assert precision_at(none, 3) == [0.0]
