"""The pixels of the images that an export calibrates and measures on.

Only images of classes named as seen are opened, so no image of an unseen class can get into
calibration or parity. The three sets do not overlap.
"""

from __future__ import annotations

import itertools
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sbtk_export.onnx_graph import ModelInputs
from sbtk_runtime.errors import BadData, BadImage
from sbtk_runtime.files import printable_name
from sbtk_runtime.images import read_image_bytes
from sbtk_runtime.preprocess import CROPPED, KINDS, SIZE_PX, Kind, Pixels, Preprocessing
from sbtk_train.data.class_names import class_key
from sbtk_train.data.dataset import read_dataset
from sbtk_train.data.image_set import ImageSet, select_classes
from sbtk_train.data.splits import (
    CALIBRATION_PER_KIND,
    MIN_CALIBRATION_PER_KIND,
    MIN_PARITY_PER_KIND,
    PARITY_PER_KIND,
    parity_share,
)

#: Most images to rank, of each class and kind.
RANKING_PER_CLASS = 25
#: Of a student without validation classes.
RANKED_TRAINING_CLASSES = 10


@dataclass(frozen=True)
class ImageSubset:
    """Prepared images.

    Attributes:
        pixels: `(N, 224, 224, 3) uint8` RGB.
        is_sketch: `(N,) bool`.
        labels: `(N,) int64`, a number for each class.
        paths: the N files.
    """

    pixels: Pixels
    is_sketch: NDArray[np.bool_]
    labels: NDArray[np.int64]
    paths: tuple[Path, ...]

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def inputs(self) -> ModelInputs:
        """The images as inputs of a model."""
        return ModelInputs.of_kinds(self.pixels, self.is_sketch)

    def slice(self, start: int, end: int) -> ImageSubset:
        """Return the images from `start` to before `end`."""
        parts = (self.pixels, self.is_sketch, self.labels, self.paths)
        return ImageSubset(*(part[start:end] for part in parts))  # type: ignore[arg-type]


@dataclass(frozen=True)
class ExportImages:
    """The images of an export.

    Attributes:
        calibration: images of training classes, half of them sketches, to find INT8 ranges.
        parity: other images of training classes, half of them sketches, for cosines and norms.
        ranking: images of validation classes, for top 10 and mAP; without any, other images of ten
            training classes, so that mAP is of more than one relevant photo; if there are too few
            of these, `parity`.
        ranks_validation: whether `ranking` is of validation classes.
        notices: files that were left out, and why.
        code_files: files of training classes, by kind, to fit binary codes on. They may overlap
            with the other images, which measure something else.
    """

    calibration: ImageSubset
    parity: ImageSubset
    ranking: ImageSubset
    ranks_validation: bool = True
    notices: tuple[str, ...] = field(default=())
    code_files: Mapping[Kind, tuple[Path, ...]] = field(default_factory=dict)


def choose_images(
    data: Path,
    training_classes: Sequence[str],
    validation_classes: Sequence[str],
    *,
    preprocessing: Preprocessing = CROPPED,
    is_calibrating: bool = True,
    codes_per_kind: int = 0,
    seed: int = 0,
) -> ExportImages:
    """Sample images of `data/{sketch,photo}/<class>/*` to calibrate and measure on.

    Args:
        data: the data set; other classes are not read.
        training_classes: classes that the student was trained on.
        validation_classes: seen classes that it was not trained on.
        preprocessing: of the student.
        is_calibrating: whether images for calibration are needed.
        codes_per_kind: most files of each kind to fit binary codes on.
        seed: of the sampling.

    Raises:
        BadData: the folders are missing, or these classes have too few readable images.
    """
    available = read_dataset(data)
    rng = np.random.default_rng(seed)
    seen = _only(available, training_classes)
    training = ImageSampler(seen, rng, preprocessing)
    spread = np.linspace(0, len(training_classes) - 1, RANKED_TRAINING_CLASSES).astype(int)
    ranked_classes = validation_classes or [training_classes[i] for i in np.unique(spread)]
    ranked = ImageSampler(_only(available, ranked_classes), rng, preprocessing)
    drawn = [training.draw(kind, PARITY_PER_KIND + CALIBRATION_PER_KIND) for kind in KINDS]
    size = min(len(part) for part in drawn)
    share = parity_share(size, is_calibrating=is_calibrating)
    parity = _concatenate([part.slice(0, share) for part in drawn])
    calibration = _concatenate([part.slice(share, size) for part in drawn])
    _require(parity, MIN_PARITY_PER_KIND, "parity", data)
    if is_calibrating:
        _require(calibration, MIN_CALIBRATION_PER_KIND, "calibration", data)
    few = []
    if share < PARITY_PER_KIND:
        few.append(
            f"parity is measured on {len(parity)} images, not {2 * PARITY_PER_KIND}: "
            f"{printable_name(data)} has no more of the training classes"
        )
    used = {*parity.paths, *calibration.paths}
    per_kind = RANKING_PER_CLASS * len(ranked_classes)
    ranking = _concatenate(
        [ranked.draw(kind, per_kind, RANKING_PER_CLASS, skip=used) for kind in KINDS]
    )
    is_ranking_possible = len(np.unique(ranking.labels)) > 1 and 0 < ranking.is_sketch.mean() < 1
    if not validation_classes:
        is_ranking_possible &= len(ranking) >= len(parity)
    return ExportImages(
        calibration,
        parity,
        ranking if is_ranking_possible else parity,
        bool(validation_classes) and is_ranking_possible,
        (*training.notices, *ranked.notices, *few),
        {
            kind: tuple(path for path, _ in itertools.islice(files, codes_per_kind))
            for kind, files in _cycle_classes(seen, np.random.default_rng(seed)).items()
        },
    )


class ImageSampler:
    """Samples the images of a set without replacement, class by class in turn."""

    def __init__(
        self, data: ImageSet, rng: np.random.Generator, preprocessing: Preprocessing
    ) -> None:
        self.notices: list[str] = []
        self._left = _cycle_classes(data, rng)
        self._preprocessing = preprocessing

    def draw(
        self,
        kind: Kind,
        count: int,
        per_class: int | None = None,
        skip: Container[Path] = (),
    ) -> ImageSubset:
        """Return the next `count` readable images of a kind, or fewer if there are no more."""
        pixels: list[Pixels] = []
        labels: list[int] = []
        paths: list[Path] = []
        while len(pixels) < count:
            path, label = next(self._left[kind], (None, -1))
            if path is None:
                break
            if path in skip or (per_class is not None and labels.count(label) >= per_class):
                continue
            try:
                pixels.append(self._preprocessing.prepare(read_image_bytes(path), kind).pixels)
            except BadImage as problem:
                self.notices.append(f"left out {printable_name(path)}: {problem.found}")
                continue
            labels.append(label)
            paths.append(path)
        stacked = np.stack(pixels) if pixels else np.empty((0, SIZE_PX, SIZE_PX, 3), np.uint8)
        is_sketch = np.full(len(pixels), kind == "sketch")
        return ImageSubset(stacked, is_sketch, np.array(labels, np.int64), tuple(paths))


def _only(data: ImageSet, classes: Sequence[str]) -> ImageSet:
    wanted = {class_key(name) for name in classes}
    return select_classes(data, [name for name in data.classes if class_key(name) in wanted])


def _cycle_classes(
    data: ImageSet, rng: np.random.Generator
) -> dict[Kind, Iterator[tuple[Path, int]]]:
    """Return for each kind all files and labels: one of each class, then another of each."""
    return {
        "sketch": _by_turns(data.sketch_files, data.sketch_labels, rng),
        "photo": _by_turns(data.photos, data.photo_labels, rng),
    }


def _by_turns(
    paths: Sequence[Path], labels: NDArray[np.int64], rng: np.random.Generator
) -> Iterator[tuple[Path, int]]:
    """Yield one image of each class, then another of each, in random order."""
    order = rng.permutation(len(paths))
    taken: dict[int, int] = {}
    turns = []
    for row in order.tolist():
        label = int(labels[row])
        turns.append((taken.get(label, 0), row, label))
        taken[label] = taken.get(label, 0) + 1
    for _, row, label in sorted(turns, key=lambda turn: turn[0]):
        yield paths[row], label


def _concatenate(parts: Sequence[ImageSubset]) -> ImageSubset:
    return ImageSubset(
        np.concatenate([part.pixels for part in parts]),
        np.concatenate([part.is_sketch for part in parts]),
        np.concatenate([part.labels for part in parts]),
        tuple(path for part in parts for path in part.paths),
    )


def _require(samples: ImageSubset, per_kind: int, purpose: str, data: Path) -> None:
    """Raise `BadData` if a set is too small for its purpose."""
    if len(samples) < 2 * per_kind:
        raise BadData(
            f"{printable_name(data)} has {len(samples)} images for {purpose} (sketches and "
            "photos in equal parts, of the classes that the run was trained on)",
            f"at least {2 * per_kind} that are not used otherwise",
            "name a folder with more of them: sbtk export RUN --images DATA",
        )
