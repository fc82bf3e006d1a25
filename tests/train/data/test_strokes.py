"""Drawings in strokes: files of them, their rendering, and traced bitmaps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageDraw

from sbtk_runtime.errors import BadData
from sbtk_runtime.preprocess import CROPPED
from sbtk_train.data.strokes import (
    Strokes,
    read_stroke_file,
    render,
    render_varied,
    simplify,
    trace,
    vary,
)
from tests.tiny_data import polygon, write_strokes

LINE = [(0.0, 0.0), (255.0, 255.0)]


def test_drawings_are_read_by_class_with_their_strokes(tmp_path: Path) -> None:
    path = write_strokes(
        tmp_path / "s.npz", [("sun", [polygon(9)]), ("arrow", [LINE, polygon(3)]), ("sun", [LINE])]
    )
    found = read_stroke_file(path)
    assert found.name_of == ("arrow", "sun", "sun")
    assert [len(drawing.strokes) for drawing in found.drawings] == [2, 1, 1]
    assert [drawing.number for drawing in found.drawings] == [1, 0, 2]
    assert found.drawings[0].strokes[0].tolist() == [[0, 0], [255, 255]]


def test_empty_drawings_are_left_out_and_counted(tmp_path: Path) -> None:
    drawings: list[tuple[str, list[Any]]] = [("sun", []), ("sun", [[]]), ("sun", [[], LINE])]
    found = read_stroke_file(write_strokes(tmp_path / "s.npz", drawings))
    assert len(found.drawings) == 1
    assert found.empty == 2


def test_equal_strokes_have_one_identity(tmp_path: Path) -> None:
    first = read_stroke_file(write_strokes(tmp_path / "a.npz", [("sun", [LINE])]))
    drawings = [("arrow", [polygon(3)]), ("sun", [LINE])]
    second = read_stroke_file(write_strokes(tmp_path / "b.npz", drawings))
    assert first.drawings[0].identity == second.drawings[1].identity
    assert second.drawings[0].identity != second.drawings[1].identity


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"points": np.full((2, 2), 300, dtype=np.int32)}, "points outside the drawing"),
        ({"points": np.full((2, 2), np.nan, dtype=np.float32)}, "points outside the drawing"),
        ({"points": np.zeros((2, 3), dtype=np.uint8)}, "points of shape"),
        ({"stroke_offsets": np.array([0, 5])}, "stroke_offsets"),
        ({"stroke_offsets": np.array([1, 2])}, "stroke_offsets"),
        ({"stroke_offsets": np.array([0, 3, 2])}, "stroke_offsets"),
        ({"drawing_offsets": np.array([0, 2])}, "drawing_offsets"),
        ({"labels": np.array([7])}, "labels from 7 to 7"),
        ({"labels": np.array([-1])}, "labels from -1"),
        ({"labels": np.array([0, 0])}, "labels of shape"),
        ({"labels": np.array([0.5])}, "labels of shape"),
        ({"classes": np.array([b"sun"])}, "classes of type"),
        ({"classes": np.array([" "])}, "a class without a name"),
        ({"stroke_offsets": np.array(2)}, "stroke_offsets"),
        ({"drawing_offsets": np.array(2)}, "drawing_offsets"),
        ({"drawing_offsets": np.array([0]), "labels": np.zeros(0, np.int8)}, "drawing_offsets"),
    ],
)
def test_damaged_files_are_refused_with_the_reason(
    changes: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    path = write_strokes(tmp_path / "s.npz", [("sun", [LINE])], **changes)
    with pytest.raises(BadData, match=reason):
        read_stroke_file(path)


def test_other_files_are_refused(tmp_path: Path) -> None:
    text, cut, other = tmp_path / "t.npz", tmp_path / "c.npz", tmp_path / "o.npz"
    text.write_text("no archive")
    cut.write_bytes(write_strokes(tmp_path / "s.npz", [("sun", [LINE])]).read_bytes()[:200])
    np.savez(other, images=np.zeros(3))
    for path in (text, cut, other, tmp_path / "missing.npz"):
        with pytest.raises(BadData, match="is not a stroke file"):
            read_stroke_file(path)


def test_a_file_of_empty_drawings_is_refused(tmp_path: Path) -> None:
    path = write_strokes(tmp_path / "s.npz", [("sun", []), ("sun", [[]])])
    with pytest.raises(BadData, match="2 drawings, none with a point"):
        read_stroke_file(path)


def test_every_error_of_zipfile_and_numpy_is_a_refusal(tmp_path: Path) -> None:
    whole = write_strokes(tmp_path / "s.npz", [("sun", [polygon(40)]) for _ in range(50)])
    packed = tmp_path / "packed.npz"
    with np.load(whole) as arrays:
        np.savez_compressed(packed, **arrays)
        np.save(tmp_path / "array.npy", arrays["points"])
    data = whole.read_bytes()
    header, entry = data.index(b"(2050, 2)"), data.index(b"PK\x01\x02")
    method, magic = entry + 10, data.index(b"NUMPY")
    damaged = {"array": (tmp_path / "array.npy").read_bytes()}
    for name, place, patch in (
        ("header", header, b"((050"),
        ("huge", header, b"(2050000000000, 2), }"),
        ("method", method, b"a"),
        ("bytes", magic, b"other"),
    ):
        damaged[name] = data[:place] + patch + data[place + len(patch) :]
    deflated = packed.read_bytes()
    damaged["deflated"] = deflated[:100] + bytes(300) + deflated[400:]
    for name, content in damaged.items():
        (tmp_path / f"{name}.npz").write_bytes(content)
        with pytest.raises(BadData, match="is not a stroke file"):
            read_stroke_file(tmp_path / f"{name}.npz")


def test_objects_are_not_unpickled(tmp_path: Path) -> None:
    path = write_strokes(
        tmp_path / "s.npz", [("sun", [LINE])], classes=np.array(["sun", 1], object)
    )
    with pytest.raises(BadData, match="is not a stroke file"):
        read_stroke_file(path)


def strokes(*corners: int) -> Strokes:
    return tuple(np.array(polygon(count), dtype=np.float32) for count in corners)


def overlap(left: np.ndarray, right: np.ndarray) -> float:
    """Return intersection over union of the ink, lines widened by two pixels."""
    both = [
        np.asarray(Image.fromarray(x.astype(np.uint8) * 255).convert("L")) for x in (left, right)
    ]
    wide = [np.asarray(Image.fromarray(x)) > 0 for x in both]
    return float((wide[0] & wide[1]).sum() / (wide[0] | wide[1]).sum())


@pytest.mark.parametrize("size_px", [32, 160, 224])
def test_a_rendered_drawing_is_framed_as_in_the_runtime(size_px: int) -> None:
    pixels = render(strokes(5), size_px, width=0.03)
    assert pixels.shape == (size_px, size_px, 1)
    assert pixels.dtype == np.uint8
    ink = pixels[:, :, 0] < 128
    again = CROPPED.sketch_pixels(
        Image.fromarray(render(strokes(5), 512, width=0.03)[:, :, 0]), size_px
    )
    theirs = again.pixels[:, :, 0] < 128
    for axis in (0, 1):
        own, other = (np.flatnonzero(each.any(axis=axis)) for each in (ink, theirs))
        assert abs(int(own[0]) - int(other[0])) <= 1 + size_px // 100
        assert abs(int(own[-1]) - int(other[-1])) <= 1 + size_px // 100


def test_a_single_point_is_a_dot() -> None:
    pixels = render((np.array([[7.0, 9.0]], dtype=np.float32),), 64, width=0.05)
    assert (pixels < 128).any()
    assert (pixels > 128).mean() > 0.9


def test_variation_is_a_function_of_its_generator() -> None:
    drawing = strokes(3, 4, 5)
    one, two, other = (
        render_varied(drawing, 96, np.random.default_rng(seed)) for seed in (1, 1, 2)
    )
    assert (one == two).all()
    assert (one != other).any()


@given(st.integers(0, 2**32 - 1), st.lists(st.integers(2, 12), min_size=1, max_size=6))
def test_every_variation_has_ink_and_finite_points(seed: int, corners: list[int]) -> None:
    drawing = strokes(*corners)
    changed = vary(drawing, np.random.default_rng(seed))
    assert 1 <= len(changed) <= len(drawing)
    assert all(len(stroke) >= 1 and np.isfinite(stroke).all() for stroke in changed)
    assert (render_varied(drawing, 48, np.random.default_rng(seed)) < 200).any()


@given(
    st.lists(st.tuples(st.integers(0, 255), st.integers(0, 255)), min_size=1, max_size=60),
    st.floats(0.5, 20),
)
def test_simplified_strokes_stay_within_the_tolerance(
    points: list[tuple[int, int]], tolerance: float
) -> None:
    stroke = np.array(points, dtype=np.float32)
    short = simplify(stroke, tolerance)
    assert (short[0] == stroke[0]).all()
    assert (short[-1] == stroke[-1]).all()
    kept = {tuple(point) for point in short.tolist()}
    assert kept <= {tuple(point) for point in stroke.tolist()}
    for point in stroke:
        starts, ends = (short[:-1], short[1:]) if len(short) > 1 else (short, short)
        along = ends - starts
        squared = (along**2).sum(1).clip(1e-9)
        share = (((point - starts) * along).sum(1) / squared).clip(0, 1)
        nearest = np.hypot(*(starts + share[:, None] * along - point).T).min()
        assert nearest <= tolerance + 1e-3


def test_tracing_a_drawing_recovers_its_lines() -> None:
    image = Image.new("L", (256, 256), 255)
    pen = ImageDraw.Draw(image)
    pen.line([(20, 30), (220, 60), (120, 230), (20, 30)], fill=0, width=4)
    pen.line([(40, 200), (90, 240)], fill=0, width=4)
    found = trace(np.asarray(image))
    canvas = Image.new("L", (256, 256), 255)
    redrawn = ImageDraw.Draw(canvas)
    for stroke in found:
        redrawn.line([(float(x), float(y)) for x, y in stroke * 256 / 255], fill=0, width=4)
    ink, again = np.asarray(image) < 128, np.asarray(canvas) < 128
    assert overlap(ink, again) > 0.75
    assert len(found) <= 5


def test_tracing_an_empty_image_gives_no_stroke() -> None:
    assert trace(np.full((64, 64), 255, dtype=np.uint8)) == ()
