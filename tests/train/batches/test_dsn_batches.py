from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from sbtk_runtime.errors import BadConfig
from sbtk_train.batches.dsn_batches import shuffled_batches
from sbtk_train.data import ImageSet


def images(sketches: int, photos: int) -> ImageSet:
    return ImageSet(
        ("ant", "bee"),
        tuple(Path(f"s{number}.png") for number in range(sketches)),
        np.arange(sketches) % 2,
        tuple(Path(f"p{number}.jpg") for number in range(photos)),
        np.arange(photos) % 2,
    )


@pytest.mark.parametrize(
    ("sketches", "photos", "drop_last", "sizes"),
    [
        # Photos run out first, then sketches; a partial batch is dropped or kept.
        (50, 20, True, [(3, 6), (3, 6), (3, 6)]),
        (50, 20, False, [(3, 6), (3, 6), (3, 6), (3, 2)]),
        (7, 60, True, [(3, 6), (3, 6)]),
        (7, 60, False, [(3, 6), (3, 6), (1, 6)]),
        (6, 12, True, [(3, 6), (3, 6)]),
        (6, 12, False, [(3, 6), (3, 6)]),
    ],
)
def test_an_epoch_ends_when_either_kind_has_run_out(
    sketches: int, photos: int, drop_last: bool, sizes: list[tuple[int, int]]
) -> None:
    data = images(sketches, photos)
    batches = list(shuffled_batches(data, 3, 6, seed=1, epoch=0, drop_last=drop_last))
    assert [(len(batch.sketches), len(batch.photos)) for batch in batches] == sizes
    for rows, count in (
        (np.concatenate([batch.sketches for batch in batches]), sketches),
        (np.concatenate([batch.photos for batch in batches]), photos),
    ):
        assert len(set(rows.tolist())) == len(rows)
        assert rows.min() >= 0
        assert rows.max() < count


def test_the_published_numbers_of_steps() -> None:
    def steps(data: ImageSet, sketches: int, photos: int, drop_last: bool) -> int:
        return sum(1 for _ in shuffled_batches(data, sketches, photos, 0, 0, drop_last=drop_last))

    assert steps(images(55_252, 68_401), 32, 64, drop_last=True) == 1_068
    assert steps(images(15_400, 176_500), 9, 81, drop_last=False) == 1_712


def test_batches_depend_on_seed_and_epoch_alone() -> None:
    data = images(40, 40)

    def rows(seed: int, epoch: int) -> list[list[int]]:
        found = shuffled_batches(data, 4, 4, seed, epoch, drop_last=True)
        return [batch.sketches.tolist() + batch.photos.tolist() for batch in found]

    assert rows(1, 2) == rows(1, 2)
    assert rows(1, 2) != rows(1, 3)
    assert rows(1, 2) != rows(2, 2)


def test_too_few_images_for_a_batch_are_refused() -> None:
    with pytest.raises(BadConfig, match="--batch-sketches"):
        next(shuffled_batches(images(31, 500), 32, 64, 0, 0, drop_last=True))
    assert next(shuffled_batches(images(31, 500), 32, 64, 0, 0, drop_last=False))
