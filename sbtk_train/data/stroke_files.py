"""Stroke files: vector drawings of many classes in one NumPy archive.

The layout is that of a repacked Quick, Draw! (Ha and Eck 2017): `points (P, 2)`, stroke s =
`points[stroke_offsets[s]:stroke_offsets[s + 1]]`, drawing d = strokes `drawing_offsets[d]` to
`drawing_offsets[d + 1]`, and `labels (D,)` that index `classes`. Coordinates lie in 0..255, x to
the right and y down.
"""

from __future__ import annotations

import hashlib
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sbtk_runtime.errors import BadData
from sbtk_runtime.files import count_text, printable_name

#: Strokes of a drawing, each `(P, 2) float32`: x to the right and y down, in 0..255.
Strokes = tuple[NDArray[np.float32], ...]

EXTENT = 255.0
_ARRAYS = ("points", "stroke_offsets", "drawing_offsets", "labels", "classes")


@dataclass(frozen=True, eq=False)
class Drawing:
    """A sketch in strokes, rendered on demand.

    Attributes:
        file: its stroke file.
        number: its index in the file.
        strokes: at least one stroke of at least one point.
    """

    file: Path
    number: int
    strokes: Strokes

    def __str__(self) -> str:
        return f"{self.file}#{self.number}"

    @property
    def identity(self) -> str:
        """A hash that is equal for equal strokes, in any file."""
        digest = hashlib.sha256()
        for stroke in self.strokes:
            digest.update(len(stroke).to_bytes(4, "little"))
            digest.update(stroke.astype("<f4").tobytes())
        return digest.hexdigest()


@dataclass(frozen=True)
class StrokeFile:
    """The contents of a stroke file.

    Attributes:
        drawings: the drawings with at least one point, by class.
        name_of: the class name of each.
        empty: number of drawings without points, which are left out.
    """

    drawings: tuple[Drawing, ...]
    name_of: tuple[str, ...]
    empty: int


def read_stroke_file(path: Path) -> StrokeFile:
    """Return the drawings of a stroke file.

    Raises:
        BadData: the file cannot be read, lacks an array, has no drawing with a point, or its
            offsets, labels or points are out of range.
    """
    arrays = _arrays(path)
    points, classes, labels = arrays["points"], arrays["classes"], arrays["labels"]
    strokes, drawings = arrays["stroke_offsets"], arrays["drawing_offsets"]
    if points.ndim != 2 or points.shape[1] != 2 or points.dtype.kind not in "uif":
        raise _bad(
            path, f"points of shape {points.shape} and type {points.dtype}", "(P, 2) numbers"
        )
    for name, offsets, end in (
        ("stroke_offsets", strokes, len(points)),
        ("drawing_offsets", drawings, strokes.size - 1),
    ):
        if not _are_offsets(offsets, end):
            raise _bad(path, f"{name} that do not run from 0 up to {end}", "ascending offsets")
    if classes.ndim != 1 or classes.dtype.kind != "U":
        raise _bad(path, f"classes of type {classes.dtype}", "a list of names")
    if not all(str(name).strip() for name in classes):
        raise _bad(path, "a class without a name", "a list of names")
    if labels.shape != (len(drawings) - 1,) or labels.dtype.kind not in "ui":
        raise _bad(path, f"labels of shape {labels.shape}", f"({len(drawings) - 1},) integers")
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < len(classes):
        raise _bad(
            path, f"labels from {labels.min()} to {labels.max()}", f"0 to {len(classes) - 1}"
        )
    scaled = points.astype(np.float32)
    if len(scaled) and not (
        np.isfinite(scaled).all() and 0 <= scaled.min() <= scaled.max() <= EXTENT
    ):
        raise _bad(path, "points outside the drawing", f"coordinates from 0 to {EXTENT:.0f}")
    found: list[Drawing] = []
    names: list[str] = []
    for number in np.argsort(labels, kind="stable").tolist():
        own = range(int(drawings[number]), int(drawings[number + 1]))
        parts = tuple(scaled[strokes[s] : strokes[s + 1]] for s in own)
        inked = tuple(part for part in parts if len(part))
        if inked:
            found.append(Drawing(path, number, inked))
            names.append(str(classes[labels[number]]))
    if not found:
        raise _bad(path, f"{count_text(len(labels), 'drawing')}, none with a point", "drawings")
    return StrokeFile(tuple(found), tuple(names), len(labels) - len(found))


def _arrays(path: Path) -> dict[str, NDArray[np.generic]]:
    try:
        # NumPy would advise to unpickle other files.
        if not zipfile.is_zipfile(path):
            path.open("rb").close()
            raise _bad(path, "not a zip file", "a NumPy archive (.npz) of strokes")
        with np.load(path, allow_pickle=False) as archive:
            missing = [name for name in _ARRAYS if name not in archive]
            if missing:
                raise _bad(path, f"no array {missing[0]!r}", ", ".join(_ARRAYS))
            arrays = {name: archive[name] for name in _ARRAYS}
    except BadData:
        raise
    # On damaged files, zipfile and NumPy raise a dozen kinds of error.
    except Exception as problem:
        raise _bad(path, str(problem), "a NumPy archive (.npz) of strokes") from problem
    # What does not start as an array comes back as bytes.
    strange = [name for name, array in arrays.items() if not isinstance(array, np.ndarray)]
    if strange:
        raise _bad(path, f"{strange[0]} that is not an array", ", ".join(_ARRAYS))
    return arrays


def _are_offsets(offsets: NDArray[np.generic], end: int) -> bool:
    if offsets.ndim != 1 or not len(offsets) or offsets.dtype.kind not in "ui":
        return False
    whole = offsets.astype(np.int64)
    return bool(whole[0] == 0 and whole[-1] == end and (np.diff(whole) >= 0).all())


def _bad(path: Path, found: str, expected: str) -> BadData:
    return BadData(f"{printable_name(path)} is not a stroke file: {found}", expected)
