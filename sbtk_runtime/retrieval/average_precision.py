"""Average precision and precision from the places of the relevant photos.

`P@i` is the share of relevant photos among the first `i`, `rel_i` is 1 where rank `i` is relevant,
`R` the number of relevant photos in the gallery:

- plain AP: `sum_i P@i rel_i / R`;
- VOC AP (SAKE, DSN): the same with `P@i` replaced by its maximum over ranks `>= i`;
- AP@k: the list is cut after rank `k`, and the sum divided by `min(k, R)` (strict), by the hits
  within `k` (lenient), or by `R` (literal Eq. 7 of the SBTKNet paper).

Where photos share a score, a figure is its expected value over all orders of them, each equally
likely, in closed form (McSherry and Najork, "Computing Information Retrieval Performance Measures
Efficiently in the Presence of Tied Scores", ECIR 2008). Let `n` photos, `r` of them relevant,
share ranks `i + 1 .. i + n` below `h` relevant ones. Rank `i + p` is relevant with probability
`r / n`, and then `h + 1 + (p - 1)(r - 1) / (n - 1)` of the first `i + p` are expected to be. The
envelope has no such form.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from sbtk_runtime.errors import BadConfig
from sbtk_runtime.retrieval.placing import Counts, Places
from sbtk_runtime.retrieval.protocol import Divisor

Values = NDArray[np.float64]


def average_precision(
    places: Places, k: int | None = None, divisor: Divisor = "strict", *, is_voc: bool = False
) -> Values:
    """Returns AP of each query, `(Q,) float64`; with `k`, AP@k by the named divisor.

    A query with no hit within `k` has 0; one without any relevant photo has NaN over the whole
    gallery and 0 at `k`.

    Raises:
        BadConfig: the envelope of places that are shared.
    """
    relevant = places.above.shape[1]
    if relevant == 0:
        return np.full(len(places.above), np.nan if k is None else 0.0)
    sums = _envelope_sums(places, k) if is_voc else _sums(places, k)
    if k is None:
        return np.asarray(sums / relevant, dtype=np.float64)
    if divisor == "lenient":
        return _divided_by_hits(places, k, sums)
    return np.asarray(sums / (min(k, relevant) if divisor == "strict" else relevant))


def precision_at(places: Places, k: int) -> Values:
    """Returns the expected share of relevant photos among the first k, `(Q,) float64`."""
    return np.asarray((_taken(places, k) / places.tied).sum(axis=1) / k, dtype=np.float64)


def _sums(places: Places, k: int | None) -> Values:
    return np.asarray(_expected(places, _taken(places, k)).sum(axis=1), dtype=np.float64)


def _taken(places: Places, k: int | None) -> Counts:
    """Returns how many of the ranks that a photo may have are within k."""
    if k is None:
        return places.tied
    return np.asarray(np.clip(k - places.above, 0, places.tied))


def _expected(places: Places, taken: Counts) -> Values:
    """Returns what each relevant photo adds to the sum of precisions at relevant ranks.

    That is the closed form above, summed over the first `taken` ranks of its group and divided
    among the group's relevant photos; with `D = sum_p 1 / (i + p)`, the sum of `(p - 1) / (i + p)`
    is `taken - (i + 1) D`.
    """
    hits_above, group = _groups(places.above)
    return _group_sums(places.above, hits_above, group, places.tied, taken) / places.tied


def _group_sums(
    above: Counts, hits_above: Counts, relevant: Counts, tied: Counts, taken: Counts
) -> Values:
    """Returns `sum_p (h + 1 + (p - 1)(r - 1) / (n - 1)) / (i + p)` over `taken` ranks."""
    harmonic = _harmonic(int((above + taken).max(initial=0)))
    # A difference of two long sums would lose digits where there is but one rank.
    inverses = np.where(taken == 1, 1 / (above + 1), harmonic[above + taken] - harmonic[above])
    growth = (relevant - 1) / np.maximum(tied - 1, 1)
    return np.asarray((hits_above + 1) * inverses + growth * (taken - (above + 1) * inverses))


def _groups(above: Counts) -> tuple[Counts, Counts]:
    """Returns, for each relevant photo, those strictly above it and those that share its place."""
    count = above.shape[1]
    numbers = np.arange(count)
    is_first = np.ones(above.shape, dtype=np.bool_)
    is_first[:, 1:] = above[:, 1:] != above[:, :-1]
    is_last = np.ones_like(is_first)
    is_last[:, :-1] = is_first[:, 1:]
    first = np.maximum.accumulate(np.where(is_first, numbers, 0), axis=1)
    backwards = np.where(is_last, numbers, count - 1)[:, ::-1]
    last = np.minimum.accumulate(backwards, axis=1)[:, ::-1]
    return first, last - first + 1


def _envelope_sums(places: Places, k: int | None) -> Values:
    if places.has_ties:
        raise BadConfig(
            "the precision envelope of equal scores", "ties by index: it has no expected value"
        )
    ranks = places.above + 1
    precisions = np.arange(1, ranks.shape[1] + 1) / ranks
    is_within = np.ones_like(ranks, dtype=np.bool_) if k is None else ranks <= k
    envelope = np.maximum.accumulate((precisions * is_within)[:, ::-1], axis=1)[:, ::-1]
    return np.asarray((envelope * is_within).sum(axis=1), dtype=np.float64)


def _divided_by_hits(places: Places, k: int, sums: Values) -> Values:
    """Returns the expected value of sum by hits within k, 0 where there is no hit.

    The number of hits is uncertain only where equal scores straddle rank k. There it is
    hypergeometric, and given it, the first ranks of the group are in any order equally likely.
    """
    is_cut = (places.above < k) & (places.above + places.tied > k)
    hits = (places.above + places.tied <= k).sum(axis=1)
    values = np.where(hits > 0, sums / np.maximum(hits, 1), 0.0)
    shares = _expected(places, _taken(places, k)) if is_cut.any() else sums[:, None]
    for query in np.flatnonzero(is_cut.any(axis=1)):
        group = np.flatnonzero(is_cut[query])
        above, tied = int(places.above[query, group[0]]), int(places.tied[query, group[0]])
        before, sure = float(shares[query, : group[0]].sum()), int(group[0])
        taken = k - above
        found = np.arange(
            max(0, taken - (tied - len(group))), min(taken, len(group)) + 1, dtype=np.int64
        )
        chance = _hypergeometric(found, tied, len(group), taken)
        ones = np.ones_like(found)
        inside = (
            found
            / taken
            * _group_sums(above * ones, sure * ones, found, taken * ones, taken * ones)
        )
        total = sure + found
        values[query] = (
            chance * np.where(total > 0, before + inside, 0) / np.maximum(total, 1)
        ).sum()
    return values


def _hypergeometric(found: Counts, tied: int, relevant: int, taken: int) -> Values:
    """Returns the chance that `found` of `taken` photos, drawn from `tied`, are `relevant` ones."""
    logs = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, tied + 1)))])

    def ways(of: int, chosen: Counts) -> Values:
        return np.asarray(logs[of] - logs[chosen] - logs[of - chosen])

    every = ways(tied, np.array([taken]))
    return np.exp(ways(relevant, found) + ways(tied - relevant, taken - found) - every)


def _harmonic(count: int) -> Values:
    """Returns the harmonic numbers `0, 1, 1 + 1/2, ...` up to `count`, `(count + 1,) float64`."""
    return np.concatenate([[0.0], np.cumsum(1 / np.arange(1, count + 1))])
