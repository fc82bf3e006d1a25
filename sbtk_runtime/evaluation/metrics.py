"""Retrieval metrics on arrays; every metric that sbtk prints comes from here.

The metrics are defined in `average_precision`, and named with their rules by `protocol.Measure`.
Queries without a relevant photo are left out and counted.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from sbtk_runtime.binary_codes import Codes, hamming_distances
from sbtk_runtime.errors import BadConfig, BadData
from sbtk_runtime.evaluation.protocol import (
    DIVISORS,
    Distance,
    Divisor,
    Measure,
    Ties,
    require_cosine,
)
from sbtk_runtime.rerank import Rerank, Reranker

Embeddings = NDArray[np.float32]
Labels = NDArray[np.int64]

#: Ranks at which AP is cut, and precision taken, unless others are asked for.
AP_CUTS = (200,)
PRECISION_CUTS = (10, 100, 200)

# 16 MB of scores at a time, and as much again in order: more would not be quicker.
_CHUNK_SCORES = 4_000_000
#: As many numbers are held of each relevant photo while metrics are taken.
_PLACE_NUMBERS = 12


@dataclass(frozen=True)
class Retrieval:
    """Per-query metrics of one evaluation, over the answerable queries in their order.

    Attributes:
        values: measure, with the mean over queries, to `(Q,) float64`.
        labels: the queries' labels, for class means.
        unanswerable: queries that have no relevant photo.
    """

    values: dict[Measure, Values]
    labels: Labels
    unanswerable: int

    @property
    def ap_all(self) -> Values:
        """Plain AP over the whole gallery."""
        return self.values[Measure("AP")]

    def metrics(self, measures: Sequence[Measure]) -> dict[str, float]:
        """Return the named means; measures that were not taken are left out.

        Precision beyond the gallery's size and the envelope of expected values are not taken.
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
        """Return the usual means under names that carry their rule."""
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
    """Return the metrics of ranking the gallery for each query.

    Works in chunks of queries: it needs some 100 MB, however many they are, beside its input and
    a copy of the gallery where that is not of unit rows and ranked by the cosine.

    Args:
        queries: `(Q, D) float32`, or packed codes `(Q, W) uint8` for the Hamming distance.
        query_labels: `(Q,) int64`, their classes.
        gallery: `(N, D) float32` or `(N, W) uint8`, the photos.
        gallery_labels: `(N,) int64`, their classes.
        distance: what the ranking goes by.
        ties: what becomes of equal scores; see `average_precision`. With `expected` there are no
            metrics by the precision envelope.
        rerank: what puts the gallery in another order than the cosine; nothing, or one of
            `sbtk_runtime.rerank`.
        ap_cuts: ranks k of AP@k.
        precision_cuts: ranks k of P@k; those beyond the gallery are left out.

    Raises:
        BadData: shapes or types do not fit, numbers are not finite, or no query has a relevant
            photo.
    """
    if len(queries) != len(query_labels) or len(gallery) != len(gallery_labels):
        raise BadData("embeddings and labels differ in number", "one label for each row")
    answerable = np.isin(query_labels, gallery_labels)
    if not answerable.any():
        raise BadData("no query has a relevant photo in the gallery")
    scorer = scorer_of(gallery, distance, rerank)
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


def usual_measures(
    ap_cuts: Sequence[int] = AP_CUTS, precision_cuts: Sequence[int] = PRECISION_CUTS
) -> list[Measure]:
    """Return the measures that published metrics are of, those of one cut together.

    AP is plain and by the envelope, at a cut by every divisor; the strict one, which most codes
    take, by the envelope, too. What is usual has both means.
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
    """Return the mean over classes of the means of `values (N,)` (DSN's average)."""
    return float(np.mean([values[labels == label].mean() for label in np.unique(labels)]))


def recall_at_k(found: NDArray[np.float32], exact: NDArray[np.float32]) -> float:
    """Return recall by score: the share of `found (Q, k)` no worse than the exact k-th score.

    Judged by score and not by id, so that ties cost nothing. `exact (Q, k)` is sorted, best first.
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
    """Return what is taken of each query."""
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
    """Yield the rows of the queries and of the photos of each class that has both."""
    for label in np.intersect1d(query_labels, gallery_labels):
        yield np.flatnonzero(query_labels == label), np.flatnonzero(gallery_labels == label)


Counts = NDArray[np.int64]
#: `(Q, N)`, larger is better: float32 of embeddings, or a signed integer for binary codes.
Scores = NDArray[Any]


@dataclass(frozen=True)
class RelevantRanks:
    """The places of the R relevant photos of each of Q queries, best first.

    Attributes:
        above: `(Q, R) int64`: how many photos stand strictly above.
        tied: `(Q, R) int64`: how many share the place, the photo itself included; 1 where the
            rank is `above + 1` for sure.
    """

    above: Counts
    tied: Counts

    @property
    def has_ties(self) -> bool:
        """Whether some rank is uncertain."""
        return bool((self.tied > 1).any())


def rank_relevant(scores: Scores, relevant: Counts, ties: Ties) -> RelevantRanks:
    """Return the places of the photos `relevant (R,) int64` in each row of `scores (Q, N)`.

    With ties by `index`, photos of equal score stand in the order of the gallery.
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


def rank_listed(ranking: NDArray[np.bool_]) -> RelevantRanks:
    """Return the places in one ranked list `(N,) bool` that says which photos are relevant."""
    above = np.flatnonzero(ranking)[None, :].astype(np.int64)
    return RelevantRanks(above, np.ones_like(above))


def _all_different(scores: Scores) -> NDArray[np.int64]:
    """Return whole numbers in the order of the scores, and of the gallery where these are equal.

    The bits of a positive float32 are in the order of its value; those of a negative one in
    reverse, but for the sign.
    """
    count = scores.shape[1]
    if scores.dtype.kind == "f":
        # Adding zero makes -0 and 0 the same bits.
        bits = (scores.astype(np.float32, copy=False) + np.float32(0)).view(np.int32)
        scores = np.where(bits < 0, bits ^ np.int32(0x7FFFFFFF), bits)
    return np.asarray(scores.astype(np.int64) * count - np.arange(count))


_LENGTH_TOLERANCE = 1e-3
_MAX_DISTANCE = np.iinfo(np.int16).max


class Scorer:
    """A gallery that queries are scored against.

    Args:
        gallery: `(N, D) float32`, or packed codes `(N, W) uint8` for the Hamming distance. For the
            cosine, rows whose length is not 1 within 1e-3 are divided by it.
        distance: by which photos are near or far.

    Raises:
        BadData: rows of another type, or numbers that are not finite.
    """

    def __init__(self, gallery: Embeddings | Codes, distance: Distance) -> None:
        self.distance = distance
        self.dim = _checked_dim(gallery, distance)
        self._gallery = gallery
        self._offset: Embeddings | None = None
        if distance == "hamming":
            return
        squares = np.einsum("nd,nd->n", gallery, gallery)
        if distance == "euclidean":
            # |q - g|^2 / 2 is |g|^2 / 2 - q g, and a number of the query's own.
            self._offset = squares / 2
        elif (np.abs(np.sqrt(squares) - 1) > _LENGTH_TOLERANCE).any():
            lengths = np.sqrt(np.where(squares > 0, squares, 1))
            self._gallery = (gallery / lengths[:, None]).astype(np.float32)

    def scores(self, queries: Embeddings | Codes) -> Scores:
        """Return the scores of `queries (q, D)`, `(q, N)`: float32, or whole numbers of codes.

        Raises:
            BadData: rows of another width or type, or numbers that are not finite.
        """
        if _checked_dim(queries, self.distance) != self.dim:
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
    """A gallery of embeddings that is put in another order than the cosine's.

    Args:
        gallery: as `Scorer` takes it, ranked by the cosine.
        rerank: other than `none`.
    """

    def __init__(self, gallery: Embeddings | Codes, rerank: Rerank) -> None:
        super().__init__(gallery, "cosine")
        self._reranker = Reranker(cast(Embeddings, self._gallery), rerank)

    def scores(self, queries: Embeddings | Codes) -> Scores:
        """Return what photos are ordered by, `(q, N) float32`, of unit `queries (q, D)`.

        Raises:
            BadData: rows of another width or type, or numbers that are not finite.
        """
        if _checked_dim(queries, self.distance) != self.dim:
            raise BadData(f"embeddings {self.dim} and {queries.shape[1]} wide", "equal widths")
        return self._reranker.scores(cast(Embeddings, queries))


def scorer_of(gallery: Embeddings | Codes, distance: Distance, rerank: Rerank) -> Scorer:
    """Return what scores queries against the gallery, `(N, D) float32` or `(N, B) uint8` codes.

    Raises:
        BadConfig: there is no such re-ranking, or the distance is not the cosine.
        BadData: as `Scorer`.
    """
    if rerank == "none":
        return Scorer(gallery, distance)
    require_cosine(rerank, distance)
    return RerankingScorer(gallery, rerank)


def _checked_dim(rows: Embeddings | Codes, distance: Distance) -> int:
    if rows.ndim != 2:
        raise BadData(f"embeddings of shape {rows.shape}", "rows of equal width, (N, D)")
    if (rows.dtype == np.uint8) != (distance == "hamming"):
        raise BadData(
            f"{rows.dtype} rows for {distance} distance",
            "packed uint8 codes for the Hamming distance, float32 rows for any other",
        )
    if not np.isfinite(rows).all():
        raise BadData("embeddings with numbers that are not finite", "finite numbers")
    return int(rows.shape[1])


Values = NDArray[np.float64]


def average_precision(
    ranks: RelevantRanks, k: int | None = None, divisor: Divisor = "strict", *, is_voc: bool = False
) -> Values:
    """Return AP of each query, `(Q,) float64`; with `k`, AP@k by the named divisor.

    A query with no hit within `k` has 0; one without any relevant photo has NaN over the whole
    gallery and 0 at `k`.

    Raises:
        BadConfig: the envelope of places that are shared.
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
    """Return the expected share of relevant photos among the first k, `(Q,) float64`."""
    return np.asarray((_taken(ranks, k) / ranks.tied).sum(axis=1) / k, dtype=np.float64)


def _sums(ranks: RelevantRanks, k: int | None) -> Values:
    return np.asarray(_expected(ranks, _taken(ranks, k)).sum(axis=1), dtype=np.float64)


def _taken(ranks: RelevantRanks, k: int | None) -> Counts:
    """Return how many of the ranks that a photo may have are within k."""
    if k is None:
        return ranks.tied
    return np.asarray(np.clip(k - ranks.above, 0, ranks.tied))


def _expected(ranks: RelevantRanks, taken: Counts) -> Values:
    """Return what each relevant photo adds to the sum of precisions at relevant ranks.

    That is the closed form above, summed over the first `taken` ranks of its group and divided
    among the group's relevant photos; with `D = sum_p 1 / (i + p)`, the sum of `(p - 1) / (i + p)`
    is `taken - (i + 1) D`.
    """
    hits_above, group = _groups(ranks.above)
    return _group_sums(ranks.above, hits_above, group, ranks.tied, taken) / ranks.tied


def _group_sums(
    above: Counts, hits_above: Counts, relevant: Counts, tied: Counts, taken: Counts
) -> Values:
    """Return `sum_p (h + 1 + (p - 1)(r - 1) / (n - 1)) / (i + p)` over `taken` ranks."""
    harmonic = _harmonic(int((above + taken).max(initial=0)))
    # A difference of two long sums would lose digits where there is but one rank.
    inverses = np.where(taken == 1, 1 / (above + 1), harmonic[above + taken] - harmonic[above])
    growth = (relevant - 1) / np.maximum(tied - 1, 1)
    return np.asarray((hits_above + 1) * inverses + growth * (taken - (above + 1) * inverses))


def _groups(above: Counts) -> tuple[Counts, Counts]:
    """Return, for each relevant photo, those strictly above it and those that share its place."""
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
        raise BadConfig(
            "the precision envelope of equal scores", "ties by index: it has no expected value"
        )
    positions = ranks.above + 1
    precisions = np.arange(1, positions.shape[1] + 1) / positions
    is_within = np.ones_like(positions, dtype=np.bool_) if k is None else positions <= k
    envelope = np.maximum.accumulate((precisions * is_within)[:, ::-1], axis=1)[:, ::-1]
    return np.asarray((envelope * is_within).sum(axis=1), dtype=np.float64)


def _divided_by_hits(ranks: RelevantRanks, k: int, sums: Values) -> Values:
    """Return the expected value of sum by hits within k, 0 where there is no hit.

    The number of hits is uncertain only where equal scores straddle rank k. There it is
    hypergeometric, and given it, the first ranks of the group are in any order equally likely.
    """
    is_cut = (ranks.above < k) & (ranks.above + ranks.tied > k)
    hits = (ranks.above + ranks.tied <= k).sum(axis=1)
    values = np.where(hits > 0, sums / np.maximum(hits, 1), 0.0)
    shares = _expected(ranks, _taken(ranks, k)) if is_cut.any() else sums[:, None]
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
    """Return the chance that `found` of `taken` photos, drawn from `tied`, are `relevant` ones."""
    logs = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, tied + 1)))])

    def ways(of: int, chosen: Counts) -> Values:
        return np.asarray(logs[of] - logs[chosen] - logs[of - chosen])

    every = ways(tied, np.array([taken]))
    return np.exp(ways(relevant, found) + ways(tied - relevant, taken - found) - every)


def _harmonic(count: int) -> Values:
    """Return the harmonic numbers `0, 1, 1 + 1/2, ...` up to `count`, `(count + 1,) float64`."""
    return np.concatenate([[0.0], np.cumsum(1 / np.arange(1, count + 1))])
