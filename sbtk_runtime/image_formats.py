"""The true size of AVIF and HEIC images, and PPM files in a normal form.

Readers take an image's size from the container, but decoders allocate memory for the content. So
the size is read from the content: AV1 sequence headers, and grids that combine images.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Iterable, Iterator

import numpy as np
from numpy.typing import NDArray

from sbtk_runtime.errors import BadImage

#: A box of an ISO media file: name, start of its content, end.
Box = tuple[bytes, int, int]
Size = tuple[int, int]

# Items with an image, and items without one.
_CODED_BY_AV1, _GRID = b"av01", b"grid"
_WITHOUT_PIXELS = frozenset({b"Exif", b"mime", b"uri ", b"iden", b"tmap"})
# Libheif checks HEVC images against the container's size.
_SELF_CHECKED = frozenset({b"hvc1"})
_SEQUENCE_HEADER = 1


def read_content_sizes(data: bytes, boxes: Iterable[Box]) -> list[Size] | None:
    """Return upper bounds of the image sizes in an AVIF or HEIC file.

    Args:
        data: the bytes of the file.
        boxes: all boxes, including nested ones.

    Returns:
        Widths and heights in pixels; `None` if the content cannot be parsed.
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
    """Yield the id and type of each item."""
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
    """Yield the id of each item and its bytes."""
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
            raise ValueError("an item that is built from others")
        content = b""
        for _ in range(numbers.next(2)):
            numbers.next(more & 15 if version else 0)
            start, length = base + numbers.next(sizes >> 4), numbers.next(sizes & 15)
            # A length of 0 means up to the end.
            content += data[start : start + length] if length else data[start:]
            if len(content) > len(data):
                raise ValueError("an item of more bytes than the file")
        yield item, content


class _Numbers:
    """A reader of big-endian integers."""

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
    """Return the largest frame size of each sequence header; at least one is required."""
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
            raise ValueError("an image with timing information")
        has_delay = next_bits(1)
        for _ in range(next_bits(5) + 1):
            next_bits(12)
            if next_bits(5) > 7:
                next_bits(1)
            if has_delay and next_bits(1):
                next_bits(4)
    width_bits, height_bits = next_bits(4) + 1, next_bits(4) + 1
    width, height = next_bits(width_bits) + 1, next_bits(height_bits) + 1
    # Frames may override the size with any value of that many bits.
    return (width, height) if is_reduced else (1 << width_bits, 1 << height_bits)


#: Limit for files that are rewritten: decimal numbers, or samples that do not use the full scale.
MOST_REWRITTEN_BYTES = 64 << 20

_PNM_SPACE = rb"(?:\s++|#[^\r\n]*+[\r\n])++"
_PNM_HEADER = re.compile(rb"P([1-6])" + (_PNM_SPACE + rb"(\d{1,10})") * 2)
_PNM_HIGHEST = re.compile(_PNM_SPACE + rb"(\d{1,5})")
_PNM_COMMENT = re.compile(rb"#[^\r\n]*+")
_PIECE_BYTES = 1 << 20

Numbers = NDArray[np.float64]


def normalise_pnm(data: bytes, check: Callable[[], None]) -> tuple[bytes, int, bool]:
    """Return a PPM, PGM or PBM with binary samples of the full scale.

    Args:
        data: the bytes of the file.
        check: called from time to time; raises if the work takes too long.

    Returns:
        The file, rewritten if necessary; the bits of a sample; and whether the samples are known
        to use the full scale.

    Raises:
        BadImage: the header or a number is damaged, or the file is too large to rewrite.
    """
    if data[1:2] in b"Ff":
        return data, 32, False
    header = _PNM_HEADER.match(data)
    if header is None:
        raise BadImage("damaged image: truncated or damaged PPM header")
    kind, width, height = (int(number) for number in header.groups())
    position, highest = header.end(), 1
    if kind not in (1, 4):
        depth = _PNM_HIGHEST.match(data, position)
        if depth is None or not 0 < int(depth.group(1)) < 65536:
            raise BadImage("damaged image: truncated or damaged PPM header")
        position, highest = depth.end(), int(depth.group(1))
    # Exactly one whitespace character precedes binary samples.
    body = memoryview(data)[position + 1 :]
    channels = 3 if kind in (3, 6) else 1
    full = 65535 if highest > 255 and channels == 1 else 255
    head = b"P%d %d %d" % (4 if kind == 4 else 6 if channels == 3 else 5, width, height)
    head += b"\n" if kind == 4 else b" %d\n" % full
    bits = 16 if full == 65535 else 8
    if kind == 4 or (kind > 4 and highest == full):
        if position > 100:
            data = b"".join([head, body])
        return data, bits, False
    samples = width * height * channels
    if samples * bits // 8 > MOST_REWRITTEN_BYTES:
        raise BadImage(
            f"{width} x {height} pixels in an unusual kind of PPM",
            f"at most {MOST_REWRITTEN_BYTES >> 20} MiB",
        )
    numbers = _binary_numbers(body, 2 if highest > 255 else 1) if kind > 4 else _digits(body, kind)
    rewritten = bytearray(head)
    room = len(head) + samples * bits // 8
    for piece in numbers:
        check()
        if kind < 4 and piece.size and piece.max() > highest:
            raise BadImage(f"damaged image: a PPM with values above its maximum of {highest}")
        scaled = np.minimum(np.rint(piece / highest * full), full)
        rewritten += scaled.astype(">u2" if full == 65535 else "u1").tobytes()
        if len(rewritten) >= room:
            break
    return bytes(rewritten[:room]), bits, True


def _binary_numbers(body: memoryview, size: int) -> Iterator[Numbers]:
    for start in range(0, len(body), _PIECE_BYTES):
        piece = body[start : start + _PIECE_BYTES]
        piece = piece[: len(piece) // size * size]
        yield np.frombuffer(piece, ">u2" if size == 2 else "u1").astype(np.float64)


def _digits(body: memoryview, kind: int) -> Iterator[Numbers]:
    """Yield the numbers of a plain PPM; those of a PBM, where 1 is black, are inverted."""
    rest = b""
    for piece in _strip_comments(body):
        if kind == 1:
            digits = b"".join(piece.split())
            _check_only(digits, b"01")
            yield np.asarray(49.0 - np.frombuffer(digits, np.uint8))
            continue
        text = rest + piece
        cut = 1 + max(text.rfind(blank) for blank in (b" ", b"\n", b"\t", b"\r"))
        text, rest = text[:cut], text[cut:]
        if len(rest) > 10:
            raise BadImage("damaged image: a PPM with numbers that are too long")
        yield _from_text(text)
    yield _from_text(rest)


def _from_text(text: bytes) -> Numbers:
    """Return the numbers in a text; five times as fast as numpy's own parser."""
    _check_only(text, b"0123456789 \t\r\n\v\f")
    digits = np.frombuffer(text, np.uint8) - 48
    edges = np.flatnonzero(np.diff(digits < 10, prepend=False, append=False))
    starts, ends = edges[::2], edges[1::2]
    lengths = ends - starts
    numbers = np.zeros(len(ends))
    longest = int(lengths.max()) if lengths.size else 0
    if longest > 10:
        raise BadImage("damaged image: a PPM with numbers that are too long")
    for place in range(longest):
        has = lengths > place
        numbers[has] += digits[ends[has] - 1 - place] * 10.0**place
    return numbers


def _check_only(text: bytes, allowed: bytes) -> None:
    if text.translate(None, allowed):
        raise BadImage("damaged image: a plain PPM with characters that are not digits")


def _strip_comments(body: memoryview) -> Iterator[bytes]:
    """Yield a text in pieces, without comments."""
    is_comment = False
    for start in range(0, len(body), _PIECE_BYTES):
        piece = bytes(body[start : start + _PIECE_BYTES])
        if is_comment:
            end = _LINE_END.search(piece)
            if end is None:
                continue
            piece = piece[end.start() :]
        last_line = piece[max(piece.rfind(b"\r"), piece.rfind(b"\n")) + 1 :]
        is_comment = b"#" in last_line
        yield _PNM_COMMENT.sub(b"", piece)


_LINE_END = re.compile(rb"[\r\n]")
