"""The last step of a run: the embedding head is refitted on features of the trained trunk.

The trained head separates training classes. The soft-label head's logits, normalised within
classes (WCCN), separate other classes better. Both are linear maps of the pooled feature, so
nothing else changes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from sbtk_runtime.errors import BadConfig, BadData
from sbtk_runtime.preprocess import SIZE_PX, Kind, Preprocessing
from sbtk_train.batches.augment import normalise
from sbtk_train.batches.pixels import PixelStore
from sbtk_train.compute import Compute
from sbtk_train.data.image_set import ImageSource
from sbtk_train.data.splits import Division
from sbtk_train.models.student import SbtknetStudent, domains_of

#: In units of the scatter's mean eigenvalue; chosen on validation classes, where 2 to 5 are equal.
SHRINKAGE = 3.0
#: Most images of a class and domain; more hardly change its scatter.
MAX_PER_CLASS = 100
_BATCH = 32


def refit_embedding(
    student: SbtknetStudent,
    division: Division,
    preprocessing: Preprocessing,
    compute: Compute,
    workers: int,
    between_batches: Callable[[], None] = lambda: None,
) -> None:
    """Replace the student's embedding by its normalised soft-label logits, in place.

    Args:
        student: the best student of a run, on its device.
        division: its training images are used, up to 100 of each class and domain.
        preprocessing: of the student.
        compute: where and how to run.
        workers: number of decoding threads.
        between_batches: called before each batch of images; ends the work by an exception.
    """
    training = division.training
    weight = student.soft.weight.detach().cpu().numpy()
    chosen = [_some_of_each(labels) for labels in (training.sketch_labels, training.photo_labels)]
    how = (preprocessing, compute, workers, between_batches)
    sketches = _features(student, [training.sketches[row] for row in chosen[0]], "sketch", *how)
    photos = _features(student, [training.photos[row] for row in chosen[1]], "photo", *how)
    projection = fit_within_class_projection(
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
    """Return rows of up to 100 images of each class, evenly spaced."""
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
    preprocessing: Preprocessing,
    compute: Compute,
    workers: int,
    between_batches: Callable[[], None],
) -> NDArray[np.float32]:
    """Return `(N, F) float32` pooled features of image files at 224 px."""
    student.eval()
    features = []
    with (
        contextlib.closing(
            PixelStore(paths, kind, SIZE_PX, preprocessing, workers=workers, keep=False)
        ) as store,
        torch.inference_mode(),
        compute.autocast(),
    ):
        for start in range(0, len(paths), _BATCH):
            between_batches()
            rows = range(start, min(start + _BATCH, len(paths)))
            images = normalise(store.batch(rows).to(compute.device))
            domains = domains_of(kind, len(rows), compute.device)
            features.append(student.feature(images, domains).float().cpu().numpy())
    return np.concatenate(features)


Features = NDArray[np.float32]
Labels = NDArray[np.int64]


@dataclass(frozen=True)
class Projection:
    """A linear map of pooled features: `feature @ weight.T + bias`.

    Attributes:
        weight: `(D, F) float32`.
        bias: `(D,) float32`.
    """

    weight: Features
    bias: Features


def fit_within_class_projection(
    weight: Features,
    sketches: Features,
    sketch_labels: Labels,
    photos: Features,
    photo_labels: Labels,
    *,
    dim: int,
    shrinkage: float,
) -> Projection:
    """Return `weight` followed by the normalisation, cut to its `dim` widest directions.

    With `z = weight @ feature`, class means `m_c` (of the sketches' mean and the photos' mean),
    their mean `m` and the scatter `S` about `m_c` (each class and domain weighing the same), rows
    become `U' (S + shrinkage * mean eigenvalue * I)^(-1/2) (z - m)`; `U` holds the leading `dim`
    principal axes of the training rows after normalisation.

    Args:
        weight: `(K, F)`, the linear map to normalise; K is at least `dim`.
        sketches: `(S, F)` pooled features of training sketches.
        sketch_labels: `(S,)`.
        photos: `(P, F)` pooled features of training photos.
        photo_labels: `(P,)`.
        dim: length of the embedding.
        shrinkage: share of the mean eigenvalue to add to the scatter; more than 0.

    Raises:
        BadConfig: `dim` is more than K.
        BadData: no class has both sketches and photos, or features are not finite.
    """
    if dim > len(weight):
        raise BadConfig(
            f"an embedding of {dim} from {len(weight)} logits", f"{len(weight)} or less"
        )
    rows = [part.astype(np.float64) @ weight.T.astype(np.float64) for part in (sketches, photos)]
    if not all(np.isfinite(part).all() for part in rows):
        raise BadData("the training images' features are not finite", "finite numbers")
    scatter, means = _scatter(rows[0], sketch_labels, rows[1], photo_labels)
    centre = means.mean(axis=0)
    values, axes = np.linalg.eigh(scatter)
    normalise = axes / np.sqrt(values.clip(min=0) + shrinkage * values.mean())
    spread = (np.concatenate(rows) - centre) @ normalise
    widest = np.linalg.eigh(spread.T @ spread)[1][:, ::-1][:, :dim]
    project = (normalise @ widest).T
    return Projection(
        (project @ weight.astype(np.float64)).astype(np.float32),
        (-project @ centre).astype(np.float32),
    )


def _scatter(
    sketches: NDArray[np.float64],
    sketch_labels: Labels,
    photos: NDArray[np.float64],
    photo_labels: Labels,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the scatter within classes `(K, K)` and the class means `(C, K)`."""
    width = sketches.shape[1]
    scatter, means = np.zeros((width, width)), []
    for label in np.intersect1d(sketch_labels, photo_labels):
        of_sketches, of_photos = sketches[sketch_labels == label], photos[photo_labels == label]
        mean = (of_sketches.mean(axis=0) + of_photos.mean(axis=0)) / 2
        for part in (of_sketches, of_photos):
            scatter += (part - mean).T @ (part - mean) / (2 * len(part))
        means.append(mean)
    if not means:
        raise BadData("no class has both sketches and photos")
    scatter /= len(means)
    if not np.trace(scatter) > 0:
        raise BadData("all images of each class have the same features", "images that differ")
    return scatter, np.array(means)
