"""Photos that a data set holds twice.

SAKE's lists of Sketchy Ext name the 12,500 original photos beside the extended ones, which hold
them already: 2,499 of the 2,500 in SK-SH's gallery under the same file name. Published figures
were taken with these galleries, and some without; a figure must say which.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterator, Sequence
from pathlib import Path


def without_duplicates(
    paths: Sequence[Path], class_of: Sequence[Hashable], folders: Sequence[Path]
) -> list[int]:
    """Returns the rows of the photos that are no second copy, in order.

    A photo is a copy if an earlier folder holds, in the same class, a photo of its file name or
    of its very bytes. A path that is there twice is its own copy.

    Args:
        paths: the photos.
        class_of: the class of each.
        folders: folders of class folders, the one whose photos are kept first.
    """
    rank_of_folder = {str(folder): rank for rank, folder in enumerate(folders)}
    rank_of = [rank_of_folder.get(str(path.parent.parent), len(folders)) for path in paths]
    # A name says nothing within one folder: two class folders that are one class may both count.
    best: dict[tuple[Hashable, str], int] = {}
    for name, rank in zip(_names(paths, class_of), rank_of, strict=True):
        best[name] = min(rank, best.get(name, rank))
    seen: set[Path] = set()
    unique: list[int] = []
    for row, name in enumerate(_names(paths, class_of)):
        if rank_of[row] == best[name] and paths[row] not in seen:
            unique.append(row)
            seen.add(paths[row])
    kept = [row for row in unique if rank_of[row] == 0]
    later = [row for row in unique if rank_of[row] > 0]
    copies = _same_bytes(paths, class_of, kept, later) if kept and later else set()
    return [row for row in unique if row not in copies]


def _names(paths: Sequence[Path], class_of: Sequence[Hashable]) -> Iterator[tuple[Hashable, str]]:
    return ((of, path.name) for path, of in zip(paths, class_of, strict=True))


def _same_bytes(
    paths: Sequence[Path], class_of: Sequence[Hashable], kept: list[int], later: list[int]
) -> set[int]:
    """Returns the later photos whose bytes a kept photo of their class has."""
    wanted = {class_of[row] for row in later}
    by_size: dict[tuple[Hashable, int], list[int]] = defaultdict(list)
    for row in kept:
        if class_of[row] in wanted:
            by_size[class_of[row], paths[row].stat().st_size].append(row)
    return {
        row
        for row in later
        for other in by_size[class_of[row], paths[row].stat().st_size]
        if paths[row].read_bytes() == paths[other].read_bytes()
    }
