"""OpenVINO as an engine on the CPU, with the same ONNX files as ONNX Runtime."""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Iterator
from functools import cache
from queue import LifoQueue
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sbtk_runtime.engines.base import (
    PROBE_GRAPH,
    PROBE_INPUT,
    EngineInfo,
    EngineRequest,
    check_probe_answer,
    probe_question,
)
from sbtk_runtime.engines.session import (
    Feeds,
    Infer,
    Port,
    SessionEngine,
    check_signature,
    cpu_chunk,
    feeds_of,
    first_line,
)
from sbtk_runtime.errors import BadModel, EngineUnavailable, MissingExtra
from sbtk_runtime.regions import input_side

_NAME = "openvino"
_INSTALL = 'pip install "sbtk[openvino]"'
_TELEMETRY = "openvino_telemetry"

# The ONNX type whose name differs from NumPy's.
_ONNX_TYPES = {"float32": "float"}

# Streams round alike, so larger differences are errors.
_SAME = 1e-3

_importing = threading.Lock()
_making_core = threading.Lock()


def open_openvino(request: EngineRequest) -> SessionEngine:
    """Return the bundle's model on OpenVINO's CPU plugin, one stream a lane.

    Raises:
        MissingExtra: OpenVINO is not installed.
        EngineUnavailable: it is installed but does not work.
        BadModel: the bundle's file is damaged or not a model of sbtk.
    """
    openvino = _openvino()
    model_file, path = request.model(), request.name
    manifest = request.bundle.manifest
    dim, domain_input = manifest.dim, manifest.domain_input
    try:
        core = openvino_core()
        model = core.read_model(model_file)
        inputs, outputs = _ports(model.inputs), _ports(model.outputs)
        check_signature(inputs, outputs, path, dim, domain_input, request.regions)
        requests = _requests(core, model, request)
    except BadModel:
        raise
    except Exception as problem:
        raise BadModel(
            f"OpenVINO {_version(openvino)} refuses {path}: {_message(problem)}",
            "an ONNX model made by sbtk export",
            "sbtk models check BUNDLE, or export the run again",
        ) from problem
    info = EngineInfo(
        name=_NAME,
        precision=request.precision,
        device=request.device,
        dim=dim,
        threads=request.threads,
        lanes=request.lanes,
        version=_version(openvino),
        form=request.form,
        domain_input=domain_input,
        regions=request.regions,
    )
    chunk = cpu_chunk(request.lanes, request.regions)
    engine = SessionEngine(_take_turns(requests), info, chunk, _message, request.notify)
    engine.prove()
    return engine


def probe_openvino() -> str:
    """Run a small graph on the CPU, and return OpenVINO's version; raise if that fails."""
    openvino = _openvino()
    version = _version(openvino)
    try:
        core = openvino_core()
        compiled = core.compile_model(core.read_model(PROBE_GRAPH), "CPU", _settings(1, 1))
        answer = compiled.create_infer_request().infer({PROBE_INPUT: probe_question()})[0]
    except Exception as problem:
        raise EngineUnavailable(
            f"OpenVINO {version} does not run: {_message(problem)}"
        ) from problem
    check_probe_answer(answer, f"OpenVINO {version}")
    return version


def openvino_core() -> Any:
    """Return the only `openvino.Core` of the process, which lives as long as the process.

    A core gives the thread that first uses it a stack for signal handlers, and frees the stack
    when it ends. If two cores end in the order in which they started, the second restores the freed
    stack of the first, and the next Ctrl-C ends the process with a segmentation fault.

    Raises:
        MissingExtra: OpenVINO is not installed.
        EngineUnavailable: it cannot be loaded, or its installation is incomplete.
    """
    openvino = _openvino()
    # Without the lock, threads that call this at once would get different cores.
    with _making_core:
        return _core(openvino)


@cache
def _core(openvino: Any) -> Any:
    return openvino.Core()


def _requests(core: Any, model: Any, request: EngineRequest) -> list[Any]:
    """Return an infer request for each lane, after comparing several streams with one.

    OpenVINO 2026.4.1 returns noise with several streams if a 1x1 convolution of stride 2 is
    quantised, and correct embeddings with one. In that case each lane gets its own compiled model,
    with its own copy of the weights.
    """
    threads, lanes = request.threads, request.lanes
    compiled = core.compile_model(model, "CPU", _settings(threads, lanes))
    requests = [compiled.create_infer_request() for _ in range(lanes)]
    if lanes == 1:
        return requests
    alone = core.compile_model(model, "CPU", _settings(max(1, threads // lanes), 1))
    side = input_side(request.regions)
    image = np.random.default_rng(0).integers(0, 256, (1, side, side, 3), np.uint8)
    feeds = feeds_of(image, "photo", request.bundle.manifest.domain_input)
    expected = _embed(alone.create_infer_request(), feeds)
    if all(np.allclose(_embed(r, feeds), expected, atol=_SAME) for r in requests):
        return requests
    settings = _settings(max(1, threads // lanes), 1)
    others = [core.compile_model(model, "CPU", settings) for _ in range(lanes - 1)]
    return [each.create_infer_request() for each in (alone, *others)]


def _embed(request: Any, feeds: Feeds) -> NDArray[np.float32]:
    return np.array(request.infer(feeds)[0], dtype=np.float32)


def _settings(threads: int, lanes: int) -> dict[str, Any]:
    return {
        "NUM_STREAMS": lanes,
        "INFERENCE_NUM_THREADS": threads,
        # Processors with bfloat16 would use it by default and give other embeddings.
        "INFERENCE_PRECISION_HINT": "f32",
        # Two processes that pin their threads would use the same cores.
        "ENABLE_CPU_PINNING": False,
    }


def _take_turns(requests: list[Any]) -> Infer:
    """Return a function that runs each batch on an idle request."""
    idle: LifoQueue[Any] = LifoQueue()
    for request in requests:
        idle.put(request)

    def infer(feeds: Feeds) -> NDArray[np.float32]:
        request = idle.get()
        try:
            # Inputs are shared; outputs are copied before the next batch overwrites them.
            rows = request.infer(feeds, share_inputs=True, share_outputs=False)[0]
            return np.asarray(rows, dtype=np.float32)
        finally:
            idle.put(request)

    return infer


def _openvino() -> Any:
    try:
        with _importing, _without_telemetry():
            import openvino
    except ImportError as problem:
        if problem.name == "openvino":
            raise MissingExtra(
                "OpenVINO is not installed", "the extra 'openvino'", _INSTALL
            ) from problem
        raise EngineUnavailable(
            f"OpenVINO cannot be loaded: {first_line(problem)}", "", _INSTALL
        ) from problem
    if not hasattr(openvino, "Core"):
        raise EngineUnavailable(
            "OpenVINO's installation is incomplete: it has no Core",
            "a complete installation",
            "pip uninstall openvino, then " + _INSTALL,
        )
    return openvino


@contextlib.contextmanager
def _without_telemetry() -> Iterator[None]:
    """Hide the package that sends telemetry when OpenVINO is imported.

    OpenVINO works without that package.
    """
    if "openvino" in sys.modules:
        yield
        return
    missing = object()
    before: Any = sys.modules.get(_TELEMETRY, missing)
    sys.modules[_TELEMETRY] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        if before is missing:
            del sys.modules[_TELEMETRY]
        else:
            sys.modules[_TELEMETRY] = before


def _version(openvino: Any) -> str:
    """Return "2026.4.1" for "2026.4.1-22982-e213a147257-releases/2026/4"."""
    return str(openvino.__version__).partition("-")[0]


def _ports(values: list[Any]) -> list[Port]:
    return [(_port_name(value), _port_type(value), _shape(value)) for value in values]


def _port_name(value: Any) -> str:
    return str(value.any_name) if value.names else "an unnamed tensor"


def _port_type(value: Any) -> str:
    kind = str(value.element_type.to_dtype())
    return f"tensor({_ONNX_TYPES.get(kind, kind)})"


def _shape(value: Any) -> tuple[int | str, ...]:
    shape = value.partial_shape
    if shape.rank.is_dynamic:
        return ()
    return tuple("?" if size.is_dynamic else size.get_length() for size in shape)


def _message(problem: BaseException) -> str:
    """Return the message of an error, without the lines that name OpenVINO's source files."""
    lines = [line.strip() for line in str(problem).splitlines()]
    kept = [line for line in lines if line and not line.startswith(("Exception from", "Check '"))]
    return " ".join(kept)[:300] or first_line(problem)
