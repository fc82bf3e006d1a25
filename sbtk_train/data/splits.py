"""Zero-shot splits: which classes are seen in training and which are kept unseen."""

from __future__ import annotations

import hashlib
import math
import re
import unicodedata
from collections.abc import Iterable, Sequence, Set
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np

from sbtk_runtime.errors import BadConfig, BadData
from sbtk_runtime.files import printable_name, printable_text
from sbtk_train.data.class_names import (
    ClassNames,
    class_key,
    is_near,
    is_plural,
    joined_key,
    published_key,
    read_names,
    read_published_splits,
    suggest_names,
)
from sbtk_train.data.image_set import (
    ImageSet,
    Listing,
    Rows,
    select_classes,
    select_images,
)

_RANDOM = re.compile(r"random:(\d{1,6}):(\d{1,9})")


@dataclass(frozen=True)
class Split:
    """A named list of unseen classes; every other class of a data set may be trained on.

    Attributes:
        name: as in `splits.json`, `random:N:SEED`, or the file's name.
        unseen: class names, sorted.
        seen: class names that the list's authors trained on, sorted; empty if they name none.
        is_file: whether the list is a user's file. Its names are compared without the renames of
            published data sets, and all of them should be in the data.
    """

    name: str
    unseen: tuple[str, ...]
    seen: tuple[str, ...] = ()
    is_file: bool = field(default=False, compare=False)

    @property
    def sha256(self) -> str:
        """A hash of the canonical unseen class names; equal for equal splits."""
        keys = sorted(class_key(name) for name in self.unseen)
        # Names of folders may hold bytes that are not UTF-8.
        return hashlib.sha256("\n".join(keys).encode("utf-8", "surrogateescape")).hexdigest()

    def is_unseen(self, class_name: str) -> bool:
        """Return whether the class is unseen, in any spelling of its name."""
        return class_name in self._unseen_names

    def seen_among(self, class_names: Iterable[str]) -> list[str]:
        """Return the class names that are seen, in their order."""
        return [name for name in class_names if not self.is_unseen(name)]

    def is_of(self, unseen: Iterable[str]) -> bool:
        """Return whether these are exactly the split's unseen classes."""
        key_of = class_key if self.is_file else published_key
        return {key_of(name) for name in unseen} == {key_of(name) for name in self.unseen}

    @cached_property
    def _unseen_names(self) -> ClassNames:
        return ClassNames(self.unseen, renames=not self.is_file)


def split_names() -> list[str]:
    """Return the names of the published splits."""
    return sorted(read_published_splits())


def open_split(name_or_file: str, classes: Sequence[str] | None = None) -> Split:
    """Return a published split, a random split, or the split of a file.

    Args:
        name_or_file: a published split's name; `random:N:SEED` for N of the data's classes (the
            first N of MT19937's permutation of the sorted names); or a file with one unseen class
            per line, such as SAKE's `cname_cid_zero.txt`, with its numbers.
        classes: the class names of the data. Random splits need them, and a file's numbers are
            part of its names if the data's names have them.

    Raises:
        BadConfig: unknown split; a file without classes or not in UTF-8; too many random classes.
    """
    published = read_published_splits()
    by_key = {name.casefold(): name for name in published}
    if name := by_key.get(name_or_file.casefold()):
        entry = published[name]
        return Split(name, tuple(sorted(entry["unseen"])), tuple(sorted(entry["seen"])))
    if name_or_file.startswith("random:") and not Path(name_or_file).exists():
        return _random_split(name_or_file, classes)
    path = Path(name_or_file)
    if not path.exists():
        raise BadConfig(
            f"no split named {name_or_file!r}, and no file of that name",
            f"one of {', '.join(split_names())}, random:N:SEED, or a text file with one unseen "
            "class a line",
        )
    lines = _without_ids(read_names(path, "the split file"), path, classes)
    unseen = {class_key(name): name for name in reversed(lines)}
    if not unseen:
        raise BadConfig(f"{printable_name(path)} names no class", "one unseen class a line")
    return Split(path.name, tuple(sorted(unseen.values())), is_file=True)


def _random_split(name: str, classes: Sequence[str] | None) -> Split:
    match = _RANDOM.fullmatch(name)
    if match is None:
        raise BadConfig(f"--split {name}", "random:N:SEED, such as random:25:0")
    count, seed = int(match[1]), int(match[2])
    if classes is None:
        raise BadConfig(
            f"the split {name} is drawn from the classes of the data, and no data are given",
            f"one of {', '.join(split_names())}, or a file",
        )
    if not 0 < count < len(classes):
        raise BadConfig(
            f"--split {name} of data with {len(classes)} classes",
            f"1 to {len(classes) - 1} unseen classes",
        )
    ordered = sorted(classes, key=_drawing_order)
    # This generator's stream never changes (NEP 19), so the name determines the classes.
    drawn = np.random.RandomState(seed).permutation(len(ordered))[:count]
    unseen = {ordered[row] for row in drawn.tolist()}
    seen = tuple(sorted(set(classes) - unseen))
    return Split(name, tuple(sorted(unseen)), seen)


def _drawing_order(name: str) -> tuple[str, str]:
    """Return the sort key of classes for random splits; it must never change."""
    folded = unicodedata.normalize("NFKC", name).casefold()
    letters = "".join(character for character in folded if character.isalnum())
    return joined_key(letters) or folded, class_key(name)


def _without_ids(lines: list[str], path: Path, classes: Sequence[str] | None) -> list[str]:
    """Return the lines without the ids after the names in `cname_cid` files.

    A number is part of the name (`shoe 0`) unless all lines have one, they count up from 0, and
    the data, if known, have no class of a name with its number.
    """
    matches = [re.fullmatch(r"(.+?)\s+(\d+)", line) for line in lines]
    names = [match[1] for match in matches if match is not None]
    ids = [int(match[2]) for match in matches if match is not None]
    is_counted = ids == list(range(len(lines))) and len({*map(class_key, names)}) == len(lines)
    if not is_counted:
        return lines
    if classes is not None:
        here = {class_key(name) for name in classes}
        if any(class_key(line) in here for line in lines):
            return lines
    is_list = len(lines) > 1 or path.name.startswith("cname_cid")
    return names if is_list else lines


MIN_TRAINING_CLASSES = 3
#: Default number of seen classes held out for validation.
VALIDATION_CLASSES = 10
#: Per class: one sketch to hold out, and at least one to train on.
MIN_SKETCHES = 2


@dataclass(frozen=True)
class Division:
    """A data set divided for training, without unseen classes.

    Attributes:
        training: images to train on.
        held_out: held-out sketches of training classes, with the training photos.
        validation: whole held-out seen classes, for selection and early stopping.
        notices: sentences about what was left out.
        held_out_photos: held-out photos of training classes, without sketches; `None` if no photos
            are held out.
    """

    training: ImageSet
    held_out: ImageSet
    validation: ImageSet
    notices: tuple[str, ...] = field(default=())
    held_out_photos: ImageSet | None = None


def divide(
    data: ImageSet,
    split: Split,
    *,
    seed: int,
    validation_classes: int = VALIDATION_CLASSES,
    held_out_share: float = 0.05,
    only_classes: Sequence[str] | None = None,
    is_holding_out_photos: bool = False,
) -> Division:
    """Divide a data set into training, held-out and validation images.

    If the data have list files of this split, their held-out sketches are held out (in SAKE's lists
    50 per class of Sketchy Ext and 10 of TU-Berlin Ext); otherwise held-out sketches are sampled.

    Args:
        data: the whole data set.
        split: the unseen classes.
        seed: samples the validation classes and the held-out sketches; 0 by the project's rule.
        validation_classes: number of seen classes to hold out for validation.
        held_out_share: share of each training class's sketches to hold out, at least one.
        only_classes: the classes to use; `None` for all.
        is_holding_out_photos: also hold out that share of each training class's photos, at least
            one of two or more.

    Raises:
        BadData: `only_classes` has an unseen class, a class seems to be an unseen one with another
            name, or there are too few classes or sketches.
    """
    match = match_classes(data.classes, split)
    refuse_look_alikes(match)
    notices = [*data.notices, *describe_matches(match)]
    if only_classes is not None:
        notices += _absent(data, only_classes)
        data = _only(data, split, only_classes)
    usable, left_out = _find_usable(data, split.seen_among(data.classes))
    rng = np.random.default_rng(seed)
    if len(usable) < validation_classes + MIN_TRAINING_CLASSES:
        raise BadData(
            f"{len(usable)} seen classes have both sketches and photos",
            f"at least {validation_classes + MIN_TRAINING_CLASSES}: "
            f"{validation_classes} for validation and {MIN_TRAINING_CLASSES} to train on",
            "add classes, lower --validation-classes, or train without validation: "
            "--validation-classes 0 --selection last",
        )
    chosen = sorted(rng.choice(len(usable), validation_classes, replace=False).tolist())
    validation = [usable[i] for i in chosen]
    training = select_classes(data, [name for name in usable if name not in set(validation)])
    listing = find_listing(data, split)
    listed = _find_listed(training, listing)
    kept, held = _draw_held_out(training.sketch_labels, held_out_share, rng, listed)
    if listing is not None and listing.training_sketches:
        left_out.append(f"held out {len(held)} sketches, as listed in {listing.name}")
    photos = None
    if is_holding_out_photos:
        kept_photos, held_photos = _draw_held_out(training.photo_labels, held_out_share, rng)
        photos = select_images(training, sketches=[], photos=held_photos)
        training = select_images(training, photos=kept_photos)
    return Division(
        training=select_images(training, sketches=kept),
        held_out=select_images(training, sketches=held),
        validation=select_classes(data, validation),
        notices=(*notices, *left_out),
        held_out_photos=photos,
    )


def find_export_problem(division: Division) -> str:
    """Return why `sbtk export` would refuse a run on this division; empty if it would not."""
    sketches = len(division.training.sketches) + len(division.held_out.sketches)
    return export_problem(sketches, len(division.training.photos))


def find_listing(data: ImageSet, split: Split) -> Listing | None:
    """Return the data set's own lists of a split; `None` if it has none."""
    return next((listing for listing in data.listings if split.is_of(listing.unseen)), None)


def _absent(data: ImageSet, classes: Sequence[str]) -> list[str]:
    """Return a sentence on the listed classes that the data lack, if any."""
    here = ClassNames(data.classes, renames=False)
    absent = [name for name in classes if name not in here]
    count = f"{len(absent)} of {len(classes)} classes on the list to train on"
    return [f"{count} are not in the data: {join_names(absent)}"] if absent else []


def _only(data: ImageSet, split: Split, classes: Sequence[str]) -> ImageSet:
    mistaken = [name for name in classes if split.is_unseen(name)]
    if mistaken:
        raise BadData(
            f"the classes to train on include {', '.join(mistaken)}, unseen in {split.name}",
            "seen classes only",
            "remove them from the list, or choose another split",
        )
    wanted = ClassNames(classes, renames=False)
    return select_classes(data, [name for name in data.classes if name in wanted])


def _find_usable(data: ImageSet, classes: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the classes with enough sketches and photos, and sentences on the others."""
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


def _draw_held_out(
    labels: Rows, share: float, rng: np.random.Generator, listed: Set[int] = frozenset()
) -> tuple[list[int], list[int]]:
    """Return the rows to train on and the rows to hold out, class by class.

    Rows in `listed` are held out; if these are none or all of a class, rows are sampled instead. A
    single image of a class is trained on.
    """
    kept: list[int] = []
    held: list[int] = []
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label).tolist()
        chosen = listed & set(rows)
        if not 0 < len(chosen) < len(rows):
            count = min(max(1, math.floor(share * len(rows))), len(rows) - 1)
            chosen = set(rng.choice(rows, count, replace=False).tolist())
        held += sorted(chosen)
        kept += [row for row in rows if row not in chosen]
    return kept, held


def _find_listed(training: ImageSet, listing: Listing | None) -> set[int]:
    """Return the rows of the sketches that the lists do not train on; none without lists."""
    if listing is None or not listing.training_sketches:
        return set()
    listed = listing.training_sketches
    return {row for row, sketch in enumerate(training.sketches) if sketch not in listed}


#: A split's lists are taken to be for the data if they have this share of the data's classes.
_OWN_SHARE = 0.9
_SUGGESTED_AT_MOST = 8


@dataclass(frozen=True)
class LookAlike:
    """A seen class, and the unseen class with a similar name."""

    name: str
    unseen: str


@dataclass(frozen=True)
class ClassMatch:
    """The class names of a data set, matched with a split.

    Attributes:
        split: the split's name.
        seen: the data's seen classes.
        unseen: the data's unseen classes.
        absent: the split's unseen classes that the data lack.
        unknown: the data's classes on neither of the split's lists; empty without a seen list.
        look_alikes: classes among `seen` that may be unseen ones in another spelling.
        is_own: whether, judging by class names, the split's lists were made for the data.
    """

    split: str
    seen: tuple[str, ...]
    unseen: tuple[str, ...]
    absent: tuple[str, ...]
    unknown: tuple[str, ...]
    look_alikes: tuple[LookAlike, ...]
    is_own: bool


def match_classes(classes: Sequence[str], split: Split) -> ClassMatch:
    """Match class names with the seen and unseen classes of a split."""
    here, listed = ClassNames(classes, renames=not split.is_file), ClassNames(split.seen)
    seen = split.seen_among(classes)
    absent = [name for name in split.unseen if name not in here]
    unlisted = [name for name in seen if name not in listed]
    alike = [
        LookAlike(name, unseen)
        for name in unlisted
        for unseen in split.unseen
        if (is_near if unseen in absent else is_plural)(name, unseen)
    ]
    return ClassMatch(
        split.name,
        tuple(seen),
        tuple(name for name in classes if split.is_unseen(name)),
        tuple(absent),
        tuple(unlisted) if split.seen else (),
        tuple(alike),
        bool(split.seen) and len(unlisted) <= (1 - _OWN_SHARE) * len(classes),
    )


def refuse_look_alikes(match: ClassMatch) -> None:
    """Check that no class to train on is probably an unseen one.

    Raises:
        BadData: the split was made for the data, and a class's name is similar to that of a missing
            unseen class.
    """
    if match.is_own and match.look_alikes:
        first = match.look_alikes[0]
        raise BadData(
            f"the class {first.name!r} would be trained on, but looks like {first.unseen!r}, "
            f"which is unseen in {match.split}",
            "class names as on the split's lists",
            f"rename the class's folder to {first.unseen!r}",
        )


def refuse_absent(
    listed: Sequence[str], classes: Sequence[str], name: str, *, renames: bool = False
) -> None:
    """Check that the data have all classes on a list; others are probably misspelt.

    Args:
        listed: class names.
        classes: the data's classes.
        name: name of the list.
        renames: whether to apply the documented renames of published data sets.

    Raises:
        BadData: names the missing classes, and the data's classes with the closest names.
    """
    here = ClassNames(classes, renames=renames)
    absent = [each for each in listed if each not in here]
    if absent:
        raise BadData(
            describe_absent(absent, listed, classes, name),
            "class names of the data",
            "correct the file, or accept a list with more classes by --allow-missing",
        )


def describe_absent(
    absent: Sequence[str], listed: Sequence[str], classes: Sequence[str], name: str
) -> str:
    """Return a sentence on the listed classes that the data lack, with similar class names."""
    close = [
        f"{each!r} (did you mean {' or '.join(map(repr, found))}?)"
        for each in absent[:_SUGGESTED_AT_MOST]
        if (found := suggest_names(each, classes))
    ]
    count = f"{len(absent)} of {len(listed)} classes in {name}"
    text = f"{count} are not in the data: {join_names(absent)}"
    return f"{text}; {', '.join(close)}" if close else text


def describe_matches(match: ClassMatch) -> list[str]:
    """Return sentences on mismatches; none if the data have all, or none, of the unseen classes."""
    notices = [describe_look_alike(alike) for alike in match.look_alikes]
    if match.unseen and match.absent:
        notices.append(
            f"{len(match.absent)} of {len(match.absent) + len(match.unseen)} unseen classes of "
            f"{match.split} are not in the data: {join_names(match.absent)}"
        )
    return notices


def describe_look_alike(alike: LookAlike) -> str:
    """Return a sentence on a class to train on that may be an unseen one."""
    return f"WARNING: {alike.name!r} is trained on; is it the unseen {alike.unseen!r}?"


def join_names(names: Sequence[str], most: int = 8) -> str:
    """Return the first names, on one line, and the number of other names as text."""
    rest = len(names) - most
    return ", ".join(map(printable_text, names[:most])) + (f" and {rest} more" if rest > 0 else "")


#: Most images of each kind to compare an export with torch.
PARITY_PER_KIND = 100
#: Fewest images of each kind to compare with torch; an export with fewer is refused.
MIN_PARITY_PER_KIND = 16
#: Most images of each kind to calibrate INT8 on.
CALIBRATION_PER_KIND = 150
#: Fewest images of each kind to calibrate INT8 on; an export to INT8 with fewer is refused.
MIN_CALIBRATION_PER_KIND = 16


def parity_share(per_kind: int, *, is_calibrating: bool = True) -> int:
    """Return the number of images of each kind to compare with torch; the others calibrate INT8.

    Args:
        per_kind: number of images of training classes, of the smaller kind.
        is_calibrating: whether to leave some for calibration.

    Returns:
        At most `PARITY_PER_KIND`; fewer than `MIN_PARITY_PER_KIND` if there are not enough.
    """
    reserved = MIN_CALIBRATION_PER_KIND if is_calibrating else 0
    return min(PARITY_PER_KIND, max(per_kind - reserved, min(per_kind, MIN_PARITY_PER_KIND)))


def export_problem(sketches: int, photos: int, *, is_calibrating: bool = True) -> str:
    """Return a sentence on why `sbtk export` would refuse; empty if it would not.

    Args:
        sketches: number of sketches of training classes, including held-out ones.
        photos: number of photos of training classes.
        is_calibrating: whether to export INT8, as by default.
    """
    needed = MIN_PARITY_PER_KIND + (MIN_CALIBRATION_PER_KIND if is_calibrating else 0)
    if min(sketches, photos) >= needed:
        return ""
    way_out = "add images, or export with those of other data: sbtk export RUN --images DATA"
    if is_calibrating and min(sketches, photos) >= MIN_PARITY_PER_KIND:
        way_out = f"export without INT8: sbtk export RUN --fp16; or {way_out}"
    return (
        f"sbtk export will refuse a model of these data: their training classes have {sketches:,} "
        f"sketches and {photos:,} photos, of which it needs {needed} each "
        f"({MIN_PARITY_PER_KIND} to compare with torch"
        + (f", {MIN_CALIBRATION_PER_KIND} to calibrate INT8 on" if is_calibrating else "")
        + f"); {way_out}"
    )
