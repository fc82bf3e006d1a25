"""Sketches and photos from further sources, added to the training images.

They come from folders of class folders, from list files and from stroke files. A class map maps
their class names to those of the data set. They are only used for training: none is held out,
validated on or searched, and unseen classes are excluded, also by names that probably mean them.
"""

from __future__ import annotations

import re
import tomllib
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import TypeVar

import numpy as np

from sbtk_runtime.errors import BadConfig, BadData
from sbtk_runtime.files import count_text, printable_name
from sbtk_runtime.preprocess import Kind
from sbtk_train.data.class_names import (
    ClassNames,
    class_key,
    is_near,
    is_plural,
    read_imagenet_synsets,
    read_names,
    visible_text,
    without_addition,
)
from sbtk_train.data.dataset import describe_ignored
from sbtk_train.data.image_set import ImageSet, ImageSource, Rows, find_existing, scan
from sbtk_train.data.splits import Division, LookAlike, Split, describe_look_alike, join_names
from sbtk_train.data.strokes import read_stroke_file

STROKE_SUFFIX, LIST_SUFFIX = ".npz", ".txt"

#: The label after a path on a list.
_LABEL = re.compile(r"\s+\d{1,9}$")

_Source = TypeVar("_Source", bound=ImageSource)


@dataclass(frozen=True)
class ClassMap:
    """Maps class names of further sources to those of the data set.

    Attributes:
        name: name of the map, for messages.
        classes: class names by source class, in any spelling; an empty name excludes the source
            class. Source classes that are not in the map keep their names.
        imagenet: WordNet ids of similar ImageNet classes, from which the soft labels of classes
            without photos are made.
    """

    name: str = ""
    classes: dict[str, str] = field(default_factory=dict)
    imagenet: dict[str, tuple[str, ...]] = field(default_factory=dict)


def list_class_maps() -> list[str]:
    """Return the names of the included class maps."""
    return sorted(Path(entry.name).stem for entry in _maps().iterdir() if ".toml" in entry.name)


def is_bundled(name_or_file: str) -> bool:
    """Return whether the name is that of an included class map, not a file."""
    return name_or_file in list_class_maps()


def open_class_map(name_or_file: str) -> ClassMap:
    """Return an included class map, or that of a TOML file; an empty map for an empty name.

    Raises:
        BadConfig: there is no such map, or the file has anything but a table `classes` of names and
            a table `imagenet` of lists of ids of ImageNet's thousand classes, or two values for
            spellings of one class.
    """
    if not name_or_file:
        return ClassMap()
    is_own = not is_bundled(name_or_file)
    source = Path(name_or_file) if is_own else _maps().joinpath(f"{name_or_file}.toml")
    try:
        tables = tomllib.loads(source.read_text("utf-8-sig"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as problem:
        raise BadConfig(
            f"the class map {name_or_file} cannot be read: {problem}",
            f"{', '.join(list_class_maps())}, or a TOML file",
        ) from problem
    unknown = sorted(set(tables) - {"classes", "imagenet"})
    classes, imagenet = tables.get("classes", {}), tables.get("imagenet", {})
    if unknown or not (isinstance(classes, dict) and isinstance(imagenet, dict)):
        found = f"an unknown {unknown[0]!r}" if unknown else "a value instead of a table"
        raise BadConfig(
            f"the class map {name_or_file} has {found}", "the tables [classes] and [imagenet]"
        )
    wrong = [key for key, value in classes.items() if not isinstance(value, str)]
    wrong += [
        key
        for key, ids in imagenet.items()
        if not (isinstance(ids, list) and ids and all(isinstance(each, str) for each in ids))
    ]
    if wrong:
        raise BadConfig(
            f"the class map {name_or_file} gives {wrong[0]!r} a value of the wrong type",
            "a class name; in [imagenet] a list of WordNet ids",
        )
    known = set(read_imagenet_synsets())
    for name, ids in imagenet.items():
        if strange := [each for each in ids if each not in known]:
            raise BadConfig(
                f"the class map {name_or_file} gives {name!r} the ImageNet class {strange[0]!r}",
                "a WordNet id of ImageNet-1k, such as n02701002",
            )
    for table in (classes, imagenet):
        keys: dict[str, str] = {}
        for name, value in table.items():
            if table[first := keys.setdefault(class_key(name), name)] != value:
                raise BadConfig(
                    f"the class map {name_or_file} gives {first!r} and {name!r}, spellings of one "
                    "class, different values",
                    "one entry for each class",
                )
    return ClassMap(
        name_or_file, dict(classes), {key: tuple(value) for key, value in imagenet.items()}
    )


@dataclass(frozen=True)
class MoreImages:
    """Images of further sources, by their class names there."""

    sketches: dict[str, tuple[ImageSource, ...]]
    photos: dict[str, tuple[Path, ...]]
    notices: tuple[str, ...] = ()

    def without(self, images: Collection[ImageSource]) -> MoreImages:
        """Return the other images."""
        return replace(
            self, sketches=_others(self.sketches, images), photos=_others(self.photos, images)
        )


def read_more(sketches: Sequence[Path], photos: Sequence[Path]) -> MoreImages:
    """Return the images of further sources.

    Args:
        sketches: stroke files (`.npz`), list files (`.txt`) and folders of class folders.
        photos: list files and folders of class folders.

    Raises:
        BadConfig: a list file is not text.
        BadData: a source does not exist, has no images in class folders, or is a damaged stroke
            file.
    """
    notices: list[str] = []
    found_sketches: dict[str, list[ImageSource]] = defaultdict(list)
    found_photos: dict[str, list[Path]] = defaultdict(list)
    for source in sketches:
        if source.suffix.lower() == STROKE_SUFFIX:
            strokes = read_stroke_file(source)
            for name, drawing in zip(strokes.name_of, strokes.drawings, strict=True):
                found_sketches[name].append(drawing)
            if strokes.empty:
                empty = count_text(strokes.empty, "empty drawing")
                notices.append(f"left out {empty} of {printable_name(source)}")
            continue
        for name, path in _read_files(source, "sketch", notices):
            found_sketches[name].append(path)
    for source in photos:
        for name, path in _read_files(source, "photo", notices):
            found_photos[name].append(path)
    return MoreImages(
        {name: tuple(images) for name, images in found_sketches.items()},
        {name: tuple(images) for name, images in found_photos.items()},
        tuple(notices),
    )


def append_images(division: Division, split: Split, more: MoreImages, names: ClassMap) -> Division:
    """Return the division with further training images.

    Further classes follow the data set's, in alphabetical order. They need photos, or sketches and
    ImageNet classes to make soft labels from. Spellings of a name are one class.

    Args:
        division: the data set's division.
        split: the unseen classes.
        more: the further images.
        names: maps their class names.

    Raises:
        BadData: a user's class map would train on an unseen class.
    """
    training = division.training
    own, validation = ClassNames(training.classes), ClassNames(division.validation.classes)
    listed = ClassNames((*training.classes, *split.seen))
    left_out: dict[str, list[str]] = defaultdict(list)
    new_sketches: dict[str, list[ImageSource]] = defaultdict(list)
    new_photos: dict[str, list[Path]] = defaultdict(list)
    mapped = ClassNames(names.classes, renames=False)
    stand_ins = ClassNames(names.imagenet, renames=False)
    spelling: dict[str, str] = {}
    used, unmapped = set(), set()
    is_included = is_bundled(names.name)
    for name in sorted(set(more.sketches) | set(more.photos)):
        entry = name if name in names.classes else mapped.find(name)
        target = name if entry is None else names.classes[entry].strip()
        used.add(entry)
        unseen = next((each for each in (target, name) if each and split.is_unseen(each)), None)
        if target not in listed:
            unseen = unseen or _find_alike(target, split.unseen)
        if name not in listed:
            unseen = unseen or next((each for each in split.unseen if is_plural(name, each)), None)
        # The included maps are for any split.
        if unseen is not None and target and entry is not None and not is_included:
            raise BadData(
                f"the class map {names.name} trains on {name!r} as {target!r}, and "
                f"{split.name} keeps {unseen!r} unseen",
                "seen classes only",
                f'leave it out: "{name}" = ""',
            )
        if not target:
            left_out["that the class map leaves out"].append(name)
        elif unseen is not None:
            left_out[f"that {split.name} keeps unseen"].append(name)
        elif target in validation or (
            target not in listed and _find_alike(target, division.validation.classes)
        ):
            left_out["kept for validation"].append(name)
        else:
            known = own.find(target) or stand_ins.find(target)
            known = known or spelling.setdefault(class_key(target), target)
            if entry is None:
                unmapped.add(known)
            new_sketches[known] += more.sketches.get(name, ())
            new_photos[known] += more.photos.get(name, ())
    sketched = {name for name, images in new_sketches.items() if images}
    usable = {name for name, images in new_photos.items() if images}
    usable |= {name for name in sketched if name in own or name in names.imagenet}
    no_use = sorted(sketched - usable)
    if no_use:
        left_out["without photos or ImageNet classes for their soft labels"] = no_use
    further = tuple(sorted(usable - set(training.classes)))
    classes = (*training.classes, *further)
    sketches, sketch_labels = _append(
        training.sketches, training.sketch_labels, new_sketches, classes
    )
    photos, photo_labels = _append(training.photos, training.photo_labels, new_photos, classes)
    added = len(sketches) - len(training.sketches), len(photos) - len(training.photos)
    unlisted = [name for name in further if name in unmapped and name not in listed]
    notices = [
        *_describe_look_alikes(unlisted, split, training.classes),
        f"further images: {added[0]:,} sketches and {added[1]:,} photos, "
        f"{len(further)} further classes",
        *(
            f"left out {len(each)} class{'' if len(each) == 1 else 'es'} {why}: {join_names(each)}"
            for why, each in left_out.items()
        ),
        *_describe_unused(names, used),
    ]
    whole = ImageSet(
        classes,
        sketches,
        sketch_labels,
        photos,
        photo_labels,
        training.listings,
        training.notices,
        further_classes=len(further),
    )
    return replace(division, training=whole, notices=(*division.notices, *more.notices, *notices))


def _describe_look_alikes(
    names: Sequence[str], split: Split, classes: Sequence[str]
) -> Iterator[str]:
    """Yield sentences on further classes that may be an unseen class, or another one."""
    for place, name in enumerate(names):
        for unseen in split.unseen:
            if is_near(name, unseen):
                yield describe_look_alike(LookAlike(name, unseen))
        if other := _find_alike(name, (*classes, *names[:place])):
            yield f"{name!r} and {other!r} are two classes; --class-map can make them one"


def _describe_unused(names: ClassMap, used: Collection[str | None]) -> Iterator[str]:
    """Yield a sentence on names of a user's class map that no source has, such as misspelt ones."""
    unused = sorted(set(names.classes) - set(used))
    # The included maps name the classes of several sources.
    if unused and not is_bundled(names.name):
        count = f"{len(unused)} of {len(names.classes)} classes of the class map"
        yield f"{count} are in no source: {join_names(unused)}"


def _read_files(source: Path, kind: Kind, notices: list[str]) -> list[tuple[str, Path]]:
    """Return the class name and the path of each image in a folder or on a list."""
    shown = printable_name(source)
    if source.suffix.lower() == LIST_SUFFIX:
        return _read_list(source, notices)
    if not source.is_dir():
        raise BadData(
            f"{shown} is not a folder",
            f"a folder of class folders, a list of images ({LIST_SUFFIX}), "
            f"or for sketches a {STROKE_SUFFIX} file",
        )
    images = scan([source])
    if not images.paths:
        deeper = [printable_name(folder.parent) for folder, _ in images.ignored.nested]
        raise BadData(
            f"{shown} has no images in class folders",
            "a folder of class folders",
            f"name {deeper[0]}" if deeper else "",
        )
    notices += [f"{shown}: {each}" for each in describe_ignored(kind, images.ignored)]
    if bare := sorted(set(images.names) - set(images.name_of)):
        notices.append(f"{shown}: class folders without an image: {join_names(bare)}")
    return [*zip(images.name_of, images.paths, strict=True)]


def _read_list(file: Path, notices: list[str]) -> list[tuple[str, Path]]:
    """Return the images on a list, whose folders name their classes.

    A line is a path, with or without a label. It is relative to the list's folder or, as in the
    published lists, to the one above.
    """
    shown = printable_name(file)
    listed = [Path(_LABEL.sub("", line)) for line in read_names(file, "the list of images")]
    for root in (file.parent, file.parent.parent):
        paths = [root / path for path in listed]
        existing = find_existing(paths)
        if existing:
            break
    missing = [path for path in paths if path not in existing]
    if len(missing) == len(paths):
        raise BadData(
            f"none of the {count_text(len(paths), 'image')} on {shown} exists",
            "lines of <class>/<image>, relative to the list's folder or to the one above",
        )
    if missing:
        notices.append(
            f"{shown}: {len(missing)} of {count_text(len(paths), 'image')} missing; "
            f"first {printable_name(missing[0])}"
        )
    return [(path.parent.name, path) for path in paths if path in existing]


def _find_alike(name: str, classes: Sequence[str]) -> str | None:
    """Return the class whose plural or singular the name is, whatever is in brackets after it."""
    plain = without_addition(visible_text(name))
    return next((each for each in classes if is_plural(plain, without_addition(each))), None)


def _others(
    found: Mapping[str, tuple[_Source, ...]], images: Collection[ImageSource]
) -> dict[str, tuple[_Source, ...]]:
    return {
        name: tuple(each for each in sources if each not in images)
        for name, sources in found.items()
    }


def _append(
    images: Sequence[_Source],
    labels: Rows,
    more: Mapping[str, Sequence[_Source]],
    classes: tuple[str, ...],
) -> tuple[tuple[_Source, ...], Rows]:
    label_of = {name: label for label, name in enumerate(classes)}
    added = [(label_of[name], image) for name in classes for image in more.get(name, ())]
    return (
        (*images, *(image for _, image in added)),
        np.concatenate([labels, np.array([label for label, _ in added], dtype=np.int64)]),
    )


def _maps() -> Traversable:
    return resources.files("sbtk_train.data").joinpath("class_maps")
