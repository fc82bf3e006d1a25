"""ONNX Runtime as an engine, on a CPU or through its CUDA provider."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sbtk_runtime.engines.engine_info import EngineInfo
from sbtk_runtime.engines.engine_request import EngineRequest
from sbtk_runtime.engines.onnxruntime_library import (
    CPU,
    CUDA,
    TENSORRT,
    Provider,
    find_gpu,
    find_onnxruntime,
    new_session,
    run_probe,
)
from sbtk_runtime.engines.session_engine import (
    Feeds,
    Infer,
    Port,
    SessionEngine,
    check_signature,
    cpu_chunk,
    first_line,
)
from sbtk_runtime.errors import BadModel, EngineUnavailable
from sbtk_runtime.onnx_file import OUTPUT_NAME

_GPU_CHUNK = 256
_NAMES = {CPU: "onnxruntime", CUDA: "onnxruntime-cuda", TENSORRT: "onnxruntime-tensorrt"}

# What ONNX Runtime raises on files that it takes on no device.
_MODELS_FAULTS = ("InvalidGraph", "InvalidProtobuf", "NoModel", "NotImplemented")


def open_cpu(request: EngineRequest) -> SessionEngine:
    """Returns the bundle's model on ONNX Runtime's CPU provider.

    Raises:
        MissingExtra: ONNX Runtime is not installed.
        EngineUnavailable: it is installed and does not work.
        BadModel: the bundle's file is damaged or not a model of ours.
    """
    lanes = request.lanes
    target = _Target([(CPU, {})], request.device, lanes, cpu_chunk(lanes))
    return _proven(_session(request, target), request, target)


def open_cuda(request: EngineRequest) -> SessionEngine:
    """Returns the bundle's model on ONNX Runtime's CUDA provider.

    Raises:
        MissingExtra: ONNX Runtime is not installed.
        EngineUnavailable: it has no CUDA provider, or that cannot be used.
        BadModel: the bundle's file is damaged or not a model of ours.
        BadConfig: the device is no name of a GPU.
    """
    find_gpu(find_onnxruntime(), CUDA, request.device)
    index = _index(request.device)
    # A GPU runs one batch at a time, so there is one lane whatever was asked for.
    target = _Target([_cuda_provider(index)], f"cuda:{index}", 1, _GPU_CHUNK)
    return _proven(_session(request, target), request, target)


def open_tensorrt(request: EngineRequest) -> SessionEngine:
    """Returns the bundle's model on ONNX Runtime's TensorRT provider, which builds it if need be.

    Raises:
        MissingExtra: ONNX Runtime is not installed.
        EngineUnavailable: it has no TensorRT provider, or that cannot be used, or leaves work to
            other providers.
        BadModel: the bundle's file is damaged or not a model of ours.
        BadConfig: the device is no name of a GPU.
    """
    from sbtk_runtime.engines import onnxruntime_tensorrt  # which no other provider needs

    runtime = find_onnxruntime()
    gpu = find_gpu(runtime, TENSORRT, request.device)
    library = onnxruntime_tensorrt.load_tensorrt(runtime)
    index = _index(request.device)
    chunk = max(1, min(request.batch, _GPU_CHUNK))
    kept = onnxruntime_tensorrt.engine_cache(request, chunk, (runtime.__version__, library), gpu)
    domain_input = request.bundle.manifest.domain_input
    providers = [
        (TENSORRT, onnxruntime_tensorrt.options(index, chunk, kept, domain_input)),
        _cuda_provider(index),
    ]
    target = _Target(providers, f"cuda:{index}", 1, chunk, onnxruntime_tensorrt.SESSION_ENTRIES)
    if kept is None or kept.is_empty:
        request.said("TensorRT builds an engine for this GPU, which takes a minute or so")
    session = _session(request, target)
    onnxruntime_tensorrt.check_assignment(session)
    engine = _proven(session, request, target)
    if kept is not None:
        kept.vouch()
    return engine


def probe_cpu() -> str:
    """Returns ONNX Runtime's version after it has run a graph on the CPU; raises if it does not."""
    runtime = find_onnxruntime()
    run_probe(runtime, [(CPU, {})])
    return str(runtime.__version__)


def probe_cuda() -> str:
    """Returns ONNX Runtime's version after it has run a graph on a GPU; raises if it does not."""
    runtime = find_onnxruntime()
    find_gpu(runtime, CUDA)
    run_probe(runtime, [_cuda_provider(0)])
    return str(runtime.__version__)


def probe_tensorrt() -> str:
    """Returns ONNX Runtime's version after TensorRT has run a graph in it; raises if not."""
    from sbtk_runtime.engines import onnxruntime_tensorrt

    runtime = find_onnxruntime()
    find_gpu(runtime, TENSORRT)
    onnxruntime_tensorrt.load_tensorrt(runtime)
    providers = [(TENSORRT, {"device_id": "0"}), _cuda_provider(0)]
    session = run_probe(runtime, providers, onnxruntime_tensorrt.SESSION_ENTRIES)
    onnxruntime_tensorrt.check_assignment(session)
    return str(runtime.__version__)


@dataclass(frozen=True)
class _Target:
    """What a session is to run on, and how it is to be called."""

    providers: list[Provider]
    device: str
    lanes: int
    chunk: int
    entries: dict[str, str] | None = None

    @property
    def name(self) -> str:
        return _NAMES[self.providers[0][0]]


def _session(request: EngineRequest, target: _Target) -> Any:
    runtime = find_onnxruntime()
    path = str(request.bundle.checked_onnx(request.precision, request.form))
    threads = request.threads // target.lanes
    try:
        session = new_session(runtime, path, threads, target.providers, target.entries)
    except EngineUnavailable:
        raise
    except Exception as problem:
        told = f"ONNX Runtime {runtime.__version__} refuses {path}: {first_line(problem)}"
        if target.device != "cpu" and type(problem).__name__ not in _MODELS_FAULTS:
            raise EngineUnavailable(
                f"{target.name}: {told}", "", "sbtk doctor shows which engines work here"
            ) from problem
        raise BadModel(
            told,
            "an ONNX model made by sbtk export",
            "sbtk models check BUNDLE, or export the run again",
        ) from problem
    check_signature(
        _ports(session.get_inputs()),
        _ports(session.get_outputs()),
        path,
        request.bundle.manifest.dim,
        request.bundle.manifest.domain_input,
    )
    return session


def _proven(session: Any, request: EngineRequest, target: _Target) -> SessionEngine:
    info = EngineInfo(
        name=target.name,
        precision=request.precision,
        device=target.device,
        dim=request.bundle.manifest.dim,
        threads=request.threads,
        lanes=target.lanes,
        version=str(find_onnxruntime().__version__),
        form=request.form,
        domain_input=request.bundle.manifest.domain_input,
        is_in_calling_thread=target.device == "cpu",
    )
    engine = SessionEngine(_infer(session), info, target.chunk, first_line, request.said)
    engine.prove()
    return engine


def _infer(session: Any) -> Infer:
    def infer(feeds: Feeds) -> NDArray[np.float32]:
        rows: NDArray[np.float32] = session.run([OUTPUT_NAME], feeds)[0]
        return rows

    return infer


def _cuda_provider(index: int) -> Provider:
    options = {
        "device_id": str(index),
        # The arena takes what it needs, and not the next power of two.
        "arena_extend_strategy": "kSameAsRequested",
        # An exhaustive search takes seconds for each number of images that comes along.
        "cudnn_conv_algo_search": "HEURISTIC",
        # FP32 means FP32: TF32 keeps 10 bits of the 23.
        "use_tf32": "0",
    }
    return CUDA, options


def _index(device: str) -> int:
    return int(device.partition(":")[2] or "0")


def _ports(values: list[Any]) -> list[Port]:
    return [(value.name, value.type, _shape(value)) for value in values]


def _shape(value: Any) -> tuple[int | str, ...]:
    return tuple(size if isinstance(size, int) else "?" for size in value.shape or ())
