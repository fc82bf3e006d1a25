"""Contenders run by turns in short blocks, so that whatever else a machine does meets all alike."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from sbtk_runtime.errors import SbtkError
from sbtk_runtime.evaluation.metrics import percentiles
from sbtk_runtime.preprocess import Kind, Pixels, decoded, photo_pixels, sketch_pixels

#: Milliseconds of each run, in each round.
Blocks = list[list[float]]
Task = Callable[[], object]

_PAUSE_S = 0.05
# A run this long loses nothing that counts by waking its own threads.
_LONG_RUN_S = 0.25


@dataclass(frozen=True)
class BenchConfig:
    """How long is measured, by trtexec's conventions unless less is asked for.

    Attributes:
        samples: images of each kind whose stages are timed.
        block_s: seconds of a block of runs; at least one run is made. A whole block warms up.
        measured_s: seconds of runs of each contender at each batch.
        rounds: fewest blocks of each contender.
        product_sizes: rows of the square matrices of which the fastest product is looked for;
            the products of much larger ones wait for memory.
        with_memory: measure memory, for which every engine is opened once more.
    """

    samples: int = 200
    block_s: float = 0.4
    measured_s: float = 3.0
    rounds: int = 3
    product_sizes: tuple[int, ...] = (512, 1024, 2048)
    with_memory: bool = True


USUAL = BenchConfig()
#: Seconds instead of minutes, for rough metrics.
QUICK = BenchConfig(samples=5, block_s=0.02, measured_s=0.0, rounds=1, product_sizes=(512,))


@dataclass(frozen=True)
class Timings:
    """What was measured.

    Attributes:
        blocks: for each contender the milliseconds of its runs in each round.
        failed: for each contender that could not run, why.
    """

    blocks: dict[str, Blocks] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)


def run_interleaved(tasks: Mapping[str, Task], config: BenchConfig) -> Timings:
    """Return the milliseconds of each task's runs.

    Each task runs once before anything is timed, for what only a first run does. Then come rounds,
    the first of which warms up: in each, every task runs for a block of seconds, one task after
    the other. A task that fails is out, and the others go on.
    """
    timings = Timings()
    running = {name: _Contender(task) for name, task in tasks.items()}
    was_collecting = gc.isenabled()
    gc.disable()
    try:
        _let_all(running, timings, _Contender.run)
        _let_all(running, timings, lambda contender: contender.warm_up(config.block_s))
        while any(contender.has_to_go_on(config) for contender in running.values()):
            _let_all(running, timings, lambda contender: contender.take_turn(config.block_s))
    finally:
        if was_collecting:
            gc.enable()
    timings.blocks.update({name: contender.blocks for name, contender in running.items()})
    return timings


def ratio(ours: Blocks, theirs: Blocks) -> float:
    """Return how many times as long their runs take: the median over rounds of the medians'."""
    return statistics.median(
        statistics.median(slow) / statistics.median(fast)
        for fast, slow in zip(ours, theirs, strict=True)
    )


class _Contender:
    """A task, and how long its runs took."""

    def __init__(self, task: Task) -> None:
        self._task = task
        self._last_s = self._spent_s = 0.0
        self.blocks: Blocks = []

    def run(self) -> float:
        """Run once and returns the milliseconds."""
        started = time.perf_counter()
        self._task()
        self._last_s = time.perf_counter() - started
        return self._last_s * 1e3

    def warm_up(self, block_s: float) -> None:
        """Run for a block that does not count, unless the first run was as good as one."""
        if self._last_s < _LONG_RUN_S:
            self._block(block_s)

    def take_turn(self, block_s: float) -> None:
        """Run for a block that counts."""
        # The pause lets the last contender's idle threads go to sleep; the run after it wakes
        # this one's.
        time.sleep(min(_PAUSE_S, block_s / 4))
        if self._last_s < _LONG_RUN_S:
            self.run()
        started = time.perf_counter()
        self.blocks.append(self._block(block_s))
        self._spent_s += time.perf_counter() - started

    def has_to_go_on(self, config: BenchConfig) -> bool:
        """Whether too little has been measured yet."""
        return len(self.blocks) < config.rounds or self._spent_s < config.measured_s

    def _block(self, seconds: float) -> list[float]:
        times_ms: list[float] = []
        started = time.perf_counter()
        while not times_ms or time.perf_counter() - started < seconds:
            times_ms.append(self.run())
        return times_ms


def _let_all(
    running: dict[str, _Contender], timings: Timings, act: Callable[[_Contender], object]
) -> None:
    """Let each contender act, one after the other; those that fail run no more."""
    for name, contender in list(running.items()):
        try:
            act(contender)
        # torch and CUDA tell of used-up memory, and a compiler of its absence, by RuntimeError.
        except (SbtkError, RuntimeError, MemoryError) as problem:
            timings.failed[name] = _reason(problem)
            del running[name]


def _reason(problem: BaseException) -> str:
    if isinstance(problem, SbtkError):
        return problem.found
    lines = str(problem).strip().splitlines()
    return lines[0][:200] if lines else type(problem).__name__


Embeddings = NDArray[np.float32]
#: Timings `(N, 224, 224, 3) uint8` of a kind into `(N, D)` embeddings, as `Engine.run` does.
Run = Callable[[Pixels, Kind], object]
#: Answers one embedding `(D,) float32`.
Search = Callable[[Embeddings], object]


@dataclass(frozen=True)
class StageLatency:
    """Latency of one stage for one image at a time.

    `subject` is `sketch` (a query: decode, preprocess, engine, search) or `photo` (a photo being
    indexed: decode, preprocess, engine); the stage `total` is their sum, image by image.
    """

    subject: str
    stage: str
    samples: int
    p50_ms: float
    p95_ms: float
    p99_ms: float


def measure_stages(
    sketches: Sequence[bytes],
    photos: Sequence[bytes],
    run: Run,
    search: Search,
    *,
    samples: int = 200,
) -> list[StageLatency]:
    """Return the latency of every stage, over `samples` sketches and as many photos, by timings.

    Args:
        sketches: image files, used in a circle.
        photos: image files, used in a circle.
        run: the engine; it must return `(1, D) float32`.
        search: answers one embedding.
        samples: how many of each kind are timed.
    """
    times: dict[tuple[str, str], list[float]] = {}
    warm_up = min(5, samples)
    for index in range(-warm_up, samples):
        if index == 0:
            times.clear()
        _time_sketch(sketches[index % len(sketches)], run, search, times)
        _time_photo(photos[index % len(photos)], run, times)
    for subject in ("sketch", "photo"):
        stages = [values for (of, _), values in times.items() if of == subject]
        times[subject, "total"] = [sum(sample) for sample in zip(*stages, strict=True)]
    ordered = sorted(times.items(), key=lambda item: item[0][0] != "sketch")
    return [
        StageLatency(subject, stage, len(values), **percentiles(values))
        for (subject, stage), values in ordered
    ]


def _time_sketch(
    data: bytes, run: Run, search: Search, times: dict[tuple[str, str], list[float]]
) -> None:
    clock = _Laps("sketch", times)
    image = decoded(data, "sketch")
    clock.lap("decode")
    pixels = sketch_pixels(image).pixels
    clock.lap("preprocess")
    rows = np.asarray(run(pixels[None], "sketch"), dtype=np.float32)
    clock.lap("engine")
    search(rows[0])
    clock.lap("search")


def _time_photo(data: bytes, run: Run, times: dict[tuple[str, str], list[float]]) -> None:
    clock = _Laps("photo", times)
    image = decoded(data, "photo")
    clock.lap("decode")
    pixels = photo_pixels(image)
    clock.lap("preprocess")
    run(pixels[None], "photo")
    clock.lap("engine")


class _Laps:
    """Add the milliseconds since the last lap to the times of a stage."""

    def __init__(self, subject: str, times: dict[tuple[str, str], list[float]]) -> None:
        self._subject = subject
        self._times = times
        self._last = time.perf_counter()

    def lap(self, stage: str) -> None:
        now = time.perf_counter()
        self._times.setdefault((self._subject, stage), []).append((now - self._last) * 1e3)
        self._last = time.perf_counter()
