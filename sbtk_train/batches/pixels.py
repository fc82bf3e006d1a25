"""The pixels of a data set for training, checked once and cached in memory if they fit.

Images are decoded by the runtime (`sbtk_runtime.preprocess`), at the training size.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from sbtk_runtime.errors import BadData, BadImage
from sbtk_runtime.images import read_image_bytes
from sbtk_runtime.preprocess import CROPPED, Kind, Pixels, Preprocessing
from sbtk_train.data.image_set import ImageSet, ImageSource, Rows, select_images
from sbtk_train.data.strokes import Drawing, Strokes, find_frame, render, render_varied, trace

MAX_UNREADABLE_SHARE = 0.05
MAX_CACHE_BYTES = 3 << 30
_TRACED_PX = 256


@dataclass(frozen=True)
class Unreadable:
    """An image that cannot be used for training, and the reason."""

    path: ImageSource
    reason: str


def load_pixels(
    source: ImageSource, kind: Kind, size_px: int, preprocessing: Preprocessing
) -> Pixels:
    """Return `(size, size, 3) uint8` for a photo, `(size, size, 1) uint8` for a sketch.

    Drawings of stroke files have no page, so they always fill the image.

    Raises:
        BadImage: the file is not an image, is damaged, or is an empty sketch.
    """
    if isinstance(source, Drawing):
        return render(source.strokes, size_px)
    pixels = preprocessing.prepare(read_image_bytes(source), kind, size_px).pixels
    return pixels if kind == "photo" else pixels[:, :, :1]


class PixelStore:
    """Pixels of images at one size, decoded by a pool of threads.

    Args:
        paths: the images.
        kind: sketches or photos.
        size_px: side of the square.
        preprocessing: of the student.
        workers: number of decoding threads.
        keep: cache decoded images.
        redrawn: share of bitmap sketches to trace and show as clean strokes in varied batches.
    """

    def __init__(
        self,
        paths: Sequence[ImageSource],
        kind: Kind,
        size_px: int,
        preprocessing: Preprocessing,
        *,
        workers: int,
        keep: bool,
        redrawn: float = 0.0,
    ) -> None:
        self._paths = paths
        self._kind: Kind = kind
        self._size_px = size_px
        self._preprocessing = preprocessing
        self._kept: list[Pixels | None] | None = [None] * len(paths) if keep else None
        self._redrawn = redrawn
        self._traces: dict[int, Strokes] = {}
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="decode")

    def batch(
        self, rows: Sequence[int] | Rows, variation: Sequence[int] | None = None
    ) -> torch.Tensor:
        """Return `(N, C, size, size) uint8`; C is 3 for photos and 1 for sketches.

        Args:
            rows: indices of the images.
            variation: seed of the drawings' variations, together with their rows; `None` renders
                drawings unchanged and redraws no bitmaps.

        Raises:
            BadData: an image can no longer be read.
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
        """Stop the threads and free the pixels."""
        self._pool.shutdown(cancel_futures=True)
        self._kept = None

    def _vary(self, row: int, variation: Sequence[int]) -> Pixels:
        source = self._paths[row]
        rng = np.random.default_rng([*variation, int(row)])
        if isinstance(source, Drawing):
            return render_varied(source.strokes, self._size_px, rng)
        if self._redrawn and rng.random() < self._redrawn:
            if row not in self._traces:
                traced = load_pixels(source, "sketch", _TRACED_PX, self._preprocessing)
                self._traces[row] = trace(traced[:, :, 0])
            if strokes := self._traces[row]:
                frame = None if self._preprocessing.ink_crop else find_frame(strokes)
                return render_varied(strokes, self._size_px, rng, frame)
        return self._pixels(row)

    def _pixels(self, row: int) -> Pixels:
        kept = self._kept[row] if self._kept is not None else None
        if kept is not None:
            return kept
        try:
            pixels = load_pixels(self._paths[row], self._kind, self._size_px, self._preprocessing)
        except BadImage as problem:
            raise BadData(
                f"{self._paths[row]} was readable at the start, but no longer: {problem.found}"
            ) from problem
        # Drawings are cheap to render again.
        if self._kept is not None and isinstance(self._paths[row], Path):
            self._kept[row] = pixels
        return pixels


def fits_in_memory(data: ImageSet, size_px: int, processes: int = 1) -> bool:
    """Return whether the pixels of the set, once per process, fit into `MAX_CACHE_BYTES`."""
    area = size_px * size_px
    bitmaps = sum(isinstance(sketch, Path) for sketch in data.sketches)
    size_bytes = area * (bitmaps + 3 * len(data.photos))
    return processes * size_bytes <= MAX_CACHE_BYTES


def drop_unreadable(data: ImageSet, workers: int) -> tuple[ImageSet, list[Unreadable]]:
    """Return the set without the images that cannot be decoded, and those images.

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
    sketches, photos = (
        [row for row, fault in enumerate(faults) if fault is None]
        for faults in (sketch_faults, photo_faults)
    )
    return select_images(data, sketches=sketches, photos=photos), unreadable


def _find_fault(path: ImageSource, kind: Kind) -> Unreadable | None:
    try:
        # What can be read does not depend on the preprocessing.
        load_pixels(path, kind, 32, CROPPED)
    except BadImage as problem:
        return Unreadable(path, problem.found)
    return None
