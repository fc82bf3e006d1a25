"""Random changes to training batches, on tensors, so that they run where the student runs.

All chance comes from draws that are given, so a batch can be made again exactly.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from sbtk_runtime.preprocess import IMAGENET_MEAN, IMAGENET_STD
from sbtk_train.batches.draws import Draws

_SKETCH_TURN_DEGREES = 15.0
_PHOTO_TURN_DEGREES = 8.0
_SKETCH_LOG_SCALE = 0.2
_PHOTO_LOG_SCALE = 0.15
#: Photos are looked at a little closer on average, as a random crop would.
_PHOTO_ZOOM = 0.88
_SHIFT = 0.08
_THICKEN_SHARE = 0.3
_THIN_SHARE = 0.15
_DROP_SHARE = 0.5
_DROPPED_AREA = 0.06
_GREY_SHARE = 0.2


def normalised(pixels: Tensor) -> Tensor:
    """Returns `(N, 3, H, W) float32`, ImageNet-normalised, of `(N, 1 or 3, H, W) uint8`."""
    return normalised_unit(unit_images(pixels))


def unit_images(pixels: Tensor) -> Tensor:
    """Returns `(N, C, H, W) float32` in [0, 1] of `(N, C, H, W) uint8`."""
    return pixels.float().div(255).contiguous()


def normalised_unit(images: Tensor) -> Tensor:
    """Returns `(N, 3, H, W) float32`, ImageNet-normalised, of `(N, 1 or 3, H, W)` in [0, 1]."""
    images = images.expand(-1, 3, -1, -1)
    normal = (images - _channels(IMAGENET_MEAN, images)) / _channels(IMAGENET_STD, images)
    return normal.contiguous(memory_format=torch.channels_last)


def augmented_photos(pixels: Tensor, draw: Draws) -> Tensor:
    """Returns photos flipped, moved, and changed in colour, ImageNet-normalised.

    Args:
        pixels: `(N, 3, H, W) uint8`.
        draw: for these N images.
    """
    photos = unit_images(pixels)
    photos = _moved(photos, draw, _PHOTO_TURN_DEGREES, _PHOTO_LOG_SCALE, _PHOTO_ZOOM, "reflection")
    brightness = 1 + 0.3 * _spread(draw, photos)
    photos = photos * brightness
    mean = photos.mean((1, 2, 3), keepdim=True)
    photos = (photos - mean) * (1 + 0.3 * _spread(draw, photos)) + mean
    grey = photos.mean(1, keepdim=True)
    saturation = 1 + 0.4 * _spread(draw, photos)
    saturation = saturation * (~draw.chance(_GREY_SHARE, 1, 1, 1)).to(photos.device).float()
    return normalised_unit(((photos - grey) * saturation + grey).clamp(0, 1))


def augmented_sketches(pixels: Tensor, draw: Draws) -> Tensor:
    """Returns sketches flipped, moved, redrawn thicker or thinner, and with strokes missing.

    Args:
        pixels: `(N, 1, H, W) uint8`, dark ink on white.
        draw: for these N images.
    """
    ink = 1 - unit_images(pixels)
    ink = _moved(ink, draw, _SKETCH_TURN_DEGREES, _SKETCH_LOG_SCALE, 1.0, "zeros")
    width = draw.uniform().to(ink.device).view(-1, 1, 1, 1)
    thick = functional.max_pool2d(ink, 3, stride=1, padding=1)
    eroded = -functional.max_pool2d(-ink, 2, stride=1)
    thin = (functional.pad(eroded, (0, 1, 0, 1)) * 1.3).clamp(max=1)
    ink = torch.where(width < _THICKEN_SHARE, thick, ink)
    ink = torch.where(width > 1 - _THIN_SHARE, thin, ink)
    patches = draw.chance(_DROPPED_AREA, 1, 8, 8) & draw.chance(_DROP_SHARE, 1, 1, 1)
    missing = functional.interpolate(patches.to(ink.device).float(), ink.shape[-2:])
    return normalised_unit(1 - ink * (1 - missing))


def _moved(
    images: Tensor, draw: Draws, degrees: float, log_scale: float, zoom: float, edge: str
) -> Tensor:
    angle = (draw.uniform() * 2 - 1) * math.radians(degrees)
    scale = torch.exp((draw.uniform(2) * 2 - 1) * log_scale) * zoom
    flip = draw.chance(0.5).float() * 2 - 1
    theta = torch.zeros(len(images), 2, 3)
    theta[:, 0, 0] = flip * scale[:, 0] * angle.cos()
    theta[:, 0, 1] = -scale[:, 1] * angle.sin()
    theta[:, 1, 0] = flip * scale[:, 0] * angle.sin()
    theta[:, 1, 1] = scale[:, 1] * angle.cos()
    theta[:, :, 2] = (draw.uniform(2) * 2 - 1) * _SHIFT
    if not len(images):
        return images  # torch makes no grid for none
    grid = functional.affine_grid(theta.to(images.device), list(images.shape), align_corners=False)
    return functional.grid_sample(images, grid, padding_mode=edge, align_corners=False)


def _spread(draw: Draws, images: Tensor) -> Tensor:
    """Returns `(N, 1, 1, 1)` numbers in [-1, 1)."""
    return (draw.uniform(1, 1, 1) * 2 - 1).to(images.device)


def _channels(values: Sequence[float], like: Tensor) -> Tensor:
    return torch.tensor(values, device=like.device).view(1, 3, 1, 1)
