"""Benchmark results as tables and CSV."""

from __future__ import annotations

import csv
import io
import shutil
import sys
from collections.abc import Iterable, Sequence
from dataclasses import fields
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from sbtk_cli.output import size_text
from sbtk_runtime.evaluation.bench.floor import Floor
from sbtk_runtime.evaluation.bench.latency import LatencyReport
from sbtk_runtime.evaluation.bench.map import MapReport
from sbtk_runtime.evaluation.bench.search import SearchReport
from sbtk_runtime.evaluation.bench.speed import Speed
from sbtk_runtime.files import atomic_path, count_text
from sbtk_runtime.machine import Machine

_NARROWEST = 100
_SPEEDS_WIDTH = 140


def print_machine(machine: Machine) -> None:
    """Print the machine and the versions of libraries."""
    for line in machine.lines():
        _console().print(Text(line, style="dim"))


def print_latency(report: LatencyReport) -> None:
    """Print the stages, then the speed by batch size."""
    console = _console()
    stages = _table(
        f"{report.model_id}: one image at a time, ms, {report.engine} {report.precision}, "
        f"{report.threads} threads",
        ["", "stage", "p50", "p95", "p99", "samples"],
        ((stage.subject, stage.stage, *_ms(stage), f"{stage.samples}") for stage in report.stages),
        texts=2,
    )
    console.print()
    console.print(stages)
    console.print(Text(f"{report.images}; search: {report.searched}", style="dim"))
    console.print()
    title = f"{report.model_id}: speed of the engine alone, {report.threads} threads"
    # Wide tables wrap in narrow terminals, which is better than truncated numbers.
    _console(at_least=_SPEEDS_WIDTH).print(_speed_table(title, report))
    _print_memory(console, report)
    _print_device_times(console, report)
    for line in [*(_floor_text(floor) for floor in report.floors), *_quality_text(report)]:
        console.print(Text(line, style="dim"))
    for note in report.notes:
        console.print(Text(note, style="dim"))


def print_map(reports: Sequence[MapReport]) -> None:
    """Print each metric with its definition, one column per precision."""
    console = _console()
    first = reports[0]
    columns = ["metric", *(f"{report.precision}" for report in reports), "definition"]
    rows: list[tuple[str, ...]] = [
        (name, *(f"{report.metrics[name]:.4f}" for report in reports), definition)
        for name, definition in first.definitions.items()
    ]
    rows.append(
        (
            "images/s",
            *(f"{report.images_per_s:.1f}" for report in reports),
            f"decoding and {first.engine}; ranking took {first.rank_s:.2f} s",
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
            queries = "sketches" if report.rules.queries == "sketch" else "photos"
            text = f"{report.unanswerable} {queries} without a photo of their class left out"
            console.print(Text(text, style="yellow"))
        if report.unreadable:
            text = f"{count_text(len(report.unreadable), 'unreadable image')} excluded"
            console.print(Text(text, style="yellow"))


def print_search(report: SearchReport) -> None:
    """Print the cost of the indexes, then recall and latency of each search."""
    console = _console()
    console.print()
    console.print(Text(f"searched: {report.vectors}\nqueries: {report.queries}", style="dim"))
    if report.builds:
        rows = [
            (
                build.name,
                f"{build.m or ''}",
                f"{build.ef_construction or ''}",
                f"{build.threads}",
                f"{build.build_s:.1f}",
                size_text(build.resident_bytes) if build.resident_bytes else "",
                f"{build.resident_bytes / report.count:,.0f}" if build.resident_bytes else "",
            )
            for build in report.builds
        ]
        columns = ["index", "M", "ef_construction", "threads", "build s", "memory", "bytes/row"]
        console.print(_table(f"{report.count:,} x {report.dim}: the indexes", columns, rows))
    points: list[tuple[str, ...]] = [
        (
            point.name,
            "" if point.ef is None else f"{point.ef}",
            f"{point.recall:.4f}",
            *(f"{ms:.3f}" for ms in (point.p50_ms, point.p95_ms, point.p99_ms)),
            f"{point.queries_per_s:,.0f}",
            f"{point.cpu_ms:.3f}",
        )
        for point in report.points
    ]
    columns = [
        "search",
        "ef",
        f"recall@{report.k}",
        "p50 ms",
        "p95 ms",
        "p99 ms",
        "queries/s",
        "CPU ms",
    ]
    console.print(_table("one query at a time; indexes on one thread", columns, points))


def _console(at_least: int = 0) -> Console:
    """Return a console on stdout, wide enough for the tables if stdout is not a terminal."""
    narrowest = at_least if sys.stdout.isatty() else max(_NARROWEST, at_least)
    width = max(narrowest, shutil.get_terminal_size().columns)
    return Console(file=sys.stdout, width=width, highlight=False)


def _table(
    title: str, columns: Sequence[str], rows: Iterable[Sequence[str]], *, texts: int = 1
) -> Table:
    """Return a table with `texts` left-aligned columns, followed by columns of numbers."""
    table = Table(
        title=Text(title, style="bold"), title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False
    )
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index < texts else "right", no_wrap=True)
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    return table


def _speed_table(title: str, report: LatencyReport) -> Table:
    """Return a row for each contender and batch size, without empty columns."""
    points = report.throughput
    reference = report.quality.reference.split()[-1:] if report.quality else []
    cells: dict[str, list[str]] = {
        "engine": [point.name for point in points],
        "batch": [f"{point.batch}" for point in points],
        "images/s": [f"{point.images_per_s:,.1f}" for point in points],
        "x eager": [_number(point.times_eager, ".2f") for point in points],
        "x compiled": [_number(point.times_compiled, ".2f") for point in points],
        "x floor": [_number(point.times_floor, ".2f") for point in points],
        " - ".join(["mAP", *reference]): [
            _number(point.map_difference, "+.4f") for point in points
        ],
        "p50 ms": [f"{point.p50_ms:.2f}" for point in points],
        "p95 ms": [f"{point.p95_ms:.2f}" for point in points],
        "p99 ms": [f"{point.p99_ms:.2f}" for point in points],
        "runs": [f"{point.samples}" for point in points],
    }
    shown = {name: column for name, column in cells.items() if any(column)}
    return _table(title, list(shown), zip(*shown.values(), strict=True))


def _print_memory(console: Console, report: LatencyReport) -> None:
    """Print the memory of each engine, a column for each batch size."""
    batches = list(dict.fromkeys(point.batch for point in report.throughput))
    sizes: dict[tuple[str, str], dict[int, int | None]] = {}
    for point in report.throughput:
        sizes.setdefault((point.name, ""), {})[point.batch] = point.peak_memory_bytes
        sizes.setdefault((point.name, "GPU"), {})[point.batch] = point.device_memory_bytes
    rows = [
        (name, where, *(_size(by_batch.get(batch)) for batch in batches))
        for (name, where), by_batch in sizes.items()
        if any(by_batch.values())
    ]
    if rows:
        columns = ["engine", "", *(f"up to batch {batch}" for batch in batches)]
        title = "peak memory of a process that opens the engine and embeds"
        console.print()
        console.print(_table(title, columns, rows, texts=2))


def _print_device_times(console: Console, report: LatencyReport) -> None:
    """Print the parts of a run by the GPU's clock, for engines that measure them."""
    rows = [
        (point.name, f"{point.batch}", *(_number(ms, ".3f") for ms in parts))
        for point in report.throughput
        if any(parts := (point.h2d_ms, point.compute_ms, point.d2h_ms))
    ]
    if rows:
        columns = ["engine", "batch", "to the GPU", "compute", "back"]
        console.print()
        console.print(_table("by the GPU's clock, ms a run", columns, rows))


def _floor_text(floor: Floor) -> str:
    return (
        f"{floor.kind} floor: {floor.model_macs / 1e9:.2f} GMAC an image at "
        f"{floor.gmac_per_s:.0f} GMAC/s take {floor.ms:.2f} ms, {1e3 / floor.ms:.1f} images/s "
        f"({floor.library}, {floor.size} x {floor.size} matrices, measured in turn)"
    )


def _quality_text(report: LatencyReport) -> list[str]:
    quality = report.quality
    if quality is None or not quality.metrics:
        return []
    metrics = ", ".join(f"{name} {value:.4f}" for name, value in quality.metrics.items())
    reference = quality.reference or "none"
    return [f"mAP@all: {metrics}; reference: {reference}", quality.protocol]


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _size(size_bytes: int | None) -> str:
    return "" if size_bytes is None else size_text(size_bytes)


def _ms(metrics: object) -> list[str]:
    return [f"{getattr(metrics, name):.2f}" for name in ("p50_ms", "p95_ms", "p99_ms")]


_BEFORE = ("date", "cpu", "model_id", "threads")
_AFTER = ("photo_decode_ms", "photo_preprocess_ms", "int8_floor_ms", "fp32_floor_ms")
_QUALITY = ("map_reference", "map_protocol")


def format_csv(report: LatencyReport, machine: Machine) -> str:
    """Return the CSV content, with empty cells for what was not measured.

    The columns of `Speed` are preceded by date, processor, model and threads, and followed by the
    medians of decoding and preprocessing a photo, the floors for one image, and the rules of mAP.
    """
    floors = {floor.kind: floor.ms for floor in report.floors}
    quality = report.quality
    names = [field.name for field in fields(Speed)]
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow([*_BEFORE, *names, *_AFTER, *_QUALITY])
    for point in report.throughput:
        writer.writerow(
            [
                *(machine.date, machine.cpu, report.model_id, report.threads),
                *(getattr(point, name) for name in names),
                *(report.stage_ms("photo", "decode"), report.stage_ms("photo", "preprocess")),
                *(floors.get("int8"), floors.get("fp32")),
                *((quality.reference, quality.protocol) if quality else ("", "")),
            ]
        )
    return file.getvalue()


def write_csv(file: Path, report: LatencyReport, machine: Machine) -> None:
    """Write `format_csv` to a file, atomically."""
    with atomic_path(file) as temporary:
        temporary.write_text(format_csv(report, machine), encoding="utf-8")
