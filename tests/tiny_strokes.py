"""Stroke files of a few polygons, as a vector drawing data set would have them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

Polygon = Sequence[tuple[float, float]]


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
