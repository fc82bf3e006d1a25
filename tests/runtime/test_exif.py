"""Metadata of photos, from cameras and from attackers."""

from __future__ import annotations

import io
from datetime import datetime
from typing import Any

import numpy as np
import pytest
from PIL import Image
from PIL.TiffImagePlugin import IFDRational

from sbtk_runtime.exif import PhotoDetails, read_details
from tests.tiny import tiny_photo

FORMATS = ("JPEG", "PNG", "WEBP", "TIFF")
GPS = {1: "N", 2: (52.0, 31.0, 12.0), 3: "W", 4: (13.0, 24.0, 36.0)}


def file_with(
    base: dict[int, Any], photo: dict[int, Any], gps: dict[int, Any], format_: str = "JPEG"
) -> bytes:
    exif = Image.Exif()
    exif.update(base)
    exif.get_ifd(0x8769).update(photo)
    exif.get_ifd(0x8825).update(gps)
    buffer = io.BytesIO()
    tiny_photo(1).resize((60, 40)).save(buffer, format_, exif=exif)
    return buffer.getvalue()


# Pillow writes no nested tags to TIFF.
@pytest.mark.parametrize("format_", [name for name in FORMATS if name != "TIFF"])
def test_the_metadata_of_a_camera_is_read(format_: str) -> None:
    base = {0x010F: "NIKON CORPORATION", 0x0110: "NIKON D750", 0x0112: 1}
    photo = {
        0x9003: "2019:07:21 18:05:33",
        0xA434: "50.0 mm f/1.8",
        0x829A: IFDRational(1, 250),
        0x829D: IFDRational(28, 10),
        0x8827: 400,
        0x920A: IFDRational(50, 1),
    }
    assert read_details(file_with(base, photo, GPS, format_)) == PhotoDetails(
        width_px=60,
        height_px=40,
        taken=datetime(2019, 7, 21, 18, 5, 33),
        camera="NIKON D750",
        lens="50.0 mm f/1.8",
        exposure="1/250 s, f/2.8, ISO 400, 50 mm",
        latitude=52.52,
        longitude=-13.41,
    )


def test_the_tags_of_a_tiff_are_read() -> None:
    base = {0x010F: "Epson", 0x0110: "V600", 0x0132: "2011:02:03 04:05:06"}
    details = read_details(file_with(base, {}, {}, "TIFF"))
    assert (details.camera, details.taken) == ("Epson V600", datetime(2011, 2, 3, 4, 5, 6))


def test_maker_and_model_are_joined_and_the_size_is_upright() -> None:
    details = read_details(file_with({0x010F: "Google", 0x0110: "Pixel 8", 0x0112: 6}, {}, {}))
    assert details.camera == "Google Pixel 8"
    assert (details.width_px, details.height_px) == (40, 60)


@pytest.mark.parametrize("format_", FORMATS)
def test_a_photo_without_metadata_has_its_size_only(format_: str) -> None:
    buffer = io.BytesIO()
    tiny_photo(2).resize((30, 20)).save(buffer, format_)
    assert read_details(buffer.getvalue()) == PhotoDetails(width_px=30, height_px=20)


@pytest.mark.parametrize(
    "date",
    [
        "0000:00:00 00:00:00",
        "0001:01:01 00:00:00",
        "1800:01:01 00:00:00",
        "9999:12:31 23:59:59",
        "2019:13:45 99:99:99",
        "    :  :     :  :  ",
        "yesterday",
        "",
        "\0",
        "2019-07-21",
    ],
)
def test_impossible_dates_are_left_out(date: str) -> None:
    assert read_details(file_with({0x0132: date}, {0x9003: date}, {})).taken is None


def test_an_impossible_date_gives_way_to_the_next() -> None:
    data = file_with({0x0132: "2020:01:02 03:04:05"}, {0x9003: "0000:00:00 00:00:00"}, {})
    assert read_details(data).taken == datetime(2020, 1, 2, 3, 4, 5)


@pytest.mark.parametrize(
    "gps",
    [
        {1: "N", 2: (0.0, 0.0, 0.0), 3: "E", 4: (0.0, 0.0, 0.0)},
        {1: "N", 2: (91.0, 0.0, 0.0), 3: "E", 4: (10.0, 0.0, 0.0)},
        {1: "N", 2: (9.0, 0.0, 0.0), 3: "E", 4: (1e9, 0.0, 0.0)},
        {1: "N", 2: (IFDRational(0, 0), 0.0, 0.0), 3: "E", 4: (10.0, 0.0, 0.0)},
        {1: "N", 2: (50.0, 0.0, 0.0)},
        {2: (50.0, 0.0, 0.0), 4: (10.0, 0.0, 0.0)},
        {1: "X", 2: (50.0, 0.0, 0.0), 3: "E", 4: (10.0, 0.0, 0.0)},
        {},
    ],
)
def test_impossible_places_are_left_out(gps: dict[int, Any]) -> None:
    details = read_details(file_with({}, {}, gps))
    assert (details.latitude, details.longitude) == (None, None)


def test_texts_are_short_and_on_one_line() -> None:
    base = {0x010F: "<script>alert(1)</script>", 0x0110: "a\n\x1b[31mb\u202e" + "x" * 5000}
    details = read_details(file_with(base, {0xA434: "\0\0"}, {}))
    assert details.camera is not None
    assert details.camera.isprintable()
    assert details.camera.startswith("<script>alert(1)</script> a")
    assert len(details.camera) <= 80
    assert details.lens is None


def test_texts_in_utf_8_are_read() -> None:
    base = {0x010F: "Caméra".encode(), 0x0110: "\u202eאגד".encode()}
    assert read_details(file_with(base, {}, {})).camera == r"Caméra \u202eאגד"
    assert read_details(file_with({0x0110: "Caméra".encode("latin-1")}, {}, {})).camera == "Caméra"


@pytest.mark.parametrize("value", [IFDRational(0, 0), IFDRational(1, 0), 0, "text", b"\xff", ()])
@pytest.mark.parametrize("tag", [0x829A, 0x829D, 0x920A])
def test_impossible_exposures_are_left_out(value: Any, tag: int) -> None:
    try:
        data = file_with({}, {tag: value}, {})
    except (TypeError, ValueError, ZeroDivisionError, AttributeError):
        pytest.skip("Pillow cannot write this")
    exposure = read_details(data).exposure
    assert exposure is None or ("nan" not in exposure and "inf" not in exposure)


@pytest.mark.parametrize("format_", FORMATS)
def test_damaged_files_never_raise(format_: str) -> None:
    whole = file_with(
        {0x010F: "Maker", 0x0110: "Model"}, {0x9003: "2019:07:21 18:05:33"}, GPS, format_
    )
    random = np.random.default_rng(3)
    for _ in range(300):
        data = bytearray(whole)
        for _ in range(random.integers(1, 8)):
            data[random.integers(0, min(len(data), 600))] = random.integers(0, 256)
        found = read_details(bytes(data[: random.integers(1, len(data) + 1)]))
        assert found.camera is None or len(found.camera) <= 80
        assert found.latitude is None or -90 <= found.latitude <= 90
    assert read_details(b"") == PhotoDetails()
