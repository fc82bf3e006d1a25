"""The counts of the published data sets, to lay beside those found on disk.

Means and deviations are Table 1 of the SBTKNet paper. Counts were taken from the list files of
qliu24/SAKE, buptLinfy/ZSE-SBIR (SK-YE, QD-DE, the galleries) and huangzongheng/MATHM; SEM-PCYC's
from eunyi-lyou/MA-ZS-SBIR. Where no source gives a count it is `None`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from sbtk_train.data.class_names import published_key
from sbtk_train.data.splits import open_split

#: Classes in common, of all classes on either side, from which data are taken for a data set.
_ENOUGH = 0.8


@dataclass(frozen=True)
class PublishedSplit:
    """Counts of one split.

    Attributes:
        split: its name.
        training_sketches: sketches of seen classes without those held out.
        held_out_sketches: sketches of seen classes that are kept back.
        training_photos: photos of seen classes, each once.
        queries: sketches of unseen classes.
        gallery: photos of unseen classes, each once.
        gallery_with_duplicates: the same with those that the lists name twice.
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
    """Counts of one data set.

    Attributes:
        name: as papers call it.
        classes: number of classes.
        sketches: number of sketches.
        photos: number of photos, each once.
        sketches_per_class: mean and standard deviation, as the paper rounds them.
        photos_per_class: the same.
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


def published_data(classes: Iterable[str]) -> PublishedData | None:
    """Returns the published data set that has these classes, by and large; `None` if none has."""
    here = {published_key(name) for name in classes}
    for data in PUBLISHED_DATA:
        split = open_split(data.splits[0].split)
        there = {published_key(name) for name in (*split.seen, *split.unseen)}
        if len(here & there) >= _ENOUGH * len(here | there):
            return data
    return None
