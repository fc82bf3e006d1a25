"""Any file gives an upright image or an error, safely."""

from __future__ import annotations

import contextlib
import io
import os
import random
import socket
import struct
import subprocess
import sys
import warnings
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from sbtk_runtime import images
from sbtk_runtime.errors import BadImage
from sbtk_runtime.image_feed import MAX_APART_BYTES
from sbtk_runtime.image_limits import is_heic
from sbtk_runtime.images import (
    MAX_FILE_BYTES,
    decode,
    memory_to_decode,
    on_white,
    read_image_bytes,
    read_image_file,
)
from tests.processes import run_python
from tests.tiny import tiny_photo

# pytest replaces the package's filters.
pytestmark = pytest.mark.filterwarnings("ignore:::PIL")

# Transformations that the EXIF orientation reverses.
STORED_AS = {
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}
ORIENTATION_TAG = 0x0112


def test_a_regular_file_is_read_with_its_state(tmp_path: Path) -> None:
    path = tmp_path / "photo.jpg"
    path.write_bytes(b"content")
    os.utime(path, ns=(1, 1_234_567_890_123_456_789))
    file = read_image_file(path)
    assert (file.data, file.size_bytes, file.mtime_ns) == (b"content", 7, 1_234_567_890_123_456_789)
    assert read_image_bytes(str(path)) == b"content"


def test_special_files_are_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo.jpg")
    (tmp_path / "folder.jpg").mkdir()
    (tmp_path / "loop.jpg").symlink_to("loop.jpg")
    (tmp_path / "empty.jpg").touch()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "socket.jpg"))
    with (tmp_path / "huge.jpg").open("wb") as file:
        file.truncate(MAX_FILE_BYTES + 1)
    expected = {
        "fifo.jpg": "not a regular file",
        "folder.jpg": "cannot be read: Is a directory",
        "loop.jpg": "cannot be read: Too many levels of symbolic links",
        "empty.jpg": "the file is empty",
        "socket.jpg": "cannot be read",
        "huge.jpg": "bytes",
        "absent.jpg": "cannot be read: No such file or directory",
        "n\0ul.jpg": "cannot be read",
        "x" * 300: "cannot be read: File name too long",
    }
    for name, reason in expected.items():
        with pytest.raises(BadImage, match=reason):
            read_image_bytes(tmp_path / name)
    for special in ("/dev/null", "/proc/self/mem", "/proc/self/status"):
        if Path(special).exists():
            with pytest.raises(BadImage):
                read_image_bytes(special)


def test_a_file_that_keeps_changing_is_refused() -> None:
    # The kernel reports 4096 bytes for these and returns fewer, as if they had shrunk.
    settings = [path for path in Path("/sys/kernel/mm").glob("*/*") if path.name == "enabled"]
    if not settings or settings[0].stat().st_size == 0:
        pytest.skip("needs a file that is not as long as it says")
    with pytest.raises(BadImage, match="changed while it was read"):
        read_image_bytes(settings[0])


def test_an_unreadable_file_says_why(tmp_path: Path) -> None:
    path = tmp_path / "secret.jpg"
    path.write_bytes(b"x")
    path.chmod(0)
    if os.access(path, os.R_OK):
        pytest.skip("this user may read everything")
    with pytest.raises(BadImage, match="Permission denied"):
        read_image_bytes(path)


@pytest.mark.parametrize("orientation", STORED_AS)
def test_png_of_every_orientation_equals_its_upright_twin(orientation: int) -> None:
    upright = tiny_photo(1)
    data = _saved(_stored(upright, orientation), "PNG", exif=_exif(orientation))
    assert np.array_equal(np.asarray(decode(data)), np.asarray(upright))


@pytest.mark.parametrize("orientation", STORED_AS)
def test_jpeg_of_every_orientation_resembles_its_upright_twin(orientation: int) -> None:
    upright = tiny_photo(2)
    stored = _stored(upright, orientation)
    data = _saved(stored, "JPEG", exif=_exif(orientation), quality=95, subsampling=0)
    assert _difference(decode(data), upright) < 2.0


@pytest.mark.parametrize("orientation", [0, 9, 77])
def test_invalid_orientations_change_nothing(orientation: int) -> None:
    upright = tiny_photo(1)
    data = _saved(upright, "PNG", exif=_exif(orientation))
    assert np.array_equal(np.asarray(decode(data)), np.asarray(upright))


def test_an_image_with_damaged_exif_is_read() -> None:
    upright = tiny_photo(1)
    data = _saved(upright, "PNG", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\x01\x12")
    assert np.array_equal(np.asarray(decode(data)), np.asarray(upright))


def test_jpegs_are_decoded_at_a_reduced_but_sufficient_scale() -> None:
    data = _saved(tiny_photo(3).resize((1600, 1200)), "JPEG")
    assert decode(data).size == (1600, 1200)
    assert decode(data, at_least_px=224).size == (400, 300)
    assert decode(data, at_least_px=2000).size == (1600, 1200)
    assert memory_to_decode(data, at_least_px=224) == 4 * 400 * 300


def test_phone_jpegs_with_several_images_are_decoded_at_a_reduced_scale() -> None:
    first, second = tiny_photo(3).resize((1600, 1200)), tiny_photo(4).resize((1600, 1200))
    stream = io.BytesIO()
    first.save(stream, "MPO", save_all=True, append_images=[second])
    small = decode(stream.getvalue(), at_least_px=224)
    assert small.size == (400, 300)
    assert _difference(small, first.resize((400, 300))) < 4.0


def test_sixteen_bits_are_scaled_and_not_clipped() -> None:
    ramp = np.linspace(0, 65535, 256 * 16).astype(np.uint16).reshape(16, 256)
    for format_ in ("PNG", "TIFF"):
        image = decode(_saved(Image.fromarray(ramp), format_))
        assert image.mode == "RGB"
        difference = np.asarray(image)[:, :, 0].astype(float) - ramp / 257.0
        assert np.abs(difference).max() <= 1.0


def test_sixteen_bit_ppm_and_big_endian_tiff_are_scaled() -> None:
    ramp = np.linspace(0, 65535, 64).astype(">u2")
    ppm = b"P5 64 1 65535\n" + ramp.tobytes()
    assert np.asarray(decode(ppm))[0, [0, 32, 63], 0].tolist() == [0, 129, 255]
    tags = [
        (256, 3, 64),
        (257, 3, 1),
        (258, 3, 16),
        (259, 3, 1),
        (262, 3, 1),
        (273, 4, 110),
        (278, 3, 1),
        (279, 4, 128),
    ]
    entries = b"".join(
        struct.pack(">HHI", tag, kind, 1)
        + (struct.pack(">HH", value, 0) if kind == 3 else struct.pack(">I", value))
        for tag, kind, value in tags
    )
    tiff = b"MM\0*" + struct.pack(">IH", 8, len(tags)) + entries + bytes(4) + ramp.tobytes()
    assert len(tiff) == 110 + 128
    assert np.asarray(decode(tiff))[0, [0, 32, 63], 0].tolist() == [0, 129, 255]


@pytest.mark.parametrize("highest", [1.0, 255.0, 65535.0, 1e6])
def test_the_scale_of_float_images_is_detected(highest: float) -> None:
    values = np.array([[0.0, highest / 2, highest]], dtype=np.float32)
    image = np.asarray(decode(_saved(Image.fromarray(values), "TIFF")))
    assert image[0, :, 0].tolist() == pytest.approx([0, 127, 255], abs=1)


def test_nearly_black_sixteen_bits_stay_nearly_black() -> None:
    dark = np.array([[0, 1]], dtype=np.uint16)
    assert np.asarray(decode(_saved(Image.fromarray(dark), "PNG"))).max() <= 1


def test_cmyk_and_grey_become_rgb() -> None:
    photo = tiny_photo(5)
    cmyk = decode(_saved(photo.convert("CMYK"), "JPEG", quality=95))
    assert cmyk.mode == "RGB"
    assert _difference(cmyk, photo) < 6.0
    for mode in ("L", "1", "LA", "P"):
        data = _saved(photo.convert(mode), "PNG")
        assert decode(data).mode == "RGB"
        assert _difference(decode(data), photo.convert(mode).convert("RGB")) < 1.0


def test_transparency_survives_and_is_shown_on_white() -> None:
    rgba = tiny_photo(6).convert("RGBA")
    alpha = np.zeros((rgba.height, rgba.width), dtype=np.uint8)
    alpha[:, rgba.width // 2 :] = 255
    rgba.putalpha(Image.fromarray(alpha))
    image = decode(_saved(rgba, "PNG"))
    assert image.mode == "RGBA"
    shown = np.asarray(on_white(image))
    assert (shown[:, : rgba.width // 2] == 255).all()
    assert np.array_equal(
        shown[:, rgba.width // 2 :], np.asarray(tiny_photo(6))[:, rgba.width // 2 :]
    )


def test_half_transparent_black_is_grey_on_white() -> None:
    shown = np.asarray(on_white(Image.new("RGBA", (2, 2), (0, 0, 0, 128))))
    assert (shown == 127).all()


def test_palettes_with_transparency_are_shown_on_white() -> None:
    palette = Image.new("P", (4, 4), 0)
    palette.putpalette([255, 0, 0, 0, 255, 0])
    palette.putpixel((1, 1), 1)
    data = _saved(palette, "PNG", transparency=0)
    shown = np.asarray(on_white(decode(data)))
    assert shown[0, 0].tolist() == [255, 255, 255]
    assert shown[1, 1].tolist() == [0, 255, 0]


def test_rgb_with_a_transparent_colour_is_shown_on_white() -> None:
    photo = Image.new("RGB", (4, 4), (10, 20, 30))
    photo.putpixel((2, 2), (200, 0, 0))
    shown = np.asarray(on_white(decode(_saved(photo, "PNG", transparency=(10, 20, 30)))))
    assert shown[0, 0].tolist() == [255, 255, 255]
    assert shown[2, 2].tolist() == [200, 0, 0]


def test_opaque_alpha_is_plain_rgb() -> None:
    assert decode(_saved(tiny_photo(7).convert("RGBA"), "PNG")).mode == "RGB"


@pytest.mark.parametrize("format_", ["GIF", "WEBP", "PNG", "TIFF"])
def test_animations_show_their_first_frame(format_: str) -> None:
    frames = [Image.new("RGB", (32, 24), colour) for colour in ("red", "green", "blue")]
    data = _saved(frames[0], format_, save_all=True, append_images=frames[1:])
    red = np.asarray(decode(data)).astype(int)
    assert red.shape == (24, 32, 3)
    assert (red[..., 0] > 240).all()
    assert (red[..., 1:] < 15).all()


@pytest.mark.parametrize("size", [(1, 1), (1, 3000), (3000, 1)])
def test_images_of_extreme_shapes_are_read(size: tuple[int, int]) -> None:
    assert decode(_saved(Image.new("RGB", size, "red"), "PNG"), at_least_px=224).size == size


def test_files_of_other_kinds_are_refused() -> None:
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("photo.jpg", _saved(tiny_photo(1), "JPEG"))
    others = {
        "zip": archive.getvalue(),
        "pdf": b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n1 0 obj\n<</Type/Catalog>>\nendobj\n",
        "eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n",
        "svg": b'<svg xmlns="http://www.w3.org/2000/svg"/>',
        "ico": _saved(tiny_photo(1).resize((16, 16)), "ICO"),
        "text": b"hello\n",
        "nothing": b"",
        "zeros": bytes(5000),
    }
    for data in others.values():
        with pytest.raises(BadImage, match="not an image in a supported format"):
            decode(data)
        assert memory_to_decode(data) == 0


def test_heic_without_its_extra_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    with pytest.raises(BadImage, match="pillow-heif is not installed") as caught:
        decode(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic")
    assert caught.value.next_step == 'pip install "sbtk[photos]"'


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
@pytest.mark.parametrize("format_", ["HEIF", "AVIF"])
def test_heic_and_avif_are_read_upright(format_: str, orientation: int) -> None:
    if format_ == "HEIF":
        pytest.importorskip("pillow_heif").register_heif_opener()
    photo = Image.new("RGB", (96, 64), (200, 30, 30))
    photo.paste((30, 30, 200), (0, 0, 48, 64))
    exif = Image.Exif()
    exif[274] = orientation
    jpeg, buffer = io.BytesIO(), io.BytesIO()
    photo.save(jpeg, "JPEG", quality=95, exif=exif)
    if format_ == "HEIF":
        photo.info["exif"] = exif.tobytes()  # makes pillow-heif write the orientation as phones do
        photo.save(buffer, format_, quality=90)
    else:
        photo.save(buffer, format_, quality=90, exif=exif)
    found = np.asarray(decode(buffer.getvalue()), dtype=np.int16)
    expected = np.asarray(decode(jpeg.getvalue()), dtype=np.int16)
    assert found.shape == expected.shape
    assert np.abs(found - expected).mean() < 12
    assert memory_to_decode(buffer.getvalue()) >= 96 * 64 * 4


def test_brands_distinguish_heic_avif_and_videos() -> None:
    def head(*brands: bytes) -> bytes:
        size = 16 + 4 * (len(brands) - 1)
        return size.to_bytes(4, "big") + b"ftyp" + brands[0] + bytes(4) + b"".join(brands[1:])

    assert is_heic(head(b"heic", b"mif1"))
    assert is_heic(head(b"heix"))
    assert is_heic(head(b"mif1", b"heic"))
    assert is_heic(head(b"msf1", b"hevc"))
    assert not is_heic(head(b"avif", b"mif1"))
    assert not is_heic(head(b"mif1", b"miaf", b"avif"))
    assert not is_heic(head(b"qt  "))
    assert not is_heic(head(b"mp42", b"isom"))
    assert not is_heic(b"")


@pytest.mark.parametrize("format_", ["JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP", "PPM"])
def test_truncated_files_are_refused(format_: str) -> None:
    data = _saved(tiny_photo(8), format_)
    for share in (0.1, 0.5, 0.8):
        with pytest.raises(BadImage):
            decode(data[: int(share * len(data))])


def test_a_png_with_a_bad_checksum_is_refused() -> None:
    data = bytearray(_saved(tiny_photo(8), "PNG"))
    data[20] ^= 0xFF
    with pytest.raises(BadImage):
        decode(bytes(data))


@pytest.mark.parametrize("format_", ["JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP", "PPM"])
def test_flipped_bytes_give_an_image_or_a_reason(format_: str) -> None:
    data = _saved(tiny_photo(9).resize((48, 40)), format_)
    chance = random.Random(format_)
    for _ in range(150):
        damaged = bytearray(data)
        for _ in range(chance.randint(1, 8)):
            # Parsers break on headers, so half of the damage is there.
            end = 64 if chance.random() < 0.5 else len(damaged)
            damaged[chance.randrange(end)] = chance.randrange(256)
        try:
            image = decode(bytes(damaged), at_least_px=224)
        except BadImage:
            continue
        assert image.mode in ("RGB", "RGBA")


def test_a_png_bomb_is_refused_by_its_header_in_little_memory(tmp_path: Path) -> None:
    bomb = png_of_zeros(20_000, 20_000)
    assert len(bomb) < 60_000
    path = tmp_path / "bomb.png"
    path.write_bytes(bomb)
    script = (
        "import sys\n"
        "from sbtk_runtime.errors import BadImage\n"
        "from sbtk_runtime.images import decode, read_image_bytes\n"
        "from sbtk_runtime.machine import peak_resident_bytes\n"
        "peak = lambda: peak_resident_bytes() // 1_000_000\n"
        "before = peak()\n"
        "try:\n"
        "    decode(read_image_bytes(sys.argv[1]), at_least_px=224)\n"
        "except BadImage as problem:\n"
        "    print(peak() - before, problem.found, problem.expected)\n"
    )
    grown_mb, _, sentence = run_python(script, path).partition(" ")
    assert int(grown_mb) < 20
    assert "pixels" in sentence
    assert f"at most {MAX_APART_BYTES >> 20} MiB" in sentence


def test_a_bomb_just_above_the_limit_is_refused() -> None:
    bomb = png_of_zeros(7_000, 7_001)
    with pytest.raises(BadImage, match="7000 x 7001 pixels"):
        decode(bomb)
    assert memory_to_decode(bomb) == 0


def test_a_webp_bomb_is_refused_by_its_header() -> None:
    """WebP's animation decoder holds 20 bytes per pixel: 2.2 GB for this file."""
    frames = [Image.new("RGBA", (64, 64), (255, 0, 0, alpha)) for alpha in (9, 10)]
    bomb = bytearray(_saved(frames[0], "WEBP", save_all=True, append_images=frames[1:]))
    canvas = bomb.index(b"VP8X") + 12
    bomb[canvas : canvas + 6] = (9_999).to_bytes(3, "little") + (10_999).to_bytes(3, "little")
    with pytest.raises(BadImage, match="10000 x 11000 pixels, which takes some") as caught:
        decode(bytes(bomb))
    assert caught.value.expected == "at most 400 MiB"
    assert memory_to_decode(bytes(bomb)) == 0


def test_progressive_jpegs_need_more_memory_at_any_scale() -> None:
    photo = tiny_photo(3).resize((1600, 1200))
    progressive = _saved(photo, "JPEG", progressive=True)
    extra = memory_to_decode(progressive, at_least_px=224) - memory_to_decode(
        _saved(photo, "JPEG"), at_least_px=224
    )
    # 16-bit coefficients of luma and two quarters of chroma.
    assert extra == 3 * 1600 * 1200
    assert decode(progressive, at_least_px=224).size == (400, 300)


def test_images_that_misstate_their_canvas_are_refused() -> None:
    large_canvas = b"GIF89a" + struct.pack("<HHBBB", 60_000, 60_000, 0, 0, 0)
    frame = b"," + struct.pack("<HHHHB", 0, 0, 1, 1, 0) + b"\x02\x02\x44\x01\0;"
    with pytest.raises(BadImage, match="pixels"):
        decode(large_canvas + frame)
    small_canvas = b"GIF89a" + struct.pack("<HHBBB", 1, 1, 0, 0, 0)
    large_frame = b"," + struct.pack("<HHHHB", 0, 0, 60_000, 60_000, 0) + b"\x02\x02\x44\x01\0;"
    with pytest.raises(BadImage):
        decode(small_canvas + large_frame)


def test_a_png_with_a_text_bomb_takes_little_memory() -> None:
    data = _saved(tiny_photo(1), "PNG")
    text = b"Comment\0\0" + zlib.compress(bytes(80 << 20), 9)
    bomb = data[:33] + _chunk(b"zTXt", text) + data[33:]
    with contextlib.suppress(BadImage):
        assert decode(bomb).mode == "RGB"


def test_the_first_images_of_every_format_can_be_decoded_on_many_threads() -> None:
    """Pillow's own registry of formats is filled late, and is not thread-safe."""
    datas = [_saved(tiny_photo(1), format_) for format_ in ("WEBP", "TIFF", "JPEG", "PPM")] * 8
    script = (
        "import sys\n"
        "from concurrent.futures import ThreadPoolExecutor\n"
        "from sbtk_runtime.images import decode\n"
        "sizes = [int(text) for text in sys.argv[1:]]\n"
        "datas = [sys.stdin.buffer.read(size) for size in sizes]\n"
        "with ThreadPoolExecutor(16) as pool:\n"
        "    print(len({image.size for image in pool.map(decode, datas)}))\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(
        [sys.executable, "-c", script, *(str(len(data)) for data in datas)],
        input=b"".join(datas),
        capture_output=True,
        env=environment,
        check=True,
    )
    assert done.stdout.strip() == b"1"
    assert done.stderr == b""


def test_decoding_does_not_change_the_warning_filters() -> None:
    before = list(warnings.filters)
    data = _saved(tiny_photo(1).convert("P"), "PNG", transparency=b"\x80" * 10)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(decode, [data] * 64))
    assert list(warnings.filters) == before


def test_suffixes_cover_the_formats() -> None:
    for suffix, format_ in Image.registered_extensions().items():
        if format_ in images.FORMATS and suffix in (".jpg", ".png", ".webp", ".gif", ".tif"):
            assert suffix in images.SUFFIXES


def png_of_zeros(width: int, height: int) -> bytes:
    """Return a valid black 1-bit PNG, without holding its pixels."""
    compressor = zlib.compressobj(9)
    row = bytes(1 + (width + 7) // 8)
    rows = b"".join(compressor.compress(row) for _ in range(height)) + compressor.flush()
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    chunks = _chunk(b"IHDR", header) + _chunk(b"IDAT", rows) + _chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks


def _chunk(name: bytes, content: bytes) -> bytes:
    return (
        struct.pack(">I", len(content))
        + name
        + content
        + struct.pack(">I", zlib.crc32(name + content))
    )


def _saved(image: Image.Image, format_: str, **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, format_, **options)
    return stream.getvalue()


def _stored(upright: Image.Image, orientation: int) -> Image.Image:
    method = STORED_AS[orientation]
    return upright if method is None else upright.transpose(method)


def _exif(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[ORIENTATION_TAG] = orientation
    return exif


def _difference(one: Image.Image, other: Image.Image) -> float:
    """Return the mean absolute difference of two images of the same size."""
    assert one.size == other.size
    pixels: list[NDArray[np.float64]] = [
        np.asarray(image.convert("RGB"), dtype=np.float64) for image in (one, other)
    ]
    return float(np.abs(pixels[0] - pixels[1]).mean())
