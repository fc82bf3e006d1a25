"""Shows that a TensorRT works on a GPU: builds and runs the smallest graph there is."""

from __future__ import annotations

from typing import Any

import numpy as np

from sbtk_runtime.engines.cuda_device import CudaDevice, checked
from sbtk_runtime.engines.device_buffers import DeviceResources
from sbtk_runtime.engines.probe_graph import (
    PROBE_GRAPH,
    PROBE_INPUT,
    PROBE_OUTPUT,
    check_probe_answer,
    probe_question,
)
from sbtk_runtime.engines.tensorrt_library import TensorRt, recording_logger, told
from sbtk_runtime.errors import EngineUnavailable


def run_probe_graph(trt: TensorRt, device: CudaDevice) -> None:
    """Builds the probe graph, loads it and runs it on the calling thread's GPU.

    Args:
        trt: the TensorRT in question.
        device: the GPU, which the calling thread has made its own.

    Raises:
        EngineUnavailable: a step failed; with TensorRT's own lines.
    """
    _Probe(trt).run(device)


class _Probe:
    """The steps of one probe, in the order of TensorRT's API."""

    def __init__(self, trt: TensorRt) -> None:
        self._trt = trt
        self._logger = recording_logger(trt)

    def run(self, device: CudaDevice) -> None:
        """Does all steps."""
        runtime = self._trt.module.Runtime(self._logger)
        loaded = runtime.deserialize_cuda_engine(self._plan())
        network = self._made(loaded, "load a plan that it built")
        resources = DeviceResources(device.index)
        try:
            check_probe_answer(self._answer(network, resources), self._trt.title)
        finally:
            resources.close()

    def _plan(self) -> Any:
        module = self._trt.module
        builder = self._made(module.Builder(self._logger), "make a builder")
        typed = 1 << int(module.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
        network = self._made(builder.create_network(typed), "make a network")
        parser = self._made(module.OnnxParser(network, self._logger), "make a parser")
        if not parser.parse(PROBE_GRAPH):
            raise self._failed("parse a graph")
        config = self._made(builder.create_builder_config(), "make a configuration")
        return self._made(builder.build_serialized_network(network, config), "build a plan")

    def _answer(self, network: Any, resources: DeviceResources) -> np.ndarray[Any, Any]:
        cuda, question = resources.cuda, probe_question()
        host = resources.pinned(question.shape, question.dtype)
        source, target = resources.memory(host.array.nbytes), resources.memory(host.array.nbytes)
        stream = resources.stream()
        context = self._made(network.create_execution_context(), "make a context")
        context.set_tensor_address(PROBE_INPUT, source)
        context.set_tensor_address(PROBE_OUTPUT, target)
        host.array[:] = question
        kinds = cuda.cudaMemcpyKind
        size = host.array.nbytes
        to_device = (source, host.address, size, kinds.cudaMemcpyHostToDevice, stream)
        to_host = (host.address, target, size, kinds.cudaMemcpyDeviceToHost, stream)
        try:
            checked(cuda.cudaMemcpyAsync(*to_device))
            if not context.execute_async_v3(int(stream)):
                raise self._failed("run a graph")
            checked(cuda.cudaMemcpyAsync(*to_host))
            checked(cuda.cudaStreamSynchronize(stream))
        finally:
            # The buffers are freed next, whatever has happened.
            cuda.cudaStreamSynchronize(stream)
            del context
        return host.array.copy()

    def _made(self, thing: Any, purpose: str) -> Any:
        if thing is None:
            raise self._failed(purpose)
        return thing

    def _failed(self, purpose: str) -> EngineUnavailable:
        return EngineUnavailable(
            f"{self._trt.title} could not {purpose}:{told(self._logger.problems())}",
            "a GPU that this version supports",
            "sbtk doctor shows which engines work here",
        )
