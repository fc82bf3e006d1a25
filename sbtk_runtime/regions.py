"""Regions: windows of a photo that are embedded in addition to the whole frame."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from sbtk_runtime.errors import BadConfig, LargeImage
from sbtk_runtime.image_feed import decode_in_subprocess
from sbtk_runtime.preprocess import SIZE_PX, Pixels, photo_pixels

#: Side of the square of pixels that one cell of a model's feature map is computed for.
CELL_PX = 32

#: The default number of regions of a photo; see `grid_of`.
DEFAULT_REGIONS = 16

#: Photos with a larger ratio of their sides are cut into tiles; others are squeezed to a square,
#: like whole frames.
MOST_SQUEEZED = 2.0
#: Tiles of the longest panorama.
MOST_TILES = 8
_TILE_ASPECT = 1.5

#: `(R, 4) float32`: x, y, width and height, each 0 to 1 of a photo.
Boxes = NDArray[np.float32]


def input_side(grid: RegionGrid | None) -> int:
    """Return the side in pixels of a model's input: the grid's, or that of whole frames."""
    return SIZE_PX if grid is None else grid.size_px


def row_shape(grid: RegionGrid | None, dim: int) -> tuple[int, ...]:
    """Return the shape of what a model returns for an image: `(D,)`, or `(R, D)` with a grid."""
    return (dim,) if grid is None else (len(grid), dim)


@dataclass(frozen=True)
class RegionGrid:
    """The windows of a feature map that are pooled into one embedding each.

    Attributes:
        size_px: side of the model's square input, a multiple of 32.
        windows: for each size of window, its side and the stride, in cells of 32 pixels.

    >>> len(RegionGrid(448, ((8, 3),)))
    9
    """

    size_px: int
    windows: tuple[tuple[int, int], ...]

    def __post_init__(self) -> None:
        """Raise `BadConfig` unless there are windows, all within the map."""
        cells, rest = divmod(self.size_px, CELL_PX)
        fits = all(1 <= side <= cells and stride >= 1 for side, stride in self.windows)
        if rest or not fits or not self.windows:
            raise BadConfig(
                f"windows {self.windows} of a map for {self.size_px} px",
                f"windows within the map, one cell for {CELL_PX} px",
            )

    @property
    def cells(self) -> int:
        """The side of the feature map."""
        return self.size_px // CELL_PX

    def __len__(self) -> int:
        """The number of windows."""
        return sum(len(self._starts(side, stride)) ** 2 for side, stride in self.windows)

    def boxes(self) -> Boxes:
        """Return the windows `(R, 4) float32` as x, y, width and height, each 0 to 1.

        They are in the order of the model's rows: by size, then from top to bottom, then from left
        to right.
        """
        boxes = [
            (left, top, side, side)
            for side, stride in self.windows
            for top in self._starts(side, stride)
            for left in self._starts(side, stride)
        ]
        return np.array(boxes, dtype=np.float32) / np.float32(self.cells)

    def _starts(self, side: int, stride: int) -> range:
        return range(0, self.cells - side + 1, stride)


#: Grids by their number of windows. Chosen on scenes and photos of validation classes: windows of
#: 0.43 or 0.36 of the side find things of a third to two thirds of it; more sizes found no more.
GRIDS = {9: RegionGrid(448, ((6, 4),)), 16: RegionGrid(448, ((5, 3),))}


def grid_of(count: int) -> RegionGrid:
    """Return the grid of `count` windows.

    Raises:
        BadConfig: there is none of that number.
    """
    if count not in GRIDS:
        raise BadConfig(f"{count} regions a photo", " or ".join(map(str, GRIDS)))
    return GRIDS[count]


@dataclass(frozen=True)
class Tile:
    """A part of a photo, prepared for a model with regions.

    Attributes:
        pixels: `(S, S, 3) uint8` RGB.
        box: the part's x, y, width and height, 0 to 1 of the photo.
    """

    pixels: Pixels
    box: tuple[float, float, float, float] = (0.0, 0.0, 1.0, 1.0)

    def boxes(self, grid: RegionGrid) -> Boxes:
        """Return the windows `(R, 4) float32` of the tile as parts of the photo."""
        x, y, width, height = self.box
        scale = np.array([width, height, width, height], dtype=np.float32)
        boxes = grid.boxes() * scale + np.array([x, y, 0, 0], dtype=np.float32)
        return np.asarray(np.minimum(boxes, np.float32(1.0)))


def cut_tiles(image: Image.Image, size_px: int) -> tuple[Tile, ...]:
    """Return the parts of a decoded photo whose windows are embedded, `size_px` wide and high.

    This is the whole photo, or for a panorama, overlapping squares along its length. A photo that
    is smaller than the model's input has none, since its parts would show no more detail.
    """
    width, height = image.size
    if min(width, height) < SIZE_PX:
        return ()
    spans = _spans(max(width, height) / min(width, height))
    if len(spans) == 1:
        return (Tile(photo_pixels(image, size_px)),)
    tiles = []
    for start, length in spans:
        box = (start, 0.0, length, 1.0) if width > height else (0.0, start, 1.0, length)
        left, top = round(box[0] * width), round(box[1] * height)
        right, bottom = left + round(box[2] * width), top + round(box[3] * height)
        tiles.append(Tile(photo_pixels(image.crop((left, top, right, bottom)), size_px), box))
    return tuple(tiles)


def cut_tiles_apart(data: bytes, problem: LargeImage, size_px: int) -> tuple[Tile, ...]:
    """Return the `cut_tiles` of the bytes of a photo that is too large to decode in this process.

    Raises:
        BadImage: it is too large for any process, or cannot be read.
    """
    pixels, boxes = decode_in_subprocess(data, problem, "tiles", str(size_px))
    return tuple(Tile(*each) for each in zip(pixels, map(tuple, boxes), strict=True))


def _spans(aspect: float) -> list[tuple[float, float]]:
    """Return start and length of the tiles along a side, as shares of it."""
    if aspect <= MOST_SQUEEZED:
        return [(0.0, 1.0)]
    count = min(MOST_TILES, math.ceil(aspect / _TILE_ASPECT) + 1)
    length = max(_TILE_ASPECT / aspect, 2.0 / (count + 1))
    return [(index * (1.0 - length) / (count - 1), length) for index in range(count)]
