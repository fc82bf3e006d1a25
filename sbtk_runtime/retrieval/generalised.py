"""SEM-PCYC's generalised setting: which seen images join the unseen ones.

From AnjanDutta/sem-pcyc:src/test.py: as many seen sketches as a fifth of the unseen ones, then as
many seen photos as a fifth of the unseen ones, are drawn without replacement from the training
files, each once and sorted by `class/file`; they join the queries and the gallery, ahead of the
unseen ones. The generator is numpy's, seeded with 0. Where the code drew the unseen classes
themselves (its lists of Sketchy and TU-Berlin), it goes on from there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sbtk_runtime.errors import BadData

Rows = NDArray[np.int64]

_SHARE = 0.2
_SEED = 0
#: What the code draws ahead of the images: how many classes, out of how many.
_DRAWN_BEFORE = {
    "SK-SH-sempcyc": ((125, 100), (25, 12)),
    "TUB-SH-sempcyc": ((250, 220), (30, 15)),
}


@dataclass(frozen=True)
class SeenDraw:
    """Which seen images join: ascending rows of the names that were given, by `class/file`."""

    sketches: Rows
    photos: Rows


def draw_seen(
    sketches: Sequence[str],
    photos: Sequence[str],
    *,
    unseen_sketches: int,
    unseen_photos: int,
    split: str = "",
) -> SeenDraw:
    """Returns the seen images that SEM-PCYC's rule adds.

    Args:
        sketches: `class/file` of the sketches that were trained on; a name counts once.
        photos: the same of the photos.
        unseen_sketches: how many there are.
        unseen_photos: how many there are.
        split: name of the split that says which classes are unseen.

    Raises:
        BadData: there are fewer seen images than a fifth of the unseen ones.
    """
    generator = np.random.RandomState(_SEED)
    for classes, drawn in _DRAWN_BEFORE.get(split, ()):
        generator.choice(classes, drawn, replace=False)
    return SeenDraw(
        _drawn(generator, sketches, unseen_sketches, "sketches"),
        _drawn(generator, photos, unseen_photos, "photos"),
    )


def _drawn(generator: np.random.RandomState, names: Sequence[str], unseen: int, kind: str) -> Rows:
    """Returns the rows drawn, in the order of their names."""
    first = np.unique(np.array(names, dtype=np.str_), return_index=True)[1]
    wanted = int(_SHARE * unseen)
    if wanted > len(first):
        raise BadData(
            f"{len(first)} {kind} of seen classes",
            f"at least {wanted}, a fifth of the {unseen} unseen ones",
            "add seen classes, or measure by another --setting",
        )
    return first[np.sort(generator.choice(len(first), wanted, replace=False))].astype(np.int64)
