"""ONNX Runtime itself: finding it, making sessions, and refusing what it silently does instead."""

from __future__ import annotations

import contextlib
import io
import re
import threading
from functools import cache
from pathlib import Path
from typing import Any

from sbtk_runtime.engines.cuda_device import CudaDevice, find_device
from sbtk_runtime.engines.probe_graph import (
    PROBE_GRAPH,
    PROBE_INPUT,
    PROBE_OUTPUT,
    check_probe_answer,
    probe_question,
)
from sbtk_runtime.engines.session_engine import first_line
from sbtk_runtime.errors import EngineUnavailable, MissingExtra

CPU = "CPUExecutionProvider"
CUDA = "CUDAExecutionProvider"
TENSORRT = "TensorrtExecutionProvider"

INSTALL_CPU = 'pip install "sbtk[cpu]"'
INSTALL_GPU = 'pip uninstall onnxruntime, then pip install "sbtk[gpu]"'

#: A provider and its options, as ONNX Runtime takes them.
Provider = tuple[str, dict[str, str]]

_preloading = threading.Lock()


def find_onnxruntime() -> Any:
    """Returns the module `onnxruntime`, of either distribution.

    Raises:
        MissingExtra: neither is installed.
        EngineUnavailable: it does not load, or is not whole.
    """
    try:
        import onnxruntime
    except ImportError as problem:
        # A wrapped ImportError is one of ONNX Runtime's own libraries that does not load.
        if getattr(problem, "name", None) == "onnxruntime":
            raise MissingExtra(
                "ONNX Runtime is not installed", "the extra 'cpu' or 'gpu'", INSTALL_CPU
            ) from problem
        raise EngineUnavailable(
            f"ONNX Runtime cannot be loaded: {first_line(problem)}", "", INSTALL_CPU
        ) from problem
    if not hasattr(onnxruntime, "InferenceSession"):
        # onnxruntime and onnxruntime-gpu own the same files; removing one hollows out the other.
        raise EngineUnavailable(
            "ONNX Runtime is hollow: onnxruntime and onnxruntime-gpu were both installed, and one "
            "was removed",
            "one whole installation",
            "pip uninstall onnxruntime onnxruntime-gpu, then " + INSTALL_CPU,
        )
    # Whatever goes wrong reaches us as an exception or as another provider; the log would only
    # tell it a second time, on the user's terminal.
    onnxruntime.set_default_logger_severity(4)
    return onnxruntime


def find_gpu(runtime: Any, provider: str, device: str = "cuda") -> CudaDevice | None:
    """Returns the GPU for a provider, with the CUDA libraries loaded that pip installed.

    `None` means that nothing here can tell, for want of cuda-bindings; a session still may.

    Raises:
        BadConfig: `device` is no name of a GPU.
        EngineUnavailable: ONNX Runtime was built without the provider; or there is no driver, or
            no such GPU.
    """
    if provider not in runtime.get_available_providers():
        raise EngineUnavailable(
            f"ONNX Runtime {runtime.__version__} was built without {_TITLES[provider]}",
            "onnxruntime-gpu, and onnxruntime not beside it",
            INSTALL_GPU,
        )
    found = None
    with contextlib.suppress(MissingExtra):
        found = find_device(device)
    missing_cuda_libraries()
    return found


@cache
def missing_cuda_libraries() -> tuple[str, ...]:
    """Returns the CUDA libraries that ONNX Runtime needs and that cannot be loaded.

    Those that pip installed are loaded on the way, since no search path leads to them.
    """
    runtime = find_onnxruntime()
    if not hasattr(runtime, "preload_dlls"):
        return ()
    # It prints what it misses, where `sbtk query --json` prints its answers.
    with _preloading, contextlib.redirect_stdout(io.StringIO()) as printed:
        runtime.preload_dlls()
    named = re.findall(r"Failed to load (\S+):", printed.getvalue())
    return tuple(dict.fromkeys(Path(name).name for name in named))


def new_session(
    runtime: Any,
    model: str | bytes,
    threads: int,
    providers: list[Provider],
    entries: dict[str, str] | None = None,
) -> Any:
    """Returns a session that runs on the first of `providers`.

    Args:
        runtime: from `find_onnxruntime`.
        model: path or content of an ONNX file.
        threads: CPU threads of one run.
        providers: the one that is meant, then those that may run what it leaves over.
        entries: further configuration of the session.

    Raises:
        EngineUnavailable: the session would run on another provider.
        Exception: whatever ONNX Runtime raises on a model or device that it does not take.
    """
    options = _session_options(runtime, threads)
    for key, value in (entries or {}).items():
        options.add_session_config_entry(key, value)
    # Unless told, it prints an error, goes on without the provider, and does so after a run too.
    session = runtime.InferenceSession(model, options, providers=providers, enable_fallback=0)
    wanted, actual = providers[0][0], session.get_providers()[0]
    if actual != wanted:
        # It also falls back without a word (microsoft/onnxruntime#25145).
        missing = missing_cuda_libraries()
        why = f": {', '.join(missing)} cannot be loaded" if missing else ""
        raise EngineUnavailable(
            f"ONNX Runtime could not load its {wanted} and fell back to {actual}{why}",
            "a GPU, its driver, CUDA and cuDNN",
            INSTALL_GPU,
        )
    return session


def run_probe(
    runtime: Any, providers: list[Provider], entries: dict[str, str] | None = None
) -> Any:
    """Returns a session that has run a small graph on the first of `providers`.

    Raises:
        EngineUnavailable: it does not run.
    """
    name = f"ONNX Runtime {runtime.__version__}"
    try:
        session = new_session(runtime, PROBE_GRAPH, 1, providers, entries)
        answer = session.run([PROBE_OUTPUT], {PROBE_INPUT: probe_question()})[0]
    except EngineUnavailable:
        raise
    except Exception as problem:
        raise EngineUnavailable(f"{name} does not run: {first_line(problem)}") from problem
    check_probe_answer(answer, name)
    return session


_TITLES = {CPU: "its CPU provider", CUDA: "CUDA", TENSORRT: "TensorRT"}


def _session_options(runtime: Any, threads: int) -> Any:
    options = runtime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.execution_mode = runtime.ExecutionMode.ORT_SEQUENTIAL
    options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.log_severity_level = 4
    # Threads spin between the nodes of one run, where waking them would cost more than the wait,
    # and sleep as soon as it ends, so that idle engines leave the cores to the decoders.
    options.add_session_config_entry("session.intra_op.allow_spinning", "1")
    options.add_session_config_entry("session.force_spinning_stop", "1")
    return options
