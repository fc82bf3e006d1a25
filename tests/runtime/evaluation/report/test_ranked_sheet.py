"""Ranked sheets: selection of queries, hits and frames."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sbtk_runtime.embedding.embedder import Embedder
from sbtk_runtime.errors import BadConfig, BadData
from sbtk_runtime.evaluation.bench.map import LabelledImages
from sbtk_runtime.evaluation.report.ranked_sheet import (
    CELL_PX,
    RIGHT,
    WRONG,
    EmbeddedImages,
    Panel,
    RankedPhoto,
    RankedQuery,
    compute_average_precisions,
    draw_queries,
    draw_ranked_sheet,
    embed_labelled,
    find_queries,
    find_worst_queries,
    make_panel,
    rank_photos,
)
from tests.tiny import tiny_bundle
from tests.tiny_data import write_dataset
from tests.tiny_gallery import unit_rows

# Positions of the first query and hits in a sheet, in pixels.
LEFT, TOP, QUERY_GAP, GAP, ROW_PX = 16, 42, 18, 6, CELL_PX + 22


def images_at(*degrees: float, classes: str) -> EmbeddedImages:
    """Return images whose embeddings point in these directions, a letter for each class."""
    angles = np.deg2rad(degrees)
    rows = np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)
    return EmbeddedImages(tuple(Path(f"{d}.png") for d in degrees), tuple(classes), rows)


def test_the_nearest_photos_come_first_and_equal_ones_in_order() -> None:
    queries, gallery = images_at(0, 90, classes="ab"), images_at(80, 10, 10, 30, classes="abab")
    assert rank_photos(queries.rows, gallery.rows, 3).tolist() == [[1, 2, 3], [0, 3, 1]]
    panel = make_panel("title", queries, gallery, 2)
    assert [[hit.is_right for hit in query.photos] for query in panel.queries] == [
        [False, True],
        [False, True],
    ]
    assert [hit.path.name for hit in panel.queries[0].photos] == ["10.png", "10.png"]
    assert panel.queries[0].caption == "a"


def test_more_hits_than_photos_gives_all_photos() -> None:
    gallery = images_at(0, 10, classes="ab")
    assert len(make_panel("", images_at(5, classes="a"), gallery, 9).queries[0].photos) == 2


def test_the_worst_queries_have_the_lowest_average_precision() -> None:
    gallery = images_at(0, 20, 40, 60, classes="aabb")
    queries = images_at(0, 50, 60, 0, 5, classes="abbbc")
    found = compute_average_precisions(queries, gallery)
    # By hand: the third and fourth of four are relevant, (1/3 + 2/4) / 2.
    np.testing.assert_allclose(found, [1, 1, 1, 5 / 12, np.nan])
    assert find_worst_queries(found, 3) == [3, 0, 1]
    with pytest.raises(BadConfig, match="5 queries of 4"):
        find_worst_queries(found, 5)


def test_random_queries_are_drawn_once_each_and_by_their_seed() -> None:
    drawn = draw_queries(50, 20, seed=3)
    assert len(set(drawn)) == 20
    assert drawn == draw_queries(50, 20, seed=3)
    assert drawn != draw_queries(50, 20, seed=4)
    with pytest.raises(BadConfig, match="51 queries of 50"):
        draw_queries(50, 51, seed=0)


def test_queries_can_be_named_by_any_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = write_dataset(tmp_path / "data", ("cow",), sketches=3, photos=1)
    files = sorted((root / "sketch" / "cow").iterdir())
    sketches = LabelledImages(files, [0, 0, 0], ("cow",))
    monkeypatch.chdir(root)
    assert find_queries(sketches, [Path("sketch/cow/2.png"), files[0]]) == [2, 0]
    with pytest.raises(BadData, match=r"not among the 3 sketches.*\n.*cow"):
        find_queries(sketches, [root / "photo" / "cow" / "0.jpg"])


def test_unreadable_images_are_left_out_and_named(tmp_path: Path) -> None:
    root = write_dataset(tmp_path / "data", ("cow",), sketches=3, photos=1)
    files = sorted((root / "sketch" / "cow").iterdir())
    files[1].write_bytes(b"no image")
    with Embedder(tiny_bundle(tmp_path / "tiny"), threads=1) as embedder:
        images = LabelledImages(files, [0, 0, 0], ("cow",))
        found = embed_labelled(embedder, images, "sketch", lambda done, total: None)
        assert [path.name for path in found.paths] == ["0.png", "2.png"]
        assert found.rows.shape == (2, embedder.dim)
        assert "1.png" in found.unreadable[0]
        bad = LabelledImages(files[1:2], [0], ("cow",))
        with pytest.raises(BadData, match="none of 1 sketch files"):
            embed_labelled(embedder, bad, "sketch", lambda done, total: None)


def test_right_hits_are_framed_green_and_wrong_ones_red(tmp_path: Path) -> None:
    blue, wide = tmp_path / "blue.png", tmp_path / "wide.png"
    Image.new("RGB", (20, 20), (0, 0, 250)).save(blue)
    Image.new("RGB", (400, 100), (250, 0, 250)).save(wide)
    hits = (RankedPhoto(blue, "cow", True), RankedPhoto(wide, "a very long name of a class", False))
    query = RankedQuery(blue, "cow", hits)
    sheet = draw_ranked_sheet([Panel("one", (query, query)), Panel("two", (query,))])
    first = LEFT + CELL_PX + QUERY_GAP
    second = first + CELL_PX + GAP
    for top in (TOP, TOP + ROW_PX):
        assert sheet.getpixel((first, top)) == RIGHT
        assert sheet.getpixel((first + CELL_PX - 1, top + CELL_PX - 1)) == RIGHT
        assert sheet.getpixel((second, top)) == WRONG
        # A small image fills its cell; a wide one is centred and complete.
        assert sheet.getpixel((LEFT + 1, top + 1)) == (0, 0, 250)
        assert sheet.getpixel((first + 5, top + 5)) == (0, 0, 250)
        assert sheet.getpixel((second + 5, top + 5)) == (238, 238, 238)
        assert sheet.getpixel((second + CELL_PX // 2, top + CELL_PX // 2)) == (250, 0, 250)
    panel_px = 3 * CELL_PX + QUERY_GAP + GAP
    assert sheet.width == 2 * (LEFT + panel_px) + 30
    assert sheet.getpixel((LEFT + panel_px + 30 + first - LEFT, TOP)) == RIGHT
    # The second panel has one row.
    assert sheet.getpixel((LEFT + panel_px + 30 + first - LEFT, TOP + ROW_PX)) == (255, 255, 255)


def test_a_deleted_photo_leaves_an_empty_frame(tmp_path: Path) -> None:
    gone = RankedPhoto(tmp_path / "gone.jpg", "cow", True)
    sheet = draw_ranked_sheet([Panel("", (RankedQuery(tmp_path / "gone.png", "cow", (gone,)),))])
    assert sheet.getpixel((LEFT + CELL_PX + QUERY_GAP + 10, TOP + 10)) == (238, 238, 238)


def test_embedded_images_can_be_chosen_in_any_order() -> None:
    images = EmbeddedImages((Path("a"), Path("b")), ("x", "y"), unit_rows(2, 4))
    chosen = images.select([1, 0])
    assert chosen.classes == ("y", "x")
    np.testing.assert_array_equal(chosen.rows, images.rows[::-1])
