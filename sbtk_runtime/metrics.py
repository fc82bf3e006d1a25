"""Retrieval metrics on arrays; every figure that sbtk prints comes from here.

Definitions follow the published codes. `P@i` is the share of relevant photos among the first `i`,
`rel_i` is 1 where rank `i` is relevant, `R` the number of relevant photos in the gallery:

- plain AP: `sum_i P@i rel_i / R`;
- VOC AP (SAKE, DSN): the same with `P@i` replaced by its maximum over ranks `>= i`;
- AP@k: cut after rank `k` and divided by `min(k, R)` (strict), by the hits within `k` (lenient),
  or by `R` (literal Eq. 7 of the SBTKNet paper).

Equal scores are ordered by gallery index. Queries without a relevant photo are left out and
counted.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from sbtk_runtime.errors import BadData

Embeddings = NDArray[np.float32]
Labels = NDArray[np.int64]
Relevance = NDArray[np.bool_]
Divisor = Literal["strict", "lenient", "literal"]

_CHUNK_SCORES = 16_000_000


@dataclass(frozen=True)
class Retrieval:
    """Per-query figures of one evaluation; each array is `(Q,) float64` over answerable queries.

    Attributes:
        ap_all: plain AP over the whole gallery.
        ap_voc: VOC AP over the whole gallery.
        ap_at_200: AP@200 by each divisor.
        precision_at: precision at 10, 100 and 200 (those that fit the gallery).
        labels: the queries' labels, for class means.
        unanswerable: queries that have no relevant photo.
    """

    ap_all: NDArray[np.float64]
    ap_voc: NDArray[np.float64]
    ap_at_200: dict[Divisor, NDArray[np.float64]]
    precision_at: dict[int, NDArray[np.float64]]
    labels: Labels
    unanswerable: int

    def summary(self) -> dict[str, float]:
        """Returns the means over queries under names that carry their rule."""
        figures = {
            "mAP@all": float(self.ap_all.mean()),
            "mAP@all (VOC)": float(self.ap_voc.mean()),
            "mAP@all (class mean)": class_mean(self.ap_all, self.labels),
        }
        for divisor, values in self.ap_at_200.items():
            figures[f"mAP@200 ({divisor})"] = float(values.mean())
        for k, values in self.precision_at.items():
            figures[f"P@{k}"] = float(values.mean())
        return figures


def evaluate(
    queries: Embeddings, query_labels: Labels, gallery: Embeddings, gallery_labels: Labels
) -> Retrieval:
    """Returns the figures of ranking `gallery (N, D)` by cosine for each of `queries (Q, D)`.

    Both hold unit rows. Works in chunks of queries, so memory stays flat.

    Raises:
        BadData: shapes do not fit, or no query has a relevant photo.
    """
    if len(queries) != len(query_labels) or len(gallery) != len(gallery_labels):
        raise BadData("embeddings and labels differ in number", "one label for each row")
    if queries.ndim != 2 or gallery.ndim != 2 or queries.shape[1] != gallery.shape[1]:
        raise BadData(f"embeddings of shapes {queries.shape} and {gallery.shape}", "equal widths")
    divisors: tuple[Divisor, ...] = ("strict", "lenient", "literal")
    cuts = [k for k in (10, 100, 200) if k <= len(gallery)]
    rows: list[dict[str, NDArray[np.float64]]] = []
    answerable = np.isin(query_labels, gallery_labels)
    labels = query_labels[answerable]
    if len(labels) == 0:
        raise BadData("no query has a relevant photo in the gallery")
    for relevant in ranked_relevance(queries[answerable], labels, gallery, gallery_labels):
        row = {"all": average_precision(relevant), "voc": average_precision_voc(relevant)}
        row |= {divisor: average_precision_at(relevant, 200, divisor) for divisor in divisors}
        row |= {f"p{k}": precision_at(relevant, k) for k in cuts}
        rows.append(row)
    joined = {key: np.concatenate([row[key] for row in rows]) for key in rows[0]}
    return Retrieval(
        ap_all=joined["all"],
        ap_voc=joined["voc"],
        ap_at_200={divisor: joined[divisor] for divisor in divisors},
        precision_at={k: joined[f"p{k}"] for k in cuts},
        labels=labels,
        unanswerable=int((~answerable).sum()),
    )


def ranked_relevance(
    queries: Embeddings, query_labels: Labels, gallery: Embeddings, gallery_labels: Labels
) -> Iterator[Relevance]:
    """Yields `(q, N) bool` chunks: whether the photo at each rank has the query's label."""
    step = max(1, _CHUNK_SCORES // max(1, len(gallery)))
    for start in range(0, len(queries), step):
        scores = queries[start : start + step] @ gallery.T
        order = np.argsort(-scores, axis=1, kind="stable")
        yield gallery_labels[order] == query_labels[start : start + step, None]


def average_precision(relevant: Relevance) -> NDArray[np.float64]:
    """Returns plain AP `(Q,) float64` of ranked relevance `(Q, N) bool`; NaN without a relevant."""
    hits = relevant.sum(axis=1)
    return _divide((_precision(relevant) * relevant).sum(axis=1), hits)


def average_precision_voc(relevant: Relevance) -> NDArray[np.float64]:
    """Returns AP with the precision envelope `(Q,) float64`; NaN without a relevant."""
    envelope = np.maximum.accumulate(_precision(relevant)[:, ::-1], axis=1)[:, ::-1]
    return _divide((envelope * relevant).sum(axis=1), relevant.sum(axis=1))


def average_precision_at(relevant: Relevance, k: int, divisor: Divisor) -> NDArray[np.float64]:
    """Returns AP@k `(Q,) float64` by the named divisor; 0 for a query without a hit within k."""
    total = relevant.sum(axis=1)
    top = relevant[:, :k]
    sums = (_precision(top) * top).sum(axis=1)
    by = {
        "strict": np.minimum(k, total),
        "lenient": top.sum(axis=1),
        "literal": total,
    }[divisor]
    return np.where(sums > 0, _divide(sums, by), 0.0)


def precision_at(relevant: Relevance, k: int) -> NDArray[np.float64]:
    """Returns the share of relevant photos among the first k, `(Q,) float64`."""
    return np.asarray(relevant[:, :k].sum(axis=1) / float(k), dtype=np.float64)


def class_mean(values: NDArray[np.float64], labels: Labels) -> float:
    """Returns the mean over classes of each class's mean (DSN's average)."""
    return float(np.mean([values[labels == label].mean() for label in np.unique(labels)]))


def recall_at_k(found: NDArray[np.float32], exact: NDArray[np.float32]) -> float:
    """Returns recall by score: the share of `found (Q, k)` no worse than the exact k-th score.

    Judged by score and not by id, so that ties cost nothing. `exact (Q, k)` is sorted, best first.
    """
    worst = exact[:, -1:] - 1e-5
    return float((found >= worst).mean())


def percentiles(latencies_ms: Sequence[float] | NDArray[np.float64]) -> dict[str, float]:
    """Returns p50, p95 and p99 of latencies in milliseconds."""
    p50, p95, p99 = np.percentile(np.asarray(latencies_ms, dtype=np.float64), (50, 95, 99))
    return {"p50_ms": float(p50), "p95_ms": float(p95), "p99_ms": float(p99)}


def _precision(relevant: Relevance) -> NDArray[np.float64]:
    ranks = np.arange(1, relevant.shape[1] + 1, dtype=np.float64)
    return np.cumsum(relevant, axis=1) / ranks


def _divide(sums: NDArray[np.float64], by: NDArray[np.int64]) -> NDArray[np.float64]:
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray(sums / by, dtype=np.float64)
