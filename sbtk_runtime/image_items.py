"""How large the images in an AVIF or HEIC file really are, whatever its container says.

Readers take the size from the container, and decoders the memory for the content. So the content
is looked at here: the sequence headers of AV1, and the grids that images are put together by.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator

#: A box of an ISO media file: name, start of its content, end.
Box = tuple[bytes, int, int]
Size = tuple[int, int]

# What holds an image of its own, and what holds none.
_CODED_BY_AV1, _GRID = b"av01", b"grid"
_WITHOUT_PIXELS = frozenset({b"Exif", b"mime", b"uri ", b"iden", b"tmap"})
# Libheif holds images of HEVC to the size that the container says.
_SELF_CHECKED = frozenset({b"hvc1"})
_SEQUENCE_HEADER = 1


def content_sizes(data: bytes, boxes: Iterable[Box]) -> list[Size] | None:
    """Returns at least the sizes that the content of an AVIF or HEIC file tells.

    Args:
        data: the bytes of the file.
        boxes: all of them, those inside others too.

    Returns:
        Widths and heights in pixels; `None` if the content cannot be followed, so that nothing is
        known of it.
    """
    found: dict[bytes, Box] = {}
    for box in boxes:
        if box[0] in (b"moov", b"meta", b"iloc", b"iinf", b"idat"):
            if box[0] == b"moov" or box[0] in found:
                return None
            found[box[0]] = box
    if not {b"iloc", b"iinf"} <= found.keys():
        return None
    try:
        kinds = dict(_item_kinds(data, found[b"iinf"]))
        contents = dict(_item_contents(data, found[b"iloc"], found.get(b"idat")))
        sizes: list[Size] = []
        for item, kind in kinds.items():
            if kind == _CODED_BY_AV1:
                sizes += _av1_sizes(contents[item])
            elif kind == _GRID:
                sizes.append(_grid_size(contents[item]))
            elif kind not in _WITHOUT_PIXELS | _SELF_CHECKED:
                return None
    except (struct.error, IndexError, KeyError, ValueError):
        return None
    return sizes


def _item_kinds(data: bytes, box: Box) -> Iterator[tuple[int, bytes]]:
    """Yields the id and the kind of each item."""
    position = box[1] + (6 if data[box[1]] == 0 else 8)
    while position + 8 <= box[2]:
        length, name = struct.unpack_from(">I4s", data, position)
        if length < 8 or name != b"infe":
            raise ValueError("not an entry of an item")
        version = data[position + 8]
        if version not in (2, 3):
            raise ValueError("an entry without a kind")
        layout = ">HH4s" if version == 2 else ">IH4s"
        item, _, kind = struct.unpack_from(layout, data, position + 12)
        yield item, kind
        position += length


def _item_contents(data: bytes, box: Box, idat: Box | None) -> Iterator[tuple[int, bytes]]:
    """Yields the id of each item and its bytes."""
    version, sizes, more = data[box[1]], data[box[1] + 4], data[box[1] + 5]
    numbers = _Numbers(data, box[1] + 6, box[2])
    id_bytes = 4 if version == 2 else 2
    for _ in range(numbers.next(id_bytes)):
        item = numbers.next(id_bytes)
        method = numbers.next(2) & 15 if version else 0
        numbers.next(2)
        base = numbers.next(more >> 4)
        if method == 1 and idat is not None:
            base += idat[1]
        elif method:
            raise ValueError("an item that is put together from others")
        content = b""
        for _ in range(numbers.next(2)):
            numbers.next(more & 15 if version else 0)
            start, length = base + numbers.next(sizes >> 4), numbers.next(sizes & 15)
            # One of no length goes on to the end.
            content += data[start : start + length] if length else data[start:]
            if len(content) > len(data):
                raise ValueError("an item of more bytes than the file")
        yield item, content


class _Numbers:
    """Whole numbers of so many bytes each, one after the other."""

    def __init__(self, data: bytes, start: int, end: int) -> None:
        self._data, self._at, self._end = data, start, end

    def next(self, size: int) -> int:
        if self._at + size > self._end:
            raise ValueError("cut off")
        self._at += size
        return int.from_bytes(self._data[self._at - size : self._at], "big")


def _grid_size(content: bytes) -> Size:
    width, height = struct.unpack_from(">II" if content[1] & 1 else ">HH", content, 4)
    return width, height


def _av1_sizes(content: bytes) -> list[Size]:
    """Returns the largest size of a frame by each sequence header; there must be one."""
    sizes: list[Size] = []
    position = 0
    while position < len(content):
        head = content[position]
        position += 2 if head & 4 else 1
        length = len(content) - position
        if head & 2:
            length, shift = 0, 0
            while True:
                piece = content[position]
                position += 1
                length |= (piece & 127) << shift
                shift += 7
                if piece < 128:
                    break
                if shift > 56:
                    raise ValueError("a length of too many bytes")
        if head >> 3 & 15 == _SEQUENCE_HEADER:
            sizes.append(_sequence_size(content[position : position + min(length, 64)]))
        position += length
    if not sizes:
        raise ValueError("no sequence header")
    return sizes


def _sequence_size(header: bytes) -> Size:
    bits = int.from_bytes(header.ljust(64, b"\0"), "big")
    left = 64 * 8

    def next_bits(count: int) -> int:
        nonlocal left
        left -= count
        return bits >> left & ((1 << count) - 1)

    next_bits(4)
    if is_reduced := next_bits(1):
        next_bits(5)
    else:
        if next_bits(1):
            raise ValueError("a picture that is timed")
        has_delay = next_bits(1)
        for _ in range(next_bits(5) + 1):
            next_bits(12)
            if next_bits(5) > 7:
                next_bits(1)
            if has_delay and next_bits(1):
                next_bits(4)
    width_bits, height_bits = next_bits(4) + 1, next_bits(4) + 1
    width, height = next_bits(width_bits) + 1, next_bits(height_bits) + 1
    # A frame that is not of the reduced kind may tell any size that its bits can.
    return (width, height) if is_reduced else (1 << width_bits, 1 << height_bits)
