"""Parity metrics, compared with plain loops, and their limits."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from sbtk_export.images import ExportImages, ImageSubset
from sbtk_export.parity import LIMITS, Parity, Reference, measure_parity, require_parity
from sbtk_runtime.engines.base import EngineInfo
from sbtk_runtime.errors import BadModel
from sbtk_runtime.evaluation.metrics import Embeddings
from sbtk_runtime.manifest import Precision
from sbtk_runtime.preprocess import KINDS, Kind, Pixels

GOOD = Parity(
    images=200,
    cosine_min=1.0,
    cosine_mean=1.0,
    cosine_min_sketches=1.0,
    cosine_min_photos=1.0,
    norm_error=0.0,
    top10_agreement=1.0,
    map_torch=0.5,
    map_model=0.5,
    ranking_images=200,
    engine="onnxruntime 1",
)


@pytest.mark.parametrize(
    ("precision", "change", "miss"),
    [
        ("fp32", {"cosine_min": 0.9998}, "fp32: smallest cosine"),
        ("fp16", {"cosine_min": 0.9989}, "fp16: smallest cosine"),
        ("int8", {"cosine_min": 0.949}, "int8: smallest cosine"),
        ("int8", {"cosine_mean": 0.979}, "int8: mean cosine"),
        ("int8", {"map_model": 0.494}, "int8: difference of mAP"),
        ("int8", {"norm_error": 0.0011}, "int8: largest |norm - 1|"),
        ("fp32", {"norm_error": float("nan")}, "fp32: largest |norm - 1| nan"),
    ],
)
def test_a_limit_that_is_exceeded_is_named(
    precision: Precision, change: dict[str, float], miss: str
) -> None:
    with pytest.raises(BadModel) as caught:
        require_parity({"fp32": GOOD, precision: replace(GOOD, **change)})  # type: ignore[arg-type]
    assert miss in caught.value.found
    assert caught.value.found.count("is not") == 1


@pytest.mark.parametrize(
    ("bad", "next_step"),
    [
        (("int8",), "sbtk export RUN --fp16 --int8-trt, which leaves the rest out"),
        (("fp16", "int8.trt"), "sbtk export RUN --int8, which leaves the rest out"),
        (("fp32",), "see the export's notices"),
        (("fp16", "int8", "int8.trt"), "see the export's notices"),
    ],
)
def test_good_precisions_can_be_exported_alone(bad: tuple[str, ...], next_step: str) -> None:
    parities = {name: replace(GOOD, map_model=0.4 if name in bad else 0.5) for name in LIMITS}
    if "fp16" in bad or "fp32" in bad:
        wrong = replace(GOOD, cosine_min=0.9)
        parities |= {name: wrong for name in bad if name in ("fp16", "fp32")}
    with pytest.raises(BadModel) as caught:
        require_parity(parities)
    assert caught.value.next_step.startswith(next_step)


def test_a_value_equal_to_its_limit_passes() -> None:
    at_the_limit = replace(
        GOOD, cosine_min=0.95, cosine_mean=0.98, norm_error=1e-3, map_model=0.4951
    )
    require_parity({"int8": at_the_limit})
    assert not replace(GOOD, cosine_min=0.9999).misses(LIMITS["fp32"])


class Scripted:
    """An engine that knows the answers: the row of each image's first pixel.

    The even ones of `numbered` images are sketches, and must be marked as such.
    """

    info = EngineInfo("scripted", "int8", "cpu", 4, threads=1, lanes=1, version="0")

    def __init__(self, rows: Embeddings) -> None:
        self._rows = rows

    def run(self, images: Pixels, kind: Kind) -> Embeddings:
        numbers = images[:, 0, 0, 0].astype(np.int64)
        assert (numbers % 2 == KINDS.index(kind)).all()
        return self._rows[numbers]

    def close(self) -> None:
        self._rows = self._rows[:0]


def test_metrics_equal_plain_loops() -> None:
    random = np.random.default_rng(0)
    wanted = unit(random.standard_normal((60, 4)))
    rows = (wanted + 0.2 * random.standard_normal((60, 4))).astype(np.float32)
    samples = numbered(60)
    parity = measure_parity(
        Scripted(rows), ExportImages(samples, samples, samples), Reference(wanted, wanted)
    )
    cosines = [
        float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))
        for a, b in zip(rows, wanted, strict=True)
    ]
    assert parity.images == parity.ranking_images == 60
    assert parity.cosine_min == pytest.approx(min(cosines), abs=1e-6)
    assert parity.cosine_mean == pytest.approx(sum(cosines) / 60, abs=1e-6)
    assert parity.cosine_min_sketches == pytest.approx(min(cosines[::2]), abs=1e-6)
    assert parity.cosine_min_photos == pytest.approx(min(cosines[1::2]), abs=1e-6)
    lengths = [abs(float(np.linalg.norm(row)) - 1) for row in rows]
    assert parity.norm_error == pytest.approx(max(lengths), abs=1e-6)
    found, expected = ranks(unit(rows), samples), ranks(wanted, samples)
    shared = [len(set(a[:10]) & set(b[:10])) / 10 for a, b in zip(found, expected, strict=True)]
    assert parity.top10_agreement == pytest.approx(sum(shared) / len(shared))
    assert parity.map_torch == pytest.approx(mean_average_precision(expected, samples))
    assert parity.map_model == pytest.approx(mean_average_precision(found, samples))
    assert parity.engine == "scripted 0"


def test_ranking_images_are_compared_too() -> None:
    wanted = unit(np.random.default_rng(1).standard_normal((80, 4)))
    rows = wanted.copy()
    rows[70] = -rows[70]
    every = numbered(80)
    part = ImageSubset(every.pixels[:40], every.is_sketch[:40], every.labels[:40], ())
    rest = ImageSubset(every.pixels[40:], every.is_sketch[40:], every.labels[40:], ())
    parity = measure_parity(
        Scripted(rows), ExportImages(part, part, rest), Reference(wanted[:40], wanted[40:])
    )
    assert (parity.images, parity.ranking_images) == (80, 40)
    assert parity.cosine_min == pytest.approx(-1)


def numbered(count: int) -> ImageSubset:
    pixels = np.zeros((count, 224, 224, 3), dtype=np.uint8)
    pixels[:, 0, 0, 0] = np.arange(count)
    order = np.arange(count)
    return ImageSubset(pixels, order % 2 == 0, order // 2 % 3, (Path("unused"),) * count)


def unit(rows: NDArray[np.float64] | Embeddings) -> Embeddings:
    return np.asarray(rows / np.linalg.norm(rows, axis=1, keepdims=True), dtype=np.float32)


def ranks(rows: Embeddings, samples: ImageSubset) -> list[list[int]]:
    sketches = np.flatnonzero(samples.is_sketch)
    photos = np.flatnonzero(~samples.is_sketch)
    return [
        sorted(photos.tolist(), key=lambda photo: -float(rows[sketch] @ rows[photo]))
        for sketch in sketches
    ]


def mean_average_precision(ranked: list[list[int]], samples: ImageSubset) -> float:
    sketches = np.flatnonzero(samples.is_sketch)
    values = []
    for sketch, order in zip(sketches, ranked, strict=True):
        hits, precisions = 0, []
        for rank, photo in enumerate(order, start=1):
            if samples.labels[photo] == samples.labels[sketch]:
                hits += 1
                precisions.append(hits / rank)
        values.append(sum(precisions) / len(precisions))
    return sum(values) / len(values)
