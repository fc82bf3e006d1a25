from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from sbtk_runtime.preprocess import IMAGENET_MEAN, IMAGENET_STD
from sbtk_train.batches.draws import Draws, batch_generator
from sbtk_train.batches.dsn_views import (
    contrastive_view,
    moved_images,
    plain_view,
    random_moves,
    warped,
)


def to_unit(images: Tensor) -> Tensor:
    mean = torch.tensor(IMAGENET_MEAN).view(1, 3, 1, 1)
    return images * torch.tensor(IMAGENET_STD).view(1, 3, 1, 1) + mean


def plainly_warped(image: list[list[float]], move: Tensor) -> list[list[float]]:
    """Moves a square grey image pixel by pixel, bilinear, black outside."""
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
    draw = torch.Generator().manual_seed(0)
    images = torch.rand(12, 1, 10, 10, generator=draw)
    moves = random_moves(10, Draws(draw, 12))
    found = warped(images, moves)
    for image, move, result in zip(images, moves, found, strict=True):
        expected = torch.tensor(plainly_warped(image[0].tolist(), move))
        torch.testing.assert_close(result[0], expected, atol=1e-4, rtol=1e-4)
    assert sum(not torch.equal(move, torch.eye(3).double()) for move in moves) > 4


def test_a_turn_is_about_the_top_left_corner() -> None:
    image = torch.zeros(1, 1, 9, 9)
    image[0, 0, 0, 0], image[0, 0, 0, 8] = 1.0, 1.0
    quarter = torch.tensor([[[0.0, -1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 1.0]]]).double()
    found = warped(image, quarter)[0, 0]
    expected = torch.zeros(9, 9)
    expected[0, 0], expected[8, 0] = 1.0, 1.0
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_moves_are_drawn_with_the_shares_and_ranges_of_the_authors() -> None:
    moves = random_moves(224, Draws(batch_generator(0), 20_000))
    still = (moves == torch.eye(3)).all(2).all(1)
    # 0.3 are left alone, and 0.7 / 16 draw none of the four changes.
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
    images = moved_images(pixels, Draws(batch_generator(0), 40))
    assert float(images.min()) == 0.0
    assert float(images.max()) == pytest.approx(1.0, abs=1e-5)
    assert images.shape == (40, 1, 32, 32)


def test_the_plain_view_is_only_normalised() -> None:
    images = torch.rand(3, 3, 8, 8)
    torch.testing.assert_close(to_unit(plain_view(images)), images, atol=1e-5, rtol=1e-5)
    grey = torch.rand(2, 1, 8, 8)
    torch.testing.assert_close(
        to_unit(plain_view(grey)), grey.expand(-1, 3, -1, -1), atol=1e-5, rtol=1e-5
    )


def test_views_mirror_recolour_and_grey_in_the_authors_shares() -> None:
    image = torch.rand(1, 3, 6, 6, generator=torch.Generator().manual_seed(5))
    found = to_unit(
        contrastive_view(image.expand(4000, -1, -1, -1), Draws(batch_generator(0), 4000))
    )
    is_grey = (found - found.mean(1, keepdim=True)).abs().amax((1, 2, 3)) < 1e-5
    assert float(is_grey.float().mean()) == pytest.approx(0.2, abs=0.03)
    same = (found - image).abs().amax((1, 2, 3)) < 1e-5
    flipped = (found - image.flip(3)).abs().amax((1, 2, 3)) < 1e-5
    # Neither recoloured (0.2) nor made grey (0.8), one way round or the other.
    assert float(same.float().mean()) == pytest.approx(0.08, abs=0.02)
    assert float(flipped.float().mean()) == pytest.approx(0.08, abs=0.02)


def test_views_are_made_again_from_the_same_draws() -> None:
    pixels = torch.randint(0, 256, (4, 3, 16, 16), generator=torch.Generator().manual_seed(2))
    pixels = pixels.to(torch.uint8)
    first, again, other = (
        contrastive_view(moved_images(pixels, draw), draw)
        for draw in (Draws(batch_generator(seed), 4) for seed in (7, 7, 8))
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
