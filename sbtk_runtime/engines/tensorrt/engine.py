"""The engines TensorRT and TensorRT-RTX, which run a cached plan on a GPU without torch."""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import shlex
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sbtk_runtime.bundle import Bundle
from sbtk_runtime.engines.base import (
    PROBE_GRAPH,
    PROBE_INPUT,
    PROBE_OUTPUT,
    EngineInfo,
    EngineRequest,
    Notify,
    check_probe_answer,
    no_notify,
    probe_question,
)
from sbtk_runtime.engines.cuda import (
    CudaDevice,
    DeviceResources,
    OutOfDeviceMemory,
    checked,
    find_device,
    make_current,
)
from sbtk_runtime.engines.tensorrt.build import (
    BuildProgress,
    BuildSettings,
    BuiltPlan,
    Progress,
    build_plan,
    notify_every,
)
from sbtk_runtime.engines.tensorrt.cache import (
    NO_DEVICE,
    CachedPlan,
    PlanCache,
    PlanCacheUnusable,
    PlanRecord,
    PlanWanted,
    cache_folder,
)
from sbtk_runtime.engines.tensorrt.library import (
    MODULES,
    TensorRt,
    find_tensorrt,
    join_lines,
    recording_logger,
)
from sbtk_runtime.engines.tensorrt.pipeline import FREE_MEMORY, DeviceTimes, Network, Pipeline
from sbtk_runtime.errors import DiskFull, EngineUnavailable, GalleryBusy, SbtkError
from sbtk_runtime.machine import installed_versions
from sbtk_runtime.manifest import Precision
from sbtk_runtime.preprocess import Kind
from sbtk_runtime.region_graph import region_graph
from sbtk_runtime.regions import RegionGrid


def open_tensorrt(request: EngineRequest, module: str = "tensorrt") -> TensorRtEngine:
    """Return an engine that runs the bundle's model on TensorRT; build its plan if there is none.

    Args:
        request: the model, and how to run it.
        module: `tensorrt` or `tensorrt_rtx`.

    Raises:
        MissingExtra: TensorRT or cuda-bindings is not installed.
        EngineUnavailable: no GPU works, there is no plan and none may be built, or TensorRT fails;
            the message has the library's log lines.
        BadModel: the bundle has no such ONNX file for TensorRT, or TensorRT refuses it.
        BadConfig: `device` does not name a GPU.
    """
    trt, device = _find_library_and_device(module, request.device)
    ready = ready_plan(
        request.bundle,
        request.precision,
        trt,
        device,
        may_build=request.may_build,
        batch=request.options.batch,
        notify=request.notify,
        regions=request.regions,
    )
    return open_plan(ready.plan, trt, device, request)


def open_plan(
    plan: bytes, trt: TensorRt, device: CudaDevice, request: EngineRequest
) -> TensorRtEngine:
    """Return an engine that runs this plan.

    Args:
        plan: of the request's model. Loading it runs native code, so it must come from our own
            cache or build.
        trt: the TensorRT that built it.
        device: the GPU to run it on, from `find_device`.
        request: the model, and how to run it.

    Raises:
        EngineUnavailable: TensorRT refuses the plan, or the GPU lacks memory for it.
        BadModel: the plan's inputs or outputs are not those of the model.
    """
    make_current(device.index)
    dim, domain_input = request.bundle.manifest.dim, request.bundle.manifest.domain_input
    network = Network(trt, plan, dim, domain_input, request.regions)
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
        regions=request.regions,
    )
    if request.options.batch > network.largest:
        request.notify(
            f"the plan takes {network.largest} images at once, so a batch of "
            f"{request.options.batch} is split; sbtk engine build --batch makes a larger plan"
        )
    return TensorRtEngine(network, device, info, request.options.batch, request.notify)


def probe_tensorrt(module: str = "tensorrt") -> str:
    """Build a small graph, run it on a GPU, and return the version of TensorRT or TensorRT-RTX.

    Raises:
        MissingExtra: TensorRT or cuda-bindings is not installed.
        EngineUnavailable: no GPU works, or a step failed; the message has TensorRT's log lines.
    """
    trt, device = _find_library_and_device(module, "cuda")
    _Probe(trt).run(device)
    return trt.version


class TensorRtEngine:
    """One plan on one GPU; see `sbtk_runtime.engines.base.Engine`.

    Batches of any size are split into chunks of at most `largest_batch` images.

    Args:
        network: the loaded plan; the engine closes it.
        device: the GPU that it was loaded on.
        info: the engine's metadata.
        batch: maximum size of a chunk; less if the plan or the GPU's memory requires it.
        notify: called if it has to be less, and if CUDA graphs do not work.

    Raises:
        EngineUnavailable: not even one image fits, or TensorRT fails; the network is closed.
    """

    def __init__(
        self, network: Network, device: CudaDevice, info: EngineInfo, batch: int, notify: Notify
    ) -> None:
        self.info = info
        self._network = network
        self._device = device
        self._notify = notify
        self._lock = threading.Lock()
        self._pipeline: Pipeline | None = None
        try:
            self._pipeline = self._make_pipeline(max(network.smallest, min(batch, network.largest)))
        except BaseException:
            network.close()
            raise

    @property
    def largest_batch(self) -> int:
        """Number of images that the GPU takes at once; 0 when the engine is closed."""
        pipeline = self._pipeline
        return 0 if pipeline is None else pipeline.largest

    def run(self, images: NDArray[np.uint8], kind: Kind) -> NDArray[np.float32]:
        """Return the embeddings `(N, D) float32` of `images (N, 224, 224, 3) uint8` of a kind.

        Thread-safe; one call runs at a time.

        Raises:
            EngineUnavailable: TensorRT or CUDA failed, or the engine is closed.
        """
        return self._run(images, kind, timed=False)[0]

    def run_timed(
        self, images: NDArray[np.uint8], kind: Kind
    ) -> tuple[NDArray[np.float32], DeviceTimes]:
        """Return what `run` does, `(N, D) float32`, and the times by the GPU's clock.

        With several chunks the times are sums, although copies and computation overlap.
        """
        return self._run(images, kind, timed=True)

    def close(self) -> None:
        """Free the plan and all memory on the GPU; a second call does nothing."""
        with self._lock:
            self._close()

    def _run(
        self, images: NDArray[np.uint8], kind: Kind, *, timed: bool
    ) -> tuple[NDArray[np.float32], DeviceTimes]:
        image = self._network.image
        if images.dtype != np.uint8 or images.shape[1:] != image:
            raise EngineUnavailable(
                f"{self.info.name} failed on {len(images)} images: they are {images.dtype} "
                f"{images.shape}",
                f"uint8 (N, {', '.join(map(str, image))})",
            )
        with self._lock:
            while self._pipeline is not None:
                # Each thread has its own current GPU.
                make_current(self._device.index)
                try:
                    return self._pipeline.run(images, kind, timed=timed)
                except OutOfDeviceMemory as problem:
                    self._shrink(problem)
        raise EngineUnavailable(f"the engine {self.info.name} is closed", "an open engine")

    def _shrink(self, problem: OutOfDeviceMemory) -> None:
        """Continue with half the batch, after another program has taken memory."""
        assert self._pipeline is not None
        largest = self._pipeline.largest
        self._pipeline.close()
        try:
            self._pipeline = self._make_pipeline(self._halve(largest, problem))
        except BaseException:
            self._close()
            raise

    def _make_pipeline(self, largest: int) -> Pipeline:
        """Return a pipeline for the largest batch, halved as often as needed, that fits."""
        while True:
            try:
                return Pipeline(self._network, self._device.index, largest, self._notify)
            except OutOfDeviceMemory as problem:
                largest = self._halve(largest, problem)

    def _halve(self, largest: int, problem: OutOfDeviceMemory) -> int:
        if largest == self._network.smallest:
            raise EngineUnavailable(
                f"{self._device.name} has too little free memory for a batch of {largest} with "
                f"{self.info.name}: {problem.found}",
                "a GPU with more free memory",
                FREE_MEMORY,
            ) from problem
        half = max(self._network.smallest, largest // 2)
        self._notify(
            f"{self.info.name} takes {half} images at once instead of {largest}: "
            f"{self._device.name} has too little free memory"
        )
        return half

    def _close(self) -> None:
        if self._pipeline is not None:
            self._pipeline.close()
            self._pipeline = None
        self._network.close()


def _find_library_and_device(module: str, device_name: str) -> tuple[TensorRt, CudaDevice]:
    """Return the library and the GPU, and make it the calling thread's.

    The driver is called before any object of TensorRT exists: without a driver, some of TensorRT's
    libraries end the process.
    """
    trt = find_tensorrt(module)
    device = find_device(device_name)
    make_current(device.index)
    return trt, device


class _Probe:
    """Builds, loads and runs the probe graph on the calling thread's GPU."""

    def __init__(self, trt: TensorRt) -> None:
        self._trt = trt
        self._logger = recording_logger(trt)

    def run(self, device: CudaDevice) -> None:
        runtime = self._trt.module.Runtime(self._logger)
        loaded = runtime.deserialize_cuda_engine(self._plan())
        network = self._require(loaded, "load a plan that it built")
        resources = DeviceResources(device.index)
        try:
            check_probe_answer(self._answer(network, resources), self._trt.title)
        finally:
            resources.close()

    def _plan(self) -> Any:
        module = self._trt.module
        builder = self._require(module.Builder(self._logger), "make a builder")
        typed = 1 << int(module.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
        network = self._require(builder.create_network(typed), "make a network")
        parser = self._require(module.OnnxParser(network, self._logger), "make a parser")
        if not parser.parse(PROBE_GRAPH):
            raise self._failed("parse a graph")
        config = self._require(builder.create_builder_config(), "make a configuration")
        return self._require(builder.build_serialized_network(network, config), "build a plan")

    def _answer(self, network: Any, resources: DeviceResources) -> np.ndarray[Any, Any]:
        cuda, question = resources.cuda, probe_question()
        host = resources.pinned(question.shape, question.dtype)
        source, target = resources.memory(host.array.nbytes), resources.memory(host.array.nbytes)
        stream = resources.stream()
        context = self._require(network.create_execution_context(), "make a context")
        context.set_tensor_address(PROBE_INPUT, source)
        context.set_tensor_address(PROBE_OUTPUT, target)
        host.array[:] = question
        kinds = cuda.cudaMemcpyKind
        size = host.array.nbytes
        to_device = (source, host.address, size, kinds.cudaMemcpyHostToDevice, stream)
        to_host = (host.address, target, size, kinds.cudaMemcpyDeviceToHost, stream)
        try:
            checked(cuda.cudaMemcpyAsync(*to_device))
            if not context.execute_async_v3(int(stream)):
                raise self._failed("run a graph")
            checked(cuda.cudaMemcpyAsync(*to_host))
            checked(cuda.cudaStreamSynchronize(stream))
        finally:
            # The buffers are freed next, even after an error.
            cuda.cudaStreamSynchronize(stream)
            del context
        return host.array.copy()

    def _require(self, thing: Any, purpose: str) -> Any:
        if thing is None:
            raise self._failed(purpose)
        return thing

    def _failed(self, purpose: str) -> EngineUnavailable:
        return EngineUnavailable(
            f"{self._trt.title} could not {purpose}:{join_lines(self._logger.problems())}",
            "a GPU that this version supports",
            "sbtk doctor shows which engines work here",
        )


_TRY_LOCK_EVERY_S = 0.5


@dataclass(frozen=True)
class ReadyPlan:
    """A plan for this machine.

    Attributes:
        plan: the serialised plan.
        record: the model, software and settings that it was built with.
        is_new: whether it has just been built.
        kept_in: its file in the cache; `None` if the cache cannot be used.
    """

    plan: bytes
    record: PlanRecord
    is_new: bool
    kept_in: Path | None


def ready_plan(
    bundle: Bundle,
    precision: Precision,
    trt: TensorRt,
    device: CudaDevice | None,
    settings: BuildSettings | None = None,
    *,
    may_build: bool = True,
    batch: int = 1,
    notify: Notify = no_notify,
    progress: Progress | None = None,
    regions: RegionGrid | None = None,
) -> ReadyPlan:
    """Return a plan of the model from the cache, or build one and store it there.

    If another process is building a plan, wait for it.

    Args:
        bundle: the model.
        precision: of its ONNX file for TensorRT.
        trt: the TensorRT that will load the plan.
        device: the GPU that will run it. With `None`, TensorRT takes the first GPU, and
            TensorRT-RTX builds without one.
        settings: how the plan must be built; `None` for any, and the defaults for a new one.
        may_build: whether to build a plan if the cache has none, which takes a minute or so.
        batch: prefer a plan that takes so many images at once.
        notify: called with what is built and why, and if it cannot be stored.
        progress: called with a build's progress a few times a second; by default `notify` is called
            every ten seconds.
        regions: build the plan that embeds these windows instead of the whole frame.

    Raises:
        BadModel: the bundle has no such ONNX file for TensorRT, or TensorRT refuses it.
        EngineUnavailable: there is no plan and none may be built; or the build failed; or TensorRT
            needs a driver and there is none.
        MissingExtra: TensorRT needs a driver, and cuda-bindings is not installed.
    """
    onnx_path = bundle.onnx_path(precision, "tensorrt")
    if device is None and trt.needs_a_driver_to_build:
        device = find_device("cuda")
    wanted = PlanWanted(
        # From the manifest; the file itself is read and verified only for a build.
        onnx_sha256=_sha256_with(bundle.manifest.files[onnx_path.name].sha256, regions),
        precision=precision,
        module=trt.name,
        version=trt.version,
        device=NO_DEVICE if device is None else device.name,
        compute_capability="" if device is None else device.compute_capability,
        batch=batch,
        settings=settings,
    )
    build = settings or BuildSettings()
    order = _Order(bundle, trt, device, wanted, build, notify, progress, regions)
    try:
        cache = PlanCache(cache_folder())
        search = cache.find(wanted)
        if search.found is not None:
            return _reuse(search.found)
        if not may_build:
            raise _no_plan_error(order, "; ".join(search.passed_over))
        for reason in search.passed_over:
            notify(f"a cached plan is not used: {reason}")
        with _hold_build_lock(cache, order):
            found = cache.find(wanted).found
            if found is not None:
                return _reuse(found)
            return _build_and_store(cache, order)
    except PlanCacheUnusable as problem:
        if not may_build:
            raise _no_plan_error(order, problem.found) from problem
        built = _build(order, timing_cache=b"")
        return _use_without_storing(built, order, problem)


@dataclass(frozen=True)
class _Order:
    """A plan to build."""

    bundle: Bundle
    trt: TensorRt
    device: CudaDevice | None
    wanted: PlanWanted
    settings: BuildSettings
    notify: Notify
    progress: Progress | None
    regions: RegionGrid | None = None

    def report_progress(self) -> Progress:
        """Return the function to call with the progress."""
        return self.progress or notify_every(10.0, self.notify)


@contextlib.contextmanager
def _hold_build_lock(cache: PlanCache, order: _Order) -> Iterator[None]:
    """Hold the cache's lock; wait for it if another process holds it."""
    report, started = order.report_progress(), time.perf_counter()
    with contextlib.ExitStack() as stack:
        while True:
            try:
                stack.enter_context(cache.lock())
                break
            except GalleryBusy:
                elapsed_s = time.perf_counter() - started
                report(BuildProgress(elapsed_s, "", 0, 0, "another sbtk that is building a plan"))
                time.sleep(_TRY_LOCK_EVERY_S)
            except SbtkError as problem:
                raise PlanCacheUnusable(*problem.args) from problem
        yield


def _build_and_store(cache: PlanCache, order: _Order) -> ReadyPlan:
    wanted = order.wanted
    machine = (wanted.module, wanted.version, wanted.compute_capability)
    built = _build(order, cache.timing_cache(*machine))
    record = _make_record(order, built)
    try:
        kept_in = cache.store(record, built.plan)
        if built.timing_cache:
            cache.store_timing_cache(*machine, built.timing_cache)
    except (PlanCacheUnusable, DiskFull) as problem:
        return _use_without_storing(built, order, problem)
    order.notify(f"the plan was built in {built.build_s:.1f} s and is kept in {kept_in}")
    return ReadyPlan(built.plan, record, is_new=True, kept_in=kept_in)


def _build(order: _Order, timing_cache: bytes) -> BuiltPlan:
    settings, wanted = order.settings, order.wanted
    batches = f"{settings.batch_min}, {settings.batch_opt}, {settings.batch_max}"
    what = "plan" if order.regions is None else f"plan for {len(order.regions)} regions"
    order.notify(
        f"building the {wanted.precision} {what} of {order.bundle.manifest.model_id} with "
        f"{order.trt.title} for batches of {batches}; it may take some minutes"
    )
    content = order.bundle.read_onnx(wanted.precision, "tensorrt")
    name = str(order.bundle.onnx_path(wanted.precision, "tensorrt"))
    if order.regions is not None:
        content = region_graph(content, order.regions, order.bundle.manifest.dim, name)
    return build_plan(
        order.trt,
        content,
        settings,
        timing_cache=timing_cache,
        progress=order.report_progress(),
        device=order.device,
        name=name,
        domain_input=order.bundle.manifest.domain_input,
        regions=order.regions,
    )


def _sha256_with(onnx_sha256: str, regions: RegionGrid | None) -> str:
    """Return the key of a plan's graph: the file's SHA-256, or with regions one of both."""
    if regions is None:
        return onnx_sha256
    return hashlib.sha256(f"{onnx_sha256} {regions}".encode()).hexdigest()


def _reuse(found: CachedPlan) -> ReadyPlan:
    return ReadyPlan(found.plan, found.record, is_new=False, kept_in=found.path)


def _use_without_storing(built: BuiltPlan, order: _Order, problem: SbtkError) -> ReadyPlan:
    order.notify(f"the plan is not kept, and will be built again next time: {problem.found}")
    return ReadyPlan(built.plan, _make_record(order, built), is_new=True, kept_in=None)


def _make_record(order: _Order, built: BuiltPlan) -> PlanRecord:
    wanted = order.wanted
    return PlanRecord(
        model_id=order.bundle.manifest.model_id,
        onnx_sha256=wanted.onnx_sha256,
        precision=wanted.precision,
        module=wanted.module,
        version=wanted.version,
        device=wanted.device,
        compute_capability=wanted.compute_capability,
        settings=order.settings,
        plan_sha256=hashlib.sha256(built.plan).hexdigest(),
        plan_bytes=len(built.plan),
        created=datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        build_s=round(built.build_s, 3),
        sbtk_version=installed_versions(("sbtk",)).get("sbtk", "unknown"),
    )


def _no_plan_error(order: _Order, why: str) -> EngineUnavailable:
    wanted = order.wanted
    reasons = f" ({why})" if why else ""
    options = ["--precision", wanted.precision]
    if wanted.module != MODULES[0]:
        options += ["--module", wanted.module]
    if order.device is not None and order.device.index > 0:
        options += ["--device", f"cuda:{order.device.index}"]
    return EngineUnavailable(
        f"no plan yet of {order.bundle.manifest.model_id} in {wanted.precision} for "
        f"{order.trt.title}{reasons}",
        "a plan that was built for this machine",
        shlex.join(["sbtk", "engine", "build", str(order.bundle.folder), *options]),
    )
