"""The metadata of a photo: date, camera and place.

Metadata are untrusted: they may be absurd, damaged or malicious. Implausible values are left out,
and texts are plain, short and on one line.
"""

from __future__ import annotations

import contextlib
import datetime
import io
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO

from PIL import Image, TiffImagePlugin

from sbtk_runtime.files import printable_text
from sbtk_runtime.images import FORMATS

_EXIF_IFD, _GPS_IFD = 0x8769, 0x8825
_MAKE, _MODEL, _ORIENTATION, _CHANGED = 0x010F, 0x0110, 0x0112, 0x0132
_TAKEN, _DIGITIZED, _LENS = 0x9003, 0x9004, 0xA434
_EXPOSURE, _F_NUMBER, _ISO, _FOCAL = 0x829A, 0x829D, 0x8827, 0x920A
_LATITUDE_REF, _LATITUDE, _LONGITUDE_REF, _LONGITUDE = 1, 2, 3, 4

# No photograph is older.
_FIRST_YEAR = 1826
_MOST_LETTERS = 80


@dataclass(frozen=True)
class PhotoDetails:
    """The plausible metadata of a photo; `None` where there are none.

    Attributes:
        width_px, height_px: as the photo is shown, upright.
        taken: local time, without a time zone.
        camera: maker and model.
        lens: its name.
        exposure: such as "1/250 s, f/2.8, ISO 400, 35 mm".
        latitude, longitude: degrees, positive to the north and the east.
    """

    width_px: int | None = None
    height_px: int | None = None
    taken: datetime.datetime | None = None
    camera: str | None = None
    lens: str | None = None
    exposure: str | None = None
    latitude: float | None = None
    longitude: float | None = None


def read_taken(file: BinaryIO) -> datetime.datetime | None:
    """Return when a photo was taken, in local time; `None` if its file has no date.

    Only the head of the file is read.
    """
    return _read(file).taken


def read_details(data: bytes) -> PhotoDetails:
    """Return the metadata of an image file; empty ones if it has none, or cannot be read."""
    return _read(io.BytesIO(data))


def _read(file: BinaryIO) -> PhotoDetails:
    try:
        with Image.open(file, formats=_formats()) as image:
            size, exif = image.size, _exif_of(image)
            base = _tags(exif)
            photo, place = _tags(_ifd(exif, _EXIF_IFD)), _tags(_ifd(exif, _GPS_IFD))
    # Pillow's parsers raise exceptions of many types on damaged files.
    except Exception:
        return PhotoDetails()
    width, height = size[::-1] if base.get(_ORIENTATION) in (5, 6, 7, 8) else size
    latitude, longitude = _place(place)
    dates = (_date(tags.get(tag)) for tags, tag in _date_tags(base, photo))
    return PhotoDetails(
        width_px=width,
        height_px=height,
        taken=next((date for date in dates if date is not None), None),
        camera=_camera(_text(base.get(_MAKE)), _text(base.get(_MODEL))),
        lens=_text(photo.get(_LENS)),
        exposure=_exposure(photo),
        latitude=latitude,
        longitude=longitude,
    )


def _formats() -> list[str]:
    try:
        import pillow_heif

        pillow_heif.register_heif_opener()
    except ImportError:
        return list(FORMATS)
    return [*FORMATS, "HEIF"]


def _exif_of(image: Image.Image) -> Image.Exif:
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        return image.getexif()
    exif = Image.Exif()
    # `getexif` would decode a PNG to look for EXIF after its pixels.
    content = image.info.get("exif")
    if isinstance(content, bytes):
        exif.load(content)
    return exif


def _ifd(exif: Image.Exif, tag: int) -> Mapping[int, Any]:
    try:
        return exif.get_ifd(tag)
    except Exception:
        return {}


def _tags(found: Mapping[int, Any]) -> dict[int, Any]:
    """Return the tags that can be read: Pillow parses each when it is first used."""
    tags = {}
    for tag in list(found):
        try:
            tags[tag] = found[tag]
        except Exception:  # noqa: S112 -- one damaged tag does not spoil the others
            continue
    return tags


def _date_tags(
    base: Mapping[int, Any], photo: Mapping[int, Any]
) -> list[tuple[Mapping[int, Any], int]]:
    return [(photo, _TAKEN), (photo, _DIGITIZED), (base, _CHANGED)]


def _date(value: Any) -> datetime.datetime | None:
    try:
        date = datetime.datetime.strptime(str(value).strip("\0 ")[:19], "%Y:%m:%d %H:%M:%S")
    except ValueError:
        return None
    # A clock may be set to another time zone.
    latest = datetime.datetime.now() + datetime.timedelta(days=1)
    return date if date.year >= _FIRST_YEAR and date <= latest else None


def _text(value: Any) -> str | None:
    if isinstance(value, bytes):
        value = value.decode("utf-8", "replace")
    if not isinstance(value, str):
        return None
    # Pillow assumes that texts are Latin-1; many cameras and programs write UTF-8.
    with contextlib.suppress(UnicodeError):
        value = value.encode("latin-1").decode("utf-8")
    text = printable_text(value.partition("\0")[0].strip())
    return text[:_MOST_LETTERS] or None


def _camera(make: str | None, model: str | None) -> str | None:
    """Return maker and model; many models already start with their maker's name."""
    if make is None or model is None:
        return make or model
    if model.lower().startswith(make.lower().split()[0]):
        return model
    return f"{make} {model}"[:_MOST_LETTERS]


def _number(value: Any) -> float | None:
    """Return a positive finite number, or `None`."""
    if isinstance(value, tuple) and value:
        value = value[0]
    try:
        number = float(value)
    except (TypeError, ValueError, ZeroDivisionError, OverflowError):
        return None
    return number if math.isfinite(number) and number > 0 else None


def _exposure(photo: Mapping[int, Any]) -> str | None:
    parts = []
    if (seconds := _number(photo.get(_EXPOSURE))) is not None and 1e-6 < seconds < 1e5:
        parts.append(f"1/{1 / seconds:.0f} s" if seconds < 0.4 else f"{seconds:g} s")
    if (stop := _number(photo.get(_F_NUMBER))) is not None and stop < 1000:
        parts.append(f"f/{stop:.3g}")
    if (iso := _number(photo.get(_ISO))) is not None and iso < 1e8:
        parts.append(f"ISO {iso:.0f}")
    if (focal := _number(photo.get(_FOCAL))) is not None and focal < 1e5:
        parts.append(f"{focal:.3g} mm" if focal < 1000 else f"{focal:.0f} mm")
    return ", ".join(parts) or None


def _place(gps: Mapping[int, Any]) -> tuple[float | None, float | None]:
    """Return latitude and longitude; neither at 0, 0, where cameras without a fix are."""
    latitude = _degrees(gps.get(_LATITUDE), gps.get(_LATITUDE_REF), "NS", 90)
    longitude = _degrees(gps.get(_LONGITUDE), gps.get(_LONGITUDE_REF), "EW", 180)
    if latitude is None or longitude is None or (latitude == 0 and longitude == 0):
        return None, None
    return latitude, longitude


def _degrees(value: Any, ref: Any, letters: str, most: float) -> float | None:
    """Return signed degrees; `None` if `ref` names neither side, of which the first is positive."""
    side = letters.find((_text(ref) or "?")[0].upper())
    if side < 0 or not isinstance(value, tuple) or not 1 <= len(value) <= 3:
        return None
    try:
        parts = [float(part) for part in value]
    except (TypeError, ValueError, ZeroDivisionError, OverflowError):
        return None
    if not all(math.isfinite(part) and part >= 0 for part in parts):
        return None
    degrees = sum((part / 60.0**power for power, part in enumerate(parts)), start=0.0)
    if degrees > most:
        return None
    return float(round(-degrees if side else degrees, 6))
