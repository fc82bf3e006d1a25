"""What keeps a measured figure from being compared with a published one, in sentences."""

from __future__ import annotations

from collections.abc import Sequence

from sbtk_runtime.report.figure_names import best_figure
from sbtk_runtime.report.measured import MeasuredMap
from sbtk_runtime.report.published import Published, PublishedRow

_AP_WORDS = {"plain": "plain AP", "voc": "AP with VOC's precision envelope"}
_MEAN_WORDS = {"query": "mean over queries", "class": "mean over classes"}


def run_warnings(run: MeasuredMap, known: Published) -> list[str]:
    """Returns where a run's classes, gallery and rules differ from the published test sets."""
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
    """Returns by which rules the runs were measured, and by which the published rows.

    Args:
        rows: the published rows that are shown.
        runs: the measurements that are shown.
        columns: split and figure of each column.
        known: all that is known of published results.
    """
    warnings = []
    figures = list(dict.fromkeys(figure for _, figure in columns if figure.startswith("mAP")))
    for run in runs:
        # A run may be of another list by the same name, whose columns it shares.
        shown = {figure for split, figure in columns if run.split.startswith(split)}
        words = [word for base in figures if base in shown and (word := _rule_words(run, base))]
        if words:
            warnings.append(f"{run.name}: {'; '.join(words)}")
    rules = [(row.method, known.rules_of(row)) for row in rows]
    told = {
        "AP": [(method, _AP_WORDS.get(rule.ap or "")) for method, rule in rules],
        "mean": [(method, _MEAN_WORDS.get(rule.mean or "")) for method, rule in rules],
    }
    if "mAP@200" in figures:
        cut = [row for row in rows if any(name.startswith("mAP@200") for name in row.figures)]
        told["mAP@200 divisor"] = [(row.method, known.rules_of(row).divisor) for row in cut]
    if any(row.setting == "generalised" for row in rows):
        told["generalised setting"] = [(method, rule.generalised) for method, rule in rules]
    return [*warnings, *(_grouped(f"published {what}", found) for what, found in told.items())]


def _grouped(what: str, told: Sequence[tuple[str, str | None]]) -> str:
    """Returns a sentence that lists, for each rule, the methods that follow it."""
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
    found = best_figure(run.figures, base)
    if found is None:
        return ""
    measure = found[1]
    words = [_AP_WORDS["voc" if measure.is_voc else "plain"], _MEAN_WORDS[measure.mean]]
    if measure.divisor is not None:
        words.append(f"{measure.divisor} divisor")
    return f"{base} by {', '.join(words)}"
