"""Random changes to training batches, on tensors, so that they run where the student runs.

All chance comes from draws that are given, so a batch can be made again exactly.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from sbtk_runtime.preprocess import IMAGENET_MEAN, IMAGENET_STD
from sbtk_train.batches.shards import Draws

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


_STRENGTH = 0.4
_HUE = 0.1
#: Shares of red, green and blue in grey (ITU-R 601, as in torchvision and Pillow).
_GREY = (0.2989, 0.587, 0.114)


def jittered(images: Tensor, is_changed: Tensor, draw: Draws) -> Tensor:
    """Returns images with brightness, contrast, saturation and hue changed in random order.

    Factors are uniform in [0.6, 1.4], the hue's shift in [-0.1, 0.1] of a turn.

    Args:
        images: `(N, 3, H, W) float32` in [0, 1], or `(N, 1, H, W)`: grey has neither saturation
            nor hue, and only the two other changes are made.
        is_changed: `(N,) bool`, on the CPU; the others are left as they are.
        draw: for these N images.
    """
    order = draw.uniform(4).argsort(dim=1)
    amounts = draw.uniform(4) * 2 - 1
    amounts = amounts * torch.tensor([_STRENGTH, _STRENGTH, _STRENGTH, _HUE])
    amounts += torch.tensor([1.0, 1.0, 1.0, 0.0])
    changes: tuple[Callable[[Tensor, Tensor], Tensor], ...]
    changes = (with_brightness, with_contrast, with_saturation, with_hue)
    images = images.clone()
    for place in range(4):
        for number, change in enumerate(changes[: 4 if images.shape[1] == 3 else 2]):
            rows = torch.nonzero((order[:, place] == number) & is_changed)[:, 0]
            if len(rows):
                amount = amounts[rows, number].to(images.device).view(-1, 1, 1, 1)
                rows = rows.to(images.device)
                images[rows] = change(images[rows], amount)
    return images


def with_brightness(images: Tensor, factors: Tensor) -> Tensor:
    """Returns images `(N, C, H, W)` multiplied by factors `(N, 1, 1, 1)`, kept in [0, 1]."""
    return (images * factors).clamp(0, 1)


def with_contrast(images: Tensor, factors: Tensor) -> Tensor:
    """Returns images `(N, C, H, W)` moved away from, or to, their mean grey."""
    mean = grey_of(images).mean((1, 2, 3), keepdim=True)
    return torch.lerp(mean, images, factors).clamp(0, 1)


def with_saturation(images: Tensor, factors: Tensor) -> Tensor:
    """Returns images `(N, C, H, W)` moved away from, or to, their own grey."""
    return torch.lerp(grey_of(images), images, factors).clamp(0, 1)


def with_hue(images: Tensor, turns: Tensor) -> Tensor:
    """Returns images whose hue is turned round the colour circle by `turns (N, 1, 1, 1)`."""
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


def grey_of(images: Tensor) -> Tensor:
    """Returns `(N, 1, H, W)`, the grey of colour images; grey ones as they are."""
    if images.shape[1] == 1:
        return images
    shares = torch.tensor(_GREY, device=images.device).view(1, 3, 1, 1)
    return (images * shares).sum(1, keepdim=True)


_MOVED_SHARE = 0.7
_SCALES = (0.7, 1.3)
_TURN_DEGREES = 30.0
#: The authors shift stored images of 256 pixels; images of another size in proportion.
_SHIFT_SHARE = 10.0 / 256.0
_JITTER_SHARE = 0.8


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
