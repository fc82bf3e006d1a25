"""Sampling of batches, a process's shard of a batch, and its random numbers.

All are pure functions of labels, seed, epoch and the batch's number, so that runs can resume.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Generator, Tensor

from sbtk_runtime.errors import BadConfig
from sbtk_train.data.image_set import ImageSet, Rows
from sbtk_train.data.strokes import Drawing

#: Sketches, and photos, of each class in a class-balanced batch.
PER_CLASS = 2


@dataclass(frozen=True)
class Batch:
    """Rows of an `ImageSet` that are trained on together.

    In a batch of quadruplets, `sketches` has N anchors, then N negative sketches, and `photos` has
    N positives, then N negatives. In a class-balanced batch both are grouped by class.
    """

    sketches: Rows
    photos: Rows


def sample_epoch(
    sample: Callable[[int], Iterator[Batch]], epoch: int, images: int, views: int
) -> Iterator[Batch]:
    """Yield the batches of an epoch with a given number of images, to the nearest batch.

    Epochs of that length follow each other in the stream of a method's own epochs.

    Args:
        sample: yields the batches of one of the method's own epochs.
        epoch: from 0.
        images: images of an epoch, counted once for each view; 0 for the method's own epochs.
        views: views of each image in a step.
    """
    if not images:
        return sample(epoch)
    first = next(sample(0))
    steps = max(1, round(images / (views * (len(first.sketches) + len(first.photos)))))
    stream = itertools.chain.from_iterable(map(sample, itertools.count()))
    return itertools.islice(stream, epoch * steps, (epoch + 1) * steps)


def sample_quadruplets(data: ImageSet, size: int, seed: int, epoch: int) -> Iterator[Batch]:
    """Yield batches of `size` quadruplets (the last may be smaller); each sketch is an anchor once.

    The positive photo is of the anchor's class. Negative photo and negative sketch are of other
    classes, sampled independently: first a class uniformly, then an image of it.
    """
    rng = np.random.default_rng([seed, epoch])
    sketches_of, photos_of = _rows_by_class(data)
    count = len(data.classes)
    order = rng.permutation(len(data.sketches))
    for start in range(0, len(order), size):
        anchors = order[start : start + size]
        labels = data.sketch_labels[anchors]
        positives = [rng.choice(photos_of[label]) for label in labels]
        other_photo = (labels + rng.integers(1, count, len(labels))) % count
        other_sketch = (labels + rng.integers(1, count, len(labels))) % count
        negative_photos = [rng.choice(photos_of[label]) for label in other_photo]
        negative_sketches = [rng.choice(sketches_of[label]) for label in other_sketch]
        yield Batch(
            np.concatenate([anchors, np.array(negative_sketches, dtype=np.int64)]),
            np.array(positives + negative_photos, dtype=np.int64),
        )


def sample_class_balanced(
    data: ImageSet, classes: int, seed: int, epoch: int, *, further: int = 0
) -> Iterator[Batch]:
    """Yield batches of `classes` different classes with two sketches and two photos of each.

    An epoch has as many sketches as the data set itself. A class's images are used in shuffled
    rounds, so within an epoch none is repeated before all were used. If a class has both bitmaps
    and stroke drawings, a batch has one of each. If a class of further sources lacks a domain, the
    batch has none of its images in that domain.

    Args:
        data: the training images.
        classes: number of the data set's classes in each batch.
        seed: seed of the order.
        epoch: from 0.
        further: number of classes of further sources in each batch.
    """
    rng = np.random.default_rng([seed, epoch])
    sketches_of, photos_of = _rows_by_class(data)
    is_drawn = np.array([isinstance(sketch, Drawing) for sketch in data.sketches], dtype=bool)
    sketch_turns = [
        [
            _ShuffledQueue(part, rng)
            for part in (rows[~is_drawn[rows]], rows[is_drawn[rows]])
            if len(part)
        ]
        for rows in sketches_of
    ]
    photo_turns = [[_ShuffledQueue(rows, rng)] if len(rows) else [] for rows in photos_of]
    count = len(data.classes) - data.further_classes
    width, extra = min(classes, count), min(further, data.further_classes)
    batches = max(1, round(int((~is_drawn).sum()) / (PER_CLASS * width)))
    own = _distinct(np.arange(count), width, rng)
    others = _distinct(np.arange(count, len(data.classes)), extra, rng)
    for _ in range(batches):
        chosen = [*next(own), *next(others)]
        yield Batch(
            np.concatenate([_take(sketch_turns[label]) for label in chosen]),
            np.concatenate([_take(photo_turns[label]) for label in chosen]),
        )


def _distinct(labels: Rows, count: int, rng: np.random.Generator) -> Iterator[list[int]]:
    """Yield lists of `count` different labels; none is repeated before all were used."""
    queue: list[int] = []
    while True:
        chosen: list[int] = []
        while len(chosen) < count:
            if not queue:
                queue = rng.permutation(labels).tolist()
            # A class could end one round and start the next, and would be in the batch twice.
            position = next((i for i, label in enumerate(queue) if label not in chosen), None)
            if position is None:
                queue = []
                continue
            chosen.append(queue.pop(position))
        yield chosen


def _take(turns: Sequence[_ShuffledQueue]) -> Rows:
    """Return `PER_CLASS` rows, in equal parts from each queue; none without a queue."""
    if not turns:
        return np.empty(0, dtype=np.int64)
    shares = [PER_CLASS // len(turns)] * len(turns)
    return np.concatenate([turn.take(share) for turn, share in zip(turns, shares, strict=True)])


class _ShuffledQueue:
    """The rows of a class in shuffled rounds."""

    def __init__(self, rows: Rows, rng: np.random.Generator) -> None:
        self._rows = rows
        self._rng = rng
        self._left: list[int] = []

    def take(self, count: int) -> Rows:
        while len(self._left) < count:
            self._left += self._rng.permutation(self._rows).tolist()
        taken, self._left = self._left[:count], self._left[count:]
        return np.array(taken, dtype=np.int64)


def _rows_by_class(data: ImageSet) -> tuple[list[Rows], list[Rows]]:
    labels = range(len(data.classes))
    return (
        [np.flatnonzero(data.sketch_labels == label) for label in labels],
        [np.flatnonzero(data.photo_labels == label) for label in labels],
    )


def sample_shuffled(
    data: ImageSet, sketches: int, photos: int, seed: int, epoch: int, *, drop_last: bool
) -> Iterator[Batch]:
    """Yield batches of shuffled sketches and photos until either kind runs out.

    No image is repeated in an epoch; the rest of the larger kind is not used in it.

    Args:
        data: the training images.
        sketches: sketches in a batch.
        photos: photos in a batch.
        seed: the run's seed.
        epoch: from 0.
        drop_last: leave out an incomplete batch, as DSN does on Sketchy but not on TU-Berlin.

    Raises:
        BadConfig: there are too few images for a single batch.
    """
    rng = np.random.default_rng([seed, epoch])
    sketch_order = rng.permutation(len(data.sketches))
    photo_order = rng.permutation(len(data.photos))
    counts = (len(sketch_order) / sketches, len(photo_order) / photos)
    steps = int(min(counts)) if drop_last else int(np.ceil(min(counts)))
    if steps == 0:
        raise BadConfig(
            f"{len(sketch_order)} training sketches and {len(photo_order)} photos do not fill a "
            f"batch of {sketches} sketches and {photos} photos",
            "at least one full batch in an epoch",
            "use smaller batches: --batch-sketches, --batch-photos",
        )
    for step in range(steps):
        yield Batch(
            sketch_order[step * sketches : (step + 1) * sketches],
            photo_order[step * photos : (step + 1) * photos],
        )


@dataclass(frozen=True)
class BatchShard:
    """A process's `s` sketches and `p` photos of a batch of `S` sketches and `P` photos.

    Process r of W takes every W-th sketch, starting at the r-th, and every W-th photo in the
    reverse order of the processes, so shards differ by at most one sketch and one photo.

    Attributes:
        batch: the whole batch.
        rank: the process, from 0.
        size: number of processes.
    """

    batch: Batch
    rank: int = 0
    size: int = 1

    @property
    def local(self) -> Batch:
        """The images of this process; there may be none of a kind."""
        sketches, photos = self._local_positions(self.rank)
        return Batch(self.batch.sketches[sketches.numpy()], self.batch.photos[photos.numpy()])

    def make_rngs(self, generator: Generator) -> BatchRngs:
        """Return the random number generators of this process's images."""
        counts = (len(self.batch.sketches), len(self.batch.photos))
        places = self._local_positions(self.rank)
        of_kind = (BatchRng(generator, *both) for both in zip(counts, places, strict=True))
        return BatchRngs(*of_kind)

    def rows(self, views: int = 1, rank: int | None = None) -> Tensor:
        """Return `(V * (s + p),) int64`: positions of a process's rows among all rows.

        All are the `V * (S + P)` rows of views of the batch, view after view, and sketches first
        within a view; the process's own are in the same order.

        Args:
            views: V, the number of views of each image.
            rank: the process; `None` for the shard's own.
        """
        sketches, photos = self._local_positions(self.rank if rank is None else rank)
        one_view = torch.cat([sketches, len(self.batch.sketches) + photos])
        count = len(self.batch.sketches) + len(self.batch.photos)
        return torch.cat([view * count + one_view for view in range(views)])

    def max_rows(self, views: int) -> int:
        """Return the largest number of rows of any process."""
        return max(len(self.rows(views, rank)) for rank in range(self.size))

    def gather_order(self, views: int) -> Tensor:
        """Return `(V * (S + P),) int64`: the position of each row among the gathered rows.

        These are the rows of one process after another, each padded to `max_rows`.
        """
        max_rows = self.max_rows(views)
        count = len(self.batch.sketches) + len(self.batch.photos)
        order = torch.empty(views * count, dtype=torch.int64)
        for rank in range(self.size):
            rows = self.rows(views, rank)
            order[rows] = rank * max_rows + torch.arange(len(rows))
        return order

    def _local_positions(self, rank: int) -> tuple[Tensor, Tensor]:
        """Return the positions of a process's sketches among the sketches, and of its photos."""
        return (
            torch.arange(len(self.batch.sketches))[rank :: self.size],
            torch.arange(len(self.batch.photos))[self.size - 1 - rank :: self.size],
        )


class BatchRng:
    """Random numbers for N images.

    If the images are a shard of a batch, numbers are drawn for the whole batch and each image gets
    those of its position, so augmentation does not depend on the number of processes.

    Args:
        generator: CPU generator of the numbers.
        count: number of images in the whole batch.
        places: `(N,) int64`, positions of the N images in the batch; `None` for the whole batch.
    """

    def __init__(self, generator: Generator, count: int, places: Tensor | None = None) -> None:
        self._generator = generator
        self._count = count
        self._places = places

    def uniform(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return `(N, *shape)` uniform numbers in [0, 1), on the CPU."""
        numbers = torch.rand(self._count, *shape, generator=self._generator, dtype=dtype)
        return numbers if self._places is None else numbers[self._places]

    def bernoulli(self, share: float, *shape: int) -> Tensor:
        """Return `(N, *shape) bool`, each true with the probability `share`, on the CPU."""
        return self.uniform(*shape) < share


@dataclass(frozen=True)
class BatchRngs:
    """The random numbers of a batch; both kinds of images share a generator.

    Attributes:
        sketches: for the batch's sketches.
        photos: for its photos.
    """

    sketches: BatchRng
    photos: BatchRng


def make_generator(seed: int, *position: int) -> Generator:
    """Return a generator that is determined by the seed and the batch's position."""
    state = seed
    for number in position:
        state = (state * 1_000_003 + number + 1) % (1 << 62)
    return Generator().manual_seed(state)
