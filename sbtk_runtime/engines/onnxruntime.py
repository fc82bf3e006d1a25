"""ONNX Runtime as an engine, on a CPU or through its CUDA provider."""

from __future__ import annotations

import contextlib
import ctypes
import io
import os
import re
import stat
import threading
from collections import Counter
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
from sbtk_runtime.engines.cuda import CudaDevice, find_device
from sbtk_runtime.engines.session import (
    Feeds,
    Infer,
    Port,
    SessionEngine,
    check_signature,
    cpu_chunk,
    first_line,
)
from sbtk_runtime.engines.tensorrt.cache import cache_folder
from sbtk_runtime.engines.tensorrt.library import find_tensorrt
from sbtk_runtime.errors import BadModel, EngineUnavailable, MissingExtra
from sbtk_runtime.files import read_json_object, sha256_of_file, write_json_atomically
from sbtk_runtime.onnx_file import INPUT_NAME, OUTPUT_NAME
from sbtk_runtime.preprocess import SIZE_PX

CPU = "CPUExecutionProvider"
CUDA = "CUDAExecutionProvider"
TENSORRT = "TensorrtExecutionProvider"

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
    runtime = find_onnxruntime()
    gpu = find_gpu(runtime, TENSORRT, request.device)
    library = load_tensorrt(runtime)
    index = _index(request.device)
    chunk = max(1, min(request.batch, _GPU_CHUNK))
    kept = engine_cache(request, chunk, (runtime.__version__, library), gpu)
    domain_input = request.bundle.manifest.domain_input
    providers = [
        (TENSORRT, options(index, chunk, kept, domain_input)),
        _cuda_provider(index),
    ]
    target = _Target(providers, f"cuda:{index}", 1, chunk, SESSION_ENTRIES)
    if kept is None or kept.is_empty:
        request.notify("TensorRT builds an engine for this GPU, which takes a minute or so")
    session = _session(request, target)
    check_assignment(session)
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
    runtime = find_onnxruntime()
    find_gpu(runtime, TENSORRT)
    load_tensorrt(runtime)
    providers = [(TENSORRT, {"device_id": "0"}), _cuda_provider(0)]
    session = run_probe(runtime, providers, SESSION_ENTRIES)
    check_assignment(session)
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


#: Makes a session tell which provider runs which node, for `check_assignment`.
SESSION_ENTRIES = {"session.record_ep_graph_assignment_info": "1"}

_WORKSPACE_BYTES = 4 << 30
_RECORD = "vouched.json"
_INSTALL = 'pip install "sbtk[gpu,tensorrt]" "tensorrt-cu13<11"'

# TensorRT may leave the conversion of uint8 to whoever has the image first.
_LEFT_TO_OTHERS = frozenset({"Cast"})


@dataclass(frozen=True)
class EngineCache:
    """A folder where the provider keeps what it built for one model, batch and library.

    The provider runs whatever lies there under the right name, so the folder is the user's own
    and holds nothing but what `vouch` has recorded.
    """

    folder: Path

    @property
    def is_empty(self) -> bool:
        """Whether an engine has still to be built."""
        return not (self.folder / _RECORD).exists()

    def vouch(self) -> None:
        """Records what the provider has just written and run; a full disk is no reason to fail."""
        names = sorted(path.name for path in self.folder.iterdir() if path.name != _RECORD)
        with contextlib.suppress(OSError):
            hashes = {name: sha256_of_file(self.folder / name) for name in names}
            write_json_atomically(self.folder / _RECORD, hashes)

    def remove_strangers(self) -> bool:
        """Empties the folder unless every file is what was recorded; returns whether it did."""
        paths = [path for path in self.folder.iterdir() if path.name != _RECORD]
        if not paths or self._is_as_recorded(paths):
            return False
        for path in [*paths, self.folder / _RECORD]:
            path.unlink(missing_ok=True)
        return True

    def _is_as_recorded(self, paths: list[Path]) -> bool:
        if not all(map(_is_own_file, [*paths, self.folder / _RECORD])):
            return False
        try:
            recorded = read_json_object(self.folder / _RECORD, BadModel)
        except BadModel:
            return False
        return recorded == {path.name: sha256_of_file(path) for path in paths}


def load_tensorrt(runtime: Any) -> str:
    """Loads the TensorRT that the provider is linked with, and returns its library's name.

    Raises:
        EngineUnavailable: it cannot be loaded.
    """
    provider = Path(runtime.__file__).parent / "capi" / "libonnxruntime_providers_tensorrt.so"
    try:
        linked = re.search(rb"libnvinfer\.so\.\d+", provider.read_bytes())
    except OSError:
        return ""  # Windows, where the session says what is missing
    if linked is None:
        return ""
    name = linked.group().decode()
    found = "TensorRT is not installed"
    # Importing pip's TensorRT loads its libraries, to which no search path leads.
    with contextlib.suppress(EngineUnavailable, MissingExtra):
        found = f"TensorRT {find_tensorrt('tensorrt').version} is installed"
    try:
        ctypes.CDLL(name)
    except OSError as problem:
        major = name.rpartition(".")[2]
        raise EngineUnavailable(
            f"ONNX Runtime's TensorRT provider needs {name}, which cannot be loaded; {found}",
            f"TensorRT {major}",
            _INSTALL,
        ) from problem
    return name


def options(
    index: int, batch: int, kept: EngineCache | None, domain_input: str | None = None
) -> dict[str, str]:
    """Returns the provider's options for one engine of 1 to `batch` images on the GPU `index`.

    Args:
        index: of the GPU.
        batch: most images of a run.
        kept: where the engine is kept, if anywhere.
        domain_input: of the model, as its manifest has it.
    """

    def shapes(count: int) -> str:
        images = f"{INPUT_NAME}:{count}x{SIZE_PX}x{SIZE_PX}x3"
        return images if domain_input is None else f"{images},{domain_input}:{count}"

    chosen = {
        "device_id": str(index),
        "trt_max_workspace_size": str(_WORKSPACE_BYTES),
        "trt_profile_min_shapes": shapes(1),
        "trt_profile_opt_shapes": shapes(batch),
        "trt_profile_max_shapes": shapes(batch),
    }
    if kept is not None:
        chosen |= {
            "trt_engine_cache_enable": "1",
            "trt_engine_cache_path": str(kept.folder),
            "trt_timing_cache_enable": "1",
            "trt_timing_cache_path": str(kept.folder),
        }
    return chosen


def engine_cache(
    request: EngineRequest, batch: int, versions: tuple[str, str], gpu: CudaDevice | None
) -> EngineCache | None:
    """Returns the cache for what is asked; `None`, told to `request.notify`, if it cannot be used.

    Args:
        request: names model and precision.
        batch: most images of the engine.
        versions: of ONNX Runtime, and the name of TensorRT's library.
        gpu: that will run it, where that is known.
    """
    path = request.bundle.onnx_path(request.precision, request.form)
    onnx_sha256 = request.bundle.manifest.files[path.name].sha256
    where = "" if gpu is None else f"-sm{gpu.compute_capability}"
    key = "-".join((*versions, onnx_sha256[:16], request.precision, f"b{batch}")) + where
    try:
        folder = cache_folder().parent
        for name in ("onnxruntime-tensorrt", re.sub(r"[^\w.-]", "_", key)):
            folder = folder / name
            folder.mkdir(mode=0o700, exist_ok=True)
            _check_own_folder(folder)
        kept = EngineCache(folder)
        if kept.remove_strangers():
            request.notify(f"{folder} held what was not written there by sbtk: emptied")
    except (OSError, EngineUnavailable) as problem:
        request.notify(f"the engine is built anew each time, since its cache fails: {problem}")
        return None
    return kept


def check_assignment(session: Any) -> None:
    """Checks that TensorRT runs the model, and not the provider that is there for what is left.

    Raises:
        EngineUnavailable: names the operators that it does not run.
    """
    elsewhere: Counter[str] = Counter()
    for subgraph in session.get_provider_graph_assignment_info():
        if subgraph.ep_name != TENSORRT:
            elsewhere.update(node.op_type for node in subgraph.get_nodes())
    left = {kind: count for kind, count in elsewhere.items() if kind not in _LEFT_TO_OTHERS}
    if left:
        told = ", ".join(f"{count} {kind}" for kind, count in sorted(left.items()))
        raise EngineUnavailable(
            f"ONNX Runtime's TensorRT provider leaves work to others: {told}",
            "a model that it runs as a whole",
            "--engine tensorrt, or --engine onnxruntime-cuda",
        )


def _check_own_folder(folder: Path) -> None:
    status = folder.lstat()
    if not stat.S_ISDIR(status.st_mode) or not _is_only_ours(status):
        raise EngineUnavailable(
            f"{folder} is no folder of yours alone", "mode 0700, no link", f"rm -r {folder}"
        )


def _is_own_file(path: Path) -> bool:
    try:
        status = path.lstat()
    except OSError:
        return False
    return stat.S_ISREG(status.st_mode) and _is_only_ours(status)


def _is_only_ours(status: os.stat_result) -> bool:
    is_closed = not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    return is_closed and status.st_uid == os.geteuid()
