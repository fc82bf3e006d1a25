"""DSN's and SAKE's batches: so many sketches and so many photos, of whatever classes."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from sbtk_runtime.errors import BadConfig
from sbtk_train.batches.sampler import Batch
from sbtk_train.data import ImageSet


def shuffled_batches(
    data: ImageSet, sketches: int, photos: int, seed: int, epoch: int, *, drop_last: bool
) -> Iterator[Batch]:
    """Yields batches of shuffled sketches and photos until either has run out.

    None is shown twice in an epoch, and what is left over of the more plentiful kind is not shown
    in it at all.

    Args:
        data: the training images.
        sketches: sketches in a batch.
        photos: photos in a batch.
        seed: of the run.
        epoch: from 0.
        drop_last: leave out batches with fewer images than asked for, as DSN does on Sketchy and
            not on TU-Berlin.

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
            f"{len(sketch_order)} training sketches and {len(photo_order)} photos make no batch "
            f"of {sketches} sketches and {photos} photos",
            "at least one whole batch in an epoch",
            "give smaller batches: --batch-sketches, --batch-photos",
        )
    for step in range(steps):
        yield Batch(
            sketch_order[step * sketches : (step + 1) * sketches],
            photo_order[step * photos : (step + 1) * photos],
        )
