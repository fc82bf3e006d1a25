"""Tiny data sets for training tests: classes of shapes, as sketches and photos or as strokes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageDraw

if TYPE_CHECKING:
    from sbtk_train.config import Recipe, TrainConfig

CLASSES = ("arch", "ball", "crate", "disc", "easel", "fence")

Polygon = Sequence[tuple[float, float]]


def write_dataset(
    root: Path, classes: Sequence[str] = CLASSES, sketches: int = 4, photos: int = 4
) -> Path:
    """Return `root` with `{sketch,photo}/<class>/*`; a class is a polygon of its own."""
    for label, name in enumerate(classes):
        for kind, count in (("sketch", sketches), ("photo", photos)):
            folder = root / kind / name
            folder.mkdir(parents=True, exist_ok=True)
            for number in range(count):
                image = _image(label, number, is_sketch=kind == "sketch")
                image.save(folder / f"{number}.{'png' if kind == 'sketch' else 'jpg'}")
    return root


def write_strokes(
    path: Path, drawings: Sequence[tuple[str, Sequence[Polygon]]], **changes: Any
) -> Path:
    """Write drawings, each a class name and its strokes; `changes` replace whole arrays."""
    classes = sorted({name for name, _ in drawings})
    strokes = [stroke for _, parts in drawings for stroke in parts]
    points = [point for stroke in strokes for point in stroke]
    arrays: dict[str, Any] = {
        "points": np.array(points, dtype=np.uint8).reshape(-1, 2),
        "stroke_offsets": np.cumsum([0, *map(len, strokes)]).astype(np.int32),
        "drawing_offsets": np.cumsum([0, *(len(parts) for _, parts in drawings)]).astype(np.int32),
        "labels": np.array([classes.index(name) for name, _ in drawings], dtype=np.int16),
        "classes": np.array(classes),
    }
    np.savez(path, **(arrays | changes))
    return path


def polygon(corners: int, turn: float = 0.0) -> list[tuple[float, float]]:
    """Return a closed polygon around the middle of 0..255."""
    angles = turn + 2 * np.pi * np.arange(corners + 1) / corners
    return [(128 + 100 * float(np.cos(a)), 128 + 100 * float(np.sin(a))) for a in angles]


def quick_config(data: Path, recipe: Recipe, **changes: Any) -> TrainConfig:
    """Return the configuration of a run of seconds, on one thread of the CPU."""
    from sbtk_train.config import TrainConfig

    values: dict[str, Any] = {
        "backbone": "resnet18",
        "dim": 8,
        "validation_classes": 2,
        "precision": "fp32",
        "device": "cpu",
        "workers": 2,
        "threads": 1,
    }
    return TrainConfig(str(data), "SK-YE", recipe, **(values | changes))


def _image(label: int, number: int, *, is_sketch: bool) -> Image.Image:
    random = np.random.default_rng([label, number, int(is_sketch)])
    ground = 255 if is_sketch else tuple(int(c) for c in random.integers(120, 256, 3))
    image = Image.new("L" if is_sketch else "RGB", (64, 64), ground)
    middle = 32 + random.integers(-4, 5, 2)
    radius = int(random.integers(16, 26))
    angles = 2 * np.pi * np.arange(3 + label) / (3 + label)
    corners = [
        (float(middle[0] + radius * np.cos(angle)), float(middle[1] + radius * np.sin(angle)))
        for angle in angles
    ]
    draw = ImageDraw.Draw(image)
    if is_sketch:
        draw.polygon(corners, outline=0, width=2)
    else:
        draw.polygon(corners, fill=tuple(int(c) for c in random.integers(0, 100, 3)))
    return image
