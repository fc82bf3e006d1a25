"""All benchmarks for NVIDIA GPUs, in one run of less than ten minutes.

    python -m benchmarks.gpu [--out benchmarks/results/gpu] [--budget-s 570]

Each stage is a process with a share of the time, so a hanging driver or a crashing library affects
only its own stage. Results are saved immediately: a JSON line for each point in gpu.jsonl, and
after each stage the tables of gpu.md. Points for which the time does not suffice are "not reached".
The output of libraries is in gpu.log.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import IO

from benchmarks.gpu_findings import Finding, Task
from benchmarks.gpu_page import Book
from benchmarks.gpu_process import run_stage

# Stages in order, with their seconds out of 600; the others share unused time.
_STAGES = {
    "card": 45,  # the first to import torch, from a cold disk
    "torch": 200,
    "training": 90,
    "survey": 25,
    "model": 60,
    "engine onnxruntime-cuda": 30,
    "engine tensorrt": 150,
    "engine tensorrt-rtx": 10,
}
_DRY_STAGES = {**_STAGES, "engine onnxruntime": 30}


def main() -> int:
    """Measure, save the results and return the exit code, which is 1 without a GPU."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, help="folder  [default: benchmarks/results/gpu]")
    parser.add_argument("--budget-s", type=float, default=570.0, help="seconds for the whole run")
    parser.add_argument("--data", type=Path, help="folder of sketches and photos to train on")
    parser.add_argument("--model", help="bundle for the engines  [default: random weights]")
    parser.add_argument("--dry-run", action="store_true", help="run on the CPU, without measuring")
    parser.add_argument("--task", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.task is not None:
        _run_stage(Task.from_text(options.task))
        return 0
    if options.dry_run and options.out is None:
        parser.error("--dry-run needs --out, a folder without measured results")
    out = options.out or Path("benchmarks/results/gpu")
    with tempfile.TemporaryDirectory(prefix="sbtk-gpu-") as scratch:
        base = Task("", 0.0, Path(scratch), options.dry_run, options.data, options.model)
        return measure(out, base, options.budget_s)


def measure(out: Path, base: Task, budget_s: float) -> int:
    """Run all stages, save the results in `out` and return the exit code."""
    tasks = _tasks(base, budget_s)
    card = next(tasks)
    found: list[Finding] = []
    run_stage(card, found.append, _log(card))
    if not any(finding.state == "measured" for finding in found):
        print(f"no GPU to measure on: {_reason(found, _log(card))}", file=sys.stderr)
        return 1
    command = " ".join(["python", "-m", "benchmarks.gpu", *sys.argv[1:]])
    book = Book(out, command, budget_s, is_dry_run=base.is_dry_run)
    for finding in found:
        book.add(finding)
    book.close_stage(card.stage, _log(card))
    for task in tasks:
        try:
            run_stage(task, book.add, _log(task))
        finally:
            book.close_stage(task.stage, _log(task))
    print(out / "gpu.md")
    return 0


def _tasks(base: Task, budget_s: float) -> Iterator[Task]:
    """Yield the stages' tasks, each with its share of the remaining time."""
    end = time.monotonic() + budget_s
    waiting = dict(_DRY_STAGES if base.is_dry_run else _STAGES)
    for name in list(waiting):
        now = time.monotonic()
        # A dry run checks that everything works, on machines of any speed.
        share = 1.0 if base.is_dry_run else waiting[name] / sum(waiting.values())
        seconds = share * (end - now)
        del waiting[name]
        print(f"{name}: up to {seconds:.0f} s", file=sys.stderr, flush=True)
        yield replace(base, stage=name, end_s=now + seconds)


def _log(task: Task) -> Path:
    return task.scratch / f"{task.stage}.log"


def _reason(found: list[Finding], log: Path) -> str:
    """Return why the first stage found no card, from its findings or its last error."""
    reasons = [finding.reason for finding in found if finding.state == "failed"]
    lines = log.read_text(errors="replace").split("\n") if log.is_file() else []
    complaints = [line.strip() for line in lines if line.strip()]
    return "; ".join([*reasons[:1], *complaints[-1:]]) or "out of time"


def _run_stage(task: Task) -> None:
    """Run a stage in this process; only its findings go to stdout."""
    with _own_stdout() as stream:

        def report(finding: Finding) -> None:
            print(finding.to_line(), file=stream, flush=True)

        is_module = task.stage in ("card", "torch", "training", "model")
        name = task.stage if is_module else "engines"
        importlib.import_module(f"benchmarks.gpu_{name}").run(task, report)


@contextlib.contextmanager
def _own_stdout() -> Iterator[IO[str]]:
    """Yield the process's stdout, and redirect other output, including that of C++, to stderr."""
    with os.fdopen(os.dup(1), "w") as stream:
        os.dup2(2, 1)
        yield stream


if __name__ == "__main__":
    sys.exit(main())
