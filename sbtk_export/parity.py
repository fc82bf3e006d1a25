"""Parity: differences between exported models and the student in torch, and their limits.

Both get the same pixels, prepared by the runtime. The exported model runs on the runtime's engine.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from sbtk_export.images import ExportImages, ImageSubset
from sbtk_export.onnx_graph import ModelInputs
from sbtk_runtime.binary_codes import Codes
from sbtk_runtime.engines.base import Embeddings, Engine
from sbtk_runtime.errors import BadModel
from sbtk_runtime.evaluation.metrics import evaluate
from sbtk_runtime.evaluation.protocol import Distance, Ties
from sbtk_runtime.preprocess import KINDS
from sbtk_train.batches.augment import normalise
from sbtk_train.models.student import Student

NORM_LIMIT = 1e-3
_TOP = 10
_BATCH = 16


@dataclass(frozen=True)
class Limits:
    """Limits of a precision; `None` is not checked."""

    cosine_min: float
    cosine_mean: float | None = None
    map_difference: float | None = None


_INT8 = Limits(cosine_min=0.95, cosine_mean=0.98, map_difference=0.005)
#: By variant: a precision, or `int8.trt` for TensorRT's own form of INT8.
LIMITS: Mapping[str, Limits] = {
    "fp32": Limits(cosine_min=0.9999),
    "fp16": Limits(cosine_min=0.999),
    "int8": _INT8,
    "int8.trt": _INT8,
}


@dataclass(frozen=True)
class Parity:
    """One model compared with torch in FP32, as recorded in the manifest.

    Attributes:
        images: number of images compared, half of them sketches, each embedded as its own kind.
        cosine_min, cosine_mean: between an image's two embeddings.
        cosine_min_sketches, cosine_min_photos: the same for one kind.
        norm_error: largest `|length - 1|` of a row of the model's output.
        top10_agreement: share of photos that are in a sketch's first ten in both.
        map_torch, map_model: mAP@all (plain AP, mean over sketches) on `ranking_images`.
        ranking_images: number of sketches and photos of seen classes that were ranked.
        engine: the engine and its version.
    """

    images: int
    cosine_min: float
    cosine_mean: float
    cosine_min_sketches: float
    cosine_min_photos: float
    norm_error: float
    top10_agreement: float
    map_torch: float
    map_model: float
    ranking_images: int
    engine: str

    @property
    def map_difference(self) -> float:
        """The model's mAP minus torch's."""
        return self.map_model - self.map_torch

    def misses(self, limits: Limits) -> list[str]:
        """Return a sentence for each limit that is exceeded; NaN exceeds all."""
        judged = [
            ("smallest cosine", self.cosine_min, ">=", limits.cosine_min),
            ("mean cosine", self.cosine_mean, ">=", limits.cosine_mean),
            ("largest |norm - 1|", self.norm_error, "<=", NORM_LIMIT),
            ("difference of mAP", abs(self.map_difference), "<=", limits.map_difference),
        ]
        return [
            f"{name} {value:.6g} is not {relation} {limit:g}"
            for name, value, relation, limit in judged
            if limit is not None and not (value >= limit if relation == ">=" else value <= limit)
        ]


@dataclass(frozen=True)
class Reference:
    """Torch's FP32 embeddings of the parity and the ranking images, `(N, D) float32` unit rows."""

    parity: Embeddings
    ranking: Embeddings


def compute_reference(student: Student, samples: ExportImages) -> Reference:
    """Return torch's embeddings of the images, computed by the code that training uses."""
    parity = embed_with_torch(student, samples.parity.inputs)
    if samples.ranking is samples.parity:
        return Reference(parity, parity)
    return Reference(parity, embed_with_torch(student, samples.ranking.inputs))


def embed_with_torch(student: Student, inputs: ModelInputs) -> Embeddings:
    """Return `(N, D) float32` unit rows of images."""
    student.eval()
    rows = []
    with torch.inference_mode():
        for start in range(0, len(inputs), _BATCH):
            batch = torch.from_numpy(inputs.pixels[start : start + _BATCH]).permute(0, 3, 1, 2)
            domains = torch.from_numpy(inputs.domains[start : start + _BATCH])
            rows.append(student.embed(normalise(batch), domains).numpy())
    return np.concatenate(rows)


def measure_parity(engine: Engine, samples: ExportImages, reference: Reference) -> Parity:
    """Compare an engine's embeddings with torch's.

    Args:
        engine: returns the model's rows without normalising them again.
        samples: the images to compare on.
        reference: torch's embeddings of the same images.
    """
    rows = ranked = _embedded(engine, samples.parity)
    wanted, is_sketch = reference.parity, samples.parity.is_sketch
    if samples.ranking is not samples.parity:
        ranked = _embedded(engine, samples.ranking)
        rows = np.concatenate([rows, ranked])
        wanted = np.concatenate([wanted, reference.ranking])
        is_sketch = np.concatenate([is_sketch, samples.ranking.is_sketch])
    lengths = np.linalg.norm(rows.astype(np.float64), axis=1)
    cosines = row_cosines(rows, wanted)
    return Parity(
        images=len(rows),
        cosine_min=float(cosines.min()),
        cosine_mean=float(cosines.mean()),
        cosine_min_sketches=float(cosines[is_sketch].min()),
        cosine_min_photos=float(cosines[~is_sketch].min()),
        norm_error=float(np.abs(lengths - 1).max()),
        top10_agreement=_top_agreement(ranked, reference.ranking, samples.ranking),
        map_torch=mean_average_precision(reference.ranking, samples.ranking),
        map_model=mean_average_precision(_unit(ranked), samples.ranking),
        ranking_images=len(ranked),
        engine=f"{engine.info.name} {engine.info.version}",
    )


def require_parity(parities: Mapping[str, Parity]) -> None:
    """Check every variant against its limits.

    Raises:
        BadModel: names each exceeded limit, by variant.
    """
    misses = {variant: parity.misses(LIMITS[variant]) for variant, parity in parities.items()}
    reasons = [f"{variant}: {miss}" for variant, found in misses.items() for miss in found]
    if reasons:
        good = [f"--{v.replace('.', '-')}" for v, found in misses.items() if not found]
        others = " ".join(option for option in good if option != "--fp32")
        is_enough = others and not misses.get("fp32")
        raise BadModel(
            "the exported model differs from the student: " + "; ".join(reasons),
            "every limit kept; nothing was written",
            f"sbtk export RUN {others}, which leaves the rest out"
            if is_enough
            else "see the export's notices for images that do not fit",
        )


def mean_average_precision(
    rows: Embeddings | Codes,
    samples: ImageSubset,
    *,
    distance: Distance = "cosine",
    ties: Ties = "index",
) -> float:
    """Return mAP@all (plain AP, mean over sketches) of the samples' sketches among their photos.

    Args:
        rows: embeddings `(N, D) float32` or codes `(N, W) uint8`; NaN in them gives NaN.
        samples: the N images.
        distance: of the rows.
        ties: the order of equal distances.
    """
    if not np.isfinite(rows).all():
        return float("nan")
    is_sketch, labels = samples.is_sketch, samples.labels
    found = evaluate(
        *(rows[is_sketch], labels[is_sketch], rows[~is_sketch], labels[~is_sketch]),
        distance=distance,
        ties=ties,
    )
    return float(found.ap_all.mean())


def row_cosines(rows: Embeddings, wanted: Embeddings) -> NDArray[np.float64]:
    """Return the cosines `(...,) float64` of two sets of rows `(..., D)`; NaN for zero rows."""
    a, b = rows.astype(np.float64), wanted.astype(np.float64)
    with np.errstate(invalid="ignore", divide="ignore"):
        lengths = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
        return np.asarray((a * b).sum(axis=-1) / lengths)


def _embedded(engine: Engine, samples: ImageSubset) -> Embeddings:
    """Return an engine's `(N, D) float32` for images, each embedded as its own kind."""
    rows = np.empty((len(samples), engine.info.dim), dtype=np.float32)
    for kind in KINDS:
        of_kind = samples.is_sketch if kind == "sketch" else ~samples.is_sketch
        rows[of_kind] = engine.run(samples.pixels[of_kind], kind)
    return rows


def _unit(rows: Embeddings) -> Embeddings:
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray(rows / np.linalg.norm(rows, axis=1, keepdims=True), dtype=np.float32)


def _top_agreement(rows: Embeddings, wanted: Embeddings, samples: ImageSubset) -> float:
    first, wanted_first = (_first_photos(each, samples) for each in (_unit(rows), wanted))
    pairs = zip(first, wanted_first, strict=True)
    shares = [len(np.intersect1d(found, expected)) / len(expected) for found, expected in pairs]
    return float(np.mean(shares))


def _first_photos(rows: Embeddings, samples: ImageSubset) -> NDArray[np.int64]:
    """Return `(sketches, 10) int64`: each sketch's ten nearest photos."""
    scores = rows[samples.is_sketch] @ rows[~samples.is_sketch].T
    return np.argsort(-scores, axis=1, kind="stable")[:, :_TOP]
