"""Data for measuring training: generated data, and subsets for an epoch of some steps."""

from __future__ import annotations

import io
import os
from pathlib import Path

import numpy as np
from PIL import Image

from sbtk_runtime.generated_inputs import generate_photos, generate_sketches
from sbtk_train.batches.sampler import PER_CLASS
from sbtk_train.data.image_set import ImageSet, select_images

#: Enough classes for a batch of 256 images, and one for validation; images per class.
_CLASSES, _PER_CLASS = 66, 30
_SMALL_CLASSES, _SMALL_PER_CLASS = 5, 6
_DISTINCT = 8
# As in the Sketchy Database.
_SIZE_PX = 256


def write_training_data(root: Path, *, is_small: bool) -> Path:
    """Fill `root` with `{sketch,photo}/<class>/*`, few distinct images of 256 px under many names.

    Args:
        root: a new folder.
        is_small: for a dry run.
    """
    classes, per_class = (_SMALL_CLASSES, _SMALL_PER_CLASS) if is_small else (_CLASSES, _PER_CLASS)
    kinds = {
        "sketch": (generate_sketches(_DISTINCT), ".png"),
        "photo": (generate_photos(_DISTINCT), ".jpg"),
    }
    for kind, (files, suffix) in kinds.items():
        originals = []
        for number, content in enumerate(files):
            original = root / "originals" / f"{kind}-{number}{suffix}"
            original.parent.mkdir(parents=True, exist_ok=True)
            image = Image.open(io.BytesIO(content))
            image.resize((_SIZE_PX, _SIZE_PX), Image.Resampling.BILINEAR).save(original)
            originals.append(original)
        for label in range(classes):
            folder = root / kind / f"class-{label:02d}"
            folder.mkdir(parents=True)
            for number in range(per_class):
                original = originals[(label + number) % _DISTINCT]
                os.link(original, folder / f"{number:03d}{suffix}")
    return root


def sketches_per_step(training: ImageSet, quadruplets: int) -> int:
    """Return the number of sketches, and of photos, in a class-balanced batch."""
    return PER_CLASS * min(quadruplets, len(training.classes))


def cut_evenly(training: ImageSet, steps: int, quadruplets: int) -> ImageSet:
    """Return the set with evenly spaced sketches, as many as an epoch of `steps` uses.

    Nearly every sketch is decoded once; with fewer sketches, an epoch has fewer steps.
    """
    wanted = steps * sketches_per_step(training, quadruplets)
    rows = np.unique(np.linspace(0, len(training.sketches) - 1, wanted).astype(np.int64))
    return select_images(training, sketches=rows)


def repeat_images(training: ImageSet, steps: int, quadruplets: int) -> ImageSet:
    """Return a subset of which an epoch of `steps` repeats the same few images.

    The trainer caches decoded images, so after the first use of each class, two sketches per step
    remain to be decoded: each class keeps two images of a kind, except that one sketch of the first
    class is repeated to reach the length of the epoch. The epoch is longer if it would not use
    every class.
    """
    labels = range(len(training.classes))
    sketches = [np.flatnonzero(training.sketch_labels == label)[:PER_CLASS] for label in labels]
    photos = [np.flatnonzero(training.photo_labels == label)[:PER_CLASS] for label in labels]
    rows = np.concatenate(sketches)
    missing = max(0, steps * sketches_per_step(training, quadruplets) - len(rows))
    rows = np.concatenate([rows, np.repeat(rows[:1], missing)])
    return select_images(training, sketches=rows, photos=np.concatenate(photos))
