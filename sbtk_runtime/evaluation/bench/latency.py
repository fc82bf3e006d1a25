"""`sbtk bench latency`: latency, speed, memory and quality of a bundle."""

from __future__ import annotations

import contextlib
import itertools
import json
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import numpy as np

from sbtk_runtime.bundle import Bundle
from sbtk_runtime.embedding.embedder import Embedder
from sbtk_runtime.engines.base import AUTO, DEFAULT_OPTIONS, EngineInfo, EngineOptions
from sbtk_runtime.engines.cuda import checked, cuda_runtime, find_device
from sbtk_runtime.engines.registry import open_engine
from sbtk_runtime.errors import BadModel, EngineUnavailable, MissingExtra, SbtkError
from sbtk_runtime.evaluation.bench.floor import (
    Floor,
    Product,
    ProductKind,
    count_macs,
    find_fastest_product,
    iterate_products,
)
from sbtk_runtime.evaluation.bench.interleave import (
    USUAL,
    BenchConfig,
    Search,
    StageLatency,
    measure_stages,
)
from sbtk_runtime.evaluation.bench.map import LabelledSet, measure_map
from sbtk_runtime.evaluation.bench.speed import (
    Contender,
    Speed,
    Speeds,
    measure_speeds,
    open_contenders,
    open_default,
)
from sbtk_runtime.machine import peak_resident_bytes
from sbtk_runtime.manifest import Precision
from sbtk_runtime.preprocess import SIZE_PX, prepare

Progress = Callable[[str], None]

_IMAGES = 32


@dataclass(frozen=True)
class BenchImages:
    """Contents of image files, and their description."""

    sketches: Sequence[bytes]
    photos: Sequence[bytes]
    description: str


@dataclass(frozen=True)
class Baselines:
    """Baselines for the engines, from libraries that the runtime does not need.

    Attributes:
        contenders: returns the baselines for a number of CPU threads and a list of devices.
        products: returns further matrix products for a kind of numbers, sizes and CPU threads.
    """

    contenders: Callable[[int, Sequence[str]], Iterable[Contender]] = lambda threads, devices: ()
    products: Callable[[ProductKind, Sequence[int], int], Iterable[Product]] = (
        lambda kind, sizes, threads: ()
    )


_NO_BASELINES = Baselines()

#: Batch sizes to measure.
BATCHES = (1, 8, 32)


@dataclass(frozen=True)
class LatencyReport:
    """Latency, speed, memory and quality of one bundle.

    Attributes:
        model_id: id of the bundle.
        engine, precision: engine and precision with which the stages were measured.
        threads: CPU threads of every contender.
        images: description of the decoded images.
        searched: description of the searched vectors.
        stages: latency of each stage, one image at a time.
        throughput: speed of every contender at every batch size.
        floors: time of the multiplications alone, for each kind of numbers.
        quality: mAP of the engines, or `None`.
        notes: what was not measured, and why.
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
        """Return the median of a stage, such as `photo`, `decode`; `None` if not measured."""
        fitting = [s.p50_ms for s in self.stages if (s.subject, s.stage) == (subject, stage)]
        return fitting[0] if fitting else None


def measure_latency(
    bundle: Bundle,
    images: BenchImages,
    search: Search,
    searched: str,
    *,
    options: EngineOptions = DEFAULT_OPTIONS,
    batches: tuple[int, ...] = BATCHES,
    baselines: Baselines = _NO_BASELINES,
    labelled: LabelledSet | None = None,
    config: BenchConfig = USUAL,
    progress: Progress = lambda _: None,
) -> LatencyReport:
    """Measure the latency of each stage, and speed, memory and mAP of each engine and precision.

    Args:
        bundle: the model.
        images: images to decode and embed.
        search: searches for an embedding, the last stage of a query.
        searched: description of what is searched.
        options: the engine to measure, or `all`, in the given precision or all that the bundle has.
            Stages are measured on the first engine, by default in its fastest precision.
        batches: batch sizes; the largest replaces that of the options.
        baselines: baselines to compare the engines with.
        labelled: images of held-out seen classes to measure mAP on, or `None`.
        config: how long to measure.
        progress: called with a message before each step.

    Raises:
        EngineUnavailable: the named engine, or every engine, is unavailable.
        MissingExtra: the named engine's library is not installed.
        BadModel: the bundle lacks the precision, or is damaged.
    """
    options = replace(options, batch=max(batches))
    with contextlib.closing(open_default(bundle, options, progress)) as default:
        info = default.info
        progress(f"measuring stages on {info.name} {info.precision}")
        stages = measure_stages(
            *(images.sketches, images.photos, default.run, search, bundle.preprocessing),
            samples=config.samples,
        )
    notes: list[str] = []
    keys, speeds = _speeds(
        bundle, images, info, options, batches, baselines, config, progress, notes
    )
    memories: dict[str, Memory] = {}
    if config.with_memory:
        memories = _memories(bundle, keys, info.threads, batches, progress, notes)
    quality = None
    if labelled is not None:
        quality, quality_notes = measure_quality(bundle, labelled, keys, info.threads, progress)
        notes += quality_notes
    return LatencyReport(
        model_id=bundle.manifest.model_id,
        engine=info.name,
        precision=info.precision,
        threads=info.threads,
        images=images.description,
        searched=searched,
        stages=tuple(stages),
        throughput=tuple(_complete(point, memories, quality) for point in speeds.points),
        floors=tuple(speeds.floors),
        quality=quality,
        notes=tuple(dict.fromkeys(notes)),
    )


def _speeds(
    bundle: Bundle,
    images: BenchImages,
    info: EngineInfo,
    options: EngineOptions,
    batches: tuple[int, ...],
    baselines: Baselines,
    config: BenchConfig,
    progress: Progress,
    notes: list[str],
) -> tuple[list[EngineKey], Speeds]:
    """Return the opened engines, and the speed of all contenders."""
    pixels = [prepare(photo, "photo").pixels for photo in images.photos[:_IMAGES]]
    model_macs = _model_macs(bundle, notes)
    with contextlib.ExitStack() as stack:
        engines, left_out = open_contenders(stack, bundle, info, options, progress)
        devices = list(dict.fromkeys(contender.device for contender in engines))
        speeds = measure_speeds(
            [*engines, *baselines.contenders(info.threads, devices)],
            batches,
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
    """Return the multiply-accumulates of the model; 0 if they cannot be counted."""
    try:
        return count_macs(bundle.read_onnx(bundle.precisions[0]))
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
    """Return the fastest product of each precision in which an engine runs on the CPU."""
    kinds: tuple[ProductKind, ...] = ("int8", "fp32")
    found = []
    for kind in kinds:
        if not any(c.device == "cpu" and c.precision == kind for c in engines):
            continue
        progress(f"searching the fastest {kind} matrix product on this CPU")
        candidates = itertools.chain(
            iterate_products(kind, config.product_sizes, threads),
            baselines.products(kind, config.product_sizes, threads),
        )
        product = find_fastest_product(candidates, config.block_s)
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
        options = EngineOptions(key.engine, key.precision, threads, key.device, max(batches))
        try:
            found[key.name] = measure_memory(bundle.folder, options, batches)
        except EngineUnavailable as problem:
            notes.append(f"memory of {key.name} not measured: {problem.found}")
            continue
        if failed := found[key.name].failed:
            notes.append(f"memory of {key.name} not measured at every batch: {failed}")
    return found


def _complete(point: Speed, memories: dict[str, Memory], quality: Quality | None) -> Speed:
    """Return the speed of a contender with its memory and mAP."""
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


_MEMORY_TIMEOUT_S = 900
# `-P` excludes the working folder; the folder of this checkout or installation comes last, so that
# it hides nothing.
_START = (
    "import sys; sys.path.append(sys.argv.pop(1)); "
    "from sbtk_runtime.evaluation.bench.latency import print_memory; print_memory()"
)


@dataclass(frozen=True)
class Memory:
    """Memory of a process that opens an engine and runs batches up to each size.

    Attributes:
        peak_bytes: peak resident memory by batch; empty without Linux's /proc.
        device_bytes: by batch, the GPU memory in use minus that before the engine was opened, which
            includes CUDA's own share; empty on a CPU.
        failed: why the next batch did not run; empty if all ran.
    """

    peak_bytes: dict[int, int] = field(default_factory=dict)
    device_bytes: dict[int, int] = field(default_factory=dict)
    failed: str = ""


def measure_memory(folder: Path, options: EngineOptions, batches: Sequence[int]) -> Memory:
    """Measure the memory of an engine in a new process.

    Args:
        folder: of the model.
        options: the engine to open.
        batches: batch sizes to run, the smallest first.

    Raises:
        EngineUnavailable: the process ended without a result.
    """
    root = str(Path(__file__).resolve().parents[3])
    request = {
        "bundle": str(folder.absolute()),
        "options": asdict(options),
        "batches": list(batches),
    }
    command = [sys.executable, "-P", "-c", _START, root, json.dumps(request)]
    try:
        done = subprocess.run(  # noqa: S603 -- this file
            command, capture_output=True, text=True, check=False, timeout=_MEMORY_TIMEOUT_S
        )
    except subprocess.TimeoutExpired as problem:
        raise EngineUnavailable(f"its process took more than {_MEMORY_TIMEOUT_S} s") from problem
    try:
        found = json.loads(done.stdout.splitlines()[-1])
        peaks, device = _by_batch(found, "peak_bytes"), _by_batch(found, "device_bytes")
        return Memory(peaks, device, str(found["failed"]))
    # A process killed for lack of memory writes no result.
    except (IndexError, ValueError, KeyError) as problem:
        last = done.stderr.strip().splitlines()[-1:] or [f"exit code {done.returncode}"]
        raise EngineUnavailable(f"its process ended without a result: {last[0]}") from problem


def print_memory() -> None:
    """Measure the memory of this process, as its argument says in JSON, and print it as JSON."""
    request = json.loads(sys.argv[1])
    options = EngineOptions(**request["options"])
    memory = measure_this_process(Path(request["bundle"]), options, request["batches"])
    print(json.dumps(asdict(memory)))


def measure_this_process(folder: Path, options: EngineOptions, batches: Sequence[int]) -> Memory:
    """Return the memory that this process needs to open the engine and run the batches."""
    device_name = options.device or "cpu"
    before = device_bytes_in_use(device_name)
    peaks: dict[int, int] = {}
    device: dict[int, int] = {}
    try:
        engine = open_engine(Bundle.open(folder), replace(options, batch=max(batches)))
        for batch in sorted(batches):
            # Pages of zeros would take no memory.
            engine.run(np.full((batch, SIZE_PX, SIZE_PX, 3), 127, dtype=np.uint8), "photo")
            now = device_bytes_in_use(device_name)
            if peak := peak_resident_bytes():
                peaks[batch] = peak
            if before is not None and now is not None:
                device[batch] = now - before
        engine.close()
    except SbtkError as problem:
        return Memory(peaks, device, problem.found)
    return Memory(peaks, device)


def device_bytes_in_use(device: str) -> int | None:
    """Return the memory of a GPU that all processes use; `None` on a CPU or if unknown."""
    if device.partition(":")[0] != "cuda":
        return None
    try:
        index = find_device(device).index
        runtime = cuda_runtime()
        checked(runtime.cudaSetDevice(index))
        free, total = checked(runtime.cudaMemGetInfo())
    except (EngineUnavailable, MissingExtra):
        return None
    return int(total) - int(free)


def _by_batch(found: dict[str, Any], key: str) -> dict[int, int]:
    return {int(batch): int(value) for batch, value in found[key].items()}


#: The compared metric.
METRIC = "mAP@all"

_REFERENCE_ENGINE = "onnxruntime"
#: Precisions of the reference: the first that the bundle has.
_REFERENCE_PRECISIONS: tuple[Precision, ...] = ("fp32", "fp16")


@dataclass(frozen=True)
class EngineKey:
    """An engine in one precision on one device."""

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
        protocol: classes, numbers of sketches and photos, and ranking, in words.
        reference: engine and precision of the reference; empty without one.
        metrics: mAP@all by engine and precision, including the reference.
    """

    protocol: str
    reference: str
    metrics: dict[str, float]

    def difference(self, name: str) -> float | None:
        """Return the difference of an engine's mAP@all to the reference's."""
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

    Each engine embeds all images once. The reference is FP32 on a CPU, or FP16 if the bundle has no
    FP32 file; without either, there are no differences.
    """
    reference, notes = _reference(bundle, threads)
    metrics: dict[str, float] = {}
    protocol = ""
    for key in dict.fromkeys([*([reference] if reference else []), *engines]):
        progress(f"measuring {METRIC} of {key.name} on {images.of}")
        try:
            with _embedder(bundle, key.engine, key.precision, key.device, threads) as embedder:
                report = measure_map(embedder, images.sketches, images.photos, of=images.of)
        # Keep the results of the other engines.
        except SbtkError as problem:
            notes.append(f"{METRIC} of {key.name} not measured: {problem.found}")
            continue
        metrics[key.name] = report.metrics[METRIC]
        protocol = report.protocol
    return Quality(protocol, reference.name if reference else "", metrics), notes


def _reference(bundle: Bundle, threads: int) -> tuple[EngineKey | None, list[str]]:
    """Return the reference, and a note if it is not FP32."""
    for precision in _REFERENCE_PRECISIONS:
        if precision not in bundle.precisions:
            continue
        for engine in (_REFERENCE_ENGINE, AUTO):
            try:
                with _embedder(bundle, engine, precision, "cpu", threads) as embedder:
                    found = EngineKey(embedder.engine.info.name, precision, "cpu")
            except SbtkError:
                continue
            note = f"no fp32 file in the bundle: mAP is compared with {found.name}"
            return found, [] if precision == "fp32" else [note]
    return None, ["mAP not compared: neither fp32 nor fp16 runs on this CPU"]


def _embedder(
    bundle: Bundle, engine: str, precision: Precision, device: str, threads: int
) -> Embedder:
    return Embedder(bundle, engine=engine, precision=precision, threads=threads, device=device)
