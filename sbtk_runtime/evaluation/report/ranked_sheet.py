"""Ranked contact sheets, as in the SBTKNet paper's Figures 3 and 4: queries left, hits right.

Hits of the query's class have a green frame; others have a red frame and their class name below, so
that colours do not matter.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from sbtk_runtime.embedding.embedder import Embedder
from sbtk_runtime.embedding.stream import Failed
from sbtk_runtime.errors import BadConfig, BadData
from sbtk_runtime.evaluation.bench.map import LabelledImages
from sbtk_runtime.evaluation.metrics import evaluate
from sbtk_runtime.files import printable_name
from sbtk_runtime.preprocess import Kind
from sbtk_runtime.thumbnail import fit_square

#: Width and height of an image with its frame.
CELL_PX = 112
FRAME_PX = 4
RIGHT = (46, 158, 75)
WRONG = (208, 49, 45)

_GAP_PX = 6
_MARGIN_PX = 16
_QUERY_GAP_PX = 18
_CAPTION_PX = 16
_TITLE_PX = 26
_PANEL_GAP_PX = 30
_INK = (32, 36, 44)
_SOFT = (109, 106, 100)
_GROUND = (238, 238, 238)


@dataclass(frozen=True)
class RankedPhoto:
    """A hit: its file, its class, and whether it is the query's class."""

    path: Path
    class_name: str
    is_right: bool


@dataclass(frozen=True)
class RankedQuery:
    """A query with its hits, best first; `caption` is shown below the query."""

    path: Path
    caption: str
    photos: tuple[RankedPhoto, ...]


@dataclass(frozen=True)
class Panel:
    """A part of the sheet: a title and rows of queries."""

    title: str
    queries: tuple[RankedQuery, ...]


def draw_ranked_sheet(panels: Sequence[Panel]) -> Image.Image:
    """Return the sheet in mode RGB: panels side by side, a row for each query.

    Each panel has at least one query and one hit.
    """
    widths = [_panel_width(panel) for panel in panels]
    rows = max(len(panel.queries) for panel in panels)
    height = 2 * _MARGIN_PX + _TITLE_PX + rows * (CELL_PX + _CAPTION_PX + _GAP_PX) - _GAP_PX
    width = 2 * _MARGIN_PX + sum(widths) + _PANEL_GAP_PX * (len(panels) - 1)
    sheet = Image.new("RGB", (width, height), (255, 255, 255))
    left = _MARGIN_PX
    for panel, panel_width in zip(panels, widths, strict=True):
        _draw_panel(sheet, panel, left)
        left += panel_width + _PANEL_GAP_PX
    return sheet


def _panel_width(panel: Panel) -> int:
    hits = max(len(query.photos) for query in panel.queries)
    return CELL_PX + _QUERY_GAP_PX + hits * (CELL_PX + _GAP_PX) - _GAP_PX


def _draw_panel(sheet: Image.Image, panel: Panel, left: int) -> None:
    draw = ImageDraw.Draw(sheet)
    width = _panel_width(panel)
    _write(draw, panel.title, (left, _MARGIN_PX), width, 14, _INK)
    top = _MARGIN_PX + _TITLE_PX
    for query in panel.queries:
        sheet.paste(fit_square(query.path, CELL_PX, _GROUND), (left, top))
        place = (left, top + CELL_PX + 2)
        _write(draw, query.caption, place, CELL_PX + _QUERY_GAP_PX - 2, 11, _INK)
        x = left + CELL_PX + _QUERY_GAP_PX
        for photo in query.photos:
            sheet.paste(_draw_frame(photo), (x, top))
            if not photo.is_right:
                _write(draw, photo.class_name, (x, top + CELL_PX + 2), CELL_PX, 11, _SOFT)
            x += CELL_PX + _GAP_PX
        top += CELL_PX + _CAPTION_PX + _GAP_PX


def _draw_frame(photo: RankedPhoto) -> Image.Image:
    framed = Image.new("RGB", (CELL_PX, CELL_PX), RIGHT if photo.is_right else WRONG)
    framed.paste(fit_square(photo.path, CELL_PX - 2 * FRAME_PX, _GROUND), (FRAME_PX, FRAME_PX))
    return framed


def _write(
    draw: ImageDraw.ImageDraw,
    text: str,
    place: tuple[int, int],
    width_px: int,
    size_px: int,
    colour: tuple[int, int, int],
) -> None:
    """Write a line of text, truncated to the width."""
    font = ImageFont.load_default(size_px)
    shown = text.replace("_", " ")
    while len(shown) > 1 and draw.textlength(shown, font) > width_px:
        shown = shown[:-2].rstrip() + "…"
    draw.text(place, shown, colour, font)


Rows = NDArray[np.float32]
Indices = NDArray[np.int64]


@dataclass(frozen=True)
class EmbeddedImages:
    """Readable images with their embeddings.

    Attributes:
        paths: the files.
        classes: class name of each file.
        rows: `(N, D) float32` unit rows.
        unreadable: `path: reason` of unreadable images.
    """

    paths: tuple[Path, ...]
    classes: tuple[str, ...]
    rows: Rows
    unreadable: tuple[str, ...] = ()

    def select(self, indices: Sequence[int]) -> EmbeddedImages:
        """Return the images at these indices, in this order."""
        paths = tuple(self.paths[index] for index in indices)
        classes = tuple(self.classes[index] for index in indices)
        return EmbeddedImages(paths, classes, self.rows[list(indices)], self.unreadable)


def embed_labelled(
    embedder: Embedder,
    images: LabelledImages,
    kind: Kind,
    advance: Callable[[int, int | None], None],
) -> EmbeddedImages:
    """Embed the images; `advance` is called with the numbers of done and of all images.

    Raises:
        BadData: none of the images can be read.
    """
    paths: list[Path] = []
    classes: list[str] = []
    rows: list[Rows] = []
    unreadable: list[str] = []
    for item in embedder.stream(images.paths, kind):
        advance(item.index + 1, len(images.paths))
        if isinstance(item, Failed):
            unreadable.append(f"{printable_name(item.path)}: {item.reason}")
            continue
        paths.append(images.paths[item.index])
        classes.append(images.classes[images.labels[item.index]])
        rows.append(item.row)
    if not rows:
        raise BadData(f"none of {len(images.paths)} {kind} files can be read", "image files")
    return EmbeddedImages(tuple(paths), tuple(classes), np.stack(rows), tuple(unreadable))


def select_images(images: LabelledImages, indices: Sequence[int]) -> LabelledImages:
    """Return the images at these indices, in this order."""
    paths = [images.paths[index] for index in indices]
    return LabelledImages(paths, [images.labels[index] for index in indices], images.classes)


def find_queries(sketches: LabelledImages, files: Sequence[Path]) -> list[int]:
    """Return the indices of files among the sketches, in the order of the files.

    Raises:
        BadData: a file is not among the sketches, so its class is unknown.
    """
    indices = {path.resolve(): index for index, path in enumerate(sketches.paths)}
    for file in files:
        if file.resolve() not in indices:
            raise BadData(
                f"{printable_name(file)} is not among the {len(sketches.paths)} sketches",
                f"a sketch of {', '.join(sketches.classes[:5])}"
                + (", ..." if len(sketches.classes) > 5 else ""),
                "use a sketch of DATA: hits are judged by its class",
            )
    return [indices[file.resolve()] for file in files]


def draw_queries(total: int, count: int, seed: int) -> list[int]:
    """Draw `count` different indices below `total`.

    Raises:
        BadConfig: `count` is larger than `total`.
    """
    if count > total:
        raise BadConfig(f"{count} queries of {total} sketches", f"at most {total}")
    drawn = np.random.default_rng(seed).choice(total, count, replace=False)
    return [int(place) for place in drawn]


def find_worst_queries(average_precisions: NDArray[np.float64], count: int) -> list[int]:
    """Return the indices of the `count` lowest of `average_precisions (Q,) float64`, lowest first.

    Queries without a relevant photo, whose AP is NaN, are ignored.

    Raises:
        BadConfig: there are fewer.
    """
    total = int(np.isfinite(average_precisions).sum())
    if count > total:
        raise BadConfig(f"{count} queries of {total} sketches", f"at most {total}")
    return [int(place) for place in np.argsort(average_precisions, kind="stable")[:count]]


def compute_average_precisions(
    queries: EmbeddedImages, gallery: EmbeddedImages
) -> NDArray[np.float64]:
    """Return plain AP over the whole gallery `(Q,)`; NaN without a photo of the class."""
    names = {name: label for label, name in enumerate(dict.fromkeys(gallery.classes))}
    labels = np.array([names.get(name, -1) for name in queries.classes], dtype=np.int64)
    photo_labels = np.array([names[name] for name in gallery.classes], dtype=np.int64)
    values = np.full(len(labels), np.nan)
    if (is_answerable := labels >= 0).any():
        found = evaluate(queries.rows, labels, gallery.rows, photo_labels)
        values[is_answerable] = found.ap_all
    return values


def rank_photos(queries: Rows, gallery: Rows, count: int) -> Indices:
    """Return the indices `(Q, count)` of the best photos for `queries (Q, D)`, best first."""
    order = np.argsort(-(queries @ gallery.T), axis=1, kind="stable")
    return np.asarray(order[:, :count], dtype=np.int64)


def make_panel(title: str, queries: EmbeddedImages, gallery: EmbeddedImages, count: int) -> Panel:
    """Return a panel of the queries, each with its best `count` photos of the gallery."""
    found = rank_photos(queries.rows, gallery.rows, count)
    return Panel(
        title,
        tuple(
            RankedQuery(
                queries.paths[place],
                name,
                tuple(
                    RankedPhoto(
                        gallery.paths[hit], gallery.classes[hit], gallery.classes[hit] == name
                    )
                    for hit in found[place]
                ),
            )
            for place, name in enumerate(queries.classes)
        ),
    )
