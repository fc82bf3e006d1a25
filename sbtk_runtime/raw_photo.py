"""Camera RAW files: detection, and decoding of the embedded JPEG or the sensor data.

Most RAW files are TIFF files whose first directory is a thumbnail, so an image reader would see a
small image. They are detected by tags that only RAW has, never by name. If the embedded image is
missing or tiny, the sensor data are developed at half size.
"""

from __future__ import annotations

import contextlib
import io
import struct
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from PIL import Image

from sbtk_runtime.errors import BadImage, LargeImage
from sbtk_runtime.image_feed import MAX_APART_BYTES

SUFFIXES = (
    frozenset({".3fr", ".ari", ".arw", ".bay", ".cap", ".cr2", ".cr3", ".crw", ".dcr", ".dng"})
    | {".erf", ".fff", ".gpr", ".iiq", ".k25", ".kdc", ".mef", ".mos", ".mrw", ".nef", ".nrw"}
    | {".orf", ".pef", ".raf", ".raw", ".rw2", ".rwl", ".sr2", ".srf", ".srw", ".x3f"}
)
#: Smallest shorter side of an embedded image that is used.
MIN_PREVIEW_PX = 224

_SIGNATURES = (b"FUJIFILMCCD-RAW", b"FOVb", b"\0MRM", b"IIRO", b"IIRS", b"MMOR", b"IIU\0")
_CR2 = (b"CR\2\0", b"RawT")
_SUB_IFDS, _PHOTOMETRIC, _DNG_VERSION, _ORIENTATION = 330, 262, 50706, 274
_SENSOR_DATA = (32803, 34892)
_MAX_DIRECTORIES, _MAX_ENTRIES = 24, 512
# By LibRaw's orientation codes.
_TURNS = {
    3: Image.Transpose.ROTATE_180,
    5: Image.Transpose.ROTATE_90,
    6: Image.Transpose.ROTATE_270,
}
_UNDONE = {
    Image.Transpose.ROTATE_90: Image.Transpose.ROTATE_270,
    Image.Transpose.ROTATE_270: Image.Transpose.ROTATE_90,
}
# Per sensor pixel: 16 bits, a quarter of the pixels in four colours, and RGB.
_DEVELOP_BYTES = 6

#: Decodes the bytes of an image file, as `images.decode` does.
Decode = Callable[[bytes], Image.Image]


def is_raw(data: bytes) -> bool:
    """Return whether the first kilobytes of a file are those of a camera RAW."""
    if data.startswith(_SIGNATURES) or data[4:12] == b"ftypcrx " or data[6:14] == b"HEAPCCDR":
        return True
    if data[:4] not in (b"II*\0", b"MM\0*"):
        return False
    return data[8:12] in _CR2 or any(_is_raw_entry(*entry) for entry in _tiff_entries(data))


def decode_raw(data: bytes, decode: Decode, max_bytes: int) -> Image.Image:
    """Return the image in a camera RAW, upright.

    Args:
        data: the bytes of the file.
        decode: decodes the embedded JPEG.
        max_bytes: memory that developing may take if no embedded image is usable.

    Raises:
        LargeImage: developing would take more.
        BadImage: rawpy is not installed, or the file is damaged, unsupported or too large.
    """
    with _open(data) as raw:
        shown = _preview(raw, decode)
        if shown is not None and min(shown.size) >= MIN_PREVIEW_PX:
            return shown
        try:
            return _develop(raw, max_bytes)
        except BadImage:
            if shown is not None:
                return shown
            raise


def estimate_raw_memory(
    data: bytes, memory_of: Callable[[bytes], int], most_bytes: int
) -> tuple[int, bool]:
    """Return the estimated peak memory of `decode_raw` in bytes, and whether it will develop.

    Developing cannot be interrupted, except by ending its process. If it would take more than
    `most_bytes`, an embedded image of any size is used.

    Raises:
        BadImage: as `decode_raw`.
    """
    with _open(data) as raw:
        embedded, needed = _read_embedded(raw), _develop_bytes(raw)
        with contextlib.suppress(Exception):  # an unusable one: `decode_raw` will develop
            if isinstance(embedded, bytes):
                size, shown = _read_stored(embedded)[0], len(embedded) + memory_of(embedded)
            elif embedded is not None:
                size, shown = embedded.size, 4 * embedded.width * embedded.height
            if embedded is not None and (min(size) >= MIN_PREVIEW_PX or needed > most_bytes):
                return shown, False
        return needed, True


def _is_raw_entry(tag: int, value: int) -> bool:
    return tag == _DNG_VERSION or (tag == _PHOTOMETRIC and value in _SENSOR_DATA)


def _tiff_entries(data: bytes) -> Iterator[tuple[int, int]]:
    """Yield tags and first values of a TIFF's directories and their subdirectories."""
    order = "<" if data[:2] == b"II" else ">"
    to_visit = [_number(data, 4, order + "I")]
    visited: set[int] = set()
    while to_visit and len(visited) < _MAX_DIRECTORIES:
        at = to_visit.pop(0)
        if not at or at in visited:
            continue
        visited.add(at)
        count = min(_number(data, at, order + "H"), _MAX_ENTRIES)
        for entry in range(at + 2, at + 2 + 12 * count, 12):
            tag, kind = _number(data, entry, order + "H"), _number(data, entry + 2, order + "H")
            value = _number(data, entry + 8, order + ("H" if kind == 3 else "I"))
            yield tag, value
            if tag == _SUB_IFDS:
                below = min(_number(data, entry + 4, order + "I"), _MAX_DIRECTORIES)
                to_visit += (
                    [value]
                    if below == 1
                    else [_number(data, value + 4 * index, order + "I") for index in range(below)]
                )
        to_visit.append(_number(data, at + 2 + 12 * count, order + "I"))


def _number(data: bytes, at: int, layout: str) -> int:
    """Return an integer; 0 beyond the end."""
    try:
        return int(struct.unpack_from(layout, data, at)[0])
    except struct.error:
        return 0


def _open(data: bytes) -> Any:
    try:
        import rawpy
    except ImportError as problem:
        raise BadImage(
            "a camera RAW, and rawpy is not installed",
            "the extra 'photos'",
            'pip install "sbtk[photos]"',
        ) from problem
    try:
        return rawpy.imread(io.BytesIO(data))
    # LibRaw's own errors, and other exceptions of its binding on damaged files.
    except Exception as problem:
        raise _unreadable(problem) from problem


def _unreadable(problem: Exception) -> BadImage:
    reason = problem.args[0] if problem.args else type(problem).__name__
    text = reason.decode("ascii", "replace") if isinstance(reason, bytes) else str(reason)
    return BadImage(f"a camera RAW that cannot be read: {text}")


def _read_embedded(raw: Any) -> bytes | Image.Image | None:
    """Return the largest embedded image: a JPEG, or pixels."""
    import rawpy

    try:
        thumbnail = raw.extract_thumb()
        if thumbnail.format == rawpy.ThumbFormat.JPEG:
            return bytes(thumbnail.data)
        return Image.fromarray(np.ascontiguousarray(thumbnail.data, dtype=np.uint8))
    # There is no readable one; the sensor data remain.
    except Exception:
        return None


def _preview(raw: Any, decode: Decode) -> Image.Image | None:
    """Return the embedded image, upright; `None` if no readable one exists."""
    embedded = _read_embedded(raw)
    turn = _TURNS.get(raw.sizes.flip)
    if embedded is None:
        return None
    if isinstance(embedded, Image.Image):
        image, stored, is_turned = embedded.convert("RGB"), embedded.size, False
    else:
        try:
            image = decode(embedded)
            stored, orientation = _read_stored(embedded)
        # Its header or its pixels are damaged.
        except Exception:
            return None
        # LibRaw adds the camera's orientation to an embedded JPEG without its own.
        is_turned = orientation != 1
    if turn is None:
        return image
    is_wide = raw.sizes.width > raw.sizes.height
    if turn != Image.Transpose.ROTATE_180 and (stored[0] > stored[1]) != is_wide:
        # The camera has already rotated the pixels, so undo the rotation.
        return image.transpose(_UNDONE[turn]) if is_turned else image
    return image if is_turned else image.transpose(turn)


def _read_stored(jpeg: bytes) -> tuple[tuple[int, int], int]:
    """Return size and orientation from an embedded JPEG's header."""
    with Image.open(io.BytesIO(jpeg), formats=("JPEG", "MPO")) as image:
        return image.size, image.getexif().get(_ORIENTATION, 1)


def _develop_bytes(raw: Any) -> int:
    return int(raw.sizes.raw_width) * int(raw.sizes.raw_height) * _DEVELOP_BYTES


def _develop(raw: Any, max_bytes: int) -> Image.Image:
    if (needed := _develop_bytes(raw)) > max_bytes:
        raise LargeImage(
            f"a camera RAW without a preview, {raw.sizes.raw_width} x {raw.sizes.raw_height} "
            f"pixels, which takes some {needed >> 20:,} MiB to develop",
            f"at most {MAX_APART_BYTES >> 20:,} MiB",
            needed,
        )
    try:
        pixels = raw.postprocess(half_size=True, use_camera_wb=True, output_bps=8)
        return Image.fromarray(np.ascontiguousarray(pixels))
    except Exception as problem:
        raise _unreadable(problem) from problem
