"""The pixels of a data set for training: checked once, kept in memory if they fit.

Decoding is production's (`sbtk_runtime.preprocess`), at the training size.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from sbtk_runtime.errors import BadData, BadImage
from sbtk_runtime.images import read_image_bytes
from sbtk_runtime.preprocess import Kind, Pixels, prepare
from sbtk_train.batches.strokes import render, render_varied, trace
from sbtk_train.data import ImageSet, ImageSource, Rows
from sbtk_train.data.stroke_files import Drawing, Strokes

MAX_UNREADABLE_SHARE = 0.05
MAX_CACHE_BYTES = 3 << 30
_TRACED_PX = 256


@dataclass(frozen=True)
class Unreadable:
    """An image that training leaves out, and why."""

    path: ImageSource
    reason: str


def load_pixels(source: ImageSource, kind: Kind, size_px: int) -> Pixels:
    """Return `(size, size, 3) uint8` for a photo, `(size, size, 1) uint8` for a sketch.

    Raises:
        BadImage: the file is not a readable image, or the sketch is empty.
    """
    if isinstance(source, Drawing):
        return render(source.strokes, size_px)
    pixels = prepare(read_image_bytes(source), kind, size_px).pixels
    return pixels if kind == "photo" else pixels[:, :, :1]


class PixelStore:
    """Pixels of some images at one size, read by a pool of threads.

    Args:
        paths: the images.
        kind: sketches or photos.
        size_px: side of the square.
        workers: decoding threads.
        keep: keep what was decoded.
        redrawn: share of the sketches in bitmaps that are shown as clean strokes along their
            lines, where a batch is varied.
    """

    def __init__(
        self,
        paths: Sequence[ImageSource],
        kind: Kind,
        size_px: int,
        *,
        workers: int,
        keep: bool,
        redrawn: float = 0.0,
    ) -> None:
        self._paths = paths
        self._kind: Kind = kind
        self._size_px = size_px
        self._kept: list[Pixels | None] | None = [None] * len(paths) if keep else None
        self._redrawn = redrawn
        self._traces: dict[int, Strokes] = {}
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="decode")

    def batch(
        self, rows: Sequence[int] | Rows, variation: Sequence[int] | None = None
    ) -> torch.Tensor:
        """Return `(N, C, size, size) uint8`; C is 3 for photos and 1 for sketches.

        Args:
            rows: places of the images.
            variation: seeds how drawings are varied, together with their rows; `None` renders
                them as they are, and shows bitmaps alone.

        Raises:
            BadData: an image cannot be read any more.
        """
        if not len(rows):
            channels = 3 if self._kind == "photo" else 1
            return torch.empty(0, channels, self._size_px, self._size_px, dtype=torch.uint8)
        if variation is None:
            pixels = list(self._pool.map(self._pixels, rows))
        else:
            pixels = list(self._pool.map(lambda row: self._vary(row, variation), rows))
        return torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2)

    def close(self) -> None:
        """End the threads and frees the pixels."""
        self._pool.shutdown(cancel_futures=True)
        self._kept = None

    def _vary(self, row: int, variation: Sequence[int]) -> Pixels:
        source = self._paths[row]
        rng = np.random.default_rng([*variation, int(row)])
        if isinstance(source, Drawing):
            return render_varied(source.strokes, self._size_px, rng)
        if self._redrawn and rng.random() < self._redrawn:
            if row not in self._traces:
                self._traces[row] = trace(load_pixels(source, "sketch", _TRACED_PX)[:, :, 0])
            if self._traces[row]:
                return render_varied(self._traces[row], self._size_px, rng)
        return self._pixels(row)

    def _pixels(self, row: int) -> Pixels:
        kept = self._kept[row] if self._kept is not None else None
        if kept is not None:
            return kept
        try:
            pixels = load_pixels(self._paths[row], self._kind, self._size_px)
        except BadImage as problem:
            raise BadData(
                f"{self._paths[row]} was readable at the start and is not now: {problem.found}"
            ) from problem
        # Rendering a drawing again costs less than the memory.
        if self._kept is not None and isinstance(self._paths[row], Path):
            self._kept[row] = pixels
        return pixels


def fits_in_memory(data: ImageSet, size_px: int, processes: int = 1) -> bool:
    """Return whether all pixels of the set fit into `MAX_CACHE_BYTES` in each process."""
    area = size_px * size_px
    bitmaps = sum(isinstance(sketch, Path) for sketch in data.sketches)
    size_bytes = area * (bitmaps + 3 * len(data.photos))
    return processes * size_bytes <= MAX_CACHE_BYTES


def drop_unreadable(data: ImageSet, workers: int) -> tuple[ImageSet, list[Unreadable]]:
    """Return the set without the images that cannot be decoded, and these.

    Raises:
        BadData: more than `MAX_UNREADABLE_SHARE` of the images are unreadable.
    """
    with ThreadPoolExecutor(workers) as pool:
        sketch_faults = list(pool.map(lambda path: _find_fault(path, "sketch"), data.sketches))
        photo_faults = list(pool.map(lambda path: _find_fault(path, "photo"), data.photos))
    unreadable = [fault for fault in (*sketch_faults, *photo_faults) if fault is not None]
    total = len(data.sketches) + len(data.photos)
    if len(unreadable) > MAX_UNREADABLE_SHARE * total:
        first = unreadable[0]
        raise BadData(
            f"{len(unreadable)} of {total} images cannot be read; first {first.path}: "
            f"{first.reason}",
            f"at most {MAX_UNREADABLE_SHARE:.0%} of them",
            "fix or remove them",
        )
    if not unreadable:
        return data, []
    sketches = [row for row, fault in enumerate(sketch_faults) if fault is None]
    photos = [row for row, fault in enumerate(photo_faults) if fault is None]
    readable = replace(
        data,
        sketches=tuple(data.sketches[row] for row in sketches),
        sketch_labels=data.sketch_labels[sketches],
        photos=tuple(data.photos[row] for row in photos),
        photo_labels=data.photo_labels[photos],
    )
    return readable, unreadable


def _find_fault(path: ImageSource, kind: Kind) -> Unreadable | None:
    try:
        load_pixels(path, kind, 32)
    except BadImage as problem:
        return Unreadable(path, problem.found)
    return None
