"""Augmentation of training batches as tensors, on the student's device.

All random numbers come from a `BatchRng`, so a batch can be reproduced exactly.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from sbtk_runtime.preprocess import IMAGENET_MEAN, IMAGENET_STD
from sbtk_train.batches.sampler import BatchRng

_SKETCH_TURN_DEGREES = 15.0
_PHOTO_TURN_DEGREES = 8.0
_SKETCH_LOG_SCALE = 0.2
_PHOTO_LOG_SCALE = 0.15
#: Photos are enlarged a little on average, as by a random crop.
_PHOTO_ZOOM = 0.88
_SHIFT = 0.08
_THICKEN_SHARE = 0.3
_THIN_SHARE = 0.15
_DROP_SHARE = 0.5
_DROPPED_AREA = 0.06
_GREY_SHARE = 0.2


def normalise(pixels: Tensor) -> Tensor:
    """Return `(N, 3, H, W) float32`, ImageNet-normalised, of `(N, 1 or 3, H, W) uint8`."""
    return normalise_unit(scale_to_unit(pixels))


def scale_to_unit(pixels: Tensor) -> Tensor:
    """Return `(N, C, H, W) float32` in [0, 1] of `(N, C, H, W) uint8`."""
    return pixels.float().div(255).contiguous()


def normalise_unit(images: Tensor) -> Tensor:
    """Return `(N, 3, H, W) float32`, ImageNet-normalised, of `(N, 1 or 3, H, W)` in [0, 1]."""
    images = images.expand(-1, 3, -1, -1)
    normal = (images - _channels(IMAGENET_MEAN, images)) / _channels(IMAGENET_STD, images)
    return normal.contiguous(memory_format=torch.channels_last)


def augment_photos(pixels: Tensor, rng: BatchRng) -> Tensor:
    """Return `(N, 3, H, W) float32` photos, warped, flipped and recoloured, ImageNet-normalised.

    Args:
        pixels: `(N, 3, H, W) uint8`.
        rng: random numbers of these N images.
    """
    photos = scale_to_unit(pixels)
    photos = _apply_affine(
        photos, rng, _PHOTO_TURN_DEGREES, _PHOTO_LOG_SCALE, _PHOTO_ZOOM, "reflection"
    )
    brightness = 1 + 0.3 * _sample_symmetric(rng, photos)
    photos = photos * brightness
    mean = photos.mean((1, 2, 3), keepdim=True)
    photos = (photos - mean) * (1 + 0.3 * _sample_symmetric(rng, photos)) + mean
    grey = photos.mean(1, keepdim=True)
    saturation = 1 + 0.4 * _sample_symmetric(rng, photos)
    saturation = saturation * (~rng.bernoulli(_GREY_SHARE, 1, 1, 1)).to(photos.device).float()
    return normalise_unit(((photos - grey) * saturation + grey).clamp(0, 1))


def augment_sketches(pixels: Tensor, rng: BatchRng) -> Tensor:
    """Return `(N, 3, H, W) float32` sketches, ImageNet-normalised.

    They are warped, flipped, drawn with thicker or thinner lines, and lack patches of ink.

    Args:
        pixels: `(N, 1, H, W) uint8`, dark ink on white.
        rng: random numbers of these N images.
    """
    ink = 1 - scale_to_unit(pixels)
    ink = _apply_affine(ink, rng, _SKETCH_TURN_DEGREES, _SKETCH_LOG_SCALE, 1.0, "zeros")
    width = rng.uniform().to(ink.device).view(-1, 1, 1, 1)
    thick = functional.max_pool2d(ink, 3, stride=1, padding=1)
    eroded = -functional.max_pool2d(-ink, 2, stride=1)
    thin = (functional.pad(eroded, (0, 1, 0, 1)) * 1.3).clamp(max=1)
    ink = torch.where(width < _THICKEN_SHARE, thick, ink)
    ink = torch.where(width > 1 - _THIN_SHARE, thin, ink)
    patches = rng.bernoulli(_DROPPED_AREA, 1, 8, 8) & rng.bernoulli(_DROP_SHARE, 1, 1, 1)
    missing = functional.interpolate(patches.to(ink.device).float(), ink.shape[-2:])
    return normalise_unit(1 - ink * (1 - missing))


def _apply_affine(
    images: Tensor, rng: BatchRng, degrees: float, log_scale: float, zoom: float, edge: str
) -> Tensor:
    angle = (rng.uniform() * 2 - 1) * math.radians(degrees)
    scale = torch.exp((rng.uniform(2) * 2 - 1) * log_scale) * zoom
    flip = rng.bernoulli(0.5).float() * 2 - 1
    theta = torch.zeros(len(images), 2, 3)
    theta[:, 0, 0] = flip * scale[:, 0] * angle.cos()
    theta[:, 0, 1] = -scale[:, 1] * angle.sin()
    theta[:, 1, 0] = flip * scale[:, 0] * angle.sin()
    theta[:, 1, 1] = scale[:, 1] * angle.cos()
    theta[:, :, 2] = (rng.uniform(2) * 2 - 1) * _SHIFT
    if not len(images):
        return images  # torch cannot make an empty grid
    grid = functional.affine_grid(theta.to(images.device), list(images.shape), align_corners=False)
    return functional.grid_sample(images, grid, padding_mode=edge, align_corners=False)


def _sample_symmetric(rng: BatchRng, images: Tensor) -> Tensor:
    """Return `(N, 1, 1, 1)` numbers in [-1, 1)."""
    return (rng.uniform(1, 1, 1) * 2 - 1).to(images.device)


def _channels(values: Sequence[float], like: Tensor) -> Tensor:
    return torch.tensor(values, device=like.device).view(1, 3, 1, 1)


_STRENGTH = 0.4
_HUE = 0.1
#: Shares of red, green and blue in grey (ITU-R 601, as in torchvision and Pillow).
_GREY = (0.2989, 0.587, 0.114)


def jitter_colours(images: Tensor, is_changed: Tensor, rng: BatchRng) -> Tensor:
    """Return images with brightness, contrast, saturation and hue changed in random order.

    This is torchvision's `ColorJitter` with other amounts for each image: factors are uniform in
    [0.6, 1.4], hue shifts in [-0.1, 0.1] of a turn.

    Args:
        images: `(N, 3, H, W) float32` in [0, 1], or grey ones, `(N, 1, H, W)`, of which only
            brightness and contrast are changed.
        is_changed: `(N,) bool`, on the CPU; the other images stay as they are.
        rng: random numbers of these N images.
    """
    order = rng.uniform(4).argsort(dim=1)
    amounts = rng.uniform(4) * 2 - 1
    amounts = amounts * torch.tensor([_STRENGTH, _STRENGTH, _STRENGTH, _HUE])
    amounts += torch.tensor([1.0, 1.0, 1.0, 0.0])
    changes: tuple[Callable[[Tensor, Tensor], Tensor], ...]
    changes = (adjust_brightness, adjust_contrast, adjust_saturation, adjust_hue)
    images = images.clone()
    for place in range(4):
        for number, change in enumerate(changes[: 4 if images.shape[1] == 3 else 2]):
            rows = torch.nonzero((order[:, place] == number) & is_changed)[:, 0]
            if len(rows):
                amount = amounts[rows, number].to(images.device).view(-1, 1, 1, 1)
                rows = rows.to(images.device)
                images[rows] = change(images[rows], amount)
    return images


def adjust_brightness(images: Tensor, factors: Tensor) -> Tensor:
    """Return images `(N, C, H, W)` multiplied by factors `(N, 1, 1, 1)`, clamped to [0, 1]."""
    return (images * factors).clamp(0, 1)


def adjust_contrast(images: Tensor, factors: Tensor) -> Tensor:
    """Return images `(N, C, H, W)`, interpolated by factors `(N, 1, 1, 1)` from their mean grey."""
    mean = convert_to_grey(images).mean((1, 2, 3), keepdim=True)
    return torch.lerp(mean, images, factors).clamp(0, 1)


def adjust_saturation(images: Tensor, factors: Tensor) -> Tensor:
    """Return images `(N, C, H, W)`, interpolated by factors `(N, 1, 1, 1)` from their grey."""
    return torch.lerp(convert_to_grey(images), images, factors).clamp(0, 1)


def adjust_hue(images: Tensor, turns: Tensor) -> Tensor:
    """Return images `(N, 3, H, W)` with hues rotated by `turns (N, 1, 1, 1)`, -1 to 1."""
    red, green, blue = (images[:, number, None] for number in range(3))
    high, low = images.amax(1, keepdim=True), images.amin(1, keepdim=True)
    span = high - low
    divisor = torch.where(span > 0, span, 1.0)
    sixths = torch.where(
        high == red,
        (green - blue) / divisor,
        torch.where(high == green, (blue - red) / divisor + 2, (red - green) / divisor + 4),
    )
    sixths = sixths + 6 * turns
    channels = []
    for start in (5, 3, 1):
        place = (start + sixths) % 6
        channels.append(high - span * torch.minimum(place, 4 - place).clamp(0, 1))
    return torch.cat(channels, dim=1)


def convert_to_grey(images: Tensor) -> Tensor:
    """Return the grey, `(N, 1, H, W)`, of colour images; grey ones stay as they are."""
    if images.shape[1] == 1:
        return images
    shares = torch.tensor(_GREY, device=images.device).view(1, 3, 1, 1)
    return (images * shares).sum(1, keepdim=True)


_MOVED_SHARE = 0.7
_SCALES = (0.7, 1.3)
_TURN_DEGREES = 30.0
#: The authors shift images of 256 pixels; images of other sizes are shifted in proportion.
_SHIFT_SHARE = 10.0 / 256.0
_JITTER_SHARE = 0.8


def move_images(pixels: Tensor, rng: BatchRng) -> Tensor:
    """Return `(N, C, H, W) float32` images in [0, 1], moved in the same way for all their views.

    Args:
        pixels: `(N, C, H, W) uint8`.
        rng: random numbers of these N images.
    """
    return warp(scale_to_unit(pixels), sample_moves(pixels.shape[-1], rng))


def make_contrastive_view(images: Tensor, rng: BatchRng) -> Tensor:
    """Return a view for the contrastive loss, `(N, 3, H, W) float32`, ImageNet-normalised.

    Args:
        images: `(N, 1 or 3, H, W) float32` in [0, 1], from `move_images`.
        rng: random numbers of these N images.
    """
    is_mirrored = rng.bernoulli(0.5).to(images.device)
    images = torch.where(is_mirrored[:, None, None, None], images.flip(3), images)
    images = jitter_colours(images, rng.bernoulli(_JITTER_SHARE), rng)
    is_grey = rng.bernoulli(_GREY_SHARE).to(images.device)
    images = torch.where(is_grey[:, None, None, None], convert_to_grey(images), images)
    return normalise_unit(images)


def sample_moves(size_px: int, rng: BatchRng) -> Tensor:
    """Return `(N, 3, 3) float64` matrices that map pixel positions to moved positions.

    A position is (column, row, 1), counted from the centre of the top left pixel. Images that are
    not moved have the identity.
    """
    low, high = _SCALES
    scales = low + (high - low) * rng.uniform(2, dtype=torch.float64)
    scales = torch.where(rng.bernoulli(0.5)[:, None], scales, 1.0)
    angles = (2 * rng.uniform(dtype=torch.float64) - 1) * _TURN_DEGREES
    angles = torch.where(rng.bernoulli(0.5), angles, 0.0) * math.pi / 180
    shifts = (2 * rng.uniform(2, dtype=torch.float64) - 1) * _SHIFT_SHARE
    shifts = torch.where(rng.bernoulli(0.5)[:, None], shifts, 0.0) * size_px
    moves = torch.eye(3, dtype=torch.float64).repeat(len(scales), 1, 1)
    moves[:, 0, 0] = scales[:, 0] * angles.cos()
    moves[:, 0, 1] = -scales[:, 1] * angles.sin()
    moves[:, 1, 0] = scales[:, 0] * angles.sin()
    moves[:, 1, 1] = scales[:, 1] * angles.cos()
    moves[:, :2, 2] = shifts
    mirrored = torch.eye(3, dtype=torch.float64)
    mirrored[0, 0], mirrored[0, 2] = -1.0, size_px - 1.0
    is_mirrored = rng.bernoulli(0.5)[:, None, None]
    moves = torch.where(is_mirrored, moves @ mirrored, moves)
    is_moved = rng.bernoulli(_MOVED_SHARE)[:, None, None]
    return torch.where(is_moved, moves, torch.eye(3, dtype=torch.float64))


def warp(images: Tensor, moves: Tensor) -> Tensor:
    """Return images `(N, C, S, S)` moved by `moves (N, 3, 3)`, bilinear, with black borders."""
    size_px = images.shape[-1]
    # grid_sample takes each pixel's source, with the centres of the outermost pixels at -1 and 1.
    to_unit = torch.eye(3, dtype=torch.float64) * 2 / (size_px - 1)
    to_unit[:, 2] = torch.tensor([-1.0, -1.0, 1.0], dtype=torch.float64)
    sources = to_unit @ torch.linalg.inv(moves) @ torch.linalg.inv(to_unit)
    theta = sources[:, :2].float().to(images.device)
    if not len(images):
        return images  # torch cannot make an empty grid
    grid = functional.affine_grid(theta, list(images.shape), align_corners=True)
    return functional.grid_sample(images, grid, align_corners=True)
