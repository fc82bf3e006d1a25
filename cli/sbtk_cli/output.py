"""What goes to the terminal: answers to stdout; progress and notices to stderr."""

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

from sbtk_runtime.files import printable_name

if TYPE_CHECKING:
    from sbtk_runtime.engines.base import EngineInfo

#: Tells a progress bar how much is done, of how much if that is known.
Advance = Callable[[int, int | None], None]

_STEADY_S = 1.0


def answer(text: str) -> None:
    """Prints `text` as one answer, on stdout."""
    click.echo(text)


def answer_json(value: Mapping[str, Any]) -> None:
    """Prints `value` as one JSON line; ASCII, so that it is valid in any locale."""
    click.echo(json.dumps(value))


def notice(text: str, *, quiet: bool = False) -> None:
    """Prints what the user may want to know, on stderr, unless `quiet`."""
    if not quiet:
        click.echo(text, err=True)


def duration_text(seconds: float) -> str:
    """Returns a duration as people say it: "0.8 s", "41 s", "1 min 12 s", "2 h 5 min"."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def count_text(count: int, noun: str) -> str:
    """Returns "1 photo", "1,000 photos"."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def size_text(size_bytes: float) -> str:
    """Returns a size as people say it: "512 bytes", "4 MB", "1.5 GB"."""
    if size_bytes < 1000:
        return f"{int(size_bytes)} bytes"
    unit = "kB" if size_bytes < 1e6 else "MB" if size_bytes < 1e9 else "GB"
    value = size_bytes / {"kB": 1e3, "MB": 1e6, "GB": 1e9}[unit]
    return f"{value:.1f} {unit}" if value < 9.95 else f"{value:.0f} {unit}"


def engine_text(model_id: str, info: EngineInfo) -> str:
    """Returns which model runs where; with a GPU in the machine, also why that is not used.

    A faster engine for the CPU that could be installed is `sbtk doctor`'s to name.
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
    """Whether somebody watches: stderr is a terminal that can move its cursor."""
    return not quiet and sys.stderr.isatty() and os.environ.get("TERM") != "dumb"


@contextlib.contextmanager
def progress(label: str, *, quiet: bool = False) -> Iterator[Advance]:
    """Yields a function that moves a progress bar; it does nothing where nobody watches."""
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
        console=Console(stderr=True),  # heeds NO_COLOR
        transient=True,
    )
    with bar:
        task = bar.add_task(label, total=None, rate="")
        started: float | None = None

        def advance(done: int, total: int | None) -> None:
            nonlocal started
            if started is None and total is not None:
                # What was counted before was files that were found, not done.
                started = time.monotonic()
                bar.reset(task, total=total)
            elapsed_s = 0.0 if started is None else time.monotonic() - started
            # Items come in bursts, so that the first ones say nothing about the rate.
            rate = f"{done / elapsed_s:.0f}/s" if elapsed_s > _STEADY_S else ""
            bar.update(task, completed=done, total=total, rate=rate)

        yield advance


def plain_table(rows: Sequence[tuple[str, ...]], *, indent: str = "") -> str:
    """Returns rows of cells as text, columns aligned, the last one ragged."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]) - 1)]
    lines = []
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=False)]
        lines.append((indent + "  ".join([*cells, row[-1]])).rstrip())
    return "\n".join(lines)


def shown_relative(path: Path) -> str:
    """Returns `path` for people, relative to the working folder where it lies below it."""
    with contextlib.suppress(ValueError, OSError):
        return printable_name(path.absolute().relative_to(Path.cwd()))
    return printable_name(path)
