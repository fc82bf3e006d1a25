"""Stages, speeds, memory and quality of a tiny bundle; no test asserts a duration."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest

from sbtk_runtime.bundle import Bundle
from sbtk_runtime.engines.base import Embeddings, EngineInfo, EngineOptions
from sbtk_runtime.engines.registry import ENGINE_NAMES, open_engine, probe_engines
from sbtk_runtime.engines.tensorrt.pipeline import DeviceTimes
from sbtk_runtime.errors import BadModel, EngineUnavailable
from sbtk_runtime.evaluation.bench import latency as bench_latency
from sbtk_runtime.evaluation.bench.floor import Product, ProductKind
from sbtk_runtime.evaluation.bench.interleave import QUICK, measure_stages
from sbtk_runtime.evaluation.bench.latency import (
    Baselines,
    BenchImages,
    device_bytes_in_use,
    measure_latency,
    measure_memory,
    measure_this_process,
)
from sbtk_runtime.evaluation.bench.map import LabelledImages, LabelledSet
from sbtk_runtime.evaluation.bench.speed import (
    ALL,
    Contender,
    Speed,
    TimedEngine,
    make_contender,
    measure_speeds,
)
from sbtk_runtime.generated_inputs import generate_sketches
from sbtk_runtime.preprocess import CROPPED, Kind, Pixels
from sbtk_train.data.dataset import read_dataset
from tests.tiny import tiny_bundle, write_photos
from tests.tiny_data import write_dataset

EFFORT = replace(QUICK, samples=3, rounds=2, product_sizes=(64,), with_memory=False)
ONNXRUNTIME = EngineOptions("onnxruntime", "fp32", threads=1, device="cpu")
BATCHES = (1, 64)


@pytest.fixture
def images(tmp_path: Path) -> BenchImages:
    photos = [path.read_bytes() for path in write_photos(tmp_path / "photos", 3)]
    return BenchImages(generate_sketches(2), photos, "tiny images")


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return Bundle.open(tiny_bundle(tmp_path / "bundle"))


def test_every_stage_precision_and_batch_is_measured(bundle: Bundle, images: BenchImages) -> None:
    asked: list[int] = []
    report = measure_latency(
        bundle,
        images,
        lambda row: asked.append(len(row)),
        "nothing",
        options=EngineOptions("onnxruntime", threads=1),
        batches=(1, 3),
        baselines=Baselines(torch_like),
        config=replace(EFFORT, with_memory=True),
    )
    stages = [(stage.subject, stage.stage) for stage in report.stages]
    assert stages == [
        ("sketch", "decode"),
        ("sketch", "preprocess"),
        ("sketch", "engine"),
        ("sketch", "search"),
        ("sketch", "total"),
        ("photo", "decode"),
        ("photo", "preprocess"),
        ("photo", "engine"),
        ("photo", "total"),
    ]
    assert {stage.samples for stage in report.stages} == {3}
    assert asked == [16] * 6
    points = {(point.name, point.batch): point for point in report.throughput}
    engines = ("onnxruntime int8", "onnxruntime fp32")
    peers = ("peer fp32", "compiled peer fp32")
    assert set(points) == {(name, batch) for name in (*engines, *peers) for batch in (1, 3)}
    for (name, batch), point in points.items():
        assert point.images_per_s == pytest.approx(batch / point.p50_ms * 1e3)
        assert point.p50_ms <= point.p95_ms <= point.p99_ms
        assert point.times_eager is not None
        assert point.times_compiled is not None
        assert (point.times_floor is not None) == (name in engines)
        assert (point.peak_memory_bytes is not None) == (name in engines)
        assert (point.h2d_ms, point.map_all, point.device_memory_bytes) == (None, None, None)
    assert points["peer fp32", 3].times_eager == 1.0
    assert points["compiled peer fp32", 3].times_compiled == 1.0
    assert (report.engine, report.precision, report.threads) == ("onnxruntime", "int8", 1)
    assert json.loads(json.dumps(report.to_json()))["model_id"] == bundle.manifest.model_id


def test_the_floor_is_computed_from_the_models_multiplications(
    bundle: Bundle, images: BenchImages
) -> None:
    report = measure_latency(
        bundle,
        images,
        len,
        "nothing",
        options=EngineOptions(threads=1),
        batches=(2,),
        config=EFFORT,
    )
    floors = {floor.kind: floor for floor in report.floors}
    assert set(floors) == {"int8", "fp32"}
    for floor in floors.values():
        assert floor.model_macs == 16 * 192
        assert floor.ms == pytest.approx(floor.model_macs / floor.gmac_per_s / 1e6)
    # For so small a model, multiplications take a negligible share.
    assert all((point.times_floor or 0) > 10 for point in report.throughput)


def test_a_faster_product_from_another_library_sets_the_floor(
    bundle: Bundle, images: BenchImages
) -> None:
    def products(kind: ProductKind, sizes: Sequence[int], threads: int) -> Iterator[Product]:
        yield Product(f"magic on {threads}", kind, 10**6, lambda: None)

    report = measure_latency(
        bundle,
        images,
        len,
        "nothing",
        options=EngineOptions(precision="int8", threads=1),
        batches=(1,),
        baselines=Baselines(products=products),
        config=EFFORT,
    )
    assert [(floor.kind, floor.library) for floor in report.floors] == [("int8", "magic on 1")]


def test_all_measures_working_engines_and_lists_the_others(
    bundle: Bundle, images: BenchImages
) -> None:
    works = {report.name: report.works for report in probe_engines()}
    report = measure_latency(
        bundle, images, len, "nothing", options=EngineOptions(ALL), batches=(1,), config=EFFORT
    )
    working = [name for name in ENGINE_NAMES if works[name]]
    assert len(working) >= 2
    assert list(dict.fromkeys(point.engine for point in report.throughput)) == working
    assert report.engine == working[0]
    for name in ENGINE_NAMES:
        assert works[name] != any(note.startswith(f"{name} skipped") for note in report.notes)


def test_auto_measures_only_the_first_working_engine(bundle: Bundle, images: BenchImages) -> None:
    report = measure_latency(bundle, images, len, "nothing", batches=(1,), config=EFFORT)
    first = next(found.name for found in probe_engines() if found.works)
    assert {point.engine for point in report.throughput} == {first}
    assert {point.precision for point in report.throughput} == {"int8", "fp32"}
    assert [point.times_eager for point in report.throughput] == [None, None]


def test_map_is_reported_with_each_speed(
    bundle: Bundle, images: BenchImages, tmp_path: Path
) -> None:
    data = read_dataset(write_dataset(tmp_path / "data"))
    labelled = LabelledSet(
        LabelledImages(data.sketch_files, data.sketch_labels.tolist(), data.classes),
        LabelledImages(data.photos, data.photo_labels.tolist(), data.classes),
        "6 classes",
    )
    report = measure_latency(
        bundle,
        images,
        len,
        "nothing",
        options=EngineOptions("openvino", threads=1),
        batches=(1, 2),
        baselines=Baselines(torch_like),
        labelled=labelled,
        config=EFFORT,
    )
    assert report.quality is not None
    assert report.quality.reference == "onnxruntime fp32"
    assert report.quality.protocol.startswith("6 classes: 24 sketches against 24 photos")
    for point in report.throughput:
        is_engine = point.role == "engine"
        assert (point.map_all is not None) == is_engine
        # Both files have the same graph.
        assert point.map_difference == (pytest.approx(0, abs=0.01) if is_engine else None)


def test_a_missing_precision_is_named(bundle: Bundle, images: BenchImages) -> None:
    with pytest.raises(BadModel, match="fp16"):
        measure_latency(bundle, images, len, "nothing", options=EngineOptions(precision="fp16"))


def test_an_engine_that_cannot_run_a_batch_is_measured_at_the_others() -> None:
    def run(pixels: Pixels) -> object:
        if len(pixels) > 2:
            raise EngineUnavailable("it is too much")
        return pixels

    limited = Contender("limited", "int8", "cpu", run)
    peer = Contender("peer", "fp32", "cpu", lambda pixels: pixels, "eager")
    speeds = measure_speeds([limited, peer], (1, 4, 2), noise(3), config=QUICK)
    measured = [(point.engine, point.batch) for point in speeds.points]
    assert measured == [("limited", 1), ("peer", 1), ("peer", 4), ("limited", 2), ("peer", 2)]
    assert speeds.notes == ["limited int8 at batch 4 not measured: it is too much"]


def test_batches_have_the_requested_size_and_images_repeat() -> None:
    seen: list[Pixels] = []
    peer = Contender("peer", "fp32", "cpu", seen.append)
    pixels = noise(2)
    measure_speeds([peer], (1, 5), pixels, config=QUICK)
    assert {len(batch) for batch in seen} == {1, 5}
    assert np.array_equal(seen[-1], pixels[[0, 1, 0, 1, 0]])


def test_only_contenders_on_one_device_are_compared() -> None:
    contenders = [
        Contender("gpu engine", "fp16", "cuda:0", lambda pixels: None),
        Contender("engine", "int8", "cpu", lambda pixels: None),
        Contender("torch on the gpu", "fp32", "cuda:0", lambda pixels: None, "eager"),
    ]
    product = Product("lib", "int8", 10, lambda: None)
    speeds = measure_speeds(
        contenders, (1,), noise(1), products=[product], model_macs=1000, config=QUICK
    )
    points = {point.engine: point for point in speeds.points}
    assert points["gpu engine"].times_eager is not None
    assert points["gpu engine"].times_floor is None
    assert points["engine"].times_eager is None
    assert points["engine"].times_floor is not None


def test_engines_that_measure_their_stages_report_them(bundle: Bundle) -> None:
    engine = GpuLike(EngineInfo("gpu", "fp16", "cuda:0", 16, 1, 1, "1.0"))
    assert isinstance(engine, TimedEngine)
    point = speed_of(make_contender(engine))
    assert (point.h2d_ms, point.compute_ms, point.d2h_ms) == (0.5, 2.0, 0.25)
    on_cpu = open_engine(bundle, EngineOptions(engine="onnxruntime", threads=1))
    point = speed_of(make_contender(on_cpu))
    assert (point.h2d_ms, point.compute_ms, point.d2h_ms) == (None, None, None)


def test_the_total_of_an_image_is_the_sum_of_its_stages() -> None:
    sketches = generate_sketches(1)
    kinds: set[Kind] = set()

    def engine(pixels: Pixels, kind: Kind) -> object:
        kinds.add(kind)
        return np.ones((len(pixels), 4), dtype=np.float32)

    stages = measure_stages(sketches, sketches, engine, len, CROPPED, samples=1)
    for subject in ("sketch", "photo"):
        parts = [s.p50_ms for s in stages if s.subject == subject and s.stage != "total"]
        total = next(s.p50_ms for s in stages if (s.subject, s.stage) == (subject, "total"))
        assert total == pytest.approx(sum(parts))
    assert kinds == {"sketch", "photo"}


class GpuLike:
    """An engine that measures its own time."""

    def __init__(self, info: EngineInfo) -> None:
        self.info = info

    def run(self, images: Pixels, kind: Kind) -> Embeddings:
        return np.ones((len(images), self.info.dim), dtype=np.float32)

    def run_timed(self, images: Pixels, kind: Kind) -> tuple[Embeddings, DeviceTimes]:
        return self.run(images, kind), DeviceTimes(0.5, 2.0, 0.25)

    def close(self) -> None:
        pass


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny_bundle(tmp_path / "a folder with spaces")


def test_a_separate_process_reports_its_peak_by_batch(folder: Path) -> None:
    held = bytearray(b"x" * 400_000_000)  # in this process, not in the other
    memory = measure_memory(folder, ONNXRUNTIME, BATCHES)
    assert list(memory.peak_bytes) == [1, 64]
    # Python, NumPy and ONNX Runtime; then 64 images of 150 kB.
    assert 20_000_000 < memory.peak_bytes[1] < len(held)
    assert memory.peak_bytes[64] - memory.peak_bytes[1] > 64 * 224 * 224 * 3 // 2
    assert memory.device_bytes == {}
    assert memory.failed == ""


def test_an_engine_that_cannot_be_opened_says_why(folder: Path) -> None:
    memory = measure_memory(folder, replace(ONNXRUNTIME, precision="fp16"), BATCHES)
    assert memory.peak_bytes == {}
    assert "has no fp16 model" in memory.failed


def test_a_process_without_a_result_is_an_error(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench_latency, "_START", "import os; os.kill(os.getpid(), 9)")
    with pytest.raises(EngineUnavailable, match="without a result: exit code -9"):
        measure_memory(folder, ONNXRUNTIME, BATCHES)
    monkeypatch.setattr(bench_latency, "_START", "raise SystemExit('out of luck')")
    with pytest.raises(EngineUnavailable, match="out of luck"):
        measure_memory(folder, ONNXRUNTIME, BATCHES)


def test_the_process_gets_the_folder_that_holds_the_package(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = "json.dumps({'peak_bytes': {}, 'device_bytes': {}, 'failed': sys.argv[1]})"
    monkeypatch.setattr(bench_latency, "_START", f"import json, sys; print({said})")
    assert (
        Path(measure_memory(folder, ONNXRUNTIME, BATCHES).failed) / "sbtk_runtime" / "__init__.py"
    ).is_file()


def test_a_cpu_and_a_missing_gpu_have_no_device_memory() -> None:
    assert device_bytes_in_use("cpu") is None
    assert device_bytes_in_use("cuda:99999") is None


def test_device_memory_is_the_increase_since_the_start(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = iter([900, 700, 600])
    runtime = ModuleType("cuda.bindings.runtime")
    runtime.__dict__.update(
        cudaGetDeviceCount=lambda: (0, 2),
        cudaGetDeviceProperties=lambda index: (
            0,
            SimpleNamespace(name=b"GPU", major=9, minor=0, totalGlobalMem=1000),
        ),
        cudaDriverGetVersion=lambda: (0, 13000),
        cudaSetDevice=lambda index: (0,),
        cudaMemGetInfo=lambda: (0, next(free), 1000),
    )
    bindings = ModuleType("cuda.bindings")
    bindings.__dict__["runtime"] = runtime
    monkeypatch.setitem(sys.modules, "cuda.bindings", bindings)
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", runtime)
    # The engine itself stays on the CPU; only the requested device matters.
    opened = open_engine
    monkeypatch.setattr(
        bench_latency,
        "open_engine",
        lambda bundle, options: opened(bundle, replace(options, device="cpu")),
    )
    memory = measure_this_process(folder, replace(ONNXRUNTIME, device="cuda:1"), BATCHES)
    assert memory.device_bytes == {1: 200, 64: 300}


def torch_like(threads: int, devices: Sequence[str]) -> Iterator[Contender]:
    """Yield a contender with torch's input."""
    for device in devices:
        yield Contender("peer", "fp32", device, lambda pixels: pixels.astype(np.float32), "eager")
        yield Contender("compiled peer", "fp32", device, lambda pixels: pixels.sum(), "compiled")


def speed_of(contender: Contender) -> Speed:
    (point,) = measure_speeds([contender], (1,), noise(1), config=QUICK).points
    return point


def noise(count: int) -> Pixels:
    return np.random.default_rng(0).integers(0, 256, (count, 224, 224, 3), np.uint8)
