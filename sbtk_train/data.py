"""A data set on disk, `DATA/{sketch,photo}/<class>/*`, and its division for zero-shot work.

Unseen classes are set aside before anything else looks at the data, so no later step can use them
by mistake: `Division` is the only thing that training code is handed.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sbtk_runtime.errors import BadData
from sbtk_runtime.images import SUFFIXES
from sbtk_train.splits import Split, class_key

Rows = NDArray[np.int64]

MIN_TRAINING_CLASSES = 3


@dataclass(frozen=True)
class ImageSet:
    """Images with their classes.

    Attributes:
        classes: class names; a label is an index into them.
        sketches: sketch files.
        sketch_labels: `(S,) int64`, the sketches' labels.
        photos: photo files.
        photo_labels: `(P,) int64`, the photos' labels.
    """

    classes: tuple[str, ...]
    sketches: tuple[Path, ...]
    sketch_labels: Rows
    photos: tuple[Path, ...]
    photo_labels: Rows

    @property
    def sha256(self) -> str:
        """A hash of class names, file names and file sizes: equal sets have equal hashes."""
        sketches = _names_sha256(self.classes, self.sketches, self.sketch_labels)
        return hashlib.sha256(f"{sketches}\n{self.photos_sha256}".encode()).hexdigest()

    @property
    def photos_sha256(self) -> str:
        """The same hash of the photos alone."""
        return _names_sha256(self.classes, self.photos, self.photo_labels)


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


def read_dataset(root: Path) -> ImageSet:
    """Returns every sketch and photo below `root/{sketch,photo}/<class>/`, sorted by name.

    Raises:
        BadData: a folder is missing or there is no class.
    """
    folders = {kind: root / kind for kind in ("sketch", "photo")}
    for kind, folder in folders.items():
        if not folder.is_dir():
            raise BadData(
                f"{root} has no folder {kind!r}",
                f"{root}/sketch/<class>/* and {root}/photo/<class>/*",
                "give the folder that holds both",
            )
    names = {kind: _class_folders(folder) for kind, folder in folders.items()}
    classes = tuple(sorted(set(names["sketch"]) | set(names["photo"])))
    if not classes:
        raise BadData(f"{root} holds no class folders", f"{root}/sketch/<class>/*")
    sketches, sketch_labels = _files(folders["sketch"], classes)
    photos, photo_labels = _files(folders["photo"], classes)
    return ImageSet(classes, sketches, sketch_labels, photos, photo_labels)


def of_classes(data: ImageSet, classes: Sequence[str]) -> ImageSet:
    """Returns the images of the named classes, relabelled in the order given."""
    index = {name: number for number, name in enumerate(classes)}
    new_label = np.array([index.get(name, -1) for name in data.classes], dtype=np.int64)

    def chosen(paths: tuple[Path, ...], labels: Rows) -> tuple[tuple[Path, ...], Rows]:
        relabelled = new_label[labels] if len(labels) else labels
        keep = np.flatnonzero(relabelled >= 0)
        return tuple(paths[i] for i in keep), relabelled[keep]

    return ImageSet(
        tuple(classes),
        *chosen(data.sketches, data.sketch_labels),
        *chosen(data.photos, data.photo_labels),
    )


def divide(
    data: ImageSet,
    split: Split,
    *,
    seed: int,
    validation_classes: int = 10,
    held_out_share: float = 0.05,
    only_classes: Sequence[str] | None = None,
) -> Division:
    """Returns the data set divided into training, held-out and validation images.

    Args:
        data: the whole data set.
        split: the classes to keep unseen.
        seed: draws the validation classes and the held-out sketches; 0 by the project's rule.
        validation_classes: number of seen classes kept for validation.
        held_out_share: share of each training class's sketches that is held out, at least one.
        only_classes: if given, the classes to use; naming an unseen one is refused.

    Raises:
        BadData: an unseen class was asked for, or too few classes or sketches remain.
    """
    if only_classes is not None:
        mistaken = [name for name in only_classes if split.is_unseen(name)]
        if mistaken:
            raise BadData(
                f"the classes to train on include {', '.join(mistaken)}, unseen in {split.name}",
                "seen classes only",
                "take them off the list, or choose another split",
            )
        wanted = {class_key(name) for name in only_classes}
        data = of_classes(data, [name for name in data.classes if class_key(name) in wanted])
    usable, notices = _in_both_domains(data, split.seen_among(data.classes))
    rng = np.random.default_rng(seed)
    if len(usable) < validation_classes + MIN_TRAINING_CLASSES:
        raise BadData(
            f"{len(usable)} seen classes have both sketches and photos",
            f"at least {validation_classes + MIN_TRAINING_CLASSES}: "
            f"{validation_classes} for validation and {MIN_TRAINING_CLASSES} to train on",
            "add classes, or lower --validation-classes",
        )
    chosen = sorted(rng.choice(len(usable), validation_classes, replace=False).tolist())
    validation = [usable[i] for i in chosen]
    training = of_classes(data, [name for name in usable if name not in set(validation)])
    kept, held = _held_out(training, held_out_share, rng)
    return Division(
        training=_with_sketches(training, kept),
        held_out=_with_sketches(training, held),
        validation=of_classes(data, validation),
        notices=tuple(notices),
    )


def _names_sha256(classes: tuple[str, ...], paths: tuple[Path, ...], labels: Rows) -> str:
    digest = hashlib.sha256()
    for path, label in zip(paths, labels, strict=True):
        record = f"{classes[label]}/{path.name}:{path.stat().st_size}\n"
        digest.update(record.encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def _class_folders(folder: Path) -> list[str]:
    return [entry.name for entry in folder.iterdir() if entry.is_dir() and entry.name[0] != "."]


def _files(folder: Path, classes: tuple[str, ...]) -> tuple[tuple[Path, ...], Rows]:
    paths: list[Path] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        if not (folder / name).is_dir():
            continue
        found = sorted(
            path for path in (folder / name).iterdir() if path.suffix.lower() in SUFFIXES
        )
        paths += found
        labels += [label] * len(found)
    return tuple(paths), np.array(labels, dtype=np.int64)


def _in_both_domains(data: ImageSet, classes: Sequence[str]) -> tuple[list[str], list[str]]:
    sketches = np.bincount(data.sketch_labels, minlength=len(data.classes))
    photos = np.bincount(data.photo_labels, minlength=len(data.classes))
    usable, notices = [], []
    for name in classes:
        label = data.classes.index(name)
        # One sketch is held out, so a class with a single one could not be trained on.
        if sketches[label] >= 2 and photos[label] >= 1:
            usable.append(name)
        else:
            notices.append(
                f"class {name!r} left out: {sketches[label]} sketches and {photos[label]} photos "
                "(at least 2 and 1 are needed)"
            )
    return usable, notices


def _held_out(
    training: ImageSet, share: float, rng: np.random.Generator
) -> tuple[list[int], list[int]]:
    kept: list[int] = []
    held: list[int] = []
    for label in range(len(training.classes)):
        rows = np.flatnonzero(training.sketch_labels == label)
        count = min(max(1, math.floor(share * len(rows))), len(rows) - 1)
        chosen = set(rng.choice(rows, count, replace=False).tolist())
        held += sorted(chosen)
        kept += [int(row) for row in rows if int(row) not in chosen]
    return kept, held


def _with_sketches(data: ImageSet, rows: list[int]) -> ImageSet:
    return ImageSet(
        data.classes,
        tuple(data.sketches[row] for row in rows),
        data.sketch_labels[rows],
        data.photos,
        data.photo_labels,
    )
