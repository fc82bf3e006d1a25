"""Small image files that would cost a decoder minutes or gigabytes."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable, Mapping

from PIL import Image

from tests.tiny import tiny_photo


def saved(image: Image.Image, format_: str, **options: object) -> bytes:
    """Return an image as the bytes of a file."""
    buffer = io.BytesIO()
    image.save(buffer, format_, **options)
    return buffer.getvalue()


def png(
    width: int, height: int, bits: int, colour: int, *chunks: tuple[bytes, bytes], line: bytes = b""
) -> bytes:
    """Return a PNG of zeros or of a repeated line, without holding its pixels."""
    channels = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colour]
    compressor = zlib.compressobj(1)
    row = b"\0" + (line or bytes((width * bits * channels + 7) // 8))
    rows = b"".join(compressor.compress(row) for _ in range(height)) + compressor.flush()
    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    if colour == 3:
        chunks = (*chunks, (b"PLTE", bytes(range(12))))
    parts = [png_chunk(b"IHDR", header), *(png_chunk(*chunk) for chunk in chunks)]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts) + png_chunk(b"IDAT", rows) + png_chunk(b"IEND")


def png_chunk(name: bytes, content: bytes = b"") -> bytes:
    """Return a chunk of a PNG with its checksum."""
    check = struct.pack(">I", zlib.crc32(name + content))
    return struct.pack(">I", len(content)) + name + content + check


def tiff(entries: Mapping[int, tuple[int, int, bytes]], tail: bytes = b"") -> bytes:
    """Return a TIFF with one directory of tags, each with type, count and values."""
    position = 8 + 2 + 12 * len(entries) + 4
    directory, values = b"", b""
    for tag, (kind, count, value) in sorted(entries.items()):
        if len(value) <= 4:
            field = value.ljust(4, b"\0")
        else:
            field = struct.pack("<I", position + len(values))
            values += value
        directory += struct.pack("<HHI", tag, kind, count) + field
    head = b"II*\0" + struct.pack("<IH", 8, len(entries))
    return head + directory + bytes(4) + values + tail


def short(value: int) -> tuple[int, int, bytes]:
    """Return a 16-bit number for a tag."""
    return 3, 1, struct.pack("<H", value)


def long(*values: int) -> tuple[int, int, bytes]:
    """Return 32-bit numbers for a tag."""
    return 4, len(values), struct.pack(f"<{len(values)}I", *values)


def _jpeg_with(segment: bytes, times: int) -> bytes:
    jpeg = saved(tiny_photo(1), "JPEG")
    return jpeg[:2] + segment * times + jpeg[2:]


def _segment(marker: int, content: bytes) -> bytes:
    return bytes((0xFF, marker)) + struct.pack(">H", len(content) + 2) + content


def _many_scans(size: tuple[int, int], times: int) -> bytes:
    """Return a progressive JPEG that refines the same coefficients repeatedly."""
    jpeg = saved(Image.new("L", size, 77), "JPEG", progressive=True)
    at = jpeg.rindex(b"\xff\xda")
    return jpeg[:at] + jpeg[at:-2] * times + b"\xff\xd9"


def _many_strips() -> bytes:
    count = 4_000_000
    grey = {256: long(1), 257: long(count), 258: short(8), 259: short(1), 262: short(1)}
    where = (4, count, struct.pack("<I", 8) * count)
    sizes = (4, count, struct.pack("<I", 1) * count)
    return tiff({**grey, 273: where, 277: short(1), 278: short(1), 279: sizes})


def _large_tiles() -> bytes:
    grey = {256: long(16), 257: long(16), 258: short(8), 259: short(5), 262: short(1)}
    tiles = {322: long(60_000), 323: long(60_000), 324: long(8), 325: long(100)}
    return tiff({**grey, 277: short(1), **tiles})


def _many_numbers() -> bytes:
    numbers = (3, 6_000_000, bytes(12_000_000))
    grey = {256: long(4), 257: long(4), 258: short(8), 259: short(1), 262: short(1)}
    return tiff({**grey, 273: long(8), 277: short(1), 279: long(16), 301: numbers})


def _webp(width: int, height: int) -> bytes:
    frames = [Image.new("RGBA", (16, 16), (255, 0, 0, alpha)) for alpha in (9, 10)]
    data = bytearray(saved(frames[0], "WEBP", save_all=True, append_images=frames[1:]))
    at = data.index(b"VP8X") + 12
    data[at : at + 6] = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    return bytes(data)


def _avif(width: int, height: int) -> bytes:
    data = bytearray(saved(Image.new("RGB", (64, 64), "red"), "AVIF"))
    at = data.index(b"ispe") + 8
    data[at : at + 8] = struct.pack(">II", width, height)
    return bytes(data)


def _gif_of_comments() -> bytes:
    data = saved(Image.new("P", (8, 8)), "GIF")
    head = 13 + (3 << ((data[10] & 7) + 1) if data[10] & 0x80 else 0)
    comment = b"!\xfe" + (b"\xff" + b"c" * 255) * 40_000 + b"\0"
    return data[:head] + comment + data[head:]


def avif_that_hides_its_size(side: int) -> bytes:
    """Return an AVIF whose container declares a small size and whose content is large."""
    data = saved(Image.new("L", (side, side), 99), "AVIF", speed=10)
    return data.replace(struct.pack(">II", side, side), struct.pack(">II", 64, 64))


def moving_avif_that_hides_its_size(side: int) -> bytes:
    """Return the same as an animation, whose content is not described by the container."""
    frames = [Image.new("L", (side, side), level) for level in (99, 9)]
    data = saved(frames[0], "AVIF", speed=10, save_all=True, append_images=frames[1:])
    for layout, factor in ((">II", 1), (">HH", 1), (">II", 1 << 16)):
        size = struct.pack(layout, side * factor, side * factor)
        data = data.replace(size, struct.pack(layout, 64 * factor, 64 * factor))
    return data


def _bmp(width: int, height: int) -> bytes:
    """Return a BMP of runs of maximum length."""
    runs = b"\xff\x07" * 400_000
    info = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 8, 1, len(runs), 0, 0, 256, 0)
    palette = bytes(1024)
    start = 14 + len(info) + len(palette)
    return b"BM" + struct.pack("<IHHI", start + len(runs), 0, 0, start) + info + palette + runs


#: Each makes a file of at most some megabytes, except digits and comments.
ATTACKS: Mapping[str, Callable[[], bytes]] = {
    "jpeg of 100,000 Exif segments": lambda: _jpeg_with(
        _segment(0xE1, b"Exif\0\0" + b"x" * 12), 100_000
    ),
    "jpeg of 15,000 Exif segments": lambda: _jpeg_with(
        _segment(0xE1, b"Exif\0\0" + b"x" * 12), 15_000
    ),
    "jpeg of 15,000 tables": lambda: _jpeg_with(_segment(0xDB, b"\0" + b"\1" * 64), 15_000),
    "jpeg of 10,000 profiles": lambda: _jpeg_with(
        _segment(0xE2, b"ICC_PROFILE\0\1\1" + b"x" * 200), 10_000
    ),
    "jpeg of 4 MB of filling": lambda: _jpeg_with(b"\xff", 4_000_000),
    "jpeg of 4 MB of junk": lambda: _jpeg_with(b"junk", 1_000_000),
    "progressive jpeg of 1,000 scans": lambda: _many_scans((1000, 1000), 1000),
    "progressive jpeg of 480 scans": lambda: _many_scans((4000, 4000), 470),
    "tiff of 4,000,000 strips": _many_strips,
    "tiff of tiles of 60,000 pixels": _large_tiles,
    "tiff of 6,000,000 numbers": _many_numbers,
    "ppm with a comment of 80 MB": lambda: (
        b"P6\n#" + b"c" * 80_000_000 + b"\n4 4\n255\n" + bytes(48)
    ),
    "ppm with 2,000,000 comments": lambda: b"P6\n" + b"#\n" * 2_000_000 + b"4 4\n255\n" + bytes(48),
    "ppm of 50 MB of digits": lambda: b"P3 2400 1740 255\n" + b"128 64\n" * 3_579_000 * 2,
    "pbm of 20 MB of digits": lambda: b"P1 5000 4000\n" + b"01" * 10_000_000,
    "ppm of digits and comments": lambda: b"P3 700 700 9\n" + b"1 2 3 # x\n" * 490_000,
    "ppm of an odd scale": lambda: b"P6 2500 2000 4095\n" + bytes(30_000_000),
    "16-bit png": lambda: png(10_000, 8_900, 16, 0),
    "16-bit colour png": lambda: png(5_000, 5_000, 16, 6),
    "palette png": lambda: png(9_000, 7_000, 8, 3),
    "palette png with transparency": lambda: png(
        6_000, 6_000, 8, 3, (b"tRNS", b"\x80\x40\x20\x10")
    ),
    "1-bit png": lambda: png(16_000, 16_000, 1, 0),
    "png of 100,000 chunks": lambda: png(8, 8, 8, 0, *[(b"tEXt", b"key\0" + b"x" * 20)] * 100_000),
    "png of texts of 20 MB": lambda: png(
        8, 8, 8, 0, *[(b"zTXt", b"k\0\0" + zlib.compress(bytes(20 << 20), 1))] * 4
    ),
    "webp of a large canvas": lambda: _webp(9_000, 9_000),
    "webp of the largest canvas": lambda: _webp(16_383, 16_383),
    "avif that says it is large": lambda: _avif(12_000, 12_000),
    "avif that hides its size": lambda: avif_that_hides_its_size(6_000),
    "moving avif that hides its size": lambda: moving_avif_that_hides_its_size(5_000),
    "gif of 10 MB of comments": _gif_of_comments,
    "gif of a large canvas": lambda: (
        b"GIF89a"
        + struct.pack("<HHBBB", 60_000, 60_000, 0, 0, 0)
        + b","
        + struct.pack("<HHHHB", 0, 0, 1, 1, 0)
        + b"\x02\x02\x44\x01\0;"
    ),
    "bmp of runs": lambda: _bmp(6_000, 5_000),
}
