"""Scores a student on seen classes while it trains, with production's pixels and metrics."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from sbtk_runtime.metrics import evaluate
from sbtk_runtime.preprocess import SIZE_PX, Kind
from sbtk_train.augment import normalised
from sbtk_train.data import Division, ImageSet, Rows
from sbtk_train.device import Compute
from sbtk_train.pixels import PixelStore
from sbtk_train.student import Student

_BATCH = 32
#: Photos of each training class in the gallery that the held-out sketches are searched in.
HELD_OUT_PHOTOS_PER_CLASS = 5


def embed_files(
    student: Student, paths: Sequence[Path], kind: Kind, compute: Compute, *, workers: int
) -> NDArray[np.float32]:
    """Returns `(N, D) float32` unit rows of image files, in their order, at 224 px."""
    store = PixelStore(paths, kind, SIZE_PX, workers=workers, keep=False)
    was_training = student.training
    student.eval()
    rows = []
    with torch.inference_mode():
        for start in range(0, len(paths), _BATCH):
            pixels = store.batch(range(start, min(start + _BATCH, len(paths))))
            with compute.autocast():
                embedding = student.embed(normalised(pixels.to(compute.device)))
            rows.append(embedding.cpu().numpy())
    student.train(was_training)
    store.close()
    return np.concatenate(rows)


def score(student: Student, data: ImageSet, compute: Compute, *, workers: int) -> dict[str, float]:
    """Returns the retrieval figures of `data`'s sketches against its photos."""
    sketches = embed_files(student, data.sketches, "sketch", compute, workers=workers)
    photos = embed_files(student, data.photos, "photo", compute, workers=workers)
    return evaluate(sketches, data.sketch_labels, photos, data.photo_labels).summary()


def validate(
    student: Student, division: Division, compute: Compute, *, workers: int
) -> dict[str, float]:
    """Returns mAP@all and P@10 on the validation classes and on held-out sketches.

    `validation_*` is on whole classes kept from training, which selection goes by; `held_out_*`
    searches sketches of training classes among five training photos of each class.
    """
    unlike = score(student, division.validation, compute, workers=workers)
    alike = score(student, _few_photos(division.held_out), compute, workers=workers)
    return {
        "validation_map": unlike["mAP@all"],
        "validation_p10": unlike.get("P@10", float("nan")),
        "held_out_map": alike["mAP@all"],
    }


def _few_photos(data: ImageSet) -> ImageSet:
    rows: Rows = np.concatenate(
        [
            np.flatnonzero(data.photo_labels == label)[:HELD_OUT_PHOTOS_PER_CLASS]
            for label in range(len(data.classes))
        ]
    )
    photos = tuple(data.photos[row] for row in rows)
    return ImageSet(
        data.classes, data.sketches, data.sketch_labels, photos, data.photo_labels[rows]
    )
