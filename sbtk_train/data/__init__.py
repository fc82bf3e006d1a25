"""Data sets on disk and their division for zero-shot training.

`layouts` finds the images, `dataset` combines them, and `splits` divides them into training,
held-out and validation images.
"""

from __future__ import annotations

from pathlib import Path

from sbtk_runtime.errors import BadData
from sbtk_runtime.files import printable_name
from sbtk_train.data.dataset import open_dataset
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

#: Largest share of missing images in a list file; if more are missing, something was not unpacked.
MAX_MISSING_SHARE = 0.05


def read_dataset(root: Path, *, keep_duplicates: bool = False) -> ImageSet:
    """Return every sketch and photo of the data set in `root`; see `sbtk_train.data.layouts`.

    Args:
        root: the data set's folder, or a folder with nothing else in it.
        keep_duplicates: use photos that are in two of Sketchy Ext's folders twice, as published
            galleries do.

    Raises:
        BadData: no layout is recognised, a list file is damaged, or many of its images are missing.
    """
    found = open_dataset(root, keep_duplicates=keep_duplicates)
    for each in found.missing:
        if len(each.missing) > MAX_MISSING_SHARE * each.listed:
            raise BadData(
                f"{printable_name(each.file)} lists {each.listed} images, of which "
                f"{len(each.missing)} are missing; first {printable_name(each.missing[0])}",
                f"at most {MAX_MISSING_SHARE:.0%} missing",
                f"unpack the rest, or see: sbtk data check {printable_name(found.layout.root)}",
            )
    return found.images
