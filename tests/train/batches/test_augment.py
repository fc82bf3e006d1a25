from __future__ import annotations

import numpy as np
import torch

from sbtk_runtime.preprocess import IMAGENET_MEAN, IMAGENET_STD
from sbtk_train.batches.augment import (
    augmented_photos,
    augmented_sketches,
    normalised,
)
from sbtk_train.batches.draws import Draws, batch_generator


def to_unit(images: torch.Tensor) -> torch.Tensor:
    mean = torch.tensor(IMAGENET_MEAN).view(1, 3, 1, 1)
    return images * torch.tensor(IMAGENET_STD).view(1, 3, 1, 1) + mean


def some_sketches() -> torch.Tensor:
    pixels = torch.full((12, 1, 64, 64), 255, dtype=torch.uint8)
    pixels[:, :, 20:44, 30:34] = 0
    return pixels


def test_normalised_is_what_the_exported_graph_computes() -> None:
    pixels = torch.arange(2 * 3 * 4 * 4, dtype=torch.uint8).view(2, 3, 4, 4)
    expected = (
        pixels.numpy().astype(np.float64) / 255 - np.array(IMAGENET_MEAN).reshape(1, 3, 1, 1)
    ) / np.array(IMAGENET_STD).reshape(1, 3, 1, 1)
    np.testing.assert_allclose(normalised(pixels).numpy(), expected, atol=1e-5)
    grey = normalised(pixels[:, :1])
    assert grey.shape == (2, 3, 4, 4)
    torch.testing.assert_close(to_unit(grey)[:, 0], to_unit(grey)[:, 2])


def test_augmented_sketches_stay_ink_on_white() -> None:
    changed = to_unit(augmented_sketches(some_sketches(), Draws(batch_generator(0, 1), 12)))
    assert changed.shape == (12, 3, 64, 64)
    assert float(changed.min()) > -1e-4
    assert float(changed.max()) < 1 + 1e-4
    # The border is paper, and some ink is left in each.
    torch.testing.assert_close(changed[:, :, 0], torch.ones(12, 3, 64))
    assert (changed.amin((1, 2, 3)) < 0.5).all()
    assert not torch.equal(changed[0], changed[1])


def test_augmented_photos_stay_in_range_and_differ() -> None:
    draw = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (6, 3, 48, 48), generator=draw).to(torch.uint8)
    changed = to_unit(augmented_photos(pixels, Draws(batch_generator(0, 1), 6)))
    assert float(changed.min()) > -1e-4
    assert float(changed.max()) < 1 + 1e-4
    assert not torch.allclose(changed, pixels / 255, atol=0.1)


def test_a_batch_is_made_again_from_its_position() -> None:
    first, again, other = (
        augmented_sketches(some_sketches(), Draws(batch_generator(7, *position), 12))
        for position in ((1, 2), (1, 2), (2, 1))
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
