"""Data sets on disk and their division for zero-shot training.

`layouts` finds the images, `dataset` combines them, and `splits` divides them into training,
held-out and validation images.
"""

from __future__ import annotations

from pathlib import Path

from sbtk_runtime.errors import BadData
from sbtk_runtime.files import printable_name
from sbtk_train.data.dataset import Dataset, open_dataset
from sbtk_train.data.image_set import ImageSet, ImageSource, Rows, select_classes
from sbtk_train.data.splits import MIN_TRAINING_CLASSES, Division, divide

__all__ = [
    "MIN_TRAINING_CLASSES",
    "Division",
    "ImageSet",
    "ImageSource",
    "Rows",
    "divide",
    "read_dataset",
    "select_classes",
]

#: Of a list file; with more, something was not unpacked, and figures would be of other data.
MAX_MISSING_SHARE = 0.05


def read_dataset(root: Path, *, keep_duplicates: bool = False) -> ImageSet:
    """Return every sketch and photo of the data set in `root`; see `sbtk_train.data.layouts`.

    Args:
        root: the data set's folder, or one that holds nothing else.
        keep_duplicates: take photos of Sketchy Ext twice that are in two of its folders, as
            published galleries do.

    Raises:
        BadData: no layout is recognised, a list file is damaged, or many of the images that it
            names are missing.
    """
    found = open_dataset(root, keep_duplicates=keep_duplicates)
    _refuse_many_missing(found)
    return found.images


def _refuse_many_missing(found: Dataset) -> None:
    for each in found.missing:
        if len(each.missing) > MAX_MISSING_SHARE * each.listed:
            raise BadData(
                f"{printable_name(each.file)} names {each.listed} images, and "
                f"{len(each.missing)} are not there; first {printable_name(each.missing[0])}",
                f"at most {MAX_MISSING_SHARE:.0%} missing",
                f"unpack the rest, or see: sbtk data check {printable_name(found.layout.root)}",
            )
