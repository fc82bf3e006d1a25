"""Images and classes on both sides of a split: seen in training and unseen in testing."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from sbtk_train.data.class_names import ClassNames, published_key
from sbtk_train.data.image_set import ImageSet
from sbtk_train.data.layouts import ListFolder
from sbtk_train.data.splits import Split, open_split

#: The id of an ImageNet photo, in names of photos and of sketches drawn from them.
_PHOTO_ID = re.compile(r"n\d{8}_\d+")


@dataclass(frozen=True)
class Leak:
    """The same image or class on both sides: two paths, or two class names."""

    seen: str
    unseen: str


@dataclass(frozen=True)
class Leakage:
    """Images that both sides of a split share.

    Attributes:
        classes: classes that list files name on both sides.
        photo_ids: images with the id of the same ImageNet photo in their names.
        contents: images with the same bytes; `None` if no file was read.
        file_names: images of one kind with the same file name. This alone proves nothing, since
            numbered names (`ext_12.jpg`) repeat from class to class.
    """

    classes: tuple[Leak, ...]
    photo_ids: tuple[Leak, ...]
    contents: tuple[Leak, ...] | None
    file_names: tuple[Leak, ...]


def find_leakage(
    data: ImageSet,
    split: Split,
    lists: Iterable[ListFolder],
    sha256: Mapping[Path, bytes] | None = None,
) -> Leakage:
    """Return the classes and images on both sides of a split.

    Args:
        data: the whole data set.
        split: decides the side of each class.
        lists: the data set's own list files.
        sha256: hash of each image file; `None` if the files were not read.
    """
    is_unseen = [split.is_unseen(name) for name in data.classes]
    sketches = [*zip(data.sketch_files, (is_unseen[x] for x in data.sketch_labels), strict=True)]
    photos = [*zip(data.photos, (is_unseen[x] for x in data.photo_labels), strict=True)]
    both = sketches + photos
    matched = ((_PHOTO_ID.match(path.name), path, side) for path, side in both)
    identified = ((match[0], path, side) for match, path, side in matched if match)
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


def _on_both_sides(found: Iterable[tuple[object, Path, bool]]) -> Iterator[Leak]:
    """Yield the first image of each side for every key on both sides."""
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


#: Smallest share of common classes (intersection over union) to recognise a published data set.
_ENOUGH = 0.8


@dataclass(frozen=True)
class PublishedSplit:
    """Published image counts of a split.

    Attributes:
        split: name of the split.
        training_sketches: sketches of seen classes, without held-out ones.
        held_out_sketches: held-out sketches of seen classes.
        training_photos: photos of seen classes, without duplicates.
        queries: sketches of unseen classes.
        gallery: photos of unseen classes, without duplicates.
        gallery_with_duplicates: photos of unseen classes as often as they are listed.
    """

    split: str
    training_sketches: int | None
    held_out_sketches: int | None
    training_photos: int | None
    queries: int
    gallery: int
    gallery_with_duplicates: int


@dataclass(frozen=True)
class PublishedData:
    """Published image counts of a data set.

    Attributes:
        name: its name in papers.
        classes: number of classes.
        sketches: number of sketches.
        photos: number of photos, without duplicates.
        sketches_per_class: mean and standard deviation, as rounded in the paper.
        photos_per_class: mean and standard deviation, as rounded in the paper.
        splits: its published splits.
    """

    name: str
    classes: int
    sketches: int | None
    photos: int | None
    sketches_per_class: tuple[int, int]
    photos_per_class: tuple[int, int]
    splits: tuple[PublishedSplit, ...]


PUBLISHED_DATA = (
    PublishedData(
        "Sketchy Ext",
        125,
        75_481,
        73_002,
        (604, 61),
        (584, 76),
        (
            PublishedSplit("SK-SH", 55_252, 5_000, 58_401, 15_229, 14_601, 17_101),
            PublishedSplit("SK-YE", 57_587, 5_200, 62_549, 12_694, 10_453, 12_553),
        ),
    ),
    PublishedData(
        "TU-Berlin Ext",
        250,
        20_000,
        204_489,
        (80, 0),
        # The paper's mean; 204,489 photos in 250 classes are 818 a class.
        (787, 489),
        (
            PublishedSplit("TUB-SH", 15_400, 2_200, None, 2_400, 27_989, 27_989),
            PublishedSplit("TUB-SH-sempcyc", None, None, None, 2_400, 25_708, 25_708),
        ),
    ),
    PublishedData(
        "QuickDraw Ext",
        110,
        None,
        None,
        (3022, 216),
        (1853, 308),
        (PublishedSplit("QD-DE", None, None, None, 92_291, 54_151, 54_151),),
    ),
)


def match_published_data(classes: Iterable[str]) -> PublishedData | None:
    """Return the published data set that has nearly these classes; `None` if there is none."""
    here = {published_key(name) for name in classes}
    for data in PUBLISHED_DATA:
        split = open_split(data.splits[0].split)
        there = {published_key(name) for name in (*split.seen, *split.unseen)}
        if len(here & there) >= _ENOUGH * len(here | there):
            return data
    return None
