"""Conversion of pixels to 8-bit sRGB: wide samples, transparent colours, colour profiles."""

from __future__ import annotations

import functools
import io
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageCms, ImageFile, TiffImagePlugin

from sbtk_runtime.errors import BadImage
from sbtk_runtime.image_limits import MOST_METADATA_BYTES

Grey = NDArray[np.uint8]

# The scale of integer samples is the smallest of these that holds the maximum: cameras and scanners
# store 10, 12 or 14 bits in 16.
_WHOLE_SCALES = (255.0, 1023.0, 4095.0, 16383.0, 65535.0)
# Floats slightly above 1 are highlights of a scale from 0 to 1.
_HIGHLIGHTS = 8.0
_BAND_PIXELS = 1 << 19

# Profiles whose mean difference to sRGB is larger, in levels of 255, are converted. Common sRGB
# profiles differ by less than 1, Display P3 by 9, ProPhoto by 40.
_SAME_LEVELS = 2.5

_PLANAR = 284  # a tag of TIFF


def to_rgb_or_rgba(image: Image.Image, *, keeps_grey: bool = False) -> Image.Image:
    """Return the image in sRGB, in mode RGB, or RGBA if any pixel is transparent.

    With `keeps_grey`, an image in mode L without transparency stays as it is.
    """
    image = _in_srgb(image)
    is_done = image.mode == "RGB" or (keeps_grey and image.mode == "L")
    if is_done and "transparency" not in image.info:
        return image
    if image.mode == "La":
        image = image.convert("LA")
    if not image.has_transparency_data:
        return image.convert("RGB")
    rgba = image if image.mode == "RGBA" else image.convert("RGBA")
    lowest_alpha = rgba.getchannel("A").getextrema()[0]
    return rgba if isinstance(lowest_alpha, int) and lowest_alpha < 255 else rgba.convert("RGB")


def is_wide(image: Image.Image) -> bool:
    """Whether the samples are floats or integers of more than eight bits."""
    return image.mode.startswith(("I", "F"))


def to_eight_bit_grey(
    image: Image.Image, *, is_scaled: bool, is_unsigned: bool, is_inverted: bool
) -> Image.Image:
    """Convert a grey image of wide samples to mode L, or LA if any pixel is transparent.

    Pillow's own conversion clips at 255. Integers are scaled by the smallest of 8, 10, 12, 14 and
    16 bits that holds the maximum; floats by 1, or by the smallest of these scales.

    Args:
        image: an image for which `is_wide` is true.
        is_scaled: whether integers are known to use the full scale of 16 bits.
        is_unsigned: whether 32-bit integers are unsigned.
        is_inverted: whether 0 is white.

    Raises:
        BadImage: no sample is a number.
    """
    lowest, highest = _range(image, is_unsigned)
    offset, scale = 0.0, _scale(highest, is_float=image.mode == "F", is_scaled=is_scaled)
    if lowest < 0 and -lowest <= highest * 16:
        # Signed samples, such as from scanners: use the range from lowest to highest.
        offset, scale = lowest, highest - lowest
    transparent = image.info.get("transparency")
    grey = np.empty((image.height, image.width), dtype=np.uint8)
    alpha = None
    row = 0
    for band in _bands(image, is_unsigned):
        rows = slice(row, row + len(band))
        row += len(band)
        # The same steps as Pillow's point and convert, which older galleries were made with.
        wide = np.nan_to_num(band.astype(np.float32), nan=0.0, posinf=highest, neginf=lowest)
        levels = ((wide.astype(np.float64) - offset) * (255.0 / scale)).astype(np.float32)
        grey[rows] = np.clip(levels, 0.0, 255.0).astype(np.uint8)
        if isinstance(transparent, int):
            alpha = np.empty_like(grey) if alpha is None else alpha
            alpha[rows] = np.where(band == transparent, 0, 255)
    if is_inverted:
        np.subtract(255, grey, out=grey)
    made = Image.fromarray(grey)
    if alpha is not None and alpha.min() == 0:
        made.putalpha(Image.fromarray(alpha))
    if "icc_profile" in image.info:
        made.info["icc_profile"] = image.info["icc_profile"]
    return made


def from_used_bits(pixels: Image.Image, reopen: Callable[[], ImageFile.ImageFile]) -> Image.Image:
    """Return a 16-bit colour image, of which Pillow decodes only the high bytes.

    The low bytes are decoded too where they matter: if only 8 to 14 bits are used, so that the
    image would be nearly black, and if one exact colour is transparent. `reopen` opens its file
    again.

    Raises:
        BadImage: the low bytes cannot be decoded.
    """
    if pixels.mode not in ("RGB", "RGBA"):
        return pixels
    colour = pixels.info.get("transparency")
    if colour is None and _brightest(pixels) >= 64:
        return pixels
    again = reopen()
    if isinstance(again, TiffImagePlugin.TiffImageFile) and again.tag_v2.get(_PLANAR, 1) == 2:
        # Libtiff cannot select bytes of separate planes.
        raise _few_bits()
    again.tile = [tile._replace(args=_of_lower_bytes(tile.args)) for tile in again.tile]
    again.load()
    if isinstance(colour, tuple):
        return _mask_colour(pixels, again, colour)
    return _combine_bytes(pixels, again)


def _brightest(image: Image.Image) -> int:
    """Return the highest value of red, green and blue in an image of eight bits."""
    return max(int(np.asarray(image.getchannel(channel)).max()) for channel in range(3))


def _combine_bytes(high: Image.Image, low: Image.Image) -> Image.Image:
    """Convert a dark 16-bit colour image to eight bits, scaled by the bits it uses.

    Args:
        high: the high bytes of all samples, RGB or RGBA; modified and returned.
        low: the low bytes.
    """
    highest = _brightest(high)
    bits = 8 + highest.bit_length()
    full = next(scale for scale in _WHOLE_SCALES if (1 << bits) - 1 <= scale)
    most_alpha = 0
    for box in _boxes(high):
        band = np.array(high.crop(box), dtype=np.uint8)
        lower = np.asarray(low.crop(box), dtype=np.uint8)
        wide = band[..., :3].astype(np.float64) * 256 + lower[..., :3]
        band[..., :3] = np.minimum(wide * (255.0 / full), 255.0)
        if high.mode == "RGBA":
            most_alpha = max(most_alpha, int(band[..., 3].max()))
        high.paste(Image.fromarray(band), box)
    if 0 < most_alpha < 64:
        # Alpha uses as few bits.
        high.putalpha(high.getchannel("A").point(lambda alpha: 255 if alpha else 0))
    return high


def _mask_colour(high: Image.Image, low: Image.Image, colour: tuple[int, ...]) -> Image.Image:
    """Return the image in RGBA, transparent where 16-bit samples equal a colour."""
    is_colour = np.ones((high.height, high.width), dtype=bool)
    for channel, value in enumerate(colour):
        is_colour &= np.asarray(high.getchannel(channel)) == value >> 8
        is_colour &= np.asarray(low.getchannel(channel)) == value & 255
    made = high.convert("RGB")
    made.info.pop("transparency", None)
    made.putalpha(Image.fromarray(np.where(is_colour, 0, 255).astype(np.uint8)))
    return made


def _of_lower_bytes(args: tuple[Any, ...] | str | None) -> tuple[Any, ...] | str:
    rawmode = args[0] if isinstance(args, tuple) else args
    here = "L" if sys.byteorder == "little" else "B"
    base, order = str(rawmode)[:-1], str(rawmode)[-1:].replace("N", here)
    if not base.endswith(";16") or base.startswith("LA"):
        raise _few_bits()
    swapped = base + ("B" if order == "L" else "L")
    return (swapped, *args[1:]) if isinstance(args, tuple) else swapped


def _few_bits() -> BadImage:
    return BadImage("a 16-bit image that uses only the low bits", "samples of the full scale")


def _bands(image: Image.Image, is_unsigned: bool) -> Iterator[NDArray[Any]]:
    for box in _boxes(image):
        band = np.asarray(image.crop(box))
        yield band.view(np.uint32) if is_unsigned and band.dtype == np.int32 else band


def _boxes(image: Image.Image) -> Iterator[tuple[int, int, int, int]]:
    height = max(1, _BAND_PIXELS // image.width)
    for top in range(0, image.height, height):
        yield (0, top, image.width, min(top + height, image.height))


def _range(image: Image.Image, is_unsigned: bool) -> tuple[float, float]:
    lowest, highest = np.inf, -np.inf
    for band in _bands(image, is_unsigned):
        real = band[np.isfinite(band)] if band.dtype.kind == "f" else band
        if real.size:
            lowest = min(lowest, float(real.min()))
            highest = max(highest, float(real.max()))
    if highest < lowest:
        raise BadImage("an image of floating-point samples, none of which is a number")
    return lowest, highest


def _scale(highest: float, *, is_float: bool, is_scaled: bool) -> float:
    if is_float and highest <= _HIGHLIGHTS:
        return max(1.0, highest)
    if is_scaled:
        return max(65535.0, highest)
    return next((scale for scale in _WHOLE_SCALES if highest <= scale), highest)


def _in_srgb(image: Image.Image) -> Image.Image:
    profile = image.info.get("icc_profile")
    if not profile or len(profile) > MOST_METADATA_BYTES:
        return image
    mode = {"RGB": "RGB", "RGBA": "RGB", "L": "L", "LA": "L", "CMYK": "CMYK"}.get(image.mode)
    if mode is None or "transparency" in image.info:
        return image
    transform = _transform(bytes(profile), mode)
    if transform is None:
        return image
    converted = ImageCms.applyTransform(image.convert(mode), transform)
    assert converted is not None
    if image.mode in ("RGBA", "LA"):
        converted.putalpha(image.getchannel("A"))
    return converted


@functools.lru_cache(maxsize=32)
def _transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """Return the transform from a profile to sRGB; `None` if it is sRGB or unreadable."""
    try:
        transform = ImageCms.buildTransform(
            ImageCms.ImageCmsProfile(io.BytesIO(profile)),
            _srgb(),
            mode,
            "RGB",
            ImageCms.Intent.RELATIVE_COLORIMETRIC,
            ImageCms.Flags.BLACKPOINTCOMPENSATION,
        )
        samples = _samples(mode)
        shown = np.asarray(ImageCms.applyTransform(samples, transform), dtype=np.int16)
    # Damaged metadata do not make good pixels unusable.
    except Exception:
        return None
    plain = np.asarray(samples.convert("RGB"), dtype=np.int16)
    return transform if float(np.abs(shown - plain).mean()) > _SAME_LEVELS else None


@functools.lru_cache(maxsize=1)
def _srgb() -> ImageCms.ImageCmsProfile:
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))


def _samples(mode: str) -> Image.Image:
    """Return an image of colours that span a mode."""
    if mode == "L":
        return Image.fromarray(np.arange(256, dtype=np.uint8)[None])
    steps = np.linspace(0, 255, 6).round().astype(np.uint8)
    grid = np.stack(np.meshgrid(*[steps] * len(mode), indexing="ij"), axis=-1)
    return Image.fromarray(grid.reshape(1, -1, len(mode)), mode)
