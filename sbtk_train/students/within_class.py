"""An embedding without the directions in which images of one class differ.

Within-class covariance normalisation (Hatch, Kajarekar and Stolcke, Interspeech 2006): rows are
multiplied by the inverse square root of the scatter within classes, so that what makes two images
of a class differ, the domain above all, counts for little in a cosine. The scatter is measured on
training classes and helps on classes never seen.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sbtk_runtime.errors import BadConfig, BadData

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


def within_class_projection(
    weight: Features,
    sketches: Features,
    sketch_labels: Labels,
    photos: Features,
    photo_labels: Labels,
    *,
    dim: int,
    shrinkage: float,
) -> Projection:
    """Returns `weight` followed by the normalisation, cut to its `dim` widest directions.

    With `z = weight @ feature`, class means `m_c` (of the sketches' mean and the photos' mean),
    their mean `m` and the scatter `S` about `m_c` (each class and domain weighing the same), rows
    become `U' (S + shrinkage * mean eigenvalue * I)^(-1/2) (z - m)`; `U` holds the leading `dim`
    principal axes of the training rows after normalisation.

    Args:
        weight: `(K, F)`, what is normalised; K at least `dim`.
        sketches: `(S, F)` pooled features of training sketches.
        sketch_labels: `(S,)`.
        photos: `(P, F)` pooled features of training photos.
        photo_labels: `(P,)`.
        dim: length of the embedding.
        shrinkage: how far the scatter is taken for round; more than 0.

    Raises:
        BadConfig: `dim` is more than K.
        BadData: no class has sketches and photos, or something is not finite.
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
    """Returns the scatter within classes `(K, K)` and the class means `(C, K)`."""
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
