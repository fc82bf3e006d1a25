"""Times of repeated runs, by CUDA events on a GPU and by the clock otherwise."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

from sbtk_runtime.evaluation.metrics import percentiles

Run = Callable[[], object]

_CHUNK_S = 0.1
_MOST_QUEUED = 500


@dataclass(frozen=True)
class TimingConfig:
    """How long to measure.

    Attributes:
        warm_s: seconds of warm-up.
        measured_s: seconds of timed runs.
        least_runs: minimum number of timed runs.
    """

    warm_s: float = 0.2
    measured_s: float = 0.6
    least_runs: int = 5


DRY = TimingConfig(warm_s=0.0, measured_s=0.0, least_runs=2)


def time_run(run: Run, device: str, batch: int, effort: TimingConfig) -> dict[str, float]:
    """Return images/s and percentiles of a run on the current CUDA stream.

    Runs are queued back to back with events between them, as on a busy server, so launch overhead
    of the CPU counts only if it exceeds the GPU's time. On a CPU, runs are timed by the clock.
    """
    if not device.startswith("cuda"):
        return time_by_clock(run, batch, effort)
    import torch

    expected_s = _warmed_up(run, torch.cuda.synchronize, effort)
    queued = max(1, min(_MOST_QUEUED, round(_CHUNK_S / expected_s)))
    times_ms: list[float] = []
    while len(times_ms) < effort.least_runs or sum(times_ms) < effort.measured_s * 1e3:
        events = [
            torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            for _ in range(queued + 1)
        ]
        events[0].record()
        for event in events[1:]:
            run()
            event.record()
        events[-1].synchronize()
        times_ms += [before.elapsed_time(after) for before, after in pairwise(events)]
    return _figures(times_ms, batch)


def time_by_clock(run: Run, batch: int, effort: TimingConfig) -> dict[str, float]:
    """Return images/s and percentiles of a synchronous run."""
    _warmed_up(run, lambda: None, effort)
    times_ms: list[float] = []
    while len(times_ms) < effort.least_runs or sum(times_ms) < effort.measured_s * 1e3:
        started = time.perf_counter()
        run()
        times_ms.append((time.perf_counter() - started) * 1e3)
    return _figures(times_ms, batch)


def _warmed_up(run: Run, wait: Callable[[], None], effort: TimingConfig) -> float:
    """Run for the warm-up, at least twice; return the seconds of the last run."""
    begun = time.perf_counter()
    runs = 0
    while True:
        started = time.perf_counter()
        run()
        wait()
        runs += 1
        now = time.perf_counter()
        if runs >= 2 and now - begun >= effort.warm_s:
            return max(now - started, 1e-6)


def _figures(times_ms: list[float], batch: int) -> dict[str, float]:
    images_per_s = batch * len(times_ms) / sum(times_ms) * 1e3
    return {"images_per_s": images_per_s, "runs": len(times_ms), **percentiles(times_ms)}
