"""A TensorRT plan that may be loaded here: from the cache, or else built and kept there."""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import shlex
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from sbtk_runtime.bundle import Bundle
from sbtk_runtime.engines.cuda_device import CudaDevice, find_device
from sbtk_runtime.engines.engine_request import Said, said_nothing
from sbtk_runtime.engines.plan_build import BuildSettings, BuiltPlan, build_plan
from sbtk_runtime.engines.plan_cache import CachedPlan, PlanCache, PlanCacheUnusable, cache_folder
from sbtk_runtime.engines.plan_progress import BuildProgress, Progress
from sbtk_runtime.engines.plan_record import NO_DEVICE, PlanRecord, PlanWanted
from sbtk_runtime.engines.tensorrt_library import MODULES, TensorRt
from sbtk_runtime.errors import DiskFull, EngineUnavailable, GalleryBusy, SbtkError
from sbtk_runtime.machine import installed_versions
from sbtk_runtime.manifest import Precision

_SAID_EVERY_S = 10.0
_LOCK_TRIED_EVERY_S = 0.5


@dataclass(frozen=True)
class ReadyPlan:
    """A plan for this machine.

    Attributes:
        plan: to be given to `deserialize_cuda_engine`.
        record: what it was built from, by what and how.
        is_new: it was built just now.
        kept_in: the file in the cache; `None` when the cache cannot be used.
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
    said: Said = said_nothing,
    progress: Progress | None = None,
) -> ReadyPlan:
    """Returns a plan of the model from the cache, or builds one and keeps it there.

    While another process builds, this one waits for it.

    Args:
        bundle: the model.
        precision: of its ONNX file for TensorRT.
        trt: the TensorRT that is to load the plan.
        device: the GPU that is to run it. `None`: TensorRT takes the first GPU, and TensorRT-RTX
            builds without one.
        settings: how the plan has to be built; with `None` any will do, and a new one is built
            with the defaults.
        may_build: whether to build one, for a minute or so, when the cache has none.
        batch: with several plans to choose from, one for as many images at once is preferred.
        said: told what is built and why, and when it cannot be kept.
        progress: told a few times a second how far a build is; by default `said` is, every ten
            seconds.

    Raises:
        BadModel: the bundle has no such ONNX file for TensorRT, or TensorRT refuses it.
        EngineUnavailable: there is no plan yet and none may be built; or the build failed; or
            TensorRT needs a driver and there is none.
        MissingExtra: TensorRT needs a driver, and cuda-bindings is not installed.
    """
    onnx_path = bundle.onnx_path(precision, "tensorrt")
    if device is None and trt.needs_a_driver_to_build:
        device = find_device("cuda")
    wanted = PlanWanted(
        # The manifest vouches for the file; its content is read only for a build.
        onnx_sha256=bundle.manifest.files[onnx_path.name].sha256,
        precision=precision,
        module=trt.name,
        version=trt.version,
        device=NO_DEVICE if device is None else device.name,
        compute_capability="" if device is None else device.compute_capability,
        batch=batch,
        settings=settings,
    )
    order = _Order(bundle, trt, device, wanted, settings or BuildSettings(), said, progress)
    try:
        cache = PlanCache(cache_folder())
        search = cache.find(wanted)
        if search.found is not None:
            return _from_cache(search.found)
        if not may_build:
            raise _no_plan_yet(order, "; ".join(search.passed_over))
        for reason in search.passed_over:
            said(f"a cached plan is not used: {reason}")
        with _only_builder(cache, order):
            found = cache.find(wanted).found
            if found is not None:
                return _from_cache(found)
            return _built_and_kept(cache, order)
    except PlanCacheUnusable as problem:
        if not may_build:
            raise _no_plan_yet(order, problem.found) from problem
        built = _built(order, timing_cache=b"")
        return _unkept(built, order, problem)


@dataclass(frozen=True)
class _Order:
    """A plan that is to be built."""

    bundle: Bundle
    trt: TensorRt
    device: CudaDevice | None
    wanted: PlanWanted
    settings: BuildSettings
    said: Said
    progress: Progress | None

    def tell(self) -> Progress:
        """Returns whom to tell the progress."""
        return self.progress or _saying_now_and_then(self.said)


@contextlib.contextmanager
def _only_builder(cache: PlanCache, order: _Order) -> Iterator[None]:
    """Holds the cache's lock, once whoever else holds it has let go of it."""
    tell, started = order.tell(), time.perf_counter()
    with contextlib.ExitStack() as stack:
        while True:
            try:
                stack.enter_context(cache.lock())
                break
            except GalleryBusy:
                elapsed_s = time.perf_counter() - started
                tell(BuildProgress(elapsed_s, "", 0, 0, "another sbtk that is building a plan"))
                time.sleep(_LOCK_TRIED_EVERY_S)
            except SbtkError as problem:
                raise PlanCacheUnusable(*problem.args) from problem
        yield


def _built_and_kept(cache: PlanCache, order: _Order) -> ReadyPlan:
    wanted = order.wanted
    machine = (wanted.module, wanted.version, wanted.compute_capability)
    built = _built(order, cache.timing_cache(*machine))
    record = _record(order, built)
    try:
        kept_in = cache.store(record, built.plan)
        if built.timing_cache:
            cache.store_timing_cache(*machine, built.timing_cache)
    except (PlanCacheUnusable, DiskFull) as problem:
        return _unkept(built, order, problem)
    order.said(f"the plan was built in {built.build_s:.1f} s and is kept in {kept_in}")
    return ReadyPlan(built.plan, record, is_new=True, kept_in=kept_in)


def _built(order: _Order, timing_cache: bytes) -> BuiltPlan:
    settings, wanted = order.settings, order.wanted
    batches = f"{settings.batch_min}, {settings.batch_opt}, {settings.batch_max}"
    order.said(
        f"building the {wanted.precision} plan of {order.bundle.manifest.model_id} with "
        f"{order.trt.title} for batches of {batches}; it may take some minutes"
    )
    return build_plan(
        order.trt,
        order.bundle.checked_content(wanted.precision, "tensorrt"),
        settings,
        timing_cache=timing_cache,
        progress=order.tell(),
        device=order.device,
        name=str(order.bundle.onnx_path(wanted.precision, "tensorrt")),
        domain_input=order.bundle.manifest.domain_input,
    )


def _from_cache(found: CachedPlan) -> ReadyPlan:
    return ReadyPlan(found.plan, found.record, is_new=False, kept_in=found.path)


def _unkept(built: BuiltPlan, order: _Order, problem: SbtkError) -> ReadyPlan:
    order.said(f"the plan is not kept, and will be built again next time: {problem.found}")
    return ReadyPlan(built.plan, _record(order, built), is_new=True, kept_in=None)


def _record(order: _Order, built: BuiltPlan) -> PlanRecord:
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


def _no_plan_yet(order: _Order, why: str) -> EngineUnavailable:
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


def _saying_now_and_then(said: Said) -> Progress:
    last_s = 0.0

    def say(progress: BuildProgress) -> None:
        nonlocal last_s
        if progress.elapsed_s - last_s >= _SAID_EVERY_S:
            last_s = progress.elapsed_s
            said(progress.sentence())

    return say
