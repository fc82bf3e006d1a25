"""Compare a new TensorRT plan with ONNX Runtime on the CPU, on generated images."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sbtk_runtime.bundle import Bundle
from sbtk_runtime.engines import onnxruntime as engine_onnxruntime
from sbtk_runtime.engines.base import Engine, EngineOptions, EngineRequest, Notify, no_notify
from sbtk_runtime.engines.cuda import CudaDevice
from sbtk_runtime.engines.session import validate_embeddings
from sbtk_runtime.engines.tensorrt.cache import PlanCache
from sbtk_runtime.engines.tensorrt.engine import ReadyPlan, open_plan
from sbtk_runtime.engines.tensorrt.library import TensorRt
from sbtk_runtime.errors import BadModel, EngineUnavailable, MissingExtra
from sbtk_runtime.generated_inputs import generate_photos, generate_sketches
from sbtk_runtime.manifest import Precision
from sbtk_runtime.preprocess import SIZE_PX, Kind, Pixels, Preprocessing
from sbtk_runtime.regions import RegionGrid, input_side

#: Smallest allowed cosine between a plan's embedding of an image and that of its ONNX file. Both
#: compute in the same precision, but not in the same order.
LEAST_COSINE: Mapping[Precision, float] = {"fp32": 0.9999, "fp16": 0.999, "int8": 0.95}

_OF_EACH_KIND = 4


@dataclass(frozen=True)
class PlanCheck:
    """The result of running a plan.

    Attributes:
        images: number of embedded images, half of them sketches.
        cosine_min: smallest cosine between an image's two embeddings; `None` without ONNX Runtime.
        compared_with: what the plan was compared with, or why it was not.
    """

    images: int
    cosine_min: float | None
    compared_with: str


def require_sound(
    ready: ReadyPlan,
    bundle: Bundle,
    trt: TensorRt,
    device: CudaDevice,
    notify: Notify = no_notify,
    regions: RegionGrid | None = None,
) -> PlanCheck:
    """Run a plan and return how close it is to its ONNX file; a plan that fails is removed.

    Args:
        ready: the plan.
        bundle: what it was built from.
        trt: the TensorRT that built it.
        device: the GPU to run it on.
        notify: called with a message when the engine reduces the batch or does without CUDA graphs.
        regions: the windows that it was built for.

    Raises:
        EngineUnavailable: it does not load or run on this GPU, or its embeddings differ too much.
        BadModel: its inputs or outputs are not those of an engine of sbtk.
    """
    precision, batch = ready.record.precision, min(32, ready.record.batch_max)
    options = EngineOptions(precision=precision, device=f"cuda:{device.index}", batch=batch)
    request = EngineRequest(bundle, options, form="tensorrt", notify=notify, regions=regions)
    try:
        engine = open_plan(ready.plan, trt, device, request)
        try:
            return check_plan(engine, bundle, precision, regions)
        finally:
            engine.close()
    except (EngineUnavailable, BadModel):
        discard(ready)
        raise


def discard(ready: ReadyPlan) -> None:
    """Remove a plan from the cache, if it is stored there."""
    if ready.kept_in is not None:
        PlanCache(ready.kept_in.parent).discard(ready.record)


def check_plan(
    engine: Engine, bundle: Bundle, precision: Precision, regions: RegionGrid | None = None
) -> PlanCheck:
    """Return how close an engine's embeddings are to ONNX Runtime's of the same ONNX file.

    Args:
        engine: runs the plan.
        bundle: what the plan was built from.
        precision: of the plan.
        regions: the windows that it embeds; each counts like an image.

    Raises:
        EngineUnavailable: the engine fails, returns rows that are not of length 1, or its
            embeddings differ too much.
    """
    images = generate_images(bundle.preprocessing, input_side(regions))
    rows, is_bad = validate_embeddings(_embed(engine, images))
    if is_bad.any():
        raise EngineUnavailable(
            f"{int(is_bad.sum())} of {len(rows)} rows that {engine.info.name} returns are not "
            "embeddings",
            "finite rows of length 1",
        )
    request = EngineRequest(
        bundle, EngineOptions(precision=precision), form=engine.info.form, regions=regions
    )
    try:
        other = engine_onnxruntime.open_cpu(request)
    except (MissingExtra, EngineUnavailable) as problem:
        return PlanCheck(len(rows), None, f"nothing to compare with: {problem.found}")
    try:
        cosine_min = _least_cosine(rows, _embed(other, images))
    finally:
        other.close()
    reference = f"{other.info.name} {other.info.version} on the CPU"
    # Also true for NaN.
    if not cosine_min >= LEAST_COSINE[precision]:
        raise EngineUnavailable(
            f"{engine.info.name} and {reference} disagree: their embeddings of an image have "
            f"a cosine of {cosine_min:.5f}",
            f"{LEAST_COSINE[precision]} or more for {precision}",
            "report it, with the GPU and the versions that sbtk doctor shows",
        )
    return PlanCheck(len(rows), cosine_min, reference)


def generate_images(preprocessing: Preprocessing, size_px: int = SIZE_PX) -> Mapping[Kind, Pixels]:
    """Return `(4, size_px, size_px, 3) uint8` preprocessed images of each kind."""
    contents: Mapping[Kind, list[bytes]] = {
        "photo": generate_photos(_OF_EACH_KIND),
        "sketch": generate_sketches(_OF_EACH_KIND),
    }
    return {
        kind: np.stack([preprocessing.prepare(each, kind, size_px).pixels for each in of_kind])
        for kind, of_kind in contents.items()
    }


def _embed(engine: Engine, images: Mapping[Kind, Pixels]) -> NDArray[np.float32]:
    return np.concatenate([engine.run(pixels, kind) for kind, pixels in images.items()])


def _least_cosine(rows: NDArray[np.float32], others: NDArray[np.float32]) -> float:
    # All rows are of length 1.
    return float((rows.astype(np.float64) * others).sum(axis=-1).min())
