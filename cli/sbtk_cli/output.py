"""Output of commands: results on stdout, progress and notices on stderr."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sbtk_runtime.files import count_text, printable_name

if TYPE_CHECKING:
    from sbtk_runtime.engines.base import EngineInfo

#: Moves a progress bar: how many are done, and how many there are, `None` if unknown.
Advance = Callable[[int, int | None], None]

_STEADY_S = 1.0


def answer(text: str) -> None:
    """Print a result on stdout."""
    click.echo(text)


def answer_json(value: Mapping[str, Any]) -> None:
    """Print a result as a JSON line in ASCII, which is valid in every locale."""
    click.echo(json.dumps(value))


def notice(text: str, *, quiet: bool = False) -> None:
    """Print a notice on stderr, unless `quiet`."""
    if not quiet:
        click.echo(text, err=True)


def duration_text(seconds: float) -> str:
    """Return a duration for people: "0.8 s", "41 s", "1 min 12 s", "2 h 5 min"."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def size_text(size_bytes: float) -> str:
    """Return a size for people: "512 bytes", "4 MB", "1.5 GB"."""
    if size_bytes < 1000:
        return f"{int(size_bytes)} bytes"
    unit = "kB" if size_bytes < 1e6 else "MB" if size_bytes < 1e9 else "GB"
    value = size_bytes / {"kB": 1e3, "MB": 1e6, "GB": 1e9}[unit]
    return f"{value:.1f} {unit}" if value < 9.95 else f"{value:.0f} {unit}"


def engine_text(model_id: str, info: EngineInfo) -> str:
    """Return the model, engine and device; if there is an unused GPU, also why it is not used.

    Faster engines for the CPU are left to `sbtk doctor`.
    """
    from sbtk_runtime.doctor import gpu_names
    from sbtk_runtime.engines.registry import GPU_ENGINE_NAMES

    text = (
        f"{model_id} ({info.precision}) on {info.name} {info.version}, {info.device}, "
        f"{count_text(info.threads, 'thread')}"
    )
    why_no_gpu = [why for why in info.passed_over if why.partition(":")[0] in GPU_ENGINE_NAMES]
    if why_no_gpu and gpu_names():
        text += f"; not {'; nor '.join(why_no_gpu)}"
    return text


def is_progress_wanted(quiet: bool) -> bool:
    """Return whether to show progress: stderr is a terminal that can move its cursor."""
    return not quiet and sys.stderr.isatty() and os.environ.get("TERM") != "dumb"


@contextlib.contextmanager
def progress(label: str, *, quiet: bool = False) -> Iterator[Advance]:
    """Yield a function that moves a progress bar, or does nothing without a terminal."""
    if not is_progress_wanted(quiet):
        yield lambda done, total: None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        SpinnerColumn,
        TextColumn,
        TimeRemainingColumn,
    )

    bar = Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
        console=Console(stderr=True),  # respects NO_COLOR
        transient=True,
    )
    with bar:
        task = bar.add_task(label, total=None, rate="")
        started: float | None = None

        def advance(done: int, total: int | None) -> None:
            nonlocal started
            if started is None and total is not None:
                # Before, files were counted as they were found.
                started = time.monotonic()
                bar.reset(task, total=total)
            elapsed_s = 0.0 if started is None else time.monotonic() - started
            # Items come in bursts, so the first ones give no rate.
            rate = f"{done / elapsed_s:.0f}/s" if elapsed_s > _STEADY_S else ""
            bar.update(task, completed=done, total=total, rate=rate)

        yield advance


def plain_table(rows: Sequence[tuple[str, ...]], *, indent: str = "") -> str:
    """Return rows of cells as text with aligned columns."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]) - 1)]
    lines = []
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=False)]
        lines.append((indent + "  ".join([*cells, row[-1]])).rstrip())
    return "\n".join(lines)


def shown_relative(path: Path) -> str:
    """Return a printable path, relative to the working folder if it is below it."""
    with contextlib.suppress(ValueError, OSError):
        return printable_name(path.absolute().relative_to(Path.cwd()))
    return printable_name(path)
