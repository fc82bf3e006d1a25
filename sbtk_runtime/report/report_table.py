"""A table for people to read: published rows and measured rows under the same columns."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Column:
    """One figure on one test set; columns of the same `group` stand together."""

    group: str
    figure: str


@dataclass(frozen=True)
class Cell:
    """A figure in percent, or nothing.

    Attributes:
        percent: the figure; `None` where there is none.
        spread: standard deviation over seeds, in percent points.
        mark: letters of the footnotes that belong to it.
    """

    percent: float | None = None
    spread: float | None = None
    mark: str = ""


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        stubs: what stands before the figures, one for each of the table's `stubs`.
        cells: one for each column.
        is_measured: whether it was measured here, and not published by somebody.
        remark: what has to be known about the row.
    """

    stubs: tuple[str, ...]
    cells: tuple[Cell, ...]
    is_measured: bool = False
    remark: str = ""


@dataclass(frozen=True)
class ReportTable:
    """A whole table.

    Attributes:
        name: such as `table2`.
        title: what it compares.
        stubs: heads of the columns before the figures.
        columns: the figures.
        rows: in the order in which they are shown.
        footnotes: letter to text.
        notes: sentences about how to read it.
        warnings: where rules, galleries or classes differ between rows.
    """

    name: str
    title: str
    stubs: tuple[str, ...]
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    footnotes: dict[str, str]
    notes: tuple[str, ...]
    warnings: tuple[str, ...]


def percent_text(cell: Cell) -> str:
    """Returns a figure as papers print it: 50.2 or 55.25; with a spread, 50.2 ± 0.4."""
    if cell.percent is None:
        return "-"
    if cell.spread is not None:
        return f"{cell.percent:.1f} ± {cell.spread:.1f}"
    return f"{cell.percent:.2f}".removesuffix("0")
