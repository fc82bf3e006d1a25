"""Everything that `sbtk bench latency` measures of a bundle, in one run."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, cast

import numpy as np

from sbtk_runtime.bundle import Bundle
from sbtk_runtime.embedding.embedder import Embedder
from sbtk_runtime.engines.base import EngineInfo
from sbtk_runtime.engines.registry import AUTO
from sbtk_runtime.errors import BadModel, EngineUnavailable, SbtkError
from sbtk_runtime.evaluation.bench.engines import Contender, Wanted, open_contenders, open_default
from sbtk_runtime.evaluation.bench.floor import (
    Floor,
    Product,
    ProductKind,
    fastest_product,
    library_products,
    multiply_accumulates,
)
from sbtk_runtime.evaluation.bench.interleave import (
    USUAL,
    BenchConfig,
    Search,
    StageLatency,
    measure_stages,
)
from sbtk_runtime.evaluation.bench.map import LabelledSet, measure_map
from sbtk_runtime.evaluation.bench.memory import Memory, MemoryRequest, measure_memory
from sbtk_runtime.evaluation.bench.speed import Speed, Speeds, measure_speeds
from sbtk_runtime.manifest import Precision
from sbtk_runtime.preprocess import prepare

Progress = Callable[[str], None]

_IMAGES = 32


@dataclass(frozen=True)
class BenchImages:
    """Image files to decode, and what they are, in words."""

    sketches: Sequence[bytes]
    photos: Sequence[bytes]
    named: str


@dataclass(frozen=True)
class Baselines:
    """What is measured beside the engines, from libraries that the runtime does without.

    Attributes:
        contenders: for the CPU threads and the devices of the engines, what runs beside them.
        products: for a kind of numbers, sizes and CPU threads, further matrix products.
    """

    contenders: Callable[[int, Sequence[str]], Iterable[Contender]] = lambda threads, devices: ()
    products: Callable[[ProductKind, Sequence[int], int], Iterable[Product]] = (
        lambda kind, sizes, threads: ()
    )


ANY, NOTHING = Wanted(), Baselines()


@dataclass(frozen=True)
class LatencyReport:
    """Latency, speed, memory and quality of one bundle.

    Attributes:
        model_id: of the bundle.
        engine, precision: which the stages were measured with.
        threads: CPU threads of every contender.
        images: what was decoded, in words.
        searched: what was searched, in words.
        stages: latency of one image at a time.
        throughput: every contender at every batch.
        floors: the time of the multiplications alone, for each kind of numbers.
        quality: how mAP was measured; `None` if it was not.
        notes: what was left out, and why.
    """

    model_id: str
    engine: str
    precision: str
    threads: int
    images: str
    searched: str
    stages: tuple[StageLatency, ...]
    throughput: tuple[Speed, ...]
    floors: tuple[Floor, ...] = ()
    quality: Quality | None = None
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return the report as a JSON object."""
        return asdict(self)

    def stage_ms(self, subject: str, stage: str) -> float | None:
        """Return the median of a stage, such as `photo` and `decode`."""
        fitting = [s.p50_ms for s in self.stages if (s.subject, s.stage) == (subject, stage)]
        return fitting[0] if fitting else None


def measure_latency(
    bundle: Bundle,
    images: BenchImages,
    search: Search,
    searched: str,
    *,
    wanted: Wanted = ANY,
    baselines: Baselines = NOTHING,
    labelled: LabelledSet | None = None,
    config: BenchConfig = USUAL,
    progress: Progress = lambda _: None,
) -> LatencyReport:
    """Return the latency of each stage, and what each engine and precision gives and costs.

    Args:
        bundle: the model.
        images: to decode and embed.
        search: answers an embedding, the last stage of a query.
        searched: what it searches, in words.
        wanted: which engines; the stages take the first, in its own default precision.
        baselines: what else is measured.
        labelled: images of held-out seen classes to measure mAP on; `None` leaves it out.
        config: how long is measured.
        progress: told what is measured next, and what takes long.

    Raises:
        EngineUnavailable: the named engine, or every engine, does not work here.
        MissingExtra: the named engine's library is not installed.
        BadModel: the bundle has no such precision, or is damaged.
    """
    with contextlib.closing(open_default(bundle, wanted, progress)) as default:
        info = default.info
        progress(f"measuring stages on {info.name} {info.precision}")
        stages = measure_stages(
            images.sketches, images.photos, default.run, search, samples=config.samples
        )
    notes: list[str] = []
    keys, speeds = _speeds(bundle, images, info, wanted, baselines, config, progress, notes)
    memories: dict[str, Memory] = {}
    if config.with_memory:
        memories = _memories(bundle, keys, info.threads, wanted.batches, progress, notes)
    quality = None
    if labelled is not None:
        quality, quality_notes = measure_quality(bundle, labelled, keys, info.threads, progress)
        notes += quality_notes
    return LatencyReport(
        model_id=bundle.manifest.model_id,
        engine=info.name,
        precision=info.precision,
        threads=info.threads,
        images=images.named,
        searched=searched,
        stages=tuple(stages),
        throughput=tuple(_completed(point, memories, quality) for point in speeds.points),
        floors=tuple(speeds.floors),
        quality=quality,
        notes=tuple(dict.fromkeys(notes)),
    )


def _speeds(
    bundle: Bundle,
    images: BenchImages,
    info: EngineInfo,
    wanted: Wanted,
    baselines: Baselines,
    config: BenchConfig,
    progress: Progress,
    notes: list[str],
) -> tuple[list[EngineKey], Speeds]:
    """Return the engines that were opened, and the speed of all contenders."""
    pixels = [prepare(photo, "photo").pixels for photo in images.photos[:_IMAGES]]
    model_macs = _model_macs(bundle, notes)
    with contextlib.ExitStack() as stack:
        engines, left_out = open_contenders(stack, bundle, info, wanted, progress)
        devices = list(dict.fromkeys(contender.device for contender in engines))
        speeds = measure_speeds(
            [*engines, *baselines.contenders(info.threads, devices)],
            wanted.batches,
            np.stack(pixels),
            products=_products(engines, info.threads, baselines, config, progress),
            model_macs=model_macs,
            config=config,
            progress=progress,
        )
    notes += [*left_out, *speeds.notes]
    keys = [EngineKey(c.engine, cast(Precision, c.precision), c.device) for c in engines]
    return keys, speeds


def _model_macs(bundle: Bundle, notes: list[str]) -> int:
    """Return the multiply-accumulates of the model; 0 if they cannot be told."""
    try:
        return multiply_accumulates(bundle.checked_content(bundle.precisions[0]))
    except BadModel as problem:
        notes.append(f"no floor: {problem.found}")
        return 0


def _products(
    engines: Sequence[Contender],
    threads: int,
    baselines: Baselines,
    config: BenchConfig,
    progress: Progress,
) -> list[Product]:
    """Return the fastest product of each kind of numbers that some engine multiplies on a CPU."""
    kinds: tuple[ProductKind, ...] = ("int8", "fp32")
    found = []
    for kind in kinds:
        if not any(c.device == "cpu" and c.precision == kind for c in engines):
            continue
        progress(f"looking for the fastest {kind} matrix product of this CPU")
        candidates = itertools.chain(
            library_products(kind, config.product_sizes, threads),
            baselines.products(kind, config.product_sizes, threads),
        )
        product = fastest_product(candidates, config.block_s)
        found += [product] if product else []
    return found


def _memories(
    bundle: Bundle,
    engines: Sequence[EngineKey],
    threads: int,
    batches: Sequence[int],
    progress: Progress,
    notes: list[str],
) -> dict[str, Memory]:
    """Return the memory of each engine and precision, by name."""
    found: dict[str, Memory] = {}
    for key in engines:
        progress(f"measuring memory of {key.name}")
        request = MemoryRequest(
            bundle=str(bundle.folder.absolute()),
            engine=key.engine,
            precision=key.precision,
            threads=threads,
            device=key.device,
            batches=tuple(sorted(batches)),
        )
        try:
            found[key.name] = measure_memory(request)
        except EngineUnavailable as problem:
            notes.append(f"memory of {key.name} not measured: {problem.found}")
            continue
        if failed := found[key.name].failed:
            notes.append(f"memory of {key.name} not measured at every batch: {failed}")
    return found


def _completed(point: Speed, memories: dict[str, Memory], quality: Quality | None) -> Speed:
    """Return a contender's point with its memory and quality."""
    if point.role != "engine":
        return point
    memory = memories.get(point.name, Memory())
    return replace(
        point,
        peak_memory_bytes=memory.peak_bytes.get(point.batch),
        device_memory_bytes=memory.device_bytes.get(point.batch),
        map_all=quality.metrics.get(point.name) if quality else None,
        map_difference=quality.difference(point.name) if quality else None,
    )


#: The metric that is compared.
METRIC = "mAP@all"

_REFERENCE_ENGINE = "onnxruntime"
#: What stands for the model itself: the first of these that the bundle has.
_REFERENCE_PRECISIONS: tuple[Precision, ...] = ("fp32", "fp16")


@dataclass(frozen=True)
class EngineKey:
    """One engine in one precision on one device."""

    engine: str
    precision: Precision
    device: str

    @property
    def name(self) -> str:
        """Engine and precision."""
        return f"{self.engine} {self.precision}"


@dataclass(frozen=True)
class Quality:
    """mAP@all of each engine and precision on the same images.

    Attributes:
        protocol: which classes, how many sketches and photos, and how they were ranked.
        reference: the engine and precision that differences are to; empty without any.
        metrics: engine and precision to mAP@all, the reference's too.
    """

    protocol: str
    reference: str
    metrics: dict[str, float]

    def difference(self, name: str) -> float | None:
        """Return how much more mAP@all an engine has than the reference."""
        if name not in self.metrics or self.reference not in self.metrics:
            return None
        return self.metrics[name] - self.metrics[self.reference]


def measure_quality(
    bundle: Bundle,
    images: LabelledSet,
    engines: Iterable[EngineKey],
    threads: int,
    progress: Callable[[str], None] = lambda _: None,
) -> tuple[Quality, list[str]]:
    """Return the mAP of each engine, and notes on what could not be measured or compared.

    Each embeds all the images once. The reference is the FP32 file on a CPU, or the FP16 file
    of a bundle without; without either there are no differences.
    """
    reference, notes = _reference(bundle, threads)
    metrics: dict[str, float] = {}
    protocol = ""
    for key in dict.fromkeys([*([reference] if reference else []), *engines]):
        progress(f"measuring {METRIC} of {key.name} on {images.of}")
        try:
            with _embedder(bundle, key.engine, key.precision, key.device, threads) as embedder:
                report = measure_map(embedder, images.sketches, images.photos, of=images.of)
        # A metric less is no reason to lose those that are there.
        except SbtkError as problem:
            notes.append(f"{METRIC} of {key.name} not measured: {problem.found}")
            continue
        metrics[key.name] = report.metrics[METRIC]
        protocol = report.protocol
    return Quality(protocol, reference.name if reference else "", metrics), notes


def _reference(bundle: Bundle, threads: int) -> tuple[EngineKey | None, list[str]]:
    """Return what stands for the model itself, and a note where that is not FP32."""
    for precision in _REFERENCE_PRECISIONS:
        if precision not in bundle.precisions:
            continue
        for engine in (_REFERENCE_ENGINE, AUTO):
            try:
                with _embedder(bundle, engine, precision, "cpu", threads) as embedder:
                    found = EngineKey(embedder.engine.info.name, precision, "cpu")
            except SbtkError:
                continue
            note = f"the bundle has no fp32 file: differences of mAP are to {found.name}"
            return found, [] if precision == "fp32" else [note]
    return None, ["no differences of mAP: neither fp32 nor fp16 runs on a CPU here"]


def _embedder(
    bundle: Bundle, engine: str, precision: Precision, device: str, threads: int
) -> Embedder:
    return Embedder(bundle, engine=engine, precision=precision, threads=threads, device=device)
