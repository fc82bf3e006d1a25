"""Images with their classes: what a data set is once its files are found."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from sbtk_train.data.stroke_files import Drawing

Rows = NDArray[np.int64]
#: Where an image comes from: a file, or strokes that are rendered.
ImageSource = Path | Drawing
_Source = TypeVar("_Source", bound=ImageSource)


@dataclass(frozen=True)
class Listing:
    """What a data set's own list files say about the split that they were made for.

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
        notices: sentences about what was left out or put together when the files were found.
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


def of_classes(data: ImageSet, classes: Sequence[str]) -> ImageSet:
    """Returns the images of the named classes, relabelled in the order given."""
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


def with_sketches(data: ImageSet, rows: Sequence[int]) -> ImageSet:
    """Returns the set with the sketches of those rows alone, and all of its photos."""
    return ImageSet(
        data.classes,
        tuple(data.sketches[row] for row in rows),
        data.sketch_labels[np.asarray(rows, dtype=np.int64)],
        data.photos,
        data.photo_labels,
    )


def source_key(source: ImageSource) -> str:
    """Returns a text that tells images apart: name and size of a file, a hash of strokes."""
    if isinstance(source, Drawing):
        return source.identity
    return f"{source.name}:{source.stat().st_size}"


def _names_sha256(classes: tuple[str, ...], paths: Sequence[ImageSource], labels: Rows) -> str:
    digest = hashlib.sha256()
    for path, label in zip(paths, labels, strict=True):
        record = f"{classes[label]}/{source_key(path)}\n"
        digest.update(record.encode("utf-8", "surrogateescape"))
    return digest.hexdigest()
