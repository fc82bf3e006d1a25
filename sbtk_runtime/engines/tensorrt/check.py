"""Compares a new TensorRT plan with ONNX Runtime on the CPU, on generated images."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sbtk_runtime.bundle import Bundle
from sbtk_runtime.engines import onnxruntime as engine_onnxruntime
from sbtk_runtime.engines.base import EngineOptions, EngineRequest, Notify, no_notify
from sbtk_runtime.engines.cuda import CudaDevice
from sbtk_runtime.engines.registry import Engine, validate_embeddings
from sbtk_runtime.engines.tensorrt.cache import PlanCache
from sbtk_runtime.engines.tensorrt.engine import ReadyPlan, open_plan
from sbtk_runtime.engines.tensorrt.library import TensorRt
from sbtk_runtime.errors import BadModel, EngineUnavailable, MissingExtra
from sbtk_runtime.generated_inputs import generate_photos, generate_sketches
from sbtk_runtime.manifest import Precision
from sbtk_runtime.preprocess import Kind, Pixels, prepare

#: The smallest cosine that a plan's embedding of an image may have with that of the ONNX file it
#: was built from. Both compute in the same precision, but not in the same order.
LEAST_COSINE: Mapping[Precision, float] = {"fp32": 0.9999, "fp16": 0.999, "int8": 0.95}

_OF_EACH_KIND = 4


@dataclass(frozen=True)
class PlanCheck:
    """What came of running a plan.

    Attributes:
        images: that were embedded, half of them sketches.
        cosine_min: the smallest cosine between an image's two embeddings; `None` when there was
            nothing to compare with.
        beside: what it was compared with, or why it was not.
    """

    images: int
    cosine_min: float | None
    beside: str


def require_sound(
    ready: ReadyPlan, bundle: Bundle, trt: TensorRt, device: CudaDevice, notify: Notify = no_notify
) -> PlanCheck:
    """Run a plan and return how close it is to its ONNX file; a plan that fails is removed.

    Args:
        ready: the plan.
        bundle: what it was built from.
        trt: the TensorRT that built it.
        device: the GPU to run it on.
        notify: called with what the engine has to change to make it work.

    Raises:
        EngineUnavailable: it does not load or run on this GPU, or is too far off.
        BadModel: it does not take and give what an engine of sbtk does.
    """
    precision, batch = ready.record.precision, min(32, ready.record.batch_max)
    options = EngineOptions(precision=precision, device=f"cuda:{device.index}", batch=batch)
    request = EngineRequest(bundle, options, form="tensorrt", notify=notify)
    try:
        engine = open_plan(ready.plan, trt, device, request)
        try:
            return check_plan(engine, bundle, precision)
        finally:
            engine.close()
    except (EngineUnavailable, BadModel):
        discard(ready)
        raise


def discard(ready: ReadyPlan) -> None:
    """Remove a plan from the cache, if it was kept there."""
    if ready.kept_in is not None:
        PlanCache(ready.kept_in.parent).discard(ready.record)


def check_plan(engine: Engine, bundle: Bundle, precision: Precision) -> PlanCheck:
    """Return how close an engine's embeddings are to ONNX Runtime's of the same ONNX file.

    Args:
        engine: runs the plan.
        bundle: what the plan was built from.
        precision: of the plan.

    Raises:
        EngineUnavailable: the engine fails, gives rows that are not of length 1, or is too far off.
    """
    images = generate_images()
    rows, is_bad = validate_embeddings(_embedded(engine, images))
    if is_bad.any():
        raise EngineUnavailable(
            f"{engine.info.name} gives {int(is_bad.sum())} of {len(rows)} rows that are not "
            "embeddings",
            "finite rows of length 1",
        )
    request = EngineRequest(bundle, EngineOptions(precision=precision), form=engine.info.form)
    try:
        other = engine_onnxruntime.open_cpu(request)
    except (MissingExtra, EngineUnavailable) as problem:
        return PlanCheck(len(rows), None, f"nothing to compare with: {problem.found}")
    try:
        cosine_min = _least_cosine(rows, _embedded(other, images))
    finally:
        other.close()
    beside = f"{other.info.name} {other.info.version} on the CPU"
    # NaN is not enough either.
    if not cosine_min >= LEAST_COSINE[precision]:
        raise EngineUnavailable(
            f"{engine.info.name} does not compute what {beside} does: embeddings of an image have "
            f"a cosine of {cosine_min:.5f}",
            f"{LEAST_COSINE[precision]} or more for {precision}",
            "report it, with the GPU and the versions that sbtk doctor shows",
        )
    return PlanCheck(len(rows), cosine_min, beside)


def generate_images() -> Mapping[Kind, Pixels]:
    """Return `(4, 224, 224, 3) uint8` of each kind, as they come out of preparation."""
    contents: Mapping[Kind, list[bytes]] = {
        "photo": generate_photos(_OF_EACH_KIND),
        "sketch": generate_sketches(_OF_EACH_KIND),
    }
    return {
        kind: np.stack([prepare(content, kind).pixels for content in of_kind])
        for kind, of_kind in contents.items()
    }


def _embedded(engine: Engine, images: Mapping[Kind, Pixels]) -> NDArray[np.float32]:
    return np.concatenate([engine.run(pixels, kind) for kind, pixels in images.items()])


def _least_cosine(rows: NDArray[np.float32], others: NDArray[np.float32]) -> float:
    # Both are of length 1.
    return float((rows.astype(np.float64) * others).sum(axis=1).min())
