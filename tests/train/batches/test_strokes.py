from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageDraw

from sbtk_runtime.preprocess import CROPPED
from sbtk_train.batches.strokes import render, render_varied, simplify, trace, vary
from sbtk_train.data.stroke_files import Strokes
from tests.tiny_data import polygon


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
