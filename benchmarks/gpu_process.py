"""A stage as a process of its own, which can crash or hang and costs no more than its points."""

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
    """Run a stage as a process, passes on what it finds and says what it did not come to.

    Args:
        task: what it is asked; it is killed when its time is over.
        report: gets every planned point, and each of them once more with its outcome.
        log: gets what the process prints beside its findings.
        command: of the process, which prints findings as lines; by default the stage's own.
    """
    seconds = task.left_s
    if seconds < _LEAST_S:
        report(Finding(task.stage, "stage").not_reached("the time was over before it began"))
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
    reason = "the stage ended without it"
    if is_over.is_set():
        reason = f"the stage was ended after the {seconds:.0f} s that it had"
    elif process.returncode:
        reason = f"the stage ended with {_ending(process.returncode)}; see gpu.log"
    if process.returncode and not open_points:
        report(Finding(task.stage, "stage").failed(reason))
    for point in open_points.values():
        report(point.not_reached(reason))


def _findings(
    process: subprocess.Popen[str], seconds: float, is_over: threading.Event
) -> Iterator[Finding]:
    """Yield what a process prints; kills it, and sets the event, when its seconds are over."""

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
    # Plans of a model with random weights have no place among the user's.
    return environment() | {"XDG_CACHE_HOME": str(task.scratch / "cache")}
