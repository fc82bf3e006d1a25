"""Drawings in strokes: read from stroke files, rendered with variations, and traced from bitmaps.

A stroke file is a NumPy archive of drawings of many classes. The layout is that of a repacked
Quick, Draw! (Ha and Eck 2017): `points (P, 2)`, stroke s = `points[stroke_offsets[s]:
stroke_offsets[s + 1]]`, drawing d = strokes `drawing_offsets[d]` to `drawing_offsets[d + 1]`, and
`labels (D,)` that index `classes`. Coordinates lie in 0..255, x to the right and y down.

Quick drawings made on a screen have few, clean strokes of one width, unlike the pencil sketches of
research data sets. Rendering strokes with random widths, omissions and deformations covers the
styles in between.
"""

from __future__ import annotations

import hashlib
import math
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from sbtk_runtime.errors import BadData
from sbtk_runtime.files import count_text, printable_name
from sbtk_runtime.preprocess import MARGIN, Pixels, full_contrast

_Points = NDArray[np.float32]
#: Strokes of a drawing, each `(P, 2) float32`: x to the right and y down, in 0..255.
Strokes = tuple[_Points, ...]

EXTENT = 255.0
_ARRAYS = ("points", "stroke_offsets", "drawing_offsets", "labels", "classes")

#: Stroke widths as shares of the image's side: 1 to 12 px of 256.
_MIN_WIDTH, _MAX_WIDTH = 1 / 256, 12 / 256
_PLAIN_WIDTH = 3 / 256
_SUPERSAMPLING = 3
_INK = 96
_SHORTEST_TRACE_PX = 6
_NEIGHBOURS = [(r, c) for r in (-1, 0, 1) for c in (-1, 0, 1) if (r, c) != (0, 0)]


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


@dataclass(frozen=True)
class Frame:
    """Where a drawing is within an image, in shares of the image's side.

    Attributes:
        x, y: middle of the drawing's bounding box.
        side: longer side of the box.
    """

    x: float
    y: float
    side: float


def render(
    strokes: Strokes, size_px: int, width: float = _PLAIN_WIDTH, frame: Frame | None = None
) -> Pixels:
    """Return `(size, size, 1) uint8`, dark ink on white.

    Args:
        strokes: at least one point.
        size_px: side of the square.
        width: of the strokes, as a share of the side.
        frame: where to place the strokes; by default as the runtime crops sketches.
    """
    points = np.concatenate(strokes)
    low, high = points.min(axis=0), points.max(axis=0)
    if frame is None:
        # The runtime crops a sketch to its ink and pads it to a square with a margin.
        frame = Frame(0.5, 0.5, 1 / (1 + 2 * MARGIN) - width)
    scale = frame.side / max(float((high - low).max()), 1.0)
    large = size_px * _SUPERSAMPLING
    canvas = Image.new("L", (large, large), 255)
    pen = ImageDraw.Draw(canvas)
    thickness = max(1, round(width * large))
    radius = thickness / 2
    for stroke in strokes:
        placed = ((stroke - (low + high) / 2) * scale + (frame.x, frame.y)) * large
        path = [(float(x), float(y)) for x, y in placed]
        if len(path) > 1:
            pen.line(path, fill=0, width=thickness, joint="curve")
        for x, y in (path[0], path[-1]):
            pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=0)
    small = canvas.resize((size_px, size_px), Image.Resampling.BOX)
    return (255 - full_contrast(255 - np.asarray(small, dtype=np.uint8)))[:, :, None]


def find_frame(strokes: Strokes) -> Frame:
    """Return the place of the strokes in their image, whose side is `EXTENT`."""
    points = np.concatenate(strokes)
    low, high = points.min(axis=0), points.max(axis=0)
    x, y = ((low + high) / 2 / EXTENT).tolist()
    return Frame(x, y, float((high - low).max()) / EXTENT)


def render_varied(
    strokes: Strokes, size_px: int, rng: np.random.Generator, frame: Frame | None = None
) -> Pixels:
    """Return a random variation of the drawing in a random stroke width, rendered by `render`."""
    width = float(np.exp(rng.uniform(math.log(_MIN_WIDTH), math.log(_MAX_WIDTH))))
    return render(vary(strokes, rng), size_px, width, frame)


def vary(strokes: Strokes, rng: np.random.Generator) -> Strokes:
    """Return the strokes randomly simplified, dropped, shortened, shifted and bent."""
    kept = _some(strokes, rng)
    if rng.random() < 0.3:
        kept = tuple(_shorten(stroke, rng) for stroke in kept)
    if rng.random() < 0.6:
        tolerance = float(np.exp(rng.uniform(math.log(1.0), math.log(10.0))))
        kept = tuple(simplify(stroke, tolerance) for stroke in kept)
    shifts = rng.normal(0, rng.uniform(0, 2.5), (len(kept), 2)).astype(np.float32)
    kept = tuple(stroke + shift for stroke, shift in zip(kept, shifts, strict=True))
    stretch = np.exp(rng.uniform(-0.25, 0.25, 2))
    shear = rng.uniform(-0.15, 0.15)
    affine = np.array([[stretch[0], shear], [0, stretch[1]]], dtype=np.float32)
    strength, waves = rng.uniform(0, 7), rng.uniform(0.5, 1.5, (2, 2)) * 2 * np.pi / EXTENT
    phase = rng.uniform(0, 2 * np.pi, 2)
    return tuple(_bend(stroke, strength, waves, phase) @ affine.T for stroke in kept)


def simplify(stroke: _Points, tolerance: float) -> _Points:
    """Return `stroke (N, 2)` with fewer points, at most `tolerance` away from it everywhere.

    Douglas and Peucker 1973, by the distance to the chord, not to its line. Both ends are kept.
    """
    keep = np.zeros(len(stroke), dtype=bool)
    keep[[0, -1]] = True
    spans = [(0, len(stroke) - 1)]
    while spans:
        first, last = spans.pop()
        if last - first < 2:
            continue
        inner = stroke[first + 1 : last] - stroke[first]
        chord = stroke[last] - stroke[first]
        along = (inner @ chord / max(float(chord @ chord), 1e-9)).clip(0, 1)
        away = np.hypot(*(inner - along[:, None] * chord).T)
        worst = int(away.argmax())
        if away[worst] > tolerance:
            middle = first + 1 + worst
            keep[middle] = True
            spans += [(first, middle), (middle, last)]
    return stroke[keep]


def trace(pixels: Pixels) -> Strokes:
    """Return the centre lines of a bitmap sketch as strokes in 0..255; none if it is empty.

    Args:
        pixels: `(H, W) uint8`, dark ink on white.
    """
    from skimage.morphology import skeletonize  # it imports SciPy

    height, width = pixels.shape
    skeleton = skeletonize(pixels < 255 - _INK)  # type: ignore[no-untyped-call]
    left = {(int(r), int(c)) for r, c in zip(*np.nonzero(skeleton), strict=True)}
    degree = {spot: sum(near in left for near in _around(spot)) for spot in left}
    scale = EXTENT / max(height, width, 2)
    # Lines start at their ends; the remaining ones are rings.
    starts = sorted(left, key=lambda spot: (degree[spot] != 1, spot))
    strokes = []
    for start in starts:
        if start not in left:
            continue
        path = [start]
        left.discard(start)
        while following := _pick_straightest(path, left):
            path.append(following)
            left.discard(following)
        if len(path) >= _SHORTEST_TRACE_PX:
            closed = max(abs(path[0][0] - path[-1][0]), abs(path[0][1] - path[-1][1])) <= 2
            spots = [*path, path[0]] if closed and len(path) > 2 * _SHORTEST_TRACE_PX else path
            strokes.append(np.array(spots, dtype=np.float32)[:, ::-1] * scale)
    return tuple(simplify(stroke, 0.75) for stroke in strokes)


def _around(spot: tuple[int, int]) -> list[tuple[int, int]]:
    return [(spot[0] + r, spot[1] + c) for r, c in _NEIGHBOURS]


def _pick_straightest(
    path: list[tuple[int, int]], left: set[tuple[int, int]]
) -> tuple[int, int] | None:
    """Return the free neighbour that continues the path straightest; `None` at a dead end."""
    here = path[-1]
    back = path[max(0, len(path) - 5)]
    heading = (here[0] - back[0], here[1] - back[1])
    free = [near for near in _around(here) if near in left]
    if not free:
        return None

    def turn(near: tuple[int, int]) -> float:
        step = (near[0] - here[0], near[1] - here[1])
        return -(step[0] * heading[0] + step[1] * heading[1]) / math.hypot(*step)

    return min(free, key=turn)


def _some(strokes: Strokes, rng: np.random.Generator) -> Strokes:
    """Return the strokes without a random few; the longest is always kept."""
    if len(strokes) == 1 or rng.random() < 0.4:
        return strokes
    lengths = [float(np.hypot(*np.diff(s, axis=0).T).sum()) for s in strokes]
    longest = int(np.argmax(lengths))
    dropped = rng.random(len(strokes)) < rng.uniform(0, 0.3)
    return tuple(s for i, s in enumerate(strokes) if i == longest or not dropped[i])


def _shorten(stroke: _Points, rng: np.random.Generator) -> _Points:
    cut = int(len(stroke) * rng.uniform(0, 0.2))
    first = int(rng.integers(0, cut + 1))
    return stroke[first : len(stroke) - (cut - first)]


def _bend(
    stroke: _Points, strength: float, waves: NDArray[np.float64], phase: NDArray[np.float64]
) -> _Points:
    moved: _Points = (stroke + strength * np.sin(stroke @ waves.T + phase)).astype(np.float32)
    return moved
