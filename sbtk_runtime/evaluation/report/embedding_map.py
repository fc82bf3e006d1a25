"""Maps of embeddings in the plane, by principal components or by UMAP."""

from __future__ import annotations

import csv
import importlib
import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from sbtk_runtime.errors import BadData, MissingExtra
from sbtk_runtime.files import atomic_path, printable_name
from sbtk_runtime.preprocess import Kind

Method = Literal["pca", "umap"]
Rows = NDArray[np.float32]
Plane = NDArray[np.float64]

MIN_ROWS = 4


@dataclass(frozen=True)
class MapPoint:
    """An image on an embedding map: its file, kind and class."""

    path: Path
    kind: Kind
    class_name: str


def project_pca(rows: Rows) -> tuple[Plane, tuple[float, float]]:
    """Return the first two principal components `(N, 2)` of `rows (N, D)`, and their variances.

    The variances are shares of the total. Signs are chosen so that the largest coordinate of a
    component is positive, which makes maps reproducible.

    Raises:
        BadData: fewer than `MIN_ROWS` rows, or all rows on a line.
    """
    _check_enough(rows)
    centred = rows.astype(np.float64) - rows.mean(axis=0, dtype=np.float64)
    left, lengths, _ = np.linalg.svd(centred, full_matrices=False)
    variance = np.square(lengths)
    if len(lengths) < 2 or variance[1] <= 1e-12 * max(variance[0], 1e-12):
        raise BadData(f"{len(rows)} embeddings on a line", "a second direction")
    plane = left[:, :2] * lengths[:2]
    extreme = plane[np.abs(plane).argmax(axis=0), [0, 1]]
    shares = variance[:2] / variance.sum()
    return plane * np.sign(extreme), (float(shares[0]), float(shares[1]))


def project_umap(rows: Rows, seed: int) -> Plane:
    """Return UMAP's layout `(N, 2)` of `rows (N, D)` by cosine, reproducible by seed.

    Raises:
        MissingExtra: umap-learn is not installed.
        BadData: fewer than `MIN_ROWS` rows.
    """
    require_umap()
    _check_enough(rows)
    umap = importlib.import_module("umap")
    # A seeded layout uses one job anyway, and UMAP warns about more.
    layout = umap.UMAP(
        n_neighbors=min(15, len(rows) - 1), metric="cosine", random_state=seed, n_jobs=1
    )
    return np.asarray(layout.fit_transform(rows), dtype=np.float64)


def require_umap() -> None:
    """Check that UMAP is installed.

    Raises:
        MissingExtra: umap-learn is not installed.
    """
    if not has_umap():
        raise MissingExtra(
            "UMAP needs umap-learn, which is not installed",
            "the package umap-learn, or principal components: --method pca",
            "pip install umap-learn",
        )


def has_umap() -> bool:
    """Return whether UMAP is installed, without importing it, which takes seconds."""
    return importlib.util.find_spec("umap") is not None


def write_coordinates(
    path: Path, points: Sequence[MapPoint], planes: Mapping[Method, Plane]
) -> None:
    """Write a CSV file with a line per point: file, kind, class and coordinates.

    Args:
        path: the file, replaced atomically.
        points: N points.
        planes: coordinates `(N, 2) float64` by method.
    """
    with atomic_path(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        axes = [f"{name}_{axis}" for name in planes for axis in "xy"]
        writer.writerow(["path", "kind", "class", *axes])
        for row, point in enumerate(points):
            coordinates = [f"{value:.6g}" for plane in planes.values() for value in plane[row]]
            words = [printable_name(point.path), point.kind, point.class_name]
            writer.writerow([*words, *coordinates])


def _check_enough(rows: Rows) -> None:
    if len(rows) < MIN_ROWS:
        raise BadData(f"{len(rows)} embeddings", f"at least {MIN_ROWS}")
