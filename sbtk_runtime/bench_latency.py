"""Latency of each stage of a query and an index run, and images per second by batch.

Contenders are measured by turns in short blocks, so that whatever else the machine does meets all
of them alike, and a ratio is taken within each round before it is averaged over rounds.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sbtk_runtime.metrics import percentiles
from sbtk_runtime.preprocess import SIZE_PX, Pixels, decoded, photo_pixels, sketch_pixels

Embeddings = NDArray[np.float32]
#: Turns `(N, 224, 224, 3) uint8` into `(N, D)` embeddings; what it returns is not looked at.
Run = Callable[[Pixels], object]
#: Answers one embedding `(D,) float32`.
Search = Callable[[Embeddings], object]
Progress = Callable[[str], None]


@dataclass(frozen=True)
class StageLatency:
    """Latency of one stage for one picture at a time.

    `subject` is `sketch` (a query: decode, preprocess, engine, search) or `photo` (a photo being
    indexed: decode, preprocess, engine); the stage `total` is their sum, picture by picture.
    """

    subject: str
    stage: str
    samples: int
    p50_ms: float
    p95_ms: float
    p99_ms: float


@dataclass(frozen=True)
class Throughput:
    """Speed of one contender at one batch size.

    Attributes:
        name: engine and precision.
        batch: pictures per run.
        samples: runs that were timed.
        p50_ms, p95_ms, p99_ms: of a whole run.
        images_per_s: `batch` over the median run.
        times_reference: how many times as fast as the reference contender, the median over
            rounds; `None` without a reference.
    """

    name: str
    batch: int
    samples: int
    p50_ms: float
    p95_ms: float
    p99_ms: float
    images_per_s: float
    times_reference: float | None


def measure_stages(
    sketches: Sequence[bytes],
    photos: Sequence[bytes],
    run: Run,
    search: Search,
    *,
    samples: int = 200,
) -> list[StageLatency]:
    """Returns the latency of every stage, over `samples` sketches and as many photos, by turns.

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


def measure_throughput(
    contenders: Mapping[str, Run],
    batches: Sequence[int],
    *,
    reference: str | None = None,
    rounds: int = 5,
    block_s: float = 0.4,
    pixels: Pixels | None = None,
    progress: Progress = lambda _: None,
) -> list[Throughput]:
    """Returns the speed of each contender at each batch size.

    After a warm-up, in each round every contender runs for some `block_s` seconds, one after
    the other.

    Args:
        contenders: name to engine.
        batches: numbers of pictures per run.
        reference: the contender that the others are compared with, if any.
        rounds: blocks of each contender.
        block_s: seconds of a block; at least one run is made.
        pixels: `(N, 224, 224, 3) uint8` pictures to embed, in a circle; random ones if `None`.
        progress: told what is measured next.
    """
    if pixels is None:
        pixels = np.random.default_rng(0).integers(0, 256, (8, SIZE_PX, SIZE_PX, 3), np.uint8)
    results = []
    for batch in batches:
        progress(f"batch {batch}: {', '.join(contenders)}")
        filled = np.ascontiguousarray(pixels[np.arange(batch) % len(pixels)])
        blocks = _measured_by_turns(contenders, filled, rounds, block_s)
        results += [
            _throughput(name, batch, blocks[name], blocks.get(reference) if reference else None)
            for name in contenders
        ]
    return results


def _measured_by_turns(
    contenders: Mapping[str, Run], pixels: Pixels, rounds: int, block_s: float
) -> dict[str, list[list[float]]]:
    """Returns, for each contender, the milliseconds of its runs in each round."""
    blocks: dict[str, list[list[float]]] = {name: [] for name in contenders}
    was_collecting = gc.isenabled()
    gc.disable()
    try:
        for round_number in range(-1, rounds):
            for name, run in contenders.items():
                # The pause lets the last contender's idle threads go to sleep; the run after it
                # wakes this one's.
                time.sleep(min(0.05, block_s / 4))
                run(pixels)
                block = _block(run, pixels, block_s)
                if round_number >= 0:  # the first round warms up
                    blocks[name].append(block)
    finally:
        if was_collecting:
            gc.enable()
    return blocks


def _block(run: Run, pixels: Pixels, seconds: float) -> list[float]:
    """Runs for some seconds, at least once, and returns the milliseconds of each run."""
    times_ms: list[float] = []
    started = time.perf_counter()
    while not times_ms or time.perf_counter() - started < seconds:
        times_ms.append(_elapsed_ms(run, pixels))
    return times_ms


def _throughput(
    name: str, batch: int, blocks: list[list[float]], reference: list[list[float]] | None
) -> Throughput:
    runs_ms = [run_ms for block in blocks for run_ms in block]
    figures = percentiles(runs_ms)
    times_reference = None
    if reference is not None:
        times_reference = statistics.median(
            statistics.median(theirs) / statistics.median(ours)
            for ours, theirs in zip(blocks, reference, strict=True)
        )
    return Throughput(
        name=name,
        batch=batch,
        samples=len(runs_ms),
        images_per_s=batch / figures["p50_ms"] * 1e3,
        times_reference=times_reference,
        **figures,
    )


def _time_sketch(
    data: bytes, run: Run, search: Search, times: dict[tuple[str, str], list[float]]
) -> None:
    clock = _Laps("sketch", times)
    image = decoded(data, "sketch")
    clock.lap("decode")
    pixels = sketch_pixels(image).pixels
    clock.lap("preprocess")
    rows = np.asarray(run(pixels[None]), dtype=np.float32)
    clock.lap("engine")
    search(rows[0])
    clock.lap("search")


def _time_photo(data: bytes, run: Run, times: dict[tuple[str, str], list[float]]) -> None:
    clock = _Laps("photo", times)
    image = decoded(data, "photo")
    clock.lap("decode")
    pixels = photo_pixels(image)
    clock.lap("preprocess")
    run(pixels[None])
    clock.lap("engine")


class _Laps:
    """Adds the milliseconds since the last lap to the times of a stage."""

    def __init__(self, subject: str, times: dict[tuple[str, str], list[float]]) -> None:
        self._subject = subject
        self._times = times
        self._last = time.perf_counter()

    def lap(self, stage: str) -> None:
        now = time.perf_counter()
        self._times.setdefault((self._subject, stage), []).append((now - self._last) * 1e3)
        self._last = time.perf_counter()


def _elapsed_ms(run: Run, pixels: Pixels) -> float:
    started = time.perf_counter()
    run(pixels)
    return (time.perf_counter() - started) * 1e3
