"""Ranked contact sheets, as in the SBTKNet paper's Figures 3 and 4: queries left, hits right.

A hit of the query's class has a green frame, another a red one and the name of its class below,
so that nobody has to tell the colours apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from sbtk_runtime.thumbnail import square

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
    """A photo that was found: its file, its class, and whether that is the query's."""

    path: Path
    class_name: str
    is_right: bool


@dataclass(frozen=True)
class RankedQuery:
    """A query with what was found for it, best first; `caption` is told below the query."""

    path: Path
    caption: str
    photos: tuple[RankedPhoto, ...]


@dataclass(frozen=True)
class Panel:
    """A part of the sheet: a title, and queries one below the other."""

    title: str
    queries: tuple[RankedQuery, ...]


def ranked_sheet(panels: Sequence[Panel], cell_px: int = CELL_PX) -> Image.Image:
    """Returns the sheet in mode RGB: the panels side by side, each query in a row of its own.

    Args:
        panels: each with at least one query and one hit.
        cell_px: width and height of a picture, with its frame.
    """
    widths = [_panel_width(panel, cell_px) for panel in panels]
    rows = max(len(panel.queries) for panel in panels)
    height = 2 * _MARGIN_PX + _TITLE_PX + rows * (cell_px + _CAPTION_PX + _GAP_PX) - _GAP_PX
    width = 2 * _MARGIN_PX + sum(widths) + _PANEL_GAP_PX * (len(panels) - 1)
    sheet = Image.new("RGB", (width, height), (255, 255, 255))
    left = _MARGIN_PX
    for panel, panel_width in zip(panels, widths, strict=True):
        _draw_panel(sheet, panel, left, cell_px)
        left += panel_width + _PANEL_GAP_PX
    return sheet


def _panel_width(panel: Panel, cell_px: int) -> int:
    hits = max(len(query.photos) for query in panel.queries)
    return cell_px + _QUERY_GAP_PX + hits * (cell_px + _GAP_PX) - _GAP_PX


def _draw_panel(sheet: Image.Image, panel: Panel, left: int, cell_px: int) -> None:
    draw = ImageDraw.Draw(sheet)
    width = _panel_width(panel, cell_px)
    _write(draw, panel.title, (left, _MARGIN_PX), width, 14, _INK)
    top = _MARGIN_PX + _TITLE_PX
    for query in panel.queries:
        sheet.paste(square(query.path, cell_px, _GROUND), (left, top))
        place = (left, top + cell_px + 2)
        _write(draw, query.caption, place, cell_px + _QUERY_GAP_PX - 2, 11, _INK)
        x = left + cell_px + _QUERY_GAP_PX
        for photo in query.photos:
            sheet.paste(_framed(photo, cell_px), (x, top))
            if not photo.is_right:
                _write(draw, photo.class_name, (x, top + cell_px + 2), cell_px, 11, _SOFT)
            x += cell_px + _GAP_PX
        top += cell_px + _CAPTION_PX + _GAP_PX


def _framed(photo: RankedPhoto, cell_px: int) -> Image.Image:
    framed = Image.new("RGB", (cell_px, cell_px), RIGHT if photo.is_right else WRONG)
    framed.paste(square(photo.path, cell_px - 2 * FRAME_PX, _GROUND), (FRAME_PX, FRAME_PX))
    return framed


def _write(
    draw: ImageDraw.ImageDraw,
    text: str,
    place: tuple[int, int],
    width_px: int,
    size_px: int,
    colour: tuple[int, int, int],
) -> None:
    """Writes one line of text, cut so that it stays within the width."""
    font = ImageFont.load_default(size_px)
    shown = text.replace("_", " ")
    while len(shown) > 1 and draw.textlength(shown, font) > width_px:
        shown = shown[:-2].rstrip() + "…"
    draw.text(place, shown, colour, font)
