"""torchvision's `ColorJitter(0.4, 0.4, 0.4, 0.1)` for a batch, with draws for each image."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from sbtk_train.batches.draws import Draws

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
