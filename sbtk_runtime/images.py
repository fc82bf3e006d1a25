"""Image files to upright RGB pictures, safely.

Files come from anywhere, so only regular files are opened, only formats on a list reach a parser,
and the size is judged from the header before any pixel is decoded.
"""

from __future__ import annotations

import io
import os
import stat
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

# The plugins are imported here because Pillow's own search for them is not safe between threads:
# a picture can find the registry half filled.
from PIL import (
    AvifImagePlugin,
    BmpImagePlugin,
    GifImagePlugin,
    Image,
    ImageOps,
    JpegImagePlugin,
    MpoImagePlugin,
    PngImagePlugin,
    PpmImagePlugin,
    TiffImagePlugin,
    UnidentifiedImageError,
    WebPImagePlugin,
)

from sbtk_runtime.errors import BadImage
from sbtk_runtime.files import without_waiting
from sbtk_runtime.raw_photo import decode_raw, is_raw, raw_memory

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "AVIF")
HEIC_SUFFIXES = frozenset({".heic", ".heics", ".heif", ".heifs", ".hif"})
SUFFIXES = (
    frozenset({".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".webp", ".bmp", ".gif"})
    | {".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".avif"}
    | HEIC_SUFFIXES
)
MAX_PIXELS = 120_000_000
MAX_FILE_BYTES = 512 << 20
MAX_DECODE_BYTES = 1 << 30

_AT_MOST = f"at most {MAX_PIXELS:,} pixels"

# Bytes per pixel at the peak of decoding: Pillow holds RGB in four; transparent, palette and
# 16-bit pictures exist twice or more while they are converted; some formats hold the picture
# again (WebP's animation canvas, TIFF's strips), and progressive JPEGs all of their coefficients.
_PLAIN_BYTES = 4
_MIXED_BYTES = 12
_FORMAT_BYTES = {"WEBP": 16, "TIFF": 4, "HEIF": 8, "AVIF": 8}
_PROGRESSIVE_BYTES = 6

_HEIC_BRANDS = frozenset({b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs"})
_GENERAL_BRANDS = frozenset({b"mif1", b"mif2", b"msf1"})
_MAX_BRANDS_BYTES = 256

_PLUGINS = (
    AvifImagePlugin,
    BmpImagePlugin,
    GifImagePlugin,
    JpegImagePlugin,
    MpoImagePlugin,
    PngImagePlugin,
    PpmImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)

# Our own cap decides about size, and odd metadata are no news to users. Filters are global and
# `catch_warnings` is not safe between threads, so this is done once.
warnings.filterwarnings("ignore", module=r"PIL\.")


@dataclass(frozen=True)
class ImageFile:
    """The content of a file and what identifies this state of it."""

    data: bytes
    size_bytes: int
    mtime_ns: int


def read_image_bytes(path: Path | str) -> bytes:
    """Returns the content of a regular file; see `read_image_file`."""
    return read_image_file(path).data


def read_image_file(path: Path | str) -> ImageFile:
    """Returns the content of a regular file, with the size and time that belong to it.

    Raises:
        BadImage: the file is missing, unreadable, empty, too large, not a regular file (a FIFO is
            not waited for), or changed while it was read, twice.
    """
    for _ in range(2):
        file = _read_once(path)
        if file is not None:
            return file
    raise _changed()


def read_open_file(file: BinaryIO) -> ImageFile:
    """Returns the content of a file that is open, from its beginning; else as `read_image_file`.

    Raises:
        BadImage: as there; the file is not read a second time.
    """
    try:
        content = _content(file)
    except OSError as problem:
        raise BadImage(f"cannot be read: {problem.strerror}") from problem
    if content is None:
        raise _changed()
    return content


def decode(data: bytes, *, at_least_px: int | None = None) -> Image.Image:
    """Returns the picture in `data`, upright, in mode RGB, or RGBA when any pixel is transparent.

    Of an animation it is the first frame; 16-bit, CMYK, palette and grey pictures are converted.

    Args:
        data: the bytes of an image file.
        at_least_px: JPEGs may be decoded at a reduced scale (an eighth to one) as long as the
            shorter side keeps at least this many pixels; `None` keeps the full scale.

    Raises:
        BadImage: not an image, a format off the allow-list, damaged, over `MAX_PIXELS`, or over
            `MAX_DECODE_BYTES` while it is decoded.
    """
    if is_raw(data):
        return decode_raw(data, lambda jpeg: _decoded(jpeg, at_least_px), MAX_DECODE_BYTES)
    return _decoded(data, at_least_px)


def _decoded(data: bytes, at_least_px: int | None) -> Image.Image:
    try:
        image, needed_bytes = _open(data, at_least_px)
        if needed_bytes > MAX_DECODE_BYTES:
            raise BadImage(
                f"the picture has {image.width} x {image.height} pixels, for which decoding "
                f"this kind of {image.format} takes some {needed_bytes >> 20:,} MiB",
                f"at most {MAX_DECODE_BYTES >> 20:,} MiB",
            )
        image.load()
        return _rgb_or_rgba(_upright(image))
    except BadImage:
        raise
    except UnidentifiedImageError as problem:
        raise BadImage("not an image that sbtk reads", ", ".join(FORMATS)) from problem
    except Image.DecompressionBombError as problem:
        raise BadImage("the picture has too many pixels", _AT_MOST) from problem
    # Pillow's parsers raise nearly anything on damaged files: OSError, SyntaxError, struct.error,
    # zlib.error, EOFError, KeyError, MemoryError...
    except Exception as problem:
        raise BadImage(f"damaged image: {problem or type(problem).__name__}") from problem


def memory_to_decode(data: bytes, *, at_least_px: int | None = None) -> int:
    """Returns roughly how many bytes `decode` will need at its peak, judged from the header.

    It is 0 for what `decode` will refuse without decoding it.
    """
    try:
        if is_raw(data):
            needed_bytes = raw_memory(data, lambda jpeg: _open(jpeg, at_least_px)[1])
        else:
            _, needed_bytes = _open(data, at_least_px)
    except Exception:
        return 0
    return needed_bytes if needed_bytes <= MAX_DECODE_BYTES else 0


def is_heic(head: bytes) -> bool:
    """Returns whether a file that begins with these bytes is a HEIC picture, by its brands."""
    if head[4:8] != b"ftyp":
        return False
    if head[8:12] in _GENERAL_BRANDS:
        # Their first brand says only that they are pictures; AVIF has the same.
        size_bytes = min(int.from_bytes(head[:4], "big"), _MAX_BRANDS_BYTES)
        brands = {head[at : at + 4] for at in range(16, size_bytes, 4)}
        return not brands & {b"avif", b"avis"}
    return head[8:12] in _HEIC_BRANDS


def on_white(image: Image.Image) -> Image.Image:
    """Returns the picture in mode RGB, with what was transparent shown on white."""
    if image.mode == "RGB":
        return image
    white = Image.new("RGB", image.size, (255, 255, 255))
    rgba = image if image.mode == "RGBA" else image.convert("RGBA")
    white.paste(rgba, mask=rgba.getchannel("A"))
    return white


def _read_once(path: Path | str) -> ImageFile | None:
    """Returns the file's content, or `None` when it changed meanwhile."""
    try:
        with open(path, "rb", opener=without_waiting) as file:
            return _content(file)
    except (OSError, ValueError) as problem:
        reason = problem.strerror if isinstance(problem, OSError) else str(problem)
        raise BadImage(f"cannot be read: {reason}") from problem


def _changed() -> BadImage:
    return BadImage("the file changed while it was read", "a file that nobody is writing")


def _content(file: BinaryIO) -> ImageFile | None:
    before = os.fstat(file.fileno())
    if not stat.S_ISREG(before.st_mode):
        raise BadImage("not a regular file")
    if before.st_size == 0:
        raise BadImage("the file is empty")
    if before.st_size > MAX_FILE_BYTES:
        raise BadImage(
            f"the file has {before.st_size:,} bytes", f"at most {MAX_FILE_BYTES:,} bytes"
        )
    # One byte more shows a file that has grown.
    data = file.read(before.st_size + 1)
    after = os.fstat(file.fileno())
    if len(data) != before.st_size or after.st_mtime_ns != before.st_mtime_ns:
        return None
    return ImageFile(data, before.st_size, before.st_mtime_ns)


def _open(data: bytes, at_least_px: int | None) -> tuple[Image.Image, int]:
    """Returns the picture, its header read and a JPEG's scale chosen, and what it takes to load."""
    formats: tuple[str, ...] = FORMATS
    if is_heic(data):
        formats = (*FORMATS, "HEIF")
        _register_heif()
    image = Image.open(io.BytesIO(data), formats=formats)
    pixels = image.width * image.height
    if pixels > MAX_PIXELS:
        raise BadImage(f"the picture has {image.width} x {image.height} pixels", _AT_MOST)
    # Phones write MPO: a JPEG with further pictures behind the first.
    if at_least_px is not None and image.format in ("JPEG", "MPO"):
        image.draft("RGB", (at_least_px, at_least_px))
    plain = image.mode in ("RGB", "L") and "transparency" not in image.info
    each = (_PLAIN_BYTES if plain else _MIXED_BYTES) + _FORMAT_BYTES.get(image.format or "", 0)
    kept = pixels * _PROGRESSIVE_BYTES if "progressive" in image.info else 0
    return image, image.width * image.height * each + kept


def _upright(image: Image.Image) -> Image.Image:
    """Returns the picture turned as its EXIF says; as it is when that cannot be read."""
    try:
        return ImageOps.exif_transpose(image)
    # Damaged metadata are no reason to refuse good pixels (python-pillow/Pillow#5509).
    except Exception:
        return image


def _register_heif() -> None:
    try:
        import pillow_heif
    except ImportError as problem:
        raise BadImage(
            "a HEIC picture, and pillow-heif is not installed",
            "the extra 'photos'",
            'pip install "sbtk[photos]"',
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

    Pillow's own conversion clips at 255. Integers have the full scale of 16 bits unless they go
    beyond it; floats have whichever of 1, 255 and 65535 holds them.
    """
    wide = image.convert("F")
    highest = float(wide.getextrema()[1])  # type: ignore[arg-type]
    scales = (1.0, 255.0, 65535.0) if image.mode == "F" else (65535.0,)
    scale = next((scale for scale in scales if highest <= scale), highest)
    return wide.point(lambda value: value * (255.0 / scale)).convert("L")
