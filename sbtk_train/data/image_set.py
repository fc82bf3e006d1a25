"""Images with their classes."""

from __future__ import annotations

import hashlib
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from sbtk_runtime.errors import BadData
from sbtk_runtime.files import printable_name
from sbtk_runtime.images import SUFFIXES
from sbtk_train.data.class_names import (
    class_key,
    joined_key,
    plain_key,
    published_key,
    without_addition,
)
from sbtk_train.data.stroke_files import Drawing

Rows = NDArray[np.int64]
#: Where an image comes from: a file, or strokes that are rendered.
ImageSource = Path | Drawing
_Source = TypeVar("_Source", bound=ImageSource)


@dataclass(frozen=True)
class Listing:
    """The split of a data set's own list files.

    Attributes:
        name: of their folder, as `zeroshot1`.
        seen: names of the classes to train on.
        unseen: names of the classes kept unseen.
        training_sketches: sketches to train on; the other sketches of the seen classes are held
            out. Empty where no list says so.
    """

    name: str
    seen: tuple[str, ...]
    unseen: tuple[str, ...]
    training_sketches: frozenset[Path] = frozenset()


@dataclass(frozen=True)
class ImageSet:
    """Images with their classes.

    Attributes:
        classes: class names; a label is an index into them.
        sketches: sketch files, or drawings known by their strokes.
        sketch_labels: `(S,) int64`, the sketches' labels.
        photos: photo files.
        photo_labels: `(P,) int64`, the photos' labels.
        listings: the data set's own list files, if it has some.
        notices: sentences about files that were left out or classes that were merged.
        further_classes: how many of the last classes come from further sources.
    """

    classes: tuple[str, ...]
    sketches: tuple[ImageSource, ...]
    sketch_labels: Rows
    photos: tuple[Path, ...]
    photo_labels: Rows
    listings: tuple[Listing, ...] = ()
    notices: tuple[str, ...] = ()
    further_classes: int = 0

    @property
    def sketch_files(self) -> tuple[Path, ...]:
        """The sketches that are files: all of a data set's own."""
        return tuple(sketch for sketch in self.sketches if isinstance(sketch, Path))

    @property
    def sha256(self) -> str:
        """A hash of class names, file names and file sizes: equal sets have equal hashes."""
        sketches = _names_sha256(self.classes, self.sketches, self.sketch_labels)
        return hashlib.sha256(f"{sketches}\n{self.photos_sha256}".encode()).hexdigest()

    @property
    def photos_sha256(self) -> str:
        """The same hash of the photos alone."""
        return _names_sha256(self.classes, self.photos, self.photo_labels)


def select_classes(data: ImageSet, classes: Sequence[str]) -> ImageSet:
    """Return the images of the named classes, relabelled in the given order."""
    index = {name: number for number, name in enumerate(classes)}
    new_label = np.array([index.get(name, -1) for name in data.classes], dtype=np.int64)

    def chosen(paths: tuple[_Source, ...], labels: Rows) -> tuple[tuple[_Source, ...], Rows]:
        relabelled = new_label[labels] if len(labels) else labels
        keep = np.flatnonzero(relabelled >= 0)
        return tuple(paths[i] for i in keep), relabelled[keep]

    return ImageSet(
        tuple(classes),
        *chosen(data.sketches, data.sketch_labels),
        *chosen(data.photos, data.photo_labels),
        data.listings,
        data.notices,
    )


def select_sketches(data: ImageSet, rows: Sequence[int]) -> ImageSet:
    """Return the set with the sketches of those rows alone, and all of its photos."""
    return ImageSet(
        data.classes,
        tuple(data.sketches[row] for row in rows),
        data.sketch_labels[np.asarray(rows, dtype=np.int64)],
        data.photos,
        data.photo_labels,
    )


def select_photos(data: ImageSet, rows: Sequence[int]) -> ImageSet:
    """Return the set with the photos of those rows alone, and all of its sketches."""
    return replace(
        data,
        photos=tuple(data.photos[row] for row in rows),
        photo_labels=data.photo_labels[np.asarray(rows, dtype=np.int64)],
    )


def identify_source(source: ImageSource) -> str:
    """Return a text that identifies an image: name and size of a file, or a hash of strokes."""
    if isinstance(source, Drawing):
        return source.identity
    return f"{source.name}:{source.stat().st_size}"


def _names_sha256(classes: tuple[str, ...], paths: Sequence[ImageSource], labels: Rows) -> str:
    digest = hashlib.sha256()
    for path, label in zip(paths, labels, strict=True):
        record = f"{classes[label]}/{identify_source(path)}\n"
        digest.update(record.encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


#: Folders that a system or an archive adds; their names are compared in small letters.
SYSTEM_FOLDERS = frozenset(
    {
        "__macosx",
        "@eadir",
        "#recycle",
        "$recycle.bin",
        "system volume information",
        "lost+found",
    }
)
#: What these systems leave in any folder.
_SYSTEM_FILES = frozenset({"thumbs.db", "desktop.ini"})


@dataclass(frozen=True)
class Ignored:
    """Files and folders in class folders that training does not read.

    Attributes:
        suffixes: number of files by suffix in small letters (empty: none), hidden and system
            files left out.
        nested: folders below a class folder that hold images, and how many.
        system: folders of a system or an archive next to class folders.
    """

    suffixes: Mapping[str, int] = field(default_factory=dict)
    nested: tuple[tuple[Path, int], ...] = ()
    system: tuple[Path, ...] = ()


@dataclass(frozen=True)
class NamedImages:
    """Images with the class names that their folders or lists give them.

    Attributes:
        names: class names, of classes without images too.
        paths: image files.
        name_of: the class name of each path.
        ignored: what else is in the folders, if they were scanned.
    """

    names: tuple[str, ...]
    paths: tuple[Path, ...]
    name_of: tuple[str, ...]
    ignored: Ignored = field(default_factory=Ignored)


def scan(folders: Sequence[Path]) -> NamedImages:
    """Return the images below `folder/<class>/`, by class name and then by file name.

    Raises:
        BadData: two of the class folders in one folder have names that mean one class.
    """
    found: dict[str, list[Path]] = defaultdict(list)
    suffixes: Counter[str] = Counter()
    nested: list[tuple[Path, int]] = []
    system: list[Path] = []
    for folder in folders:
        names_here, system_here = _class_folders(folder)
        system += system_here
        refuse_ambiguous(names_here, printable_name(folder))
        for name in names_here:
            found[name] += _images(folder / name, suffixes, nested)
    names = tuple(sorted(found))
    return NamedImages(
        names,
        tuple(path for name in names for path in found[name]),
        tuple(name for name in names for _ in found[name]),
        Ignored(suffixes, tuple(nested), tuple(system)),
    )


def refuse_ambiguous(names: Iterable[str], where: str) -> None:
    """Raise `BadData` if two names in one place mean one class."""
    first: dict[str, str] = {}
    for name in sorted(names):
        other = first.setdefault(class_key(name), name)
        if other != name:
            raise BadData(
                f"{where} has {other!r} and {name!r}, which are one class: case, and a blank, "
                "underscore or hyphen between words make no difference",
                "one name for each class",
                "merge them, or rename one",
            )


def find_existing(paths: Iterable[Path]) -> set[Path]:
    """Return those of the paths that exist; read each folder once instead of asking for each."""
    paths = list(paths)
    held = {folder: _file_names(folder) for folder in {path.parent for path in paths}}
    return {path for path in paths if path.name in held[path.parent]}


def match_names(sketch_names: Sequence[str], photo_names: Sequence[str]) -> dict[str, str]:
    """Return the class name for each name of either domain.

    Names with one `class_key` are one class. A published class without a counterpart in the other
    domain is matched with one there that has none either by its documented spellings: run together
    or misspelt, and at last without an addition in brackets. The sketches' name is kept.
    """
    groups: dict[str, list[str]] = defaultdict(list)
    for name in (*sorted(set(sketch_names)), *sorted(set(photo_names))):
        groups[class_key(name)].append(name)
    is_sketch, is_photo = set(sketch_names), set(photo_names)
    # By the broader key of the second round, "crane" may be either of two cranes, and is neither.
    for key_of, is_one in ((published_key, published_key), (_bare_key, plain_key)):
        lonely_sketches = _by(key_of, [g for g in groups.values() if not is_photo & set(g)])
        lonely_photos = _by(key_of, [g for g in groups.values() if not is_sketch & set(g)])
        for key in lonely_sketches.keys() & lonely_photos.keys():
            sketches, photos = lonely_sketches[key], lonely_photos[key]
            if len(sketches) != 1 or len(photos) != 1:
                continue
            if is_one(sketches[0][0]) == is_one(photos[0][0]):
                groups[class_key(sketches[0][0])] += groups.pop(class_key(photos[0][0]))
    return {name: group[0] for group in groups.values() for name in group}


def _bare_key(name: str) -> str:
    return joined_key(without_addition(name))


def _by(key_of: Callable[[str], str], groups: list[list[str]]) -> dict[str, list[list[str]]]:
    by_key: dict[str, list[list[str]]] = defaultdict(list)
    for group in groups:
        by_key[key_of(group[0])].append(group)
    return by_key


def is_system_folder(name: str) -> bool:
    """Return whether a folder is hidden or a system folder, and so not a class."""
    return name.startswith(".") or name.lower() in SYSTEM_FOLDERS


def _class_folders(folder: Path) -> tuple[list[str], list[Path]]:
    """Return the names of class folders, and system folders next to them."""
    folders = [entry for entry in folder.iterdir() if entry.is_dir()]
    names = [entry.name for entry in folders if not is_system_folder(entry.name)]
    system = [entry for entry in folders if entry.name.lower() in SYSTEM_FOLDERS]
    return names, sorted(system)


def _images(folder: Path, suffixes: Counter[str], nested: list[tuple[Path, int]]) -> list[Path]:
    """Return the images in a class folder, and add what else it holds to the two others."""
    images: list[Path] = []
    with os.scandir(folder) as entries:
        for entry in entries:
            # macOS adds a file that starts with a dot for each image.
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                if not is_system_folder(entry.name) and (count := _images_below(entry.path)):
                    nested.append((Path(entry.path), count))
            elif _suffix(entry.name) in SUFFIXES:
                images.append(folder / entry.name)
            elif entry.name.lower() not in _SYSTEM_FILES:
                suffixes[_suffix(entry.name)] += 1
    return sorted(images)


def _images_below(folder: str) -> int:
    return sum(
        _suffix(name) in SUFFIXES and not name.startswith(".")
        for _, _, names in os.walk(folder)
        for name in names
    )


def _suffix(name: str) -> str:
    return os.path.splitext(name)[1].lower()  # noqa: PTH122 -- a Path for each takes far longer


def _file_names(folder: Path) -> set[str]:
    try:
        return set(os.listdir(folder))  # noqa: PTH208 -- names are all that is wanted
    except OSError:
        return set()
