"""ONNX Runtime as an engine, on the CPU or with its CUDA provider."""

from __future__ import annotations

import contextlib
import io
import re
import threading
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sbtk_runtime.engines.base import (
    PROBE_GRAPH,
    PROBE_INPUT,
    PROBE_OUTPUT,
    EngineInfo,
    EngineRequest,
    check_probe_answer,
    probe_question,
)
from sbtk_runtime.engines.cuda import find_device
from sbtk_runtime.engines.session import (
    Feeds,
    Infer,
    Port,
    SessionEngine,
    check_signature,
    cpu_chunk,
    first_line,
)
from sbtk_runtime.errors import BadModel, EngineUnavailable, MissingExtra
from sbtk_runtime.onnx_file import OUTPUT_NAME

CPU = "CPUExecutionProvider"
CUDA = "CUDAExecutionProvider"

_GPU_CHUNK = 256
_NAMES = {CPU: "onnxruntime", CUDA: "onnxruntime-cuda"}

# ONNX Runtime's exceptions for files that it cannot run on any device.
_MODELS_FAULTS = ("InvalidGraph", "InvalidProtobuf", "NoModel", "NotImplemented")


def open_cpu(request: EngineRequest) -> SessionEngine:
    """Return the bundle's model on ONNX Runtime's CPU provider.

    Raises:
        MissingExtra: ONNX Runtime is not installed.
        EngineUnavailable: it is installed but does not work.
        BadModel: the bundle's file is damaged or not a model of sbtk.
    """
    lanes = request.lanes
    target = _Target((CPU, {}), request.device, lanes, cpu_chunk(lanes, request.regions))
    return _make_engine(_session(request, target), request, target)


def open_cuda(request: EngineRequest) -> SessionEngine:
    """Return the bundle's model on ONNX Runtime's CUDA provider.

    Raises:
        MissingExtra: ONNX Runtime is not installed.
        EngineUnavailable: it has no CUDA provider, or the provider cannot be used.
        BadModel: the bundle's file is damaged or not a model of sbtk.
        BadConfig: the device is not the name of a GPU.
    """
    require_gpu(find_onnxruntime(), request.device)
    index = _index(request.device)
    # A GPU runs one batch at a time, so it always has one lane.
    target = _Target(_cuda_provider(index), f"cuda:{index}", 1, _GPU_CHUNK)
    return _make_engine(_session(request, target), request, target)


def probe_cpu() -> str:
    """Run a small graph on the CPU, and return ONNX Runtime's version; raise if that fails."""
    runtime = find_onnxruntime()
    run_probe(runtime, (CPU, {}))
    return str(runtime.__version__)


def probe_cuda() -> str:
    """Run a small graph on a GPU, and return ONNX Runtime's version; raise if that fails."""
    runtime = find_onnxruntime()
    require_gpu(runtime)
    run_probe(runtime, _cuda_provider(0))
    return str(runtime.__version__)


@dataclass(frozen=True)
class _Target:
    """Provider, device, lanes and chunk size of a session."""

    provider: Provider
    device: str
    lanes: int
    chunk: int

    @property
    def name(self) -> str:
        return _NAMES[self.provider[0]]


def _session(request: EngineRequest, target: _Target) -> Any:
    runtime = find_onnxruntime()
    model, path = request.model(), request.name
    threads = request.threads // target.lanes
    try:
        session = new_session(runtime, model, threads, target.provider)
    except EngineUnavailable:
        raise
    except Exception as problem:
        message = f"ONNX Runtime {runtime.__version__} refuses {path}: {first_line(problem)}"
        if target.device != "cpu" and type(problem).__name__ not in _MODELS_FAULTS:
            raise EngineUnavailable(
                f"{target.name}: {message}", "", "sbtk doctor shows which engines work here"
            ) from problem
        raise BadModel(
            message,
            "an ONNX model made by sbtk export",
            "sbtk models check BUNDLE, or export the run again",
        ) from problem
    check_signature(
        _ports(session.get_inputs()),
        _ports(session.get_outputs()),
        path,
        request.bundle.manifest.dim,
        request.bundle.manifest.domain_input,
        request.regions,
    )
    return session


def _make_engine(session: Any, request: EngineRequest, target: _Target) -> SessionEngine:
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
        regions=request.regions,
    )
    engine = SessionEngine(_infer(session), info, target.chunk, first_line, request.notify)
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
        # The arena allocates what it needs rather than the next power of two.
        "arena_extend_strategy": "kSameAsRequested",
        # An exhaustive search takes seconds for each new batch size.
        "cudnn_conv_algo_search": "HEURISTIC",
        # TF32 has only 10 of FP32's 23 bits.
        "use_tf32": "0",
    }
    return CUDA, options


def _index(device: str) -> int:
    return int(device.partition(":")[2] or "0")


def _ports(values: list[Any]) -> list[Port]:
    return [(value.name, value.type, _shape(value)) for value in values]


def _shape(value: Any) -> tuple[int | str, ...]:
    return tuple(size if isinstance(size, int) else "?" for size in value.shape or ())


INSTALL_CPU = 'pip install "sbtk[cpu]"'
INSTALL_GPU = 'pip uninstall onnxruntime, then pip install "sbtk[gpu]"'

#: A provider and its options, as ONNX Runtime takes them.
Provider = tuple[str, dict[str, str]]

_preloading = threading.Lock()


def find_onnxruntime() -> Any:
    """Return the module `onnxruntime`, of either distribution.

    Raises:
        MissingExtra: neither is installed.
        EngineUnavailable: it cannot be loaded, or its installation is incomplete.
    """
    try:
        import onnxruntime
    except ImportError as problem:
        # Other ImportErrors come from ONNX Runtime's own libraries.
        if getattr(problem, "name", None) == "onnxruntime":
            raise MissingExtra(
                "ONNX Runtime is not installed", "the extra 'cpu' or 'gpu'", INSTALL_CPU
            ) from problem
        raise EngineUnavailable(
            f"ONNX Runtime cannot be loaded: {first_line(problem)}", "", INSTALL_CPU
        ) from problem
    if not hasattr(onnxruntime, "InferenceSession"):
        # onnxruntime and onnxruntime-gpu share files; removing one breaks the other.
        raise EngineUnavailable(
            "ONNX Runtime's installation is incomplete: onnxruntime and onnxruntime-gpu were both "
            "installed, and one was removed",
            "a complete installation of one of them",
            "pip uninstall onnxruntime onnxruntime-gpu, then " + INSTALL_CPU,
        )
    # Errors are raised as exceptions; the log would only repeat them on the user's terminal.
    onnxruntime.set_default_logger_severity(4)
    return onnxruntime


def require_gpu(runtime: Any, device: str = "cuda") -> None:
    """Check that there is a GPU for the CUDA provider, and load the CUDA libraries.

    Without cuda-bindings the GPU itself is not checked; creating a session shows whether it works.

    Raises:
        BadConfig: `device` is not the name of a GPU.
        EngineUnavailable: ONNX Runtime was built without CUDA, or there is no driver or no such
            GPU.
    """
    if CUDA not in runtime.get_available_providers():
        raise EngineUnavailable(
            f"ONNX Runtime {runtime.__version__} was built without CUDA",
            "onnxruntime-gpu instead of onnxruntime",
            INSTALL_GPU,
        )
    with contextlib.suppress(MissingExtra):
        find_device(device)
    missing_cuda_libraries()


@cache
def missing_cuda_libraries() -> tuple[str, ...]:
    """Return the CUDA libraries that ONNX Runtime needs and that cannot be loaded.

    This also loads those that pip installed, which are not on the library search path.
    """
    runtime = find_onnxruntime()
    if not hasattr(runtime, "preload_dlls"):
        return ()
    # It prints missing libraries to stdout, which belongs to the results of commands.
    with _preloading, contextlib.redirect_stdout(io.StringIO()) as printed:
        runtime.preload_dlls()
    named = re.findall(r"Failed to load (\S+):", printed.getvalue())
    return tuple(dict.fromkeys(Path(name).name for name in named))


def new_session(runtime: Any, model: str | bytes, threads: int, provider: Provider) -> Any:
    """Return a session that runs on `provider`.

    Args:
        runtime: from `find_onnxruntime`.
        model: path or content of an ONNX file.
        threads: CPU threads of one run.
        provider: of ONNX Runtime, with its options.

    Raises:
        EngineUnavailable: the session would run on another provider.
        Exception: what ONNX Runtime raises for a model or device that it does not support.
    """
    options = _session_options(runtime, threads)
    # By default it prints an error and continues without the provider, also after a failed run.
    session = runtime.InferenceSession(model, options, providers=[provider], enable_fallback=0)
    wanted, actual = provider[0], session.get_providers()[0]
    if actual != wanted:
        # It also falls back silently (microsoft/onnxruntime#25145).
        missing = missing_cuda_libraries()
        why = f": {', '.join(missing)} cannot be loaded" if missing else ""
        raise EngineUnavailable(
            f"ONNX Runtime could not load its {wanted} and fell back to {actual}{why}",
            "a GPU, its driver, CUDA and cuDNN",
            INSTALL_GPU,
        )
    return session


def run_probe(runtime: Any, provider: Provider) -> None:
    """Run a small graph on `provider`.

    Raises:
        EngineUnavailable: it does not run.
    """
    name = f"ONNX Runtime {runtime.__version__}"
    try:
        session = new_session(runtime, PROBE_GRAPH, 1, provider)
        answer = session.run([PROBE_OUTPUT], {PROBE_INPUT: probe_question()})[0]
    except EngineUnavailable:
        raise
    except Exception as problem:
        raise EngineUnavailable(f"{name} does not run: {first_line(problem)}") from problem
    check_probe_answer(answer, name)


def _session_options(runtime: Any, threads: int) -> Any:
    options = runtime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.execution_mode = runtime.ExecutionMode.ORT_SEQUENTIAL
    options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.log_severity_level = 4
    # Threads spin between the nodes of a run, which is cheaper than waking them, and sleep when it
    # ends, so that idle engines leave the cores to the decoders.
    options.add_session_config_entry("session.intra_op.allow_spinning", "1")
    options.add_session_config_entry("session.force_spinning_stop", "1")
    return options
