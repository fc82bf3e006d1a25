"""Images by their class folders, and the folders of two domains brought under one class name."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from sbtk_runtime.images import SUFFIXES
from sbtk_train.data.class_names import class_key, match_key, plain_key


@dataclass(frozen=True)
class NamedImages:
    """Images with the class names that their folders or lists give them.

    Attributes:
        names: class names, of classes without images too.
        paths: image files.
        name_of: the class name of each path.
    """

    names: tuple[str, ...]
    paths: tuple[Path, ...]
    name_of: tuple[str, ...]


def scan(folders: Sequence[Path]) -> NamedImages:
    """Returns the images below `folder/<class>/`, by class name and then by file name."""
    found: dict[str, list[Path]] = defaultdict(list)
    for folder in folders:
        for name in _class_folders(folder):
            found[name] += _images(folder / name)
    names = tuple(sorted(found))
    return NamedImages(
        names,
        tuple(path for name in names for path in found[name]),
        tuple(name for name in names for _ in found[name]),
    )


def files_there(paths: Iterable[Path]) -> set[Path]:
    """Returns those of the paths that exist; reads each folder once instead of asking for each."""
    paths = list(paths)
    held = {folder: _file_names(folder) for folder in {path.parent for path in paths}}
    return {path for path in paths if path.name in held[path.parent]}


def common_names(sketch_names: Sequence[str], photo_names: Sequence[str]) -> dict[str, str]:
    """Returns the class name for each name of either domain.

    Names that differ in case, blanks, hyphens or underscores are one class. A name without a
    counterpart in the other domain is matched with one there that has none either: run together
    or misspelt, and at last without an addition in brackets. The sketches' name is kept.
    """
    groups: dict[str, list[str]] = defaultdict(list)
    for name in (*sorted(set(sketch_names)), *sorted(set(photo_names))):
        groups[class_key(name)].append(name)
    is_sketch, is_photo = set(sketch_names), set(photo_names)
    for key_of in (match_key, plain_key):
        lonely_sketches = _by(key_of, [g for g in groups.values() if not is_photo & set(g)])
        lonely_photos = _by(key_of, [g for g in groups.values() if not is_sketch & set(g)])
        for key in lonely_sketches.keys() & lonely_photos.keys():
            sketches, photos = lonely_sketches[key], lonely_photos[key]
            if len(sketches) == len(photos) == 1:
                groups[class_key(sketches[0][0])] += groups.pop(class_key(photos[0][0]))
    return {name: group[0] for group in groups.values() for name in group}


def _by(key_of: Callable[[str], str], groups: list[list[str]]) -> dict[str, list[list[str]]]:
    by_key: dict[str, list[list[str]]] = defaultdict(list)
    for group in groups:
        by_key[key_of(group[0])].append(group)
    return by_key


def _class_folders(folder: Path) -> list[str]:
    return [entry.name for entry in folder.iterdir() if entry.name[0] != "." and entry.is_dir()]


def _images(folder: Path) -> list[Path]:
    # Names that start with a point are no pictures: macOS puts such a file beside each of them.
    return sorted(
        path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES and path.name[0] != "."
    )


def _file_names(folder: Path) -> set[str]:
    try:
        return set(os.listdir(folder))  # noqa: PTH208 -- names are all that is wanted
    except OSError:
        return set()
