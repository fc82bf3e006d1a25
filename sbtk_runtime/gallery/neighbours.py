"""The nearest neighbours of each photo, for re-ranking hits.

They are stored in one file next to the vectors, of some 68 bytes a photo, which can always be
rebuilt. Row numbers are never reused, so a file that is older or newer than the generation that is
searched has fewer or additional neighbours, but no wrong ones.
"""

from __future__ import annotations

import os
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sbtk_runtime.engines.base import Notify
from sbtk_runtime.errors import BadGallery
from sbtk_runtime.files import atomic_path, count_text, open_regular, printable_name, read_refused
from sbtk_runtime.gallery.rows import Embeddings, Rows, Vectors
from sbtk_runtime.rerank import NEIGHBOURS

NEIGHBOURS_NAME = "neighbours.npz"
#: With more than this share of deleted photos, all neighbours are found again.
MOST_DEAD = 0.2
#: Most pairs of photos to compare: 100,000 by 100,000, some minutes on two cores.
MOST_PAIRS = 10**10

_FORMAT = 1
_BLOCK = 1024
_CHUNK = 4096
_NONE = -1

Similarities = NDArray[np.float32]


@dataclass(frozen=True)
class Neighbours:
    """The nearest photos of each photo, by their rows in the vectors.

    Attributes:
        rows: `(N,) int64`, ascending.
        near: `(N, k) int64`, rows of the nearest other photos, best first, padded with -1.
        similarities: `(N, k) float32`, their cosines.
    """

    rows: Rows
    near: Rows
    similarities: Similarities

    def among(self, hits: Rows) -> tuple[Rows, Similarities]:
        """Return each hit's neighbours as positions among the hits, `(n, k)`, and their cosines.

        A position is -1 if the neighbour is not among the hits, or the hit has no neighbours here.

        Args:
            hits: `(n,) int64`, different rows.
        """
        if not len(self.rows):
            shape = (len(hits), NEIGHBOURS)
            return np.full(shape, _NONE, dtype=np.int64), np.zeros(shape, dtype=np.float32)
        own, is_known = _locate(self.rows, hits)
        near = np.where(is_known[:, None], self.near[own], _NONE)
        order = np.argsort(hits)
        place, is_hit = _locate(hits[order], near)
        return np.where(is_hit, order[place], _NONE), self.similarities[own]


def load_neighbours(folder: Path, dim: int) -> Neighbours:
    """Return the neighbours in a gallery's file.

    Raises:
        BadGallery: there are none, or the file is damaged.
    """
    path = folder / NEIGHBOURS_NAME
    advice = "run sbtk index on your photos to find them"
    if not path.exists():
        raise BadGallery(
            f"{printable_name(folder)} has no neighbours of its photos to re-rank by", "", advice
        )
    try:
        with os.fdopen(open_regular(path), "rb") as opened:
            # NumPy would advise to unpickle other files.
            if not zipfile.is_zipfile(opened):
                raise ValueError("not a zip file")
            opened.seek(0)
            # Each array's CRC-32 is checked as it is read.
            with np.load(opened, allow_pickle=False) as file:
                version, of_dim = (int(number) for number in file["format"])
                rows = file["rows"].astype(np.int64)
                near, similarities = file["near"].astype(np.int64), file["similarities"]
    except OSError as problem:
        raise BadGallery(*read_refused(path, problem)) from problem
    except MemoryError:
        raise
    # On damaged files, zipfile and NumPy raise a dozen kinds of error.
    except Exception as problem:
        raise BadGallery(f"{printable_name(path)} is damaged: {problem}", "", advice) from problem
    is_sound = (
        (version, of_dim) == (_FORMAT, dim)
        and rows.ndim == 1
        and (np.diff(rows) > 0).all()
        and near.shape == similarities.shape == (len(rows), NEIGHBOURS)
    )
    if not is_sound:
        raise BadGallery(
            f"{printable_name(path)} belongs to another gallery or version of sbtk", "", advice
        )
    return Neighbours(rows, near, similarities.astype(np.float32))


def update_neighbours(folder: Path, vectors: Vectors, rows: Rows, notify: Notify) -> None:
    """Update the gallery's file to the photos in `rows (N,) int64`, ascending.

    Only new photos are compared with all others. If that would take very long, the file stays as it
    is, and `notify` is called.

    Raises:
        DiskFull: there is no space for the file.
    """
    try:
        known = load_neighbours(folder, vectors.dim)
    except BadGallery:
        known = _no_neighbours()
    if np.array_equal(known.rows, rows):
        return
    dead = int((~np.isin(known.rows, rows)).sum())
    if dead > MOST_DEAD * max(len(known.rows), 1):
        known = _no_neighbours()
    new = int((~np.isin(rows, known.rows)).sum())
    if new * len(rows) > MOST_PAIRS:
        notify(f"no neighbours: comparing {new:,} new photos with {len(rows):,} takes too long")
        return
    if new * len(rows) > MOST_PAIRS // 100:
        notify(f"finding the neighbours of {count_text(new, 'photo')}")
    found = find_neighbours(known, vectors, rows)
    with atomic_path(folder / NEIGHBOURS_NAME) as temporary, temporary.open("wb") as file:
        np.savez(
            file,
            format=np.array([_FORMAT, vectors.dim]),
            rows=found.rows,
            near=found.near.astype(np.int32),
            similarities=found.similarities.astype(np.float16),
        )


def find_neighbours(known: Neighbours, vectors: Vectors, rows: Rows) -> Neighbours:
    """Return the neighbours of the photos in `rows (N,) int64`, ascending, given those of some.

    Blocks of new photos are compared with chunks of all, to limit memory.
    """
    near = np.full((len(rows), NEIGHBOURS), _NONE, dtype=np.int64)
    similarities = np.full(near.shape, -np.inf, dtype=np.float32)
    kept, is_kept = _locate(known.rows, rows)
    near[is_kept] = known.near[kept[is_kept]]
    is_alive = np.isin(near, rows)
    near[~is_alive] = _NONE
    similarities[is_kept] = known.similarities[kept[is_kept]]
    similarities[~is_alive] = -np.inf
    new = np.flatnonzero(~is_kept)
    for start in range(0, len(new), _BLOCK):
        block = new[start : start + _BLOCK]
        own, is_whole = vectors.read(rows[block])
        for first in range(0, len(rows), _CHUNK):
            chunk = np.arange(first, min(first + _CHUNK, len(rows)))
            cosines = own @ vectors.read(rows[chunk])[0].T
            cosines[~is_whole] = -np.inf
            cosines[rows[block][:, None] == rows[chunk][None]] = -np.inf
            _take_nearer(near, similarities, block, rows[chunk], cosines)
            old = chunk[is_kept[chunk]]
            _take_nearer(near, similarities, old, rows[block], cosines[:, old - first].T)
    near[similarities <= 0] = _NONE
    changed = np.flatnonzero((similarities[:, 1:] > similarities[:, :-1]).any(axis=1))
    order = np.argsort(-similarities[changed], axis=1, kind="stable")
    near[changed] = np.take_along_axis(near[changed], order, 1)
    similarities[changed] = np.take_along_axis(similarities[changed], order, 1)
    similarities[near == _NONE] = 0
    return Neighbours(rows, near, similarities)


def _take_nearer(
    near: Rows, similarities: Similarities, places: Rows, others: Rows, cosines: Embeddings
) -> None:
    """Replace neighbours at `places (n,)` by those of `others (m,)` that are nearer, in place."""
    width = near.shape[1]
    is_nearer = cosines.max(axis=1, initial=-np.inf) > similarities[places].min(axis=1)
    places, cosines = places[is_nearer], cosines[is_nearer]
    if not len(places):
        return
    every = np.concatenate([similarities[places], cosines], axis=1)
    named = np.concatenate([near[places], np.broadcast_to(others, cosines.shape)], axis=1)
    best = np.argpartition(-every, width - 1, axis=1)[:, :width]
    near[places] = np.take_along_axis(named, best, 1)
    similarities[places] = np.take_along_axis(every, best, 1)


def _no_neighbours() -> Neighbours:
    return Neighbours(
        np.empty(0, dtype=np.int64),
        np.empty((0, NEIGHBOURS), dtype=np.int64),
        np.empty((0, NEIGHBOURS), dtype=np.float32),
    )


def _locate(sorted_rows: Rows, wanted: Rows) -> tuple[Rows, NDArray[np.bool_]]:
    """Return the position of each wanted row among ascending ones, and whether it is there."""
    if not len(sorted_rows):
        return np.zeros(wanted.shape, dtype=np.int64), np.zeros(wanted.shape, dtype=bool)
    place = np.searchsorted(sorted_rows, wanted).clip(max=len(sorted_rows) - 1)
    return place, sorted_rows[place] == wanted
