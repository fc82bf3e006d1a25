"""Truncated and damaged files are decoded as far as possible, with the decoded share."""

from __future__ import annotations

import functools
import re
import zlib

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from sbtk_runtime import images
from sbtk_runtime.errors import BadImage, SlowImage
from sbtk_runtime.image_feed import Clock, Feed, percent
from sbtk_runtime.image_limits import png_chunks
from sbtk_runtime.images import DecodedImage, OpenImage, decode
from sbtk_runtime.preprocess import prepare
from tests.image_attacks import saved
from tests.tiny import tiny_photo

Pixels = NDArray[np.int16]


@functools.cache
def photo(size: tuple[int, int] = (320, 480)) -> Image.Image:
    """Return an image with detail everywhere, so that every row takes about as many bytes."""
    noise = np.random.default_rng(5).integers(-30, 30, (size[1], size[0], 3))
    smooth = np.asarray(tiny_photo(8).resize(size, Image.Resampling.BICUBIC), dtype=np.int16)
    return Image.fromarray(np.clip(smooth + noise, 0, 255).astype(np.uint8))


def opened(data: bytes, at_least_px: int | None = None) -> DecodedImage:
    return OpenImage(data, at_least_px=at_least_px).decode()


def pixels(image: Image.Image) -> Pixels:
    return np.asarray(image.convert("RGB"), dtype=np.int16)


KINDS: dict[str, tuple[str, dict[str, object]]] = {
    "jpeg": ("JPEG", {"quality": 90}),
    "grey jpeg": ("JPEG", {"quality": 90}),
    "jpeg with restarts": ("JPEG", {"quality": 90, "restart_marker_rows": 1}),
    "jpeg without subsampling": ("JPEG", {"quality": 90, "subsampling": 0}),
    "png": ("PNG", {}),
    "palette png": ("PNG", {}),
    "gif": ("GIF", {"interlace": 0}),
    "bmp": ("BMP", {}),
    "tiff": ("TIFF", {}),
    "webp": ("WEBP", {"quality": 90}),
    "lossless webp": ("WEBP", {"lossless": True}),
    "ppm": ("PPM", {}),
}
MODES = {"grey jpeg": "L", "palette png": "P", "gif": "P"}


def whole(kind: str) -> bytes:
    format_, options = KINDS[kind]
    return saved(photo().convert(MODES.get(kind, "RGB")), format_, **options)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cut", [0.02, 0.05])
def test_nearly_complete_files_are_decoded_with_a_notice(kind: str, cut: float) -> None:
    data = whole(kind)
    image = opened(data[: round((1 - cut) * len(data))])
    (notice,) = image.notices
    match = re.fullmatch(r"partly readable: ([\d.]+) % of the rows could be decoded", notice)
    assert match is not None
    assert 90 <= float(match.group(1)) < 100
    before, after = pixels(decode(data)), pixels(image.image)
    assert before.shape == after.shape
    # BMP starts with the last row.
    before, after = (before[::-1], after[::-1]) if kind == "bmp" else (before, after)
    assert np.array_equal(before[:400], after[:400])
    assert (after[-2:, -16:] == 128).all()
    assert prepare(data[: round((1 - cut) * len(data))], "photo").notices == image.notices


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cut", [0.25, 0.6, 0.9])
def test_files_below_nine_tenths_are_refused_with_their_share(kind: str, cut: float) -> None:
    data = whole(kind)
    with pytest.raises(BadImage, match="damaged image") as caught:
        decode(data[: round((1 - cut) * len(data))])
    share = re.search(r"only ([\d.]+) % of its rows", caught.value.found)
    if share is not None:
        assert abs(float(share.group(1)) / 100 - (1 - cut)) < 0.12
        assert caught.value.expected == "at least 90 %"


@pytest.mark.parametrize("at_least_px", [None, 224, 112, 40])
@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("side", [16, 40, 224, 640])
def test_a_jpeg_without_its_end_marker_is_complete(
    at_least_px: int | None, progressive: bool, side: int
) -> None:
    data = saved(photo().resize((side, side)), "JPEG", progressive=progressive)
    assert data.endswith(b"\xff\xd9")
    for lost in (data[:-1], data[:-2], data[:-2] + bytes(4096)):
        image = opened(lost, at_least_px)
        assert np.array_equal(pixels(image.image), pixels(decode(data, at_least_px=at_least_px)))


@pytest.mark.parametrize("at_least_px", [None, 112])
def test_the_last_scan_of_a_progressive_jpeg_may_be_truncated(at_least_px: int | None) -> None:
    data = saved(photo(), "JPEG", progressive=True, quality=90)
    for cut in (0.02, 0.1, 0.2):
        image = opened(data[: round((1 - cut) * len(data))], at_least_px)
        assert image.notices == ("partly readable: 100 % of the rows could be decoded",)
        difference = pixels(image.image) - pixels(decode(data, at_least_px=at_least_px))
        assert np.abs(difference).mean() < 6
    for share in (8, 12, 20):
        with pytest.raises(BadImage, match="of its rows can be decoded"):
            decode(data[: len(data) // share])


def test_an_early_end_marker_is_detected() -> None:
    data = whole("jpeg")
    for share, is_enough in ((0.95, True), (0.5, False)):
        early = data[: round(share * len(data))].rstrip(b"\xff") + b"\xff\xd9"
        if is_enough:
            assert "partly readable" in opened(early).notices[0]
            continue
        with pytest.raises(BadImage, match=r"only [45]"):
            decode(early)


@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_uniformly_grey_images_count_as_complete(mode: str, progressive: bool) -> None:
    """Libjpeg also fills missing blocks with grey."""
    grey = photo().convert(mode)
    grey.paste(128 if mode == "L" else (128,) * 3, (0, 200, 320, 480))
    for image in (grey, Image.new(mode, (300, 200), 128 if mode == "L" else (128,) * 3)):
        data = saved(image, "JPEG", quality=90, progressive=progressive)
        assert opened(data).notices == ()
        assert opened(data, 112).notices == ()


def test_a_png_is_decoded_up_to_its_first_damaged_chunk() -> None:
    data = bytearray(whole("png"))
    chunks = [chunk for chunk in png_chunks(bytes(data)) if chunk.name == b"IDAT"]
    assert len(chunks) > 3
    data[chunks[-1].start + 40] ^= 0xFF
    damaged = bytes(data)
    share = chunks[-1].start / len(damaged)
    if share > 0.93:
        assert "partly readable" in opened(damaged).notices[0]
    data[chunks[1].start + 40] ^= 0xFF
    with pytest.raises(BadImage, match="of its rows can be decoded"):
        decode(bytes(data))


def test_a_truncated_image_is_rotated_like_the_complete_one() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    for format_ in ("JPEG", "PNG", "TIFF"):
        data = saved(photo(), format_, exif=exif)
        at = round(0.97 * len(data))
        before, after = pixels(decode(data)), pixels(opened(data[:at]).image)
        assert before.shape == after.shape == (320, 480, 3)
        assert np.array_equal(before[:, 40:], after[:, 40:])
        assert (after[-16:, 0] == 128).all()


def test_an_interlaced_png_needs_its_last_pass() -> None:
    data = saved(photo(), "PNG")
    lines = np.asarray(photo(), dtype=np.uint8)
    passes = [(0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2)]
    raw = b""
    for left, top, across, down in [*passes, (0, 1, 1, 2)]:
        raw += b"".join(b"\0" + line.tobytes() for line in lines[top::down, left::across])
    header = data[16:28] + b"\1"
    packed = zlib.compress(raw, 1)
    made = data[:8]
    for name, content in ((b"IHDR", header), (b"IDAT", packed), (b"IEND", b"")):
        check = zlib.crc32(name + content).to_bytes(4, "big")
        made += len(content).to_bytes(4, "big") + name + content + check
    assert np.array_equal(pixels(decode(made)), lines)
    assert "partly readable: 9" in opened(made[: round(0.95 * len(made))]).notices[0]
    with pytest.raises(BadImage, match="only 6"):
        decode(made[: round(0.65 * len(made))])


def test_the_deadline_ends_a_running_decoder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "MAX_DECODE_S", 0.0)
    for kind in ("jpeg", "png", "gif", "bmp"):
        with pytest.raises(SlowImage, match="takes too long"):
            decode(whole(kind))
    feed = Feed(b"x" * 10_000, Clock(0.0))
    with pytest.raises(SlowImage):
        while feed.read(100):
            pass


def test_shares_are_never_rounded_up() -> None:
    assert [percent(share) for share in (1.0, 0.9999, 0.89999, 0.5)] == [
        "100 %",
        "99.9 %",
        "89.9 %",
        "50 %",
    ]


@pytest.mark.parametrize("options", [{}, {"quality": 95}, {"lossless": True}, {"exif": b"Exif"}])
@pytest.mark.parametrize("seed", range(6))
def test_a_truncated_webp_gives_the_rows_before_the_end(
    options: dict[str, object], seed: int
) -> None:
    noise = np.random.default_rng(seed).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    data = saved(Image.fromarray(noise).resize((512, 512)), "WEBP", **options)
    whole = np.asarray(decode(data))
    cut = OpenImage(data[: len(data) * 98 // 100]).decode()
    assert cut.notices[0].startswith("partly readable: 9")
    rows = 512 * 9 // 10
    assert np.array_equal(np.asarray(cut.image)[:rows], whole[:rows])
