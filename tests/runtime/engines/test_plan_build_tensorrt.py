"""The one way of building suits TensorRT 10, 11 and RTX, names and answers of each included.

TensorRT is that of `tests.fakes`, which has no name that the real one lacks.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sbtk_runtime.bundle import Bundle
from sbtk_runtime.engines.cuda_device import find_device
from sbtk_runtime.engines.plan_build import BuildSettings, build_plan
from sbtk_runtime.engines.plan_cache import PlanCache, cache_folder
from sbtk_runtime.engines.plan_ready import ready_plan
from sbtk_runtime.engines.tensorrt_library import find_tensorrt
from sbtk_runtime.errors import BadModel, EngineUnavailable
from tests.fakes.machine import SURFACES, FakeMachine, fake_machine
from tests.fakes.tensorrt_surface import Surface
from tests.tiny import tiny_bundle, tiny_model

SETTINGS = BuildSettings(1, 2, 4)
ONNX = tiny_model().SerializeToString()


@pytest.fixture(params=SURFACES, ids=lambda surface: f"{surface.module}-{surface.version}")
def machine(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Iterator[FakeMachine]:
    """A machine of two GPUs with each TensorRT by turns, and an empty cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    surface: Surface = request.param
    yield fake_machine(monkeypatch, surface, gpus=2)


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return Bundle.open(tiny_bundle(tmp_path / "tiny"))


def _is_rtx(machine: FakeMachine) -> bool:
    return machine.world.surface.module == "tensorrt_rtx"


def _recorded(monkeypatch: pytest.MonkeyPatch, owner: type[Any], name: str, note: Any) -> list[Any]:
    """Returns the list that gets `note(*arguments)` of every call of a method from now on."""
    notes: list[Any] = []
    original = getattr(owner, name)

    def method(*arguments: Any) -> Any:
        notes.append(note(*arguments))
        return original(*arguments)

    monkeypatch.setattr(owner, name, method)
    return notes


def test_no_flag_is_set_and_tf32_is_cleared(
    machine: FakeMachine, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = _recorded(
        monkeypatch,
        machine.world.module.Builder,
        "build_serialized_network",
        lambda builder, network, config: (set(config._flags), config.builder_optimization_level),
    )
    settings = BuildSettings(1, 2, 4, optimisation_level=5)
    assert build_plan(find_tensorrt(), ONNX, settings).plan
    assert flags == [(set(), 5)]


def test_the_plan_is_built_on_the_gpu_that_will_run_it(
    machine: FakeMachine, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpus = _recorded(
        monkeypatch,
        machine.world.module.Builder,
        "build_serialized_network",
        lambda *_: machine.gpus.device(),
    )
    for index in (1, 0):
        build_plan(find_tensorrt(), ONNX, SETTINGS, device=find_device(f"cuda:{index}"))
    assert gpus == [1, 0]


def test_what_a_build_measured_makes_the_next_one_faster(
    machine: FakeMachine, bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = machine.world.module.IBuilderConfig
    begun_with = _recorded(monkeypatch, config, "create_timing_cache", lambda _, content: content)
    trt, device = find_tensorrt(), find_device()
    for largest in (4, 8):
        ready_plan(bundle, "fp32", trt, device, BuildSettings(1, 2, largest))
    kept = PlanCache(cache_folder()).timing_cache(trt.name, trt.version, device.compute_capability)
    if _is_rtx(machine):
        # There it does nothing but warn.
        assert (begun_with, kept) == ([], b"")
    else:
        assert begun_with == [b"", b"timings"]
        assert kept == b"timings"


def test_a_timing_cache_of_another_gpu_is_not_used(
    machine: FakeMachine, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = machine.world.module.IBuilderConfig
    monkeypatch.setattr(
        config, "set_timing_cache", lambda self, cache, _: cache._content != b"of another GPU"
    )
    monkeypatch.setattr(
        config, "get_timing_cache", lambda self: pytest.fail("ours is the one that was set")
    )
    built = build_plan(find_tensorrt(), ONNX, SETTINGS, timing_cache=b"of another GPU")
    assert built.plan
    assert built.timing_cache == b""


@pytest.mark.parametrize(
    ("owner", "method", "purpose"),
    [
        ("Builder", "create_network", "make a network"),
        ("Builder", "create_builder_config", "make a configuration"),
        ("Builder", "create_optimization_profile", "make a profile"),
        ("Builder", "build_serialized_network", "build a plan"),
    ],
)
def test_every_none_is_an_error(
    machine: FakeMachine,
    monkeypatch: pytest.MonkeyPatch,
    owner: str,
    method: str,
    purpose: str,
) -> None:
    monkeypatch.setattr(getattr(machine.world.module, owner), method, lambda *_: None)
    with pytest.raises(EngineUnavailable, match=f"could not {purpose}") as caught:
        build_plan(find_tensorrt(), ONNX, SETTINGS)
    assert "it gave no reason" in caught.value.found


def test_a_profile_that_is_not_taken_is_an_error(
    machine: FakeMachine, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = machine.world.module.IBuilderConfig
    monkeypatch.setattr(config, "add_optimization_profile", lambda *_: -1)
    with pytest.raises(EngineUnavailable, match=r"a profile of batches \(1, 2, 4\)"):
        build_plan(find_tensorrt(), ONNX, SETTINGS)


def test_the_builders_own_lines_are_in_the_error(machine: FakeMachine) -> None:
    machine.faults.build = "Error Code 2: OutOfMemory (Requested size was 51160320 bytes.)"
    with pytest.raises(EngineUnavailable, match="Requested size was 51160320 bytes"):
        build_plan(find_tensorrt(), ONNX, SETTINGS)


def test_the_parsers_own_lines_are_in_the_error(machine: FakeMachine) -> None:
    model = tiny_model()
    model.graph.node[0].op_type = "Swirl"
    with pytest.raises(BadModel, match="Swirl"):
        build_plan(find_tensorrt(), model.SerializeToString(), SETTINGS)


def test_without_a_driver_no_builder_is_made(machine: FakeMachine) -> None:
    machine.cuda_faults.count = "cudaErrorInsufficientDriver"
    machine.cuda_faults.driver = 0
    if _is_rtx(machine):
        assert build_plan(find_tensorrt(), ONNX, SETTINGS).plan
    else:
        with pytest.raises(EngineUnavailable, match="no NVIDIA driver"):
            build_plan(find_tensorrt(), ONNX, SETTINGS)
        assert machine.world.made["Builder"] == 0


def test_a_plan_serves_every_gpu_of_its_kind(machine: FakeMachine, bundle: Bundle) -> None:
    trt, second = find_tensorrt(), find_device("cuda:1")
    ready = ready_plan(bundle, "fp32", trt, second, SETTINGS)
    assert (ready.record.device, ready.record.compute_capability) == (second.name, "9.0")
    assert not ready_plan(bundle, "fp32", trt, find_device("cuda:0"), may_build=False).is_new
    if not _is_rtx(machine):
        # Where no GPU is named, TensorRT takes the first.
        assert not ready_plan(bundle, "fp32", trt, None, may_build=False).is_new
    for other in (replace(second, name="Other GPU"), replace(second, compute_capability="8.9")):
        with pytest.raises(EngineUnavailable, match="it was built on Fake GPU"):
            ready_plan(bundle, "fp32", trt, other, may_build=False)
