"""Latency of each stage of a query and of an indexed photo, one picture at a time."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sbtk_runtime.preprocess import Kind, Pixels, decoded, photo_pixels, sketch_pixels
from sbtk_runtime.retrieval.metrics import percentiles

Embeddings = NDArray[np.float32]
#: Turns `(N, 224, 224, 3) uint8` of a kind into `(N, D)` embeddings, as `Engine.run` does.
Run = Callable[[Pixels, Kind], object]
#: Answers one embedding `(D,) float32`.
Search = Callable[[Embeddings], object]


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
    """Adds the milliseconds since the last lap to the times of a stage."""

    def __init__(self, subject: str, times: dict[tuple[str, str], list[float]]) -> None:
        self._subject = subject
        self._times = times
        self._last = time.perf_counter()

    def lap(self, stage: str) -> None:
        now = time.perf_counter()
        self._times.setdefault((self._subject, stage), []).append((now - self._last) * 1e3)
        self._last = time.perf_counter()
