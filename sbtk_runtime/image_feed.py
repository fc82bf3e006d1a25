"""Decoding with a time limit, of damaged files, and in a process with limited memory.

Decoders report that a file is truncated or damaged, but not how far they got. So such a file is
decoded twice, into images prefilled with different colours: where the two differ, nothing was
decoded. This is exact for every format and mode, and needs none of Pillow's global switches.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import random
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFile

from sbtk_runtime.errors import BadImage, EmptySketch, LargeImage, SbtkError, SlowImage
from sbtk_runtime.image_limits import (
    Scan,
    ScreenedImage,
    first_scan,
    is_whole_chunk,
    jpeg_scans,
    png_chunks,
    riff_chunks,
)

Mask = NDArray[np.bool_]

_END_OF_JPEG = b"\xff\xd9"
# Limit for truncated WebP files, of which several copies are held.
_MOST_REFILLED_BYTES = 16 << 20
# Libjpeg fills missing blocks with 128 in every channel, up to rounding.
_FILLING = 128
# The last coefficient, in zigzag order, that matters at each scale. At full scale, half the
# resolution is accepted.
_LAST_COEFFICIENT = {1: 24, 2: 24, 4: 4, 8: 0}


class Clock:
    """A time limit for the work on one image, in CPU time of one thread.

    Args:
        limit_s: seconds of CPU time.
    """

    def __init__(self, limit_s: float) -> None:
        self._limit_s = limit_s
        self.restart()

    def restart(self) -> None:
        """Start counting on the calling thread."""
        self._end_s = time.thread_time() + self._limit_s

    def check(self) -> None:
        """Check that time is left.

        Raises:
            SlowImage: the time limit is exceeded.
        """
        if time.thread_time() > self._end_s:
            raise SlowImage(
                "decoding the image takes too long",
                f"at most {self._limit_s:g} seconds of CPU time",
            )


class Feed(io.BytesIO):
    """A file in memory that cannot be read after the time limit.

    Pillow reads blocks while it decodes, so this interrupts running decoders.

    Attributes:
        at_end: called once for the bytes to return after the end of the file.
    """

    def __init__(self, data: bytes, clock: Clock) -> None:
        super().__init__(data)
        self._clock = clock
        self._small_reads = 0
        self.at_end: Callable[[], bytes] | None = None

    def read(self, size: int | None = -1, /) -> bytes:
        """Return the next bytes.

        Raises:
            SlowImage: the time limit is exceeded.
        """
        if size is None or not 0 <= size < 256 or not self._small_reads & 31:
            self._clock.check()
        self._small_reads += 1
        part = super().read(size)
        if not part and size and self.at_end is not None:
            at_end, self.at_end = self.at_end, None
            return at_end()
        return part


@dataclass(frozen=True)
class Part:
    """The decoded part of a truncated or damaged file.

    Attributes:
        image: the image as stored, of undefined colour where nothing was decoded.
        share: share of the rows that were decoded, from 0 to 1.
        missing: `(H, W) bool`, true where nothing was decoded; `None` if nothing is missing.
    """

    image: Image.Image
    share: float
    missing: Mask | None = None


#: Opens the bytes of a file, with its header read and its scale set.
Open = Callable[[bytes], ImageFile.ImageFile]


def decode_part(open_: Open, file: ScreenedImage) -> Part | None:
    """Return the decodable part of a damaged file; `None` if there is none."""
    if file.format == "JPEG":
        return _jpeg_part(open_, file)
    if file.format == "WEBP":
        return _webp_part(open_, file.data)
    if file.format in ("AVIF", "HEIF"):
        return None
    data = _up_to_damage(file.data) if file.format == "PNG" else file.data
    one, boxes = _attempt(open_(data), 0)
    other, _ = _attempt(open_(data), 255)
    return _where_equal(one, other, boxes)


def find_early_end(open_: Open, file: ScreenedImage, image: Image.Image) -> Part | None:
    """Return the decoded part of a JPEG whose end marker precedes its last row, else `None`.

    Libjpeg silently fills the rest with grey, but the image itself may also be grey there.
    """
    if file.format != "JPEG" or file.scans > 1:
        return None
    last_row = image.crop((0, image.height - 1, image.width, image.height)).getextrema()
    channels = last_row if isinstance(last_row[0], tuple) else (last_row,)
    if any(abs(value - _FILLING) > 1 for channel in channels for value in channel):
        return None
    end = file.data.find(_END_OF_JPEG, first_scan(file.data))
    if end < 0:
        return None
    # Missing blocks depend on the bytes that follow; complete images ignore them.
    made = [
        _attempt(open_(file.data[:end] + filling * 4096 + _END_OF_JPEG), 0)[0]
        for filling in (b"\0", b"\x55")
    ]
    differs = _difference(np.asarray(made[0]), np.asarray(made[1]))
    rows = np.flatnonzero(differs.any(axis=1))
    if not rows.size:
        return None
    missing = np.zeros_like(differs)
    missing[rows[0] :] = _is_filling(np.asarray(image)[rows[0] :])
    return Part(image, 1 - float(missing.mean()), missing)


def percent(share: float) -> str:
    """Return a share as a percentage, rounded down."""
    return f"{math.floor(share * 1000) / 10:g} %"


def _attempt(
    image: ImageFile.ImageFile, level: int
) -> tuple[Image.Image, list[tuple[int, int, int, int]]]:
    """Decode into an image prefilled with one colour; return it and its tiles' boxes."""
    opened: Any = image
    boxes = [tile[1] for tile in opened.tile]
    if image.format == "TIFF":
        # Pillow rotates the image after a successful decoding; we do after a failed one.
        opened._size = opened._tile_size
    prepare = image.load_prepare

    def prepare_in_colour() -> None:
        prepare()
        core = opened.im
        ink = Image.new(core.mode, (1, 1), (level,) * core.bands if core.bands > 1 else level)
        colour = ink.getpixel((0, 0))
        for box in boxes:
            core.paste(Image.new(core.mode, (box[2] - box[0], box[3] - box[1]), colour).im, box)

    opened.load_prepare = prepare_in_colour
    try:
        image.load()
    except SlowImage:
        raise
    # The file is known to be damaged.
    except Exception:
        return image._new(opened.im), boxes
    return image._new(opened.im), boxes


def _where_equal(
    one: Image.Image, other: Image.Image, boxes: list[tuple[int, int, int, int]]
) -> Part:
    missing = _difference(np.asarray(one), np.asarray(other))
    inside = np.zeros_like(missing)
    for left, top, right, bottom in boxes:
        inside[top:bottom, left:right] = True
    missing &= inside
    share = 1 - float(missing.sum()) / max(1, int(inside.sum()))
    return Part(one, share, missing if missing.any() else None)


def _difference(one: NDArray[Any], other: NDArray[Any]) -> Mask:
    differs: Mask = np.asarray(one != other)
    return _of_any_channel(differs)


def _of_any_channel(mask: Mask) -> Mask:
    return np.asarray(mask.any(axis=2)) if mask.ndim == 3 else mask


def _is_filling(pixels: NDArray[Any]) -> Mask:
    return ~_of_any_channel(np.abs(pixels.astype(np.int16) - _FILLING) > 1)


def _up_to_damage(data: bytes) -> bytes:
    """Return a PNG up to the first pixel data with a wrong checksum."""
    for chunk in png_chunks(data):
        if chunk.name == b"IDAT" and chunk.end <= len(data) and not is_whole_chunk(data, chunk):
            return data[: chunk.start]
    return data


def _jpeg_part(open_: Open, file: ScreenedImage) -> Part | None:
    """Return the decodable part of a JPEG, with an end marker after its last byte."""
    so_far: list[NDArray[Any]] = []
    done: list[Image.Image] = []
    scale = 1
    for level in (0, 255):
        image = open_(file.data)
        scale = scale_of(image)

        def end(image: ImageFile.ImageFile = image) -> bytes:
            so_far.append(np.array(image._new(image.im)))
            return _END_OF_JPEG

        feed = image.fp
        assert isinstance(feed, Feed)
        feed.at_end = end
        made, boxes = _attempt(image, level)
        done.append(made)
    if len(so_far) < 2:
        return _where_equal(done[0], done[1], boxes)
    if file.scans > 1:
        return _scans_part(open_, file.data, done[0], scale)
    rows = done[0].height
    gap = np.asarray(_difference(so_far[0], so_far[1]).any(axis=1))
    first_gap = int(gap.argmax()) if gap.any() else rows
    missing = _difference(np.asarray(done[0]), np.asarray(done[1]))
    missing[first_gap:] |= _is_filling(np.asarray(done[0])[first_gap:])
    return Part(done[0], 1 - float(missing.mean()), missing if missing.any() else None)


def scale_of(image: ImageFile.ImageFile | None) -> int:
    """Return the factor by which decoding reduces each side of a JPEG; else 1."""
    config = getattr(image, "decoderconfig", None)
    return int(config[0]) if config else 1


def _scans_part(open_: Open, data: bytes, image: Image.Image, scale: int) -> Part | None:
    """Return the decodable part of a JPEG of several scans whose last scan is truncated.

    Each scan refines the whole image. If the complete scans suffice for this scale, all rows are
    decoded. If the last scan is needed too, the decoded rows are those that it changed.
    """
    scans = jpeg_scans(data)
    if _are_enough(scans[:-1], _LAST_COEFFICIENT[scale]):
        return Part(image, 1.0)
    if not _are_enough(scans, _LAST_COEFFICIENT[scale]):
        return Part(image, 0.0)
    try:
        before = open_(data[: scans[-1].start] + _END_OF_JPEG)
        before.load()
    except SlowImage:
        raise
    # There is no earlier scan.
    except Exception:
        missing = _is_filling(np.asarray(image))
        return Part(image, 1 - float(missing.mean()), missing)
    changed = np.flatnonzero(_difference(np.asarray(image), np.asarray(before)).any(axis=1))
    rows = int(changed[-1]) + 1 if changed.size else 0
    return Part(image, rows / image.height)


def _are_enough(scans: list[Scan], last: int) -> bool:
    """Whether scans hold every component's mean, and the first one's coefficients up to `last`."""
    if not scans:
        return False
    means = {component for scan in scans if scan.first == 0 for component in scan.components}
    fine = {
        coefficient
        for scan in scans
        if scan.luma in scan.components
        for coefficient in range(scan.first, scan.last + 1)
    }
    return len(means) >= scans[0].in_frame and set(range(last + 1)) <= fine


def _webp_part(open_: Open, data: bytes) -> Part | None:
    """Return the decodable part of a truncated WebP.

    WebP decoders need the whole file. So the missing bytes are replaced by two different fillings:
    rows that do not depend on them were in the file.
    """
    for name, start, end in riff_chunks(data):
        if name not in (b"VP8 ", b"VP8L"):
            continue
        missing_bytes = end - len(data)
        if missing_bytes > (end - start) // 2 or end > _MOST_REFILLED_BYTES:
            return None
        images: list[Image.Image] = []
        # Other bits may need more bytes, and some cannot be decoded.
        for filling in _fillings(missing_bytes + end - start if missing_bytes > 0 else 0):
            whole = data[:end] + filling
            length = (len(whole) - start).to_bytes(4, "little")
            whole += b"\0" * (len(whole) & 1)
            riff_length = (len(whole) - 8).to_bytes(4, "little")
            whole = b"RIFF" + riff_length + whole[8 : start - 4] + length + whole[start:]
            with contextlib.suppress(ValueError, OSError, EOFError):
                images.append(open_webp(open_(whole)))
            if len(images) == 2:
                break
        if len(images) < 2:
            return None
        differs = _difference(np.asarray(images[0]), np.asarray(images[1]))
        unsure = np.flatnonzero(differs.any(axis=1))
        height = len(differs)
        first = int(unsure[0]) if unsure.size else height
        missing = np.zeros_like(differs)
        missing[first:] = True
        return Part(images[0], first / height, missing if first < height else None)
    return None


def _fillings(size: int) -> Iterator[bytes]:
    """Yield different fillings, those most likely to decode first."""
    for byte in (b"\0", b"\xff", b"\x5a"):
        yield byte * size
    for seed in range(5):
        yield random.Random(seed).randbytes(size)  # noqa: S311 -- not a secret


def open_webp(image: ImageFile.ImageFile) -> Image.Image:
    """Return the pixels of an open WebP, using 12 bytes per pixel instead of 16.

    Pillow would keep the decoder's two canvases while it copies the pixels.
    """
    opened: Any = image
    frame = opened._decoder.get_next()
    if frame is None:
        raise EOFError("it has no frame")
    opened._decoder = None
    made = Image.frombuffer(opened.mode, opened.size, frame[0], "raw", opened.rawmode, 0, 1)
    made = made.convert("RGB") if made.mode == "RGBX" else made
    made.info.update(opened.info)
    return made


#: Peak memory of decoding an image in a separate process, including its file.
MAX_APART_BYTES = 400 << 20
#: Seconds of CPU time, including the start of the process.
MAX_APART_S = 12
# Enforced whatever the estimate was; with Python and libraries it stays below 500 MB.
_MOST_DATA_BYTES = MAX_APART_BYTES + (30 << 20)
_WALL_S = 60

_ERRORS: dict[str, type[BadImage]] = {
    error.__name__: error for error in (BadImage, EmptySketch, SlowImage)
}

# One process at a time, since each may take hundreds of megabytes.
_turn = threading.Lock()


def decode_in_subprocess(
    data: bytes, problem: LargeImage, *task: str
) -> tuple[NDArray[np.uint8], list[Any]]:
    """Decode an image file in a separate process; return its pixels, and notices or boxes.

    Args:
        data: the bytes of the file.
        problem: the error that says how much memory it takes.
        task: `"prepare", preprocessing, kind, size_px`, `"thumbnail", size_px`, or `"tiles",
            size_px` for the tiles `(T, S, S, 3)` of a photo and the box of each.

    Raises:
        LargeImage: the image exceeds `MAX_APART_BYTES`.
        SlowImage: it exceeds `MAX_APART_S`.
        BadImage: the task failed.
    """
    if problem.needed_bytes > MAX_APART_BYTES:
        raise problem
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    # Threads cost memory, and CPU time is limited anyway.
    environment |= {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    with _turn:
        try:
            done = subprocess.run(  # noqa: S603 -- this file, by this interpreter
                # With -P, Python does not import modules from this file's folder.
                [sys.executable, "-P", str(Path(__file__)), *task],
                input=data,
                capture_output=True,
                env=environment,
                timeout=_WALL_S,
                check=False,
            )
        except subprocess.TimeoutExpired as too_long:
            raise _too_slow() from too_long
    head, _, body = done.stdout.partition(b"\n")
    if done.returncode == -signal.SIGXCPU:
        raise _too_slow()
    if done.returncode != 0 or not head:
        raise BadImage(f"damaged image: the decoder failed (status {done.returncode})")
    reply = json.loads(head)
    if "error" in reply:
        raise _ERRORS[reply["error"]](*reply["words"])
    return np.frombuffer(body, np.uint8).reshape(reply["shape"]), reply["remarks"]


def _too_slow() -> SlowImage:
    return SlowImage(
        "decoding the image takes too long", f"at most {MAX_APART_S} seconds of CPU time"
    )


def _main(task: list[str]) -> None:
    resource.setrlimit(resource.RLIMIT_CPU, (MAX_APART_S, MAX_APART_S + 1))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_DATA, (_MOST_DATA_BYTES, _MOST_DATA_BYTES))
    data = sys.stdin.buffer.read()
    try:
        pixels, remarks = _run_task(data, task)
    except SbtkError as problem:
        kind = type(problem).__name__
        words = (problem.found, problem.expected, problem.next_step)
        reply = {"error": kind if kind in _ERRORS else "BadImage", "words": words}
        body = b""
    except MemoryError:
        reply = {"error": "BadImage", "words": ("not enough memory to decode the image",)}
        body = b""
    else:
        reply = {"shape": pixels.shape, "remarks": remarks}
        body = pixels.tobytes()
    sys.stdout.buffer.write(json.dumps(reply).encode() + b"\n" + body)
    sys.stdout.buffer.flush()


def _run_task(data: bytes, task: list[str]) -> tuple[NDArray[np.uint8], Sequence[Any]]:
    from PIL import AvifImagePlugin

    from sbtk_runtime import preprocess, regions, thumbnail

    AvifImagePlugin.DEFAULT_MAX_THREADS = 1
    if task[0] == "thumbnail":
        made = thumbnail.thumbnail(data, int(task[1]), max_bytes=MAX_APART_BYTES)
        return np.asarray(made, dtype=np.uint8), ()
    if task[0] == "tiles":
        size_px = int(task[1])
        opened = preprocess.open_image(data, "photo", size_px, max_bytes=MAX_APART_BYTES)
        tiles = regions.cut_tiles(opened.decode().image, size_px)
        none = np.empty((0, size_px, size_px, 3), dtype=np.uint8)
        pixels = np.concatenate([none, *(tile.pixels[None] for tile in tiles)])
        return pixels, [tile.box for tile in tiles]
    kind, size_px = preprocess.require_kind(task[2]), int(task[3])
    preprocessing = preprocess.PREPROCESSINGS[task[1]]
    prepared = preprocessing.prepare(data, kind, size_px, max_bytes=MAX_APART_BYTES)
    return prepared.pixels, prepared.notices


if __name__ == "__main__":
    _main(sys.argv[1:])
