"""Checks of a data set before training."""

from __future__ import annotations

import hashlib
import io
import mimetypes
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from sbtk_runtime.errors import BadData, BadImage
from sbtk_runtime.files import printable_name
from sbtk_runtime.images import FORMATS, read_image_bytes
from sbtk_runtime.preprocess import CROPPED, Kind
from sbtk_runtime.raw_photo import SUFFIXES as RAW_SUFFIXES
from sbtk_train.data.dataset import Dataset, describe_ignored
from sbtk_train.data.image_set import ImageSet, Rows
from sbtk_train.data.leakage import (
    Leakage,
    PublishedData,
    PublishedSplit,
    find_leakage,
    match_published_data,
)
from sbtk_train.data.splits import (
    MIN_SKETCHES,
    MIN_TRAINING_CLASSES,
    VALIDATION_CLASSES,
    ClassMatch,
    Split,
    describe_absent,
    divide,
    export_problem,
    find_export_problem,
    find_listing,
    join_names,
    match_classes,
    open_split,
    split_names,
)

_OTHER_IMAGES = frozenset({".psd", ".eps", ".ai", ".jp2", ".jxl", ".tga", ".pdf", ".heic", ".heif"})


@dataclass(frozen=True)
class PerClass:
    """Image counts over the classes with images; `deviation` is the population's."""

    total: int
    classes: int
    smallest: int
    mean: float
    deviation: float
    largest: int


@dataclass(frozen=True)
class SplitCheck:
    """The state of a split of the data.

    Attributes:
        name: name of the split.
        sha256: hash of its unseen classes.
        listing: the data set's own lists of this split, such as `zeroshot1`; empty without.
        match: its seen and unseen classes.
        training_sketches: number of sketches of seen classes, except those held out by the lists.
        held_out_sketches: number of sketches of seen classes held out by the lists.
        training_photos: number of photos of seen classes.
        queries: number of sketches of unseen classes.
        gallery: number of photos of unseen classes.
        leakage: classes and images on both sides.
        published: the published counts; `None` if there are none for these data.
        lacking: a sentence on the classes of a split file that the data lack; empty if they lack
            none, or missing classes are allowed.
        export: why `sbtk export` will refuse a run on it; empty if it will not.
    """

    name: str
    sha256: str
    listing: str
    match: ClassMatch
    training_sketches: int
    held_out_sketches: int
    training_photos: int
    queries: int
    gallery: int
    leakage: Leakage
    published: PublishedSplit | None
    lacking: str
    export: str


@dataclass(frozen=True)
class DataCheck:
    """The state of a data set.

    Attributes:
        dataset: the data set.
        sketches: counts per class.
        photos: counts per class.
        one_sided: classes without sketches or without photos.
        published: the published data set with these classes; `None` if there is none.
        splits: the requested split, or those of the data.
        images: the results of opening each image; `None` if that was skipped.
        keeps_duplicates: whether duplicate photos were counted twice.
        too_few: classes with fewer than two sketches or no photo, which training leaves out;
            includes `one_sided`.
        in_two_classes: images with the same bytes in two classes, one pair for each content.
    """

    dataset: Dataset
    sketches: PerClass
    photos: PerClass
    one_sided: tuple[str, ...]
    published: PublishedData | None
    splits: tuple[SplitCheck, ...]
    images: ImageCheck | None
    keeps_duplicates: bool
    too_few: tuple[str, ...]
    in_two_classes: tuple[tuple[str, str], ...]

    def problems(self) -> list[str]:
        """Return sentences on what prevents training on the data or on one of the splits."""
        of_splits = [problem for split in self.splits for problem in _problems(split)]
        return [*_problems_of_all(self), *of_splits]

    def notices(self) -> list[str]:
        """Return sentences on what training would leave out, and on doubtful labels."""
        ignored = self.dataset.ignored
        lines = [line for kind in ignored for line in describe_ignored(kind, ignored[kind])]
        lines += [f"{each.name}: {each.export}" for each in self.splits if each.export]
        # Without a split, too few images overall are also too few of the training classes.
        if not self.splits and (export := export_problem(self.sketches.total, self.photos.total)):
            lines.append(export)
        if self.too_few:
            lines.append(
                f"{len(self.too_few)} of {len(self.dataset.images.classes)} classes are left out "
                "of training, which needs two sketches and one photo in each: "
                + join_names(self.too_few)
            )
        lines += [
            f"{usable} {what} have two sketches and one photo; sbtk train needs "
            f"{VALIDATION_CLASSES + MIN_TRAINING_CLASSES} unless you lower --validation-classes "
            f"({VALIDATION_CLASSES} by default): {_fewer_to_validate_on(usable)}"
            for what, usable in _usable(self)
            if MIN_TRAINING_CLASSES <= usable < VALIDATION_CLASSES + MIN_TRAINING_CLASSES
        ]
        if self.in_two_classes:
            first = self.in_two_classes[0]
            lines.append(
                f"in two classes: {len(self.in_two_classes)} of the images, such as {first[0]} and "
                f"{first[1]}"
            )
        return lines

    def skipped(self) -> int:
        """Return the number of images that training would leave out."""
        missing = {path for each in self.dataset.missing for path in each.missing}
        ignored = self.dataset.ignored.values()
        return (
            len(missing)
            + (len(self.images.unreadable) if self.images else 0)
            + sum(count for each in ignored for _, count in each.nested)
            + sum(
                count
                for each in ignored
                for suffix, count in each.suffixes.items()
                if _is_image(suffix)
            )
        )

    def is_whole(self) -> bool:
        """Return whether training would use every image, each in one class."""
        return not (self.skipped() or self.too_few or self.in_two_classes)


def check_data(
    dataset: Dataset,
    splits: Sequence[Split],
    images: ImageCheck | None = None,
    *,
    keep_duplicates: bool = False,
    allow_missing: bool = False,
) -> DataCheck:
    """Return the state of a data set.

    Args:
        dataset: the data set.
        splits: the splits to check; see `find_splits`.
        images: the results of opening the images, if they were opened.
        keep_duplicates: whether the data set was opened with duplicates.
        allow_missing: whether a split file may name classes that the data lack.
    """
    data = dataset.images
    published = match_published_data(data.classes)
    sketches, photos = _counts(data, data.sketch_labels), _counts(data, data.photo_labels)
    sha256 = None if images is None else images.sha256
    return DataCheck(
        dataset,
        _per_class(sketches),
        _per_class(photos),
        tuple(
            name
            for name, drawn, taken in zip(data.classes, sketches, photos, strict=True)
            if not drawn or not taken
        ),
        published,
        tuple(
            _split_check(
                data,
                split,
                published,
                find_leakage(data, split, dataset.list_folders, sha256),
                allow_missing=allow_missing,
            )
            for split in splits
        ),
        images,
        keep_duplicates,
        tuple(
            name
            for name, drawn, taken in zip(data.classes, sketches, photos, strict=True)
            if drawn < MIN_SKETCHES or not taken
        ),
        () if sha256 is None else tuple(_in_two_classes(data, sha256)),
    )


def find_splits(dataset: Dataset, requested: str | None) -> list[Split]:
    """Return the requested split; without one, those of the data's lists and published ones.

    Raises:
        BadConfig: unknown split.
    """
    data = dataset.images
    if requested is not None:
        return [open_split(requested, data.classes)]
    known = [open_split(name) for name in split_names()]
    own = [
        next(
            (split for split in known if split.is_of(listing.unseen)),
            Split(listing.name, tuple(sorted(listing.unseen)), tuple(sorted(listing.seen))),
        )
        for listing in data.listings
    ]
    published = match_published_data(data.classes)
    listed = [] if published is None else [open_split(each.split) for each in published.splits]
    return list({split.sha256: split for split in (*own, *listed)}.values())


def _in_two_classes(data: ImageSet, sha256: Mapping[Path, bytes]) -> Iterator[tuple[str, str]]:
    """Yield a pair of images for each content that is in different classes."""
    first: dict[bytes, tuple[int, Path]] = {}
    yielded: set[bytes] = set()
    for paths, labels in (
        (data.sketch_files, data.sketch_labels),
        (data.photos, data.photo_labels),
    ):
        for path, label in zip(paths, labels.tolist(), strict=True):
            digest = sha256.get(path)
            if digest is None or digest in yielded:
                continue
            other, other_path = first.setdefault(digest, (label, path))
            if other != label:
                yielded.add(digest)
                yield str(other_path), str(path)


def _is_image(suffix: str) -> bool:
    """Return whether files with a suffix, which sbtk does not read, are images."""
    kind = mimetypes.guess_type(f"x{suffix}")[0] or ""
    return kind.startswith("image/") or suffix in RAW_SUFFIXES or suffix in _OTHER_IMAGES


def _problems_of_all(check: DataCheck) -> list[str]:
    problems = []
    data = check.dataset.images
    for kind, count, ignored in (
        ("sketch", len(data.sketches), check.dataset.ignored["sketch"]),
        ("photo", len(data.photos), check.dataset.ignored["photo"]),
    ):
        if not count:
            problems.append(f"there are no {kind} images in the class folders")
        empty_above = sorted({folder.parent for folder, _ in ignored.nested} - _folders_of(data))
        if count and empty_above:
            folders = join_names([printable_name(folder) for folder in empty_above])
            problems.append(
                f"the {kind} images of {len(empty_above)} of the class folders are in subfolders; "
                f"move them up: {folders}"
            )
    problems += [
        f"{usable} {what} have two sketches and one photo; training needs "
        f"{MIN_TRAINING_CLASSES}, and by default {VALIDATION_CLASSES} more for validation"
        for what, usable in _usable(check)
        if usable < MIN_TRAINING_CLASSES
    ]
    return problems


def _usable(check: DataCheck) -> list[tuple[str, int]]:
    """Return the number of classes to train on, for each split, or for all data without a split.

    The list is empty if a domain has no images, which is reported separately.
    """
    data, few = check.dataset.images, set(check.too_few)
    if not (data.sketches and data.photos):
        return []
    sides = [(f"seen classes of {split.name}", split.match.seen) for split in check.splits]
    return [(what, len(set(names) - few)) for what, names in sides or [("classes", data.classes)]]


def _fewer_to_validate_on(usable: int) -> str:
    """Return the options with which `sbtk train` accepts that number of classes."""
    spare = usable - MIN_TRAINING_CLASSES
    return "--validation-classes " + (f"{spare} or fewer" if spare else "0 --selection last")


def _folders_of(data: ImageSet) -> set[Path]:
    return {path.parent for path in (*data.sketch_files, *data.photos)}


def _counts(data: ImageSet, labels: Rows) -> Rows:
    return np.bincount(labels, minlength=len(data.classes)).astype(np.int64)


def _per_class(counts: Rows) -> PerClass:
    some = counts[counts > 0]
    if not len(some):
        return PerClass(0, 0, 0, 0.0, 0.0, 0)
    return PerClass(
        int(some.sum()),
        len(some),
        int(some.min()),
        float(some.mean()),
        float(some.std()),
        int(some.max()),
    )


def _split_check(
    data: ImageSet,
    split: Split,
    published: PublishedData | None,
    leakage: Leakage,
    *,
    allow_missing: bool,
) -> SplitCheck:
    is_unseen = np.array([split.is_unseen(name) for name in data.classes], dtype=np.bool_)
    listing = find_listing(data, split)
    seen_rows = np.flatnonzero(~is_unseen[data.sketch_labels])
    listed = frozenset() if listing is None else listing.training_sketches
    held_out = sum(data.sketches[row] not in listed for row in seen_rows) if listed else 0
    match = match_classes(data.classes, split)
    lacking = ""
    if split.is_file and match.absent and not allow_missing:
        lacking = describe_absent(match.absent, split.unseen, data.classes, split.name)
    unseen_photos = int(is_unseen[data.photo_labels].sum())
    return SplitCheck(
        split.name,
        split.sha256,
        "" if listing is None else listing.name,
        match,
        len(seen_rows) - held_out,
        held_out,
        len(data.photos) - unseen_photos,
        len(data.sketches) - len(seen_rows),
        unseen_photos,
        leakage,
        next((each for each in published.splits if each.split == split.name), None)
        if published
        else None,
        lacking,
        _export_problem(data, split),
    )


def _export_problem(data: ImageSet, split: Split) -> str:
    try:
        return find_export_problem(divide(data, split, seed=0))
    except BadData:  # too few classes to divide by default
        is_seen = np.array([not split.is_unseen(name) for name in data.classes], dtype=np.bool_)
        sketches, photos = is_seen[data.sketch_labels], is_seen[data.photo_labels]
        return export_problem(int(sketches.sum()), int(photos.sum()))


def _problems(split: SplitCheck) -> list[str]:
    problems = []
    if split.lacking:
        problems.append(split.lacking)
    elif not split.match.unseen:
        problems.append(
            f"the data have none of the {len(split.match.absent)} unseen classes of {split.name}"
        )
    problems += [
        f"{alike.name!r} counts as seen in {split.name} and looks like the unseen {alike.unseen!r}"
        for alike in split.match.look_alikes
    ]
    leakage = split.leakage
    problems += [
        f"{what} on both sides of {split.name}: {leaks[0].seen} and {leaks[0].unseen}"
        + (f", and {len(leaks) - 1} more" if len(leaks) > 1 else "")
        for what, leaks in (
            ("the same class is", leakage.classes),
            ("the same ImageNet photo is", leakage.photo_ids),
            ("the same bytes are", leakage.contents or ()),
        )
        if leaks
    ]
    return problems


# Small, so that JPEGs are decoded at an eighth of their size.
_SIZE_PX = 32
_CHUNK = 256


@dataclass(frozen=True)
class ImageCheck:
    """The results of opening the images.

    Attributes:
        unreadable: images that cannot be used, including empty sketches, and the reasons.
        sizes: number of readable images by kind, width and height in pixels.
        modes: number of readable images by kind and Pillow mode, such as `RGB` or `L`.
        sha256: hash of each readable file.
    """

    unreadable: tuple[tuple[Path, str], ...]
    sizes: Counter[tuple[Kind, int, int]]
    modes: Counter[tuple[Kind, str]]
    sha256: dict[Path, bytes]


@dataclass(frozen=True)
class _OpenedImage:
    path: Path
    kind: Kind
    reason: str
    width: int = 0
    height: int = 0
    mode: str = ""
    sha256: bytes = b""


def check_images(
    data: ImageSet, *, threads: int, advance: Callable[[int, int | None], None]
) -> ImageCheck:
    """Decode every image as training would, in a pool of threads, and return the results.

    Args:
        data: the images; duplicates are opened once.
        threads: number of threads.
        advance: called with the number done and the total.
    """
    unreadable: list[tuple[Path, str]] = []
    sizes: Counter[tuple[Kind, int, int]] = Counter()
    modes: Counter[tuple[Kind, str]] = Counter()
    digests: dict[Path, bytes] = {}
    total = len(set(data.sketches)) + len(set(data.photos))
    for done, opened in enumerate(_open_images(data, threads), 1):
        if opened.reason:
            unreadable.append((opened.path, opened.reason))
        else:
            sizes[opened.kind, opened.width, opened.height] += 1
            modes[opened.kind, opened.mode] += 1
            digests[opened.path] = opened.sha256
        advance(done, total)
    return ImageCheck(tuple(unreadable), sizes, modes, digests)


def _open_images(data: ImageSet, threads: int) -> Iterator[_OpenedImage]:
    kinds: tuple[tuple[Kind, tuple[Path, ...]], ...] = (
        ("sketch", data.sketch_files),
        ("photo", data.photos),
    )
    with ThreadPoolExecutor(threads, thread_name_prefix="check") as pool:
        for kind, given in kinds:
            paths = list(dict.fromkeys(given))
            # In chunks, since creating half a million futures is slow.
            for start in range(0, len(paths), _CHUNK):
                chunk = paths[start : start + _CHUNK]
                yield from pool.map(_open_image, chunk, [kind] * len(chunk))


def _open_image(path: Path, kind: Kind) -> _OpenedImage:
    try:
        data = read_image_bytes(path)
        # What can be read does not depend on the preprocessing.
        CROPPED.prepare(data, kind, _SIZE_PX)
    except BadImage as problem:
        return _OpenedImage(path, kind, problem.found)
    # The image has been decoded, so its header is safe to read again.
    formats = [*FORMATS, *({"HEIF"} & set(Image.OPEN))]
    with Image.open(io.BytesIO(data), formats=formats) as image:
        width, height = image.size
        mode = image.mode
    return _OpenedImage(path, kind, "", width, height, mode, hashlib.sha256(data).digest())
