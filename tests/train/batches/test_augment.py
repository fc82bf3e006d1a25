from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torchvision.transforms import functional as reference

from sbtk_runtime.preprocess import IMAGENET_MEAN, IMAGENET_STD
from sbtk_train.batches.augment import (
    adjust_brightness,
    adjust_contrast,
    adjust_hue,
    adjust_saturation,
    augment_photos,
    augment_sketches,
    convert_to_grey,
    jitter_colours,
    make_contrastive_view,
    move_images,
    normalise,
    sample_moves,
    warp,
)
from sbtk_train.batches.sampler import BatchRng, make_generator


def to_unit(images: torch.Tensor) -> torch.Tensor:
    mean = torch.tensor(IMAGENET_MEAN).view(1, 3, 1, 1)
    return images * torch.tensor(IMAGENET_STD).view(1, 3, 1, 1) + mean


def some_sketches() -> torch.Tensor:
    pixels = torch.full((12, 1, 64, 64), 255, dtype=torch.uint8)
    pixels[:, :, 20:44, 30:34] = 0
    return pixels


def test_normalisation_equals_that_of_the_exported_graph() -> None:
    pixels = torch.arange(2 * 3 * 4 * 4, dtype=torch.uint8).view(2, 3, 4, 4)
    expected = (
        pixels.numpy().astype(np.float64) / 255 - np.array(IMAGENET_MEAN).reshape(1, 3, 1, 1)
    ) / np.array(IMAGENET_STD).reshape(1, 3, 1, 1)
    np.testing.assert_allclose(normalise(pixels).numpy(), expected, atol=1e-5)
    grey = normalise(pixels[:, :1])
    assert grey.shape == (2, 3, 4, 4)
    torch.testing.assert_close(to_unit(grey)[:, 0], to_unit(grey)[:, 2])


def test_augmented_sketches_stay_ink_on_white() -> None:
    changed = to_unit(augment_sketches(some_sketches(), BatchRng(make_generator(0, 1), 12)))
    assert changed.shape == (12, 3, 64, 64)
    assert float(changed.min()) > -1e-4
    assert float(changed.max()) < 1 + 1e-4
    # The border is paper, and some ink is left in each.
    torch.testing.assert_close(changed[:, :, 0], torch.ones(12, 3, 64))
    assert (changed.amin((1, 2, 3)) < 0.5).all()
    assert not torch.equal(changed[0], changed[1])


def test_augmented_photos_differ_and_stay_in_range() -> None:
    rng = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (6, 3, 48, 48), generator=rng).to(torch.uint8)
    changed = to_unit(augment_photos(pixels, BatchRng(make_generator(0, 1), 6)))
    assert float(changed.min()) > -1e-4
    assert float(changed.max()) < 1 + 1e-4
    assert not torch.allclose(changed, pixels / 255, atol=0.1)


def test_a_batch_is_reproducible_from_its_position() -> None:
    first, again, other = (
        augment_sketches(some_sketches(), BatchRng(make_generator(7, *position), 12))
        for position in ((1, 2), (1, 2), (2, 1))
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def some_images(count: int, channels: int = 3) -> Tensor:
    rng = torch.Generator().manual_seed(0)
    images = torch.rand(count, channels, 9, 7, generator=rng)
    # Grey pixels and pixels of full colour are where hues go wrong.
    images[:, :, 0, :3] = 0.5
    images[:, 0, 1, :], images[:, 1:, 1, :] = 1.0, 0.0
    return images


@pytest.mark.parametrize(
    ("change", "torchvisions", "low", "high"),
    [
        (adjust_brightness, reference.adjust_brightness, 0.6, 1.4),
        (adjust_contrast, reference.adjust_contrast, 0.6, 1.4),
        (adjust_saturation, reference.adjust_saturation, 0.6, 1.4),
        (adjust_hue, reference.adjust_hue, -0.1, 0.1),
    ],
)
def test_each_colour_change_equals_torchvisions_with_an_amount_per_image(
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


def test_greyscale_equals_torchvisions() -> None:
    images = some_images(3)
    torch.testing.assert_close(convert_to_grey(images), reference.rgb_to_grayscale(images))
    assert convert_to_grey(images[:, :1]) is not None
    assert torch.equal(convert_to_grey(images[:, :1]), images[:, :1])


def test_jitter_changes_only_the_chosen_images_each_differently() -> None:
    images = some_images(1).expand(6, -1, -1, -1)
    chosen = torch.tensor([True, False, True, True, False, True])
    found = jitter_colours(images, chosen, BatchRng(make_generator(1), 6))
    assert torch.equal(found[~chosen], images[~chosen])
    changed = found[chosen]
    for left in range(4):
        assert not torch.allclose(changed[left], images[0], atol=0.01)
        for right in range(left):
            assert not torch.allclose(changed[left], changed[right], atol=0.01)
    assert 0 <= float(found.min()) <= float(found.max()) <= 1


def test_jitter_applies_the_four_changes_in_some_order() -> None:
    image = some_images(1)
    rng = torch.Generator().manual_seed(3)
    found = jitter_colours(image, torch.tensor([True]), BatchRng(rng, 1))
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
    found = jitter_colours(images, torch.ones(8, dtype=torch.bool), BatchRng(make_generator(0), 8))
    assert found.shape == images.shape
    assert not torch.allclose(found, images, atol=0.01)


def plainly_warped(image: list[list[float]], move: Tensor) -> list[list[float]]:
    """Move a square grey image pixel by pixel, bilinear, black outside."""
    size = len(image)
    back = torch.linalg.inv(move).tolist()

    def at(row: int, column: int) -> float:
        is_inside = 0 <= row < size and 0 <= column < size
        return image[row][column] if is_inside else 0.0

    result = []
    for row in range(size):
        line = []
        for column in range(size):
            x, y = (back[i][0] * column + back[i][1] * row + back[i][2] for i in range(2))
            left, top = math.floor(x), math.floor(y)
            right_share, low_share = x - left, y - top
            line.append(
                (1 - low_share) * (1 - right_share) * at(top, left)
                + (1 - low_share) * right_share * at(top, left + 1)
                + low_share * (1 - right_share) * at(top + 1, left)
                + low_share * right_share * at(top + 1, left + 1)
            )
        result.append(line)
    return result


def test_warping_equals_a_plain_loop() -> None:
    rng = torch.Generator().manual_seed(0)
    images = torch.rand(12, 1, 10, 10, generator=rng)
    moves = sample_moves(10, BatchRng(rng, 12))
    found = warp(images, moves)
    for image, move, result in zip(images, moves, found, strict=True):
        expected = torch.tensor(plainly_warped(image[0].tolist(), move))
        torch.testing.assert_close(result[0], expected, atol=1e-4, rtol=1e-4)
    assert sum(not torch.equal(move, torch.eye(3).double()) for move in moves) > 4


def test_rotation_is_about_the_top_left_corner() -> None:
    image = torch.zeros(1, 1, 9, 9)
    image[0, 0, 0, 0], image[0, 0, 0, 8] = 1.0, 1.0
    quarter = torch.tensor([[[0.0, -1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 1.0]]]).double()
    found = warp(image, quarter)[0, 0]
    expected = torch.zeros(9, 9)
    expected[0, 0], expected[8, 0] = 1.0, 1.0
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_affine_changes_have_the_authors_probabilities_and_ranges() -> None:
    moves = sample_moves(224, BatchRng(make_generator(0), 20_000))
    still = (moves == torch.eye(3)).all(2).all(1)
    # 0.3 are left alone, and 0.7 / 16 get none of the four changes.
    assert float(still.double().mean()) == pytest.approx(0.3 + 0.7 / 16, abs=0.01)
    linear, shifts = moves[:, :2, :2], moves[:, :2, 2]
    mirrored = torch.linalg.det(linear) < 0
    assert float(mirrored.double().mean()) == pytest.approx(0.35, abs=0.01)
    # Columns are turned unit vectors times the scales; mirrored ones look the other way.
    lengths = linear.norm(dim=1)
    assert 0.7 <= float(lengths.min()) < 0.71
    assert 1.29 < float(lengths.max()) <= 1.3
    is_scaled = (lengths - 1).abs() > 1e-9
    assert float(is_scaled.double().mean()) == pytest.approx(0.35, abs=0.01)
    assert torch.equal(is_scaled[:, 0], is_scaled[:, 1])
    turns = torch.atan2(linear[:, 1, 1], -linear[:, 0, 1]) * 180 / math.pi - 90
    assert float((turns.abs() > 1e-9).double().mean()) == pytest.approx(0.35, abs=0.01)
    assert 29.5 < float(turns.abs().max()) <= 30
    pushed = (~mirrored) & (shifts.abs() > 1e-9).any(1)
    assert float(shifts[~mirrored].abs().max()) <= 10 * 224 / 256
    share = float(pushed.double().sum() / (~mirrored).double().sum())
    assert share == pytest.approx(0.35 * 0.5 / 0.65, abs=0.01)


def test_the_border_is_black_and_pixels_stay_in_range() -> None:
    pixels = torch.full((40, 1, 32, 32), 255, dtype=torch.uint8)
    images = move_images(pixels, BatchRng(make_generator(0), 40))
    assert float(images.min()) == 0.0
    assert float(images.max()) == pytest.approx(1.0, abs=1e-5)
    assert images.shape == (40, 1, 32, 32)


def test_views_have_the_authors_probabilities() -> None:
    image = torch.rand(1, 3, 6, 6, generator=torch.Generator().manual_seed(5))
    found = to_unit(
        make_contrastive_view(image.expand(4000, -1, -1, -1), BatchRng(make_generator(0), 4000))
    )
    is_grey = (found - found.mean(1, keepdim=True)).abs().amax((1, 2, 3)) < 1e-5
    assert float(is_grey.float().mean()) == pytest.approx(0.2, abs=0.03)
    same = (found - image).abs().amax((1, 2, 3)) < 1e-5
    flipped = (found - image.flip(3)).abs().amax((1, 2, 3)) < 1e-5
    # Neither recoloured (0.2) nor made grey (0.8), one way round or the other.
    assert float(same.float().mean()) == pytest.approx(0.08, abs=0.02)
    assert float(flipped.float().mean()) == pytest.approx(0.08, abs=0.02)


def test_views_are_reproducible_from_the_same_generator() -> None:
    pixels = torch.randint(0, 256, (4, 3, 16, 16), generator=torch.Generator().manual_seed(2))
    pixels = pixels.to(torch.uint8)
    first, again, other = (
        make_contrastive_view(move_images(pixels, rng), rng)
        for rng in (BatchRng(make_generator(seed), 4) for seed in (7, 7, 8))
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
