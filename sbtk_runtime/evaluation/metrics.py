"""Retrieval metrics on arrays: the source of every metric that sbtk prints.

Metrics are defined in `average_precision`, and `protocol.Measure` names them with their rules.
Queries without a relevant photo are excluded and counted.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from sbtk_runtime.binary_codes import Codes, Itq, fit_itq, hamming_distances
from sbtk_runtime.errors import BadConfig, BadData
from sbtk_runtime.evaluation.protocol import (
    DIVISORS,
    CodeRule,
    Distance,
    Divisor,
    Labelled,
    Labels,
    Measure,
    Protocol,
    Ties,
    require_cosine,
)
from sbtk_runtime.rerank import Rerank, Reranker

Embeddings = NDArray[np.float32]

#: Default ranks of AP@k and P@k.
AP_CUTS = (200,)
PRECISION_CUTS = (10, 100, 200)

# 16 MB of scores at a time, and as much for sorting: more is not faster.
_CHUNK_SCORES = 4_000_000
#: Numbers held per relevant photo while metrics are computed.
_PLACE_NUMBERS = 12
#: Largest difference between the embeddings of equal images, in batches of different sizes.
_SAME_WITHIN = 1e-5


@dataclass(frozen=True)
class Retrieval:
    """Metrics of each query of one evaluation, without unanswerable queries.

    Attributes:
        values: values `(Q,) float64` by measure, the mean being over queries.
        labels: labels of the queries, for class means.
        unanswerable: number of queries without a relevant photo.
    """

    values: dict[Measure, Values]
    labels: Labels
    unanswerable: int

    @property
    def ap_all(self) -> Values:
        """Plain AP over the whole gallery."""
        return self.values[Measure("AP")]

    def metrics(self, measures: Sequence[Measure]) -> dict[str, float]:
        """Return the means by name, without measures that were not computed.

        Precision beyond the gallery's size, and the envelope of expected values, do not exist.
        """
        found: dict[str, float] = {}
        for measure in measures:
            values = self.values.get(measure.of_queries)
            if values is not None:
                is_class = measure.mean == "class"
                mean = class_mean(values, self.labels) if is_class else float(values.mean())
                found[measure.name] = mean
        return found

    def summary(self) -> dict[str, float]:
        """Return the usual means, under names that state their rules."""
        return self.metrics(
            [
                Measure("AP"),
                Measure("AP", is_voc=True),
                Measure("AP", mean="class"),
                *(Measure("AP", 200, divisor) for divisor in DIVISORS),
                *(Measure("P", k) for k in PRECISION_CUTS),
            ]
        )


def evaluate(
    queries: Embeddings | Codes,
    query_labels: Labels,
    gallery: Embeddings | Codes,
    gallery_labels: Labels,
    *,
    distance: Distance = "cosine",
    ties: Ties = "index",
    rerank: Rerank = "none",
    ap_cuts: Sequence[int] = AP_CUTS,
    precision_cuts: Sequence[int] = PRECISION_CUTS,
) -> Retrieval:
    """Rank the gallery for each query and return the metrics.

    Queries are processed in chunks, which takes some 100 MB besides the input, plus a copy of the
    gallery for the cosine of rows that are not of unit length.

    Args:
        queries: `(Q, D) float32`, or packed codes `(Q, W) uint8` for the Hamming distance.
        query_labels: `(Q,) int64`, classes of the queries.
        gallery: `(N, D) float32` or `(N, W) uint8`, the photos.
        gallery_labels: `(N,) int64`, classes of the photos.
        distance: distance to rank by.
        ties: how to treat equal scores; see `average_precision`. With `expected` there are no
            metrics with the precision envelope.
        rerank: method that reorders the ranking by cosine, one of `sbtk_runtime.rerank`.
        ap_cuts: ranks k of AP@k.
        precision_cuts: ranks k of P@k; ranks beyond the gallery are ignored.

    Raises:
        BadData: shapes or types do not match, numbers are not finite, or no query has a relevant
            photo.
    """
    if len(queries) != len(query_labels) or len(gallery) != len(gallery_labels):
        raise BadData("different numbers of embeddings and labels", "one label for each row")
    answerable = np.isin(query_labels, gallery_labels)
    if not answerable.any():
        raise BadData("no query has a relevant photo in the gallery")
    scorer = make_scorer(gallery, distance, rerank)
    measures = _measures(ties, ap_cuts, [k for k in precision_cuts if k <= len(gallery)])
    values = {measure: np.full(len(queries), np.nan) for measure in measures}
    for rows, relevant in _by_class(query_labels, gallery_labels):
        step = max(1, _CHUNK_SCORES // (len(gallery) + _PLACE_NUMBERS * len(relevant)))
        for start in range(0, len(rows), step):
            part = rows[start : start + step]
            found = rank_relevant(scorer.scores(queries[part]), relevant, ties)
            for measure in measures:
                values[measure][part] = _value(measure, found)
    return Retrieval(
        {measure: every[answerable] for measure, every in values.items()},
        query_labels[answerable],
        int((~answerable).sum()),
    )


def evaluate_by(
    protocol: Protocol,
    queries: Labelled,
    gallery: Labelled,
    *,
    learnt_on: Embeddings | Itq | None = None,
    ap_cuts: Sequence[int] = AP_CUTS,
    precision_cuts: Sequence[int] = PRECISION_CUTS,
) -> tuple[Retrieval, Protocol]:
    """Return the metrics, and the protocol with the number of embeddings ITQ was fitted on.

    >>> rows = np.eye(4, dtype=np.float32)
    >>> photos = Labelled(rows, np.array([0, 0, 1, 1]))
    >>> sketches = Labelled(rows[::2], np.array([0, 1]))
    >>> retrieval, _ = evaluate_by(Protocol(), sketches, photos)
    >>> retrieval.metrics([Measure("AP")])
    {'mAP@all': 0.875}

    Args:
        protocol: distance, ties and codes; the caller selects queries and gallery by it.
        queries: sketches, or photos selected by `photo_queries`.
        gallery: photos.
        learnt_on: embeddings `(N, D) float32` of training images to fit ITQ on, or a fitted ITQ,
            if the protocol needs them.
        ap_cuts: ranks k of AP@k.
        precision_cuts: ranks k of P@k.

    Raises:
        BadConfig: the protocol needs `learnt_on`, and it is missing.
        BadData: as `evaluate` and `fit_itq`; or all queries, or all photos, have the same
            embedding or code.
    """
    query_rows: Embeddings | Codes = queries.rows
    searched: Embeddings | Codes = gallery.rows
    if protocol.codes is not None:
        for_queries, for_gallery, rule = _itq(protocol.codes, queries, gallery, learnt_on)
        query_rows, searched = for_queries.codes(queries.rows), for_gallery.codes(gallery.rows)
        protocol = replace(protocol, codes=rule)
    _require_difference(query_rows, "queries")
    _require_difference(searched, "photos")
    retrieval = evaluate(
        query_rows,
        queries.labels,
        searched,
        gallery.labels,
        distance=protocol.distance,
        ties=protocol.ties,
        rerank=protocol.rerank,
        ap_cuts=ap_cuts,
        precision_cuts=precision_cuts,
    )
    return retrieval, protocol


def _require_difference(rows: Embeddings | Codes, what: str) -> None:
    """Refuse several rows that are all the same, apart from rounding of embeddings."""
    if len(rows) < 2 or float(np.ptp(rows, axis=0).max()) > _SAME_WITHIN:
        return
    kind = "code" if rows.dtype == np.uint8 else "embedding"
    raise BadData(
        f"all {len(rows):,} {what} have the same {kind}: metrics would not be those of a search",
        "images that differ, and a model that tells them apart",
        "compare some of the images; check the model with 'sbtk models'",
    )


def _itq(
    rule: CodeRule, queries: Labelled, gallery: Labelled, learnt_on: Embeddings | Itq | None
) -> tuple[Itq, Itq, CodeRule]:
    """Return the ITQ of the queries, that of the gallery, and the rule with `fitted_rows` set."""
    if rule.fitted_on == "bundle":
        if not isinstance(learnt_on, Itq) or learnt_on.bits != rule.bits:
            raise BadConfig(f"{rule.bits}-bit codes of a bundle that has none", "its own ITQ")
        return learnt_on, learnt_on, rule
    if rule.fitted_on == "training":
        if learnt_on is None or isinstance(learnt_on, Itq):
            raise BadConfig("ITQ fitted on training images without any", "their embeddings")
        rows = learnt_on
    else:
        rows = queries.rows if rule.fitted_on == "queries" else gallery.rows
    itq = fit_itq(rows, rule.bits, rotation=rule.rotation)
    rule = replace(rule, fitted_rows=len(rows))
    own = itq.centred_on(gallery.rows) if rule.fitted_on == "queries" else itq
    return itq, own, rule


def usual_measures(
    ap_cuts: Sequence[int] = AP_CUTS, precision_cuts: Sequence[int] = PRECISION_CUTS
) -> list[Measure]:
    """Return the measures used in publications, grouped by cut.

    AP is plain and with the envelope; AP@k has every divisor, the strict one (the most common) also
    with the envelope. The most common measures have both means.
    """
    measures: list[Measure] = []
    for k in (None, *ap_cuts):
        divisor: Divisor | None = None if k is None else "strict"
        for is_voc in (False, True):
            measures += _both_means(Measure("AP", k, divisor, is_voc))
        if k is not None:
            measures += [Measure("AP", k, "lenient"), Measure("AP", k, "literal")]
    for k in precision_cuts:
        measures += _both_means(Measure("P", k))
    return measures


def class_mean(values: Values, labels: Labels) -> float:
    """Return the mean over classes of the class means of `values (N,)`, as in DSN."""
    return float(np.mean([values[labels == label].mean() for label in np.unique(labels)]))


def recall_at_k(found: NDArray[np.float32], exact: NDArray[np.float32]) -> float:
    """Return recall by score: the share of `found (Q, k)` no worse than the exact k-th score.

    Comparing scores instead of ids makes ties harmless. `exact (Q, k)` is sorted, best first.
    """
    worst = exact[:, -1:] - 1e-5
    return float((found >= worst).mean())


def percentiles(latencies_ms: Sequence[float] | NDArray[np.float64]) -> dict[str, float]:
    """Return p50, p95 and p99 of latencies in milliseconds, `(N,) float64` or a sequence."""
    p50, p95, p99 = np.percentile(np.asarray(latencies_ms, dtype=np.float64), (50, 95, 99))
    return {"p50_ms": float(p50), "p95_ms": float(p95), "p99_ms": float(p99)}


def _both_means(measure: Measure) -> list[Measure]:
    return [measure, replace(measure, mean="class")]


def _measures(ties: Ties, ap_cuts: Sequence[int], precision_cuts: Sequence[int]) -> list[Measure]:
    """Return the measures to compute for each query."""
    cuts: list[tuple[int | None, Divisor | None]] = [(None, None)]
    cuts += [(k, divisor) for k in ap_cuts for divisor in DIVISORS]
    envelopes = (False, True) if ties == "index" else (False,)
    taken = [Measure("AP", k, divisor, is_voc) for k, divisor in cuts for is_voc in envelopes]
    return [*taken, *(Measure("P", k) for k in precision_cuts)]


def _value(measure: Measure, found: RelevantRanks) -> Values:
    if measure.kind == "P":
        return precision_at(found, measure.cut or 0)
    divisor = measure.divisor or "strict"
    return average_precision(found, measure.cut, divisor, is_voc=measure.is_voc)


def _by_class(query_labels: Labels, gallery_labels: Labels) -> Iterator[tuple[Counts, Counts]]:
    """Yield the rows of queries and photos of each class that has both."""
    for label in np.intersect1d(query_labels, gallery_labels):
        yield np.flatnonzero(query_labels == label), np.flatnonzero(gallery_labels == label)


Counts = NDArray[np.int64]
#: `(Q, N)`, larger is better: float32 for embeddings, signed integers for binary codes.
Scores = NDArray[Any]


@dataclass(frozen=True)
class RelevantRanks:
    """Ranks of the R relevant photos of each of Q queries, best first.

    Attributes:
        above: `(Q, R) int64`, number of photos with a better score.
        tied: `(Q, R) int64`, number of photos with the same score, including the photo itself; if
            it is 1, the rank is `above + 1`.
    """

    above: Counts
    tied: Counts

    @property
    def has_ties(self) -> bool:
        """Whether any photos share a rank."""
        return bool((self.tied > 1).any())


def rank_relevant(scores: Scores, relevant: Counts, ties: Ties) -> RelevantRanks:
    """Return the ranks of the photos `relevant (R,) int64` in each row of `scores (Q, N)`.

    With ties by `index`, photos of equal score are ranked in gallery order.
    """
    if ties == "index":
        scores = _all_different(scores)
    above = np.empty((len(scores), len(relevant)), dtype=np.int64)
    tied = np.empty_like(above)
    ordered = np.sort(scores, axis=1)
    for query, (row, in_order) in enumerate(zip(scores, ordered, strict=True)):
        own = np.sort(row[relevant])[::-1]
        not_above = np.searchsorted(in_order, own, side="right")
        above[query] = len(row) - not_above
        tied[query] = not_above - np.searchsorted(in_order, own, side="left")
    return RelevantRanks(above, tied)


def _all_different(scores: Scores) -> NDArray[np.int64]:
    """Return distinct integers that order scores, and equal scores by gallery order.

    The bits of positive float32 values sort like the values; those of negative ones in reverse,
    except for the sign bit.
    """
    count = scores.shape[1]
    if scores.dtype.kind == "f":
        # Adding zero turns -0 into 0.
        bits = (scores.astype(np.float32, copy=False) + np.float32(0)).view(np.int32)
        scores = np.where(bits < 0, bits ^ np.int32(0x7FFFFFFF), bits)
    return np.asarray(scores.astype(np.int64) * count - np.arange(count))


_LENGTH_TOLERANCE = 1e-3
_MAX_DISTANCE = np.iinfo(np.int16).max


class Scorer:
    """Scores of queries against a gallery.

    Args:
        gallery: `(N, D) float32`, or packed codes `(N, W) uint8` for the Hamming distance. For the
            cosine, rows are normalised unless all lengths are 1 within 1e-3.
        distance: distance to score by.

    Raises:
        BadData: rows of another type, or numbers that are not finite.
    """

    def __init__(self, gallery: Embeddings | Codes, distance: Distance) -> None:
        self.distance = distance
        self.dim = _check_rows(gallery, distance)
        self._gallery = gallery
        self._offset: Embeddings | None = None
        if distance == "hamming":
            return
        squares = np.einsum("nd,nd->n", gallery, gallery)
        if distance == "euclidean":
            # |q - g|^2 / 2 = |g|^2 / 2 - q g + |q|^2 / 2; the last term is the query's own.
            self._offset = squares / 2
        elif (np.abs(np.sqrt(squares) - 1) > _LENGTH_TOLERANCE).any():
            lengths = np.sqrt(np.where(squares > 0, squares, 1))
            self._gallery = (gallery / lengths[:, None]).astype(np.float32)

    def scores(self, queries: Embeddings | Codes) -> Scores:
        """Return the scores `(q, N)` of `queries (q, D)`: float32, or integers for codes.

        Raises:
            BadData: rows of another width or type, or numbers that are not finite.
        """
        if _check_rows(queries, self.distance) != self.dim:
            shapes = f"{queries.shape} and {self._gallery.shape}"
            raise BadData(f"embeddings of shapes {shapes}", "equal widths")
        if self.distance == "hamming":
            distances = hamming_distances(cast(Codes, queries), cast(Codes, self._gallery))
            whole = np.int16 if 8 * self.dim <= _MAX_DISTANCE else np.int32
            nearness: Scores = np.negative(distances.astype(whole))
            return nearness
        scores: Scores = queries @ self._gallery.T
        if self._offset is not None:
            scores -= self._offset
        return scores


class RerankingScorer(Scorer):
    """Scores of queries against a gallery, re-ranked.

    Args:
        gallery: as for `Scorer`, ranked by cosine.
        rerank: a method other than `none`.
    """

    def __init__(self, gallery: Embeddings | Codes, rerank: Rerank) -> None:
        super().__init__(gallery, "cosine")
        self._reranker = Reranker(cast(Embeddings, self._gallery), rerank)

    def scores(self, queries: Embeddings | Codes) -> Scores:
        """Return the scores `(q, N) float32` of unit `queries (q, D)`.

        Raises:
            BadData: rows of another width or type, or numbers that are not finite.
        """
        if _check_rows(queries, self.distance) != self.dim:
            raise BadData(f"embeddings of widths {self.dim} and {queries.shape[1]}", "equal widths")
        return self._reranker.scores(cast(Embeddings, queries))


def make_scorer(gallery: Embeddings | Codes, distance: Distance, rerank: Rerank) -> Scorer:
    """Return the scorer of a gallery of `(N, D) float32` embeddings or `(N, B) uint8` codes.

    Raises:
        BadConfig: unknown re-ranking, or re-ranking of another distance than the cosine.
        BadData: as `Scorer`.
    """
    if rerank == "none":
        return Scorer(gallery, distance)
    require_cosine(rerank, distance)
    return RerankingScorer(gallery, rerank)


def _check_rows(rows: Embeddings | Codes, distance: Distance) -> int:
    """Return the width of rows, after checking their type and values."""
    if rows.ndim != 2:
        raise BadData(f"embeddings of shape {rows.shape}", "shape (N, D)")
    if (rows.dtype == np.uint8) != (distance == "hamming"):
        raise BadData(
            f"{rows.dtype} rows for {distance} distance",
            "packed uint8 codes for the Hamming distance, float32 rows for others",
        )
    if not np.isfinite(rows).all():
        raise BadData("embeddings with numbers that are not finite", "finite numbers")
    return int(rows.shape[1])


Values = NDArray[np.float64]


def average_precision(
    ranks: RelevantRanks, k: int | None = None, divisor: Divisor = "strict", *, is_voc: bool = False
) -> Values:
    """Return AP of each query, `(Q,) float64`, or with `k`, AP@k with a divisor.

    Without a hit within `k`, AP@k is 0. Without any relevant photo, AP is NaN and AP@k is 0.

    Raises:
        BadConfig: the envelope with shared ranks.
    """
    relevant = ranks.above.shape[1]
    if relevant == 0:
        return np.full(len(ranks.above), np.nan if k is None else 0.0)
    sums = _envelope_sums(ranks, k) if is_voc else _sums(ranks, k)
    if k is None:
        return np.asarray(sums / relevant, dtype=np.float64)
    if divisor == "lenient":
        return _divided_by_hits(ranks, k, sums)
    return np.asarray(sums / (min(k, relevant) if divisor == "strict" else relevant))


def precision_at(ranks: RelevantRanks, k: int) -> Values:
    """Return the expected precision at k, `(Q,) float64`."""
    return np.asarray((_count_within(ranks, k) / ranks.tied).sum(axis=1) / k, dtype=np.float64)


def _sums(ranks: RelevantRanks, k: int | None) -> Values:
    return np.asarray(
        _expected_precisions(ranks, _count_within(ranks, k)).sum(axis=1), dtype=np.float64
    )


def _count_within(ranks: RelevantRanks, k: int | None) -> Counts:
    """Return the number of possible ranks of each photo that are within k."""
    if k is None:
        return ranks.tied
    return np.asarray(np.clip(k - ranks.above, 0, ranks.tied))


def _expected_precisions(ranks: RelevantRanks, taken: Counts) -> Values:
    """Return the expected contribution of each relevant photo to the sum of precisions.

    This is the closed form below, summed over the first `taken` ranks of a group of equal scores
    and divided among its relevant photos. With `D = sum_p 1 / (i + p)`, the sum of
    `(p - 1) / (i + p)` is `taken - (i + 1) D`.
    """
    hits_above, group = _groups(ranks.above)
    return _group_sums(ranks.above, hits_above, group, ranks.tied, taken) / ranks.tied


def _group_sums(
    above: Counts, hits_above: Counts, relevant: Counts, tied: Counts, taken: Counts
) -> Values:
    """Return `sum_p (h + 1 + (p - 1)(r - 1) / (n - 1)) / (i + p)` over `taken` ranks."""
    harmonic = _harmonic(int((above + taken).max(initial=0)))
    # For a single rank, a difference of two long sums would lose digits.
    inverses = np.where(taken == 1, 1 / (above + 1), harmonic[above + taken] - harmonic[above])
    growth = (relevant - 1) / np.maximum(tied - 1, 1)
    return np.asarray((hits_above + 1) * inverses + growth * (taken - (above + 1) * inverses))


def _groups(above: Counts) -> tuple[Counts, Counts]:
    """Return, for each relevant photo, the number of relevant ones above it and tied with it."""
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


def _envelope_sums(ranks: RelevantRanks, k: int | None) -> Values:
    if ranks.has_ties:
        raise BadConfig("the precision envelope with expected ties", "--ties index")
    positions = ranks.above + 1
    precisions = np.arange(1, positions.shape[1] + 1) / positions
    is_within = np.ones_like(positions, dtype=np.bool_) if k is None else positions <= k
    envelope = np.maximum.accumulate((precisions * is_within)[:, ::-1], axis=1)[:, ::-1]
    return np.asarray((envelope * is_within).sum(axis=1), dtype=np.float64)


def _divided_by_hits(ranks: RelevantRanks, k: int, sums: Values) -> Values:
    """Return the expected quotient of the sum and the hits within k; 0 without a hit.

    The number of hits is uncertain only if equal scores straddle rank k. Then it is hypergeometric,
    and all orders of the group's first ranks are equally likely.
    """
    is_cut = (ranks.above < k) & (ranks.above + ranks.tied > k)
    hits = (ranks.above + ranks.tied <= k).sum(axis=1)
    values = np.where(hits > 0, sums / np.maximum(hits, 1), 0.0)
    shares = _expected_precisions(ranks, _count_within(ranks, k)) if is_cut.any() else sums[:, None]
    for query in np.flatnonzero(is_cut.any(axis=1)):
        group = np.flatnonzero(is_cut[query])
        above, tied = int(ranks.above[query, group[0]]), int(ranks.tied[query, group[0]])
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
    """Return the probability of `found` relevant photos among `taken` of `tied` photos."""
    logs = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, tied + 1)))])

    def ways(of: int, chosen: Counts) -> Values:
        return np.asarray(logs[of] - logs[chosen] - logs[of - chosen])

    every = ways(tied, np.array([taken]))
    return np.exp(ways(relevant, found) + ways(tied - relevant, taken - found) - every)


def _harmonic(count: int) -> Values:
    """Return the harmonic numbers `0, 1, 1 + 1/2, ...` up to `count`, `(count + 1,) float64`."""
    return np.concatenate([[0.0], np.cumsum(1 / np.arange(1, count + 1))])
