"""The contenders of a benchmark, and their images per second relative to torch and the floor."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np

from sbtk_runtime.bundle import Bundle
from sbtk_runtime.engines.base import AUTO, Engine, EngineInfo, EngineOptions, Notify, no_notify
from sbtk_runtime.engines.registry import open_engine, probe_engines
from sbtk_runtime.engines.tensorrt.pipeline import DeviceTimes
from sbtk_runtime.errors import BadConfig, BadModel, EngineUnavailable, MissingExtra
from sbtk_runtime.evaluation.bench.floor import Floor, Product, compute_floor, times_floor
from sbtk_runtime.evaluation.bench.interleave import (
    USUAL,
    BenchConfig,
    Blocks,
    Embeddings,
    Timings,
    compute_ratio,
    run_interleaved,
)
from sbtk_runtime.evaluation.metrics import percentiles
from sbtk_runtime.manifest import PRECISIONS, Precision
from sbtk_runtime.preprocess import Kind, Pixels

#: As `--engine`: every engine that works.
ALL = "all"

#: Kind of a contender: an engine, a baseline (torch eager or compiled), or another comparison.
Role = Literal["engine", "eager", "compiled", "other"]

_TIMED_RUNS = 20


@runtime_checkable
class TimedEngine(Protocol):
    """An engine that measures the parts of a run on its GPU."""

    def run_timed(self, images: Pixels, kind: Kind) -> tuple[Embeddings, DeviceTimes]:
        """Return the embeddings `(N, D) float32` of a batch, and the times of the run's parts."""
        ...


@dataclass(frozen=True)
class Contender:
    """An engine or baseline to be measured.

    Attributes:
        engine: its name; for an engine, as in `--engine`.
        precision: precision of its multiplications.
        device: `cpu`, or a GPU such as `cuda:0`; contenders are compared on the same device.
        run: embeds `(N, 224, 224, 3) uint8` photos; its result is ignored.
        role: kind of contender.
        timed: the engine, if it measures the parts of a run.
    """

    engine: str
    precision: str
    device: str
    run: Callable[[Pixels], object]
    role: Role = "engine"
    timed: TimedEngine | None = None

    @property
    def name(self) -> str:
        """Engine and precision."""
        return f"{self.engine} {self.precision}"


def open_default(bundle: Bundle, options: EngineOptions, notify: Notify = no_notify) -> Engine:
    """Open the engine on which stages are measured; for `all`, the one that `auto` selects.

    Raises:
        EngineUnavailable, MissingExtra, BadModel, BadConfig: as `open_engine`.
    """
    if options.engine == ALL:
        options = replace(options, engine=AUTO)
    return open_engine(bundle, options, notify=notify)


def open_contenders(
    stack: contextlib.ExitStack,
    bundle: Bundle,
    default: EngineInfo,
    options: EngineOptions,
    notify: Notify = no_notify,
) -> tuple[list[Contender], list[str]]:
    """Open the engines to measure; return them with notes on skipped engines.

    For `all`, these are all working engines, otherwise the default one, each in the requested
    precision or in all precisions that the bundle has for it.

    Args:
        stack: closes the engines.
        bundle: the model.
        default: the engine on which the stages were measured.
        options: the requested engine, or `all`; `batch` is the largest to run.
        notify: called with messages about slow steps.
    """
    notes = [f"not {reason}" for reason in default.passed_over]
    names = [default.name]
    if options.engine == ALL:
        reports = probe_engines()
        notes = [f"{r.name} skipped: {r.reason}" for r in reports if not r.works]
        names = [r.name for r in reports if r.works]
    contenders = []
    for name in names:
        for precision in _precisions(bundle, options.precision):
            try:
                one = replace(options, engine=name, precision=precision, threads=default.threads)
                opened = open_engine(bundle, one, notify=notify)
            except (EngineUnavailable, MissingExtra, BadConfig, BadModel) as problem:
                notes.append(f"{name} {precision} skipped: {problem.found}")
                continue
            stack.callback(opened.close)
            contenders.append(make_contender(opened))
    return contenders, notes


def make_contender(engine: Engine) -> Contender:
    """Return an open engine as a contender."""
    info = engine.info
    timed = engine if isinstance(engine, TimedEngine) else None
    run = partial(engine.run, kind="photo")
    return Contender(info.name, info.precision, info.device, run, timed=timed)


@dataclass(frozen=True)
class Speed:
    """Speed of one contender at one batch size; `None` if not measured.

    Attributes:
        name: engine and precision.
        engine, precision, device, role: as in `Contender`.
        batch: images per run.
        samples: number of timed runs.
        images_per_s: `batch` divided by the median time of a run.
        p50_ms, p95_ms, p99_ms: time of a whole run, from and to the host's memory.
        times_eager, times_compiled: speed relative to torch eager and torch compiled on the same
            device, the median over rounds.
        times_floor: time relative to that of the multiplications alone.
        h2d_ms, compute_ms, d2h_ms: medians of a run's parts, by the GPU's clock.
        peak_memory_bytes: peak resident memory of a separate process, up to this batch.
        device_memory_bytes: GPU memory of such a process.
        map_all: mAP@all on held-out seen classes.
        map_difference: `map_all` minus that of the reference, which is FP32 if available.
    """

    name: str
    engine: str
    precision: str
    device: str
    role: Role
    batch: int
    samples: int
    images_per_s: float
    p50_ms: float
    p95_ms: float
    p99_ms: float
    times_eager: float | None = None
    times_compiled: float | None = None
    times_floor: float | None = None
    h2d_ms: float | None = None
    compute_ms: float | None = None
    d2h_ms: float | None = None
    peak_memory_bytes: int | None = None
    device_memory_bytes: int | None = None
    map_all: float | None = None
    map_difference: float | None = None


@dataclass(frozen=True)
class Speeds:
    """The speed of every contender at every batch size, the floors, and failures."""

    points: list[Speed]
    floors: list[Floor]
    notes: list[str]


def measure_speeds(
    contenders: Sequence[Contender],
    batches: Sequence[int],
    pixels: Pixels,
    *,
    products: Sequence[Product] = (),
    model_macs: int = 0,
    config: BenchConfig = USUAL,
    progress: Callable[[str], None] = lambda _: None,
) -> Speeds:
    """Measure the speed of each contender at each batch size, interleaved.

    Args:
        contenders: engines and baselines; failures become notes.
        batches: batch sizes.
        pixels: `(N, 224, 224, 3) uint8` photos to embed, repeated as needed.
        products: the fastest matrix product of each kind of numbers, measured in the same rounds.
        model_macs: multiply-accumulates of the model for one image.
        config: how long to measure.
        progress: called with a message before each batch size.
    """
    speeds = Speeds([], [], [])
    product_blocks: dict[str, Blocks] = {product.kind: [] for product in products}
    for batch in batches:
        progress(
            f"measuring batch {batch}: {', '.join(contender.name for contender in contenders)}"
        )
        filled = np.ascontiguousarray(pixels[np.arange(batch) % len(pixels)])
        tasks = {contender.name: partial(contender.run, filled) for contender in contenders}
        timings = run_interleaved(tasks | {_task(p): p.run for p in products}, config)
        for name, reason in timings.failed.items():
            speeds.notes.append(f"{name} at batch {batch} not measured: {reason}")
        for product in products:
            product_blocks[product.kind] += timings.blocks.get(_task(product), [])
        for contender in contenders:
            if contender.name in timings.blocks:
                extras = _compare_to_torch(contender, contenders, timings)
                extras |= _compare_to_floor(contender, batch, timings, products, model_macs)
                extras |= _measure_device_times(contender, filled)
                speeds.points.append(_make_speed(contender, batch, timings, extras))
    speeds.floors.extend(
        compute_floor(product, product_blocks[product.kind], model_macs)
        for product in products
        if product_blocks[product.kind]
    )
    return speeds


def _precisions(bundle: Bundle, precision: Precision | None) -> Sequence[Precision]:
    """Return the requested precision, or all in the bundle, fastest first."""
    if precision is not None:
        return (precision,)
    there = {*bundle.precisions_of("plain"), *bundle.precisions_of("tensorrt")}
    return [p for p in reversed(PRECISIONS) if p in there]


def _task(product: Product) -> str:
    return f"{product.library} {product.kind} product"


def _make_speed(
    contender: Contender, batch: int, timings: Timings, extras: dict[str, Any]
) -> Speed:
    runs_ms = [run_ms for block in timings.blocks[contender.name] for run_ms in block]
    latency: dict[str, Any] = percentiles(runs_ms)
    return Speed(
        name=contender.name,
        engine=contender.engine,
        precision=contender.precision,
        device=contender.device,
        role=contender.role,
        batch=batch,
        samples=len(runs_ms),
        images_per_s=batch / latency["p50_ms"] * 1e3,
        **latency,
        **extras,
    )


def _compare_to_torch(
    contender: Contender, contenders: Sequence[Contender], timings: Timings
) -> dict[str, float]:
    """Return the speed relative to torch on the same device."""
    found: dict[str, float] = {}
    for role in ("eager", "compiled"):
        peers = [c for c in contenders if c.role == role and c.device == contender.device]
        for peer in peers:
            if peer.name in timings.blocks:
                found[f"times_{role}"] = compute_ratio(
                    timings.blocks[contender.name], timings.blocks[peer.name]
                )
    return found


def _compare_to_floor(
    contender: Contender, batch: int, timings: Timings, products: Sequence[Product], model_macs: int
) -> dict[str, float]:
    """Return the time of an engine on the CPU relative to the floor."""
    if contender.role != "engine" or contender.device != "cpu" or not model_macs:
        return {}
    for product in products:
        blocks = timings.blocks.get(_task(product))
        if product.kind == contender.precision and blocks:
            engine = timings.blocks[contender.name]
            return {"times_floor": times_floor(engine, batch, product, blocks, model_macs)}
    return {}


def _measure_device_times(contender: Contender, pixels: Pixels) -> dict[str, float]:
    """Return the medians of a run's parts, if the engine measures them."""
    if contender.timed is None:
        return {}
    times = [contender.timed.run_timed(pixels, "photo")[1] for _ in range(_TIMED_RUNS)]
    parts = ("h2d_ms", "compute_ms", "d2h_ms")
    return {part: float(np.median([getattr(time, part) for time in times])) for part in parts}
