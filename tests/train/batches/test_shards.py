from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from sbtk_train.batches.augment import (
    augment_photos,
    augment_sketches,
    make_contrastive_view,
    move_images,
)
from sbtk_train.batches.sampler import Batch
from sbtk_train.batches.shards import BatchRng, BatchShard, make_generator


def some_batch(sketches: int, photos: int) -> Batch:
    random = np.random.default_rng(sketches * 100 + photos)
    return Batch(random.permutation(100)[:sketches], random.permutation(100)[:photos])


CASES = [(3, 4, 2), (5, 5, 3), (1, 0, 2), (0, 2, 4), (32, 64, 8), (7, 7, 1)]


@pytest.mark.parametrize(("sketches", "photos", "size"), CASES)
def test_every_image_is_in_one_shard_and_shards_have_similar_lengths(
    sketches: int, photos: int, size: int
) -> None:
    batch = some_batch(sketches, photos)
    shards = [BatchShard(batch, rank, size) for rank in range(size)]
    taken = [shard.local for shard in shards]
    assert sorted(np.concatenate([own.sketches for own in taken])) == sorted(batch.sketches)
    assert sorted(np.concatenate([own.photos for own in taken])) == sorted(batch.photos)
    lengths = [len(shard.rows()) for shard in shards]
    assert sum(lengths) == sketches + photos
    assert max(lengths) - min(lengths) <= 2


@pytest.mark.parametrize("views", [1, 3])
@pytest.mark.parametrize(("sketches", "photos", "size"), CASES)
def test_gathered_rows_are_ordered_by_view_with_sketches_first(
    sketches: int, photos: int, size: int, views: int
) -> None:
    batch = some_batch(sketches, photos)

    def names(of: Batch) -> list[str]:
        one_view = [f"sketch {row}" for row in of.sketches] + [f"photo {row}" for row in of.photos]
        return [f"{name} view {view}" for view in range(views) for name in one_view]

    gathered: list[str] = []
    for rank in range(size):
        shard = BatchShard(batch, rank, size)
        own = names(shard.local)
        # What a process has is where `rows` says it stands among all.
        assert own == [names(batch)[row] for row in shard.rows(views)]
        gathered += own + ["filling"] * (shard.max_rows(views) - len(own))
    assert [gathered[place] for place in BatchShard(batch, 0, size).gather_order(views)] == names(
        batch
    )


def test_a_shard_draws_the_numbers_of_its_images_in_the_full_batch() -> None:
    batch = some_batch(5, 3)
    whole = BatchShard(batch).make_rngs(torch.Generator().manual_seed(1))
    sketches, photos = whole.sketches.uniform(2), whole.photos.uniform()
    for rank in range(2):
        shard = BatchShard(batch, rank, 2)
        draws = shard.make_rngs(torch.Generator().manual_seed(1))
        rows = shard.rows()
        assert torch.equal(draws.sketches.uniform(2), sketches[rows[rows < 5]])
        assert torch.equal(draws.photos.uniform(), photos[rows[rows >= 5] - 5])


def moved_and_recoloured(pixels: Tensor, rng: BatchRng) -> Tensor:
    return make_contrastive_view(move_images(pixels, rng), rng)


@pytest.mark.parametrize("places", [[0, 3, 6], [4], [], [6, 0]])
@pytest.mark.parametrize(
    ("changed", "channels"),
    [(augment_sketches, 1), (augment_photos, 3), (moved_and_recoloured, 3)],
)
def test_a_shard_is_augmented_as_in_the_full_batch(
    changed: Callable[[Tensor, BatchRng], Tensor], channels: int, places: list[int]
) -> None:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (7, channels, 24, 24), generator=generator).to(torch.uint8)
    rows = torch.tensor(places, dtype=torch.int64)
    whole = changed(pixels, BatchRng(make_generator(5), 7))
    shard = changed(pixels[rows], BatchRng(make_generator(5), 7, rows))
    assert shard.shape == (len(places), 3, 24, 24)
    torch.testing.assert_close(shard, whole[rows], atol=1e-6, rtol=0)


def test_after_a_shard_the_generator_continues_as_after_the_full_batch() -> None:
    whole, shard = make_generator(1), make_generator(1)
    BatchRng(whole, 9).uniform(2)
    BatchRng(shard, 9, torch.tensor([4])).uniform(2)
    assert torch.equal(torch.rand(3, generator=whole), torch.rand(3, generator=shard))


def test_a_batch_is_reproducible_from_its_position() -> None:
    first, again, other = (
        BatchRng(make_generator(7, *position), 12).uniform(4)
        for position in ((1, 2), (1, 2), (2, 1))
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert 0 <= float(first.min()) <= float(first.max()) < 1


def test_choices_have_the_given_probabilities() -> None:
    is_true = BatchRng(make_generator(0), 10_000).bernoulli(0.3)
    assert float(is_true.float().mean()) == pytest.approx(0.3, abs=0.02)
