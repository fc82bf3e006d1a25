"""A small, valid DNG, written by hand: sensor data, with or without a JPEG preview."""

from __future__ import annotations

import io
import struct

import numpy as np
from PIL import Image

LEFT, RIGHT = (30, 30, 200), (200, 30, 30)

_SHORT, _LONG, _BYTE, _ASCII, _RATIONAL, _SIGNED_RATIONAL = 3, 4, 1, 2, 5, 10
_LAYOUTS = {_SHORT: "H", _LONG: "I", _BYTE: "B", _RATIONAL: "I", _SIGNED_RATIONAL: "i"}
_IDENTITY = (1, 1, 0, 1, 0, 1, 0, 1, 1, 1, 0, 1, 0, 1, 0, 1, 1, 1)


def two_colours(size: tuple[int, int], orientation: int | None = None) -> bytes:
    """Return a JPEG, blue on the left and red on the right, with an orientation in its Exif."""
    image = Image.new("RGB", size, RIGHT)
    image.paste(LEFT, (0, 0, size[0] // 2, size[1]))
    exif = Image.Exif()
    if orientation is not None:
        exif[274] = orientation
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=95, exif=exif)
    return buffer.getvalue()


def tiny_dng(
    preview: bytes | None = None, orientation: int = 1, size: tuple[int, int] = (384, 256)
) -> bytes:
    """Return a DNG whose mosaic is blue on the left and red on the right, before rotation."""
    width, height = size
    mosaic = np.full((height, width), 8000, dtype="<u2")
    mosaic[0::2, 0::2] = np.where(np.arange(0, width, 2) < width // 2, 2000, 50000)
    mosaic[1::2, 1::2] = np.where(np.arange(1, width, 2) < width // 2, 50000, 2000)
    sensor: list[_Entry] = [
        (254, _LONG, (0,)),
        (256, _LONG, (width,)),
        (257, _LONG, (height,)),
        (258, _SHORT, (16,)),
        (259, _SHORT, (1,)),
        (262, _SHORT, (32803,)),
        (273, _LONG, mosaic.tobytes()),
        (277, _SHORT, (1,)),
        (278, _LONG, (height,)),
        (279, _LONG, (mosaic.nbytes,)),
        (33421, _SHORT, (2, 2)),
        (33422, _BYTE, (0, 1, 1, 2)),
        (50717, _LONG, (65535,)),
    ]
    camera: list[_Entry] = [
        (271, _ASCII, b"sbtk\0"),
        (272, _ASCII, b"tiny\0"),
        (274, _SHORT, (orientation,)),
        (50706, _BYTE, (1, 4, 0, 0)),
        (50707, _BYTE, (1, 1, 0, 0)),
        (50708, _ASCII, b"sbtk tiny\0"),
        (50721, _SIGNED_RATIONAL, _IDENTITY),
        (50728, _RATIONAL, (1, 1, 1, 1, 1, 1)),
        (50778, _SHORT, (21,)),
    ]
    if preview is None:
        return _tiff(sorted(camera + sensor, key=lambda entry: entry[0]))
    with Image.open(io.BytesIO(preview)) as image:
        shown_width, shown_height = image.size
    first: list[_Entry] = [
        (254, _LONG, (1,)),
        (256, _LONG, (shown_width,)),
        (257, _LONG, (shown_height,)),
        (258, _SHORT, (8, 8, 8)),
        (259, _SHORT, (7,)),
        (262, _SHORT, (6,)),
        (273, _LONG, preview),
        (277, _SHORT, (3,)),
        (278, _LONG, (shown_height,)),
        (279, _LONG, (len(preview),)),
        (330, _LONG, sensor),
    ]
    return _tiff(sorted(camera + first, key=lambda entry: entry[0]))


_Entry = tuple[int, int, "tuple[int, ...] | bytes | list[_Entry]"]


def _tiff(entries: list[_Entry]) -> bytes:
    out = bytearray(b"II*\0\x08\0\0\0")
    _append_directory(out, entries)
    return bytes(out)


def _append_directory(out: bytearray, entries: list[_Entry]) -> None:
    """Append a directory, and behind it what its entries point to."""
    at = len(out)
    out += bytes(2 + 12 * len(entries) + 4)
    struct.pack_into("<H", out, at, len(entries))
    for index, (tag, kind, value) in enumerate(entries):
        if isinstance(value, list):
            count, field = 1, struct.pack("<I", len(out))
            _append_directory(out, value)
        elif isinstance(value, bytes) and kind == _LONG:  # a strip
            count, field = 1, struct.pack("<I", len(out))
            out += value
        else:
            content = (
                value
                if isinstance(value, bytes)
                else struct.pack(f"<{len(value)}{_LAYOUTS[kind]}", *value)
            )
            is_fraction = kind in (_RATIONAL, _SIGNED_RATIONAL)
            count = len(value) // 2 if is_fraction else len(value)
            field = content
            if len(content) > 4:
                field = struct.pack("<I", len(out))
                out += content
        out += bytes(len(out) % 2)
        struct.pack_into("<HHI4s", out, at + 2 + 12 * index, tag, kind, count, field)
