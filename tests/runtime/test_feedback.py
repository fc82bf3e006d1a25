"""Queries that follow what is liked and what is not."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from sbtk_runtime.errors import BadConfig, BadData
from sbtk_runtime.feedback import refine
from sbtk_runtime.gallery.gallery import Gallery
from tests.tiny_gallery import gallery_of, unit_rows

NONE = np.empty((0, 8), dtype=np.float32)


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


def test_a_query_without_feedback_is_itself() -> None:
    query = unit_rows(1, 8)[0]
    np.testing.assert_allclose(refine(query, NONE, NONE), query, atol=1e-6)


@pytest.mark.parametrize("seed", range(5))
def test_it_moves_to_what_is_liked_and_away_from_what_is_not(seed: int) -> None:
    query, liked, disliked = unit_rows(3, 8, seed)
    towards = refine(query, liked[None], NONE)
    away = refine(query, liked[None], disliked[None])
    assert cosine(towards, liked) > cosine(query, liked)
    assert cosine(away, disliked) < cosine(towards, disliked)
    np.testing.assert_allclose(refine(query, NONE, disliked[None]), query, atol=1e-6)
    assert np.linalg.norm(towards) == pytest.approx(1)
    assert towards.dtype == away.dtype == np.float32


def test_the_order_and_the_number_of_the_liked_do_not_matter() -> None:
    liked = unit_rows(4, 8)
    expected = refine(None, liked, NONE)
    np.testing.assert_allclose(refine(None, liked[::-1], NONE), expected, atol=1e-6)
    np.testing.assert_allclose(refine(None, np.tile(liked, (3, 1)), NONE), expected, atol=1e-6)


def test_what_cancels_out_leaves_what_is_liked() -> None:
    query = unit_rows(1, 8)[0]
    assert np.isfinite(refine(None, query[None], query[None], disliked_weight=4)).all()


def test_nothing_to_start_from_is_refused() -> None:
    with pytest.raises(BadConfig):
        refine(None, NONE, unit_rows(1, 8))


def test_a_gallery_refines_by_its_photos(tmp_path: Path) -> None:
    rows = unit_rows(40, 8)
    gallery_of(tmp_path / "gallery.sbtk", rows)
    with Gallery.open(tmp_path / "gallery.sbtk") as gallery:
        found = gallery.refined(None, [3, 5], [9])
        np.testing.assert_allclose(found, refine(None, rows[[2, 4]], rows[[8]]), atol=1e-3)
        with pytest.raises(BadData, match="no photo 99"):
            gallery.refined(rows[0], [99], [])
