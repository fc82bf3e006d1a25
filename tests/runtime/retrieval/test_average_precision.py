"""AP and precision against scikit-learn, torchmetrics, plain loops and cases done by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray

from sbtk_runtime.errors import BadConfig
from sbtk_runtime.retrieval.average_precision import average_precision, precision_at
from sbtk_runtime.retrieval.placing import Places, places, places_in
from sbtk_runtime.retrieval.protocol import DIVISORS, Divisor, Ties
from tests.retrieval_loops import (
    loop_ap,
    loop_ap_at,
    loop_ap_voc,
    loop_precision,
    mean_over_orders,
)

rankings = arrays(np.bool_, st.integers(1, 40))
divisors = st.sampled_from(DIVISORS)
#: Few scores for some photos, so that many are equal, and few enough photos for every order.
tied_lists = st.lists(
    st.tuples(st.sampled_from([-3, 0, 0, 1, 2]), st.booleans()), min_size=1, max_size=7
)


def _ranking(*relevant: int) -> Places:
    return places_in(np.array(relevant, dtype=np.bool_))


def _tied(scores: list[int], relevant: list[bool], ties: Ties = "expected") -> Places:
    row = np.array([scores], dtype=np.float32)
    return places(row, np.flatnonzero(relevant).astype(np.int64), ties)


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
@settings(max_examples=200, deadline=None)
def test_plain_and_voc_ap_equal_straightforward_loops(relevant: NDArray[np.bool_]) -> None:
    found = places_in(relevant)
    np.testing.assert_allclose(average_precision(found), [loop_ap(list(relevant))])
    np.testing.assert_allclose(average_precision(found, is_voc=True), [loop_ap_voc(list(relevant))])


@given(rankings, st.integers(1, 50), divisors)
@settings(max_examples=200, deadline=None)
def test_figures_at_k_equal_straightforward_loops(
    relevant: NDArray[np.bool_], k: int, divisor: Divisor
) -> None:
    found, listed = places_in(relevant), list(relevant)
    np.testing.assert_allclose(
        average_precision(found, k, divisor), [loop_ap_at(listed, k, divisor)], atol=1e-12
    )
    np.testing.assert_allclose(precision_at(found, k), [loop_precision(listed, k)])
    if relevant.any():
        # The released codes' own AP@k: the envelope of the cut list, by min(k, R).
        expected = [loop_ap_voc(listed, k)]
        np.testing.assert_allclose(average_precision(found, k, "strict", is_voc=True), expected)


@given(tied_lists)
@settings(max_examples=150, deadline=None)
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
@settings(max_examples=150, deadline=None)
def test_expected_figures_at_k_are_means_over_all_orders_of_equal_scores(
    photos: list[tuple[int, bool]], k: int, divisor: Divisor
) -> None:
    scores, relevant = [score for score, _ in photos], [is_hit for _, is_hit in photos]
    found = _tied(scores, relevant)
    expected = mean_over_orders(scores, relevant, lambda order: loop_ap_at(order, k, divisor))
    assert average_precision(found, k, divisor) == pytest.approx([expected])
    share = mean_over_orders(scores, relevant, lambda order: loop_precision(order, k))
    assert precision_at(found, k) == pytest.approx([share])


@given(tied_lists)
@settings(max_examples=100, deadline=None)
def test_ties_by_index_stand_in_the_order_of_the_gallery(photos: list[tuple[int, bool]]) -> None:
    scores, relevant = [score for score, _ in photos], [is_hit for _, is_hit in photos]
    order = sorted(range(len(scores)), key=lambda row: (-scores[row], row))
    ranks = [rank for rank, row in enumerate(order) if relevant[row]]
    as_floats = _tied(scores, relevant, "index")
    as_whole = places(
        np.array([scores], dtype=np.int16), np.flatnonzero(relevant).astype(np.int64), "index"
    )
    for found in (as_floats, as_whole):
        assert found.above.tolist() == [ranks]
        assert not found.has_ties


def test_floats_are_ordered_as_they_are_sorted_whatever_their_sign_and_size() -> None:
    random = np.random.default_rng(1)
    scores = (random.standard_normal((5, 300)) * 10.0 ** random.integers(-40, 30, 300)).astype(
        np.float32
    )
    scores[:, ::7] = 0
    scores[:, ::11] = -0.0
    relevant = np.flatnonzero(random.random(300) < 0.5)
    found = places(scores, relevant, "index")
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
        ranking = places_in(relevant[order])
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


def test_the_closed_form_is_good_to_nine_digits_far_down_a_long_list() -> None:
    # Two relevant among three of equal score, below fifty thousand photos.
    above = 50_000
    found = Places(np.array([[above, above]]), np.array([[3, 3]]))
    orders = [(1, 2), (1, 3), (2, 3)]
    by_hand = [(1 / (above + first) + 2 / (above + second)) / 2 for first, second in orders]
    assert average_precision(found) == pytest.approx([sum(by_hand) / 3], abs=1e-9)


def test_the_envelope_of_shared_places_is_refused() -> None:
    with pytest.raises(BadConfig, match="envelope"):
        average_precision(_tied([1, 1], [True, False]), is_voc=True)


@given(rankings)
@settings(max_examples=100, deadline=None)
def test_plain_ap_equals_scikit_learn(relevant: NDArray[np.bool_]) -> None:
    from sklearn.metrics import average_precision_score

    if relevant.any():
        scores = np.arange(len(relevant), 0, -1, dtype=np.float64)
        expected = [average_precision_score(relevant, scores)]
        np.testing.assert_allclose(average_precision(places_in(relevant)), expected)


@given(rankings, st.integers(1, 50))
@settings(max_examples=100, deadline=None)
def test_ap_and_precision_equal_torchmetrics(relevant: NDArray[np.bool_], k: int) -> None:
    import torch
    from torchmetrics.functional.retrieval import (
        retrieval_average_precision,
        retrieval_precision,
    )

    k = min(k, len(relevant))
    scores = torch.arange(len(relevant), 0, -1, dtype=torch.float64)
    target = torch.from_numpy(relevant.copy())
    found = places_in(relevant)
    if relevant.any():
        whole = float(retrieval_average_precision(scores, target))
        assert average_precision(found)[0] == pytest.approx(whole, abs=1e-6)
    # torchmetrics divides AP@k by the hits within k: the lenient rule.
    cut = float(retrieval_average_precision(scores, target, top_k=k))
    assert average_precision(found, k, "lenient")[0] == pytest.approx(cut, abs=1e-6)
    share = float(retrieval_precision(scores, target, top_k=k))
    assert precision_at(found, k)[0] == pytest.approx(share, abs=1e-6)


@given(rankings, st.integers(1, 45))
@settings(max_examples=100, deadline=None)
def test_the_rules_are_ordered_and_agree_when_nothing_is_cut(
    relevant: NDArray[np.bool_], k: int
) -> None:
    found = places_in(relevant)
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
