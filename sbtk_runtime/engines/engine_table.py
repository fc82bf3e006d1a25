"""The engines that sbtk knows: what each runs on and prefers, and where it is opened and probed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from sbtk_runtime.bundle import OnnxForm
from sbtk_runtime.engines import engine_onnxruntime, engine_openvino
from sbtk_runtime.engines.engine_protocol import Engine
from sbtk_runtime.engines.engine_request import EngineRequest
from sbtk_runtime.engines.tensorrt_library import find_tensorrt
from sbtk_runtime.manifest import Precision

if TYPE_CHECKING:
    from sbtk_runtime.engines.engine_tensorrt import TensorRtEngine


@dataclass(frozen=True)
class EngineEntry:
    """One engine.

    Attributes:
        name: as `--engine` takes it.
        device: the kind of device that it runs on.
        precisions: the fastest first.
        open: returns it, running the model of the request.
        probe: returns its library's version after it has run a graph.
        distributions: any of which brings its library.
        form: of the ONNX files that it runs.
        is_automatic: whether `auto` may take it.
        starts_slowly: loading it takes longer than it saves on a single picture.
    """

    name: str
    device: Literal["cpu", "cuda"]
    precisions: tuple[Precision, ...]
    open: Callable[[EngineRequest], Engine]
    probe: Callable[[], str]
    distributions: tuple[str, ...]
    form: OnnxForm = "plain"
    is_automatic: bool = True
    starts_slowly: bool = False


def _open_tensorrt(request: EngineRequest) -> TensorRtEngine:
    # Most machines have no TensorRT, and a query there need not wait for all that runs it.
    find_tensorrt("tensorrt")
    from sbtk_runtime.engines import engine_tensorrt

    return engine_tensorrt.open_tensorrt(request)


def _open_tensorrt_rtx(request: EngineRequest) -> TensorRtEngine:
    find_tensorrt("tensorrt_rtx")
    from sbtk_runtime.engines import engine_tensorrt

    return engine_tensorrt.open_tensorrt_rtx(request)


def _probe_tensorrt() -> str:
    from sbtk_runtime.engines import engine_tensorrt

    return engine_tensorrt.probe_tensorrt()


def _probe_tensorrt_rtx() -> str:
    from sbtk_runtime.engines import engine_tensorrt

    return engine_tensorrt.probe_tensorrt_rtx()


_ON_GPU: tuple[Precision, ...] = ("fp16", "fp32", "int8")
_ON_CPU: tuple[Precision, ...] = ("int8", "fp32", "fp16")
_ONNXRUNTIMES = ("onnxruntime-gpu", "onnxruntime")

#: Fastest first: the order in which `auto` tries those that it may take.
ENGINES = (
    EngineEntry(
        "tensorrt",
        "cuda",
        _ON_GPU,
        _open_tensorrt,
        _probe_tensorrt,
        ("tensorrt-cu13", "tensorrt", "tensorrt-cu12"),
        form="tensorrt",
    ),
    EngineEntry(
        "tensorrt-rtx",
        "cuda",
        _ON_GPU,
        _open_tensorrt_rtx,
        _probe_tensorrt_rtx,
        ("tensorrt-rtx-cu13", "tensorrt-rtx-cu12", "tensorrt-rtx"),
        form="tensorrt",
    ),
    EngineEntry(
        "onnxruntime-cuda",
        "cuda",
        _ON_GPU,
        engine_onnxruntime.open_cuda,
        engine_onnxruntime.probe_cuda,
        _ONNXRUNTIMES,
    ),
    EngineEntry(
        "openvino",
        "cpu",
        _ON_CPU,
        engine_openvino.open_openvino,
        engine_openvino.probe_openvino,
        ("openvino",),
        starts_slowly=True,
    ),
    EngineEntry(
        "onnxruntime",
        "cpu",
        _ON_CPU,
        engine_onnxruntime.open_cpu,
        engine_onnxruntime.probe_cpu,
        _ONNXRUNTIMES,
    ),
    # It does what the engine `tensorrt` does, through more layers, and builds when it is opened.
    EngineEntry(
        "onnxruntime-tensorrt",
        "cuda",
        _ON_GPU,
        engine_onnxruntime.open_tensorrt,
        engine_onnxruntime.probe_tensorrt,
        _ONNXRUNTIMES,
        form="tensorrt",
        is_automatic=False,
    ),
)
ENGINE_NAMES = tuple(entry.name for entry in ENGINES)
GPU_ENGINE_NAMES = tuple(entry.name for entry in ENGINES if entry.device == "cuda")
