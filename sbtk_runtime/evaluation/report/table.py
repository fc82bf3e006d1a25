"""Tables of published and measured results, as Markdown, CSV and LaTeX."""

from __future__ import annotations

import csv
import io
from dataclasses import dataclass
from itertools import groupby
from typing import Literal


@dataclass(frozen=True)
class Column:
    """A metric on a test set; columns of the same `group` are adjacent."""

    group: str
    metric: str


@dataclass(frozen=True)
class Cell:
    """A value in percent, or an empty cell.

    Attributes:
        percent: the value; `None` if empty.
        spread: standard deviation over seeds, in percentage points.
        mark: letters of its footnotes.
    """

    percent: float | None = None
    spread: float | None = None
    mark: str = ""


@dataclass(frozen=True)
class Row:
    """A row of the table.

    Attributes:
        stubs: texts of the first columns, one for each of the table's `stubs`.
        cells: one for each column.
        is_measured: whether it was measured, not published.
        remark: remark on the row.
    """

    stubs: tuple[str, ...]
    cells: tuple[Cell, ...]
    is_measured: bool = False
    remark: str = ""


@dataclass(frozen=True)
class ReportTable:
    """A table of results.

    Attributes:
        name: name, such as `table2`.
        title: title.
        stubs: heads of the first columns.
        columns: the columns of metrics.
        rows: the rows in order.
        footnotes: text by letter.
        notes: explanations.
        warnings: differences in rules, galleries or classes between rows.
    """

    name: str
    title: str
    stubs: tuple[str, ...]
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    footnotes: dict[str, str]
    notes: tuple[str, ...]
    warnings: tuple[str, ...]


def format_percent(cell: Cell) -> str:
    """Return a value as in papers: 50.2 or 55.25; with a spread, 50.2 ± 0.4."""
    if cell.percent is None:
        return "-"
    if cell.spread is not None:
        return f"{cell.percent:.1f} ± {cell.spread:.1f}"
    return f"{cell.percent:.2f}".removesuffix("0")


Format = Literal["markdown", "csv", "latex"]
FORMATS: tuple[Format, ...] = ("markdown", "csv", "latex")

_LATEX_ESCAPES = {
    "\\": r"\textbackslash{}",
    "&": r"\&",
    "%": r"\%",
    "$": r"\$",
    "#": r"\#",
    "_": r"\_",
    "{": r"\{",
    "}": r"\}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "±": r"$\pm$",
}


def format_table(table: ReportTable, form: Format) -> str:
    """Return the table in a format, ending in a newline."""
    if form == "csv":
        return format_csv(table)
    return format_latex(table) if form == "latex" else format_markdown(table)


def format_markdown(table: ReportTable) -> str:
    """Return a Markdown table with title, footnotes and warnings."""
    heads = [*table.stubs, *(f"{column.group} {column.metric}" for column in table.columns)]
    lines = [f"**{_plain(table.title)}**", "", _markdown_row(heads)]
    lines.append(_markdown_row(["---"] * len(table.stubs) + ["---:"] * len(table.columns)))
    for row in table.rows:
        stubs = [_plain(stub) for stub in row.stubs]
        if row.is_measured:
            stubs[0] = f"**{stubs[0]}**"
        metrics = [format_percent(cell) + _superscript(cell.mark) for cell in row.cells]
        lines.append(_markdown_row([*stubs, *metrics]))
    lines.append("")
    lines += [f"- {_superscript(mark)} {_plain(text)}" for mark, text in table.footnotes.items()]
    lines += [f"- {_plain(note)}" for note in table.notes]
    lines += [f"- **Warning:** {_plain(warning)}" for warning in table.warnings]
    return "\n".join(lines) + "\n"


def format_csv(table: ReportTable) -> str:
    """Return the table as CSV, with values in percent.

    The last column has each row's remark and footnotes. The table's warnings are not included.
    """
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    names = [f"{column.group} {column.metric}" for column in table.columns]
    has_spread = any(cell.spread is not None for row in table.rows for cell in row.cells)
    spreads = [f"{name} spread" for name in names] if has_spread else []
    stubs = [stub.lower().rstrip(".") for stub in table.stubs]
    writer.writerow([*stubs, *names, *spreads, "measured", "remarks"])
    for row in table.rows:
        values = ["" if cell.percent is None else round(cell.percent, 4) for cell in row.cells]
        sigmas = ["" if cell.spread is None else round(cell.spread, 4) for cell in row.cells]
        writer.writerow(
            [
                *row.stubs,
                *values,
                *(sigmas if has_spread else []),
                "yes" if row.is_measured else "no",
                "; ".join(_remarks(table, row)),
            ]
        )
    return file.getvalue()


def format_latex(table: ReportTable) -> str:
    """Return a LaTeX `table` that needs no packages."""
    stubs = len(table.stubs)
    groups = [(name, len(list(part))) for name, part in groupby(c.group for c in table.columns)]
    spans = [rf"\multicolumn{{{count}}}{{c}}{{{_latex(name)}}}" for name, count in groups]
    heads = [_latex(head) for head in (*table.stubs, *(c.metric for c in table.columns))]
    lines = [
        r"\begin{table}",
        rf"\caption{{{_latex(table.title)}}}",
        r"\centering",
        rf"\begin{{tabular}}{{{'l' * stubs}{'r' * len(table.columns)}}}",
        r"\hline",
        " & ".join([""] * stubs + spans) + r" \\",
        " & ".join(heads) + r" \\",
        r"\hline",
    ]
    was_measured = False
    for row in table.rows:
        if row.is_measured and not was_measured:
            lines.append(r"\hline")
        was_measured = row.is_measured
        words = [_latex(stub) for stub in row.stubs]
        if row.is_measured:
            words[0] = rf"\textbf{{{words[0]}}}"
        lines.append(" & ".join([*words, *(_latex_cell(cell) for cell in row.cells)]) + r" \\")
    lines += [r"\hline", r"\end{tabular}", "", r"\begin{flushleft}\footnotesize"]
    lines += [
        rf"\textsuperscript{{{mark}}} {_latex(text)}\\" for mark, text in table.footnotes.items()
    ]
    lines += [rf"{_latex(note)}\\" for note in table.notes]
    lines += [rf"\textbf{{Warning:}} {_latex(warning)}\\" for warning in table.warnings]
    return "\n".join([*lines, r"\end{flushleft}", r"\end{table}"]) + "\n"


def _remarks(table: ReportTable, row: Row) -> list[str]:
    marks = sorted({letter for cell in row.cells for letter in cell.mark})
    return [*([row.remark] if row.remark else []), *(table.footnotes[mark] for mark in marks)]


def _superscript(mark: str) -> str:
    return f"<sup>{mark}</sup>" if mark else ""


def _markdown_row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _plain(text: str) -> str:
    """Return text with Markdown's special characters escaped."""
    for character in "\\|*_<`":
        text = text.replace(character, f"\\{character}")
    return text


def _latex_cell(cell: Cell) -> str:
    mark = rf"\textsuperscript{{{cell.mark}}}" if cell.mark else ""
    text = format_percent(cell)
    return _latex("--" if text == "-" else text) + mark


def _latex(text: str) -> str:
    return "".join(_LATEX_ESCAPES.get(character, character) for character in text)
