"""Which images make a batch; a pure function of seed, epoch and labels, so a run can resume."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from sbtk_train.data import ImageSet, Rows

#: Sketches and photos of each class in a class-balanced batch.
PER_CLASS = 2


@dataclass(frozen=True)
class Batch:
    """Rows of an `ImageSet` that are trained on together.

    In a batch of quadruplets `sketches` holds N anchors, then N negative sketches; `photos` N
    positives, then N negatives. In a class-balanced batch both are grouped by class.
    """

    sketches: Rows
    photos: Rows


def quadruplet_batches(data: ImageSet, size: int, seed: int, epoch: int) -> Iterator[Batch]:
    """Yields batches of `size` quadruplets; each sketch is the anchor once (the last may be less).

    The positive photo is of the anchor's class. Negative photo and negative sketch are of other
    classes, drawn independently: first a class uniformly, then an image of it.
    """
    rng = _generator(seed, epoch)
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


def class_balanced_batches(data: ImageSet, classes: int, seed: int, epoch: int) -> Iterator[Batch]:
    """Yields batches of `classes` different classes with two sketches and two photos of each.

    An epoch shows as many sketches as there are; a class's images come in shuffled turns, so that
    none is shown twice before all were shown once (within the epoch).
    """
    rng = _generator(seed, epoch)
    sketches_of, photos_of = _rows_by_class(data)
    sketch_turns = [_Turns(rows, rng) for rows in sketches_of]
    photo_turns = [_Turns(rows, rng) for rows in photos_of]
    width = min(classes, len(data.classes))
    batches = max(1, round(len(data.sketches) / (PER_CLASS * width)))
    queue: list[int] = []
    for _ in range(batches):
        chosen: list[int] = []
        while len(chosen) < width:
            if not queue:
                queue = rng.permutation(len(data.classes)).tolist()
            # A class that closes one round and opens the next would stand twice in the batch.
            position = next((i for i, label in enumerate(queue) if label not in chosen), None)
            if position is None:
                queue = []
                continue
            chosen.append(queue.pop(position))
        yield Batch(
            np.concatenate([sketch_turns[label].take(PER_CLASS) for label in chosen]),
            np.concatenate([photo_turns[label].take(PER_CLASS) for label in chosen]),
        )


class _Turns:
    """Deals the rows of a class in shuffled rounds."""

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


def _generator(seed: int, epoch: int) -> np.random.Generator:
    return np.random.default_rng([seed, epoch])
