from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from sbtk_train.batches.augment import (
    augmented_photos,
    augmented_sketches,
    contrastive_view,
    moved_images,
)
from sbtk_train.batches.sampler import Batch
from sbtk_train.batches.shards import Draws, Share, batch_generator


def some_batch(sketches: int, photos: int) -> Batch:
    random = np.random.default_rng(sketches * 100 + photos)
    return Batch(random.permutation(100)[:sketches], random.permutation(100)[:photos])


CASES = [(3, 4, 2), (5, 5, 3), (1, 0, 2), (0, 2, 4), (32, 64, 8), (7, 7, 1)]


@pytest.mark.parametrize(("sketches", "photos", "size"), CASES)
def test_every_image_is_in_one_share_and_shares_are_of_like_length(
    sketches: int, photos: int, size: int
) -> None:
    batch = some_batch(sketches, photos)
    shares = [Share(batch, rank, size) for rank in range(size)]
    taken = [share.own for share in shares]
    assert sorted(np.concatenate([own.sketches for own in taken])) == sorted(batch.sketches)
    assert sorted(np.concatenate([own.photos for own in taken])) == sorted(batch.photos)
    lengths = [len(share.rows()) for share in shares]
    assert sum(lengths) == sketches + photos
    assert max(lengths) - min(lengths) <= 2


@pytest.mark.parametrize("views", [1, 3])
@pytest.mark.parametrize(("sketches", "photos", "size"), CASES)
def test_gathered_rows_are_put_back_view_after_view_sketches_first(
    sketches: int, photos: int, size: int, views: int
) -> None:
    batch = some_batch(sketches, photos)

    def names(of: Batch) -> list[str]:
        one_view = [f"sketch {row}" for row in of.sketches] + [f"photo {row}" for row in of.photos]
        return [f"{name} view {view}" for view in range(views) for name in one_view]

    gathered: list[str] = []
    for rank in range(size):
        share = Share(batch, rank, size)
        own = names(share.own)
        # What a process has is where `rows` says it stands among all.
        assert own == [names(batch)[row] for row in share.rows(views)]
        gathered += own + ["filling"] * (share.longest(views) - len(own))
    assert [gathered[place] for place in Share(batch, 0, size).order(views)] == names(batch)


def test_a_share_draws_what_its_images_get_in_the_whole_batch() -> None:
    batch = some_batch(5, 3)
    whole = Share(batch).draws(torch.Generator().manual_seed(1))
    sketches, photos = whole.sketches.uniform(2), whole.photos.uniform()
    for rank in range(2):
        share = Share(batch, rank, 2)
        draws = share.draws(torch.Generator().manual_seed(1))
        rows = share.rows()
        assert torch.equal(draws.sketches.uniform(2), sketches[rows[rows < 5]])
        assert torch.equal(draws.photos.uniform(), photos[rows[rows >= 5] - 5])


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
