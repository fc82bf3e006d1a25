"""The engines of sbtk: chooses, opens and probes them."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

from sbtk_runtime.bundle import Bundle, OnnxForm
from sbtk_runtime.engines import onnxruntime as engine_onnxruntime
from sbtk_runtime.engines import openvino as engine_openvino
from sbtk_runtime.engines.base import (
    AUTO,
    DEFAULT_OPTIONS,
    Engine,
    EngineOptions,
    EngineRequest,
    Notify,
    no_notify,
)
from sbtk_runtime.engines.cuda import require_driver
from sbtk_runtime.engines.session import is_out_of_memory
from sbtk_runtime.engines.tensorrt.library import find_tensorrt
from sbtk_runtime.errors import BadConfig, BadModel, EngineUnavailable, MissingExtra
from sbtk_runtime.machine import cpu_flags, cpu_threads
from sbtk_runtime.manifest import PRECISIONS
from sbtk_runtime.regions import RegionGrid

#: Engines of older versions, and the engine to use instead.
_DROPPED = {"onnxruntime-tensorrt": "tensorrt"}
# OpenVINO initializes its types on first use. Two threads that do so at once wait for each other:
# one for the GIL, the other for C++'s guard.
_OPENING = threading.Lock()


@dataclass(frozen=True)
class EngineReport:
    """Whether an engine works on this machine.

    Attributes:
        name: as `--engine` takes it.
        works: whether it ran a small graph.
        reason: why it does not work, and what to type; empty if it works.
        version: of its library; empty if that is not installed.
    """

    name: str
    works: bool
    reason: str
    version: str


def open_engine(
    bundle: Bundle,
    options: EngineOptions = DEFAULT_OPTIONS,
    *,
    lanes: int = 1,
    single_query: bool = False,
    notify: Notify = no_notify,
    regions: RegionGrid | None = None,
) -> Engine:
    """Return a working engine for the bundle: the named one, or the first one that works.

    Args:
        bundle: the model.
        options: the engine and how it runs.
        lanes: how many calls of `run` will run at once. A CPU's threads are divided among them:
            one lane is fastest for one image, a lane for each thread for many.
        single_query: only an image or two will be embedded; `auto` then tries engines that take
            longer to load than they save last.
        notify: called with sentences on what takes long and on what was changed to make it work.
        regions: embed these windows of each image instead of the whole frame.

    Raises:
        BadConfig: the options contradict each other.
        BadModel: the bundle does not have the precision, is damaged, or is not a model of sbtk.
        EngineUnavailable: the named engine, or every engine, does not work on this machine.
        MissingExtra: the named engine's library is not installed.
        MemoryError: no engine that `auto` tried works in the memory that is left.
    """
    check_engine_options(options, lanes)
    candidates = _candidates(options)
    passed_over: list[str] = []
    if options.engine == AUTO and single_query:
        slow = [entry for entry in candidates if entry.starts_slowly]
        # Last rather than left out: it may be the only one that is installed.
        candidates = [entry for entry in candidates if not entry.starts_slowly] + slow
        passed_over = [f"{entry.name}: takes too long to load for one image" for entry in slow]
    bad_model: BadModel | None = None
    is_short_of_memory = False
    for entry in candidates:
        request = EngineRequest(
            bundle,
            replace(options, device=options.device or entry.device),
            lanes=lanes,
            form=entry.form,
            # A query must not take a minute because the machine has a GPU: `auto` builds nothing.
            may_build=options.engine != AUTO,
            notify=notify,
            regions=regions,
        )
        try:
            with _OPENING:
                opened = entry.open(request)
        except (EngineUnavailable, MissingExtra, BadModel) as problem:
            if options.engine != AUTO:
                raise
            # One engine may refuse what another runs, and TensorRT has its own files.
            if isinstance(problem, BadModel) and entry.form == "plain":
                bad_model = problem
            passed_over.append(f"{entry.name}: {problem.found}")
            next_step = problem.next_step
            is_short_of_memory |= is_out_of_memory(problem)
            continue
        opened.info = replace(opened.info, passed_over=tuple(passed_over))
        return opened
    if is_short_of_memory:
        raise MemoryError("; ".join(passed_over))
    if bad_model is not None:
        raise bad_model
    raise EngineUnavailable(
        "no engine works on this machine: " + "; ".join(passed_over),
        "at least one of: " + ", ".join(entry.name for entry in candidates),
        next_step,
    )


def check_engine_options(options: EngineOptions, lanes: int = 1) -> None:
    """Check the options of `open_engine` without opening an engine.

    Raises:
        BadConfig: one of them is unknown, or they contradict each other.
    """
    threads = cpu_threads() if options.threads is None else options.threads
    if threads < 1 or not 1 <= lanes <= threads:
        raise BadConfig(f"{threads} threads for {lanes} lanes", "at least 1 thread for each lane")
    if options.batch < 1:
        raise BadConfig(f"a batch of {options.batch}", "at least 1")
    if options.precision is not None and options.precision not in PRECISIONS:
        raise BadConfig(f"unknown precision {options.precision!r}", " or ".join(PRECISIONS))
    _candidates(options)


def probe_engines() -> list[EngineReport]:
    """Run a small graph on each engine, and return which of them work on this machine.

    They come in the order in which `auto` tries them, the fastest first.
    """
    from sbtk_runtime.machine import installed_versions

    reports = []
    for entry in automatic_order(cpu_flags()):
        version, reason = "", ""
        try:
            version = entry.probe()
        except (EngineUnavailable, MissingExtra) as problem:
            reason = f"{problem.found}: {problem.next_step}" if problem.next_step else problem.found
            version = next(iter(installed_versions(entry.distributions).values()), "")
        reports.append(EngineReport(entry.name, not reason, reason, version))
    return reports


def _candidates(options: EngineOptions) -> list[EngineEntry]:
    engine, device = options.engine, options.device
    family = None if device is None else str(device).partition(":")[0]
    if family not in (None, "cpu", "cuda"):
        raise BadConfig(f"unknown device {device!r}", "cpu, cuda or cuda:N")
    if engine in _DROPPED:
        raise BadConfig(
            f"the engine {engine} no longer exists",
            f"{_DROPPED[engine]}, which runs the same models through fewer layers",
            f"--engine {_DROPPED[engine]}",
        )
    if engine not in (AUTO, *ENGINE_NAMES):
        raise BadConfig(f"unknown engine {engine!r}", f"{AUTO}, {', '.join(ENGINE_NAMES)}")
    named = [entry for entry in automatic_order(cpu_flags()) if engine in (AUTO, entry.name)]
    fitting = [entry for entry in named if family in (None, entry.device)]
    if not fitting:
        raise BadConfig(
            f"engine {engine} cannot run on {device}", f"--device {named[0].device}, or no --device"
        )
    return fitting


@dataclass(frozen=True)
class EngineEntry:
    """One engine.

    Attributes:
        name: as `--engine` takes it.
        device: that it runs on.
        open: opens the model of a request.
        probe: runs a small graph, and returns the version of its library.
        distributions: those that contain its library.
        form: of its ONNX files.
        starts_slowly: whether loading it takes longer than it saves on a single image.
    """

    name: str
    device: Literal["cpu", "cuda"]
    open: Callable[[EngineRequest], Engine]
    probe: Callable[[], str]
    distributions: tuple[str, ...]
    form: OnnxForm = "plain"
    starts_slowly: bool = False


def _open_tensorrt(module: str, request: EngineRequest) -> Engine:
    # Most machines have no TensorRT or no GPU for it; this finds out before importing TensorRT-RTX
    # and CUDA's bindings, which takes 0.25 s and 114 MB. An engine that was named is imported
    # first, so that its error says what to install.
    if not request.may_build:
        require_driver()
    find_tensorrt(module)
    from sbtk_runtime.engines.tensorrt.engine import open_tensorrt

    return open_tensorrt(request, module)


def _probe_tensorrt(module: str) -> str:
    from sbtk_runtime.engines.tensorrt.engine import probe_tensorrt

    return probe_tensorrt(module)


_ONNXRUNTIMES = ("onnxruntime-gpu", "onnxruntime")

#: The fastest first, on a processor with instructions for 8-bit products.
ENGINES = (
    EngineEntry(
        "tensorrt",
        "cuda",
        partial(_open_tensorrt, "tensorrt"),
        partial(_probe_tensorrt, "tensorrt"),
        ("tensorrt-cu13", "tensorrt", "tensorrt-cu12"),
        form="tensorrt",
    ),
    EngineEntry(
        "tensorrt-rtx",
        "cuda",
        partial(_open_tensorrt, "tensorrt_rtx"),
        partial(_probe_tensorrt, "tensorrt_rtx"),
        ("tensorrt-rtx-cu13", "tensorrt-rtx-cu12", "tensorrt-rtx"),
        form="tensorrt",
    ),
    EngineEntry(
        "onnxruntime-cuda",
        "cuda",
        engine_onnxruntime.open_cuda,
        engine_onnxruntime.probe_cuda,
        _ONNXRUNTIMES,
    ),
    EngineEntry(
        "openvino",
        "cpu",
        engine_openvino.open_openvino,
        engine_openvino.probe_openvino,
        ("openvino",),
        starts_slowly=True,
    ),
    EngineEntry(
        "onnxruntime",
        "cpu",
        engine_onnxruntime.open_cpu,
        engine_onnxruntime.probe_cpu,
        _ONNXRUNTIMES,
    ),
)
# Products of bytes that x86 processors add up in 32 bits, as OpenVINO needs them to be fast.
_INT8_X86 = frozenset({"amx_int8", "avx512_vnni", "avx_vnni"})


def automatic_order(flags: frozenset[str]) -> tuple[EngineEntry, ...]:
    """Return the engines in the order in which `auto` tries them, the fastest first.

    On an x86 processor without VNNI, OpenVINO indexes fewer photos per second than ONNX Runtime.

    Args:
        flags: the processor's instruction sets, see `machine.cpu_flags`.
    """
    if "sse2" not in flags or flags & _INT8_X86:
        return ENGINES
    return tuple(sorted(ENGINES, key=lambda entry: entry.name == "openvino"))


ENGINE_NAMES = tuple(entry.name for entry in ENGINES)
GPU_ENGINE_NAMES = tuple(entry.name for entry in ENGINES if entry.device == "cuda")
