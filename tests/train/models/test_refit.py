"""The refitted embedding: its arithmetic, and its effect on a hidden nuisance."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from sbtk_runtime.errors import BadConfig, BadData
from sbtk_runtime.evaluation.metrics import evaluate
from sbtk_train.models.refit import Projection, fit_within_class_projection

Rows = NDArray[np.float32]
Labels = NDArray[np.int64]


def drawn(classes: range, seed: int) -> tuple[Rows, Labels, Rows, Labels]:
    """Features whose first six numbers tell the class; two more differ widely in each image."""
    random = np.random.default_rng(seed)
    centres = np.random.default_rng(99).normal(size=(40, 6))
    labels = np.repeat(np.array(classes, dtype=np.int64), 12)

    def rows(domain: float) -> Rows:
        telling = centres[labels] + 0.2 * random.normal(size=(len(labels), 6))
        nuisance = 6.0 * random.normal(size=(len(labels), 2)) + domain * 4.0
        return np.concatenate([telling, nuisance], axis=1).astype(np.float32)

    return rows(-1.0), labels, rows(1.0), labels


def applied(projection: Projection, rows: Rows) -> Rows:
    values = rows @ projection.weight.T + projection.bias
    return np.asarray(values / np.linalg.norm(values, axis=1, keepdims=True), dtype=np.float32)


def test_the_refit_improves_ranking_of_other_classes() -> None:
    sketches, sketch_labels, photos, photo_labels = drawn(range(20), 0)
    identity = np.eye(8, dtype=np.float32)
    projection = fit_within_class_projection(
        identity, sketches, sketch_labels, photos, photo_labels, dim=6, shrinkage=0.01
    )
    unseen = drawn(range(20, 40), 1)
    plain = Projection(identity, np.zeros(8, dtype=np.float32))
    before, after = (
        evaluate(applied(way, unseen[0]), unseen[1], applied(way, unseen[2]), unseen[3])
        for way in (plain, projection)
    )
    assert before.summary()["mAP@all"] < 0.2
    assert after.summary()["mAP@all"] > 0.9


def test_the_within_class_scatter_becomes_isotropic() -> None:
    sketches, sketch_labels, photos, photo_labels = drawn(range(20), 0)
    identity = np.eye(8, dtype=np.float32)
    projection = fit_within_class_projection(
        identity, sketches, sketch_labels, photos, photo_labels, dim=8, shrinkage=1e-6
    )
    scatter = np.zeros((8, 8))
    for label in range(20):
        parts = [
            (rows[labels == label] @ projection.weight.T + projection.bias).astype(np.float64)
            for rows, labels in ((sketches, sketch_labels), (photos, photo_labels))
        ]
        mean = (parts[0].mean(axis=0) + parts[1].mean(axis=0)) / 2
        scatter += sum((part - mean).T @ (part - mean) / len(part) for part in parts) / 40
    np.testing.assert_allclose(scatter, np.eye(8), atol=1e-3)


def test_a_case_worked_by_hand() -> None:
    # Two classes at x = -1 and 1; within each, y is -2 or 2: the scatter is diag(0, 4).
    sketches = np.array([[-1, -2], [1, -2]], dtype=np.float32)
    photos = np.array([[-1, 2], [1, 2]], dtype=np.float32)
    labels = np.array([0, 1])
    projection = fit_within_class_projection(
        np.eye(2, dtype=np.float32), sketches, labels, photos, labels, dim=2, shrinkage=0.5
    )
    # The mean eigenvalue is 2, so 1 is added: x is divided by 1, y by sqrt(5).
    np.testing.assert_allclose(np.abs(projection.weight), np.diag([1, 5**-0.5]), atol=1e-6)
    np.testing.assert_allclose(projection.bias, 0, atol=1e-6)


def test_unsuitable_embeddings_are_refused() -> None:
    rows, labels = np.ones((4, 3), dtype=np.float32), np.array([0, 0, 1, 1])
    identity = np.eye(3, dtype=np.float32)
    with pytest.raises(BadConfig, match="4 from 3"):
        fit_within_class_projection(identity, rows, labels, rows, labels, dim=4, shrinkage=1)
    with pytest.raises(BadData, match="same features"):
        fit_within_class_projection(identity, rows, labels, rows, labels, dim=2, shrinkage=1)
    with pytest.raises(BadData, match="no class"):
        fit_within_class_projection(identity, rows, labels, rows, labels + 2, dim=2, shrinkage=1)
    rows[0, 0] = np.nan
    with pytest.raises(BadData, match="not finite"):
        fit_within_class_projection(identity, rows, labels, rows, labels, dim=2, shrinkage=1)
