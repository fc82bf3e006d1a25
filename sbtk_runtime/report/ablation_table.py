"""The SBTKNet paper's Table 5, the published ablation above what was measured over seeds."""

from __future__ import annotations

from collections.abc import Sequence

from sbtk_runtime.report.ablation_results import AblationResult, Spread, spread_over_seeds
from sbtk_runtime.report.comparison import SPLIT_TITLES
from sbtk_runtime.report.figure_names import best_figure
from sbtk_runtime.report.measured import MeasuredMap
from sbtk_runtime.report.published import PublishedAblation, published
from sbtk_runtime.report.report_table import Cell, Column, ReportTable, Row

FIGURES = ("mAP@all", "mAP@200", "P@100", "P@200")
#: The figure by which the rows' order is judged.
JUDGED = "mAP@all"

_Spreads = dict[str, Spread]


def ablation_table(
    results: Sequence[AblationResult], runs: Sequence[MeasuredMap] = (), *, split: str = "SK-YE"
) -> ReportTable:
    """Returns the published ablation on a split and, below it, the measured one.

    Args:
        results: one figure of one training each; none gives the published rows alone.
        runs: single measurements to show as well, without a spread.
        split: `SK-YE` or `TUB-SH`; the one that the results were measured on.
    """
    known = published().ablation
    labels = {row.name: row.label for row in known}
    blocks: dict[str, dict[str, _Spreads]] = {}
    for (classes, row), figures in spread_over_seeds(results).items():
        blocks.setdefault(classes, {})[row] = figures
    lines = [
        Row(
            (row.label, "the paper", "-"),
            tuple(Cell(row.figures[split][figure]) for figure in FIGURES),
        )
        for row in known
    ]
    for classes, rows in blocks.items():
        lines += [
            _measured_row(labels.get(name, name), classes, rows[name])
            for name in sorted(rows, key=lambda name: _place(name, known))
        ]
    lines += [_single_row(run) for run in runs]
    return ReportTable(
        name="table5",
        title=f"Ablation (the paper's Table 5) on {SPLIT_TITLES[split]}, percent",
        stubs=("Objectives", "Measured on", "Seeds"),
        columns=tuple(Column(split, figure) for figure in FIGURES),
        rows=tuple(lines),
        footnotes={},
        notes=(
            "mean ± sample standard deviation over seeds; the paper gives no spread",
            *(order_text(rows, known, split, classes) for classes, rows in blocks.items()),
        ),
        warnings=tuple(_warnings(blocks, runs, split)),
    )


def order_text(
    rows: dict[str, _Spreads], known: Sequence[PublishedAblation], split: str, classes: str
) -> str:
    """Returns, in words, whether the rows come in the paper's order by mAP@all.

    Two rows are told apart where their means differ by more than both deviations together.
    """
    measured = {
        row.name: spread
        for row in known
        if row.name in rows and (spread := _figure(rows[row.name], JUDGED))
    }
    theirs = {row.name: row.figures[split][JUDGED] for row in known if row.name in measured}
    labels = {row.name: row.label for row in known}
    names = list(measured)
    pairs = [
        (worse, better) for worse in names for better in names if theirs[worse] < theirs[better]
    ]
    turned = [
        f"{labels[worse]} {100 * measured[worse].mean:.1f} over {labels[better]} "
        f"{100 * measured[better].mean:.1f}" + _doubt(measured[worse], measured[better])
        for worse, better in pairs
        if measured[worse].mean > measured[better].mean
    ]
    where = f"on {classes} classes" if classes else "here"
    if not pairs:
        return f"{where} there are no two rows whose order could be judged"
    if not turned:
        return f"{where} the rows come in the paper's order by {JUDGED}"
    return (
        f"{where} {len(turned)} of {len(pairs)} pairs of rows are not in the paper's order by "
        f"{JUDGED}: {'; '.join(turned)}"
    )


def _figure(figures: _Spreads, base: str) -> Spread | None:
    found = best_figure(figures, base)
    return None if found is None else figures[found[0]]


def _doubt(first: Spread, second: Spread) -> str:
    """Returns what keeps a difference from being one, in brackets; empty where nothing does."""
    if first.deviation is None or second.deviation is None:
        return " (one seed: no spread)"
    is_apart = abs(first.mean - second.mean) > first.deviation + second.deviation
    return "" if is_apart else " (within the spread)"


def _place(name: str, known: Sequence[PublishedAblation]) -> int:
    """Returns where a row stands: as in the paper, others below in the order of the file."""
    names = [row.name for row in known]
    return names.index(name) if name in names else len(names)


def _measured_row(label: str, classes: str, figures: _Spreads) -> Row:
    seeds = sorted({spread.seeds for spread in figures.values()})
    cells = []
    for base in FIGURES:
        spread = _figure(figures, base)
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
        remark=f"figures: {', '.join(figures)}",
    )


def _single_row(run: MeasuredMap) -> Row:
    found = [best_figure(run.figures, base) for base in FIGURES]
    cells = [Cell() if one is None else Cell(100 * run.figures[one[0]]) for one in found]
    return Row((run.name, run.of, "1"), tuple(cells), is_measured=True, remark=run.protocol)


def _warnings(
    blocks: dict[str, dict[str, _Spreads]], runs: Sequence[MeasuredMap], split: str
) -> list[str]:
    warnings = []
    names = sorted({name for rows in blocks.values() for row in rows.values() for name in row})
    if names:
        warnings.append(
            f"measured figures are {', '.join(names)}; the paper's are taken to be VOC AP, mAP@200 "
            "divided by min(200, R)"
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
        f"{run.name} was measured on {run.of} of {run.split or 'no named split'}, not on {split}"
        for run in runs
        if run.split != split or not run.is_unseen
    ]
    sizes = {f"{run.queries:,} sketches against {run.photos:,} photos" for run in runs}
    warnings += [f"single measurements are of {size}" for size in sorted(sizes)]
    return warnings
