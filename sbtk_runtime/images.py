"""Image files to upright RGB pictures, safely.

Files come from anywhere, so only regular files are opened, only formats on a list reach a parser,
and the size is judged from the header before any pixel is decoded.
"""

from __future__ import annotations

import io
import os
import stat
import struct
import warnings
from pathlib import Path

from PIL import Image, ImageOps, UnidentifiedImageError

from sbtk_runtime.errors import BadImage

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".jpe", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
    | {".ppm", ".pgm", ".pbm", ".heic", ".heif"}
)
MAX_PIXELS = 120_000_000
MAX_FILE_BYTES = 512 << 20

# Everything that Pillow's parsers were seen to raise on damaged files.
_PARSER_ERRORS = (
    OSError,
    ValueError,
    SyntaxError,
    struct.error,
    EOFError,
    MemoryError,
    IndexError,
    KeyError,
    TypeError,
    OverflowError,
    AttributeError,
    Image.DecompressionBombError,
)


def read_image_bytes(path: Path | str) -> bytes:
    """Returns the content of a regular file.

    Raises:
        BadImage: the file is missing, unreadable, empty, too large, not a regular file (a FIFO is
            not waited for), or changed while it was read.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | os.O_CLOEXEC)
    except (OSError, ValueError) as problem:
        reason = problem.strerror if isinstance(problem, OSError) else str(problem)
        raise BadImage(f"cannot be opened: {reason}") from problem
    with os.fdopen(descriptor, "rb") as file:
        before = os.fstat(file.fileno())
        if not stat.S_ISREG(before.st_mode):
            raise BadImage("not a regular file")
        if before.st_size == 0:
            raise BadImage("the file is empty")
        if before.st_size > MAX_FILE_BYTES:
            raise BadImage(
                f"the file has {before.st_size:,} bytes", f"at most {MAX_FILE_BYTES:,} bytes"
            )
        try:
            data = file.read(MAX_FILE_BYTES + 1)
        except OSError as problem:
            raise BadImage(f"cannot be read: {problem.strerror}") from problem
        after = os.fstat(file.fileno())
    if len(data) != before.st_size or after.st_mtime_ns != before.st_mtime_ns:
        raise BadImage("the file changed while it was read")
    return data


def decode(data: bytes, *, at_least_px: int | None = None) -> Image.Image:
    """Returns the picture in `data`, upright, in mode RGB, or RGBA when any pixel is transparent.

    Of an animation it is the first frame; 16-bit, CMYK, palette and grey pictures are converted.

    Args:
        data: the bytes of an image file.
        at_least_px: JPEGs may be decoded at a reduced scale (an eighth to one) as long as the
            shorter side keeps at least this many pixels; `None` keeps the full scale.

    Raises:
        BadImage: not an image, a format off the allow-list, damaged, or over `MAX_PIXELS`.
    """
    try:
        with warnings.catch_warnings():
            # Our own cap decides; Pillow's warning about half of its own would only be noise.
            warnings.simplefilter("ignore")
            image = _open(data)
            if at_least_px is not None and image.format == "JPEG":
                image.draft("RGB", (at_least_px, at_least_px))
            image.load()
            image = ImageOps.exif_transpose(image)
            return _rgb_or_rgba(image)
    except UnidentifiedImageError as problem:
        raise BadImage("not an image that sbtk reads", ", ".join(FORMATS)) from problem
    except BadImage:
        raise
    except _PARSER_ERRORS as problem:
        raise BadImage(f"damaged image: {problem or type(problem).__name__}") from problem


def on_white(image: Image.Image) -> Image.Image:
    """Returns the picture in mode RGB, with what was transparent shown on white."""
    if image.mode == "RGB":
        return image
    white = Image.new("RGBA", image.size, (255, 255, 255, 255))
    return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")


def _open(data: bytes) -> Image.Image:
    formats = FORMATS
    if data[4:12] in (b"ftypheic", b"ftypheix", b"ftypmif1", b"ftypheim", b"ftyphevc"):
        formats = (*FORMATS, "HEIF")
        _register_heif()
    image = Image.open(io.BytesIO(data), formats=formats)
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise BadImage(
            f"the picture has {width} x {height} pixels", f"at most {MAX_PIXELS:,} pixels"
        )
    return image


def _register_heif() -> None:
    try:
        import pillow_heif
    except ImportError as problem:
        raise BadImage(
            "a HEIC picture, and pillow-heif is not installed",
            "the extra 'heic'",
            'pip install "sbtk[heic]"',
        ) from problem
    pillow_heif.register_heif_opener()


def _rgb_or_rgba(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith(("I", "F")):
        return _eight_bit(image).convert("RGB")
    if not image.has_transparency_data:
        return image.convert("RGB")
    rgba = image.convert("RGBA")
    lowest_alpha = rgba.getchannel("A").getextrema()[0]
    return rgba if isinstance(lowest_alpha, int) and lowest_alpha < 255 else rgba.convert("RGB")


def _eight_bit(image: Image.Image) -> Image.Image:
    """Returns a 16-bit, 32-bit or float grey picture scaled to eight bits.

    Pillow's own conversion clips at 255. The full scale of 16 bits is the right one unless a
    picture goes beyond it.
    """
    wide = image.convert("F")
    highest = float(wide.getextrema()[1])  # type: ignore[arg-type]
    scale = 1.0 if highest <= 1.0 else 65535.0 if highest <= 65535.0 else highest
    return wide.point(lambda value: value * (255.0 / scale)).convert("L")
