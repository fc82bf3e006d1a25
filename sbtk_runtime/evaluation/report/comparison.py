"""The SBTKNet paper's Tables 2, 3 and 4, with measured results."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from sbtk_runtime.errors import BadData
from sbtk_runtime.evaluation.report.results import (
    MeasuredMap,
    Published,
    PublishedRow,
    find_metric,
    load_published,
)
from sbtk_runtime.evaluation.report.table import Cell, Column, ReportTable, Row

#: Column heads by split.
SPLIT_TITLES = {
    "SK-SH": "Sketchy Ext. (SK-SH)",
    "SK-YE": "Sketchy Ext. (SK-YE)",
    "TUB-SH": "TU-Berlin Ext. (TUB-SH)",
    "QD-DE": "QuickDraw Ext. (QD-DE)",
}
LENIENT, OTHER_LIST, UNNAMED_LIST = "a", "b", "c"

_TAGS = (
    "Source: P the SBTKNet paper, which quotes the older methods; V the authors' own paper or "
    "files; S a secondary source; here: measured."
)
_MIXED = (
    "not a ranking: the rows mix AP rules, galleries with and without duplicates, and class lists"
)


@dataclass(frozen=True)
class TableLayout:
    """The content of one of the paper's tables.

    Attributes:
        title: title of the table.
        setting: setting of its rows.
        columns: split and metric of each column.
        later_columns: columns that only later work has.
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


def compare(name: str, runs: Sequence[MeasuredMap], *, with_later: bool = False) -> ReportTable:
    """Return one of the paper's tables, with the runs below.

    Args:
        name: `table2`, `table3` or `table4`.
        runs: measurements; if empty, only published rows are shown.
        with_later: whether to show work later than the paper.

    Raises:
        BadData: none of the runs belongs into the table.
    """
    layout = LAYOUTS[name]
    known = load_published()
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
            f"none of {len(runs)} results fits {name}: "
            + "; ".join(sorted({f"{run.split or 'no split'}, {run.setting}" for run in runs})),
            f"{layout.setting} results of {' or '.join(sorted({s for s, _ in columns}))}",
            "see sbtk report --help for the setting of each table",
        )
    lines = [_published_line(group, columns, known) for group in _group_rows(rows)]
    lines += [_measured_line(group, columns) for group in _group_runs(fitting)]
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
            *(warning for run in fitting for warning in list_run_warnings(run, known)),
            *(_misfit(run) for run in runs if run not in fitting),
            *list_rule_warnings(rows, fitting, columns, known),
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
    """Return the split whose columns a run belongs to; SEM-PCYC's lists share columns."""
    return run.split.removesuffix("-sempcyc")


def _group_rows(rows: Sequence[PublishedRow]) -> list[list[PublishedRow]]:
    """Group rows by method and kind of embedding, in order of first appearance."""
    groups: dict[tuple[str, int | None, bool, bool], list[PublishedRow]] = {}
    for row in rows:
        groups.setdefault((row.method, row.dim, row.binary, row.later), []).append(row)
    return list(groups.values())


def _group_runs(runs: Sequence[MeasuredMap]) -> list[list[MeasuredMap]]:
    """Group runs by model; a second run with the same columns starts a new group."""
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
        remark=_join_notes(
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
        remark=_join_notes(*(run.protocol for run in group)),
    )


def _measured_cell(run: MeasuredMap | None, split: str, base: str) -> Cell:
    found = find_metric(run.metrics, base) if run is not None else None
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
        return "a different list of unseen classes, hence another test set"
    if mark == UNNAMED_LIST:
        return "the source does not list its unseen classes; several lists have the split's name"
    text = "mAP@200 divided by the hits within the first 200 (lenient), not by min(200, R)"
    ours = [
        f"{run.name} {100 * run.metrics['mAP@200 (lenient)']:.1f}"
        for run in runs
        if "mAP@200 (lenient)" in run.metrics and _column_split(run) == "SK-YE"
    ]
    return f"{text}; by that rule: {', '.join(['SBTKNet 72.24 (its footnote a)', *ours])}"


def _misfit(run: MeasuredMap) -> str:
    who = "" if run.is_sketch_query else ", photos as queries"
    return f"{run.name} on {run.of} ({run.setting}{who}) has no column here: not shown"


def _join_notes(*parts: str) -> str:
    return "; ".join(dict.fromkeys(part for part in parts if part))


_AP_WORDS = {"plain": "plain AP", "voc": "AP with VOC's precision envelope"}
_MEAN_WORDS = {"query": "mean over queries", "class": "mean over classes"}


def list_run_warnings(run: MeasuredMap, known: Published) -> list[str]:
    """Return how a run's classes, gallery and rules differ from the published test sets."""
    warnings = []
    if not run.is_unseen:
        warnings.append(f"measured on {run.of}, published rows on unseen classes")
    elif not run.is_whole:
        warnings.append(f"measured on only {run.of}")
    if run.is_generalised:
        warnings.append(f"{run.setting}: {run.queries:,} queries against {run.photos:,} photos")
    warnings += _gallery_warnings(run, known)
    if run.has_duplicates is not None and run.is_unseen:
        warnings += _duplicate_warnings(run, known)
    return [f"{run.name}: {warning}" for warning in warnings]


def list_rule_warnings(
    rows: Sequence[PublishedRow],
    runs: Sequence[MeasuredMap],
    columns: Sequence[tuple[str, str]],
    known: Published,
) -> list[str]:
    """Return the rules of the runs, and those of the published rows.

    Args:
        rows: the published rows in the table.
        runs: the measurements in the table.
        columns: split and metric of each column.
        known: all published results.
    """
    warnings = []
    metrics = list(dict.fromkeys(metric for _, metric in columns if metric.startswith("mAP")))
    for run in runs:
        # Class lists with the same prefix share columns.
        shown = {metric for split, metric in columns if run.split.startswith(split)}
        words = [word for base in metrics if base in shown and (word := _rule_words(run, base))]
        if words:
            warnings.append(f"{run.name}: {'; '.join(words)}")
    rules = [(row.method, known.rules_of(row)) for row in rows]
    parts = {
        "AP": [(method, _AP_WORDS.get(rule.ap or "")) for method, rule in rules],
        "mean": [(method, _MEAN_WORDS.get(rule.mean or "")) for method, rule in rules],
    }
    if "mAP@200" in metrics:
        cut = [row for row in rows if any(name.startswith("mAP@200") for name in row.metrics)]
        parts["mAP@200 divisor"] = [(row.method, known.rules_of(row).divisor) for row in cut]
    if any(row.setting == "generalised" for row in rows):
        parts["generalised setting"] = [(method, rule.generalised) for method, rule in rules]
    return [
        *warnings,
        *(_list_methods_by_rule(f"published {what}", found) for what, found in parts.items()),
    ]


def _list_methods_by_rule(what: str, rules: Sequence[tuple[str, str | None]]) -> str:
    """Return a sentence that lists the methods of each rule."""
    groups: dict[str, list[str]] = {}
    for method, rule in rules:
        groups.setdefault(rule or "not stated", []).append(method)
    parts = [f"{rule}: {', '.join(dict.fromkeys(names))}" for rule, names in groups.items()]
    return f"{what}: {'; '.join(parts)}"


def _gallery_warnings(run: MeasuredMap, known: Published) -> list[str]:
    if not run.is_unseen or run.is_generalised:
        return []
    galleries = known.galleries_of(run.split)
    if any((run.queries, run.photos) == (one.queries, one.photos) for one in galleries):
        return []
    parts = [f"{one.queries:,} against {one.photos:,} by {one.of}" for one in galleries]
    if not parts:
        return [f"no published test set known for {run.split}"]
    return [
        f"different test set: {run.queries:,} sketches against {run.photos:,} photos; published: "
        + "; ".join(parts)
    ]


def _duplicate_warnings(run: MeasuredMap, known: Published) -> list[str]:
    published = [one for one in known.galleries_of(run.split) if one.has_duplicates is not None]
    if not published or published[0].has_duplicates == run.has_duplicates:
        return []
    ours, theirs = ("with", "without") if run.has_duplicates else ("without", "with")
    return [f"gallery {ours} duplicates; published {theirs} ({published[0].of})"]


def _rule_words(run: MeasuredMap, base: str) -> str:
    found = find_metric(run.metrics, base)
    if found is None:
        return ""
    measure = found[1]
    words = [_AP_WORDS["voc" if measure.is_voc else "plain"], _MEAN_WORDS[measure.mean]]
    if measure.divisor is not None:
        words.append(f"{measure.divisor} divisor")
    return f"{base} by {', '.join(words)}"
