"""TensorRT-RTX parses and builds here; its own messages explain what it refuses."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import onnx
import pytest
from onnx import TensorProto, helper

from sbtk_runtime.bundle import Bundle
from sbtk_runtime.engines.cuda import find_device
from sbtk_runtime.engines.tensorrt.build import (
    MAX_BATCH,
    BuildProgress,
    BuildSettings,
    BuildWatch,
    BuiltPlan,
    build_plan,
)
from sbtk_runtime.engines.tensorrt.cache import PlanCache, cache_folder
from sbtk_runtime.engines.tensorrt.engine import ready_plan
from sbtk_runtime.engines.tensorrt.library import TensorRt, find_tensorrt, recording_logger
from sbtk_runtime.errors import BadConfig, BadModel, EngineUnavailable
from tests.fakes.machine import SURFACES, FakeMachine, fake_machine
from tests.fakes.tensorrt_world import Surface
from tests.tiny import tiny_bundle, tiny_model, write_tiny_manifest
from tests.tiny_conv import Kind, tiny_conv_model

SETTINGS = BuildSettings(1, 2, 4, workspace_bytes=1 << 30)


@pytest.fixture(scope="module")
def rtx() -> TensorRt:
    pytest.importorskip("tensorrt_rtx", reason="the extra 'tensorrt-rtx' is not installed")
    return find_tensorrt("tensorrt_rtx")


def _built(rtx: TensorRt, model: onnx.ModelProto, settings: BuildSettings = SETTINGS) -> BuiltPlan:
    return build_plan(rtx, model.SerializeToString(), settings)


def _untouchable(name: str, version: str) -> TensorRt:
    """Return a TensorRT that fails with an AttributeError as soon as it is used."""
    return TensorRt(name, object(), version)


def _activation_bytes(built: BuiltPlan) -> int:
    (size,) = re.findall(r"Total Activation Memory: (\d+)", "\n".join(built.log))
    return int(size)


def test_every_precision_is_built_from_its_own_file(rtx: TensorRt) -> None:
    sizes = {}
    kinds: tuple[Kind, ...] = ("fp32", "fp16", "int8 for TensorRT")
    for kind in kinds:
        built = _built(rtx, tiny_conv_model(kind))
        sizes[kind] = len(built.plan)
        assert built.build_s > 0
        assert any("Engine generation completed" in line for line in built.log)
        # TensorRT-RTX has no use for one.
        assert built.timing_cache == b""
    # The plan holds the weights in the precision of the file: no flag has changed it.
    assert sizes["fp32"] > 4_000_000
    assert sizes["fp16"] < 0.75 * sizes["fp32"]
    assert sizes["int8 for TensorRT"] < 0.75 * sizes["fp32"]


def test_the_profile_is_dynamic_and_limits_memory(rtx: TensorRt) -> None:
    model = tiny_conv_model("fp16")
    small = _built(rtx, model, BuildSettings(1, 1, 2))
    large = _built(rtx, model, BuildSettings(1, 16, 64))
    assert any("minShape is not the same as maxShape" in line for line in large.log)
    assert _activation_bytes(large) > 3 * _activation_bytes(small)


def test_a_profile_can_have_a_single_batch_size(rtx: TensorRt) -> None:
    assert _built(rtx, tiny_model(), BuildSettings(3, 3, 3)).plan


def test_progress_shows_time_and_the_current_phase(rtx: TensorRt) -> None:
    messages: list[BuildProgress] = []
    # The pretrained model takes long enough to be looked at.
    onnx_bytes = Bundle.open("sbtknet-sketchy").read_onnx("fp16", "tensorrt")
    build_plan(rtx, onnx_bytes, SETTINGS, progress=messages.append)
    assert messages
    times = [progress.elapsed_s for progress in messages]
    assert times == sorted(times)
    assert times[-1] > 0
    assert all(progress.waiting_for for progress in messages)
    in_a_phase = [progress for progress in messages if progress.total]
    assert in_a_phase
    for progress in in_a_phase:
        assert 0 <= progress.done <= progress.total
        assert f"{progress.phase}: {progress.done} of {progress.total}" in progress.sentence()
    assert all(re.match(r"\d+ s.*, waiting for .+", p.sentence()) for p in messages)


def test_progress_shows_the_innermost_phase() -> None:
    watch = BuildWatch()
    watch.enter("the ONNX parser")
    assert watch.progress().waiting_for == "the ONNX parser"
    watch.begin("Building engine", 6)
    watch.begin("Timing", 215)
    assert watch.advance("Timing", 3)
    watch.begin("Serialising", 1)
    watch.end("Serialising")
    progress = watch.progress()
    assert (progress.phase, progress.done, progress.total) == ("Building engine", 0, 6)
    assert progress.waiting_for == "Timing (3 of 215)"
    watch.cancel()
    assert not watch.advance("Timing", 4)


def test_a_cancelled_build_is_stopped_by_tensorrt_itself(rtx: TensorRt) -> None:
    module, watch, logger = rtx.module, BuildWatch(), recording_logger(rtx)
    builder = module.Builder(logger)
    network = builder.create_network(1 << int(module.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = module.OnnxParser(network, logger)
    assert parser.parse(tiny_conv_model().SerializeToString())
    config = builder.create_builder_config()
    profile = builder.create_optimization_profile()
    profile.set_shape("images", *((n, 224, 224, 3) for n in (1, 2, 4)))
    config.add_optimization_profile(profile)
    config.progress_monitor = watch.monitor(module)
    watch.cancel()
    assert builder.build_serialized_network(network, config) is None
    assert any("canceled" in line.lower() for line in logger.problems())


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, RuntimeError])
def test_an_interruption_ends_the_build_and_is_raised(
    rtx: TensorRt, interruption: type[BaseException]
) -> None:
    def interrupt(_: BuildProgress) -> None:
        if interruption is KeyboardInterrupt:
            signal.raise_signal(signal.SIGINT)
        raise interruption

    onnx_bytes = Bundle.open("sbtknet-sketchy").read_onnx("fp16", "tensorrt")
    with pytest.raises(interruption):
        build_plan(rtx, onnx_bytes, SETTINGS, progress=interrupt)
    assert not [thread for thread in threading.enumerate() if "plan build" in thread.name]
    # And the next build goes through.
    assert _built(rtx, tiny_model()).plan


def test_a_signal_during_the_wait_ends_the_build_before_it_is_raised(rtx: TensorRt) -> None:
    """Otherwise TensorRT's thread aborts the process if that ends while the thread still builds."""

    def interrupt(_signal: int, _frame: FrameType | None) -> NoReturn:
        raise KeyboardInterrupt

    onnx_bytes = Bundle.open("sbtknet-sketchy").read_onnx("fp16", "tensorrt")
    handler = signal.signal(signal.SIGALRM, interrupt)
    try:
        # Between two looks at the progress, and while the build takes seconds.
        signal.setitimer(signal.ITIMER_REAL, 0.1)
        with pytest.raises(KeyboardInterrupt):
            build_plan(rtx, onnx_bytes, SETTINGS)
        assert not [thread for thread in threading.enumerate() if "plan build" in thread.name]
    finally:
        signal.signal(signal.SIGALRM, handler)


def test_damaged_files_never_reach_the_builder() -> None:
    content = tiny_conv_model().SerializeToString()
    damaged = [b"", b"no ONNX at all", content[: len(content) // 2], content[:-1], b"\x00" * 64]
    for onnx_bytes in damaged:
        with pytest.raises(BadModel, match=r"broken\.onnx"):
            build_plan(_untouchable("tensorrt_rtx", "1"), onnx_bytes, SETTINGS, name="broken.onnx")
    with pytest.raises(AttributeError):
        build_plan(_untouchable("tensorrt_rtx", "1"), content, SETTINGS)


def test_external_data_never_reaches_the_builder(tmp_path: Path) -> None:
    folder = tiny_bundle(tmp_path / "tiny")
    model = tiny_conv_model("fp16")
    onnx.save(model, folder / "model.fp16.onnx", save_as_external_data=True, size_threshold=0)
    write_tiny_manifest(folder)
    with pytest.raises(BadModel, match="weights in another file"):
        Bundle.open(folder).read_onnx("fp16", "tensorrt")
    content = (folder / "model.fp16.onnx").read_bytes()
    with pytest.raises(BadModel, match="weights in another file"):
        build_plan(_untouchable("tensorrt_rtx", "1"), content, SETTINGS)


@pytest.mark.parametrize(
    "graph",
    [
        # One node, of the type A, without an output: TensorRT-RTX 1.7 ends the process over it.
        b"\x0a\x03\x22\x01A",
        # One node whose output's name is not UTF-8.
        b"\x0a\x06\x12\x01\xff\x22\x01A",
    ],
)
def test_files_that_crash_the_parser_never_reach_it(graph: bytes) -> None:
    onnx_bytes = b"\x3a" + bytes([len(graph)]) + graph
    with pytest.raises(BadModel, match=r"a node (with|whose)"):
        build_plan(_untouchable("tensorrt_rtx", "1"), onnx_bytes, SETTINGS)


def test_truncated_weights_are_refused_by_the_parser(rtx: TensorRt) -> None:
    model = tiny_model()
    weights = next(tensor for tensor in model.graph.initializer if tensor.name == "weights")
    weights.raw_data = weights.raw_data[:100]
    with pytest.raises(BadModel, match=r"TensorRT-RTX [\d.]+ refuses the ONNX model") as caught:
        _built(rtx, model)
    assert "Failed to import initializer: " in caught.value.found


@pytest.mark.parametrize(
    ("name", "version", "newest"),
    [("tensorrt", "10.16.1.11", 20), ("tensorrt", "11.4.0.106", 25), ("tensorrt_rtx", "1.7", 20)],
)
def test_an_opset_that_is_too_new_is_refused(name: str, version: str, newest: int) -> None:
    model = tiny_model()
    model.opset_import[0].version = newest + 1
    with pytest.raises(BadModel, match=f"opset {newest + 1}") as caught:
        build_plan(_untouchable(name, version), model.SerializeToString(), SETTINGS)
    assert f"at most {newest}" in caught.value.expected


def test_the_newest_opset_and_foreign_operator_sets_are_accepted(rtx: TensorRt) -> None:
    model = tiny_model()
    model.opset_import[0].version = 20
    model.opset_import.append(helper.make_opsetid("com.example", 99))
    assert _built(rtx, model).plan


def _two_inputs() -> onnx.ModelProto:
    model = tiny_model()
    model.graph.input.append(helper.make_tensor_value_info("domain", TensorProto.FLOAT, ["batch"]))
    return model


def _fixed_batch() -> onnx.ModelProto:
    model = tiny_model()
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 4
    return model


def _renamed(old: str, new: str) -> onnx.ModelProto:
    content = tiny_model().SerializeToString()
    assert len(old) == len(new)
    return onnx.load_from_string(content.replace(old.encode(), new.encode()))


def _float_input() -> onnx.ModelProto:
    model = tiny_model()
    model.graph.input[0].type.tensor_type.elem_type = TensorProto.FLOAT
    return model


def _no_outputs() -> onnx.ModelProto:
    model = tiny_model()
    del model.graph.output[:]
    return model


def _flat_output() -> onnx.ModelProto:
    model = tiny_model()
    model.graph.output[0].name = "cells"
    return model


@pytest.mark.parametrize(
    ("model", "found"),
    [
        (_two_inputs(), r"takes images: UINT8 \(any, 224, 224, 3\) and domain: FLOAT \(any\)"),
        (_fixed_batch(), r"takes images: UINT8 \(4, 224, 224, 3\)"),
        (_renamed("images", "photos"), "takes photos"),
        (_float_input(), "takes images: FLOAT"),
        (_renamed("embeddings", "projection"), "returns projection"),
        (_no_outputs(), "returns nothing"),
        (_flat_output(), r"returns cells: FLOAT \(any, 3, 8, 8\)"),
    ],
    ids=["two inputs", "fixed batch", "input", "float input", "output", "no output", "planes"],
)
def test_models_of_another_kind_are_refused_with_our_message(
    rtx: TensorRt, model: onnx.ModelProto, found: str
) -> None:
    with pytest.raises(BadModel, match=found) as caught:
        _built(rtx, model)
    assert "any batch" in caught.value.expected


def test_int8_for_cpus_is_refused_with_the_parsers_message(rtx: TensorRt) -> None:
    with pytest.raises(BadModel) as caught:
        _built(rtx, tiny_conv_model("int8 for CPUs"))
    message = str(caught.value)
    assert "DequantizeLinear" in message
    assert "must have type" in message
    assert "symmetric" in message
    assert "--int8-trt" in message
    # The paths of TensorRT's own source files help nobody, nor does the missing GPU.
    assert not re.search(r"\.(cpp|h|hpp)\b|_src|cudaError", message)


def test_the_shipped_int8_for_cpus_is_refused_too(rtx: TensorRt) -> None:
    content = Bundle.open("sbtknet-sketchy").read_onnx("int8")
    with pytest.raises(BadModel, match="Int32 but must have type"):
        build_plan(rtx, content, SETTINGS)


def test_an_unknown_operator_is_named(rtx: TensorRt) -> None:
    model = tiny_model()
    model.graph.node.append(helper.make_node("Swirl", ["cells"], ["x"], domain="com.example"))
    model.opset_import.append(helper.make_opsetid("com.example", 1))
    model.graph.output.append(helper.make_tensor_value_info("x", TensorProto.FLOAT, None))
    with pytest.raises(BadModel, match="Swirl"):
        _built(rtx, model)


@pytest.mark.parametrize("workspace_bytes", [0, 1000])
def test_without_workspace_the_builders_reason_is_shown(
    rtx: TensorRt, workspace_bytes: int
) -> None:
    settings = BuildSettings(1, 2, 4, workspace_bytes=workspace_bytes)
    with pytest.raises(EngineUnavailable, match="could not build a plan") as caught:
        _built(rtx, tiny_model(), settings)
    assert "workspace" in caught.value.found
    assert "--workspace" in caught.value.next_step


@pytest.mark.parametrize(
    "settings",
    [
        {"batch_min": 0},
        {"batch_min": 33},
        {"batch_opt": 257},
        {"batch_max": 31},
        {"batch_max": MAX_BATCH + 1},
        {"workspace_bytes": -1},
        {"optimisation_level": 6},
        {"optimisation_level": -1},
    ],
)
def test_impossible_settings_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(BadConfig):
        BuildSettings(**settings)


def test_tensorrt_without_a_driver_is_refused_before_a_builder_exists() -> None:
    pytest.importorskip("cuda.bindings", reason="cuda-bindings is not installed")
    if _has_a_gpu():
        pytest.skip("this machine has a driver")
    trt = _untouchable("tensorrt", "10.16.1.11")
    with pytest.raises(EngineUnavailable, match="driver"):
        build_plan(trt, tiny_model().SerializeToString(), SETTINGS)


def _has_a_gpu() -> bool:
    return Path("/proc/driver/nvidia/version").exists()


def test_building_imports_neither_torch_nor_onnx(rtx: TensorRt, tmp_path: Path) -> None:
    (tmp_path / "tiny.onnx").write_bytes(tiny_conv_model("fp16").SerializeToString())
    code = """
import sys
from pathlib import Path
from sbtk_runtime.engines.tensorrt.build import BuildSettings, build_plan
from sbtk_runtime.engines.tensorrt.engine import ready_plan
assert not {"tensorrt_rtx", "cuda", "onnxruntime", "openvino"} & set(sys.modules), "not lazy"
from sbtk_runtime.engines.tensorrt.library import find_tensorrt
built = build_plan(find_tensorrt(), Path("tiny.onnx").read_bytes(), BuildSettings(1, 2, 4))
assert "tensorrt_rtx" in sys.modules and built.plan
print(*{"torch", "torchvision", "onnx", "onnxscript", "click"} & set(sys.modules))
"""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], cwd=tmp_path, capture_output=True, text=True
    )
    # Nothing of TensorRT's log, and no warning of a deprecated call, on the user's terminal.
    assert (done.returncode, done.stdout, done.stderr) == (0, "\n", "")


TENSORRT_SETTINGS = BuildSettings(1, 2, 4)
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
    """Return the list that gets `note(*arguments)` of every call of a method from now on."""
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
        build_plan(find_tensorrt(), ONNX, TENSORRT_SETTINGS, device=find_device(f"cuda:{index}"))
    assert gpus == [1, 0]


def test_a_timing_cache_is_reused_by_the_next_build(
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
    built = build_plan(find_tensorrt(), ONNX, TENSORRT_SETTINGS, timing_cache=b"of another GPU")
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
def test_every_none_of_tensorrt_is_an_error(
    machine: FakeMachine,
    monkeypatch: pytest.MonkeyPatch,
    owner: str,
    method: str,
    purpose: str,
) -> None:
    monkeypatch.setattr(getattr(machine.world.module, owner), method, lambda *_: None)
    with pytest.raises(EngineUnavailable, match=f"could not {purpose}") as caught:
        build_plan(find_tensorrt(), ONNX, TENSORRT_SETTINGS)
    assert "no reason given" in caught.value.found


def test_a_rejected_profile_is_an_error(
    machine: FakeMachine, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = machine.world.module.IBuilderConfig
    monkeypatch.setattr(config, "add_optimization_profile", lambda *_: -1)
    with pytest.raises(EngineUnavailable, match=r"a profile of batches \(1, 2, 4\)"):
        build_plan(find_tensorrt(), ONNX, TENSORRT_SETTINGS)


def test_the_builders_messages_are_in_the_error(machine: FakeMachine) -> None:
    machine.faults.build = "Error Code 2: OutOfMemory (Requested size was 51160320 bytes.)"
    with pytest.raises(EngineUnavailable, match="Requested size was 51160320 bytes"):
        build_plan(find_tensorrt(), ONNX, TENSORRT_SETTINGS)


def test_the_parsers_messages_are_in_the_error(machine: FakeMachine) -> None:
    model = tiny_model()
    model.graph.node[0].op_type = "Swirl"
    with pytest.raises(BadModel, match="Swirl"):
        build_plan(find_tensorrt(), model.SerializeToString(), TENSORRT_SETTINGS)


def test_without_a_driver_no_builder_is_made(machine: FakeMachine) -> None:
    machine.cuda_faults.count = "cudaErrorInsufficientDriver"
    machine.cuda_faults.driver = 0
    if _is_rtx(machine):
        assert build_plan(find_tensorrt(), ONNX, TENSORRT_SETTINGS).plan
    else:
        with pytest.raises(EngineUnavailable, match="no NVIDIA driver"):
            build_plan(find_tensorrt(), ONNX, TENSORRT_SETTINGS)
        assert machine.world.made["Builder"] == 0


def test_a_plan_works_on_every_gpu_of_its_model(machine: FakeMachine, bundle: Bundle) -> None:
    trt, second = find_tensorrt(), find_device("cuda:1")
    ready = ready_plan(bundle, "fp32", trt, second, TENSORRT_SETTINGS)
    assert (ready.record.device, ready.record.compute_capability) == (second.name, "9.0")
    assert not ready_plan(bundle, "fp32", trt, find_device("cuda:0"), may_build=False).is_new
    if not _is_rtx(machine):
        # Where no GPU is named, TensorRT takes the first.
        assert not ready_plan(bundle, "fp32", trt, None, may_build=False).is_new
    for other in (replace(second, name="Other GPU"), replace(second, compute_capability="8.9")):
        with pytest.raises(EngineUnavailable, match="it was built on Fake GPU"):
            ready_plan(bundle, "fp32", trt, other, may_build=False)
