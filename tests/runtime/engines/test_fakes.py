"""The fake GPU and TensorRT refuse what the real ones would crash on, so that tests see it."""

from __future__ import annotations

import gc
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from sbtk_runtime.engines.cuda import DeviceResources, checked, find_device, make_current
from sbtk_runtime.engines.tensorrt.library import find_tensorrt, recording_logger
from tests.fakes.machine import SURFACES, FakeMachine, fake_machine
from tests.fakes.tensorrt_world import Surface
from tests.tiny import tiny_model

IMAGE_BYTES = 224 * 224 * 3


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> FakeMachine:
    return fake_machine(monkeypatch, SURFACES[0])


class _Bench:
    """Two streams, buffers for two images and a context, as a careful program has them."""

    def __init__(self, machine: FakeMachine) -> None:
        find_device("cuda")
        make_current(0)
        self.machine, self.resources = machine, DeviceResources(0)
        self.cuda = self.resources.cuda
        self.streams = [self.resources.stream(), self.resources.stream()]
        self.event = self.resources.event()
        self.host = self.resources.pinned((2, 224, 224, 3), np.uint8)
        self.rows = self.resources.pinned((2, 16), np.float32)
        self.images = self.resources.memory(2 * IMAGE_BYTES)
        self.out = self.resources.memory(2 * 16 * 4)
        self.scratch = self.resources.memory(4096)
        trt = find_tensorrt(machine.world.surface.module)
        self.module, self.logger = trt.module, recording_logger(trt)
        plan = machine.world.plan(
            tiny_model().SerializeToString(),
            {"images": [(batch, 224, 224, 3) for batch in (1, 2, 2)]},
        )
        self.engine = self.module.Runtime(self.logger).deserialize_cuda_engine(plan)
        strategy = self.module.ExecutionContextAllocationStrategy.USER_MANAGED
        self.context = self.engine.create_execution_context(strategy)
        self.context.set_input_shape("images", (2, 224, 224, 3))
        self.context.set_device_memory(self.scratch, 4096)
        self.context.set_tensor_address("images", self.images)
        self.context.set_tensor_address("embeddings", self.out)

    def abandon(self) -> None:
        """Let go without freeing, which would be one misuse more."""
        self.resources._close.detach()

    def copy_in(self, stream: Any) -> None:
        kind = self.cuda.cudaMemcpyKind.cudaMemcpyHostToDevice
        size = self.host.array.nbytes
        checked(self.cuda.cudaMemcpyAsync(self.images, self.host.address, size, kind, stream))

    def copy_out(self, stream: Any) -> None:
        kind = self.cuda.cudaMemcpyKind.cudaMemcpyDeviceToHost
        size = self.rows.array.nbytes
        checked(self.cuda.cudaMemcpyAsync(self.rows.address, self.out, size, kind, stream))

    def run(self, stream: Any) -> bool:
        return bool(self.context.execute_async_v3(int(stream)))


@pytest.fixture
def bench(machine: FakeMachine) -> Iterator[_Bench]:
    bench = _Bench(machine)
    yield bench
    bench.abandon()


def _norms(bench: _Bench) -> list[float]:
    return [float(norm) for norm in np.linalg.norm(bench.rows.array, axis=1)]


def test_work_is_done_only_when_it_is_waited_for(bench: _Bench) -> None:
    stream = bench.streams[0]
    bench.copy_in(stream)
    assert bench.run(stream)
    bench.copy_out(stream)
    assert _norms(bench) == [0.0, 0.0]
    checked(bench.cuda.cudaStreamSynchronize(stream))
    assert _norms(bench) == pytest.approx([1.0, 1.0])


def test_only_as_much_is_done_as_the_wait_demands(bench: _Bench) -> None:
    copies, runs = bench.streams
    checked(bench.cuda.cudaEventRecord(bench.event, copies))
    bench.copy_in(copies)
    checked(bench.cuda.cudaStreamWaitEvent(runs, bench.event, 0))
    checked(bench.cuda.cudaStreamSynchronize(runs))
    # The event stands before the copy.
    assert len(bench.machine.gpus.stream(int(copies)).pending) == 1


def test_two_streams_on_one_memory_without_an_event_are_a_race(bench: _Bench) -> None:
    copies, runs = bench.streams
    bench.copy_in(copies)
    with pytest.raises(AssertionError, match="'run' may run at the same time as 'to device'"):
        bench.run(runs)
    checked(bench.cuda.cudaEventRecord(bench.event, copies))
    checked(bench.cuda.cudaStreamWaitEvent(runs, bench.event, 0))
    assert bench.run(runs)


def test_two_runs_in_one_context_memory_are_a_race(bench: _Bench) -> None:
    assert bench.run(bench.streams[0])
    with pytest.raises(AssertionError, match="'run' may run at the same time as 'run'"):
        bench.run(bench.streams[1])


def test_a_capture_needs_an_earlier_run_and_does_no_work(bench: _Bench) -> None:
    cuda, stream = bench.cuda, bench.streams[0]
    mode = cuda.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
    checked(cuda.cudaStreamBeginCapture(stream, mode))
    assert not bench.run(stream)
    error, graph = cuda.cudaStreamEndCapture(stream)
    assert error == cuda.cudaError_t.cudaErrorStreamCaptureInvalidated and graph is None
    assert "capturing" in bench.logger.problems()[-1]
    assert bench.run(stream)
    checked(cuda.cudaStreamSynchronize(stream))
    before = len(bench.machine.gpus.history)
    checked(cuda.cudaStreamBeginCapture(stream, mode))
    assert bench.run(stream)
    graph = checked(cuda.cudaStreamEndCapture(stream))
    launchable = checked(cuda.cudaGraphInstantiate(graph, 0))
    assert len(bench.machine.gpus.history) == before
    checked(cuda.cudaGraphLaunch(launchable, stream))
    assert bench.machine.gpus.history[-1].label == "graph"
    # Its context must be what it was.
    bench.context.set_input_shape("images", (1, 224, 224, 3))
    with pytest.raises(AssertionError, match="after its context changed"):
        cuda.cudaGraphLaunch(launchable, stream)
    del bench.context
    gc.collect()
    with pytest.raises(AssertionError, match="after the end of its context"):
        cuda.cudaGraphLaunch(launchable, stream)


def _set_shape(bench: _Bench) -> None:
    bench.context.set_input_shape("images", (3, 224, 224, 3))


def _forget_address(bench: _Bench) -> None:
    bench.context._addresses.pop("embeddings")
    bench.run(bench.streams[0])


def _lend_too_little(bench: _Bench) -> None:
    bench.context.set_device_memory(bench.scratch, 1)
    bench.run(bench.streams[0])


def _run_on_default_stream(bench: _Bench) -> None:
    bench.context.execute_async_v3(0)


def _copy_from_pageable(bench: _Bench) -> None:
    cuda, array = bench.cuda, np.zeros(16, np.uint8)
    kind = cuda.cudaMemcpyKind.cudaMemcpyHostToDevice
    cuda.cudaMemcpyAsync(bench.images, array.ctypes.data, 16, kind, bench.streams[0])


def _copy_too_much(bench: _Bench) -> None:
    cuda = bench.cuda
    kind = cuda.cudaMemcpyKind.cudaMemcpyDeviceToHost
    cuda.cudaMemcpyAsync(bench.rows.address, bench.out, 4096, kind, bench.streams[0])


def _free_twice(bench: _Bench) -> None:
    address = checked(bench.cuda.cudaMalloc(64))
    bench.cuda.cudaFree(address)
    bench.cuda.cudaFree(address)


def _free_in_use(bench: _Bench) -> None:
    bench.copy_in(bench.streams[0])
    bench.cuda.cudaFree(bench.images)


def _free_under_a_context(bench: _Bench) -> None:
    bench.cuda.cudaFree(bench.scratch)


def _destroy_in_use(bench: _Bench) -> None:
    bench.copy_in(bench.streams[0])
    bench.cuda.cudaStreamDestroy(bench.streams[0])


def _use_after_free(bench: _Bench) -> None:
    bench.cuda.cudaFreeHost(bench.host.address)
    bench.copy_in(bench.streams[0])


def _allocate_in_capture(bench: _Bench) -> None:
    mode = bench.cuda.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
    checked(bench.cuda.cudaStreamBeginCapture(bench.streams[0], mode))
    bench.cuda.cudaMalloc(16)


def _wait_for_nothing(bench: _Bench) -> None:
    bench.cuda.cudaStreamWaitEvent(bench.streams[0], bench.event, 0)


@pytest.mark.parametrize(
    ("misuse", "complaint"),
    [
        (_set_shape, "outside of the profile"),
        (_forget_address, "without an address"),
        (_lend_too_little, "bytes of context memory are needed"),
        (_run_on_default_stream, "default stream"),
        (_copy_from_pageable, "not, or no longer, pinned memory"),
        (_copy_too_much, "not, or no longer"),
        (_free_twice, "freed twice"),
        (_free_in_use, "freed while 'to device' may use it"),
        (_free_under_a_context, "freed before the IExecutionContext"),
        (_destroy_in_use, "destroyed before its work was waited for"),
        (_use_after_free, "not, or no longer, pinned memory"),
        (_allocate_in_capture, "allocating while a stream captures"),
        (_wait_for_nothing, "never recorded"),
    ],
)
def test_misuse_fails_an_assertion(
    bench: _Bench, misuse: Callable[[_Bench], None], complaint: str
) -> None:
    with pytest.raises(AssertionError, match=complaint):
        misuse(bench)


def test_a_thread_that_chose_no_gpu_can_do_nothing(bench: _Bench) -> None:
    caught: list[BaseException] = []

    def run() -> None:
        try:
            bench.copy_in(bench.streams[0])
        except BaseException as problem:
            caught.append(problem)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert [type(problem) for problem in caught] == [AssertionError]
    assert "did not call cudaSetDevice" in str(caught[0])


def test_a_runtime_call_before_the_driver_check_fails_an_assertion(machine: FakeMachine) -> None:
    trt = find_tensorrt("tensorrt")
    with pytest.raises(AssertionError, match="not asked with cudaGetDeviceCount"):
        trt.module.Runtime(recording_logger(trt))


def test_allocations_that_are_not_freed_are_counted(bench: _Bench) -> None:
    alive = bench.machine.alive()
    assert (alive["device memory"], alive["pinned memory"], alive["Stream"]) == (3, 2, 2)
    assert (alive["ICudaEngine"], alive["IExecutionContext"]) == (1, 1)
    del bench.context, bench.engine
    bench.resources.close()
    assert not bench.machine.alive()


@pytest.mark.parametrize("surface", SURFACES, ids=lambda surface: surface.version)
def test_names_that_a_version_lacks_are_refused(
    monkeypatch: pytest.MonkeyPatch, surface: Surface
) -> None:
    machine = fake_machine(monkeypatch, surface)
    bench = _Bench(machine)
    module, config = sys.modules[surface.module], bench.engine.create_runtime_config()
    is_ten, is_rtx = surface.version.startswith("10"), surface.module == "tensorrt_rtx"
    assert hasattr(module.BuilderFlag, "FP16") == is_ten
    assert hasattr(module.NetworkDefinitionCreationFlag, "EXPLICIT_BATCH") == is_ten
    assert hasattr(config, "cuda_graph_strategy") == is_rtx
    for thing, name in (
        (module, "IAlgorithmSelector2"),
        (module.Builder(bench.logger), "max_batch_size"),
        (bench.engine, "num_bindings"),
        (bench.context, "execute_async_v2"),
    ):
        with pytest.raises(AttributeError, match=f"has no '{name}'"):
            getattr(thing, name)
    with pytest.raises(AttributeError, match="has no 'batch'"):
        bench.context.batch = 1
    bench.abandon()


def test_names_that_cuda_bindings_lacks_are_refused(machine: FakeMachine) -> None:
    with pytest.raises(AttributeError):
        machine.cuda.cudaMallocQuickly  # noqa: B018
    with pytest.raises(AssertionError, match="the fake has no cudaMallocManaged"):
        machine.cuda.cudaMallocManaged  # noqa: B018
    with pytest.raises(TypeError):
        machine.cuda.cudaMalloc(1, 2)  # type: ignore[call-arg]
