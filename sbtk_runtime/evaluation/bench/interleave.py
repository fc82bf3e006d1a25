"""Interleaved timing: contenders alternate in short blocks, so that other load hits all alike."""

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
from sbtk_runtime.preprocess import Kind, Pixels, Preprocessing, decode_image, photo_pixels

#: Milliseconds of each run, by round.
Blocks = list[list[float]]
Task = Callable[[], object]

_PAUSE_S = 0.05
# For runs this long, waking the threads takes a negligible share.
_LONG_RUN_S = 0.25


@dataclass(frozen=True)
class BenchConfig:
    """How long to measure; the defaults follow trtexec.

    Attributes:
        samples: images of each kind whose stages are timed.
        block_s: seconds of a block, which has at least one run; one block is for warm-up.
        measured_s: seconds of runs of each contender at each batch size.
        rounds: minimum number of blocks of each contender.
        product_sizes: sizes of the square matrices among which the fastest product is searched;
            products of much larger ones are limited by memory.
        with_memory: whether to measure memory, which opens every engine once more.
    """

    samples: int = 200
    block_s: float = 0.4
    measured_s: float = 3.0
    rounds: int = 3
    product_sizes: tuple[int, ...] = (512, 1024, 2048)
    with_memory: bool = True


USUAL = BenchConfig()
#: Rough results in seconds instead of minutes.
QUICK = BenchConfig(samples=5, block_s=0.02, measured_s=0.0, rounds=1, product_sizes=(512,))


@dataclass(frozen=True)
class Timings:
    """The times of all tasks.

    Attributes:
        blocks: milliseconds of the runs in each round, by task.
        failed: reasons of failures, by task.
    """

    blocks: dict[str, Blocks] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)


def run_interleaved(tasks: Mapping[str, Task], config: BenchConfig) -> Timings:
    """Run the tasks in interleaved blocks and return the times of their runs.

    Each task runs once untimed. Then, in each round, every task runs for one block; the first round
    is for warm-up. Tasks that fail are dropped.
    """
    timings = Timings()
    running = {name: _Contender(task) for name, task in tasks.items()}
    was_collecting = gc.isenabled()
    gc.disable()
    try:
        _call_all(running, timings, _Contender.run)
        _call_all(running, timings, lambda contender: contender.warm_up(config.block_s))
        while any(contender.needs_more(config) for contender in running.values()):
            _call_all(running, timings, lambda contender: contender.take_turn(config.block_s))
    finally:
        if was_collecting:
            gc.enable()
    timings.blocks.update({name: contender.blocks for name, contender in running.items()})
    return timings


def compute_ratio(ours: Blocks, theirs: Blocks) -> float:
    """Return how many times as long `theirs` take: the median over rounds of ratios of medians."""
    return statistics.median(
        statistics.median(slow) / statistics.median(fast)
        for fast, slow in zip(ours, theirs, strict=True)
    )


class _Contender:
    """A task and the times of its runs."""

    def __init__(self, task: Task) -> None:
        self._task = task
        self._last_s = self._spent_s = 0.0
        self.blocks: Blocks = []

    def run(self) -> float:
        """Run once and return the milliseconds."""
        started = time.perf_counter()
        self._task()
        self._last_s = time.perf_counter() - started
        return self._last_s * 1e3

    def warm_up(self, block_s: float) -> None:
        """Run for an untimed block, unless the first run was long enough."""
        if self._last_s < _LONG_RUN_S:
            self._block(block_s)

    def take_turn(self, block_s: float) -> None:
        """Run for a timed block."""
        # During the pause, the last contender's idle threads go to sleep; the untimed run wakes
        # this one's threads.
        time.sleep(min(_PAUSE_S, block_s / 4))
        if self._last_s < _LONG_RUN_S:
            self.run()
        started = time.perf_counter()
        self.blocks.append(self._block(block_s))
        self._spent_s += time.perf_counter() - started

    def needs_more(self, config: BenchConfig) -> bool:
        """Whether another block is needed."""
        return len(self.blocks) < config.rounds or self._spent_s < config.measured_s

    def _block(self, seconds: float) -> list[float]:
        times_ms: list[float] = []
        started = time.perf_counter()
        while not times_ms or time.perf_counter() - started < seconds:
            times_ms.append(self.run())
        return times_ms


def _call_all(
    running: dict[str, _Contender], timings: Timings, act: Callable[[_Contender], object]
) -> None:
    """Call `act` on each contender in turn, and drop those that fail."""
    for name, contender in list(running.items()):
        try:
            act(contender)
        # torch raises RuntimeError if memory is exhausted or a compiler is missing.
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
#: Searches for one embedding `(D,) float32`.
Search = Callable[[Embeddings], object]


@dataclass(frozen=True)
class StageLatency:
    """Latency of one stage, one image at a time.

    `subject` is `sketch` (a query: decode, preprocess, engine, search) or `photo` (indexing a
    photo: decode, preprocess, engine). The stage `total` is the sum for each image.
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
    preprocessing: Preprocessing,
    *,
    samples: int = 200,
) -> list[StageLatency]:
    """Return the latency of every stage over `samples` sketches and photos, alternating.

    Args:
        sketches: contents of image files, repeated as needed.
        photos: contents of image files, repeated as needed.
        run: the engine; it must return `(1, D) float32`.
        search: searches for one embedding.
        preprocessing: of the engine's model.
        samples: number of timed images of each kind.
    """
    times: dict[tuple[str, str], list[float]] = {}
    warm_up = min(5, samples)
    for index in range(-warm_up, samples):
        if index == 0:
            times.clear()
        _time_sketch(sketches[index % len(sketches)], preprocessing, run, search, times)
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
    data: bytes,
    preprocessing: Preprocessing,
    run: Run,
    search: Search,
    times: dict[tuple[str, str], list[float]],
) -> None:
    clock = _Laps("sketch", times)
    image = decode_image(data, "sketch")
    clock.lap("decode")
    pixels = preprocessing.sketch_pixels(image).pixels
    clock.lap("preprocess")
    rows = np.asarray(run(pixels[None], "sketch"), dtype=np.float32)
    clock.lap("engine")
    search(rows[0])
    clock.lap("search")


def _time_photo(data: bytes, run: Run, times: dict[tuple[str, str], list[float]]) -> None:
    clock = _Laps("photo", times)
    image = decode_image(data, "photo")
    clock.lap("decode")
    pixels = photo_pixels(image)
    clock.lap("preprocess")
    run(pixels[None], "photo")
    clock.lap("engine")


class _Laps:
    """A stopwatch that records the time of each stage."""

    def __init__(self, subject: str, times: dict[tuple[str, str], list[float]]) -> None:
        self._subject = subject
        self._times = times
        self._last = time.perf_counter()

    def lap(self, stage: str) -> None:
        now = time.perf_counter()
        self._times.setdefault((self._subject, stage), []).append((now - self._last) * 1e3)
        self._last = time.perf_counter()
