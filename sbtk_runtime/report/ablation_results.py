"""Results of the ablation, as `sbtk train --ablation` writes them: one figure on each line."""

from __future__ import annotations

import csv
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from sbtk_runtime.errors import BadData
from sbtk_runtime.names import printable_name, printable_text

REQUIRED = ("row", "seed", "figure", "value")


@dataclass(frozen=True)
class AblationResult:
    """One figure of one training.

    Attributes:
        row: which objectives were trained.
        seed: of the training.
        classes: `validation` or `unseen`; empty where the file does not say.
        figure: its name, in the manner of `sbtk bench map`.
        value: share in 0..1.
    """

    row: str
    seed: str
    classes: str
    figure: str
    value: float


@dataclass(frozen=True)
class Spread:
    """A figure over several seeds: mean and sample standard deviation (`None` for one seed)."""

    mean: float
    deviation: float | None
    seeds: int


def read_ablation(path: Path) -> list[AblationResult]:
    """Returns the lines of a results file.

    Raises:
        BadData: it cannot be read, lacks a column, or holds a line that is no result.
    """
    shown = printable_name(path)
    try:
        with path.open(encoding="utf-8", newline="") as file:
            reader = csv.DictReader(file)
            missing = [name for name in REQUIRED if name not in (reader.fieldnames or ())]
            if missing:
                raise BadData(
                    f"{shown} has no column {', '.join(missing)}",
                    f"a CSV file with the columns {', '.join(REQUIRED)}",
                    "give the results file of 'sbtk train --ablation'",
                )
            results = [_result(line, f"{shown}, line {reader.line_num}") for line in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as problem:
        reason = problem.strerror if isinstance(problem, OSError) else str(problem)
        raise BadData(f"{shown} cannot be read: {reason}", "a CSV file") from problem
    if not results:
        raise BadData(f"{shown} holds no result", "a line for each row, seed and figure")
    return _without_repeats(results, shown)


def spread_over_seeds(
    results: Iterable[AblationResult],
) -> dict[tuple[str, str], dict[str, Spread]]:
    """Returns the spread of each figure, by classes and row, both in the order of the file."""
    values: dict[tuple[str, str], dict[str, list[float]]] = {}
    for result in results:
        figures = values.setdefault((result.classes, result.row), {})
        figures.setdefault(result.figure, []).append(result.value)
    return {
        key: {name: _spread(found) for name, found in figures.items()}
        for key, figures in values.items()
    }


def _spread(values: Sequence[float]) -> Spread:
    deviation = statistics.stdev(values) if len(values) > 1 else None
    return Spread(statistics.fmean(values), deviation, len(values))


def _result(line: dict[str, str | None], where: str) -> AblationResult:
    text = line["value"] or ""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value <= 1:
        raise BadData(f"{where}: the value is {text!r}", "a share from 0 to 1")
    columns = (*REQUIRED, "classes")
    words = {name: printable_text((line.get(name) or "").strip()) for name in columns}
    if empty := [name for name in REQUIRED if not words[name]]:
        raise BadData(f"{where}: no {', '.join(empty)}", "a row, a seed, a figure and a value")
    return AblationResult(words["row"], words["seed"], words["classes"], words["figure"], value)


def _without_repeats(results: list[AblationResult], shown: str) -> list[AblationResult]:
    """Returns the results, or refuses those that give one figure of one training two values."""
    known: dict[tuple[str, ...], float] = {}
    for result in results:
        key = (result.row, result.seed, result.classes, result.figure)
        if known.setdefault(key, result.value) != result.value:
            raise BadData(
                f"{shown} has two values of {result.figure} for row {result.row!r}, seed "
                f"{result.seed}, {result.classes or 'the same classes'}",
                "one line for each",
            )
    return [
        AblationResult(row, seed, classes, figure, value)
        for (row, seed, classes, figure), value in known.items()
    ]
