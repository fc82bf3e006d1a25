"""A data set on disk: its layout, its images, and missing, duplicate and ignored files."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sbtk_runtime.errors import BadData
from sbtk_runtime.files import printable_name
from sbtk_runtime.preprocess import Kind
from sbtk_train.data.image_set import (
    Ignored,
    ImageSet,
    Listing,
    NamedImages,
    Rows,
    find_existing,
    match_names,
    scan,
)
from sbtk_train.data.layouts import PARTS, Layout, ListFolder, read_list_folder, recognise
from sbtk_train.data.splits import join_names

#: Largest share of missing images in a list file; if more are missing, something was not unpacked.
MAX_MISSING_SHARE = 0.05


@dataclass(frozen=True)
class MissingImages:
    """The missing images of a list file."""

    file: Path
    listed: int
    missing: tuple[Path, ...]


@dataclass(frozen=True)
class Dataset:
    """The contents of a data set's folder.

    Attributes:
        layout: where the images are.
        images: the existing images, by class; then in the lists' order, or by name.
        list_folders: the data set's own lists.
        missing: images on its lists that do not exist.
        duplicates: number of duplicate photos, whether or not they were kept.
        renamed: names in folders or lists that were merged into another class name, and that name.
        ignored: contents of the class folders that training does not read, by kind of image.
    """

    layout: Layout
    images: ImageSet
    list_folders: tuple[ListFolder, ...]
    missing: tuple[MissingImages, ...]
    duplicates: int
    renamed: tuple[tuple[str, str], ...]
    ignored: dict[Kind, Ignored]


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


def open_dataset(root: Path, *, keep_duplicates: bool = False) -> Dataset:
    """Return the data set in `root`, of any layout.

    Missing images on its lists are left out and reported.

    Args:
        root: the data set's folder, or a folder with nothing else in it.
        keep_duplicates: use photos that are in two of Sketchy Ext's folders twice.

    Raises:
        BadData: no layout is recognised, or a list file is damaged.
    """
    layout = recognise(root)
    read = (read_list_folder(folder, layout.root) for folder in layout.list_folders)
    lists = tuple(folder for folder in read if folder is not None)
    sketches = _list_images("sketch", layout.sketch_folders, lists)
    photos = _list_images("photo", layout.photo_folders, lists)
    missing = _missing(lists)
    absent = {path for each in missing for path in each.missing}
    class_of = match_names(sketches.names, photos.names)
    classes = tuple(sorted(set(class_of.values())))
    if not classes:
        raise BadData(f"{printable_name(root)} has no class folders", layout.title)
    sketch_paths, sketch_labels = _rows(sketches, class_of, classes, absent)
    photo_paths, photo_labels = _rows(photos, class_of, classes, absent)
    unique = _unique(layout, photo_paths, photo_labels)
    duplicates = len(photo_paths) - len(unique)
    if duplicates and not keep_duplicates:
        photo_paths = tuple(photo_paths[row] for row in unique)
        photo_labels = photo_labels[unique]
    renamed = tuple(sorted((name, to) for name, to in class_of.items() if name != to))
    ignored: dict[Kind, Ignored] = {"sketch": sketches.ignored, "photo": photos.ignored}
    notices = [
        *_notices(missing, 0 if keep_duplicates else duplicates, renamed),
        *(line for kind in ignored for line in describe_ignored(kind, ignored[kind])),
    ]
    images = ImageSet(
        classes,
        sketch_paths,
        sketch_labels,
        photo_paths,
        photo_labels,
        _listings(layout, lists),
        tuple(notices),
    )
    return Dataset(layout, images, lists, missing, duplicates, renamed, ignored)


def describe_ignored(kind: Kind, ignored: Ignored) -> list[str]:
    """Return sentences on contents of a kind's class folders that training does not read."""
    lines = []
    if ignored.suffixes:
        count = sum(ignored.suffixes.values())
        counted = sorted(ignored.suffixes.items(), key=lambda item: (-item[1], item[0]))
        named_suffixes = [f"{number} {suffix or 'without a suffix'}" for suffix, number in counted]
        plural = "s" if count > 1 else ""
        lines.append(
            f"{count} file{plural} among the {kind} images not read: {join_names(named_suffixes)}"
        )
    if ignored.nested:
        count = sum(number for _, number in ignored.nested)
        first = printable_name(ignored.nested[0][0])
        lines.append(
            f"{count} {kind} images in folders below a class folder are not read; first in {first}"
        )
    lines += [
        f"{printable_name(folder)} is not a class and is not read" for folder in ignored.system
    ]
    return lines


def _list_images(kind: Kind, folders: tuple[Path, ...], lists: Sequence[ListFolder]) -> NamedImages:
    """Return the images of a kind: those on the lists, or all if no list names them all."""
    complete = [folder for folder in lists if folder.is_complete(kind)]
    if not complete:
        return scan(folders)
    # An image is on the lists of every split; its position is that on the first list.
    name_of: dict[Path, str] = {}
    for folder in complete:
        for part in PARTS:
            if listed := folder.lists.get((kind, part)):
                for path, name in zip(listed.paths, listed.name_of, strict=True):
                    name_of.setdefault(path, name)
    names = {name for folder in complete for name in (*folder.seen, *folder.unseen)}
    return NamedImages(tuple(sorted(names)), tuple(name_of), tuple(name_of.values()))


def _missing(lists: Sequence[ListFolder]) -> tuple[MissingImages, ...]:
    files = [listed for folder in lists for listed in folder.lists.values()]
    existing = find_existing({path for listed in files for path in listed.paths})
    found = []
    for listed in files:
        missing = tuple(path for path in listed.paths if path not in existing)
        if missing:
            found.append(MissingImages(listed.file, len(listed.paths), missing))
    return tuple(found)


def _rows(
    images: NamedImages, class_of: dict[str, str], classes: tuple[str, ...], absent: set[Path]
) -> tuple[tuple[Path, ...], Rows]:
    """Return the images that exist, class by class, and `(N,) int64` labels."""
    label_of = {name: number for number, name in enumerate(classes)}
    labelled = [
        (label_of[class_of[name]], path)
        for path, name in zip(images.paths, images.name_of, strict=True)
        if path not in absent
    ]
    labelled.sort(key=lambda row: row[0])
    labels = np.array([label for label, _ in labelled], dtype=np.int64)
    return tuple(path for _, path in labelled), labels


def _unique(layout: Layout, paths: tuple[Path, ...], labels: Rows) -> list[int]:
    """Return the rows of the photos without the second copies."""
    if len(layout.photo_folders) < 2 or layout.own_parts:
        return list(range(len(paths)))
    return find_unique(paths, labels.tolist(), layout.photo_folders)


def _listings(layout: Layout, lists: Sequence[ListFolder]) -> tuple[Listing, ...]:
    if len(layout.own_parts) == 2:
        seen, unseen = (
            tuple(sorted(set(scan([part / "sketch"]).names) | set(scan([part / "photo"]).names)))
            for part in layout.own_parts
        )
        return (Listing("train and val", seen, unseen),)
    return tuple(
        Listing(folder.name, folder.seen, folder.unseen, folder.training_sketches())
        for folder in lists
        if folder.unseen
    )


def _notices(
    missing: Sequence[MissingImages], dropped: int, renamed: tuple[tuple[str, str], ...]
) -> list[str]:
    notices = [
        f"left out {len(each.missing)} missing images listed in {printable_name(each.file.name)}; "
        f"first {printable_name(each.missing[0])}"
        for each in missing
    ]
    if renamed:
        pairs = [f"{name} is {to}" for name, to in renamed]
        notices.append(f"merged class names: {join_names(pairs)}")
    if dropped:
        notices.append(f"left out {dropped} duplicate photos")
    return notices


def find_unique(
    paths: Sequence[Path], class_of: Sequence[Hashable], folders: Sequence[Path]
) -> list[int]:
    """Return the rows of the photos that are not second copies, in order.

    A photo is a copy if an earlier folder has a photo of the same class with the same file name or
    the same bytes, or if its path occurred before.

    Args:
        paths: the photos.
        class_of: the class of each.
        folders: folders of class folders, by priority.
    """
    rank_of_folder = {str(folder): rank for rank, folder in enumerate(folders)}
    rank_of = [rank_of_folder.get(str(path.parent.parent), len(folders)) for path in paths]
    # Within one folder, equal names prove nothing: merged class folders may number their files.
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
    """Return the later photos with the same bytes as a kept photo of their class."""
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
