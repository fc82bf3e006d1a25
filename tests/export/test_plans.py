"""Plans built after an export, and compared with torch if there is a GPU."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from sbtk_export.card import StudentFacts
from sbtk_export.export import Exported, ExportPlan, Variant, export_student
from sbtk_export.images import ExportImages
from sbtk_export.parity import Reference
from sbtk_export.plans import PlanBuilder, build_engines, find_plan_builder
from sbtk_runtime.engines.tensorrt.cache import CacheEntry, PlanCache, cache_folder
from sbtk_runtime.errors import BadModel
from sbtk_train.models.student import SbtknetStudent
from tests.fakes.machine import SURFACES, FakeMachine, fake_machine

VARIANTS: tuple[Variant, ...] = ("fp32", "fp16", "int8.trt")


@pytest.fixture(scope="module")
def exported(
    tmp_path_factory: pytest.TempPathFactory,
    student: SbtknetStudent,
    facts: StudentFacts,
    samples: ExportImages,
) -> Exported:
    """A bundle with what TensorRT is fast with."""
    plan = ExportPlan(tmp_path_factory.mktemp("bundles") / "gpu", "gpu", VARIANTS)
    return export_student(student, facts, samples, plan, print)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeMachine]:
    """A machine with a fake GPU and TensorRT 11, which compute through ONNX Runtime."""
    machine = fake_machine(monkeypatch, SURFACES[1])
    yield machine
    assert not machine.alive()


def test_without_tensorrt_nothing_is_built_or_printed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for module in ("tensorrt", "tensorrt_rtx"):
        monkeypatch.setitem(sys.modules, module, None)
    messages: list[str] = []
    assert find_plan_builder(messages.append) is None
    assert messages == []


def test_tensorrt_without_a_driver_is_named(machine: FakeMachine) -> None:
    machine.cuda_faults.driver, machine.cuda_faults.count = 0, "cudaErrorInsufficientDriver"
    messages: list[str] = []
    assert find_plan_builder(messages.append) is None
    assert messages == [
        "no plan is built by TensorRT 11.4.0: there is no NVIDIA driver on this machine"
    ]


def test_tensorrt_rtx_builds_without_a_gpu(exported: Exported) -> None:
    pytest.importorskip("tensorrt_rtx", reason="the extra 'tensorrt-rtx' is not installed")
    builder = find_plan_builder(print)
    assert builder is not None
    assert builder.trt.name == "tensorrt_rtx"
    assert builder.device is None
    engines = build_engines(exported, VARIANTS, builder, print)
    assert [engine.record.precision for engine in engines] == ["fp16", "int8"]
    for engine in engines:
        assert engine.parity is None
        assert "this machine has no GPU" in engine.not_run
        assert engine.record.device == "none"
        assert engine.record.model_id == exported.bundle.manifest.model_id
    assert {entry.reason for entry in kept()} == {""}
    assert len(kept()) == 2


def test_parity_is_measured_with_the_running_plan(exported: Exported, machine: FakeMachine) -> None:
    engines = build_engines(exported, VARIANTS, found_builder(), print)
    assert [engine.record.precision for engine in engines] == ["fp16", "int8"]
    for engine, key in zip(engines, ("fp16", "int8.trt"), strict=True):
        assert engine.parity is not None
        assert engine.not_run == ""
        assert engine.parity.engine == "tensorrt 11.4.0"
        # The fake GPU computes through ONNX Runtime, so the figures are those of the ONNX file.
        parity = exported.bundle.manifest.parity[key]
        assert engine.parity.images == parity["images"]
        assert engine.parity.cosine_min == pytest.approx(parity["cosine_min"], abs=1e-3)
    assert len(kept()) == 2
    assert machine.calls["cudaMalloc"] > 0


def test_plans_are_built_only_for_files_in_the_bundle(
    exported: Exported, machine: FakeMachine
) -> None:
    assert build_engines(exported, ("fp32",), found_builder(), print) == []
    (engine,) = build_engines(exported, ("fp32", "fp16"), found_builder(), print)
    assert engine.record.precision == "fp16"


def test_a_plan_that_differs_from_the_student_is_removed_and_the_bundle_kept(
    exported: Exported, machine: FakeMachine
) -> None:
    rows = exported.reference
    rolled = Reference(*(np.roll(part, 1, axis=0) for part in (rows.parity, rows.ranking)))
    with pytest.raises(BadModel, match="the fp16 plan differs from the student") as caught:
        build_engines(replace(exported, reference=rolled), VARIANTS, found_builder(), print)
    assert "smallest cosine" in caught.value.found
    assert kept() == []
    exported.bundle.verify()


def test_a_plan_that_does_not_load_is_reported_and_deleted(
    exported: Exported, machine: FakeMachine
) -> None:
    machine.faults.deserialise = "Target GPU SM 90 is not supported by this TensorRT release."
    (engine,) = build_engines(exported, ("fp16",), found_builder(), print)
    assert engine.parity is None
    assert "SM 90 is not supported" in engine.not_run
    assert kept() == []


def test_a_failing_builder_does_not_fail_the_export(
    exported: Exported, machine: FakeMachine
) -> None:
    machine.faults.build = "Could not find any implementation for node."
    messages: list[str] = []
    assert build_engines(exported, VARIANTS, found_builder(), messages.append) == []
    failures = [sentence for sentence in messages if "no plan was built" in sentence]
    assert [sentence.partition(":")[0] for sentence in failures] == ["fp16", "int8.trt"]
    assert all("Could not find any implementation" in sentence for sentence in failures)


def found_builder() -> PlanBuilder:
    builder = find_plan_builder(print)
    assert builder is not None
    assert builder.device is not None
    return builder


def kept() -> list[CacheEntry]:
    return PlanCache(cache_folder()).entries()
