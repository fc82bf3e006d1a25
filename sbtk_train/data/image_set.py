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
from sbtk_train.data.strokes import Drawing

Rows = NDArray[np.int64]
#: Where an image comes from: a file, or strokes that are rendered.
ImageSource = Path | Drawing
_Source = TypeVar("_Source", bound=ImageSource)


@dataclass(frozen=True)
class Listing:
    """The split of a data set's own list files.

    Attributes:
        name: name of their folder, such as `zeroshot1`.
        seen: names of the classes to train on.
        unseen: names of the unseen classes.
        training_sketches: sketches to train on; the other sketches of the seen classes are held
            out. Empty if no list names them.
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
        sketches: sketch files, or drawings as strokes.
        sketch_labels: `(S,) int64`, the sketches' labels.
        photos: photo files.
        photo_labels: `(P,) int64`, the photos' labels.
        listings: the data set's own list files, if any.
        notices: sentences about files that were left out or classes that were merged.
        further_classes: number of classes, at the end, that come from further sources.
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
        """The sketches that are files."""
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


def select_images(
    data: ImageSet,
    *,
    sketches: Sequence[int] | Rows | None = None,
    photos: Sequence[int] | Rows | None = None,
) -> ImageSet:
    """Return the set with only these rows `(N,) int64` of sketches and photos; `None` keeps all."""
    if sketches is not None:
        labels = data.sketch_labels[np.asarray(sketches, dtype=np.int64)]
        chosen = tuple(data.sketches[row] for row in sketches)
        data = replace(data, sketches=chosen, sketch_labels=labels)
    if photos is not None:
        labels = data.photo_labels[np.asarray(photos, dtype=np.int64)]
        data = replace(data, photos=tuple(data.photos[row] for row in photos), photo_labels=labels)
    return data


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


#: Folders that operating systems and archives add; names are compared in lower case.
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
#: Files that operating systems leave in folders.
_SYSTEM_FILES = frozenset({"thumbs.db", "desktop.ini"})


@dataclass(frozen=True)
class Ignored:
    """Files and folders in class folders that training does not read.

    Attributes:
        suffixes: number of files by suffix in lower case (empty: none), without hidden and system
            files.
        nested: folders with images below a class folder, and the number of images.
        system: folders of `SYSTEM_FOLDERS` next to class folders.
    """

    suffixes: Mapping[str, int] = field(default_factory=dict)
    nested: tuple[tuple[Path, int], ...] = ()
    system: tuple[Path, ...] = ()


@dataclass(frozen=True)
class NamedImages:
    """Images with their class names from folders or lists.

    Attributes:
        names: class names, including those of classes without images.
        paths: image files.
        name_of: the class name of each path.
        ignored: other contents of the folders, if they were scanned.
    """

    names: tuple[str, ...]
    paths: tuple[Path, ...]
    name_of: tuple[str, ...]
    ignored: Ignored = field(default_factory=Ignored)


def scan(folders: Sequence[Path]) -> NamedImages:
    """Return the images below `folder/<class>/`, by class name and then by file name.

    Raises:
        BadData: two class folders in one folder have names of the same class.
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
    """Raise `BadData` if two of the names mean the same class."""
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
    """Return the paths that exist, reading each folder once instead of checking each path."""
    paths = list(paths)
    held = {folder: _file_names(folder) for folder in {path.parent for path in paths}}
    return {path for path in paths if path.name in held[path.parent]}


def match_names(sketch_names: Sequence[str], photo_names: Sequence[str]) -> dict[str, str]:
    """Return the class name for each name of either domain; sketches' names are preferred.

    Names with equal `class_key` are one class. If a published class has no counterpart in the other
    domain, its documented spellings are tried on names there without a counterpart: run together or
    misspelt, then without an addition in brackets.
    """
    groups: dict[str, list[str]] = defaultdict(list)
    for name in (*sorted(set(sketch_names)), *sorted(set(photo_names))):
        groups[class_key(name)].append(name)
    is_sketch, is_photo = set(sketch_names), set(photo_names)
    # By the broader key of the second round, "crane" could be either of two cranes: no match.
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
    """Return whether a folder is hidden or a system folder, and not a class."""
    return name.startswith(".") or name.lower() in SYSTEM_FOLDERS


def _class_folders(folder: Path) -> tuple[list[str], list[Path]]:
    """Return the names of class folders, and system folders next to them."""
    folders = [entry for entry in folder.iterdir() if entry.is_dir()]
    names = [entry.name for entry in folders if not is_system_folder(entry.name)]
    system = [entry for entry in folders if entry.name.lower() in SYSTEM_FOLDERS]
    return names, sorted(system)


def _images(folder: Path, suffixes: Counter[str], nested: list[tuple[Path, int]]) -> list[Path]:
    """Return the images in a class folder; add its other contents to `suffixes` and `nested`."""
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
