"""The names of figures, which carry their rules, taken apart again."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import get_args

from sbtk_runtime.retrieval.protocol import Divisor, Measure

_NAME = re.compile(r"(mAP|P)@(all|\d{1,9})(?: \((.+)\))?")


def measure_named(name: str) -> Measure | None:
    """Returns the measure whose name this is, or `None` where it is that of no mAP or precision."""
    match = _NAME.fullmatch(name)
    if match is None:
        return None
    words = (match[3] or "").split(", ")
    divisors: tuple[Divisor, ...] = get_args(Divisor)
    measure = Measure(
        "AP" if match[1] == "mAP" else "P",
        None if match[2] == "all" else int(match[2]),
        next((divisor for divisor in divisors if divisor in words), None),
        "VOC" in words,
        "class" if "class mean" in words else "query",
    )
    return measure if measure.name == name else None


def base_name(measure: Measure) -> str:
    """Returns the name without its rules, as papers print it: `mAP@200`."""
    return measure.name.partition(" ")[0]


def best_figure(names: Iterable[str], base: str) -> tuple[str, Measure] | None:
    """Returns the figure `base`, such as `mAP@200`, by the rules nearest to SAKE's and SBTKNet's.

    Those are the mean over queries, the strict divisor and VOC's envelope, in this order of
    importance.
    """
    measures = [(name, measure) for name in names if (measure := measure_named(name)) is not None]
    found = [pair for pair in measures if base_name(pair[1]) == base]
    return min(found, key=lambda pair: _distance(pair[1]), default=None)


def _distance(measure: Measure) -> tuple[bool, bool, bool]:
    return (
        measure.mean != "query",
        measure.divisor not in (None, "strict"),
        measure.kind == "AP" and not measure.is_voc,
    )
