"""TensorRT, or TensorRT-RTX, as an engine: a cached plan, run on a GPU without torch."""

from __future__ import annotations

import threading

import numpy as np
from numpy.typing import NDArray

from sbtk_runtime.engines.cuda_device import CudaDevice, OutOfDeviceMemory, find_device
from sbtk_runtime.engines.device_buffers import make_current
from sbtk_runtime.engines.engine_info import EngineInfo
from sbtk_runtime.engines.engine_request import EngineRequest, Said
from sbtk_runtime.engines.plan_ready import ready_plan
from sbtk_runtime.engines.tensorrt_library import TensorRt, find_tensorrt
from sbtk_runtime.engines.tensorrt_network import FREE_MEMORY, Network
from sbtk_runtime.engines.tensorrt_pipeline import Pipeline
from sbtk_runtime.engines.tensorrt_probe import run_probe_graph
from sbtk_runtime.engines.tensorrt_slot import DeviceTimes
from sbtk_runtime.errors import EngineUnavailable
from sbtk_runtime.preprocess import SIZE_PX, Kind

__all__ = [
    "DeviceTimes",
    "TensorRtEngine",
    "open_plan",
    "open_tensorrt",
    "open_tensorrt_rtx",
    "probe_tensorrt",
    "probe_tensorrt_rtx",
]


def open_tensorrt(request: EngineRequest) -> TensorRtEngine:
    """Returns the bundle's model on TensorRT; its plan is built first if there is none.

    Raises:
        MissingExtra: TensorRT or cuda-bindings is not installed.
        EngineUnavailable: there is no GPU that works, no plan and none may be built, or TensorRT
            fails; the message has the library's own lines.
        BadModel: the bundle has no such ONNX file for TensorRT, or TensorRT refuses it.
        BadConfig: `device` is no name of a GPU.
    """
    return _open(request, "tensorrt")


def open_tensorrt_rtx(request: EngineRequest) -> TensorRtEngine:
    """Returns the bundle's model on TensorRT-RTX; raises what `open_tensorrt` does."""
    return _open(request, "tensorrt_rtx")


def open_plan(
    plan: bytes, trt: TensorRt, device: CudaDevice, request: EngineRequest
) -> TensorRtEngine:
    """Returns an engine that runs just this plan.

    Args:
        plan: of the request's model, from our own cache or build: loading it runs native code.
        trt: the TensorRT that built it.
        device: the GPU to run it on, from `find_device`.
        request: what it was built from, and how it is to be run.

    Raises:
        EngineUnavailable: TensorRT refuses the plan, or the GPU lacks memory for it.
        BadModel: the plan is none of the request's model.
    """
    make_current(device.index)
    dim, domain_input = request.bundle.manifest.dim, request.bundle.manifest.domain_input
    network = Network(trt, plan, dim, domain_input)
    info = EngineInfo(
        name=trt.name.replace("_", "-"),
        precision=request.precision,
        device=f"cuda:{device.index}",
        dim=dim,
        threads=request.threads,
        lanes=1,
        version=trt.version,
        form="tensorrt",
        domain_input=domain_input,
    )
    if request.batch > network.largest:
        request.said(
            f"the plan takes {network.largest} images at once, so {request.batch} go through in "
            "parts; sbtk engine build --batch makes a larger one"
        )
    return TensorRtEngine(network, device, info, request.batch, request.said)


def probe_tensorrt() -> str:
    """Returns TensorRT's version after it has run a graph on a GPU; raises if it does not."""
    return _probe("tensorrt")


def probe_tensorrt_rtx() -> str:
    """Returns TensorRT-RTX's version after it has run a graph on a GPU; raises if not."""
    return _probe("tensorrt_rtx")


class TensorRtEngine:
    """One plan on one GPU; see `sbtk_runtime.engines.engine.Engine`.

    Batches of any size go through in chunks of at most `largest_batch` images.

    Args:
        network: the loaded plan; the engine closes it.
        device: the GPU that it was loaded on.
        info: what the engine says about itself.
        batch: images that a chunk may have, if the plan and the GPU's memory allow.
        said: told when it has to be fewer, and when CUDA graphs do not work.

    Raises:
        EngineUnavailable: not even one image fits, or TensorRT fails. The network is then closed.
    """

    def __init__(
        self, network: Network, device: CudaDevice, info: EngineInfo, batch: int, said: Said
    ) -> None:
        self.info = info
        self._network = network
        self._device = device
        self._said = said
        self._lock = threading.Lock()
        self._pipeline: Pipeline | None = None
        try:
            self._pipeline = self._fitting(max(network.smallest, min(batch, network.largest)))
        except BaseException:
            network.close()
            raise

    @property
    def largest_batch(self) -> int:
        """Images that go through the GPU at once; 0 when the engine is closed."""
        pipeline = self._pipeline
        return 0 if pipeline is None else pipeline.largest

    def run(self, images: NDArray[np.uint8], kind: Kind) -> NDArray[np.float32]:
        """Returns the embeddings `(N, D) float32` of `images (N, 224, 224, 3) uint8` of a kind.

        Any thread may call it; one runs at a time.

        Raises:
            EngineUnavailable: TensorRT or CUDA failed, or the engine is closed.
        """
        return self._run(images, kind, timed=False)[0]

    def run_timed(
        self, images: NDArray[np.uint8], kind: Kind
    ) -> tuple[NDArray[np.float32], DeviceTimes]:
        """Returns what `run` does, `(N, D) float32`, and the time that the GPU's clock measured.

        With several chunks the times are sums; copies and computing overlap then.
        """
        return self._run(images, kind, timed=True)

    def close(self) -> None:
        """Frees the plan and all memory on the GPU; does nothing the second time."""
        with self._lock:
            self._close()

    def _run(
        self, images: NDArray[np.uint8], kind: Kind, *, timed: bool
    ) -> tuple[NDArray[np.float32], DeviceTimes]:
        picture = (SIZE_PX, SIZE_PX, 3)
        if images.dtype != np.uint8 or images.shape[1:] != picture:
            raise EngineUnavailable(
                f"{self.info.name} failed on {len(images)} images: they are {images.dtype} "
                f"{images.shape}",
                f"uint8 (N, {SIZE_PX}, {SIZE_PX}, 3)",
            )
        with self._lock:
            while self._pipeline is not None:
                # The current GPU is a thread's own, and this may be any thread.
                make_current(self._device.index)
                try:
                    return self._pipeline.run(images, kind, timed=timed)
                except OutOfDeviceMemory as problem:
                    self._shrink(problem)
        raise EngineUnavailable(f"the engine {self.info.name} is closed", "an open engine")

    def _shrink(self, problem: OutOfDeviceMemory) -> None:
        """Goes on with half the batch, after another program took the memory for this one."""
        assert self._pipeline is not None
        largest = self._pipeline.largest
        self._pipeline.close()
        try:
            self._pipeline = self._fitting(self._halved(largest, problem))
        except BaseException:
            self._close()
            raise

    def _fitting(self, largest: int) -> Pipeline:
        """Returns a pipeline for the largest batch, halved as often as needed, that fits."""
        while True:
            try:
                return Pipeline(self._network, self._device.index, largest, self._said)
            except OutOfDeviceMemory as problem:
                largest = self._halved(largest, problem)

    def _halved(self, largest: int, problem: OutOfDeviceMemory) -> int:
        if largest == self._network.smallest:
            raise EngineUnavailable(
                f"{self.info.name} finds too little memory on {self._device.name} for a batch of "
                f"{largest}: {problem.found}",
                "a GPU with memory to spare",
                FREE_MEMORY,
            ) from problem
        half = max(self._network.smallest, largest // 2)
        self._said(
            f"{self.info.name} takes {half} images at once instead of {largest}: "
            f"{self._device.name} has too little free memory"
        )
        return half

    def _close(self) -> None:
        if self._pipeline is not None:
            self._pipeline.close()
            self._pipeline = None
        self._network.close()


def _open(request: EngineRequest, module: str) -> TensorRtEngine:
    trt, device = _found(module, request.device)
    ready = ready_plan(
        request.bundle,
        request.precision,
        trt,
        device,
        may_build=request.may_build,
        batch=request.batch,
        said=request.said,
    )
    return open_plan(ready.plan, trt, device, request)


def _probe(module: str) -> str:
    trt, device = _found(module, "cuda")
    run_probe_graph(trt, device)
    return trt.version


def _found(module: str, device_name: str) -> tuple[TensorRt, CudaDevice]:
    """Returns the library and the GPU, which is the calling thread's from now on.

    The driver is asked before any object of TensorRT exists: without a driver some of its
    libraries end the process.
    """
    trt = find_tensorrt(module)
    device = find_device(device_name)
    make_current(device.index)
    return trt, device
