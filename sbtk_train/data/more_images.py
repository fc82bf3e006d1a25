"""Sketches and photos from further sources, added to the training images.

They come from folders of class folders and from stroke files. A class map maps their class names to
those of the data set. They are only used for training: none is held out, validated on or searched,
and unseen classes are excluded.
"""

from __future__ import annotations

import tomllib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import TypeVar

import numpy as np

from sbtk_runtime.errors import BadConfig, BadData
from sbtk_runtime.files import printable_name
from sbtk_train.data.class_names import ClassNames
from sbtk_train.data.image_set import ImageSet, ImageSource, Rows, scan
from sbtk_train.data.splits import Division, Split, join_names
from sbtk_train.data.stroke_files import read_stroke_file

STROKE_SUFFIX = ".npz"

_Source = TypeVar("_Source", bound=ImageSource)


@dataclass(frozen=True)
class ClassMap:
    """Maps class names of further sources to those of the data set.

    Attributes:
        name: name of the map, for messages.
        classes: class names by source class; an empty name excludes the source class. Source
            classes that are not in the map keep their names.
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
            a table `imagenet` of lists of names.
    """
    if not name_or_file:
        return ClassMap()
    is_own = not is_bundled(name_or_file)
    source = Path(name_or_file) if is_own else _maps().joinpath(f"{name_or_file}.toml")
    try:
        tables = tomllib.loads(source.read_text("utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as problem:
        raise BadConfig(
            f"the class map {name_or_file} cannot be read: {problem}",
            f"{', '.join(list_class_maps())}, or a TOML file",
        ) from problem
    unknown = sorted(set(tables) - {"classes", "imagenet"})
    classes, imagenet = tables.get("classes", {}), tables.get("imagenet", {})
    if unknown or not (isinstance(classes, dict) and isinstance(imagenet, dict)):
        raise BadConfig(
            f"the class map {name_or_file} has {unknown[0] if unknown else 'no tables'!r}",
            "the tables [classes] and [imagenet]",
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
    return ClassMap(
        name_or_file, dict(classes), {key: tuple(value) for key, value in imagenet.items()}
    )


@dataclass(frozen=True)
class MoreImages:
    """Images of further sources, by their class names there."""

    sketches: dict[str, tuple[ImageSource, ...]]
    photos: dict[str, tuple[Path, ...]]
    notices: tuple[str, ...] = ()


def read_more(sketches: Sequence[Path], photos: Sequence[Path]) -> MoreImages:
    """Return the images of further sources.

    Args:
        sketches: stroke files (`.npz`) and folders of class folders.
        photos: folders of class folders.

    Raises:
        BadData: a source does not exist, has no images in class folders, or is a damaged stroke
            file.
    """
    notices: list[str] = []
    found_photos: dict[str, tuple[Path, ...]] = {}
    for folder in photos:
        for name, images in _in_folders(folder).items():
            found_photos[name] = (*found_photos.get(name, ()), *images)
    return MoreImages(_read(sketches, notices), found_photos, tuple(notices))


def append_images(division: Division, split: Split, more: MoreImages, names: ClassMap) -> Division:
    """Return the division with further training images.

    Further classes follow the data set's, in alphabetical order. They need photos, or sketches and
    ImageNet classes to make soft labels from.

    Args:
        division: the data set's division.
        split: the unseen classes.
        more: the further images.
        names: maps their class names.

    Raises:
        BadData: the class map would train on an unseen class.
    """
    training = division.training
    own, validation = ClassNames(training.classes), ClassNames(division.validation.classes)
    left_out: dict[str, list[str]] = defaultdict(list)
    new_sketches: dict[str, list[ImageSource]] = defaultdict(list)
    new_photos: dict[str, list[Path]] = defaultdict(list)
    for name in sorted(set(more.sketches) | set(more.photos)):
        target = names.classes.get(name, name)
        unseen = next((each for each in (target, name) if each and split.is_unseen(each)), None)
        if unseen is not None and target and name in names.classes:
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
        elif target in validation:
            left_out["kept for validation"].append(name)
        else:
            known = own.find(target) or target
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
    notices = [
        f"further images: {added[0]:,} sketches and {added[1]:,} photos, "
        f"{len(further)} further classes",
        *(
            f"left out {len(each)} classes {why}: {join_names(each)}"
            for why, each in left_out.items()
        ),
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


def _read(sources: Sequence[Path], notices: list[str]) -> dict[str, tuple[ImageSource, ...]]:
    found: dict[str, list[ImageSource]] = defaultdict(list)
    for source in sources:
        if source.suffix.lower() == STROKE_SUFFIX:
            strokes = read_stroke_file(source)
            for name, drawing in zip(strokes.name_of, strokes.drawings, strict=True):
                found[name].append(drawing)
            if strokes.empty:
                notices.append(
                    f"left out {strokes.empty} empty drawings of {printable_name(source)}"
                )
            continue
        for name, paths in _in_folders(source).items():
            found[name] += paths
    return {name: tuple(images) for name, images in found.items()}


def _in_folders(source: Path) -> dict[str, list[Path]]:
    if not source.is_dir():
        raise BadData(
            f"{printable_name(source)} is not a folder",
            f"a folder of class folders, or for sketches a {STROKE_SUFFIX} file",
        )
    images = scan([source])
    if not images.paths:
        raise BadData(
            f"{printable_name(source)} has no images in class folders", "a folder of class folders"
        )
    found: dict[str, list[Path]] = defaultdict(list)
    for name, path in zip(images.name_of, images.paths, strict=True):
        found[name].append(path)
    return found


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
