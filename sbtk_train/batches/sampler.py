"""Batch sampling: a pure function of labels, seed and epoch, so that runs can resume."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

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
