"""A plan is compared with ONNX Runtime before it is used, and removed if it is wrong."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from sbtk_runtime.bundle import Bundle
from sbtk_runtime.engines import onnxruntime as engine_onnxruntime
from sbtk_runtime.engines.base import EngineInfo, EngineOptions, EngineRequest
from sbtk_runtime.engines.cuda import find_device
from sbtk_runtime.engines.tensorrt.build import BuildSettings
from sbtk_runtime.engines.tensorrt.cache import PlanCache, cache_folder
from sbtk_runtime.engines.tensorrt.check import (
    LEAST_COSINE,
    check_plan,
    generate_images,
    require_sound,
)
from sbtk_runtime.engines.tensorrt.engine import ReadyPlan, ready_plan
from sbtk_runtime.engines.tensorrt.library import TensorRt, find_tensorrt
from sbtk_runtime.errors import EngineUnavailable
from sbtk_runtime.preprocess import KINDS, Kind, Pixels
from tests.fakes.machine import SURFACES, FakeMachine, fake_machine
from tests.tiny import tiny_bundle, tiny_model

SETTINGS = BuildSettings(1, 4, 8)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return Bundle.open(tiny_bundle(tmp_path_factory.mktemp("tiny")))


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeMachine]:
    """A machine with a GPU, TensorRT 10 and an empty cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    machine = fake_machine(monkeypatch, SURFACES[0])
    yield machine
    assert not machine.alive()


class Scripted:
    """An engine that gives the rows it was made with."""

    info = EngineInfo("scripted", "fp32", "cuda:0", 16, threads=1, lanes=1, version="0")

    def __init__(self, row: list[float]) -> None:
        self._row = np.array(row, dtype=np.float32)

    def run(self, images: Pixels, kind: Kind) -> NDArray[np.float32]:
        return np.tile(self._row, (len(images), 1))

    def close(self) -> None:
        """Hold nothing."""


def test_a_correct_plan_is_measured_and_kept(machine: FakeMachine, bundle: Bundle) -> None:
    trt, ready = built(bundle)
    check = require_sound(ready, bundle, trt, find_device())
    assert check.images == 8
    assert check.cosine_min is not None
    assert 0.9999 <= check.cosine_min <= 1.0001
    assert check.compared_with.startswith("onnxruntime ")
    assert len(PlanCache(cache_folder()).entries()) == 1


def test_a_plan_with_other_weights_is_removed(machine: FakeMachine, bundle: Bundle) -> None:
    """What a kernel that computes wrongly would look like."""
    trt, ready = built(bundle)
    other = tiny_model(seed=1)
    profile = {"images": [(n, 224, 224, 3) for n in (1, 4, 8)]}
    wrong = ReadyPlan(
        machine.world.plan(other.SerializeToString(), profile),
        ready.record,
        is_new=True,
        kept_in=ready.kept_in,
    )
    with pytest.raises(EngineUnavailable, match=r"and onnxruntime .* disagree: .* cosine of"):
        require_sound(wrong, bundle, trt, find_device())
    assert PlanCache(cache_folder()).entries() == []


def test_a_plan_that_does_not_load_is_removed(machine: FakeMachine, bundle: Bundle) -> None:
    trt, ready = built(bundle)
    machine.faults.deserialise = "Platform specific tag mismatch."
    with pytest.raises(EngineUnavailable, match="tag mismatch"):
        require_sound(ready, bundle, trt, find_device())
    assert PlanCache(cache_folder()).entries() == []


def test_other_plans_stay_when_one_is_removed(machine: FakeMachine, bundle: Bundle) -> None:
    built(bundle, BuildSettings(1, 1, 1))
    trt, ready = built(bundle)
    machine.faults.deserialise = "no"
    with pytest.raises(EngineUnavailable):
        require_sound(ready, bundle, trt, find_device())
    (left,) = PlanCache(cache_folder()).entries()
    assert left.record is not None
    assert left.record.batch_max == 1


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        ([1.0] + [0.0] * 15, "have a cosine of"),
        ([2.0] + [0.0] * 15, "8 of 8 rows that .* returns are not embeddings"),
        ([float("nan")] * 16, "8 of 8 rows that .* returns are not embeddings"),
    ],
)
def test_rows_that_differ_from_the_models_are_refused(
    bundle: Bundle, row: list[float], complaint: str
) -> None:
    with pytest.raises(EngineUnavailable, match=complaint):
        check_plan(Scripted(row), bundle, "fp32")


def test_without_onnx_runtime_the_plan_is_run_and_not_compared(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    check = check_plan(Scripted([1.0] + [0.0] * 15), bundle, "fp32")
    assert check.cosine_min is None
    assert "ONNX Runtime" in check.compared_with


def test_generated_images_have_distinct_embeddings(bundle: Bundle) -> None:
    """A check on images that embed alike would pass whatever the order of the rows."""
    engine = engine_onnxruntime.open_cpu(
        EngineRequest(bundle, EngineOptions(precision="fp32", threads=1))
    )
    images = generate_images(bundle.preprocessing)
    assert set(images) == set(KINDS)
    rows = np.concatenate([engine.run(pixels, kind) for kind, pixels in images.items()])
    engine.close()
    cosines = rows @ rows.T - 2 * np.eye(len(rows))
    assert cosines.max() < LEAST_COSINE["fp32"]


def built(bundle: Bundle, settings: BuildSettings = SETTINGS) -> tuple[TensorRt, ReadyPlan]:
    trt = find_tensorrt("tensorrt")
    return trt, ready_plan(bundle, "fp32", trt, find_device(), settings)
