"""Stages and throughput, measured on a tiny bundle; what is asserted is never a duration."""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
import pytest

from sbtk_runtime import bench_latency
from sbtk_runtime.bench_engines import Effort, Pictures, measure_latency
from sbtk_runtime.bench_inputs import generated_sketches
from sbtk_runtime.bundle import Bundle
from sbtk_runtime.errors import BadModel
from sbtk_runtime.preprocess import Pixels
from tests.tiny import tiny_bundle, write_photos

QUICK = Effort(samples=3, rounds=2, block_s=0.01)


@pytest.fixture
def pictures(tmp_path: Path) -> Pictures:
    photos = [path.read_bytes() for path in write_photos(tmp_path / "photos", 3)]
    return Pictures(generated_sketches(2), photos, "tiny pictures")


def test_every_stage_and_every_precision_is_measured(tmp_path: Path, pictures: Pictures) -> None:
    bundle = Bundle.open(tiny_bundle(tmp_path / "bundle"))
    asked: list[int] = []
    report = measure_latency(
        bundle,
        pictures,
        lambda row: asked.append(len(row)),
        "nothing",
        threads=1,
        batches=(1, 3),
        peers=lambda threads: {"peer": lambda pixels: pixels.astype(np.float32)},
        effort=QUICK,
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
    points = {(point.name, point.batch) for point in report.throughput}
    names = ("onnxruntime int8", "onnxruntime fp32", "peer")
    assert points == {(name, batch) for name in names for batch in (1, 3)}
    assert report.engine == "onnxruntime"
    assert report.precision == "int8"
    assert report.threads == 1
    assert report.reference == "peer"
    peers = [point for point in report.throughput if point.name == "peer"]
    assert [point.times_reference for point in peers] == [1.0, 1.0]
    assert json.loads(json.dumps(report.to_json()))["model_id"] == bundle.manifest.model_id


def test_one_precision_and_no_peer(tmp_path: Path, pictures: Pictures) -> None:
    bundle = Bundle.open(tiny_bundle(tmp_path / "bundle"))
    report = measure_latency(
        bundle, pictures, len, "nothing", precision="fp32", batches=(2,), effort=QUICK
    )
    assert [point.name for point in report.throughput] == ["onnxruntime fp32"]
    assert report.reference is None
    assert report.throughput[0].times_reference is None


def test_a_precision_that_is_not_there_is_named(tmp_path: Path, pictures: Pictures) -> None:
    bundle = Bundle.open(tiny_bundle(tmp_path / "bundle"))
    with pytest.raises(BadModel, match="fp16"):
        measure_latency(bundle, pictures, len, "nothing", precision="fp16", effort=QUICK)


def test_the_total_of_a_picture_is_the_sum_of_its_stages() -> None:
    sketches = generated_sketches(1)

    def engine(pixels: Pixels) -> object:
        return np.ones((len(pixels), 4), dtype=np.float32)

    stages = bench_latency.measure_stages(sketches, sketches, engine, len, samples=1)
    for subject in ("sketch", "photo"):
        parts = [s.p50_ms for s in stages if s.subject == subject and s.stage != "total"]
        total = next(s.p50_ms for s in stages if (s.subject, s.stage) == (subject, "total"))
        assert total == pytest.approx(sum(parts))


def test_contenders_take_turns_and_get_batches_of_the_asked_size() -> None:
    order: list[tuple[str, int]] = []

    def contender(name: str) -> bench_latency.Run:
        def run(pixels: Pixels) -> object:
            order.append((name, len(pixels)))
            time.sleep(0.001)
            return pixels

        return run

    contenders = {name: contender(name) for name in ("a", "b")}
    results = bench_latency.measure_throughput(
        contenders, (1, 5), reference="a", rounds=3, block_s=0.002
    )
    assert {(point.name, point.batch) for point in results} == {
        (name, batch) for name in ("a", "b") for batch in (1, 5)
    }
    turns = [
        name for index, (name, _) in enumerate(order) if index == 0 or order[index - 1][0] != name
    ]
    # Warm-up, then three rounds, for each of the two batch sizes.
    assert turns == ["a", "b"] * 8
    assert {size for _, size in order} == {1, 5}
    for point in results:
        assert point.images_per_s == pytest.approx(point.batch / point.p50_ms * 1e3)
        assert point.p50_ms <= point.p95_ms <= point.p99_ms
