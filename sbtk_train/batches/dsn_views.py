"""DSN's and SAKE's random changes: one move for all views of an image, then views of their own.

As in haowang1992/DSN `src/Sketchy.py` and its training scripts, on pixels that are already at the
training size. With probability 0.7 an image is moved, which all its views share: mirrored (0.5),
scaled on each axis (0.5), turned (0.5) and shifted (0.5), about its top left corner as
scikit-image does it there, with black where nothing is. The first view is left at that; the two
others are each mirrored (0.5), changed in colour (0.8) and made grey (0.2). All chance
comes from draws that are given, so a batch can be made again exactly.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from sbtk_train.batches.augment import normalised_unit, unit_images
from sbtk_train.batches.colour_jitter import grey_of, jittered
from sbtk_train.batches.draws import Draws

_MOVED_SHARE = 0.7
_SCALES = (0.7, 1.3)
_TURN_DEGREES = 30.0
#: The authors shift stored images of 256 pixels; images of another size in proportion.
_SHIFT_SHARE = 10.0 / 256.0
_JITTER_SHARE = 0.8
_GREY_SHARE = 0.2


def moved_images(pixels: Tensor, draw: Draws) -> Tensor:
    """Returns `(N, C, H, W) float32` images in [0, 1], moved as all views of an image are.

    Args:
        pixels: `(N, C, H, W) uint8`.
        draw: for these N images.
    """
    moves = random_moves(pixels.shape[-1], draw)
    return warped(unit_images(pixels), moves)


def plain_view(images: Tensor) -> Tensor:
    """Returns the view that is classified and distilled, `(N, 3, H, W)` ImageNet-normalised."""
    return normalised_unit(images)


def contrastive_view(images: Tensor, draw: Draws) -> Tensor:
    """Returns a view for the contrastive loss, `(N, 3, H, W)` ImageNet-normalised.

    Args:
        images: `(N, 1 or 3, H, W) float32` in [0, 1], from `moved_images`.
        draw: for these N images.
    """
    is_mirrored = draw.chance(0.5).to(images.device)
    images = torch.where(is_mirrored[:, None, None, None], images.flip(3), images)
    images = jittered(images, draw.chance(_JITTER_SHARE), draw)
    is_grey = draw.chance(_GREY_SHARE).to(images.device)
    images = torch.where(is_grey[:, None, None, None], grey_of(images), images)
    return normalised_unit(images)


def random_moves(size_px: int, draw: Draws) -> Tensor:
    """Returns `(N, 3, 3) float64` matrices that take a pixel's place to where it is moved.

    A place is (column, row, 1), counted from the middle of the top left pixel. Images that are not
    moved have the identity.
    """
    low, high = _SCALES
    scales = low + (high - low) * draw.uniform(2, dtype=torch.float64)
    scales = torch.where(draw.chance(0.5)[:, None], scales, 1.0)
    angles = (2 * draw.uniform(dtype=torch.float64) - 1) * _TURN_DEGREES
    angles = torch.where(draw.chance(0.5), angles, 0.0) * math.pi / 180
    shifts = (2 * draw.uniform(2, dtype=torch.float64) - 1) * _SHIFT_SHARE
    shifts = torch.where(draw.chance(0.5)[:, None], shifts, 0.0) * size_px
    moves = torch.eye(3, dtype=torch.float64).repeat(len(scales), 1, 1)
    moves[:, 0, 0] = scales[:, 0] * angles.cos()
    moves[:, 0, 1] = -scales[:, 1] * angles.sin()
    moves[:, 1, 0] = scales[:, 0] * angles.sin()
    moves[:, 1, 1] = scales[:, 1] * angles.cos()
    moves[:, :2, 2] = shifts
    mirrored = torch.eye(3, dtype=torch.float64)
    mirrored[0, 0], mirrored[0, 2] = -1.0, size_px - 1.0
    is_mirrored = draw.chance(0.5)[:, None, None]
    moves = torch.where(is_mirrored, moves @ mirrored, moves)
    is_moved = draw.chance(_MOVED_SHARE)[:, None, None]
    return torch.where(is_moved, moves, torch.eye(3, dtype=torch.float64))


def warped(images: Tensor, moves: Tensor) -> Tensor:
    """Returns images `(N, C, S, S)` moved by `moves (N, 3, 3)`, bilinear, black from outside."""
    size_px = images.shape[-1]
    # grid_sample asks where each pixel comes from, with the middles of the outermost at -1 and 1.
    to_unit = torch.eye(3, dtype=torch.float64) * 2 / (size_px - 1)
    to_unit[:, 2] = torch.tensor([-1.0, -1.0, 1.0], dtype=torch.float64)
    sources = to_unit @ torch.linalg.inv(moves) @ torch.linalg.inv(to_unit)
    theta = sources[:, :2].float().to(images.device)
    if not len(images):
        return images  # torch makes no grid for none
    grid = functional.affine_grid(theta, list(images.shape), align_corners=True)
    return functional.grid_sample(images, grid, align_corners=True)
