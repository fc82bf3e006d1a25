"""Photos are squeezed, sketches are cut to their ink; both come out as the model expects."""

from __future__ import annotations

import io
import os
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageOps

from sbtk_runtime.errors import BadImage, SbtkError
from sbtk_runtime.images import decode
from sbtk_runtime.preprocess import (
    CROPPED,
    SIZE_PX,
    Kind,
    decode_image,
    detect_kind,
    photo_pixels,
    prepare,
    require_kind,
)
from tests.tiny import tiny_photo, tiny_sketch


@pytest.mark.parametrize("size", [(1, 1), (1, 3000), (3000, 1), (224, 224), (640, 480), (50, 60)])
def test_photos_of_any_size_become_a_square(size: tuple[int, int]) -> None:
    pixels = prepare(_png(tiny_photo(1).resize(size)), "photo").pixels
    assert pixels.shape == (SIZE_PX, SIZE_PX, 3)
    assert pixels.dtype == np.uint8


def test_a_photo_of_the_right_size_is_not_changed() -> None:
    photo = tiny_photo(1).resize((SIZE_PX, SIZE_PX))
    assert np.array_equal(photo_pixels(photo), np.asarray(photo))


def test_grey_files_have_the_pixels_of_the_same_in_colour() -> None:
    """They stay in one channel until they are prepared."""
    sketch, photo = tiny_sketch(3).convert("L"), tiny_photo(3).convert("L").resize((900, 700))
    cases: tuple[tuple[Image.Image, Kind], ...] = (
        (sketch, "sketch"),
        (photo, "photo"),
        (photo, "sketch"),
    )
    for grey, kind in cases:
        for name in ("PNG", "JPEG"):
            data = _saved(grey, name)
            assert decode_image(data, kind).mode == "L"
            in_colour = decode(data, at_least_px=None if kind == "sketch" else SIZE_PX)
            assert in_colour.mode == "RGB"
            expected = CROPPED.prepare_image(in_colour, kind).pixels
            assert np.array_equal(prepare(data, kind).pixels, expected)
            assert detect_kind(decode_image(data, kind)) == detect_kind(in_colour)


def test_photos_are_not_cropped() -> None:
    photo = Image.new("RGB", (400, 100), "black")
    ImageDraw.Draw(photo).rectangle((0, 0, 399, 99), outline="white", width=8)
    pixels = photo_pixels(photo)[:, :, 0]
    for edge in (pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]):
        assert (edge > 200).all()


def test_a_photo_is_the_same_from_a_reduced_jpeg() -> None:
    photo = tiny_photo(3).resize((1800, 1500))
    data = _saved(photo, "JPEG", quality=95)
    difference = np.abs(prepare(data, "photo").pixels.astype(int) - photo_pixels(photo).astype(int))
    assert difference.mean() < 2.0


def test_transparent_parts_of_photos_are_white() -> None:
    photo = Image.new("RGBA", (300, 300), (0, 0, 0, 0))
    assert (prepare(_png(photo), "photo").pixels == 255).all()


def test_prepare_equals_its_separate_steps() -> None:
    data = _png(tiny_photo(4))
    kinds: tuple[Kind, ...] = ("sketch", "photo")
    for kind in kinds:
        parts = CROPPED.prepare_image(decode_image(data, kind), kind)
        assert np.array_equal(prepare(data, kind).pixels, parts.pixels)


def test_a_sketch_is_dark_ink_on_white() -> None:
    prepared = prepare(_png(tiny_sketch(1)), "sketch")
    assert prepared.notices == ()
    assert prepared.pixels.shape == (SIZE_PX, SIZE_PX, 3)
    assert np.array_equal(prepared.pixels[..., 0], prepared.pixels[..., 2])
    assert (_border(prepared.pixels) == 255).all()
    assert prepared.pixels.min() == 0
    assert (prepared.pixels > 200).mean() > 0.5


def test_the_position_and_size_of_a_drawing_do_not_matter() -> None:
    small, large = Image.new("L", (400, 300), 255), Image.new("L", (400, 300), 255)
    ImageDraw.Draw(small).ellipse((20, 30, 120, 130), outline=0, width=5)
    ImageDraw.Draw(large).ellipse((150, 40, 350, 240), outline=0, width=10)
    one, other = _sketch(small), _sketch(large)
    # Inside and outside are the same; only the smoothing of the outline differs.
    assert (np.abs(one.astype(int) - other.astype(int)) > 64).mean() < 0.02


def test_a_frame_along_the_edge_is_ink_and_gets_a_margin() -> None:
    page = Image.new("L", (300, 200), 255)
    ImageDraw.Draw(page).rectangle((0, 0, 299, 199), outline=0, width=6)
    prepared = CROPPED.sketch_pixels(page)
    assert prepared.notices == ()
    ink = prepared.pixels[:, :, 0] < 128
    rows, columns = np.flatnonzero(ink.any(axis=1)), np.flatnonzero(ink.any(axis=0))
    assert 8 <= columns[0] <= 16
    assert 8 <= SIZE_PX - 1 - columns[-1] <= 16
    assert abs(rows[0] - (SIZE_PX - 1 - rows[-1])) <= 2


def test_light_on_dark_equals_its_negative_and_says_so() -> None:
    sketch = tiny_sketch(2)
    inverted = prepare(_png(ImageOps.invert(sketch)), "sketch")
    assert np.array_equal(inverted.pixels, prepare(_png(sketch), "sketch").pixels)
    assert any("inverted" in notice for notice in inverted.notices)


@pytest.mark.parametrize("ink", [(0, 0, 0), (255, 255, 255), (200, 0, 0), (240, 240, 240)])
def test_transparent_sketches_of_any_ink_equal_black_on_white(ink: tuple[int, int, int]) -> None:
    sketch = tiny_sketch(3)
    drawn = Image.new("RGBA", sketch.size, (*ink, 0))
    drawn.putalpha(ImageOps.invert(sketch))
    prepared = prepare(_png(drawn), "sketch")
    difference = prepared.pixels.astype(int) - prepare(_png(sketch), "sketch").pixels.astype(int)
    assert np.abs(difference).mean() < 1.0
    assert any("transparent" in notice.lower() for notice in prepared.notices)


def test_a_faint_pencil_gets_full_contrast() -> None:
    sketch = tiny_sketch(4)
    faint = sketch.point(lambda value: 200 + value * 55 // 255)
    difference = _sketch(faint).astype(int) - _sketch(sketch).astype(int)
    assert np.abs(difference).mean() < 3.0


@pytest.mark.parametrize(
    "page",
    [
        Image.new("L", (100, 100), 255),
        Image.new("L", (100, 100), 0),
        Image.new("RGB", (100, 100), (120, 130, 140)),
        Image.new("RGBA", (100, 100), (0, 0, 0, 0)),
        Image.new("RGBA", (100, 100), (255, 255, 255, 7)),
        Image.new("L", (1, 1), 0),
        Image.effect_noise((100, 100), 3.0).point(lambda value: min(255, value + 120)),
    ],
)
def test_empty_pages_are_refused(page: Image.Image) -> None:
    with pytest.raises(BadImage, match="the sketch is empty"):
        prepare(_png(page), "sketch")


@pytest.mark.parametrize("place", [(50, 50), (0, 0), (99, 99)])
def test_a_dot_is_accepted_and_stays_a_dot(place: tuple[int, int]) -> None:
    page = Image.new("L", (100, 100), 255)
    page.putpixel(place, 0)
    ink = _sketch(page)[:, :, 0] < 128
    assert 1 <= ink.sum() < 400
    rows, columns = np.nonzero(ink)
    assert abs(rows.mean() - SIZE_PX / 2) < 8
    assert abs(columns.mean() - SIZE_PX / 2) < 8


def test_huge_sketches_are_reduced_before_analysis() -> None:
    page = Image.new("L", (6000, 4000), 255)
    ImageDraw.Draw(page).ellipse((1000, 500, 5000, 3500), outline=0, width=12)
    ink = _sketch(page)[:, :, 0] < 128
    assert ink.any()
    assert not ink[100:120, 100:120].any()


def test_long_thin_sketches_keep_their_shape() -> None:
    page = Image.new("L", (3000, 20), 255)
    ImageDraw.Draw(page).line((10, 10, 2990, 10), fill=0, width=5)
    assert (_sketch(page) < 200).any()


def test_the_exif_orientation_of_a_sketch_is_respected() -> None:
    sketch = tiny_sketch(5)
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = _saved(sketch.transpose(Image.Transpose.ROTATE_90), "PNG", exif=exif)
    assert np.array_equal(prepare(turned, "sketch").pixels, prepare(_png(sketch), "sketch").pixels)


def test_kinds_are_validated_by_name() -> None:
    assert require_kind("sketch") == "sketch"
    assert require_kind("photo") == "photo"
    with pytest.raises(SbtkError, match="'sketch' or 'photo'"):
        require_kind("Photo")


def _sketch(page: Image.Image) -> NDArray[np.uint8]:
    return CROPPED.sketch_pixels(page).pixels


def _border(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])


def _png(image: Image.Image) -> bytes:
    return _saved(image, "PNG")


def _saved(image: Image.Image, format_: str, **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, format_, **options)
    return stream.getvalue()


@pytest.mark.parametrize("seed", range(5))
def test_sketches_and_photos_are_distinguished(seed: int) -> None:
    for sketch in (tiny_sketch(seed), ImageOps.invert(tiny_sketch(seed))):
        assert _detected(sketch) == "sketch"
    assert _detected(tiny_photo(seed)) == "photo"
    assert _detected(tiny_photo(seed).resize((3000, 2000))) == "photo"


def test_a_drawing_with_a_coloured_pen_or_on_nothing_is_a_sketch() -> None:
    drawing = Image.new("RGBA", (400, 300), (0, 0, 0, 0))
    ImageDraw.Draw(drawing).ellipse((60, 60, 300, 240), outline=(200, 30, 30, 255), width=3)
    assert _detected(drawing) == "sketch"
    assert _detected(Image.new("L", (300, 300), 255)) == "sketch"


@pytest.mark.data
@pytest.mark.skipif(not os.environ.get("SBTK_DATA"), reason="SBTK_DATA names no research images")
def test_real_sketches_and_photos_are_distinguished() -> None:
    """Of Sketchy, no sketch may be taken for a photo; photos on a plain background may be."""
    folder = Path(os.environ["SBTK_DATA"])
    shares = {}
    for kind in ("sketch", "photo"):
        files = sorted(path for path in (folder / kind).rglob("*") if path.is_file())[::5]
        shares[kind] = np.mean([_detected_in(path.read_bytes()) == kind for path in files])
    assert shares["sketch"] == 1.0
    assert shares["photo"] > 0.9


def _detected(image: Image.Image) -> Kind:
    return _detected_in(_png(image))


def _detected_in(data: bytes) -> Kind:
    return detect_kind(decode_image(data, "photo"))
