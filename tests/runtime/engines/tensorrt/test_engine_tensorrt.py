"""TensorRT's engine computes what ONNX Runtime does, in the right order, and frees everything.

The GPUs and TensorRT are those of `tests.fakes`: they compute through ONNX Runtime, know the names
of TensorRT 10, 11 and RTX, and fail a test that uses them in a way that would be undefined.
"""

from __future__ import annotations

import gc
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray

from sbtk_runtime.bundle import Bundle
from sbtk_runtime.engines.base import EngineOptions, EngineRequest
from sbtk_runtime.engines.cuda import find_device, make_current
from sbtk_runtime.engines.registry import open_engine
from sbtk_runtime.engines.tensorrt.build import BuildSettings
from sbtk_runtime.engines.tensorrt.engine import (
    TensorRtEngine,
    open_tensorrt,
    probe_tensorrt,
    ready_plan,
)
from sbtk_runtime.engines.tensorrt.library import find_tensorrt
from sbtk_runtime.engines.tensorrt.pipeline import Network
from sbtk_runtime.errors import BadConfig, BadModel, EngineUnavailable, MissingExtra, SbtkError
from tests.fakes.machine import (
    SURFACES,
    FakeMachine,
    fake_machine,
    install_cuda,
    surface_name,
)
from tests.fakes.tensorrt_world import Surface
from tests.processes import run_python
from tests.tiny import tiny_bundle, tiny_model

pytestmark = pytest.mark.usefixtures("cache")

BATCH = 8
IMAGE_BYTES = 224 * 224 * 3


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return Bundle.open(tiny_bundle(tmp_path_factory.mktemp("tiny")))


@pytest.fixture(scope="module")
def expected(bundle: Bundle) -> NDArray[np.float32]:
    """Return what ONNX Runtime makes of `_images(40)`."""
    engine = open_engine(bundle, EngineOptions(engine="onnxruntime", precision="fp32"))
    rows = engine.run(_images(40), "photo")
    engine.close()
    return rows


def _images(count: int, seed: int = 0) -> NDArray[np.uint8]:
    random = np.random.default_rng(seed)
    coarse = random.integers(0, 256, (count, 8, 8, 3), dtype=np.uint8)
    return coarse.repeat(28, axis=1).repeat(28, axis=2)


def _request(bundle: Bundle, **changes: Any) -> EngineRequest:
    names = {field.name for field in fields(EngineOptions)}
    options = {name: value for name, value in changes.items() if name in names}
    others = {name: value for name, value in changes.items() if name not in names}
    defaults = EngineOptions(precision="fp32", threads=2, device="cuda", batch=BATCH)
    return EngineRequest(bundle, replace(defaults, **options), **others)


def _opened(machine: FakeMachine, bundle: Bundle, **changes: Any) -> TensorRtEngine:
    return open_tensorrt(_request(bundle, **changes), machine.world.surface.module)


def _refusal(machine: FakeMachine, bundle: Bundle, **changes: Any) -> SbtkError:
    """Return the error of an open function, without the frames that could keep things alive."""
    with pytest.raises(SbtkError) as caught:
        _opened(machine, bundle, **changes)
    # Only a context that failed may be kept by them; all else is gone while they still live.
    left = set(machine.alive())
    assert left <= {"IExecutionContext", "ICudaEngine", "bytes of a library"}
    return caught.value.with_traceback(None)


def _build(bundle: Bundle, module: str, *batches: int) -> None:
    """Put a plan with these smallest, usual and largest batches into the cache."""
    settings = BuildSettings(*batches)
    ready = ready_plan(bundle, "fp32", find_tensorrt(module), find_device("cuda"), settings)
    assert ready.kept_in is not None


# --- what it computes --------------------------------------------------------------------------


@pytest.mark.parametrize("count", [0, 1, 2, 3, 7, 8, 9, 33])
def test_rows_are_those_of_onnx_runtime(
    machine: FakeMachine, bundle: Bundle, expected: NDArray[np.float32], count: int
) -> None:
    engine = _opened(machine, bundle)
    # Thrice: plainly, while graphs are captured, and from graphs.
    for _ in range(3):
        rows = engine.run(_images(40)[:count], "photo")
        assert rows.dtype == np.float32 and rows.shape == (count, 16)
        assert np.allclose(rows, expected[:count], atol=1e-6)
    engine.close()


@pytest.mark.parametrize("count", [7, 8, 9, 17])
def test_a_plan_for_smaller_batches_runs_in_more_chunks(
    machine: FakeMachine, bundle: Bundle, expected: NDArray[np.float32], count: int
) -> None:
    _build(bundle, machine.world.surface.module, 1, 4, 8)
    notices: list[str] = []
    engine = _opened(machine, bundle, batch=32, notify=notices.append)
    assert engine.largest_batch == 8
    assert len(notices) == 1 and "takes 8 images at once, so a batch of 32 is split" in notices[0]
    assert np.allclose(engine.run(_images(40)[:count], "photo"), expected[:count], atol=1e-6)
    engine.close()


def test_a_plan_without_single_images_gets_a_padded_last_chunk(
    ten: FakeMachine, bundle: Bundle, expected: NDArray[np.float32]
) -> None:
    _build(bundle, "tensorrt", 3, 4, 8)
    engine = _opened(ten, bundle)
    assert np.allclose(engine.run(_images(40)[:9], "photo"), expected[:9], atol=1e-6)
    assert [done.images for done in ten.gpus.done("run", "graph")][-2:] == [8, 3]
    engine.close()


def test_each_result_is_a_separate_array(ten: FakeMachine, bundle: Bundle) -> None:
    engine = _opened(ten, bundle)
    first = engine.run(_images(3), "photo")
    kept = first.copy()
    assert not np.array_equal(engine.run(_images(3, seed=1), "photo"), first)
    assert np.array_equal(first, kept)
    engine.close()
    assert np.array_equal(first, kept) and first.flags.owndata


def test_views_and_slices_are_accepted(ten: FakeMachine, bundle: Bundle) -> None:
    engine = _opened(ten, bundle)
    images = _images(6)
    assert np.array_equal(engine.run(images[::2], "photo"), engine.run(images, "photo")[::2])
    mirrored = images[:, :, ::-1]
    assert np.array_equal(engine.run(mirrored, "photo"), engine.run(mirrored.copy(), "photo"))
    engine.close()


@pytest.mark.parametrize(
    "images",
    [
        np.zeros((1, 10, 10, 3), np.uint8),
        np.zeros((1, 224, 224, 3), np.float32),
        np.zeros((1, 224, 224, 1), np.uint8),
        np.zeros((224, 224, 3), np.uint8),
    ],
)
def test_wrong_images_are_an_error(ten: FakeMachine, bundle: Bundle, images: Any) -> None:
    engine = _opened(ten, bundle)
    with pytest.raises(EngineUnavailable, match=f"failed on {len(images)} images: they are"):
        engine.run(images, "photo")
    assert engine.run(_images(1), "photo").shape == (1, 16)
    engine.close()


def test_info_describes_the_running_engine(machine: FakeMachine, bundle: Bundle) -> None:
    engine = _opened(machine, bundle, threads=4, lanes=4)
    info, surface = engine.info, machine.world.surface
    assert (info.name, info.version) == (surface.module.replace("_", "-"), surface.version)
    assert (info.precision, info.form, info.device) == ("fp32", "tensorrt", "cuda:0")
    assert (info.dim, info.threads, info.lanes) == (16, 4, 1)
    engine.close()


# --- buckets, graphs and streams ---------------------------------------------------------------


def test_chunks_are_padded_to_the_next_bucket_and_copied_without_padding(
    ten: FakeMachine, bundle: Bundle
) -> None:
    engine = _opened(ten, bundle, batch=6)
    for count, bucket in ((1, 1), (2, 2), (3, 4), (5, 6), (6, 6)):
        before = len(ten.gpus.history)
        engine.run(_images(count), "photo")
        to_device, run, to_host = ten.gpus.history[before:]
        assert (to_device.size, to_host.size) == (count * IMAGE_BYTES, count * 16 * 4)
        assert run.images == bucket
    engine.close()


def test_a_graph_is_captured_once_for_each_bucket_and_slot(
    machine: FakeMachine, bundle: Bundle
) -> None:
    engine = _opened(machine, bundle)
    for count in (16, 16, 16, 3, 3, 3):
        engine.run(_images(count), "photo")
    if machine.world.surface.module == "tensorrt_rtx":
        # Which captures graphs by itself when it is told to.
        assert engine._network._config.cuda_graph_strategy.name == "WHOLE_GRAPH_CAPTURE"
        assert not machine.calls["cudaStreamBeginCapture"]
    else:
        # Both slots of bucket 8, and the first slot of bucket 4, whose first run is a plain one.
        assert machine.calls["cudaStreamBeginCapture"] == 3
        assert machine.calls["cudaGraphLaunch"] == len(machine.gpus.done("graph")) == 6 + 2
        assert machine.world.runs == {8: 2, 4: 1}
    engine.close()


def test_the_next_chunk_is_copied_during_computation(machine: FakeMachine, bundle: Bundle) -> None:
    engine = _opened(machine, bundle)
    engine.run(_images(16), "photo")
    before = len(machine.gpus.history)
    engine.run(_images(40), "photo")
    done = machine.gpus.history[before:]
    copies = [work for work in done if work.label == "to device"]
    runs = [work for work in done if work.label in ("run", "graph")]
    assert len(copies) == len(runs) == 5
    for this, following in zip(runs, copies[1:], strict=False):
        assert following.start_us < this.end_us
        assert following.end_us <= this.end_us
    # So nothing but the first copy, and the small ones back, is waited for.
    total_us = done[-1].end_us - done[0].start_us
    computing_us = sum(run.end_us - run.start_us for run in runs)
    copying_us = sum(copy.end_us - copy.start_us for copy in copies)
    assert total_us < computing_us + copying_us / 2
    assert len({copy.stream for copy in copies} | {run.stream for run in runs}) == 2
    engine.close()


def test_times_are_measured_by_the_gpus_clock(ten: FakeMachine, bundle: Bundle) -> None:
    engine = _opened(ten, bundle)
    for count in (1, 5, 20):
        before = len(ten.gpus.history)
        rows, times = engine.run_timed(_images(count), "photo")
        assert np.array_equal(rows, engine.run(_images(count), "photo"))
        done = ten.gpus.history[before : before + 3 * -(-count // BATCH)]
        for label, told_ms in (("to device", times.h2d_ms), ("to host", times.d2h_ms)):
            spent_us = sum(work.end_us - work.start_us for work in done if work.label == label)
            assert told_ms == pytest.approx(spent_us / 1e3)
        runs = [work for work in done if work.images]
        computing_us = sum(run.end_us - run.start_us for run in runs)
        assert times.compute_ms == pytest.approx(computing_us / 1e3)
    engine.close()


@pytest.mark.parametrize("step", ["begin", "execute", "end", "instantiate"])
def test_without_cuda_graphs_it_runs_and_says_so_once(
    ten: FakeMachine, bundle: Bundle, expected: NDArray[np.float32], step: str
) -> None:
    if step == "execute":
        ten.faults.capture = "operation not permitted when stream is capturing"
    elif step == "begin":
        ten.cuda_faults.begin_capture = "cudaErrorStreamCaptureUnsupported"
    elif step == "end":
        ten.cuda_faults.end_capture = "cudaErrorStreamCaptureInvalidated"
    else:
        ten.cuda_faults.instantiate = "cudaErrorMemoryAllocation"
    notices: list[str] = []
    engine = _opened(ten, bundle, notify=notices.append)
    for _ in range(3):
        assert np.allclose(engine.run(_images(40), "photo"), expected, atol=1e-6)
    about_graphs = [sentence for sentence in notices if "CUDA graphs" in sentence]
    assert len(about_graphs) == 1
    reason = {"execute": "not permitted", "instantiate": "memory"}.get(step, "StreamCapture")
    assert reason in about_graphs[0]
    assert ten.calls["cudaStreamBeginCapture"] == 1
    assert not ten.gpus.done("graph")
    engine.close()


# --- memory ------------------------------------------------------------------------------------


def test_a_batch_that_does_not_fit_is_halved_with_a_notice(
    machine: FakeMachine, bundle: Bundle, expected: NDArray[np.float32]
) -> None:
    # Two slots of 8 images fit, and not two of 16.
    machine.gpus.memory_bytes = 20 * IMAGE_BYTES
    notices: list[str] = []
    engine = _opened(machine, bundle, batch=32, notify=notices.append)
    halved = [sentence for sentence in notices if "at once instead of" in sentence]
    name = engine.info.name
    assert [sentence.partition(": ")[0] for sentence in halved] == [
        f"{name} takes 16 images at once instead of 32",
        f"{name} takes 8 images at once instead of 16",
    ]
    assert engine.largest_batch == 8
    assert np.allclose(engine.run(_images(40), "photo"), expected, atol=1e-6)
    engine.close()


@pytest.mark.parametrize("allocations", range(9))
def test_the_batch_is_halved_whichever_allocation_fails(
    ten: FakeMachine, bundle: Bundle, allocations: int
) -> None:
    """Of nine: pinned and device memory of each slot in turns, and the contexts' memory."""
    pinned_first = allocations < 4
    if pinned_first:
        ten.cuda_faults.pinned_left = allocations
    else:
        ten.cuda_faults.allocations_left = allocations - 4
    notices: list[str] = []

    def then_there_is_memory(sentence: str) -> None:
        notices.append(sentence)
        if "instead of" in sentence:
            ten.cuda_faults.pinned_left = ten.cuda_faults.allocations_left = None

    engine = _opened(ten, bundle, notify=then_there_is_memory)
    assert engine.largest_batch == 4
    assert sum("takes 4 images at once instead of 8" in sentence for sentence in notices) == 1
    engine.close()


def test_tensorrts_own_lack_of_memory_halves_the_batch_too(
    ten: FakeMachine, bundle: Bundle, expected: NDArray[np.float32]
) -> None:
    ten.faults.execute = "[executionContext.cpp::enqueue::1] Error Code 2: OutOfMemory"
    ten.faults.execute_from_batch = 3
    engine = _opened(ten, bundle)
    assert engine.largest_batch == 2
    assert np.allclose(engine.run(_images(40)[:9], "photo"), expected[:9], atol=1e-6)
    engine.close()


def test_an_earlier_out_of_memory_message_is_not_reused(ten: FakeMachine, bundle: Bundle) -> None:
    ten.faults.execute, ten.faults.execute_from_batch = "OutOfMemory", 8
    engine = _opened(ten, bundle)
    assert engine.largest_batch == 4
    ten.faults.execute, ten.faults.execute_from_batch = "Cuda failure", 0
    with pytest.raises(EngineUnavailable) as caught:
        engine.run(_images(1), "photo")
    assert "Cuda failure" in caught.value.found and "OutOfMemory" not in caught.value.found
    assert engine.largest_batch == 4
    engine.close()


def test_memory_taken_by_another_program_halves_the_batch_of_a_running_engine(
    ten: FakeMachine, bundle: Bundle, expected: NDArray[np.float32]
) -> None:
    notices: list[str] = []
    engine = _opened(ten, bundle, notify=notices.append)
    taken = ten.gpus.free_bytes(0) - 100
    assert ten.gpus.reserve(0, taken)
    # Bucket 4 needs a context that does not exist yet.
    assert np.allclose(engine.run(_images(40)[:11], "photo"), expected[:11], atol=1e-6)
    assert engine.largest_batch == 4
    assert "takes 4 images at once instead of 8" in notices[-1]
    engine.close()
    ten.gpus.unreserve(0, taken)


def test_a_gpu_without_memory_for_one_image_is_an_error(
    machine: FakeMachine, bundle: Bundle
) -> None:
    machine.gpus.memory_bytes = IMAGE_BYTES
    problem = _refusal(machine, bundle)
    assert isinstance(problem, EngineUnavailable)
    assert "Fake GPU has too little free memory for a batch of 1" in problem.found
    assert "nvidia-smi" in problem.next_step


def test_a_gpu_without_memory_for_the_weights_is_an_error(ten: FakeMachine, bundle: Bundle) -> None:
    ten.gpus.memory_bytes = 1000
    problem = _refusal(ten, bundle)
    assert "OutOfMemory" in problem.found and "weights" in problem.expected
    assert "nvidia-smi" in problem.next_step


# --- what fails --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fault", "line", "found"),
    [
        ("build", "Could not find any implementation for node {conv1}", "could not build a plan"),
        ("deserialise", "Version tag does not match", "refuses the plan"),
        ("context", "Invalid engine state", "created no execution context"),
        ("execute", "Cuda failure: launch failed", "could not run"),
    ],
)
def test_messages_of_tensorrt_are_in_the_error(
    machine: FakeMachine, bundle: Bundle, fault: str, line: str, found: str
) -> None:
    setattr(machine.faults, fault, f"[some.cpp::function::12] Error Code 1: {line}")
    problem = _refusal(machine, bundle)
    assert isinstance(problem, EngineUnavailable)
    assert found in problem.found and f"\n    Error Code 1: {line}" in problem.found
    assert ".cpp" not in problem.found
    assert problem.next_step
    assert machine.world.surface.version in problem.found


def test_the_engine_works_after_a_failed_run(
    ten: FakeMachine, bundle: Bundle, expected: NDArray[np.float32]
) -> None:
    notices: list[str] = []
    engine = _opened(ten, bundle, notify=notices.append)
    ten.faults.execute = "Cuda failure"
    # The second chunk fails, while the first, which is a graph, is still under way.
    with pytest.raises(EngineUnavailable, match="could not run:\n    Cuda failure"):
        engine.run(_images(11), "photo")
    ten.faults.execute = ""
    for count in (11, 11, 11, 40):
        assert np.allclose(engine.run(_images(40)[:count], "photo"), expected[:count], atol=1e-6)
    assert not [sentence for sentence in notices if "graphs" in sentence]
    engine.close()


def test_a_failing_gpu_is_an_error_and_everything_is_freed(
    monkeypatch: pytest.MonkeyPatch, bundle: Bundle
) -> None:
    machine = fake_machine(monkeypatch, SURFACES[0])
    engine = _opened(machine, bundle)
    engine.run(_images(16), "photo")
    engine.run(_images(16), "photo")
    machine.cuda_faults.wait = "cudaErrorIllegalAddress"
    for _ in range(2):
        with pytest.raises(EngineUnavailable, match=r"cudaErrorIllegalAddress \(700\)"):
            engine.run(_images(9), "photo")
    engine.close()
    calls = machine.calls
    assert calls["cudaFree"] == calls["cudaMalloc"] == 5
    assert calls["cudaFreeHost"] == calls["cudaHostAlloc"] == 4
    assert calls["cudaStreamDestroy"] == 2
    assert calls["cudaGraphExecDestroy"] == calls["cudaGraphInstantiate"] == 2
    assert calls["cudaEventDestroy"] == calls["cudaEventCreateWithFlags"] == 10


def test_a_plan_of_another_shape_is_refused(machine: FakeMachine, bundle: Bundle) -> None:
    machine.faults.output_dim = 12
    problem = _refusal(machine, bundle)
    assert isinstance(problem, BadModel)
    assert "returns (1, 12) for 1 images" in problem.found and problem.expected == "(1, 16)"


@pytest.mark.parametrize("part", ["input", "output", "dim", "type"])
def test_a_plan_with_other_tensors_is_refused(
    machine: FakeMachine, part: str, bundle: Bundle
) -> None:
    model = tiny_model(dim=12 if part == "dim" else 16)
    if part == "type":
        model.graph.input[0].type.tensor_type.elem_type = onnx.TensorProto.FLOAT
    elif part != "dim":
        old = {"input": "images", "output": "embeddings"}[part]
        for node in model.graph.node:
            for names in (node.input, node.output):
                names[:] = ["other" if name == old else name for name in names]
        getattr(model.graph, part)[0].name = "other"
    profile = [(batch, 224, 224, 3) for batch in (1, 2, 4)]
    name = model.graph.input[0].name
    plan = machine.world.plan(model.SerializeToString(), {name: profile})
    find_device("cuda")
    make_current(0)
    with pytest.raises(BadModel, match="the plan has INPUT") as caught:
        Network(find_tensorrt(machine.world.surface.module), plan, 16)
    assert "INPUT images: UINT8 (-1, 224, 224, 3)" in caught.value.expected
    assert "OUTPUT embeddings: FLOAT (-1, 16)" in caught.value.expected


def test_without_a_plan_auto_does_not_build_one(machine: FakeMachine, bundle: Bundle) -> None:
    problem = _refusal(machine, bundle, may_build=False)
    assert "no plan yet" in problem.found and "sbtk engine build" in problem.next_step
    _opened(machine, bundle).close()
    _opened(machine, bundle, may_build=False).close()


def test_a_plan_is_built_once(machine: FakeMachine, bundle: Bundle, cache: Path) -> None:
    for _ in range(2):
        _opened(machine, bundle).close()
    assert len(list((cache / "sbtk" / "plans").glob("*.plan"))) == 1
    notices: list[str] = []
    _opened(machine, bundle, notify=notices.append).close()
    assert not notices


def test_a_precision_that_the_bundle_lacks_is_named(ten: FakeMachine, bundle: Bundle) -> None:
    problem = _refusal(ten, bundle, precision="int8")
    assert isinstance(problem, BadModel)
    assert "no int8 model for TensorRT" in problem.found and "--int8-trt" in problem.next_step


# --- machines ----------------------------------------------------------------------------------


@pytest.mark.parametrize("surface", SURFACES, ids=surface_name)
@pytest.mark.parametrize(
    ("lack", "kind", "found", "next_step"),
    [
        ("driver", EngineUnavailable, "no NVIDIA driver", "install NVIDIA's driver"),
        ("new driver", EngineUnavailable, "too old: it supports CUDA 11.4", "update"),
        ("gpu", EngineUnavailable, "shows no GPU", "nvidia-smi"),
        ("cuda-bindings", MissingExtra, "cuda-bindings is not installed", "pip install"),
        ("library", MissingExtra, "is not installed", "pip install"),
    ],
)
def test_missing_requirements_are_named_before_tensorrt_is_used(
    monkeypatch: pytest.MonkeyPatch,
    bundle: Bundle,
    surface: Surface,
    lack: str,
    kind: type[SbtkError],
    found: str,
    next_step: str,
) -> None:
    machine = fake_machine(monkeypatch, surface)
    if lack in ("driver", "new driver"):
        machine.cuda_faults.count = "cudaErrorInsufficientDriver"
        machine.cuda_faults.driver = 0 if lack == "driver" else 11040
    elif lack == "gpu":
        machine.cuda_faults.count = "cudaErrorNoDevice"
    elif lack == "cuda-bindings":
        install_cuda(monkeypatch, None)
    else:
        monkeypatch.setitem(sys.modules, surface.module, None)
    for attempt in (lambda: _opened(machine, bundle), partial(probe_tensorrt, surface.module)):
        with pytest.raises(kind) as caught:
            attempt()
        assert found in caught.value.found and next_step in caught.value.next_step
    if lack == "library":
        extra = surface.module.replace("_", "-")
        assert caught.value.next_step == f'pip install "sbtk[{extra}]"'
    assert not machine.world.made


def test_the_requested_gpu_is_used(
    machine: FakeMachine, bundle: Bundle, expected: NDArray[np.float32]
) -> None:
    free = [machine.gpus.free_bytes(device) for device in (0, 1)]
    engine = _opened(machine, bundle, device="cuda:1")
    assert engine.info.device == "cuda:1"
    assert machine.gpus.free_bytes(0) == free[0] and machine.gpus.free_bytes(1) < free[1]
    # The current GPU is a thread's own, so each new thread begins at none.
    for _ in range(2):
        with ThreadPoolExecutor(1) as pool:
            rows = pool.submit(engine.run, _images(40), "photo").result()
        assert np.allclose(rows, expected, atol=1e-6)
    with ThreadPoolExecutor(1) as pool:
        pool.submit(engine.close).result()
    assert machine.gpus.free_bytes(1) == free[1]


def test_a_missing_gpu_is_named(machine: FakeMachine, bundle: Bundle) -> None:
    problem = _refusal(machine, bundle, device="cuda:2")
    assert "no cuda:2: this machine has 2 GPUs" in problem.found
    assert isinstance(_refusal(machine, bundle, device="cuda:x"), BadConfig)


def test_two_engines_on_two_gpus_run_side_by_side(
    machine: FakeMachine, bundle: Bundle, expected: NDArray[np.float32]
) -> None:
    engines = [_opened(machine, bundle, device=f"cuda:{index}") for index in (0, 1)]
    with ThreadPoolExecutor(2) as pool:
        for rows in pool.map(lambda engine: engine.run(_images(40), "photo"), engines):
            assert np.allclose(rows, expected, atol=1e-6)
    engines[0].close()
    assert np.allclose(engines[1].run(_images(40), "photo"), expected, atol=1e-6)
    engines[1].close()


# --- threads and the end -----------------------------------------------------------------------


def test_concurrent_threads_get_their_own_rows(machine: FakeMachine, bundle: Bundle) -> None:
    engine = _opened(machine, bundle)
    batches = [_images(count, seed) for seed, count in enumerate((20, 9, 3, 17) * 3)]
    wanted = [engine.run(batch, "photo") for batch in batches]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(2) as pool:
            rows = list(pool.map(partial(engine.run, kind="photo"), batches))
    finally:
        sys.setswitchinterval(interval)
    for mine, right in zip(rows, wanted, strict=True):
        assert np.allclose(mine, right, atol=1e-6)
    engine.close()


def test_closing_twice_frees_once_and_later_runs_say_that_it_is_closed(
    machine: FakeMachine, bundle: Bundle
) -> None:
    engine = _opened(machine, bundle)
    engine.run(_images(20), "photo")
    engine.run(_images(20), "photo")
    assert machine.alive()
    engine.close()
    assert not machine.alive()
    freed = machine.gpus.frees.copy()
    engine.close()
    assert machine.gpus.frees == freed
    assert engine.largest_batch == 0
    with pytest.raises(EngineUnavailable, match="is closed"):
        engine.run(_images(1), "photo")


def test_closing_waits_for_a_run_in_another_thread(ten: FakeMachine, bundle: Bundle) -> None:
    engine = _opened(ten, bundle)
    batch, problems = _images(40), []
    started = threading.Event()

    def run() -> None:
        try:
            while True:
                engine.run(batch, "photo")
                started.set()
        except EngineUnavailable as problem:
            problems.append(problem.found)

    thread = threading.Thread(target=run)
    thread.start()
    assert started.wait(30)
    engine.close()
    thread.join(30)
    assert problems == ["the engine tensorrt is closed"]
    assert not ten.alive()


@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")
def test_an_engine_that_was_not_closed_is_freed_when_collected(
    machine: FakeMachine, bundle: Bundle
) -> None:
    engine = _opened(machine, bundle, device="cuda:1")
    for _ in range(2):
        engine.run(_images(20), "photo")
    # The garbage collector runs in any thread, whatever GPU that works on.
    make_current(0)
    del engine
    gc.collect()
    assert not machine.alive()
    assert machine.gpus.device() == 0


# --- probes and imports ------------------------------------------------------------------------


def test_a_probe_runs_a_graph_and_frees_everything(machine: FakeMachine) -> None:
    surface = machine.world.surface
    assert probe_tensorrt(surface.module) == surface.version
    assert machine.world.runs == {1: 1}
    assert not machine.alive()


@pytest.mark.parametrize("fault", ["build", "deserialise", "context", "execute"])
def test_a_failing_probe_quotes_tensorrt(machine: FakeMachine, fault: str) -> None:
    setattr(machine.faults, fault, "this GPU is not supported")
    with pytest.raises(EngineUnavailable, match=r"could not .*:\n    this GPU is not supported"):
        probe_tensorrt(machine.world.surface.module)


@pytest.mark.parametrize("surface", SURFACES[:2], ids=surface_name)
def test_open_engine_builds_caches_and_runs(
    monkeypatch: pytest.MonkeyPatch,
    bundle: Bundle,
    expected: NDArray[np.float32],
    surface: Surface,
) -> None:
    machine = fake_machine(monkeypatch, surface)
    engine = open_engine(bundle, EngineOptions(engine="tensorrt", batch=BATCH))
    assert (engine.info.name, engine.info.precision) == ("tensorrt", "fp32")
    assert np.allclose(engine.run(_images(40), "photo"), expected, atol=1e-6)
    engine.close()
    # Now that there is a plan, `auto` takes it too.
    engine = open_engine(bundle, EngineOptions(precision="fp32", batch=BATCH))
    assert (engine.info.name, engine.info.passed_over) == ("tensorrt", ())
    engine.close()
    assert not machine.alive()


def test_importing_the_engine_loads_neither_tensorrt_nor_cuda() -> None:
    run_python(
        "import sys, sbtk_runtime.engines.tensorrt.engine\n"
        "heavy = {'tensorrt', 'tensorrt_rtx', 'cuda', 'onnx', 'torch', 'onnxruntime'}\n"
        "sys.exit(', '.join(heavy & set(sys.modules)) or 0)"
    )
