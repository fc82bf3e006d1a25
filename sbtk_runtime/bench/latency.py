"""Everything that `sbtk bench latency` measures of a bundle, in one run."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, cast

import numpy as np

from sbtk_runtime.bench.engines import Contender, Wanted, open_contenders, open_default
from sbtk_runtime.bench.floor import Floor, fastest_product
from sbtk_runtime.bench.map import LabelledSet
from sbtk_runtime.bench.memory import Memory, MemoryRequest, measure_memory
from sbtk_runtime.bench.onnx_macs import multiply_accumulates
from sbtk_runtime.bench.products import Product, ProductKind, library_products
from sbtk_runtime.bench.quality import EngineKey, Quality, measure_quality
from sbtk_runtime.bench.speed import Speed, Speeds, measure_speeds
from sbtk_runtime.bench.stages import Search, StageLatency, measure_stages
from sbtk_runtime.bench.turns import USUAL, Effort
from sbtk_runtime.bundle import Bundle
from sbtk_runtime.engines.engine_info import EngineInfo
from sbtk_runtime.errors import BadModel, EngineUnavailable
from sbtk_runtime.manifest import Precision
from sbtk_runtime.preprocess import prepare

Progress = Callable[[str], None]

_PICTURES = 32


@dataclass(frozen=True)
class Pictures:
    """Image files to decode, and what they are, in words."""

    sketches: Sequence[bytes]
    photos: Sequence[bytes]
    named: str


@dataclass(frozen=True)
class Beside:
    """What is measured beside the engines, from libraries that the runtime does without.

    Attributes:
        contenders: for the CPU threads and the devices of the engines, what runs beside them.
        products: for a kind of numbers, sizes and CPU threads, further matrix products.
    """

    contenders: Callable[[int, Sequence[str]], Iterable[Contender]] = lambda threads, devices: ()
    products: Callable[[ProductKind, Sequence[int], int], Iterable[Product]] = (
        lambda kind, sizes, threads: ()
    )


ANY, NOTHING = Wanted(), Beside()


@dataclass(frozen=True)
class LatencyReport:
    """Latency, speed, memory and quality of one bundle.

    Attributes:
        model_id: of the bundle.
        engine, precision: which the stages were measured with.
        threads: CPU threads of every contender.
        pictures: what was decoded, in words.
        searched: what was searched, in words.
        stages: latency of one picture at a time.
        throughput: every contender at every batch.
        floors: the time of the multiplications alone, for each kind of numbers.
        quality: how mAP was measured; `None` if it was not.
        notes: what was left out, and why.
    """

    model_id: str
    engine: str
    precision: str
    threads: int
    pictures: str
    searched: str
    stages: tuple[StageLatency, ...]
    throughput: tuple[Speed, ...]
    floors: tuple[Floor, ...] = ()
    quality: Quality | None = None
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Returns the report as a JSON object."""
        return asdict(self)

    def stage_ms(self, subject: str, stage: str) -> float | None:
        """Returns the median of a stage, such as `photo` and `decode`."""
        fitting = [s.p50_ms for s in self.stages if (s.subject, s.stage) == (subject, stage)]
        return fitting[0] if fitting else None


def measure_latency(
    bundle: Bundle,
    pictures: Pictures,
    search: Search,
    searched: str,
    *,
    wanted: Wanted = ANY,
    beside: Beside = NOTHING,
    labelled: LabelledSet | None = None,
    effort: Effort = USUAL,
    progress: Progress = lambda _: None,
) -> LatencyReport:
    """Returns the latency of each stage, and what each engine and precision gives and costs.

    Args:
        bundle: the model.
        pictures: to decode and embed.
        search: answers an embedding, the last stage of a query.
        searched: what it searches, in words.
        wanted: which engines; the stages take the first, in its own default precision.
        beside: what else is measured.
        labelled: pictures of held-out seen classes to measure mAP on; `None` leaves it out.
        effort: how long is measured.
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
            pictures.sketches, pictures.photos, default.run, search, samples=effort.samples
        )
    notes: list[str] = []
    keys, speeds = _speeds(bundle, pictures, info, wanted, beside, effort, progress, notes)
    memories: dict[str, Memory] = {}
    if effort.with_memory:
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
        pictures=pictures.named,
        searched=searched,
        stages=tuple(stages),
        throughput=tuple(_completed(point, memories, quality) for point in speeds.points),
        floors=tuple(speeds.floors),
        quality=quality,
        notes=tuple(dict.fromkeys(notes)),
    )


def _speeds(
    bundle: Bundle,
    pictures: Pictures,
    info: EngineInfo,
    wanted: Wanted,
    beside: Beside,
    effort: Effort,
    progress: Progress,
    notes: list[str],
) -> tuple[list[EngineKey], Speeds]:
    """Returns the engines that were opened, and the speed of all contenders."""
    pixels = [prepare(photo, "photo").pixels for photo in pictures.photos[:_PICTURES]]
    model_macs = _model_macs(bundle, notes)
    with contextlib.ExitStack() as stack:
        engines, left_out = open_contenders(stack, bundle, info, wanted, progress)
        devices = list(dict.fromkeys(contender.device for contender in engines))
        speeds = measure_speeds(
            [*engines, *beside.contenders(info.threads, devices)],
            wanted.batches,
            np.stack(pixels),
            products=_products(engines, info.threads, beside, effort, progress),
            model_macs=model_macs,
            effort=effort,
            progress=progress,
        )
    notes += [*left_out, *speeds.notes]
    keys = [EngineKey(c.engine, cast(Precision, c.precision), c.device) for c in engines]
    return keys, speeds


def _model_macs(bundle: Bundle, notes: list[str]) -> int:
    """Returns the multiply-accumulates of the model; 0 if they cannot be told."""
    try:
        return multiply_accumulates(bundle.checked_content(bundle.precisions[0]))
    except BadModel as problem:
        notes.append(f"no floor: {problem.found}")
        return 0


def _products(
    engines: Sequence[Contender],
    threads: int,
    beside: Beside,
    effort: Effort,
    progress: Progress,
) -> list[Product]:
    """Returns the fastest product of each kind of numbers that some engine multiplies on a CPU."""
    kinds: tuple[ProductKind, ...] = ("int8", "fp32")
    found = []
    for kind in kinds:
        if not any(c.device == "cpu" and c.precision == kind for c in engines):
            continue
        progress(f"looking for the fastest {kind} matrix product of this CPU")
        candidates = itertools.chain(
            library_products(kind, effort.product_sizes, threads),
            beside.products(kind, effort.product_sizes, threads),
        )
        product = fastest_product(candidates, effort.block_s)
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
    """Returns the memory of each engine and precision, by name."""
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
    """Returns a contender's point with its memory and quality."""
    if point.role != "engine":
        return point
    memory = memories.get(point.name, Memory())
    return replace(
        point,
        peak_memory_bytes=memory.peak_bytes.get(point.batch),
        device_memory_bytes=memory.device_bytes.get(point.batch),
        map_all=quality.figures.get(point.name) if quality else None,
        map_difference=quality.difference(point.name) if quality else None,
    )
