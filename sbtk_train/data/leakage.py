"""Images and classes that a split puts on both sides: seen in training and unseen in testing."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from sbtk_train.data.class_names import ClassNames
from sbtk_train.data.image_set import ImageSet
from sbtk_train.data.list_files import ListFolder
from sbtk_train.data.splits import Split

#: An ImageNet photo, in the names of photos and of the sketches that were drawn from them.
_PHOTO_ID = re.compile(r"n\d{8}_\d+")


@dataclass(frozen=True)
class Leak:
    """The same thing on both sides; two paths, or two class names."""

    seen: str
    unseen: str


@dataclass(frozen=True)
class Leakage:
    """What both sides of a split have in common.

    Attributes:
        classes: classes that list files name on both sides.
        photo_ids: images whose names carry the number of one ImageNet photo.
        contents: images with the very same bytes; `None` where no file was read.
        file_names: images of one kind with one file name. Names that only count (`ext_12.jpg`)
            repeat from class to class, so alone they prove nothing.
    """

    classes: tuple[Leak, ...]
    photo_ids: tuple[Leak, ...]
    contents: tuple[Leak, ...] | None
    file_names: tuple[Leak, ...]

    @property
    def is_certain(self) -> bool:
        """Whether a class or an image is on both sides beyond doubt."""
        return bool(self.classes or self.photo_ids or self.contents)


def find_leakage(
    data: ImageSet,
    split: Split,
    lists: Iterable[ListFolder],
    sha256: Mapping[Path, bytes] | None = None,
) -> Leakage:
    """Returns what the sides of the split have in common.

    Args:
        data: the whole data set.
        split: decides the side of each class.
        lists: the data set's own list files.
        sha256: of the bytes of each image; `None` if they were not read.
    """
    is_unseen = [split.is_unseen(name) for name in data.classes]
    sketches = [*zip(data.sketch_files, (is_unseen[x] for x in data.sketch_labels), strict=True)]
    photos = [*zip(data.photos, (is_unseen[x] for x in data.photo_labels), strict=True)]
    both = sketches + photos
    identified = ((match[0], path, side) for path, side in both if (match := _photo_id(path)))
    contents = None
    if sha256 is not None:
        read = ((sha256[path], path, side) for path, side in both if path in sha256)
        contents = tuple(_on_both_sides(read))
    names = [
        leak
        for images in (sketches, photos)
        for leak in _on_both_sides((path.name, path, side) for path, side in images)
    ]
    return Leakage(
        tuple(leak for folder in lists for leak in _listed_twice(folder)),
        tuple(_on_both_sides(identified)),
        contents,
        tuple(names),
    )


def _photo_id(path: Path) -> re.Match[str] | None:
    return _PHOTO_ID.match(path.name)


def _on_both_sides(found: Iterable[tuple[object, Path, bool]]) -> Iterator[Leak]:
    """Yields the first image of each side for every key that is on both."""
    first: dict[object, dict[bool, Path]] = defaultdict(dict)
    for key, path, is_unseen in found:
        first[key].setdefault(is_unseen, path)
    for sides in first.values():
        if len(sides) == 2:
            yield Leak(str(sides[False]), str(sides[True]))


def _listed_twice(folder: ListFolder) -> Iterator[Leak]:
    unseen = ClassNames(folder.unseen)
    for name in folder.seen:
        if other := unseen.find(name):
            yield Leak(f"{folder.name}: {name}", other)
