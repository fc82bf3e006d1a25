"""Thumbnails for contact sheets, terminals and browsers."""

from __future__ import annotations

import base64
import io
from pathlib import Path

from PIL import Image, ImageOps

from sbtk_runtime.errors import BadImage, LargeImage
from sbtk_runtime.image_feed import decode_in_subprocess
from sbtk_runtime.images import MAX_DECODE_BYTES, OpenImage, on_white, read_image_bytes

THUMBNAIL_PX = 360
_JPEG_QUALITY = 80


def thumbnail(
    photo: Path | str | bytes,
    size_px: int = THUMBNAIL_PX,
    *,
    max_bytes: int = MAX_DECODE_BYTES,
) -> Image.Image:
    """Return a photo, upright, in RGB, with no side longer than `size_px`.

    An image that takes more than `max_bytes` to decode is decoded in a separate process.

    Raises:
        BadImage: the file cannot be read, or is not an image.
    """
    data = photo if isinstance(photo, bytes) else read_image_bytes(photo)
    try:
        decoded = OpenImage(data, at_least_px=size_px, max_bytes=max_bytes).decode().image
    except LargeImage as problem:
        return Image.fromarray(decode_in_subprocess(data, problem, "thumbnail", str(size_px))[0])
    image = on_white(decoded)
    image.thumbnail((size_px, size_px), Image.Resampling.LANCZOS)
    return image


def fit_square(photo: Path | str, size_px: int, ground: tuple[int, ...]) -> Image.Image:
    """Return the whole photo centred in a square; a plain square if it cannot be read.

    Args:
        photo: its path.
        size_px: width and height of the square; small photos are enlarged.
        ground: colour around the photo; RGB or RGBA, which is the mode of the result.
    """
    plain = Image.new("RGB" if len(ground) == 3 else "RGBA", (size_px, size_px), ground)
    try:
        image = thumbnail(photo, size_px)
    except BadImage:
        return plain
    if max(image.size) < size_px:
        image = ImageOps.contain(image, (size_px, size_px), Image.Resampling.LANCZOS)
    plain.paste(image, ((size_px - image.width) // 2, (size_px - image.height) // 2))
    return plain


def jpeg_bytes(image: Image.Image) -> bytes:
    """Return the image as a JPEG file without metadata such as EXIF, location and comments."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=_JPEG_QUALITY, optimize=True, comment=b"")
    return buffer.getvalue()


def png_bytes(image: Image.Image) -> bytes:
    """Return the image as a PNG file, in which a sketch's lines stay sharp."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def data_uri(data: bytes, media_type: str) -> str:
    """Return a `data:` URI for the `src` of an `img` element."""
    return f"data:{media_type};base64,{base64.b64encode(data).decode('ascii')}"
