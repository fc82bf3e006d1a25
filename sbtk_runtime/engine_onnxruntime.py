"""ONNX Runtime as an engine, on a CPU or through its CUDA provider."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sbtk_runtime.engine_info import EngineInfo
from sbtk_runtime.engine_request import EngineRequest
from sbtk_runtime.errors import BadConfig, BadModel, EngineUnavailable, MissingExtra
from sbtk_runtime.preprocess import SIZE_PX

INPUT_NAME = "images"
OUTPUT_NAME = "embeddings"

_CPU = "CPUExecutionProvider"
_CUDA = "CUDAExecutionProvider"
_INSTALL_CPU = 'pip install "sbtk[cpu]"'
_INSTALL_GPU = 'pip uninstall onnxruntime, then pip install "sbtk[gpu]"'

# A CPU is as fast at 8 images as at 32, and the activations of 8 need little memory. No more than
# this many images are under way in all lanes together, as long as there are no more lanes.
_CPU_CHUNK = 8
_CPU_IMAGES = 32
_CUDA_CHUNK = 256

# The graph y = -x on one float32, as ONNX protobuf: shows that a provider computes, without a
# bundle and without the onnx package.
_PROBE_GRAPH = bytes.fromhex(
    "08083a320a0b0a017812017922034e65671201705a0f0a0178120a0a08080112040a020801"
    "620f0a0179120a0a08080112040a02080142040a00100d"
)


class OnnxRuntimeEngine:
    """One ONNX Runtime session on one provider; see `sbtk_runtime.engine.Engine`."""

    def __init__(self, session: Any, info: EngineInfo, chunk: int) -> None:
        self.info = info
        self._session = session
        self._chunk = chunk

    def run(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Returns the embeddings `(N, D) float32` of `images (N, 224, 224, 3) uint8`.

        Large batches go through in parts, so that memory does not depend on N.

        Raises:
            EngineUnavailable: ONNX Runtime failed, or the engine is closed.
            BadModel: the model's answer does not have the shape that the manifest tells.
        """
        # Another thread may close the engine meanwhile; this run then ends on the old session.
        session = self._session
        if session is None:
            raise EngineUnavailable(f"the engine {self.info.name} is closed", "an open engine")
        embeddings = np.empty((len(images), self.info.dim), dtype=np.float32)
        for start in range(0, len(images), self._chunk):
            part = np.ascontiguousarray(images[start : start + self._chunk])
            try:
                rows = session.run([OUTPUT_NAME], {INPUT_NAME: part})[0]
            # ONNX Runtime's exceptions share no base class below Exception.
            except Exception as problem:
                raise EngineUnavailable(
                    f"{self.info.name} failed on {len(part)} images: {_first_line(problem)}",
                    "a batch that runs",
                    "sbtk doctor shows which engines work here",
                ) from problem
            if rows.shape != (len(part), self.info.dim):
                raise BadModel(
                    f"the model gives {rows.shape} for {len(part)} images",
                    f"({len(part)}, {self.info.dim})",
                    "export the model with sbtk export",
                )
            embeddings[start : start + len(part)] = rows
        return embeddings

    def close(self) -> None:
        """Frees the session, its threads and its memory."""
        self._session = None


def open_cpu(request: EngineRequest) -> OnnxRuntimeEngine:
    """Returns the bundle's model on ONNX Runtime's CPU provider.

    Raises:
        MissingExtra: ONNX Runtime is not installed.
        EngineUnavailable: it is installed and does not work.
        BadModel: the bundle's file is damaged or not a model of ours.
    """
    threads, lanes = request.threads, request.lanes
    chunk = max(1, min(_CPU_CHUNK, _CPU_IMAGES // lanes))
    target = _Target("onnxruntime", request.device, threads, lanes, chunk, _CPU, {})
    return _open(request, target)


def open_cuda(request: EngineRequest) -> OnnxRuntimeEngine:
    """Returns the bundle's model on ONNX Runtime's CUDA provider.

    Raises:
        MissingExtra: ONNX Runtime is not installed.
        EngineUnavailable: it has no CUDA provider, or that cannot be used.
        BadModel: the bundle's file is damaged or not a model of ours.
    """
    index = request.device.partition(":")[2] or "0"
    if not index.isdecimal():
        raise BadConfig(f"device {request.device!r}", "cuda or cuda:N")
    _require_cuda_provider(_onnxruntime())
    options = {"device_id": index}
    # A GPU runs one batch at a time, so there is one lane whatever was asked for.
    target = _Target(
        "onnxruntime-cuda", f"cuda:{index}", request.threads, 1, _CUDA_CHUNK, _CUDA, options
    )
    return _open(request, target)


def probe_cpu() -> str:
    """Returns ONNX Runtime's version after it has run a graph on the CPU; raises if it does not."""
    return _probe(_CPU)


def probe_cuda() -> str:
    """Returns ONNX Runtime's version after it has run a graph on a GPU; raises if it does not."""
    _require_cuda_provider(_onnxruntime())
    return _probe(_CUDA)


def installed_version() -> str:
    """Returns the version of ONNX Runtime, under either name; empty when there is none."""
    from importlib import metadata  # costs 40 ms, and is rarely needed

    for distribution in ("onnxruntime-gpu", "onnxruntime"):
        try:
            return metadata.version(distribution)
        except metadata.PackageNotFoundError:
            continue
    return ""


@dataclass(frozen=True)
class _Target:
    """What a session is to run on, and how it is to be called."""

    name: str
    device: str
    threads: int
    lanes: int
    chunk: int
    provider: str
    provider_options: dict[str, str]


def _open(request: EngineRequest, target: _Target) -> OnnxRuntimeEngine:
    runtime = _onnxruntime()
    dim = request.bundle.manifest.dim
    path = request.bundle.checked_onnx(request.precision, request.form)
    try:
        session = runtime.InferenceSession(
            str(path),
            _session_options(runtime, target.threads // target.lanes),
            providers=[(target.provider, target.provider_options)],
        )
    except Exception as problem:
        raise BadModel(
            f"ONNX Runtime {runtime.__version__} refuses {path}: {_first_line(problem)}",
            "an ONNX model made by sbtk export",
            "sbtk models check BUNDLE, or export the run again",
        ) from problem
    _require_provider(session, target.provider)
    _check_signature(session, str(path), dim)
    info = EngineInfo(
        name=target.name,
        precision=request.precision,
        device=target.device,
        dim=dim,
        threads=target.threads,
        lanes=target.lanes,
        version=runtime.__version__,
        form=request.form,
    )
    engine = OnnxRuntimeEngine(session, info, target.chunk)
    # The proof that it really works, and the warm-up of the first batch.
    engine.run(np.full((1, SIZE_PX, SIZE_PX, 3), 255, dtype=np.uint8))
    return engine


def _onnxruntime() -> Any:
    try:
        import onnxruntime
    except ImportError as problem:
        # A wrapped ImportError is one of ONNX Runtime's own libraries that does not load.
        if getattr(problem, "name", None) == "onnxruntime":
            raise MissingExtra(
                "ONNX Runtime is not installed", "the extra 'cpu' or 'gpu'", _INSTALL_CPU
            ) from problem
        raise EngineUnavailable(
            f"ONNX Runtime cannot be loaded: {_first_line(problem)}", "", _INSTALL_CPU
        ) from problem
    if not hasattr(onnxruntime, "InferenceSession"):
        # onnxruntime and onnxruntime-gpu own the same files; removing one hollows out the other.
        raise EngineUnavailable(
            "ONNX Runtime is hollow: onnxruntime and onnxruntime-gpu were both installed, and one "
            "was removed",
            "one whole installation",
            "pip uninstall onnxruntime onnxruntime-gpu, then " + _INSTALL_CPU,
        )
    # Whatever goes wrong reaches us as an exception or as another provider; the log would only
    # tell it a second time, on the user's terminal.
    onnxruntime.set_default_logger_severity(4)
    return onnxruntime


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


def _require_cuda_provider(runtime: Any) -> None:
    if _CUDA not in runtime.get_available_providers():
        raise EngineUnavailable(
            f"ONNX Runtime {runtime.__version__} was built without CUDA",
            "onnxruntime-gpu, and onnxruntime not beside it",
            _INSTALL_GPU,
        )
    if hasattr(runtime, "preload_dlls"):
        # Finds the CUDA and cuDNN libraries that pip installed.
        runtime.preload_dlls()


def _require_provider(session: Any, provider: str) -> None:
    """Refuses what ONNX Runtime silently falls back to (microsoft/onnxruntime#25145)."""
    actual = session.get_providers()[0]
    if actual != provider:
        raise EngineUnavailable(
            f"ONNX Runtime could not load its {provider} and fell back to {actual}",
            "a GPU, its driver, CUDA 13 and cuDNN 9",
            _INSTALL_GPU,
        )


def _probe(provider: str) -> str:
    runtime = _onnxruntime()
    try:
        session = runtime.InferenceSession(
            _PROBE_GRAPH, _session_options(runtime, threads=1), providers=[provider]
        )
        _require_provider(session, provider)
        answer = session.run(["y"], {"x": np.array([2.0], dtype=np.float32)})[0]
    except EngineUnavailable:
        raise
    except Exception as problem:
        raise EngineUnavailable(
            f"ONNX Runtime {runtime.__version__} does not run: {_first_line(problem)}"
        ) from problem
    if answer.tolist() != [-2.0]:
        raise EngineUnavailable(f"ONNX Runtime computes -2 as {answer.tolist()}", "[-2.0]")
    return str(runtime.__version__)


def _check_signature(session: Any, name: str, dim: int) -> None:
    """Checks that the session takes and gives what `Engine.run` promises."""
    inputs = [(value.name, value.type, _shape(value)) for value in session.get_inputs()]
    outputs = [(value.name, value.type, _shape(value)) for value in session.get_outputs()]
    # A dynamic size is shown as "?"; the embedding's may be, and is then tried by a run.
    fits_in = inputs == [(INPUT_NAME, "tensor(uint8)", ("?", SIZE_PX, SIZE_PX, 3))]
    fits_out = outputs in (
        [(OUTPUT_NAME, "tensor(float)", ("?", dim))],
        [(OUTPUT_NAME, "tensor(float)", ("?", "?"))],
    )
    if not fits_in:
        raise BadModel(
            f"{name} takes {_told(inputs)}",
            f"{INPUT_NAME}: tensor(uint8) (?, {SIZE_PX}, {SIZE_PX}, 3)",
            "export the model with sbtk export",
        )
    if not fits_out:
        raise BadModel(
            f"{name} gives {_told(outputs)}",
            f"{OUTPUT_NAME}: tensor(float) (?, {dim})",
            "export the model with sbtk export",
        )


def _shape(value: Any) -> tuple[int | str, ...]:
    return tuple(size if isinstance(size, int) else "?" for size in value.shape or ())


def _told(values: list[tuple[str, str, tuple[int | str, ...]]]) -> str:
    parts = [f"{name}: {kind} ({', '.join(map(str, shape))})" for name, kind, shape in values]
    return " and ".join(parts) or "nothing"


def _first_line(problem: BaseException) -> str:
    lines = str(problem).strip().splitlines()
    return lines[0][:300] if lines else type(problem).__name__
