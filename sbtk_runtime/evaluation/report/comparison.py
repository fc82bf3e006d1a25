"""Measured metrics beside the published ones: the SBTKNet paper's Tables 2, 3 and 4."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from sbtk_runtime.errors import BadData
from sbtk_runtime.evaluation.report.measured import MeasuredMap, best_metric
from sbtk_runtime.evaluation.report.published import Published, PublishedRow, published
from sbtk_runtime.evaluation.report.table import Cell, Column, ReportTable, Row

#: How the columns of a split are headed.
SPLIT_TITLES = {
    "SK-SH": "Sketchy Ext. (SK-SH)",
    "SK-YE": "Sketchy Ext. (SK-YE)",
    "TUB-SH": "TU-Berlin Ext. (TUB-SH)",
    "QD-DE": "QuickDraw Ext. (QD-DE)",
}
LENIENT, OTHER_LIST, UNNAMED_LIST = "a", "b", "c"

_TAGS = (
    "Source: P printed in the SBTKNet paper, which quotes the older methods; V read where the "
    "authors or a named file give it; S a secondary source; here: measured."
)
_MIXED = (
    "these rows mix AP rules, galleries with and without duplicates, and several class lists: "
    "they are no ranking"
)


@dataclass(frozen=True)
class TableLayout:
    """What a table of the paper holds.

    Attributes:
        title: what it compares.
        setting: which protocol its rows follow.
        columns: split and metric of each column.
        later_columns: columns that only later work fills.
    """

    title: str
    setting: Literal["zero-shot", "generalised"]
    columns: tuple[tuple[str, str], ...]
    later_columns: tuple[tuple[str, str], ...] = ()


LAYOUTS = {
    "table2": TableLayout(
        "Zero-shot sketch-based image retrieval (the paper's Table 2), percent",
        "zero-shot",
        (
            ("SK-SH", "mAP@all"),
            ("SK-SH", "P@100"),
            ("SK-YE", "mAP@200"),
            ("SK-YE", "P@200"),
            ("TUB-SH", "mAP@all"),
            ("TUB-SH", "P@100"),
        ),
    ),
    "table3": TableLayout(
        "Generalised zero-shot sketch-based image retrieval (the paper's Table 3), percent",
        "generalised",
        (
            ("SK-SH", "mAP@all"),
            ("SK-SH", "P@100"),
            ("TUB-SH", "mAP@all"),
            ("TUB-SH", "P@100"),
        ),
        (("SK-YE", "mAP@200"), ("SK-YE", "P@200")),
    ),
    "table4": TableLayout(
        "Zero-shot retrieval on QuickDraw Extended (the paper's Table 4), percent",
        "zero-shot",
        (("QD-DE", "mAP@all"), ("QD-DE", "P@200")),
    ),
}


def comparison(name: str, runs: Sequence[MeasuredMap], *, with_later: bool = False) -> ReportTable:
    """Return a table of the paper with the runs below its rows.

    Args:
        name: `table2`, `table3` or `table4`.
        runs: what was measured; none gives the published rows alone.
        with_later: whether to show work that is later than the paper.

    Raises:
        BadData: there are runs, and none of them belongs into the table.
    """
    layout = LAYOUTS[name]
    known = published()
    columns = layout.columns + (layout.later_columns if with_later else ())
    rows = [
        row
        for row in known.rows
        if row.setting == layout.setting
        and row.split in {split for split, _ in columns}
        and (with_later or not row.later)
    ]
    fitting = [run for run in runs if _fits(run, layout, columns)]
    if runs and not fitting:
        raise BadData(
            f"none of {len(runs)} results belongs into {name}: "
            + "; ".join(sorted({f"{run.split or 'no split'}, {run.setting}" for run in runs})),
            f"{layout.setting} results of {' or '.join(sorted({s for s, _ in columns}))}",
            "sbtk report table2, table3 and table4 each have splits and a setting of their own",
        )
    lines = [_published_line(group, columns, known) for group in _grouped(rows)]
    lines += [_measured_line(group, columns) for group in _runs_of_models(fitting)]
    marks = {letter for line in lines for cell in line.cells for letter in cell.mark}
    return ReportTable(
        name=name,
        title=layout.title,
        stubs=("Method", "Dim.", "Source"),
        columns=tuple(Column(SPLIT_TITLES[split], metric) for split, metric in columns),
        rows=tuple(lines),
        footnotes={mark: _footnote(mark, fitting) for mark in sorted(marks)},
        notes=(_TAGS,),
        warnings=(
            *(warning for run in fitting for warning in run_warnings(run, known)),
            *(_misfit(run) for run in runs if run not in fitting),
            *rule_warnings(rows, fitting, columns, known),
            _MIXED,
        ),
    )


def _fits(run: MeasuredMap, layout: TableLayout, columns: Sequence[tuple[str, str]]) -> bool:
    splits = {split for split, _ in columns}
    return (
        run.is_sketch_query
        and run.is_generalised == (layout.setting == "generalised")
        and _column_split(run) in splits
    )


def _column_split(run: MeasuredMap) -> str:
    """Return the split whose columns a run belongs to: SEM-PCYC's lists share the others'."""
    return run.split.removesuffix("-sempcyc")


def _grouped(rows: Sequence[PublishedRow]) -> list[list[PublishedRow]]:
    """Return the rows by method and kind of embedding, in the order of the first of each."""
    groups: dict[tuple[str, int | None, bool, bool], list[PublishedRow]] = {}
    for row in rows:
        groups.setdefault((row.method, row.dim, row.binary, row.later), []).append(row)
    return list(groups.values())


def _runs_of_models(runs: Sequence[MeasuredMap]) -> list[list[MeasuredMap]]:
    """Return the runs by model; a second one of the same columns gets a line of its own."""
    groups: list[list[MeasuredMap]] = []
    for run in runs:
        key = (run.name, run.dim, run.bits)
        for group in groups:
            first = group[0]
            is_taken = any(_column_split(other) == _column_split(run) for other in group)
            if key == (first.name, first.dim, first.bits) and not is_taken:
                group.append(run)
                break
        else:
            groups.append([run])
    return groups


def _published_line(
    group: Sequence[PublishedRow], columns: Sequence[tuple[str, str]], known: Published
) -> Row:
    first = group[0]
    by_split = {row.split: row for row in group}
    return Row(
        stubs=(first.method, _dim_text(first.dim, first.binary), first.tag),
        cells=tuple(_published_cell(by_split.get(split), metric) for split, metric in columns),
        remark=_joined(
            *(row.source for row in group),
            *(row.note for row in group),
            *(known.rules_of(row).remark for row in group),
        ),
    )


def _published_cell(row: PublishedRow | None, metric: str) -> Cell:
    if row is None:
        return Cell()
    percent, mark = row.metrics.get(metric), ""
    if percent is None:
        percent, mark = row.metrics.get(f"{metric} (lenient)"), LENIENT
    if percent is None:
        return Cell()
    if row.class_list != row.split:
        mark += OTHER_LIST if row.class_list else UNNAMED_LIST
    return Cell(percent, mark=mark)


def _measured_line(group: Sequence[MeasuredMap], columns: Sequence[tuple[str, str]]) -> Row:
    by_split = {_column_split(run): run for run in group}
    first = group[0]
    return Row(
        stubs=(first.name, _dim_text(first.bits or first.dim, first.bits is not None), "here"),
        cells=tuple(
            _measured_cell(by_split.get(split), split, metric) for split, metric in columns
        ),
        is_measured=True,
        remark=_joined(*(run.protocol for run in group)),
    )


def _measured_cell(run: MeasuredMap | None, split: str, base: str) -> Cell:
    found = best_metric(run.metrics, base) if run is not None else None
    if run is None or found is None:
        return Cell()
    name, metric = found
    mark = LENIENT if metric.divisor == "lenient" else ""
    if run.split != split:
        mark += OTHER_LIST
    return Cell(100 * run.metrics[name], mark=mark)


def _dim_text(dim: int | None, is_binary: bool) -> str:
    if dim is None:
        return "-"
    return f"{dim} bits" if is_binary else str(dim)


def _footnote(mark: str, runs: Sequence[MeasuredMap]) -> str:
    if mark == OTHER_LIST:
        return "another list of unseen classes than the column's: not the same test set"
    if mark == UNNAMED_LIST:
        return "the source does not name its unseen classes; several lists go by the split's name"
    text = "mAP@200 divided by the hits within the first 200 (lenient), not by min(200, R)"
    ours = [
        f"{run.name} {100 * run.metrics['mAP@200 (lenient)']:.1f}"
        for run in runs
        if "mAP@200 (lenient)" in run.metrics and _column_split(run) == "SK-YE"
    ]
    return f"{text}; by that rule: {', '.join(['SBTKNet 72.24 (its footnote a)', *ours])}"


def _misfit(run: MeasuredMap) -> str:
    who = "" if run.is_sketch_query else ", photos for queries"
    return f"{run.name} on {run.of} ({run.setting}{who}) has no column in this table: left out"


def _joined(*parts: str) -> str:
    return "; ".join(dict.fromkeys(part for part in parts if part))


_AP_WORDS = {"plain": "plain AP", "voc": "AP with VOC's precision envelope"}
_MEAN_WORDS = {"query": "mean over queries", "class": "mean over classes"}


def run_warnings(run: MeasuredMap, known: Published) -> list[str]:
    """Return where a run's classes, gallery and rules differ from the published test sets."""
    warnings = []
    if not run.is_unseen:
        warnings.append(f"measured on {run.of}: the published rows are of unseen classes")
    elif not run.is_whole:
        warnings.append(f"measured on {run.of} alone")
    if run.is_generalised:
        warnings.append(f"{run.setting}: {run.queries:,} queries against {run.photos:,} photos")
    warnings += _gallery_warnings(run, known)
    if run.has_duplicates is not None and run.is_unseen:
        warnings += _duplicate_warnings(run, known)
    return [f"{run.name}: {warning}" for warning in warnings]


def rule_warnings(
    rows: Sequence[PublishedRow],
    runs: Sequence[MeasuredMap],
    columns: Sequence[tuple[str, str]],
    known: Published,
) -> list[str]:
    """Return by which rules the runs were measured, and by which the published rows.

    Args:
        rows: the published rows that are shown.
        runs: the measurements that are shown.
        columns: split and metric of each column.
        known: all that is known of published results.
    """
    warnings = []
    metrics = list(dict.fromkeys(metric for _, metric in columns if metric.startswith("mAP")))
    for run in runs:
        # A run may be of another list by the same name, whose columns it shares.
        shown = {metric for split, metric in columns if run.split.startswith(split)}
        words = [word for base in metrics if base in shown and (word := _rule_words(run, base))]
        if words:
            warnings.append(f"{run.name}: {'; '.join(words)}")
    rules = [(row.method, known.rules_of(row)) for row in rows]
    told = {
        "AP": [(method, _AP_WORDS.get(rule.ap or "")) for method, rule in rules],
        "mean": [(method, _MEAN_WORDS.get(rule.mean or "")) for method, rule in rules],
    }
    if "mAP@200" in metrics:
        cut = [row for row in rows if any(name.startswith("mAP@200") for name in row.metrics)]
        told["mAP@200 divisor"] = [(row.method, known.rules_of(row).divisor) for row in cut]
    if any(row.setting == "generalised" for row in rows):
        told["generalised setting"] = [(method, rule.generalised) for method, rule in rules]
    return [
        *warnings,
        *(_list_methods_by_rule(f"published {what}", found) for what, found in told.items()),
    ]


def _list_methods_by_rule(what: str, told: Sequence[tuple[str, str | None]]) -> str:
    """Return a sentence that lists, for each rule, the methods that follow it."""
    groups: dict[str, list[str]] = {}
    for method, rule in told:
        groups.setdefault(rule or "not stated", []).append(method)
    parts = [f"{rule}: {', '.join(dict.fromkeys(names))}" for rule, names in groups.items()]
    return f"{what}: {'; '.join(parts)}"


def _gallery_warnings(run: MeasuredMap, known: Published) -> list[str]:
    if not run.is_unseen or run.is_generalised:
        return []
    galleries = known.galleries_of(run.split)
    if any((run.queries, run.photos) == (one.queries, one.photos) for one in galleries):
        return []
    told = [f"{one.queries:,} against {one.photos:,} by {one.of}" for one in galleries]
    if not told:
        return [f"no published test set is known for {run.split}"]
    return [
        f"another test set: {run.queries:,} sketches against {run.photos:,} photos; published: "
        + "; ".join(told)
    ]


def _duplicate_warnings(run: MeasuredMap, known: Published) -> list[str]:
    published = [one for one in known.galleries_of(run.split) if one.has_duplicates is not None]
    if not published or published[0].has_duplicates == run.has_duplicates:
        return []
    ours, theirs = ("with", "without") if run.has_duplicates else ("without", "with")
    return [f"gallery {ours} duplicates; published {theirs} ({published[0].of})"]


def _rule_words(run: MeasuredMap, base: str) -> str:
    found = best_metric(run.metrics, base)
    if found is None:
        return ""
    measure = found[1]
    words = [_AP_WORDS["voc" if measure.is_voc else "plain"], _MEAN_WORDS[measure.mean]]
    if measure.divisor is not None:
        words.append(f"{measure.divisor} divisor")
    return f"{base} by {', '.join(words)}"
