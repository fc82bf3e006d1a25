"""Embedding maps: principal components compared with another implementation, and files."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest

from sbtk_runtime.errors import BadData, MissingExtra
from sbtk_runtime.evaluation.report.embedding_map import (
    MapPoint,
    has_umap,
    project_pca,
    project_umap,
    require_umap,
    write_coordinates,
)
from tests.tiny_gallery import unit_rows


def test_principal_components_are_those_of_scikit_learn() -> None:
    from sklearn.decomposition import PCA

    rows = unit_rows(40, 12)
    plane, shares = project_pca(rows)
    reference = PCA(2, svd_solver="full")
    expected = reference.fit_transform(rows.astype(np.float64))
    np.testing.assert_allclose(np.abs(plane), np.abs(expected), atol=1e-6)
    np.testing.assert_allclose(shares, reference.explained_variance_ratio_, rtol=1e-6)


def test_the_signs_do_not_depend_on_the_order_of_the_rows() -> None:
    rows = unit_rows(30, 8)
    order = np.random.default_rng(1).permutation(30)
    np.testing.assert_allclose(project_pca(rows[order])[0], project_pca(rows)[0][order], atol=1e-6)


def test_embeddings_that_span_no_plane_are_refused() -> None:
    with pytest.raises(BadData, match="3 embeddings"):
        project_pca(unit_rows(3, 8))
    with pytest.raises(BadData, match="on a line"):
        project_pca(np.repeat(unit_rows(1, 8), 6, axis=0))
    with pytest.raises(BadData, match="on a line"):
        project_pca(np.repeat(unit_rows(2, 8), 4, axis=0))


def test_coordinates_are_written_with_file_kind_and_class(tmp_path: Path) -> None:
    points = [
        MapPoint(Path("a,b.png"), "sketch", "teddy bear"),
        MapPoint(Path("c\n.jpg"), "photo", "cow"),
    ]
    planes = {"pca": np.array([[1.5, -2.0], [0.25, 3.0]])}
    write_coordinates(tmp_path / "map.csv", points, {"pca": planes["pca"]})
    with (tmp_path / "map.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert rows[0] == {
        "path": "a,b.png",
        "kind": "sketch",
        "class": "teddy bear",
        "pca_x": "1.5",
        "pca_y": "-2",
    }
    assert rows[1]["path"] == "c\\n.jpg"
    assert rows[1]["kind"] == "photo"


@pytest.mark.skipif(has_umap(), reason="umap-learn is installed")
def test_without_umap_the_error_names_its_package() -> None:
    with pytest.raises(MissingExtra, match="pip install umap-learn"):
        require_umap()
    with pytest.raises(MissingExtra, match="--method pca"):
        project_umap(unit_rows(20, 8), 0)


@pytest.mark.skipif(not has_umap(), reason="umap-learn is not installed")
def test_umap_separates_clusters_and_is_reproducible() -> None:
    centres = unit_rows(2, 16)
    noise = 0.05 * np.random.default_rng(0).standard_normal((60, 16)).astype(np.float32)
    rows = np.repeat(centres, 30, axis=0) + noise
    plane = project_umap(rows, 3)
    np.testing.assert_array_equal(plane, project_umap(rows, 3))
    middles = plane.reshape(2, 30, 2).mean(axis=1)
    spread = plane.reshape(2, 30, 2).std(axis=1).max()
    assert np.linalg.norm(middles[0] - middles[1]) > 3 * spread
