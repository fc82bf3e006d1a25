"""The division of a data set for zero-shot work.

Unseen classes are set aside before anything else looks at the data, so no later step can use them
by mistake: `Division` is the only thing that training code is handed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from sbtk_runtime.errors import BadData
from sbtk_train.data.class_match import match_classes, match_notices, named, refuse_look_alikes
from sbtk_train.data.class_names import ClassNames
from sbtk_train.data.export_needs import export_problem
from sbtk_train.data.image_set import ImageSet, Listing, of_classes, with_sketches
from sbtk_train.data.splits import Split

MIN_TRAINING_CLASSES = 3
#: Seen classes that are kept for validation, where nothing else is asked for.
VALIDATION_CLASSES = 10
#: Of a class: one sketch is held out, so a class with a single one could not be trained on.
MIN_SKETCHES = 2


@dataclass(frozen=True)
class Division:
    """A data set divided for training: nothing in here is of an unseen class.

    Attributes:
        training: what the student learns from.
        held_out: sketches of training classes that are kept from training; their photos are the
            training photos.
        validation: whole seen classes kept from training, for selection and early stopping.
        notices: sentences about what was left out.
    """

    training: ImageSet
    held_out: ImageSet
    validation: ImageSet
    notices: tuple[str, ...] = field(default=())


def divide(
    data: ImageSet,
    split: Split,
    *,
    seed: int,
    validation_classes: int = VALIDATION_CLASSES,
    held_out_share: float = 0.05,
    only_classes: Sequence[str] | None = None,
) -> Division:
    """Returns the data set divided into training, held-out and validation images.

    Where the data have list files of this very split, their held-out sketches are held out (50 a
    class of Sketchy Ext and 10 of TU-Berlin Ext in SAKE's lists); otherwise they are drawn.

    Args:
        data: the whole data set.
        split: the classes to keep unseen.
        seed: draws the validation classes and the held-out sketches; 0 by the project's rule.
        validation_classes: number of seen classes kept for validation.
        held_out_share: share of each training class's sketches that is held out, at least one.
        only_classes: if given, the classes to use; naming an unseen one is refused.

    Raises:
        BadData: an unseen class was asked for, a class looks like an unseen one by another name,
            or too few classes or sketches remain.
    """
    match = match_classes(data.classes, split)
    refuse_look_alikes(match)
    notices = [*data.notices, *match_notices(match)]
    if only_classes is not None:
        notices += _absent(data, only_classes)
        data = _only(data, split, only_classes)
    usable, left_out = _in_both_domains(data, split.seen_among(data.classes))
    rng = np.random.default_rng(seed)
    if len(usable) < validation_classes + MIN_TRAINING_CLASSES:
        raise BadData(
            f"{len(usable)} seen classes have both sketches and photos",
            f"at least {validation_classes + MIN_TRAINING_CLASSES}: "
            f"{validation_classes} for validation and {MIN_TRAINING_CLASSES} to train on",
            "add classes, lower --validation-classes, or do without: --validation-classes 0 "
            "--selection last",
        )
    chosen = sorted(rng.choice(len(usable), validation_classes, replace=False).tolist())
    validation = [usable[i] for i in chosen]
    training = of_classes(data, [name for name in usable if name not in set(validation)])
    listing = listing_of(data, split)
    kept, held = _held_out(training, held_out_share, rng, listing)
    if listing is not None and listing.training_sketches:
        left_out.append(f"held out are the {len(held)} sketches that {listing.name} keeps back")
    return Division(
        training=with_sketches(training, kept),
        held_out=with_sketches(training, held),
        validation=of_classes(data, validation),
        notices=(*notices, *left_out),
    )


def export_problem_of(division: Division) -> str:
    """What `sbtk export` will refuse about a run on this division; empty where it will not."""
    sketches = len(division.training.sketches) + len(division.held_out.sketches)
    return export_problem(sketches, len(division.training.photos))


def listing_of(data: ImageSet, split: Split) -> Listing | None:
    """Returns the data set's own lists for a split; `None` if they are for others."""
    return next((listing for listing in data.listings if split.is_of(listing.unseen)), None)


def _absent(data: ImageSet, classes: Sequence[str]) -> list[str]:
    """Returns a sentence on the listed classes that the data lack; none if they lack none."""
    here = ClassNames(data.classes, renames=False)
    absent = [name for name in classes if name not in here]
    count = f"{len(absent)} of {len(classes)} classes on the list to train on"
    return [f"{count} are not in the data: {named(absent)}"] if absent else []


def _only(data: ImageSet, split: Split, classes: Sequence[str]) -> ImageSet:
    mistaken = [name for name in classes if split.is_unseen(name)]
    if mistaken:
        raise BadData(
            f"the classes to train on include {', '.join(mistaken)}, unseen in {split.name}",
            "seen classes only",
            "take them off the list, or choose another split",
        )
    wanted = ClassNames(classes, renames=False)
    return of_classes(data, [name for name in data.classes if name in wanted])


def _in_both_domains(data: ImageSet, classes: Sequence[str]) -> tuple[list[str], list[str]]:
    sketches = np.bincount(data.sketch_labels, minlength=len(data.classes))
    photos = np.bincount(data.photo_labels, minlength=len(data.classes))
    usable, notices = [], []
    for name in classes:
        label = data.classes.index(name)
        if sketches[label] >= MIN_SKETCHES and photos[label] >= 1:
            usable.append(name)
        else:
            notices.append(
                f"class {name!r} left out: {sketches[label]} sketches and {photos[label]} photos "
                f"(at least {MIN_SKETCHES} and 1 are needed)"
            )
    return usable, notices


def _held_out(
    training: ImageSet, share: float, rng: np.random.Generator, listing: Listing | None
) -> tuple[list[int], list[int]]:
    """Returns the rows of sketches to train on, and of those to hold out, class by class."""
    kept: list[int] = []
    held: list[int] = []
    for label in range(len(training.classes)):
        rows = np.flatnonzero(training.sketch_labels == label).tolist()
        chosen = _kept_back(training, rows, listing)
        if not 0 < len(chosen) < len(rows):
            count = min(max(1, math.floor(share * len(rows))), len(rows) - 1)
            chosen = set(rng.choice(rows, count, replace=False).tolist())
        held += sorted(chosen)
        kept += [row for row in rows if row not in chosen]
    return kept, held


def _kept_back(training: ImageSet, rows: list[int], listing: Listing | None) -> set[int]:
    """Returns the sketches of one class that the lists do not train on; none without lists."""
    if listing is None or not listing.training_sketches:
        return set()
    return {row for row in rows if training.sketches[row] not in listing.training_sketches}
