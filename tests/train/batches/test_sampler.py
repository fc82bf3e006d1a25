from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from sbtk_runtime.errors import BadConfig
from sbtk_train.batches.augment import (
    augment_photos,
    augment_sketches,
    make_contrastive_view,
    move_images,
)
from sbtk_train.batches.sampler import (
    Batch,
    BatchRng,
    BatchShard,
    make_generator,
    sample_class_balanced,
    sample_epoch,
    sample_quadruplets,
    sample_shuffled,
)
from sbtk_train.data.dataset import read_dataset
from sbtk_train.data.image_set import ImageSet, select_classes
from sbtk_train.data.more_images import ClassMap, append_images, read_more
from sbtk_train.data.splits import Division, Split
from sbtk_train.data.strokes import Drawing
from tests.tiny_data import polygon, write_dataset, write_strokes


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> ImageSet:
    root = tmp_path_factory.mktemp("data")
    return read_dataset(write_dataset(root, sketches=5, photos=3))


def test_each_sketch_is_the_anchor_once(data: ImageSet) -> None:
    batches = list(sample_quadruplets(data, 4, seed=0, epoch=0))
    anchors = np.concatenate([batch.sketches[: len(batch.sketches) // 2] for batch in batches])
    assert sorted(anchors.tolist()) == list(range(len(data.sketches)))


def test_quadruplets_have_the_right_classes(data: ImageSet) -> None:
    for epoch in range(20):
        for batch in sample_quadruplets(data, 4, seed=0, epoch=epoch):
            half = len(batch.sketches) // 2
            sketches = data.sketch_labels[batch.sketches]
            photos = data.photo_labels[batch.photos]
            assert (photos[:half] == sketches[:half]).all()
            assert (photos[half:] != sketches[:half]).all()
            assert (sketches[half:] != sketches[:half]).all()


def test_negatives_are_independent_and_cover_every_other_class(data: ImageSet) -> None:
    pairs: Counter[tuple[int, int]] = Counter()
    for epoch in range(100):
        for batch in sample_quadruplets(data, 6, seed=0, epoch=epoch):
            half = len(batch.sketches) // 2
            is_zero = data.sketch_labels[batch.sketches[:half]] == 0
            photo = data.photo_labels[batch.photos[half:]][is_zero]
            sketch = data.sketch_labels[batch.sketches[half:]][is_zero]
            pairs.update(zip(photo.tolist(), sketch.tolist(), strict=True))
    assert set(pairs) == {(p, s) for p in range(1, 6) for s in range(1, 6)}
    # 500 draws over 25 pairs: 20 each on average.
    assert max(pairs.values()) < 45


def test_balanced_batches_hold_different_classes_in_equal_parts(data: ImageSet) -> None:
    batches = list(sample_class_balanced(data, 4, seed=0, epoch=0))
    assert len(batches) == round(len(data.sketches) / 8)
    for batch in batches:
        for labels in (data.sketch_labels[batch.sketches], data.photo_labels[batch.photos]):
            assert sorted(Counter(labels.tolist()).values()) == [2, 2, 2, 2]


def test_balanced_batches_use_each_image_before_repeating_any(data: ImageSet) -> None:
    shown = Counter(
        row
        for batch in sample_class_balanced(data, 6, seed=1, epoch=0)
        for row in batch.sketches.tolist()
    )
    assert max(shown.values()) - min(shown.get(row, 0) for row in range(len(data.sketches))) <= 1


@pytest.mark.parametrize(
    "sample",
    [
        lambda data, seed, epoch: sample_quadruplets(data, 4, seed, epoch),
        lambda data, seed, epoch: sample_class_balanced(data, 4, seed, epoch),
        lambda data, seed, epoch: sample_shuffled(data, 4, 4, seed, epoch, drop_last=True),
    ],
)
def test_batches_are_a_function_of_seed_and_epoch(
    data: ImageSet, sample: Callable[[ImageSet, int, int], Iterator[Batch]]
) -> None:
    def rows(seed: int, epoch: int) -> list[list[int]]:
        found = sample(data, seed, epoch)
        return [batch.sketches.tolist() + batch.photos.tolist() for batch in found]

    assert rows(0, 0) == rows(0, 0)
    assert rows(0, 0) != rows(0, 1)
    assert rows(0, 0) != rows(1, 0)


@pytest.mark.parametrize(("images", "views"), [(16, 1), (40, 1), (120, 1), (96, 3), (1, 1)])
def test_epochs_of_a_given_length_continue_the_methods_own(
    data: ImageSet, images: int, views: int
) -> None:
    def sample(epoch: int) -> Iterator[Batch]:
        return sample_quadruplets(data, 4, 0, epoch)

    def rows(batches: Iterable[Batch]) -> list[list[int]]:
        return [batch.sketches.tolist() + batch.photos.tolist() for batch in batches]

    steps = max(1, round(images / (16 * views)))
    epochs = [rows(sample_epoch(sample, epoch, images, views)) for epoch in range(5)]
    assert [len(epoch) for epoch in epochs] == [steps] * 5
    stream = [row for epoch in range(5 * steps) for row in rows(sample(epoch))]
    assert [row for epoch in epochs for row in epoch] == stream[: 5 * steps]
    assert rows(sample_epoch(sample, 1, 0, views)) == rows(sample(1))


def test_further_classes_have_separate_places_in_each_batch(data: ImageSet, tmp_path: Path) -> None:
    names = ("kite", "lamp", "moon")
    drawings = [(name, [polygon(5)]) for name in (*data.classes[:2], "kite", "moon") for _ in "abc"]
    strokes = write_strokes(tmp_path / "s.npz", drawings)
    photos = write_dataset(tmp_path / "more", ("kite", "lamp"), sketches=0, photos=3) / "photo"
    whole = append_images(
        Division(data, data, select_classes(data, [])),
        Split("none", ()),
        read_more([strokes], [photos]),
        ClassMap("map", {}, {"moon": ("n02701002",)}),
    ).training
    assert whole.classes == (*data.classes, *names)
    batches = list(sample_class_balanced(whole, 4, seed=0, epoch=0, further=2))
    assert len(batches) == len(list(sample_class_balanced(data, 4, seed=0, epoch=0)))
    drawn = np.array([isinstance(sketch, Drawing) for sketch in whole.sketches])
    seen: Counter[str] = Counter()
    for batch in batches:
        sketches = Counter(whole.classes[label] for label in whole.sketch_labels[batch.sketches])
        photos_of = Counter(whole.classes[label] for label in whole.photo_labels[batch.photos])
        chosen = set(sketches) | set(photos_of)
        assert len(chosen & set(data.classes)) == 4
        assert len(chosen & set(names)) == 2
        assert set(sketches.values()) == {2} == set(photos_of.values())
        assert "lamp" not in sketches
        assert "moon" not in photos_of
        seen.update(chosen)
        # Where a class has both, one sketch is a bitmap and one a drawing.
        for name in set(data.classes[:2]) & chosen:
            rows = batch.sketches[whole.sketch_labels[batch.sketches] == whole.classes.index(name)]
            assert sorted(drawn[rows].tolist()) == [False, True]
    assert set(names) <= set(seen)


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
def test_an_epoch_ends_when_either_kind_is_used_up(
    sketches: int, photos: int, drop_last: bool, sizes: list[tuple[int, int]]
) -> None:
    data = images(sketches, photos)
    batches = list(sample_shuffled(data, 3, 6, seed=1, epoch=0, drop_last=drop_last))
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
        return sum(1 for _ in sample_shuffled(data, sketches, photos, 0, 0, drop_last=drop_last))

    assert steps(images(55_252, 68_401), 32, 64, drop_last=True) == 1_068
    assert steps(images(15_400, 176_500), 9, 81, drop_last=False) == 1_712


def test_too_few_images_for_a_batch_are_refused() -> None:
    with pytest.raises(BadConfig, match="--batch-sketches"):
        next(sample_shuffled(images(31, 500), 32, 64, 0, 0, drop_last=True))
    assert next(sample_shuffled(images(31, 500), 32, 64, 0, 0, drop_last=False))


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
