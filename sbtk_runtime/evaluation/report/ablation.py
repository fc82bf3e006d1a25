"""The SBTKNet paper's Table 5: the published ablation, and ablations measured over seeds."""

from __future__ import annotations

import csv
import io
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from sbtk_runtime.errors import BadData
from sbtk_runtime.evaluation.report.comparison import SPLIT_TITLES
from sbtk_runtime.evaluation.report.results import (
    MeasuredMap,
    PublishedAblation,
    find_metric,
    load_published,
)
from sbtk_runtime.evaluation.report.table import Cell, Column, ReportTable, Row
from sbtk_runtime.files import printable_name, printable_text

METRICS = ("mAP@all", "mAP@200", "P@100", "P@200")
#: The metric by which the order of rows is compared.
JUDGED = "mAP@all"


@dataclass(frozen=True)
class Spread:
    """A metric over several seeds: mean and sample standard deviation (`None` for one seed)."""

    mean: float
    deviation: float | None
    seeds: int


_Spreads = dict[str, Spread]


def ablation_table(
    results: Sequence[AblationResult], runs: Sequence[MeasuredMap] = (), *, split: str = "SK-YE"
) -> ReportTable:
    """Return the published ablation on a split, with the measured one below.

    Args:
        results: metrics of single trainings; if empty, only published rows are shown.
        runs: single measurements, shown without a spread.
        split: the split of the results, `SK-YE` or `TUB-SH`.
    """
    known = load_published().ablation
    labels = {row.name: row.label for row in known}
    blocks: dict[str, dict[str, _Spreads]] = {}
    for (classes, row), metrics in compute_spreads(results).items():
        blocks.setdefault(classes, {})[row] = metrics
    lines = [
        Row(
            (row.label, "the paper", "-"),
            tuple(Cell(row.metrics[split][metric]) for metric in METRICS),
        )
        for row in known
    ]
    for classes, rows in blocks.items():
        lines += [
            _measured_row(labels.get(name, name), classes, rows[name])
            for name in sorted(rows, key=lambda name: _find_position(name, known))
        ]
    lines += [_single_row(run) for run in runs]
    return ReportTable(
        name="table5",
        title=f"Ablation (the paper's Table 5) on {SPLIT_TITLES[split]}, percent",
        stubs=("Objectives", "Measured on", "Seeds"),
        columns=tuple(Column(split, metric) for metric in METRICS),
        rows=tuple(lines),
        footnotes={},
        notes=(
            "mean ± sample standard deviation over seeds; the paper gives no spread",
            *(describe_order(rows, known, split, classes) for classes, rows in blocks.items()),
        ),
        warnings=tuple(_warnings(blocks, runs, split)),
    )


def describe_order(
    rows: dict[str, _Spreads], known: Sequence[PublishedAblation], split: str, classes: str
) -> str:
    """Return, in words, whether the rows have the paper's order by mAP@all.

    Two rows differ if the difference of their means exceeds the sum of both deviations.
    """
    measured = {
        row.name: spread
        for row in known
        if row.name in rows and (spread := _metric(rows[row.name], JUDGED))
    }
    theirs = {row.name: row.metrics[split][JUDGED] for row in known if row.name in measured}
    labels = {row.name: row.label for row in known}
    names = list(measured)
    pairs = [
        (worse, better) for worse in names for better in names if theirs[worse] < theirs[better]
    ]
    swapped = [
        f"{labels[worse]} {100 * measured[worse].mean:.1f} over {labels[better]} "
        f"{100 * measured[better].mean:.1f}" + _describe_doubt(measured[worse], measured[better])
        for worse, better in pairs
        if measured[worse].mean > measured[better].mean
    ]
    where = f"on {classes} classes" if classes else "here"
    if not pairs:
        return f"{where} there are no two rows to compare"
    if not swapped:
        return f"{where} the rows have the paper's order by {JUDGED}"
    return (
        f"{where} {len(swapped)} of {len(pairs)} pairs of rows are not in the paper's order by "
        f"{JUDGED}: {'; '.join(swapped)}"
    )


def _metric(metrics: _Spreads, base: str) -> Spread | None:
    found = find_metric(metrics, base)
    return None if found is None else metrics[found[0]]


def _describe_doubt(first: Spread, second: Spread) -> str:
    """Return why a difference is not significant, in brackets; empty if it is."""
    if first.deviation is None or second.deviation is None:
        return " (one seed: no spread)"
    is_apart = abs(first.mean - second.mean) > first.deviation + second.deviation
    return "" if is_apart else " (within the spread)"


def _find_position(name: str, known: Sequence[PublishedAblation]) -> int:
    """Return the position of a row: as in the paper, others below in file order."""
    names = [row.name for row in known]
    return names.index(name) if name in names else len(names)


def _measured_row(label: str, classes: str, metrics: _Spreads) -> Row:
    seeds = sorted({spread.seeds for spread in metrics.values()})
    cells = []
    for base in METRICS:
        spread = _metric(metrics, base)
        if spread is None:
            cells.append(Cell())
            continue
        deviation = None if spread.deviation is None else 100 * spread.deviation
        cells.append(Cell(100 * spread.mean, deviation))
    where = f"{classes} classes" if classes else "here"
    return Row(
        (label, where, "-".join(map(str, seeds))),
        tuple(cells),
        is_measured=True,
        remark=f"metrics: {', '.join(metrics)}",
    )


def _single_row(run: MeasuredMap) -> Row:
    found = [find_metric(run.metrics, base) for base in METRICS]
    cells = [Cell() if one is None else Cell(100 * run.metrics[one[0]]) for one in found]
    return Row((run.name, run.of, "1"), tuple(cells), is_measured=True, remark=run.protocol)


def _warnings(
    blocks: dict[str, dict[str, _Spreads]], runs: Sequence[MeasuredMap], split: str
) -> list[str]:
    warnings = []
    names = sorted({name for rows in blocks.values() for row in rows.values() for name in row})
    if names:
        warnings.append(
            f"measured metrics are {', '.join(names)}; the paper's are assumed to be VOC AP, "
            "mAP@200 divided by min(200, R)"
        )
    warnings += [
        f"the rows on {classes} classes are not of {split}'s unseen classes"
        for classes in blocks
        if classes not in ("", "unseen")
    ]
    warnings += [
        f"{name} has one seed on {classes or 'its'} classes: no spread"
        for classes, rows in blocks.items()
        for name, row in rows.items()
        if any(spread.seeds == 1 for spread in row.values())
    ]
    warnings += [
        f"{run.name} was measured on {run.of} of {run.split or 'an unnamed split'}, not on {split}"
        for run in runs
        if run.split != split or not run.is_unseen
    ]
    sizes = {f"{run.queries:,} sketches against {run.photos:,} photos" for run in runs}
    warnings += [f"single measurements are of {size}" for size in sorted(sizes)]
    return warnings


_MAKE_ONE = "sbtk train DATA --ablation, which writes ablation.csv"
REQUIRED = ("row", "seed", "figure", "value")


@dataclass(frozen=True)
class AblationResult:
    """A metric of one training.

    Attributes:
        row: the trained objectives.
        seed: seed of the training.
        classes: `validation` or `unseen`; empty if the file does not say.
        metric: name of the metric, as in `sbtk bench map`.
        value: value in 0..1.
    """

    row: str
    seed: str
    classes: str
    metric: str
    value: float


def read_ablation(path: Path) -> list[AblationResult]:
    """Return the lines of a results file.

    Raises:
        BadData: it cannot be read, lacks a column, or has an invalid line.
    """
    shown = printable_name(path)
    try:
        # Spreadsheets write a byte order mark.
        text = path.read_bytes().decode("utf-8-sig")
        reader = csv.DictReader(io.StringIO(text, newline=""))
        missing = [name for name in REQUIRED if name not in (reader.fieldnames or ())]
        if missing:
            lacks = f"has no column {', '.join(missing)}" if text.strip() else "is empty"
            raise BadData(
                f"{shown} {lacks}", f"a CSV file with the columns {', '.join(REQUIRED)}", _MAKE_ONE
            )
        if not text.endswith(("\n", "\r")):
            raise BadData(
                f"{shown} is cut off: its last line has no end",
                "a whole file",
                f"copy the file again, or: {_MAKE_ONE}",
            )
        results = [_parse_result(line, f"{shown}, line {reader.line_num}") for line in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as problem:
        reason = problem.strerror if isinstance(problem, OSError) else str(problem)
        raise BadData(f"{shown} cannot be read: {reason}", "a CSV file", _MAKE_ONE) from problem
    if not results:
        raise BadData(f"{shown} has no results", "a line for each row, seed and figure", _MAKE_ONE)
    return _remove_repeats(results, shown)


def compute_spreads(
    results: Iterable[AblationResult],
) -> dict[tuple[str, str], dict[str, Spread]]:
    """Return the spread of each metric by classes and row, in file order."""
    values: dict[tuple[str, str], dict[str, list[float]]] = {}
    for result in results:
        metrics = values.setdefault((result.classes, result.row), {})
        metrics.setdefault(result.metric, []).append(result.value)
    return {
        key: {name: _compute_spread(found) for name, found in metrics.items()}
        for key, metrics in values.items()
    }


def _compute_spread(values: Sequence[float]) -> Spread:
    deviation = statistics.stdev(values) if len(values) > 1 else None
    return Spread(statistics.fmean(values), deviation, len(values))


def _parse_result(line: dict[str, str | None], where: str) -> AblationResult:
    text = line["value"] or ""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value <= 1:
        raise BadData(f"{where}: the value is {text!r}", "a number from 0 to 1")
    columns = (*REQUIRED, "classes")
    words = {name: printable_text((line.get(name) or "").strip()) for name in columns}
    if empty := [name for name in REQUIRED if not words[name]]:
        raise BadData(f"{where}: no {', '.join(empty)}", "a row, a seed, a metric and a value")
    return AblationResult(words["row"], words["seed"], words["classes"], words["figure"], value)


def _remove_repeats(results: list[AblationResult], shown: str) -> list[AblationResult]:
    """Return the results without repeated lines, which must have equal values."""
    known: dict[tuple[str, ...], float] = {}
    for result in results:
        key = (result.row, result.seed, result.classes, result.metric)
        if known.setdefault(key, result.value) != result.value:
            raise BadData(
                f"{shown} has two values of {result.metric} for row {result.row!r}, seed "
                f"{result.seed}, {result.classes or 'the same classes'}",
                "one line for each",
            )
    return [
        AblationResult(row, seed, classes, metric, value)
        for (row, seed, classes, metric), value in known.items()
    ]
