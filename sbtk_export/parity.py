"""Parity: the distance of exported models from the student in torch, and its limits.

Both see the same pixels, prepared by the runtime; the exported side is the runtime's own engine.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from sbtk_export.images import ExportImages, ImageSubset
from sbtk_export.onnx_graph import ModelInputs
from sbtk_runtime.engines.registry import Embeddings, Engine
from sbtk_runtime.errors import BadModel
from sbtk_runtime.evaluation.metrics import evaluate
from sbtk_runtime.preprocess import KINDS
from sbtk_train.batches.augment import normalise
from sbtk_train.models.student import Student

NORM_LIMIT = 1e-3
_TOP = 10
_BATCH = 16


@dataclass(frozen=True)
class Limits:
    """The limits of a precision; `None` is not checked."""

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
        cosine_min_sketches, cosine_min_photos: likewise, of one kind alone.
        norm_error: largest `|length - 1|` of a row, as the model gives it.
        top10_agreement: share of a sketch's first ten photos that both rank there.
        map_torch, map_model: mAP@all (plain AP, mean over sketches) on `ranking_images`.
        ranking_images: sketches and photos of seen classes that were ranked.
        engine: what ran the model, with its version.
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
        """The model's mAP less torch's."""
        return self.map_model - self.map_torch

    def misses(self, limits: Limits) -> list[str]:
        """Return a sentence for each limit that is not kept; NaN keeps none."""
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
    """Embeddings of the images by torch in FP32: `(N, D) float32` unit rows each."""

    parity: Embeddings
    ranking: Embeddings


def compute_reference(student: Student, samples: ExportImages) -> Reference:
    """Return torch's embeddings of the images, by the code that training runs."""
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
    """Return how far an engine's embeddings are from torch's.

    Args:
        engine: returns rows as the model makes them, not normalised again.
        samples: the images to compare on.
        reference: torch's embeddings of the same images.
    """
    rows = _embedded(engine, samples.parity)
    is_ranking_apart = samples.ranking is not samples.parity
    ranked = _embedded(engine, samples.ranking) if is_ranking_apart else rows
    every = np.concatenate([rows, ranked]) if is_ranking_apart else rows
    wanted, is_sketch = reference.parity, samples.parity.is_sketch
    if is_ranking_apart:
        wanted = np.concatenate([wanted, reference.ranking])
        is_sketch = np.concatenate([is_sketch, samples.ranking.is_sketch])
    lengths = np.linalg.norm(every.astype(np.float64), axis=1)
    cosines = _cosines(every, wanted)
    return Parity(
        images=len(every),
        cosine_min=float(cosines.min()),
        cosine_mean=float(cosines.mean()),
        cosine_min_sketches=float(cosines[is_sketch].min()),
        cosine_min_photos=float(cosines[~is_sketch].min()),
        norm_error=float(np.abs(lengths - 1).max()),
        top10_agreement=_top_agreement(ranked, reference.ranking, samples.ranking),
        map_torch=_map_all(reference.ranking, samples.ranking),
        map_model=_map_all(_unit(ranked), samples.ranking),
        ranking_images=len(ranked),
        engine=f"{engine.info.name} {engine.info.version}",
    )


def require_parity(parities: Mapping[str, Parity]) -> None:
    """Check every variant against its limits.

    Raises:
        BadModel: names each limit that is not kept, by variant.
    """
    misses = {variant: parity.misses(LIMITS[variant]) for variant, parity in parities.items()}
    told = [f"{variant}: {miss}" for variant, found in misses.items() for miss in found]
    if told:
        good = [f"--{v.replace('.', '-')}" for v, found in misses.items() if not found]
        others = " ".join(option for option in good if option != "--fp32")
        is_enough = others and not misses.get("fp32")
        raise BadModel(
            "the exported model differs from the student: " + "; ".join(told),
            "every limit kept; nothing was written",
            f"sbtk export RUN {others}, which leaves the rest out"
            if is_enough
            else "see the export's notices for images that do not fit",
        )


def _embedded(engine: Engine, samples: ImageSubset) -> Embeddings:
    """Return an engine's `(N, D) float32` for images, each embedded as what it is."""
    rows = np.empty((len(samples), engine.info.dim), dtype=np.float32)
    for kind in KINDS:
        of_kind = samples.is_sketch if kind == "sketch" else ~samples.is_sketch
        rows[of_kind] = engine.run(samples.pixels[of_kind], kind)
    return rows


def _cosines(rows: Embeddings, wanted: Embeddings) -> NDArray[np.float64]:
    a, b = rows.astype(np.float64), wanted.astype(np.float64)
    lengths = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray((a * b).sum(axis=1) / lengths)


def _unit(rows: Embeddings) -> Embeddings:
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray(rows / np.linalg.norm(rows, axis=1, keepdims=True), dtype=np.float32)


def _top_agreement(rows: Embeddings, wanted: Embeddings, samples: ImageSubset) -> float:
    is_sketch = samples.is_sketch
    shares = []
    for found, expected in zip(
        _first_photos(_unit(rows), is_sketch), _first_photos(wanted, is_sketch), strict=True
    ):
        shares.append(len(np.intersect1d(found, expected)) / len(expected))
    return float(np.mean(shares))


def _first_photos(rows: Embeddings, is_sketch: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Return `(sketches, 10) int64`: the photos that each sketch ranks first."""
    scores = rows[is_sketch] @ rows[~is_sketch].T
    return np.argsort(-scores, axis=1, kind="stable")[:, :_TOP]


def _map_all(rows: Embeddings, samples: ImageSubset) -> float:
    is_sketch, labels = samples.is_sketch, samples.labels
    if not np.isfinite(rows).all():
        return float("nan")
    retrieval = evaluate(rows[is_sketch], labels[is_sketch], rows[~is_sketch], labels[~is_sketch])
    return float(retrieval.ap_all.mean())
