"""TensorRT plans of a bundle that was just exported, on machines where TensorRT works.

Plans are not part of the bundle; they are stored in this machine's cache. On a machine with a GPU
they are compared with torch, on the same images and with the same limits as the ONNX files.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass

from sbtk_export.export import Exported, Variant
from sbtk_export.parity import LIMITS, Parity, measure_parity
from sbtk_runtime.engines.base import EngineOptions, EngineRequest
from sbtk_runtime.engines.cuda import CudaDevice, find_device
from sbtk_runtime.engines.tensorrt.build import Progress, no_progress
from sbtk_runtime.engines.tensorrt.cache import PlanRecord
from sbtk_runtime.engines.tensorrt.check import discard
from sbtk_runtime.engines.tensorrt.engine import ReadyPlan, open_plan, ready_plan
from sbtk_runtime.engines.tensorrt.library import MODULES, TensorRt, find_tensorrt
from sbtk_runtime.errors import BadModel, EngineUnavailable, MissingExtra
from sbtk_runtime.manifest import Precision
from sbtk_train.progress import Notify

# Plans are built from the files that TensorRT is fast with.
_PRECISION_OF: dict[Variant, Precision] = {"fp16": "fp16", "int8.trt": "int8"}


@dataclass(frozen=True)
class PlanBuilder:
    """A TensorRT that can build plans on this machine, and the GPU to build them for, if any."""

    trt: TensorRt
    device: CudaDevice | None


@dataclass(frozen=True)
class BuiltEngine:
    """A plan of an exported model.

    Attributes:
        record: the plan's model, builder and GPU.
        parity: the running plan compared with torch; `None` if it was not run.
        not_run: why it was not run; empty if it was.
    """

    record: PlanRecord
    parity: Parity | None
    not_run: str


def find_plan_builder(notify: Notify) -> PlanBuilder | None:
    """Return the first TensorRT that can build plans on this machine; `None` if there is none.

    Args:
        notify: called with the reason why an installed one cannot.
    """
    for module in MODULES:
        try:
            trt = find_tensorrt(module)
        except MissingExtra:
            continue
        except EngineUnavailable as problem:
            notify(f"no plan is built by {module}: {problem.found}")
            continue
        try:
            return PlanBuilder(trt, find_device("cuda"))
        except (MissingExtra, EngineUnavailable) as problem:
            if not trt.needs_a_driver_to_build:
                return PlanBuilder(trt, None)
            notify(f"no plan is built by {trt.title}: {problem.found}")
    return None


def build_engines(
    exported: Exported,
    variants: Sequence[Variant],
    builder: PlanBuilder,
    notify: Notify,
    progress: Progress = no_progress,
) -> list[BuiltEngine]:
    """Build the plans of a bundle's FP16 and TensorRT INT8 files in the cache; return them.

    Args:
        exported: the bundle, and the images its ONNX files were measured on.
        variants: the bundle's variants.
        builder: from `find_plan_builder`.
        notify: called with progress messages, and when TensorRT cannot build a plan.
        progress: called with the progress of a build.

    Raises:
        BadModel: TensorRT refuses a file, or a plan exceeds the limits of its precision and was
            deleted from the cache. The bundle is kept: it was checked before.
    """
    engines = []
    for variant in (v for v in variants if v in _PRECISION_OF):
        precision = _PRECISION_OF[variant]
        try:
            ready = ready_plan(
                exported.bundle,
                precision,
                builder.trt,
                builder.device,
                notify=notify,
                progress=progress,
            )
        except (EngineUnavailable, MissingExtra) as problem:
            notify(f"{variant}: no plan was built: {problem.found}")
            continue
        engines.append(_measured(exported, variant, ready, builder, notify))
    return engines


def _measured(
    exported: Exported, variant: Variant, ready: ReadyPlan, builder: PlanBuilder, notify: Notify
) -> BuiltEngine:
    if builder.device is None:
        return BuiltEngine(ready.record, None, "this machine has no GPU to run it on")
    notify(f"{variant}: comparing the plan with torch")
    device, record = builder.device, ready.record
    options = EngineOptions(precision=record.precision, device=f"cuda:{device.index}")
    request = EngineRequest(exported.bundle, options, form="tensorrt", notify=notify)
    try:
        with contextlib.closing(open_plan(ready.plan, builder.trt, device, request)) as engine:
            parity = measure_parity(engine, exported.samples, exported.reference)
    except EngineUnavailable as problem:
        discard(ready)
        return BuiltEngine(record, None, f"it does not run here: {problem.found}")
    misses = parity.misses(LIMITS[variant])
    if misses:
        discard(ready)
        raise BadModel(
            f"the {variant} plan differs from the student: {'; '.join(misses)}",
            f"every limit kept; the plan was deleted, the bundle {exported.bundle.folder} is kept",
            "report it, with the GPU and the versions that sbtk doctor shows",
        )
    return BuiltEngine(record, parity, "")
