"""Unusual samples, transparent colours and colour profiles are read correctly."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import ImageCms

from sbtk_runtime.errors import BadImage
from sbtk_runtime.images import decode, on_white
from tests.image_attacks import long, png_chunk, saved, short, tiff
from tests.tiny import tiny_photo

# pytest replaces the package's filters.
pytestmark = pytest.mark.filterwarnings("ignore:::PIL")

SIZE = (40, 30)
RGB = np.asarray(tiny_photo(3).resize(SIZE), dtype=np.uint16)
GREY = np.asarray(tiny_photo(3).resize(SIZE).convert("L"), dtype=np.uint16)
# So that the brightest pixel needs all the bits.
GREY = np.where(GREY.max() == GREY, 255, GREY).astype(np.uint16)
RGB = np.where(RGB.max() == RGB, 255, RGB).astype(np.uint16)


def shown(data: bytes) -> NDArray[np.int16]:
    return np.asarray(on_white(decode(data)), dtype=np.int16)


def grey_tiff(samples: NDArray[np.generic], kind: int = 1, photometric: int = 1) -> bytes:
    """Return an uncompressed TIFF of one channel; `kind` 1 is unsigned, 2 signed, 3 float."""
    stored = samples.astype(samples.dtype.newbyteorder("<")).tobytes()
    entries = {
        256: long(SIZE[0]),
        257: long(SIZE[1]),
        258: short(8 * samples.dtype.itemsize),
        259: short(1),
        262: short(photometric),
        277: short(1),
        278: long(SIZE[1]),
        279: long(len(stored)),
        339: short(kind),
    }
    start = 8 + 2 + 12 * (len(entries) + 1) + 4
    return tiff({**entries, 273: long(start)}, stored)


def planes_tiff(samples: NDArray[np.generic], rows_per_strip: int, compression: int = 1) -> bytes:
    """Return a planar RGB TIFF in strips."""
    strips = [
        plane[top : top + rows_per_strip].astype(samples.dtype.newbyteorder("<")).tobytes()
        for plane in np.moveaxis(samples, 2, 0)
        for top in range(0, SIZE[1], rows_per_strip)
    ]
    if compression == 8:
        strips = [zlib.compress(strip) for strip in strips]
    entries = {
        256: long(SIZE[0]),
        257: long(SIZE[1]),
        258: (3, 3, struct.pack("<3H", *[8 * samples.dtype.itemsize] * 3)),
        259: short(compression),
        262: short(2),
        277: short(3),
        278: long(rows_per_strip),
        279: long(*(len(strip) for strip in strips)),
        284: short(2),
    }
    head = tiff({**entries, 273: long(*[0] * len(strips))})
    starts = len(head) + np.cumsum([0, *(len(strip) for strip in strips[:-1])])
    return tiff({**entries, 273: long(*starts.tolist())}, b"".join(strips))


def png_16(samples: NDArray[np.generic], colour: int, *chunks: tuple[bytes, bytes]) -> bytes:
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in samples)
    header = struct.pack(">IIBBBBB", *SIZE, 16, colour, 0, 0, 0)
    made = b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header)
    made += b"".join(png_chunk(*chunk) for chunk in chunks)
    return made + png_chunk(b"IDAT", zlib.compress(rows)) + png_chunk(b"IEND")


@pytest.mark.parametrize("rows_per_strip", [30, 7])
@pytest.mark.parametrize("compression", [1, 8])
@pytest.mark.parametrize("bits", [8, 16])
def test_separate_colour_planes_are_read(bits: int, compression: int, rows_per_strip: int) -> None:
    samples = RGB.astype(np.uint8) if bits == 8 else RGB * 257
    data = planes_tiff(samples, rows_per_strip, compression)
    assert np.abs(shown(data) - RGB.astype(np.int16)).max() <= 1


@pytest.mark.parametrize("bits", [8, 10, 12, 14, 16])
def test_few_bits_in_sixteen_and_more_are_scaled(bits: int) -> None:
    full = (1 << bits) - 1
    samples = np.rint(GREY / 255 * full)
    for data in (
        png_16(samples.astype(np.uint16), 0),
        grey_tiff(samples.astype(np.uint16)),
        grey_tiff(samples.astype(np.uint32)),
        grey_tiff(samples.astype(np.int32), 2),
        grey_tiff(samples.astype(np.float32), 3),
        png_16(np.rint(RGB / 255 * full).astype(np.uint16), 2),
    ):
        image = shown(data)
        expected = RGB if (image[..., 0] != image[..., 1]).any() else GREY[..., None]
        assert np.abs(image - expected.astype(np.int16)).max() <= 1


def test_few_bits_that_cannot_be_read_are_refused() -> None:
    with pytest.raises(BadImage, match="uses only the low bits"):
        decode(planes_tiff(RGB, 30))


def test_a_scale_in_the_file_is_used() -> None:
    dark = (GREY // 8).astype(">u2")
    data = b"P5 %d %d 2047\n" % SIZE + dark.tobytes()
    assert shown(data).max() <= 5


def test_large_and_signed_numbers_are_scaled() -> None:
    large = GREY.astype(np.uint32) * (0xFFFFFFFF // 255)
    assert np.abs(shown(grey_tiff(large))[..., 0] - GREY).max() <= 1
    signed = GREY.astype(np.int16) * 8 - 1024
    stretched = (GREY - GREY.min()) * (255 / (GREY.max() - GREY.min()))
    assert np.abs(shown(grey_tiff(signed, 2))[..., 0] - stretched).max() <= 1


def test_wide_samples_may_have_white_as_zero() -> None:
    assert np.abs(shown(grey_tiff(65535 - GREY * 257, 1, 0))[..., 0] - GREY).max() <= 1


@pytest.mark.parametrize("odd", [np.nan, np.inf, -np.inf])
def test_a_nan_sample_affects_one_pixel(odd: float) -> None:
    samples = (GREY / 255).astype(np.float32)
    samples[3, 4] = odd
    image = shown(grey_tiff(samples, 3))[..., 0]
    difference = np.abs(image - GREY.astype(np.int16))
    difference[3, 4] = 0
    assert difference.max() <= 1
    with pytest.raises(BadImage, match="none of which is a number"):
        decode(grey_tiff(np.full_like(samples, np.nan), 3))


def test_floats_a_little_over_one_are_not_dark() -> None:
    samples = (GREY / 255).astype(np.float32)
    samples[0, 0] = 1.01
    assert np.abs(shown(grey_tiff(samples, 3))[..., 0] - GREY).max() <= 4 + 255


def test_a_transparent_grey_of_sixteen_bits_is_respected() -> None:
    samples = GREY * 257
    samples[:10] = 1234
    samples[10] = 1235
    image = shown(png_16(samples, 0, (b"tRNS", struct.pack(">H", 1234))))
    assert (image[:10] == 255).all()
    assert (image[10] <= 5).all()
    colours = RGB * 257
    colours[:10] = (1234, 5, 60000)
    colours[10] = (1234, 6, 60000)
    image = shown(png_16(colours, 2, (b"tRNS", struct.pack(">3H", 1234, 5, 60000))))
    assert (image[:10] == 255).all()
    assert (image[10] == [4, 0, 234]).all()


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_a_transparent_grey_of_few_bits_is_respected(bits: int) -> None:
    row = b"\0" + bytes([0b11000000 if bits == 2 else 0xF0 if bits == 4 else 0x80])
    header = struct.pack(">IIBBBBB", 2, 1, bits, 0, 0, 0, 0)
    transparent = struct.pack(">H", (1 << bits) - 1)
    data = b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + png_chunk(b"tRNS", transparent)
    data += png_chunk(b"IDAT", zlib.compress(row)) + png_chunk(b"IEND")
    alpha = decode(data).getchannel("A")
    assert [alpha.getpixel((x, 0)) for x in (0, 1)] == [0, 255]


def test_colour_maps_of_eight_bits_in_sixteen_are_read() -> None:
    palette = np.arange(256) * 3 % 256
    indices = np.arange(SIZE[0] * SIZE[1]) % 256
    for scale in (1, 257):
        colour_map = struct.pack("<768H", *(palette * scale).tolist() * 3)
        entries = {
            256: long(SIZE[0]),
            257: long(SIZE[1]),
            258: short(8),
            259: short(1),
            262: short(3),
            277: short(1),
            278: long(SIZE[1]),
            279: long(len(indices)),
            320: (3, 768, colour_map),
        }
        head = tiff({**entries, 273: long(0)})
        data = tiff({**entries, 273: long(len(head))}, indices.astype(np.uint8).tobytes())
        assert np.array_equal(shown(data)[..., 0].ravel(), palette[indices])


def rgb_profile(primaries: dict[str, tuple[float, float]], gamma: float) -> bytes:
    """Return an ICC profile of a matrix and a gamma, with the white of D50."""
    white = np.array([0.9642, 1.0, 0.8249])
    columns = np.array([[x / y, 1.0, (1 - x - y) / y] for x, y in primaries.values()]).T
    matrix = columns * np.linalg.solve(columns, white)

    def number(value: float) -> bytes:
        return struct.pack(">i", round(value * 65536))

    def xyz(values: NDArray[np.float64]) -> bytes:
        return b"XYZ \0\0\0\0" + b"".join(number(value) for value in values)

    curve = b"curv\0\0\0\0" + struct.pack(">IH", 1, round(gamma * 256)) + bytes(2)
    tags = {b"wtpt": xyz(white)}
    for index, name in enumerate(b"rgb"):
        tags[bytes([name]) + b"XYZ"] = xyz(matrix[:, index])
        tags[bytes([name]) + b"TRC"] = curve
    tags[b"desc"] = b"desc\0\0\0\0" + struct.pack(">I", 2) + b"x\0" + bytes(78)
    tags[b"cprt"] = b"text\0\0\0\0x\0\0\0"
    start, table, body = 128 + 4 + 12 * len(tags), b"", b""
    for name_, content in tags.items():
        table += name_ + struct.pack(">II", start + len(body), len(content))
        body += content + bytes(-len(content) % 4)
    size = start + len(body)
    head = struct.pack(">I4sI4s4s4s", size, b"lcms", 0x02400000, b"mntr", b"RGB ", b"XYZ ")
    head += bytes(12) + b"acsp" + bytes(28) + b"".join(number(value) for value in white)
    return head.ljust(128, b"\0") + struct.pack(">I", len(tags)) + table + body


PROPHOTO = rgb_profile({"r": (0.7347, 0.2653), "g": (0.1596, 0.8404), "b": (0.0366, 0.0001)}, 1.8)


@pytest.mark.parametrize("format_", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_wide_colour_spaces_become_srgb(format_: str) -> None:
    photo = tiny_photo(3).resize((160, 120))
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))
    wide = ImageCms.profileToProfile(photo, srgb, ImageCms.ImageCmsProfile(io.BytesIO(PROPHOTO)))
    assert wide is not None
    options: dict[str, object] = {"quality": 95} if format_ in ("JPEG", "WEBP") else {}
    data = saved(wide, format_, icc_profile=PROPHOTO, **options)
    expected = np.asarray(photo, dtype=np.int16)
    assert np.abs(shown(data) - expected).mean() < 6
    assert np.abs(np.asarray(wide, dtype=np.int16) - expected).mean() > 10


def test_srgb_and_unreadable_profiles_change_nothing() -> None:
    photo = tiny_photo(3)
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for profile in (srgb, PROPHOTO[:200], b"nonsense"):
        data = saved(photo, "PNG", icc_profile=profile)
        assert np.array_equal(np.asarray(decode(data)), np.asarray(photo))
    # A profile for another mode than the pixels'.
    data = saved(photo.convert("L"), "PNG", icc_profile=PROPHOTO)
    assert np.array_equal(shown(data)[..., 0], np.asarray(photo.convert("L")))
