"""Results of benchmarks as Markdown and JSON."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sbtk_runtime.machine import Machine, this_machine


@dataclass(frozen=True)
class Result:
    """The result of a benchmark.

    Attributes:
        title: title.
        columns, rows: the table; cells are texts with units.
        figures: the same as numbers.
        notes: how it was measured.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    figures: dict[str, Any]
    notes: Sequence[str] = ()


def print_result(result: Result, module: str, *, as_json: bool) -> None:
    """Print the result with the command and the machine."""
    machine = this_machine()
    command = " ".join(["python", "-m", module, *sys.argv[1:]])
    if as_json:
        found = {"title": result.title, "command": command, "machine": machine.to_json()}
        print(json.dumps(found | {"figures": result.figures, "notes": list(result.notes)}))
    else:
        print(_markdown(result, command, machine))


def percentiles(times: Sequence[float]) -> dict[str, float]:
    """Return median, 95th percentile, minimum and maximum as `p50`, `p95`, `min` and `max`."""
    p50, p95 = np.percentile(times, (50, 95))
    return {"p50": float(p50), "p95": float(p95), "min": min(times), "max": max(times)}


def table_lines(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Return the lines of a Markdown table."""
    return [_row(columns), _row(["---"] * len(columns)), *(_row(row) for row in rows)]


def _markdown(result: Result, command: str, machine: Machine) -> str:
    lines = [f"### {result.title}", "", f"`{command}`", ""]
    lines += table_lines(result.columns, result.rows)
    lines += ["", *(f"- {note}" for note in result.notes)]
    lines += [f"- {line}" for line in machine.lines()]
    return "\n".join(lines) + "\n"


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
