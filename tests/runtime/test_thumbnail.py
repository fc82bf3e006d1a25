"""Thumbnails are upright and have no metadata."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from sbtk_runtime.errors import BadImage
from sbtk_runtime.thumbnail import jpeg_bytes, png_bytes, thumbnail

ORIENTATION, CAMERA_MAKER = 0x0112, 0x010F


def jpeg(image: Image.Image, orientation: int = 1) -> bytes:
    exif = Image.Exif()
    exif[ORIENTATION], exif[CAMERA_MAKER] = orientation, "Maker of cameras"
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", exif=exif, comment=b"taken at home", quality=95)
    return buffer.getvalue()


def test_thumbnails_are_upright(tmp_path: Path) -> None:
    path = tmp_path / "turned.jpg"
    path.write_bytes(jpeg(Image.new("RGB", (800, 400), "red"), orientation=6))
    assert thumbnail(path, 100).size == (50, 100)


def test_bytes_and_their_file_give_the_same_thumbnail(tmp_path: Path) -> None:
    data = jpeg(Image.linear_gradient("L").convert("RGB"))
    path = tmp_path / "photo.jpg"
    path.write_bytes(data)
    assert thumbnail(data, 64) == thumbnail(path, 64)
    assert thumbnail(data, 64).size == (64, 64)


def test_small_photos_are_not_enlarged() -> None:
    assert thumbnail(jpeg(Image.new("RGB", (40, 30))), 100).size == (40, 30)


def test_transparent_parts_become_white() -> None:
    buffer = io.BytesIO()
    Image.new("RGBA", (20, 20), (255, 0, 0, 0)).save(buffer, "PNG")
    assert thumbnail(buffer.getvalue()).getpixel((10, 10)) == (255, 255, 255)


@pytest.mark.parametrize("written", [jpeg_bytes, png_bytes], ids=["jpeg", "png"])
def test_thumbnails_have_no_camera_and_no_comment(written: Callable[[Image.Image], bytes]) -> None:
    original = jpeg(Image.new("RGB", (300, 200), (200, 30, 30)))
    assert b"Maker of cameras" in original
    assert b"taken at home" in original
    copy = written(thumbnail(original, 100))
    assert b"Maker" not in copy
    assert b"taken at home" not in copy
    shown = Image.open(io.BytesIO(copy)).convert("RGB")
    assert shown.size == (100, 67)
    middle = shown.getpixel((50, 33))
    assert isinstance(middle, tuple)
    assert max(abs(a - b) for a, b in zip(middle, (200, 30, 30), strict=True)) < 8


def test_other_files_have_no_thumbnail(tmp_path: Path) -> None:
    with pytest.raises(BadImage):
        thumbnail(b"nothing")
    with pytest.raises(BadImage, match="No such file"):
        thumbnail(tmp_path / "absent.jpg")
