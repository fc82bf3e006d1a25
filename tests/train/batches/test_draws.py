"""A share of a batch must be changed as the whole batch's process would change it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from sbtk_train.batches.augment import augmented_photos, augmented_sketches
from sbtk_train.batches.draws import Draws, batch_generator
from sbtk_train.batches.dsn_views import contrastive_view, moved_images


def moved_and_recoloured(pixels: Tensor, draw: Draws) -> Tensor:
    return contrastive_view(moved_images(pixels, draw), draw)


@pytest.mark.parametrize("places", [[0, 3, 6], [4], [], [6, 0]])
@pytest.mark.parametrize(
    ("changed", "channels"),
    [(augmented_sketches, 1), (augmented_photos, 3), (moved_and_recoloured, 3)],
)
def test_a_share_is_changed_as_in_the_whole_batch(
    changed: Callable[[Tensor, Draws], Tensor], channels: int, places: list[int]
) -> None:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (7, channels, 24, 24), generator=generator).to(torch.uint8)
    rows = torch.tensor(places, dtype=torch.int64)
    whole = changed(pixels, Draws(batch_generator(5), 7))
    share = changed(pixels[rows], Draws(batch_generator(5), 7, rows))
    assert share.shape == (len(places), 3, 24, 24)
    torch.testing.assert_close(share, whole[rows], atol=1e-6, rtol=0)


def test_what_follows_a_share_is_what_follows_the_whole_batch() -> None:
    whole, share = batch_generator(1), batch_generator(1)
    Draws(whole, 9).uniform(2)
    Draws(share, 9, torch.tensor([4])).uniform(2)
    assert torch.equal(torch.rand(3, generator=whole), torch.rand(3, generator=share))


def test_a_batch_is_made_again_from_its_position() -> None:
    first, again, other = (
        Draws(batch_generator(7, *position), 12).uniform(4) for position in ((1, 2), (1, 2), (2, 1))
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert 0 <= float(first.min()) <= float(first.max()) < 1


def test_chances_come_true_as_often_as_they_say() -> None:
    is_true = Draws(batch_generator(0), 10_000).chance(0.3)
    assert float(is_true.float().mean()) == pytest.approx(0.3, abs=0.02)
