"""Copy regions from a gallery into a merged one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sbtk_runtime.gallery.generation import Generation
from sbtk_runtime.gallery.region_rows import RegionRows
from sbtk_runtime.gallery.rows import RowBytes, Vectors


@dataclass(frozen=True)
class CopiedRegions:
    """Regions of photos, to be written to consecutive rows.

    Attributes:
        content: `(N, row_bytes) uint8`.
        regions: the future rows of each photo's regions; small photos have none.
        total: `(D,)`, the sum of the embeddings.
        damaged: the number of photos whose regions were left out because one is damaged.
    """

    content: RowBytes
    regions: list[RegionRows]
    total: NDArray[np.float64]
    damaged: int


def copy_regions(
    generation: Generation, photo_rows: Mapping[int, int], first_row: int
) -> CopiedRegions:
    """Read the regions of photos whose regions were embedded.

    Args:
        generation: the source, a gallery of embeddings with regions.
        photo_rows: rows of whole frames in the merged gallery, by their rows in the source.
        first_row: row of the first region in the merged gallery.
    """
    assert isinstance(generation.rows, Vectors)
    found = [
        (target, regions)
        for source, target in photo_rows.items()
        if (regions := generation.view.regions_of(source)) is not None
    ]
    numbers = [regions.first_row + np.arange(len(regions.boxes)) for _, regions in found]
    rows = np.unique(np.concatenate([np.empty(0, dtype=np.int64), *numbers]))
    content, is_intact = generation.check.read_checked(rows)
    embeddings, is_whole = generation.rows.decode(content)
    is_intact &= is_whole
    kept: list[RegionRows] = []
    places = [np.empty(0, dtype=np.int64)]
    for (target, regions), own in zip(found, numbers, strict=True):
        place = np.searchsorted(rows, own)
        if is_intact[place].all():
            kept.append(RegionRows(target, first_row, regions.boxes))
            places.append(place)
            first_row += len(own)
    chosen = np.concatenate(places)
    return CopiedRegions(
        content[chosen],
        kept,
        embeddings[chosen].sum(axis=0, dtype=np.float64),
        len(found) - len(kept),
    )
