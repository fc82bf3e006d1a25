"""Build a TensorRT plan from an ONNX model, alike for TensorRT 10, 11 and TensorRT-RTX.

Networks are strongly typed: the ONNX file determines the precision, and no builder flag is set.
Neither torch nor onnx is needed, so a plan is built on the machine that runs it.
"""

from __future__ import annotations

import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from sbtk_runtime.engines.base import Notify
from sbtk_runtime.engines.cuda import CudaDevice, checked, cuda_runtime, find_device
from sbtk_runtime.engines.tensorrt.library import TensorRt, join_lines, recording_logger
from sbtk_runtime.errors import BadConfig, BadModel, EngineUnavailable
from sbtk_runtime.onnx_file import INPUT_NAME, OUTPUT_NAME, check_onnx, opset_of_onnx
from sbtk_runtime.regions import RegionGrid, input_side, row_shape

#: Largest batch that a profile may name.
MAX_BATCH = 4096

_TICK_S = 0.2


@dataclass(frozen=True)
class BuildProgress:
    """The progress of a build.

    Attributes:
        elapsed_s: seconds since the build began.
        phase: TensorRT's name of the outermost phase; empty before the first.
        done: finished steps of that phase.
        total: number of steps of the phase; 0 if unknown.
        waiting_for: description of the innermost phase.
    """

    elapsed_s: float
    phase: str
    done: int
    total: int
    waiting_for: str

    def sentence(self) -> str:
        """Return time, steps and current phase as a line of text."""
        steps = f", {self.phase}: {self.done} of {self.total}" if self.total else ""
        return f"{self.elapsed_s:.0f} s{steps}, waiting for {self.waiting_for}"


Progress = Callable[[BuildProgress], None]


def no_progress(_: BuildProgress) -> None:
    """Ignore the progress of a build."""


def notify_every(interval_s: float, notify: Notify) -> Progress:
    """Return a function that passes a sentence about the progress on, at most every few seconds."""
    last_s = 0.0

    def report(progress: BuildProgress) -> None:
        nonlocal last_s
        if progress.elapsed_s - last_s >= interval_s:
            last_s = progress.elapsed_s
            notify(progress.sentence())

    return report


@dataclass(frozen=True)
class BuildSettings:
    """How to build a plan.

    Attributes:
        batch_min: smallest batch that the plan takes.
        batch_opt: batch to optimise for.
        batch_max: largest batch that the plan takes.
        workspace_bytes: limit of a layer's scratch memory on the GPU.
        optimisation_level: 0 builds fastest, 5 searches longest for fast kernels.

    Raises:
        BadConfig: a value is out of range.
    """

    batch_min: int = 1
    batch_opt: int = 32
    batch_max: int = 256
    workspace_bytes: int = 4 << 30
    optimisation_level: int = 3

    def __post_init__(self) -> None:
        if not 1 <= self.batch_min <= self.batch_opt <= self.batch_max <= MAX_BATCH:
            raise BadConfig(
                f"batches {self.batch_min}, {self.batch_opt}, {self.batch_max}",
                f"smallest, usual and largest batch, in this order, from 1 to {MAX_BATCH}",
            )
        if not 0 <= self.workspace_bytes < 1 << 63:
            raise BadConfig(f"a workspace of {self.workspace_bytes} bytes", "0 bytes or more")
        if not 0 <= self.optimisation_level <= 5:
            raise BadConfig(f"optimisation level {self.optimisation_level}", "0 to 5")


@dataclass(frozen=True)
class BuiltPlan:
    """A new plan.

    Attributes:
        plan: the serialised plan, as `trtexec --loadEngine` takes it.
        timing_cache: makes the next build faster; empty for TensorRT-RTX.
        build_s: duration in seconds.
        log: TensorRT's log, without verbose lines.
    """

    plan: bytes
    timing_cache: bytes
    build_s: float
    log: tuple[str, ...]


def build_plan(
    trt: TensorRt,
    onnx: bytes,
    settings: BuildSettings,
    *,
    timing_cache: bytes = b"",
    progress: Progress = no_progress,
    device: CudaDevice | None = None,
    name: str = "the ONNX model",
    domain_input: str | None = None,
    regions: RegionGrid | None = None,
) -> BuiltPlan:
    """Return a plan of the model with one optimisation profile.

    The build runs in a separate thread. Ctrl-C, or any exception from `progress`, stops the
    build at its next step and is raised again after that.

    Args:
        trt: the TensorRT to build for.
        onnx: the model: `images (N, 224, 224, 3) uint8` to `embeddings (N, D) float32`.
        settings: batches, memory and effort.
        timing_cache: from an earlier build with the same module, version and GPU.
        progress: called with the progress a few times a second, in the calling thread.
        device: the GPU to build on; with `None`, TensorRT takes the first. TensorRT-RTX needs none.
        name: name of the model in error messages.
        domain_input: name of the model's input `(N,) float32` for the kind of images, from its
            manifest; `None` if it has none.
        regions: the windows that the model embeds; `None` for whole frames.

    Raises:
        BadModel: the model is damaged, has other inputs or outputs, or TensorRT cannot parse it.
        EngineUnavailable: TensorRT needs a driver and there is none, or its builder failed; the
            message has the library's log lines.
        MissingExtra: TensorRT needs a driver, and cuda-bindings is not installed.
    """
    model = PlanModel(onnx, name, domain_input, regions)
    check_onnx(onnx, name)
    check_opset(trt, model)
    if device is None and trt.needs_a_driver_to_build:
        # Before any object of TensorRT exists: without a driver some of its libraries crash.
        device = find_device("cuda")
    build = _Build(trt, model, settings, timing_cache, device)
    # The interpreter waits for it at its end, too: TensorRT aborts the process if its thread loses
    # the interpreter in a callback.
    worker = threading.Thread(target=build.run, name="sbtk plan build")
    worker.start()
    try:
        # Not Thread.join: once a signal interrupts it, Python 3.11 considers the thread ended.
        while not build.ended.wait(_TICK_S):
            progress(build.watch.progress())
        progress(build.watch.progress())
    except BaseException:
        build.watch.cancel()
        raise
    finally:
        build.ended.wait()
        worker.join()
    return build.result()


class _Build:
    """One build in a thread; its steps are in the order of TensorRT's API."""

    def __init__(
        self,
        trt: TensorRt,
        model: PlanModel,
        settings: BuildSettings,
        timing_cache: bytes,
        device: CudaDevice | None,
    ) -> None:
        self._trt = trt
        self._model = model
        self._settings = settings
        self._timing_cache = timing_cache
        self._device = device
        self._logger = recording_logger(trt)
        self._built: BuiltPlan | None = None
        self._problem: BaseException | None = None
        self.watch = BuildWatch()
        self.ended = threading.Event()

    def run(self) -> None:
        """Build; leave the plan or the problem for `result`."""
        try:
            self._built = self._build()
        except BaseException as problem:
            # Frees TensorRT's objects here and in order, instead of whenever the garbage collector
            # finds the frames of the traceback.
            traceback.clear_frames(problem.__traceback__)
            self._problem = problem
        finally:
            self.ended.set()

    def result(self) -> BuiltPlan:
        """Return the plan, or raise what `run` caught; call it after `run`."""
        if self._problem is not None:
            raise self._problem
        assert self._built is not None
        return self._built

    def _build(self) -> BuiltPlan:
        module, started = self._trt.module, time.perf_counter()
        if self._device is not None:
            # Each thread has a current device; TensorRT builds for it.
            checked(cuda_runtime().cudaSetDevice(self._device.index))
        self.watch.enter(f"{self._trt.title} to start")
        builder = self._require(module.Builder(self._logger), "make a builder")
        typed = 1 << int(module.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
        network = self._require(builder.create_network(typed), "make a network")
        self.watch.enter("the ONNX parser")
        self._parse(network)
        check_network(module, network, self._model)
        config = self._require(builder.create_builder_config(), "make a configuration")
        self._configure(builder, config)
        timing_cache = self._use_timing_cache(config)
        self.watch.enter(f"{self._trt.title} to build the plan")
        config.progress_monitor = self.watch.monitor(module)
        plan = self._require(builder.build_serialized_network(network, config), "build a plan")
        return BuiltPlan(
            plan=bytes(plan),
            timing_cache=b"" if timing_cache is None else bytes(timing_cache.serialize()),
            build_s=time.perf_counter() - started,
            log=tuple(text for _, text in self._logger.lines()),
        )

    def _parse(self, network: Any) -> None:
        parser = self._require(self._trt.module.OnnxParser(network, self._logger), "make a parser")
        if not parser.parse(self._model.onnx) or parser.num_errors:
            lines = self._logger.problems() or [
                str(parser.get_error(i).desc()) for i in range(parser.num_errors)
            ]
            raise BadModel(
                f"{self._trt.title} refuses {self._model.name}:{join_lines(lines)}",
                "a model exported for TensorRT, whose INT8 is symmetric, with unquantised biases",
                "sbtk export RUN, for INT8 with --int8-trt",
            )

    def _configure(self, builder: Any, config: Any) -> None:
        module, settings = self._trt.module, self._settings
        config.set_memory_pool_limit(module.MemoryPoolType.WORKSPACE, settings.workspace_bytes)
        config.builder_optimization_level = settings.optimisation_level
        # TF32 is on by default and would compute FP32 with a mantissa of 10 bits.
        config.clear_flag(module.BuilderFlag.TF32)
        profile = self._require(builder.create_optimization_profile(), "make a profile")
        batches = (settings.batch_min, settings.batch_opt, settings.batch_max)
        try:
            for name, sizes in self._model.sizes.items():
                profile.set_shape(name, *((batch, *sizes) for batch in batches))
        except ValueError as problem:
            raise self._failed(f"use a profile of batches {batches} ({problem})") from problem
        # The profile's index from 0, or -1.
        number = config.add_optimization_profile(profile)
        if number is None or number < 0:
            raise self._failed(f"use a profile of batches {batches}")

    def _use_timing_cache(self, config: Any) -> Any:
        """Return the timing cache that the build fills; `None` for TensorRT-RTX, which has none."""
        if not self._trt.needs_a_driver_to_build:
            return None
        for content in dict.fromkeys((self._timing_cache, b"")):
            cache = config.create_timing_cache(content)
            # False if it comes from another GPU or version: start an empty one.
            if cache is not None and config.set_timing_cache(cache, False):
                return cache
        return None

    def _require(self, thing: Any, purpose: str) -> Any:
        if thing is None:
            raise self._failed(purpose)
        return thing

    def _failed(self, purpose: str) -> EngineUnavailable:
        return EngineUnavailable(
            f"{self._trt.title} could not {purpose} for {self._model.name}:"
            f"{join_lines(self._logger.problems())}",
            "a machine with enough memory and a model that fits",
            "try a larger --workspace or a smaller --batch; sbtk doctor shows what works here",
        )


_EXPORT_AGAIN = "export the model with sbtk export"

# TensorRT silently reads the operators of a newer opset by the rules of an older one. These are the
# newest that its documentation names for every 10.x, and for 11.x.
_NEWEST_OPSET = 20
_NEWEST_OPSET_FROM_11 = 25


@dataclass(frozen=True)
class PlanModel:
    """A model to build a plan from.

    Attributes:
        onnx: `images (N, 224, 224, 3) uint8`, and the domain input, to `embeddings (N, D) float32`.
        name: its name in error messages.
        domain_input: name of its input `(N,) float32` for the kind of images, from its manifest;
            `None` if it has none.
        regions: the windows that it embeds; `None` for whole frames.
    """

    onnx: bytes
    name: str
    domain_input: str | None
    regions: RegionGrid | None = None

    @property
    def sizes(self) -> dict[str, tuple[int, ...]]:
        """By input, its shape without the batch."""
        domain = {} if self.domain_input is None else {self.domain_input: ()}
        side = input_side(self.regions)
        return {INPUT_NAME: (side, side, 3), **domain}


def check_opset(trt: TensorRt, model: PlanModel) -> None:
    """Check that a TensorRT supports the opset of a model.

    Raises:
        BadModel: the opset is too new.
    """
    is_from_11 = trt.name == "tensorrt" and trt.major >= 11
    newest = _NEWEST_OPSET_FROM_11 if is_from_11 else _NEWEST_OPSET
    opset = opset_of_onnx(model.onnx)
    if opset > newest:
        raise BadModel(
            f"{model.name} uses ONNX opset {opset}",
            f"at most {newest} for {trt.title}",
            _EXPORT_AGAIN,
        )


def check_network(module: Any, network: Any, model: PlanModel) -> None:
    """Check that the network has the inputs and outputs that `Engine.run` and the manifest promise.

    Args:
        module: the TensorRT that parsed the model.
        network: the parsed network.
        model: the model.

    Raises:
        BadModel: it has others; the message names them.
    """
    inputs = [network.get_input(i) for i in range(network.num_inputs)]
    outputs = [network.get_output(i) for i in range(network.num_outputs)]
    found = {tensor.name: (tensor.dtype, tuple(tensor.shape)) for tensor in inputs}
    types = {INPUT_NAME: module.DataType.UINT8}
    wanted = {
        name: (types.get(name, module.DataType.FLOAT), (-1, *sizes))
        for name, sizes in model.sizes.items()
    }
    if found != wanted:
        side = input_side(model.regions)
        domain = "" if model.domain_input is None else f" and {model.domain_input}: FLOAT (any)"
        raise BadModel(
            f"{model.name} takes {_text_of(inputs)}",
            f"{INPUT_NAME}: UINT8 (any batch, {side}, {side}, 3){domain}, and nothing else, "
            "as its manifest says",
            _EXPORT_AGAIN,
        )
    before = row_shape(model.regions, -1)[:-1]
    if len(outputs) != 1 or not (
        outputs[0].name == OUTPUT_NAME
        and outputs[0].dtype == module.DataType.FLOAT
        and tuple(outputs[0].shape[:-1]) == (-1, *before)
        and outputs[0].shape[-1] > 0
    ):
        sizes = "".join(f"{size}, " for size in before)
        raise BadModel(
            f"{model.name} returns {_text_of(outputs)}",
            f"{OUTPUT_NAME}: FLOAT (any batch, {sizes}D), and nothing else",
            _EXPORT_AGAIN,
        )


def _text_of(tensors: list[Any]) -> str:
    """Return names, types and shapes of tensors as text; -1 is a size that may vary."""
    parts = []
    for tensor in tensors:
        sizes = ", ".join("any" if size == -1 else str(size) for size in tensor.shape)
        parts.append(f"{tensor.name}: {tensor.dtype.name} ({sizes})")
    return " and ".join(parts) or "nothing"


@dataclass
class _Phase:
    name: str
    total: int
    done: int = 0

    def text(self) -> str:
        return f"{self.name} ({self.done} of {self.total})" if self.total > 1 else self.name


_monitors_alive: list[Any] = []


class BuildWatch:
    """The state of a running build: written by TensorRT's threads, read by the caller's."""

    def __init__(self) -> None:
        self._started = time.perf_counter()
        self._lock = threading.Lock()
        self._cancelled = threading.Event()
        self._stage = "TensorRT to load"
        # In the order in which they began, so that the last one is the innermost.
        self._phases: dict[str, _Phase] = {}

    def enter(self, stage: str) -> None:
        """Set what the build waits for until TensorRT reports its own phases."""
        with self._lock:
            self._stage = stage

    def cancel(self) -> None:
        """Ask the build to stop at its next step."""
        self._cancelled.set()

    def progress(self) -> BuildProgress:
        """Return the current progress."""
        with self._lock:
            phases = list(self._phases.values())
            outermost = phases[0] if phases else _Phase("", 0)
            return BuildProgress(
                elapsed_s=time.perf_counter() - self._started,
                phase=outermost.name,
                done=outermost.done,
                total=outermost.total,
                waiting_for=phases[-1].text() if phases else self._stage,
            )

    def monitor(self, module: Any) -> Any:
        """Return an object for `IBuilderConfig.progress_monitor` that reports to this watch."""
        watch = self
        base: Any = module.IProgressMonitor

        class Monitor(base):  # type: ignore[misc]  # its base is known only at run time
            """Forwards TensorRT's phases; called from any of its threads."""

            def __init__(self) -> None:
                # The bindings crash with super(): the class must be named.
                base.__init__(self)

            def phase_start(
                self, phase_name: str, parent_phase: str | None, num_steps: int
            ) -> None:
                """Record that a phase begins."""
                watch.begin(phase_name, num_steps)

            def step_complete(self, phase_name: str, step: int) -> bool:
                """Record that step number `step` is done; return whether to continue."""
                return watch.advance(phase_name, step + 1)

            def phase_finish(self, phase_name: str) -> None:
                """Record that a phase has ended."""
                watch.end(phase_name)

        monitor = Monitor()
        # It must outlive TensorRT's objects that refer to it, and the garbage collector guarantees
        # no order.
        _monitors_alive.append(monitor)
        return monitor

    def begin(self, phase: str, steps: int) -> None:
        """Record that a phase begins."""
        with self._lock:
            self._phases[phase] = _Phase(phase, steps)

    def advance(self, phase: str, done: int) -> bool:
        """Record how many steps of a phase are done; return whether to continue."""
        with self._lock:
            if phase in self._phases:
                self._phases[phase].done = done
        return not self._cancelled.is_set()

    def end(self, phase: str) -> None:
        """Record that a phase has ended."""
        with self._lock:
            self._phases.pop(phase, None)
