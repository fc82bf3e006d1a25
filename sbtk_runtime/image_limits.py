"""Checks of an image file's bytes before a decoder sees them.

A small file can keep a parser busy for minutes: a hundred thousand metadata segments, a thousand
scans, millions of strips, a comment of megabytes. This module counts the structure, removes what
decoding does not need, and reads the size where a parser would allocate memory to find it.
"""

from __future__ import annotations

import itertools
import re
import struct
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from sbtk_runtime.errors import BadImage
from sbtk_runtime.image_formats import normalise_pnm, read_content_sizes

MOST_SEGMENTS = 20_000
MOST_SCANS = 500
MOST_CHUNKS = 200_000
MOST_STRIPS = 100_000
MOST_TAG_VALUES = 1_000_000
MOST_BOXES = 20_000
#: Limit for a colour profile, and for a text that holds the orientation.
MOST_METADATA_BYTES = 1 << 20

# A JPEG may start this late, after bytes left by a transfer or a card reader.
_MOST_JUNK_BYTES = 64 << 10
_PIECE_BYTES = 1 << 20
_ORDINARY_SEGMENTS = 100


@dataclass(frozen=True)
class ScreenedImage:
    """The bytes of an image file that are passed to a decoder.

    Attributes:
        format: a key of `SIGNATURES`.
        data: the bytes, without what decoding does not need.
        canvas: width and height in pixels, if opening the file allocates that memory.
        scans: passes over the whole image; more than one only in JPEGs.
        kept_bytes: memory a decoder holds besides the image: coefficients, a strip, a tile.
        bits: bits of a sample, if known.
        is_scaled: whether samples are known to use the full scale.
        is_unsure: whether decoding may take more memory than these values say.
    """

    format: str
    data: bytes
    canvas: tuple[int, int] | None = None
    scans: int = 1
    kept_bytes: int = 0
    bits: int = 8
    is_scaled: bool = False
    is_unsure: bool = False


def detect_format(data: bytes) -> str | None:
    """Return the key of `SIGNATURES` that fits a file's first bytes, or `None`."""
    for name, signature in SIGNATURES.items():
        if signature(data):
            return name
    return None if _late_jpeg(data) is None else "JPEG"


def screen_image(data: bytes, format_: str, check: Callable[[], None]) -> ScreenedImage:
    """Return the part of an image file that a decoder may see.

    Args:
        data: the bytes of the file.
        format_: a key of `SIGNATURES`.
        check: called from time to time; raises if the work takes too long.

    Raises:
        BadImage: the header is damaged, or the structure is absurd.
    """
    try:
        return _screen_pnm(data, check) if format_ == "PPM" else _SCREENS[format_](data)
    except (struct.error, IndexError, ValueError, ZeroDivisionError) as problem:
        raise BadImage(f"damaged image: truncated or damaged {format_} header") from problem


def _is_webp(data: bytes) -> bool:
    return data[:4] == b"RIFF" and data[8:12] == b"WEBP"


#: The one format that needs an extra.
HEIC_FORMAT = "HEIF"


def is_heic(head: bytes) -> bool:
    """Return whether a file with this start is a HEIC image, judged by its brands."""
    brands = _brands(head)
    if brands and brands[0] in _GENERAL_BRANDS:
        # The first brand only says that it is an image; AVIF uses the same.
        return not _AVIF_BRANDS & set(brands)
    return bool(brands) and brands[0] in _HEIC_BRANDS


def _is_avif(data: bytes) -> bool:
    brands = _brands(data)
    return bool(_AVIF_BRANDS & set(brands)) and brands[0] not in _HEIC_BRANDS


def _brands(data: bytes) -> tuple[bytes, ...]:
    """Return the brands of an ISO media file, the main one first; empty for other files."""
    if data[4:8] != b"ftyp":
        return ()
    listed = data[8 : max(12, min(_MAX_BRANDS_BYTES, int.from_bytes(data[:4], "big")))]
    # A version follows the main brand.
    return tuple(listed[at : at + 4] for at in range(0, len(listed), 4) if at != 4)


def _starts(*signatures: bytes) -> Callable[[bytes], bool]:
    return lambda data: data.startswith(signatures)


_HEIC_BRANDS = frozenset({b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs"})
_GENERAL_BRANDS = frozenset({b"mif1", b"mif2", b"msf1"})
_AVIF_BRANDS = frozenset({b"avif", b"avis"})
_MAX_BRANDS_BYTES = 256

#: Tests of the first bytes by format.
SIGNATURES: Mapping[str, Callable[[bytes], bool]] = {
    "JPEG": _starts(b"\xff\xd8\xff"),
    "PNG": _starts(b"\x89PNG\r\n\x1a\n"),
    "WEBP": _is_webp,
    "BMP": _starts(b"BM"),
    "GIF": _starts(b"GIF87a", b"GIF89a"),
    "TIFF": _starts(b"II*\0", b"MM\0*", b"II+\0", b"MM\0+", b"II\0*", b"MM*\0"),
    "PPM": lambda data: re.match(rb"P([1-6]|[Ff])[\s#]", data) is not None,
    "AVIF": _is_avif,
    HEIC_FORMAT: is_heic,
}


def _late_jpeg(data: bytes) -> int | None:
    """Return the offset of a JPEG after junk; `None` if it is embedded in another file.

    In an archive or document, more data follow the JPEG.
    """
    start = data.find(b"\xff\xd8\xff", 0, _MOST_JUNK_BYTES)
    if start == 0:
        return 0
    if start < 0 or not data.rstrip(b"\0\r\n ").endswith(b"\xff\xd9"):
        return None
    return start


# JPEG -------------------------------------------------------------------------------------------

_JPEG_FRAMES = frozenset({*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC})
# Excludes fill bytes, escaped 255 and markers without content.
_JPEG_MARKER = re.compile(rb"\xff[^\x00\x01\xd0-\xd8\xff]")
_ZEROS = bytes(16)
_JPEG_TABLES = frozenset({*_JPEG_FRAMES, 0xC4, 0xCC, 0xDB, 0xDD})

# Segments that hold the colour space and the orientation: JFIF, Exif, XMP and Adobe.
_JPEG_METADATA = {0xE0: (b"JFIF",), 0xE1: (b"Exif", b"http"), 0xEE: (b"Adob",)}


class _Segment(NamedTuple):
    marker: int
    start: int
    end: int


def _jpeg_segments(data: bytes) -> tuple[list[_Segment], int]:
    """Return the segments before the first scan, and the number of bytes between them."""
    segments: list[_Segment] = []
    position, between = 2, 0
    while True:
        found = _JPEG_MARKER.search(data, position)
        if found is None or data[found.start() + 1] == 0xD9:
            raise BadImage("damaged image: a JPEG that ends before its first scan")
        start = found.start()
        marker = data[start + 1]
        between += start - position
        position = start + 2 + (data[start + 2] << 8 | data[start + 3])
        segments.append(_Segment(marker, start, position))
        if len(segments) > MOST_SEGMENTS:
            raise BadImage("a JPEG with too many segments", f"at most {MOST_SEGMENTS:,}")
        if marker == 0xDA:
            return segments, between


def _screen_jpeg(data: bytes) -> ScreenedImage:
    data = data[_late_jpeg(data) or 0 :]
    segments, between = _jpeg_segments(data)
    scan_at = segments[-1].start
    components = data[scan_at + 4]
    frame = next((s for s in reversed(segments) if s.marker in _JPEG_FRAMES), None)
    if frame is None:
        raise BadImage("damaged image: a JPEG without a frame")
    height, width, in_frame = struct.unpack_from(">HHB", data, frame.start + 5)
    has_scans = frame.marker in (0xC2, 0xC6, 0xCA, 0xCE) or components < in_frame
    scans = _count_scans(data, scan_at) if has_scans else 1
    if scans > MOST_SCANS:
        raise BadImage(f"a JPEG with {scans:,} scans", f"at most {MOST_SCANS}")
    kept = 0
    if has_scans:
        factors = data[frame.start + 11 : frame.start + 10 + 3 * in_frame : 3]
        blocks = [(each >> 4) * (each & 15) for each in factors]
        largest = max((each >> 4) for each in factors) * max((each & 15) for each in factors)
        kept = 2 * width * height * sum(blocks) // max(1, largest)
    if len(segments) > _ORDINARY_SEGMENTS or between > 1000:
        data = b"".join([b"\xff\xd8", *_needed_segments(data, segments), data[scan_at:]])
    # A file that was allocated but not completely written ends in zeros.
    if data.endswith(_ZEROS):
        data = data.rstrip(b"\0")
    return ScreenedImage("JPEG", data, scans=scans, kept_bytes=kept)


def _count_scans(data: bytes, start: int) -> int:
    """Return the number of scans; five times as fast as `bytes.count` if many bytes are 255."""
    count = 0
    for position in range(start, len(data), _PIECE_BYTES):
        piece = np.frombuffer(data, np.uint8)[position : position + _PIECE_BYTES + 1]
        count += int(np.count_nonzero((piece[:-1] == 0xFF) & (piece[1:] == 0xDA)))
    return count


@dataclass(frozen=True)
class Scan:
    """One scan of a JPEG.

    Attributes:
        start: offset of its marker.
        components: ids of its components.
        first: first coefficient.
        last: last coefficient.
        luma: id of the first component of the image.
        in_frame: number of components of the image.
    """

    start: int
    components: tuple[int, ...]
    first: int
    last: int
    luma: int
    in_frame: int


def first_scan(data: bytes) -> int:
    """Return the offset of the first scan of a JPEG."""
    return _jpeg_segments(data)[0][-1].start


def jpeg_scans(data: bytes) -> list[Scan]:
    """Return the scans of a JPEG with complete headers, in order."""
    segments, _ = _jpeg_segments(data)
    frame = next(segment for segment in segments if segment.marker in _JPEG_FRAMES)
    in_frame, luma = data[frame.start + 9], data[frame.start + 10]
    scans: list[Scan] = []
    position = segments[-1].start
    while 0 <= position < len(data) - 10:
        count = data[position + 4]
        components = tuple(data[position + 5 : position + 5 + 2 * count : 2])
        first, last = data[position + 5 + 2 * count : position + 7 + 2 * count]
        scans.append(Scan(position, components, first, last, luma, in_frame))
        position = data.find(b"\xff\xda", position + 2)
    return scans


def _needed_segments(data: bytes, segments: list[_Segment]) -> Iterator[bytes]:
    """Yield the segments needed for decoding: tables, orientation, colours."""
    seen: set[bytes] = set()
    for segment in segments[:-1]:
        content = data[segment.start : segment.end]
        kind = content[4:10]
        if segment.marker in _JPEG_TABLES or content[4:16] == b"ICC_PROFILE\0":
            yield content
        elif kind[:4] in _JPEG_METADATA.get(segment.marker, ()) and kind not in seen:
            seen.add(kind)
            yield content


# PNG --------------------------------------------------------------------------------------------

_PNG_NEEDED = frozenset({b"IHDR", b"PLTE", b"IDAT", b"IEND", b"tRNS"})
_PNG_TURNED = (b"XML:com.adobe.xmp\0", b"Raw profile type exif\0", b"Raw profile type APP1\0")


@dataclass(frozen=True)
class PngChunk:
    """A chunk of a PNG: its name and the offsets of its length field and its end."""

    name: bytes
    start: int
    end: int


def png_chunks(data: bytes) -> Iterator[PngChunk]:
    """Yield the chunks up to the end of the image; the last one may be truncated."""
    position, count = 8, 0
    while position + 8 <= len(data):
        length, name = struct.unpack_from(">I4s", data, position)
        end = position + 12 + length
        yield PngChunk(name, position, end)
        count += 1
        if count > MOST_CHUNKS:
            raise BadImage("a PNG with too many chunks", f"at most {MOST_CHUNKS:,}")
        if name == b"IEND":
            return
        position = end


def is_whole_chunk(data: bytes, chunk: PngChunk) -> bool:
    """Whether the chunk is complete and matches its checksum."""
    content = memoryview(data)[chunk.start + 4 : chunk.end - 4]
    check = data[chunk.end - 4 : chunk.end]
    return chunk.end <= len(data) and zlib.crc32(content).to_bytes(4, "big") == check


def _screen_png(data: bytes) -> ScreenedImage:
    bits = data[24]
    chunks = list(png_chunks(data))
    needed = [chunk for chunk in chunks if _is_needed_chunk(data, chunk)]
    if len(needed) != len(chunks):
        view = memoryview(data)
        data = b"".join([data[:8], *(view[chunk.start : chunk.end] for chunk in needed)])
    return ScreenedImage("PNG", data, bits=bits)


def _is_needed_chunk(data: bytes, chunk: PngChunk) -> bool:
    name = chunk.name
    if name in _PNG_NEEDED:
        # Empty chunks only cost time.
        return name != b"IDAT" or chunk.end > chunk.start + 12
    if not name.isalpha():
        return True
    size_bytes = chunk.end - chunk.start - 12
    if name == b"eXIf":
        return size_bytes <= MOST_METADATA_BYTES and is_whole_chunk(data, chunk)
    content = memoryview(data)[chunk.start + 8 : max(chunk.start + 8, chunk.end - 4)]
    if name == b"iCCP":
        start = bytes(content[:80]).find(b"\0") + 2
        return is_whole_chunk(data, chunk) and _is_small_unpacked(content[start:])
    if name in (b"tEXt", b"zTXt", b"iTXt") and bytes(content[:24]).startswith(_PNG_TURNED):
        if size_bytes > MOST_METADATA_BYTES or not is_whole_chunk(data, chunk):
            return False
        packed = _packed_text(name, bytes(content))
        return packed is None or _is_small_unpacked(packed)
    return False


def _packed_text(name: bytes, content: bytes) -> bytes | None:
    """Return the compressed part of a text chunk; `None` if it is not compressed."""
    rest = content.partition(b"\0")[2]
    if name == b"zTXt":
        return rest[1:]
    if name == b"iTXt" and rest[:1] == b"\1":
        return rest[2:].split(b"\0", 2)[-1]
    return None


def _is_small_unpacked(packed: bytes | memoryview) -> bool:
    unpacker = zlib.decompressobj()
    try:
        unpacker.decompress(packed, MOST_METADATA_BYTES)
    except zlib.error:
        return False
    return not unpacker.unconsumed_tail


# GIF, WebP, AVIF --------------------------------------------------------------------------------


def _screen_gif(data: bytes) -> ScreenedImage:
    """Remove comments and application blocks before the first image."""
    header = 13 + (3 << ((data[10] & 7) + 1) if data[10] & 0x80 else 0)
    position, kept = header, [data[:header]]
    while data[position] == 0x21:
        start, label = position, data[position + 1]
        position += 2
        while data[position]:
            position += 1 + data[position]
        position += 1
        if label == 0xF9:
            kept[1:] = [data[start:position]]
    if position - header > 4096:
        data = b"".join([*kept, data[position:]])
    return ScreenedImage("GIF", data)


def riff_chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Yield name, start of the content and end of each chunk, which may be truncated."""
    position, count = 12, 0
    while position + 8 <= len(data):
        name, length = struct.unpack_from("<4sI", data, position)
        yield name, position + 8, position + 8 + length
        position += 8 + length + (length & 1)
        count += 1
        if count > MOST_CHUNKS:
            raise BadImage("a WebP with too many chunks", f"at most {MOST_CHUNKS:,}")


def _screen_webp(data: bytes) -> ScreenedImage:
    canvas = _webp_size(data)
    frames_end = None
    frames = 0
    for name, _, end in riff_chunks(data):
        if name == b"ANMF":
            frames += 1
            if frames == 1:
                frames_end = end + (end & 1)
    if frames > 1 and frames_end is not None:
        # Only the first image is used.
        body = data[8:frames_end]
        data = b"RIFF" + struct.pack("<I", len(body)) + body
    return ScreenedImage("WEBP", data, canvas=canvas)


def _webp_size(data: bytes) -> tuple[int, int]:
    kind = data[12:16]
    if kind == b"VP8X":
        width, height = (int.from_bytes(data[at : at + 3], "little") + 1 for at in (24, 27))
        return width, height
    if kind == b"VP8L":
        bits = struct.unpack_from("<I", data, 21)[0]
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    width, height = struct.unpack_from("<HH", data, 26)
    return width & 0x3FFF, height & 0x3FFF


def _screen_boxes(data: bytes, format_: str) -> ScreenedImage:
    """Use the largest size that any item or track has or declares."""
    areas: list[tuple[int, int]] = []
    is_deep = False
    boxes = list(itertools.islice(_boxes(data, 0, len(data)), MOST_BOXES + 1))
    if len(boxes) > MOST_BOXES:
        raise BadImage(f"an {format_} with too many parts", f"at most {MOST_BOXES:,}")
    for name, start, end in boxes:
        if name == b"ispe":
            areas.append(struct.unpack_from(">II", data, start + 4))
        elif name == b"av1C" and end - start >= 3:
            is_deep |= bool(data[start + 2] & 0x40)
        elif name == b"hvcC" and end - start >= 18:
            is_deep |= bool(data[start + 17] & 7)
        elif name == b"tkhd" and end - start >= 8:
            width, height = struct.unpack_from(">II", data, end - 8)
            areas.append((width >> 16, height >> 16))
    in_content = read_content_sizes(data, boxes)
    areas += in_content or []
    if not areas:
        raise BadImage("damaged image: its size is missing")
    width, height = max(areas, key=lambda area: area[0] * area[1])
    # Samples of 10 and 12 bits take two bytes, in three planes.
    kept = 8 * width * height if is_deep else 0
    return ScreenedImage(
        format_, data, canvas=(width, height), kept_bytes=kept, is_unsure=in_content is None
    )


_BOXES_OF_BOXES = {b"meta": 4, b"iprp": 0, b"ipco": 0, b"moov": 0, b"trak": 0}


def _boxes(data: bytes, start: int, end: int) -> Iterator[tuple[bytes, int, int]]:
    position = start
    while position + 8 <= end:
        length, name = struct.unpack_from(">I4s", data, position)
        header = 8
        if length == 1:
            length, header = struct.unpack_from(">Q", data, position + 8)[0], 16
        box_end = end if length == 0 else position + length
        if length != 0 and length < header:
            return
        yield name, position + header, min(box_end, end)
        if name in _BOXES_OF_BOXES:
            inside = position + header + _BOXES_OF_BOXES[name]
            yield from _boxes(data, inside, min(box_end, end))
        position = box_end


# TIFF -------------------------------------------------------------------------------------------

_TIFF_SIZES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8}
_TIFF_SIZES |= {13: 4, 16: 8, 17: 8, 18: 8}
_TIFF_TEXT = frozenset({1, 2, 6, 7})
_STRIP_TAGS = {273: "strips", 279: "strips", 324: "tiles", 325: "tiles"}


def _screen_tiff(data: bytes) -> ScreenedImage:
    tags = _tiff_tags(data)
    values = {tag: first for tag, (_, _, first) in tags.items()}
    others = 0
    for tag, (kind, count, _) in tags.items():
        if tag in _STRIP_TAGS and count > MOST_STRIPS:
            raise BadImage(f"a TIFF with {count:,} {_STRIP_TAGS[tag]}", f"at most {MOST_STRIPS:,}")
        others += 0 if kind in _TIFF_TEXT else count
    if others > MOST_TAG_VALUES:
        raise BadImage(
            f"a TIFF with {others:,} numbers in its header", f"at most {MOST_TAG_VALUES:,}"
        )
    width, height = values.get(256, 0), values.get(257, 0)
    samples, bits = values.get(277, 1), values.get(258, 1)
    if 322 in values:
        tile_width, tile_height = max(1, values[322]), max(1, values.get(323, 0))
        kept = tile_width * tile_height
        work = -(-width // tile_width) * -(-height // tile_height) * kept
        # Tiles are decoded whole, including parts outside the image.
        if work > 4 * width * height + (64 << 20):
            raise BadImage("a TIFF with tiles far larger than the image")
    else:
        kept = width * min(height, values.get(278, height))
    # Libtiff holds a strip or tile as stored, or YCbCr in four bytes per pixel. Uncompressed,
    # interleaved images are read without it.
    is_plain = values.get(259, 1) == 1 and values.get(284, 1) == 1 and values.get(262) != 6
    held = 0 if is_plain else kept * max(samples * bits // 8, 4 if values.get(262) == 6 else 1)
    return ScreenedImage("TIFF", data, kept_bytes=held, bits=bits)


def _tiff_tags(data: bytes) -> dict[int, tuple[int, int, int]]:
    """Return type, count and first value of each tag of the first image."""
    order = "<" if data[:2] == b"II" else ">"
    is_big = 43 in data[2:4]
    head, entry, size = ("Q", "HHQ", 8) if is_big else ("H", "HHI", 4)
    (directory,) = struct.unpack_from(order + ("Q" if is_big else "I"), data, 8 if is_big else 4)
    (count,) = struct.unpack_from(order + head, data, directory)
    if count > 4096:
        raise BadImage(f"a TIFF with {count:,} tags", "at most 4,096")
    tags: dict[int, tuple[int, int, int]] = {}
    position = directory + (8 if is_big else 2)
    for _ in range(count):
        tag, kind, values = struct.unpack_from(order + entry, data, position)
        at = position + (12 if is_big else 8)
        if values * _TIFF_SIZES.get(kind, 1) > size:
            (at,) = struct.unpack_from(order + ("Q" if is_big else "I"), data, at)
        first = 0
        code = {1: "B", 3: "H", 4: "I", 16: "Q"}.get(kind)
        if code is not None and values and at + struct.calcsize(code) <= len(data):
            (first,) = struct.unpack_from(order + code, data, at)
        tags[tag] = (kind, values, first)
        position += 20 if is_big else 12
    return tags


def _screen_pnm(data: bytes, check: Callable[[], None]) -> ScreenedImage:
    plain, bits, is_scaled = normalise_pnm(data, check)
    return ScreenedImage("PPM", plain, bits=bits, is_scaled=is_scaled)


_SCREENS: Mapping[str, Callable[[bytes], ScreenedImage]] = {
    "JPEG": _screen_jpeg,
    "PNG": _screen_png,
    "WEBP": _screen_webp,
    "BMP": lambda data: ScreenedImage("BMP", data),
    "GIF": _screen_gif,
    "TIFF": _screen_tiff,
    "AVIF": lambda data: _screen_boxes(data, "AVIF"),
    HEIC_FORMAT: lambda data: _screen_boxes(data, HEIC_FORMAT),
}
