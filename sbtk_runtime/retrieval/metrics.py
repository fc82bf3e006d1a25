"""Retrieval metrics on arrays; every figure that sbtk prints comes from here.

The figures are defined in `average_precision`, and named with their rules by `protocol.Measure`.
Queries without a relevant photo are left out and counted.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from sbtk_runtime.errors import BadData
from sbtk_runtime.hamming import Codes
from sbtk_runtime.rerank import Rerank
from sbtk_runtime.retrieval.average_precision import Values, average_precision, precision_at
from sbtk_runtime.retrieval.placing import Counts, Places, places
from sbtk_runtime.retrieval.protocol import DIVISORS, Distance, Divisor, Measure, Ties
from sbtk_runtime.retrieval.scoring import scorer_of

Embeddings = NDArray[np.float32]
Labels = NDArray[np.int64]

#: Ranks at which AP is cut, and precision taken, unless others are asked for.
AP_CUTS = (200,)
PRECISION_CUTS = (10, 100, 200)

# 16 MB of scores at a time, and as much again in order: more would not be quicker.
_CHUNK_SCORES = 4_000_000
#: As many numbers are held of each relevant photo while figures are taken.
_PLACE_NUMBERS = 12


@dataclass(frozen=True)
class Retrieval:
    """Per-query figures of one evaluation, over the answerable queries in their order.

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

    def figures(self, measures: Sequence[Measure]) -> dict[str, float]:
        """Returns the named means; measures that were not taken are left out.

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
        """Returns the usual means under names that carry their rule."""
        return self.figures(
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
    """Returns the figures of ranking the gallery for each query.

    Works in chunks of queries: it needs some 100 MB, however many they are, beside its input and
    a copy of the gallery where that is not of unit rows and ranked by the cosine.

    Args:
        queries: `(Q, D) float32`, or packed codes `(Q, W) uint8` for the Hamming distance.
        query_labels: `(Q,) int64`, their classes.
        gallery: `(N, D) float32` or `(N, W) uint8`, the photos.
        gallery_labels: `(N,) int64`, their classes.
        distance: what the ranking goes by.
        ties: what becomes of equal scores; see `average_precision`. With `expected` there are no
            figures by the precision envelope.
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
            found = places(scorer.scores(queries[part]), relevant, ties)
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
    """Returns the measures that published figures are of, those of one cut together.

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
    """Returns the mean over classes of the means of `values (N,)` (DSN's average)."""
    return float(np.mean([values[labels == label].mean() for label in np.unique(labels)]))


def recall_at_k(found: NDArray[np.float32], exact: NDArray[np.float32]) -> float:
    """Returns recall by score: the share of `found (Q, k)` no worse than the exact k-th score.

    Judged by score and not by id, so that ties cost nothing. `exact (Q, k)` is sorted, best first.
    """
    worst = exact[:, -1:] - 1e-5
    return float((found >= worst).mean())


def percentiles(latencies_ms: Sequence[float] | NDArray[np.float64]) -> dict[str, float]:
    """Returns p50, p95 and p99 of latencies in milliseconds, `(N,) float64` or a sequence."""
    p50, p95, p99 = np.percentile(np.asarray(latencies_ms, dtype=np.float64), (50, 95, 99))
    return {"p50_ms": float(p50), "p95_ms": float(p95), "p99_ms": float(p99)}


def _both_means(measure: Measure) -> list[Measure]:
    return [measure, replace(measure, mean="class")]


def _measures(ties: Ties, ap_cuts: Sequence[int], precision_cuts: Sequence[int]) -> list[Measure]:
    """Returns what is taken of each query."""
    cuts: list[tuple[int | None, Divisor | None]] = [(None, None)]
    cuts += [(k, divisor) for k in ap_cuts for divisor in DIVISORS]
    envelopes = (False, True) if ties == "index" else (False,)
    taken = [Measure("AP", k, divisor, is_voc) for k, divisor in cuts for is_voc in envelopes]
    return [*taken, *(Measure("P", k) for k in precision_cuts)]


def _value(measure: Measure, found: Places) -> Values:
    if measure.kind == "P":
        return precision_at(found, measure.cut or 0)
    divisor = measure.divisor or "strict"
    return average_precision(found, measure.cut, divisor, is_voc=measure.is_voc)


def _by_class(query_labels: Labels, gallery_labels: Labels) -> Iterator[tuple[Counts, Counts]]:
    """Yields the rows of the queries and of the photos of each class that has both."""
    for label in np.intersect1d(query_labels, gallery_labels):
        yield np.flatnonzero(query_labels == label), np.flatnonzero(gallery_labels == label)
