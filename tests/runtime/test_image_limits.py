"""Checks of an image file's bytes: structure, memory, and parts that decoding does not need."""

from __future__ import annotations

import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from sbtk_runtime.errors import BadImage, LargeImage
from sbtk_runtime.image_limits import detect_format, screen_image
from sbtk_runtime.images import MAX_DECODE_BYTES, OpenImage, decode, memory_to_decode
from sbtk_runtime.preprocess import prepare
from sbtk_runtime.thumbnail import thumbnail
from tests.image_attacks import (
    avif_that_hides_its_size,
    moving_avif_that_hides_its_size,
    png,
    png_chunk,
    saved,
)
from tests.tiny import tiny_photo


def resized_jpeg(width: int, height: int, *, progressive: bool = False) -> bytes:
    """Return the header of a large JPEG with the pixels of a small one."""
    data = bytearray(saved(tiny_photo(1), "JPEG", progressive=progressive))
    frame = data.index(b"\xff\xc2" if progressive else b"\xff\xc0")
    data[frame + 5 : frame + 9] = struct.pack(">HH", height, width)
    return bytes(data)


def test_a_phone_jpeg_of_200_megapixels_is_limited_by_its_reduced_scale() -> None:
    data = resized_jpeg(16_320, 12_240)
    assert memory_to_decode(data, at_least_px=224) == 4 * 2040 * 1530
    with pytest.raises(LargeImage, match="16320 x 12240 pixels"):
        OpenImage(data)
    # All coefficients of a progressive JPEG are held, at any scale.
    with pytest.raises(LargeImage):
        OpenImage(resized_jpeg(16_320, 12_240, progressive=True), at_least_px=224)


@pytest.mark.parametrize("where", ["before", "after"])
def test_unused_texts_and_profiles_do_not_count_against_a_png(where: str) -> None:
    photo = tiny_photo(3)
    data = saved(photo, "PNG")
    large = zlib.compress(bytes(3 << 20))
    chunks = {
        "text": png_chunk(b"zTXt", b"Comment\0\0" + large),
        "international text": png_chunk(b"iTXt", b"k\0\1\0\0\0" + large),
        "turn": png_chunk(b"zTXt", b"Raw profile type exif\0\0" + large),
        "profile": png_chunk(b"iCCP", b"wide\0\0" + large),
        "plain text": png_chunk(b"tEXt", b"k\0" + b"x" * (2 << 20)),
        "wrong checksum": png_chunk(b"tEXt", b"k\0text")[:-1] + b"\0",
        "wrong animation": png_chunk(b"fcTL", b"short"),
        "wrong size": png_chunk(b"pHYs", b"x"),
    }
    at = 33 if where == "before" else len(data) - 12
    for name, chunk in chunks.items():
        image = OpenImage(data[:at] + chunk * 3 + data[at:]).decode()
        assert np.array_equal(np.asarray(image.image), np.asarray(photo)), name
        assert image.notices == ()


def test_dropping_unused_chunks_keeps_the_orientation_of_a_png() -> None:
    exif = Image.Exif()
    exif[0x0112] = 3
    data = saved(tiny_photo(3), "PNG", exif=exif)
    data = data[:33] + png_chunk(b"tEXt", b"k\0text") + data[33:]
    upside_down = np.asarray(tiny_photo(3))[::-1, ::-1]
    assert np.array_equal(np.asarray(decode(data)), upside_down)


@pytest.mark.parametrize("junk", [b"\n", b"\xef\xbb\xbf", b"\0" * 128, b"HTTP/1.1 200 OK\r\n\r\n"])
def test_junk_ahead_of_a_jpeg_is_skipped(junk: bytes) -> None:
    data = saved(tiny_photo(3), "JPEG")
    assert np.array_equal(np.asarray(decode(junk + data)), np.asarray(decode(data)))
    assert detect_format(junk + data) == "JPEG"
    # A file that contains a JPEG among other data is not a JPEG.
    assert detect_format(junk + data + b"more of another kind") is None


@pytest.mark.slow
def test_images_too_large_for_this_process_are_decoded_in_another() -> None:
    data = png(6_000, 5_000, 8, 6, line=bytes(range(200)) * 120)
    with pytest.raises(LargeImage) as caught:
        OpenImage(data)
    assert caught.value.needed_bytes > MAX_DECODE_BYTES
    whole = OpenImage(data, max_bytes=1 << 30).decode().image
    assert np.array_equal(
        prepare(data, "photo").pixels, prepare(data, "photo", max_bytes=1 << 30).pixels
    )
    small = thumbnail(data, 90)
    assert (small.mode, small.size) == ("RGB", (90, 75))
    assert whole.size == (6_000, 5_000)
    with pytest.raises(LargeImage, match="12000 x 12000") as caught:
        prepare(png(12_000, 12_000, 8, 6), "photo")
    assert caught.value.expected == "at most 400 MiB"
    cut = data[: len(data) // 2]
    with pytest.raises(BadImage, match="damaged image"):
        prepare(cut, "photo")


def _hidden_size(data: bytes, size: tuple[int, int]) -> bytes:
    return data.replace(struct.pack(">II", *size), struct.pack(">II", 64, 64))


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA"])
@pytest.mark.parametrize("size", [(200, 120), (129, 257)])
def test_the_size_of_an_avif_is_that_of_its_content(mode: str, size: tuple[int, int]) -> None:
    data = saved(Image.new(mode, size, 128), "AVIF", speed=10)
    assert screen_image(data, "AVIF", lambda: None).canvas == size
    hidden = screen_image(_hidden_size(data, size), "AVIF", lambda: None)
    assert hidden.canvas == size
    assert not hidden.is_unsure


def test_an_avif_of_unknown_size_is_decoded_in_a_limited_process() -> None:
    moving = moving_avif_that_hides_its_size(300)
    assert screen_image(moving, "AVIF", lambda: None).is_unsure
    with pytest.raises(LargeImage, match="cannot be determined"):
        decode(moving)
    assert prepare(moving, "photo").pixels.shape == (224, 224, 3)
    still = bytearray(avif_that_hides_its_size(300))
    still[still.index(b"iloc") + 4] = 9
    assert screen_image(bytes(still), "AVIF", lambda: None).is_unsure


def test_the_size_of_a_grid_heic_is_that_of_the_grid() -> None:
    heif = pytest.importorskip("pillow_heif")
    heif.register_heif_opener()
    data = bytearray(saved(tiny_photo(3).resize((128, 96)), "HEIF"))
    assert not screen_image(bytes(data), "HEIF", lambda: None).is_unsure
    # The item's content is parsed as a grid: version, flags, rows, columns, size.
    kind = data.index(b"hvc1", data.index(b"infe"))
    data[kind : kind + 4] = b"grid"
    start = data.index(b"mdat") + 4
    data[start : start + 12] = b"\0\1\0\0" + struct.pack(">II", 9_000, 8_000)
    assert screen_image(bytes(data), "HEIF", lambda: None).canvas == (9_000, 8_000)
    data[kind : kind + 4] = b"iovl"
    assert screen_image(bytes(data), "HEIF", lambda: None).is_unsure
