"""A camera RAW is read from its embedded JPEG, upright, or developed if that is unusable."""

from __future__ import annotations

import contextlib
import io
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sbtk_runtime.embedding.stream import DecodePool
from sbtk_runtime.errors import BadImage, LargeImage
from sbtk_runtime.image_feed import MAX_APART_BYTES
from sbtk_runtime.images import decode, memory_to_decode
from sbtk_runtime.preprocess import CROPPED, prepare
from sbtk_runtime.raw_photo import is_raw
from tests.tiny import tiny_photo
from tests.tiny_raw import tiny_dng, two_colours

WIDE, TALL = (480, 320), (320, 480)
#: Position of blue for each orientation of an image that is blue on the left.
SIDES = {1: "left", 3: "right", 6: "top", 8: "bottom"}


def blue_side(image: Image.Image) -> str:
    pixels = np.asarray(image.convert("RGB"), dtype=np.int16)
    blueness = pixels[..., 2] - pixels[..., 0]
    height, width = blueness.shape
    means = {
        "left": blueness[:, : width // 2].mean(),
        "right": blueness[:, width // 2 :].mean(),
        "top": blueness[: height // 2].mean(),
        "bottom": blueness[height // 2 :].mean(),
    }
    return max(means, key=lambda side: means[side])


@pytest.mark.parametrize(("orientation", "side"), SIDES.items())
def test_the_embedded_jpeg_is_shown_upright(orientation: int, side: str) -> None:
    image = decode(tiny_dng(two_colours(WIDE), orientation))
    assert image.size == (WIDE if orientation in (1, 3) else TALL)
    assert blue_side(image) == side


@pytest.mark.parametrize(("orientation", "side"), SIDES.items())
def test_a_raw_file_without_a_preview_is_developed_upright(orientation: int, side: str) -> None:
    image = decode(tiny_dng(None, orientation), max_bytes=MAX_APART_BYTES)
    assert image.size == ((192, 128) if orientation in (1, 3) else (128, 192))
    assert blue_side(image) == side


def test_an_upright_preview_is_not_rotated_again() -> None:
    says_so = decode(tiny_dng(two_colours(WIDE, orientation=6), orientation=6))
    assert blue_side(says_so) == "top"
    is_tall = decode(tiny_dng(two_colours(TALL), orientation=6))
    assert is_tall.size == TALL
    assert blue_side(is_tall) == "left"


@pytest.mark.parametrize("preview", [two_colours((120, 80)), two_colours(WIDE)[:700]])
def test_the_sensor_data_is_used_if_the_preview_is_tiny_or_damaged(preview: bytes) -> None:
    header = two_colours((120, 80))
    data = tiny_dng(header).replace(header, preview.ljust(len(header), b"\0")[: len(header)])
    assert decode(data, max_bytes=MAX_APART_BYTES).size == (192, 128)


def test_a_jpeg_preview_is_decoded_at_a_reduced_scale() -> None:
    data = tiny_dng(two_colours((1600, 1200)))
    assert decode(data, at_least_px=224).size == (400, 300)
    assert 0 < memory_to_decode(data, at_least_px=224) < memory_to_decode(data)


def test_raw_files_are_recognised_by_their_bytes() -> None:
    assert is_raw(tiny_dng())
    assert is_raw(tiny_dng(two_colours(WIDE)))
    heads = [
        b"FUJIFILMCCD-RAW 0201",
        b"\0\0\0\x18ftypcrx \0\0\0\1",
        b"IIU\0\x08\0\0\0",
        b"IIRO\x08\0\0\0",
    ]
    assert all(map(is_raw, heads))
    assert is_raw(b"II*\0\x10\0\0\0CR\2\0" + bytes(64))
    buffers = []
    for format_ in ("TIFF", "JPEG", "PNG", "AVIF"):
        buffer = io.BytesIO()
        tiny_photo(1).save(buffer, format_)
        buffers.append(buffer.getvalue())
    assert not any(map(is_raw, [*buffers, b"", b"II*\0", b"MM\0*" + b"\xff" * 40]))


def test_damaged_raw_files_are_read_or_refused() -> None:
    data = tiny_dng(two_colours(WIDE), orientation=6)
    random = np.random.default_rng(11)
    cuts = [data[:size] for size in random.integers(8, len(data), 20).tolist()]
    flips = []
    for at in random.integers(8, 600, 60).tolist():
        changed = bytearray(data)
        changed[at] ^= 0xFF
        flips.append(bytes(changed))
    for damaged in cuts + flips:
        memory_to_decode(damaged)
        with contextlib.suppress(BadImage):
            assert decode(damaged).mode in ("RGB", "RGBA")


def test_without_rawpy_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rawpy", None)
    with pytest.raises(BadImage, match="rawpy is not installed") as caught:
        decode(tiny_dng())
    assert caught.value.next_step == 'pip install "sbtk[photos]"'
    assert memory_to_decode(tiny_dng()) == 0


def test_threads_can_read_raw_files_at_once() -> None:
    def side_of(data: bytes) -> str:
        return blue_side(decode(data, max_bytes=MAX_APART_BYTES))

    files = [tiny_dng(preview, turn) for turn in SIDES for preview in (None, two_colours(WIDE))]
    expected = [side_of(data) for data in files]
    assert expected == [side for side in SIDES.values() for _ in range(2)]
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(side_of, files * 5))
    assert found == expected * 5


@pytest.mark.parametrize("preview", [None, two_colours((120, 80)), two_colours(WIDE)[:700]])
def test_raw_files_are_developed_in_a_process_that_can_be_stopped(
    preview: bytes | None, tmp_path: Path
) -> None:
    data = tiny_dng(None)
    if preview is not None:
        header = two_colours(WIDE)
        data = tiny_dng(header).replace(header, preview.ljust(len(header), b"\0")[: len(header)])
    with pytest.raises(LargeImage):
        decode(data)
    expected = prepare(data, "photo", max_bytes=MAX_APART_BYTES).pixels
    (tmp_path / "one.dng").write_bytes(data)
    with DecodePool("photo", CROPPED, 1) as pool:
        found = pool.submit(tmp_path / "one.dng").result()
    assert found.reason == ""
    assert found.prepared is not None
    assert np.array_equal(found.prepared.pixels, expected)
