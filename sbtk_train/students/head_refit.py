"""The last step of a run: the embedding head is fitted anew on what the trunk has learnt.

The head that was trained keeps training classes apart. What the soft-label head says, normalised
within classes, keeps others apart better; both are linear maps of the pooled feature, so nothing
else changes.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from sbtk_runtime.preprocess import SIZE_PX, Kind
from sbtk_train.batches.augment import normalised
from sbtk_train.batches.pixels import PixelStore
from sbtk_train.data import Division, ImageSource
from sbtk_train.device import Compute
from sbtk_train.students.sbtknet import SbtknetStudent
from sbtk_train.students.student import domains_of
from sbtk_train.students.within_class import within_class_projection

#: Of the scatter's mean eigenvalue; chosen on validation classes, where 2 to 5 make no difference.
SHRINKAGE = 3.0
#: More images of a class and domain would hardly change its scatter.
MAX_PER_CLASS = 100
_BATCH = 32


def refit_embedding(
    student: SbtknetStudent, division: Division, compute: Compute, workers: int
) -> None:
    """Replaces the student's embedding by its normalised soft-label logits, in place.

    Args:
        student: best student of a run, on its device.
        division: the scatter is measured on its training images, 100 of each class and domain.
        compute: where to run.
        workers: decoding threads.
    """
    training = division.training
    weight = student.soft.weight.detach().cpu().numpy()
    chosen = [_some_of_each(labels) for labels in (training.sketch_labels, training.photo_labels)]
    sketches = _features(
        student, [training.sketches[row] for row in chosen[0]], "sketch", compute, workers
    )
    photos = _features(
        student, [training.photos[row] for row in chosen[1]], "photo", compute, workers
    )
    projection = within_class_projection(
        weight - weight.mean(axis=0),
        sketches,
        training.sketch_labels[chosen[0]],
        photos,
        training.photo_labels[chosen[1]],
        dim=student.dim,
        shrinkage=SHRINKAGE,
    )
    with torch.no_grad():
        student.embedding.weight.copy_(torch.from_numpy(projection.weight))
        student.embedding.bias.copy_(torch.from_numpy(projection.bias))


def _some_of_each(labels: NDArray[np.int64]) -> NDArray[np.int64]:
    """Returns rows of up to 100 images of each class, spread over all that it has."""
    rows = []
    for label in np.unique(labels):
        own = np.flatnonzero(labels == label)
        places = np.linspace(0, len(own) - 1, min(len(own), MAX_PER_CLASS)).astype(int)
        rows.append(own[places])
    return np.concatenate(rows)


def _features(
    student: SbtknetStudent,
    paths: Sequence[ImageSource],
    kind: Kind,
    compute: Compute,
    workers: int,
) -> NDArray[np.float32]:
    """Returns `(N, F) float32` pooled features of image files at 224 px."""
    store = PixelStore(paths, kind, SIZE_PX, workers=workers, keep=False)
    student.eval()
    features = []
    try:
        with torch.inference_mode(), compute.autocast():
            for start in range(0, len(paths), _BATCH):
                rows = range(start, min(start + _BATCH, len(paths)))
                images = normalised(store.batch(rows).to(compute.device))
                domains = domains_of(kind, len(rows), compute.device)
                features.append(student.feature(images, domains).float().cpu().numpy())
    finally:
        store.close()
    return np.concatenate(features)
