"""Photos in terminals that support images: kitty's protocol, sixels, or characters."""

from __future__ import annotations

import contextlib
import sys
import termios
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from PIL import Image

from sbtk_runtime.files import printable_name
from sbtk_runtime.thumbnail import fit_square

if TYPE_CHECKING:
    from rich.console import Console
    from textual_image.renderable import HalfcellImage, SixelImage, TGPImage

    from sbtk_runtime.gallery.gallery import Hit

    Renderable = type[TGPImage | SixelImage | HalfcellImage]

Way = Literal["kitty", "iterm2", "sixel", "blocks"]

_COLUMNS = 16
# Kitty's protocol numbers the columns of an image, up to 297.
_ROW_COLUMNS = 288
_SQUARE_PX = 320
_GAP_PX = 16
# The terminal's background is unknown, and sixels are opaque; this grey suits light and dark.
_GROUND = (118, 118, 118)
_CLEAR = (0, 0, 0, 0)


def show_photos(hits: Sequence[Hit], way: Way | None = None) -> str:
    """Print the hits' photos on standard output in rows, with rank and name below each.

    Args:
        hits: the hits; unreadable photos are shown as empty squares.
        way: image protocol; `None` queries the terminal.

    Returns:
        Why nothing was printed (no terminal, or no support for images), or "".
    """
    if way is None and not sys.stdout.isatty():
        return "standard output is not a terminal"
    console = _console()
    with _open_terminal():
        try:
            renderable = _find_renderable(way)
            if renderable is not None:
                # This queries the size of a character, once.
                console.measure(renderable(Image.new("RGB", (1, 1)), width=1))
        except (ValueError, ZeroDivisionError, termios.error):
            return "the terminal sent an invalid reply"
        if renderable is None:
            return "the terminal supports neither sixels nor kitty images; try --show-as blocks"
        in_a_row = max(1, min(console.width, _ROW_COLUMNS) // _COLUMNS)
        for start in range(0, len(hits), in_a_row):
            _print_row(console, renderable, hits[start : start + in_a_row])
    return ""


def _console() -> Console:
    from rich.console import Console

    # Colours carry the image: kitty's protocol even encodes its id as a 24-bit colour.
    return Console(
        force_terminal=True, color_system="truecolor", no_color=False, highlight=False, emoji=False
    )


def _find_renderable(way: Way | None) -> Renderable | None:
    """Return the class that draws images this way; for `None`, by what the terminal supports."""
    # Importing the library queries the terminal.
    from textual_image import renderable

    named: dict[Way, Renderable] = {
        "kitty": renderable.TGPImage,
        "iterm2": renderable.SixelImage,
        "sixel": renderable.SixelImage,
        "blocks": renderable.HalfcellImage,
    }
    if way is not None:
        return named[way]
    found = renderable.Image
    return found if found in (renderable.TGPImage, renderable.SixelImage) else None


def _print_row(console: Console, renderable: Renderable, hits: Sequence[Hit]) -> None:
    from rich.text import Text
    from textual_image.renderable import TGPImage

    ground = _CLEAR if renderable is TGPImage else _GROUND
    row = _row([Path(hit.path) for hit in hits], ground)
    console.print(renderable(row, width=_COLUMNS * len(hits), height="auto"), end="")
    line = Text(no_wrap=True, overflow="ignore")
    for hit in hits:
        name = Text.assemble((f"{hit.rank} ", "bold"), printable_name(Path(hit.path).name))
        name.truncate(_COLUMNS - 1, overflow="ellipsis", pad=True)
        line.append_text(name).append(" ")
    line.rstrip()
    console.print(line)


def _row(photos: Sequence[Path], ground: tuple[int, ...]) -> Image.Image:
    """Return the photos side by side, each in a square with gaps at the right and below."""
    mode = "RGB" if len(ground) == 3 else "RGBA"
    row = Image.new(mode, (_SQUARE_PX * len(photos), _SQUARE_PX), ground)
    for place, photo in enumerate(photos):
        row.paste(fit_square(photo, _SQUARE_PX - _GAP_PX, ground), (place * _SQUARE_PX, 0))
    return row


@contextlib.contextmanager
def _open_terminal() -> Iterator[None]:
    """Let the library read the terminal's replies if standard input is a pipe."""
    standard_input = sys.__stdin__
    if standard_input is not None and standard_input.isatty():
        yield
        return
    with contextlib.ExitStack() as opened:
        try:
            sys.__stdin__ = opened.enter_context(Path("/dev/tty").open())  # type: ignore[misc]
        except OSError:
            sys.__stdin__ = None  # type: ignore[misc]
        try:
            yield
        finally:
            sys.__stdin__ = standard_input  # type: ignore[misc]
