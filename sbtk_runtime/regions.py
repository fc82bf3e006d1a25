"""Regions: the windows of a photo that are embedded beside the whole frame."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sbtk_runtime.errors import BadConfig
from sbtk_runtime.preprocess import SIZE_PX

#: Side of the square of pixels that one cell of a model's feature map is computed for.
CELL_PX = 32

Boxes = NDArray[np.float32]


def input_side(grid: RegionGrid | None) -> int:
    """Return the side in pixels of a model's input: the grid's, or that of whole frames."""
    return SIZE_PX if grid is None else grid.size_px


def row_shape(grid: RegionGrid | None, dim: int) -> tuple[int, ...]:
    """Return the shape of what a model returns for an image: `(D,)`, or `(R, D)` with a grid."""
    return (dim,) if grid is None else (len(grid), dim)


@dataclass(frozen=True)
class RegionGrid:
    """The windows of a feature map that are pooled, each for an embedding of its own.

    Attributes:
        size_px: side of the model's square input, a multiple of 32.
        windows: of each size of window its side and the distance between two neighbours, in cells
            of 32 pixels.

    >>> len(RegionGrid(448, ((8, 3),)))
    9
    """

    size_px: int
    windows: tuple[tuple[int, int], ...]

    def __post_init__(self) -> None:
        """Check that there are windows, and that they lie within the map.

        Raises:
            BadConfig: they do not.
        """
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
