"""Stages as separate processes, so that a crash or hang affects only their own points."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

from benchmarks.commands import environment
from benchmarks.gpu_findings import Finding, Key, Report, Task

_LEAST_S = 3.0


def run_stage(
    task: Task, report: Report, log: Path, command: tuple[str, ...] | None = None
) -> None:
    """Run a stage as a process, and report its findings and the points it did not reach.

    Args:
        task: the task; the process is killed at its deadline.
        report: called with every planned point, and again with its outcome.
        log: called with other output of the process.
        command: command that prints findings as lines; by default the stage's own.
    """
    seconds = task.left_s
    if seconds < _LEAST_S:
        report(Finding(task.stage, "stage").not_reached("out of time before it began"))
        return
    if command is None:
        command = (sys.executable, "-m", "benchmarks.gpu", "--task", task.to_text())
    open_points: dict[Key, Finding] = {}
    with log.open("w") as complaints:
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=complaints,
            text=True,
            env=_environment(task),
        )
        is_over = threading.Event()
        for finding in _findings(process, seconds, is_over):
            report(finding)
            if finding.state == "planned":
                open_points[finding.key] = finding
            else:
                open_points.pop(finding.key, None)
    reason = "the stage ended before it"
    if is_over.is_set():
        reason = f"the stage was killed after its {seconds:.0f} s"
    elif process.returncode:
        reason = f"the stage ended with {_ending(process.returncode)}; see gpu.log"
    if process.returncode and not open_points:
        report(Finding(task.stage, "stage").failed(reason))
    for point in open_points.values():
        report(point.not_reached(reason))


def _findings(
    process: subprocess.Popen[str], seconds: float, is_over: threading.Event
) -> Iterator[Finding]:
    """Yield the output of a process; kill it and set the event after some seconds."""

    def end() -> None:
        is_over.set()
        process.kill()

    timer = threading.Timer(seconds, end)
    timer.start()
    assert process.stdout is not None
    try:
        for line in process.stdout:
            # A killed process may leave half a line.
            with contextlib.suppress(ValueError):
                yield Finding.from_line(line)
        process.wait()
    finally:
        timer.cancel()
        process.kill()
        process.wait()
        process.stdout.close()


def _ending(code: int) -> str:
    return f"signal {-code}" if code < 0 else f"exit code {code}"


def _environment(task: Task) -> dict[str, str]:
    # Keep plans of random weights out of the user's cache.
    return environment() | {"XDG_CACHE_HOME": str(task.scratch / "cache")}
