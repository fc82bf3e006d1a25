"""Benchmark results as tables for people."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterable, Sequence

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from sbtk_cli.output import size_text
from sbtk_runtime.bench_engines import LatencyReport
from sbtk_runtime.bench_map import DEFINITIONS, MapReport
from sbtk_runtime.bench_search import SearchReport
from sbtk_runtime.machine import Machine

_NARROWEST = 100


def print_machine(machine: Machine) -> None:
    """Prints the machine and the versions that all figures below depend on."""
    for line in machine.lines():
        _console().print(Text(line, style="dim"))


def print_latency(report: LatencyReport) -> None:
    """Prints the stages, then the speed by batch."""
    console = _console()
    stages = _table(
        f"{report.model_id}: one picture at a time, ms, {report.engine} {report.precision}, "
        f"{report.threads} threads",
        ["", "stage", "p50", "p95", "p99", "samples"],
        ((stage.subject, stage.stage, *_ms(stage), f"{stage.samples}") for stage in report.stages),
        texts=2,
    )
    console.print()
    console.print(stages)
    console.print(Text(f"{report.pictures}; search: {report.searched}", style="dim"))
    columns = ["engine", "batch", "images/s", "p50", "p95", "p99", "runs"]
    if report.reference is not None:
        columns.insert(3, f"x {report.reference}")
    rows = []
    for point in report.throughput:
        row = [point.name, f"{point.batch}", f"{point.images_per_s:.1f}", *_ms(point)]
        if report.reference is not None:
            times = point.times_reference
            row.insert(3, "" if times is None else f"{times:.2f}")
        rows.append((*row, f"{point.samples}"))
    console.print()
    console.print(_table(f"{report.model_id}: speed of the engine alone, ms a run", columns, rows))
    for note in report.notes:
        console.print(Text(note, style="dim"))


def print_map(reports: Sequence[MapReport]) -> None:
    """Prints every figure with its definition, a column for each precision."""
    console = _console()
    first = reports[0]
    columns = ["figure", *(f"{report.precision}" for report in reports), "definition"]
    rows: list[tuple[str, ...]] = [
        (name, *(f"{report.figures[name]:.4f}" for report in reports), DEFINITIONS[name])
        for name in first.figures
    ]
    rows.append(
        (
            "images/s",
            *(f"{report.images_per_s:.1f}" for report in reports),
            f"decoding and {first.engine} together; ranking took {first.rank_s:.2f} s",
        )
    )
    console.print()
    table = _table(f"{first.model_id}: {first.protocol}", columns, rows, texts=1)
    table.columns[-1].justify = "left"
    table.columns[-1].overflow = "fold"
    table.columns[-1].no_wrap = False
    console.print(table)
    for report in reports[:1]:
        if report.unanswerable:
            text = f"{report.unanswerable} sketches have no photo of their class: left out"
            console.print(Text(text, style="yellow"))
        if report.unreadable:
            text = f"{len(report.unreadable)} images cannot be read: left out"
            console.print(Text(text, style="yellow"))


def print_search(report: SearchReport) -> None:
    """Prints what the graphs cost, then recall and latency of each way of searching."""
    console = _console()
    console.print()
    console.print(Text(f"searched: {report.vectors}\nqueries: {report.queries}", style="dim"))
    if report.builds:
        rows = [
            (
                build.name,
                f"{build.m}",
                f"{build.ef_construction}",
                f"{build.threads}",
                f"{build.build_s:.1f}",
                size_text(build.resident_bytes) if build.resident_bytes else "",
                f"{build.resident_bytes / report.count:,.0f}" if build.resident_bytes else "",
            )
            for build in report.builds
        ]
        columns = ["graph", "M", "ef_construction", "threads", "build s", "memory", "bytes/row"]
        console.print(_table(f"{report.count:,} x {report.dim}: the graphs", columns, rows))
    points: list[tuple[str, ...]] = [
        (
            point.name,
            "" if point.ef is None else f"{point.ef}",
            f"{point.recall:.4f}",
            *(f"{ms:.3f}" for ms in (point.p50_ms, point.p95_ms, point.p99_ms)),
            f"{point.queries_per_s:,.0f}",
        )
        for point in report.points
    ]
    columns = ["search", "ef", f"recall@{report.k}", "p50 ms", "p95 ms", "p99 ms", "queries/s"]
    console.print(_table("one query at a time; graphs on one thread", columns, points))


def _console() -> Console:
    """Returns a console on stdout as it is now, wide enough for the tables where it is a file."""
    width = None if sys.stdout.isatty() else max(_NARROWEST, shutil.get_terminal_size().columns)
    return Console(file=sys.stdout, width=width, highlight=False)


def _table(
    title: str, columns: Sequence[str], rows: Iterable[Sequence[str]], *, texts: int = 1
) -> Table:
    """Returns a table whose first `texts` columns are words and whose others are numbers."""
    table = Table(
        title=Text(title, style="bold"), title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False
    )
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index < texts else "right", no_wrap=True)
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    return table


def _ms(figures: object) -> list[str]:
    return [f"{getattr(figures, name):.2f}" for name in ("p50_ms", "p95_ms", "p99_ms")]
