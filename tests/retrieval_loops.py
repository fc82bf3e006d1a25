"""Reference implementation of retrieval metrics, as plain loops over a ranked list."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence

from sbtk_runtime.evaluation.protocol import Divisor


def loop_ap(relevant: Sequence[bool]) -> float:
    """Return plain AP by definition, or NaN without a relevant photo."""
    hits, total = 0, 0.0
    for rank, is_relevant in enumerate(relevant, start=1):
        if is_relevant:
            hits += 1
            total += hits / rank
    return total / hits if hits else math.nan


def loop_ap_voc(relevant: Sequence[bool], k: int | None = None) -> float:
    """Return VOC AP as in SAKE and DSN: the precision envelope summed over recall steps.

    With `k`, the list is cut and the divisor is `min(k, R)`.
    """
    total = sum(relevant)
    if not total:
        return math.nan
    if k is not None:
        total = min(k, total)
    recalls, precisions, hits = [0.0], [0.0], 0
    for rank, is_relevant in enumerate(relevant[:k], start=1):
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


def loop_ap_at(relevant: Sequence[bool], k: int, divisor: Divisor) -> float:
    """Return AP@k with a divisor; 0 without a hit."""
    hits, total = 0, 0.0
    for rank, is_relevant in enumerate(relevant[:k], start=1):
        if is_relevant:
            hits += 1
            total += hits / rank
    count = sum(relevant)
    by = {"strict": min(k, count), "lenient": hits, "literal": count}[divisor]
    return total / by if hits else 0.0


def loop_precision(relevant: Sequence[bool], k: int) -> float:
    """Return the share of relevant photos among the first k."""
    return sum(relevant[:k]) / k


def mean_over_orders(
    scores: Sequence[int], relevant: Sequence[bool], figure: Callable[[list[bool]], float]
) -> float:
    """Return the mean of a metric over all orders of equal scores."""
    figures = [figure(order) for order in _orders(scores, relevant)]
    return sum(figures) / len(figures)


def _orders(scores: Sequence[int], relevant: Sequence[bool]) -> Iterator[list[bool]]:
    groups = [
        [is_hit for score, is_hit in zip(scores, relevant, strict=True) if score == value]
        for value in sorted(set(scores), reverse=True)
    ]
    for orders in itertools.product(*(itertools.permutations(group) for group in groups)):
        yield [is_hit for group in orders for is_hit in group]
