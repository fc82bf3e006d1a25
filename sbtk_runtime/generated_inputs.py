"""Synthetic images and vectors for benchmarks without data, and for checks of engines."""

from __future__ import annotations

import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

Embeddings = NDArray[np.float32]

PHOTO_SIZE_PX = (1024, 768)
SKETCH_SIZE_PX = (512, 512)
IMAGES_DESCRIBED = (
    f"generated: {PHOTO_SIZE_PX[0]} x {PHOTO_SIZE_PX[1]} JPEG photos and "
    f"{SKETCH_SIZE_PX[0]} x {SKETCH_SIZE_PX[1]} PNG sketches"
)

_ROWS_PER_CLUSTER = 100
_SPREAD = 1.0
_CHUNK_ROWS = 8192


def generate_photos(count: int, seed: int = 0) -> list[bytes]:
    """Return JPEG files with as much detail, and decoding cost, as camera photos.

    They are sums of noise of decreasing strength at each octave, as in natural images.
    """
    random = np.random.default_rng(seed)
    return [_file_from_image(_octaves(random), "JPEG", quality=88) for _ in range(count)]


def generate_sketches(count: int, seed: int = 0) -> list[bytes]:
    """Return PNG files of a dozen dark strokes on white."""
    random = np.random.default_rng(seed)
    return [_file_from_image(_strokes(random), "PNG") for _ in range(count)]


def clustered_vectors(count: int, dim: int, *, seed: int = 0, of: int | None = None) -> Embeddings:
    """Return `(count, dim) float32` unit rows in clusters, like embeddings of classes.

    A row is `normalise(centre + noise)`, both Gaussian with equal expected length, so the cosine of
    two rows of a cluster is about 0.5. Centres depend only on `seed` and the number of rows.

    Args:
        count: number of rows.
        dim: length of a row.
        seed: seed of NumPy's PCG64.
        of: to generate queries, the number of rows of the searched set; queries have the same
            centres and other noise.
    """
    clusters = max(1, (of or count) // _ROWS_PER_CLUSTER)
    centres = np.random.default_rng((seed, 0)).standard_normal((clusters, dim), dtype=np.float32)
    random = np.random.default_rng((seed, 1 if of is None else 2))
    rows = np.empty((count, dim), dtype=np.float32)
    for start in range(0, count, _CHUNK_ROWS):
        chunk = rows[start : start + _CHUNK_ROWS]
        random.standard_normal(dtype=np.float32, out=chunk)
        chunk *= _SPREAD
        chunk += centres[random.integers(0, clusters, len(chunk))]
        chunk /= np.linalg.norm(chunk, axis=1, keepdims=True)
    return rows


def clustered_named(count: int, dim: int, seed: int) -> str:
    """Return a description of `clustered_vectors` with these arguments."""
    return (
        f"{count:,} x {dim} synthetic unit vectors: normalise(centre + noise), both standard "
        f"normal, {_ROWS_PER_CLUSTER} rows to a centre, NumPy PCG64, seed {seed}"
    )


def _octaves(random: np.random.Generator) -> Image.Image:
    width, height = PHOTO_SIZE_PX
    total = np.zeros((height, width, 3), dtype=np.float32)
    for octave in range(9):
        cells = (3 << octave, 4 << octave)
        noise = random.integers(0, 256, (*cells, 3)).astype(np.uint8)
        layer = Image.fromarray(noise).resize(PHOTO_SIZE_PX, Image.Resampling.BICUBIC)
        total += (np.asarray(layer, dtype=np.float32) - 128.0) / 1.3**octave
    return Image.fromarray(np.clip(total * 0.6 + 128.0, 0, 255).astype(np.uint8))


def _strokes(random: np.random.Generator) -> Image.Image:
    image = Image.new("L", SKETCH_SIZE_PX, 255)
    draw = ImageDraw.Draw(image)
    for _ in range(12):
        start = random.uniform(60, 450, 2)
        turns = np.cumsum(random.normal(0, 0.35, 40)) + random.uniform(0, 6.28)
        steps = 7.0 * np.stack([np.cos(turns), np.sin(turns)], axis=1)
        points = np.clip(start + np.cumsum(steps, axis=0), 8, 504)
        draw.line([(float(x), float(y)) for x, y in points], fill=0, width=3)
    return image


def _file_from_image(image: Image.Image, file_format: str, quality: int = 90) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, file_format, quality=quality)
    return buffer.getvalue()
