from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torchvision.transforms import functional as reference

from sbtk_train.batches.colour_jitter import (
    grey_of,
    jittered,
    with_brightness,
    with_contrast,
    with_hue,
    with_saturation,
)
from sbtk_train.batches.draws import Draws, batch_generator


def some_images(count: int, channels: int = 3) -> Tensor:
    draw = torch.Generator().manual_seed(0)
    images = torch.rand(count, channels, 9, 7, generator=draw)
    # Grey pixels and pixels of full colour are where hues go wrong.
    images[:, :, 0, :3] = 0.5
    images[:, 0, 1, :], images[:, 1:, 1, :] = 1.0, 0.0
    return images


@pytest.mark.parametrize(
    ("change", "torchvisions", "low", "high"),
    [
        (with_brightness, reference.adjust_brightness, 0.6, 1.4),
        (with_contrast, reference.adjust_contrast, 0.6, 1.4),
        (with_saturation, reference.adjust_saturation, 0.6, 1.4),
        (with_hue, reference.adjust_hue, -0.1, 0.1),
    ],
)
def test_each_change_is_torchvisions_with_an_amount_for_each_image(
    change: Callable[[Tensor, Tensor], Tensor],
    torchvisions: Callable[[Tensor, float], Any],
    low: float,
    high: float,
) -> None:
    images = some_images(5)
    amounts = torch.linspace(low, high, 5)
    found = change(images, amounts.view(-1, 1, 1, 1))
    expected = [torchvisions(image, float(a)) for image, a in zip(images, amounts, strict=True)]
    torch.testing.assert_close(found, torch.stack(expected), atol=2e-6, rtol=1e-5)


def test_grey_is_torchvisions() -> None:
    images = some_images(3)
    torch.testing.assert_close(grey_of(images), reference.rgb_to_grayscale(images))
    assert grey_of(images[:, :1]) is not None
    assert torch.equal(grey_of(images[:, :1]), images[:, :1])


def test_jitter_changes_only_the_chosen_images_each_in_its_own_way() -> None:
    images = some_images(1).expand(6, -1, -1, -1)
    chosen = torch.tensor([True, False, True, True, False, True])
    found = jittered(images, chosen, Draws(batch_generator(1), 6))
    assert torch.equal(found[~chosen], images[~chosen])
    changed = found[chosen]
    for left in range(4):
        assert not torch.allclose(changed[left], images[0], atol=0.01)
        for right in range(left):
            assert not torch.allclose(changed[left], changed[right], atol=0.01)
    assert 0 <= float(found.min()) <= float(found.max()) <= 1


def test_jitter_is_some_order_of_the_four_changes() -> None:
    image = some_images(1)
    draw = torch.Generator().manual_seed(3)
    found = jittered(image, torch.tensor([True]), Draws(draw, 1))
    again = torch.Generator().manual_seed(3)
    order = torch.rand(1, 4, generator=again).argsort(dim=1)[0].tolist()
    spread = (torch.rand(1, 4, generator=again) * 2 - 1)[0].tolist()
    assert order != [0, 1, 2, 3]
    expected = image
    for number in order:
        expected = (
            lambda x: reference.adjust_brightness(x, 1 + 0.4 * spread[0]),
            lambda x: reference.adjust_contrast(x, 1 + 0.4 * spread[1]),
            lambda x: reference.adjust_saturation(x, 1 + 0.4 * spread[2]),
            lambda x: reference.adjust_hue(x, 0.1 * spread[3]),
        )[number](expected)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_grey_images_stay_grey() -> None:
    images = some_images(8)[:, :1]
    found = jittered(images, torch.ones(8, dtype=torch.bool), Draws(batch_generator(0), 8))
    assert found.shape == images.shape
    assert not torch.allclose(found, images, atol=0.01)
