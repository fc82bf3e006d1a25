from __future__ import annotations

import numpy as np
import pytest
import torch

from sbtk_train.batches.sampler import Batch
from sbtk_train.batches.shares import Share


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
