"""Image files to upright sRGB images, safely.

Files are untrusted: only regular files are opened, only listed formats reach a parser, structure
and memory are checked before any pixel is decoded, and decoding time is limited. Truncated and
damaged files are decoded if nearly all rows are intact.
"""

from __future__ import annotations

import contextlib
import ctypes
import io
import os
import stat
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

# The plugins are imported here because Pillow's own search for them is not thread-safe, and because
# its pixel limit ignores reduced scales.
from PIL import (
    AvifImagePlugin,
    BmpImagePlugin,
    GifImagePlugin,
    Image,
    ImagePalette,
    JpegImagePlugin,
    PngImagePlugin,
    PpmImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
    _imaging,
)
from PIL import ImageFile as PillowFile

from sbtk_runtime.errors import BadImage, LargeImage, SlowImage
from sbtk_runtime.files import without_waiting
from sbtk_runtime.image_colours import (
    from_used_bits,
    is_wide,
    to_eight_bit_grey,
    to_rgb_or_rgba,
)
from sbtk_runtime.image_feed import (
    MAX_APART_BYTES,
    Clock,
    Feed,
    Mask,
    Open,
    Part,
    decode_part,
    find_early_end,
    open_webp,
    percent,
    scale_of,
)
from sbtk_runtime.image_limits import HEIC_FORMAT, ScreenedImage, detect_format, screen_image
from sbtk_runtime.raw_photo import decode_raw, estimate_raw_memory, is_raw

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "AVIF")
HEIC_SUFFIXES = frozenset({".heic", ".heics", ".heif", ".heifs", ".hif"})
SUFFIXES = (
    frozenset({".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".webp", ".bmp", ".gif"})
    | {".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".avif"}
    | HEIC_SUFFIXES
)
MAX_FILE_BYTES = 224 << 20
#: Peak memory of decoding an image in this process, including its file.
MAX_DECODE_BYTES = 224 << 20
#: Core-seconds after which decoding ends.
MAX_DECODE_S = 10.0
#: Smallest share of decoded rows for which a damaged image is used.
MIN_SHARE = 0.9

_READERS: Mapping[str, type[PillowFile.ImageFile]] = {
    "JPEG": JpegImagePlugin.JpegImageFile,
    "PNG": PngImagePlugin.PngImageFile,
    "WEBP": WebPImagePlugin.WebPImageFile,
    "BMP": BmpImagePlugin.BmpImageFile,
    "GIF": GifImagePlugin.GifImageFile,
    "TIFF": TiffImagePlugin.TiffImageFile,
    "PPM": PpmImagePlugin.PpmImageFile,
    "AVIF": AvifImagePlugin.AvifImageFile,
}

# Bytes per pixel at the peak of decoding: Pillow's image, its conversion and its transparency.
# Formats that allocate the whole canvas when they are opened are listed separately.
_MODE_BYTES = {"RGB": 4, "L": 5, "1": 6, "P": 6, "CMYK": 8, "YCbCr": 8, "I;16": 8, "RGBA": 10}
_MIXED_BYTES = 14
_CANVAS_BYTES = {"WEBP": 13, "AVIF": 14, "HEIF": 10}
# A second copy while the image is rotated or converted to sRGB.
_CONVERTED_BYTES = 4

_ORDINARY_SCANS = 64
_CHANGED = ("the file changed while it was read", "a file that is not being written")

_ORIENTATION = 0x0112
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_BITS, _PHOTOMETRIC, _PLANAR, _COLOUR_MAP, _SAMPLE_FORMAT = 258, 262, 284, 320, 339
_SUBSAMPLING = 530
_PLAIN_PLANES = ("RGB", "RGBA", "CMYK")

# Users need no warnings about odd metadata. `catch_warnings` is not thread-safe, so set the filter
# once.
warnings.filterwarnings("ignore", module=r"PIL\.")


def _silence_libtiff() -> None:
    """Stop libtiff from writing to stderr; its errors are raised anyway."""
    # Pillow may be built without libtiff, or link it statically.
    with contextlib.suppress(OSError, AttributeError):
        library = ctypes.CDLL(_imaging.__file__)
        for name in ("TIFFSetErrorHandler", "TIFFSetWarningHandler"):
            getattr(library, name).restype = ctypes.c_void_p
            getattr(library, name)(None)


_silence_libtiff()


@dataclass(frozen=True)
class ImageFile:
    """The content of a file, with the size and modification time it had when it was read."""

    data: bytes
    size_bytes: int
    mtime_ns: int


def read_image_bytes(path: Path | str) -> bytes:
    """Return the content of a regular file; see `read_image_file`."""
    return read_image_file(path).data


def read_image_file(path: Path | str) -> ImageFile:
    """Return the content of a regular file, with its size and modification time.

    Raises:
        BadImage: the file is missing, unreadable, empty, too large or not a regular file (a FIFO
            does not block), or it changed during both of two reads.
    """
    file = _read_once(path) or _read_once(path)
    if file is None:
        raise BadImage(*_CHANGED)
    return file


def read_open_file(file: BinaryIO) -> ImageFile:
    """Return the content of an open file from its start, as `read_image_file` does.

    Raises:
        BadImage: as there, but the file is read only once.
    """
    try:
        content = _content(file)
    except OSError as problem:
        raise BadImage(f"cannot be read: {problem.strerror}") from problem
    if content is None:
        raise BadImage(*_CHANGED)
    return content


@dataclass(frozen=True)
class DecodedImage:
    """A decoded image.

    Attributes:
        image: upright, in mode RGB, or RGBA when any pixel is transparent; L if it is grey, and
            `keeps_grey` was given.
        notices: messages for the user, such as that the file is only partly readable.
    """

    image: Image.Image
    notices: tuple[str, ...] = ()


class OpenImage:
    """An image file whose header has been read and whose structure has been checked.

    Args:
        data: the bytes of the file.
        at_least_px: JPEGs may be decoded at a reduced scale (an eighth to one) as long as the
            shorter side keeps at least this many pixels; `None` keeps the full scale.
        limit_s: core-seconds after which decoding ends; `None` for `MAX_DECODE_S`.
        max_bytes: memory that decoding and the file may take together.
        keeps_grey: leave grey images in mode L, which takes less time for them.

    Attributes:
        data: the bytes of the file.
        memory_bytes: estimated peak memory of `decode`, without the file's bytes.
        work_pixels: estimated pixels that `decode` processes, counted once for each scan.

    Raises:
        LargeImage: decoding would exceed `max_bytes`.
        BadImage: not an image, an unsupported format, a damaged header, or an absurd structure.
    """

    def __init__(
        self,
        data: bytes,
        *,
        at_least_px: int | None = None,
        limit_s: float | None = None,
        max_bytes: int = MAX_DECODE_BYTES,
        keeps_grey: bool = False,
    ) -> None:
        self.data = data
        self._keeps_grey = keeps_grey
        self._max_bytes = max_bytes
        self._at_least_px = at_least_px
        self._clock = Clock(MAX_DECODE_S if limit_s is None else limit_s)
        self._file: ScreenedImage | None = None
        if is_raw(data):
            self.memory_bytes, is_developed = estimate_raw_memory(
                data, lambda jpeg: self._preview(jpeg).memory_bytes, MAX_APART_BYTES - len(data)
            )
            total = len(data) + self.memory_bytes
            if total > max_bytes or (is_developed and max_bytes < MAX_APART_BYTES):
                raise LargeImage(
                    f"a camera RAW that takes some {total >> 20:,} MiB to decode",
                    f"at most {MAX_APART_BYTES >> 20:,} MiB",
                    total,
                )
            self.work_pixels = self.memory_bytes // _MODE_BYTES["RGB"]
            return
        self._file = _screen(data, self._clock)
        copied = 0 if self._file.data is data else len(self._file.data)
        self._image: PillowFile.ImageFile | None = None
        if self._file.canvas is None:
            self._image = self._open(self._file.data)
            size, bytes_each = self._image.size, _bytes_each(self._image)
            if self._file.bits == 16:
                # High and low bytes may be decoded separately.
                bytes_each += _CONVERTED_BYTES
        else:
            size, bytes_each = self._file.canvas, _CANVAS_BYTES[self._file.format]
        self.work_pixels = size[0] * size[1] * scale_of(self._image) ** 2 * max(1, self._file.scans)
        self.memory_bytes = size[0] * size[1] * bytes_each + self._file.kept_bytes + copied
        total = len(data) + self.memory_bytes
        if self._file.is_unsure and max_bytes < MAX_APART_BYTES:
            # Only a process limit can bound the memory of decoding it.
            raise LargeImage(
                f"the memory to decode this {self._file.format} cannot be determined",
                "a still image of one layer",
                max(total, max_bytes + 1),
            )
        if total > max_bytes:
            raise LargeImage(
                f"a {self._file.format} image of {size[0]} x {size[1]} pixels, which takes some "
                f"{total >> 20:,} MiB to decode",
                f"at most {MAX_APART_BYTES >> 20:,} MiB",
                total,
            )

    def decode(self) -> DecodedImage:
        """Return the image, or the first frame of an animation. Call it only once.

        Raises:
            SlowImage: decoding takes more than `limit_s`.
            LargeImage: a camera RAW turns out to need developing.
            BadImage: the image is damaged, and less than `MIN_SHARE` of its rows can be decoded.
        """
        self._clock.restart()
        with _damage_translated():
            if self._file is not None:
                return self._decode(self._file)
            is_apart = self._max_bytes >= MAX_APART_BYTES
            most_bytes = self._max_bytes - len(self.data) if is_apart else 0
            return DecodedImage(
                decode_raw(self.data, lambda jpeg: self._preview(jpeg).decode().image, most_bytes)
            )

    def _preview(self, jpeg: bytes) -> OpenImage:
        """Open the JPEG in a camera RAW."""
        return OpenImage(jpeg, at_least_px=self._at_least_px)

    def _open(self, data: bytes) -> PillowFile.ImageFile:
        assert self._file is not None
        return _open(replace(self._file, data=data), self._at_least_px, self._clock)

    def _decode(self, file: ScreenedImage) -> DecodedImage:
        image, self._image = self._image, None
        try:
            image = image or self._open(file.data)
            pixels = open_webp(image) if file.format == "WEBP" else image
            pixels.load()
        except (SlowImage, MemoryError):
            raise
        # On damaged files Pillow's decoders raise OSError, SyntaxError, struct.error, zlib.error,
        # EOFError, KeyError and more.
        except Exception as problem:
            image = None
            fits = 2 * self.memory_bytes + len(self.data) <= self._max_bytes
            part = decode_part(self._open, file) if fits else None
            if part is None:
                raise _damaged_error(problem) from problem
            return self._partial_image(part, file, problem)
        part = find_early_end(self._open, file, pixels)
        if part is not None:
            return self._partial_image(part, file, None)
        return DecodedImage(_finish(pixels, image, file, self._open, keeps_grey=self._keeps_grey))

    def _partial_image(
        self, part: Part, file: ScreenedImage, problem: Exception | None
    ) -> DecodedImage:
        if part.share < MIN_SHARE:
            raise BadImage(
                f"damaged image: only {percent(part.share)} of its rows can be decoded"
                + (f" ({problem})" if problem is not None and str(problem) else ""),
                f"at least {percent(MIN_SHARE)}",
            ) from problem
        # Pixels carry the orientation of every format but TIFF.
        header = self._open(file.data) if file.format == "TIFF" else part.image
        image = _finish(part.image, header, file, self._open, part.missing)
        notice = f"partly readable: {percent(part.share)} of the rows could be decoded"
        return DecodedImage(image, (notice,))


def decode(
    data: bytes, *, at_least_px: int | None = None, max_bytes: int = MAX_DECODE_BYTES
) -> Image.Image:
    """Return the image in `data`, upright, in mode RGB, or RGBA when any pixel is transparent.

    Of an animation, the first frame is decoded. Grey, palette, CMYK and 16-bit images, and other
    colour spaces than sRGB, are converted. Arguments and errors are those of `OpenImage`.
    """
    return OpenImage(data, at_least_px=at_least_px, max_bytes=max_bytes).decode().image


def convert(image: Image.Image) -> Image.Image:
    """Return a Pillow image as `decode` returns the image in a file; the argument is not changed.

    Raises:
        BadImage: it has no pixels, or its file is damaged or closed.
    """
    if 0 in image.size:
        raise BadImage(f"an image of {image.width} x {image.height} pixels", "at least 1 x 1")
    with _damage_translated():
        pixels = image.copy()
        if is_wide(pixels):
            pixels = to_eight_bit_grey(
                pixels, is_scaled=False, is_unsigned=False, is_inverted=False
            )
        pixels = to_rgb_or_rgba(pixels)
    turn = _TURNS.get(_orientation(image, is_whole=True))
    return pixels if turn is None else pixels.transpose(turn)


def read_stream(file: BinaryIO) -> bytes:
    """Return what is left to read in a file object.

    Raises:
        BadImage: it is empty, too large, closed, or not opened with "rb".
    """
    try:
        data = file.read(MAX_FILE_BYTES + 1)
    except (OSError, ValueError) as problem:
        raise BadImage(
            f"a file object that cannot be read: {problem}", "one opened with 'rb'"
        ) from problem
    if not isinstance(data, bytes):
        raise BadImage(f"a file object that reads {type(data).__name__}", "one opened with 'rb'")
    if not data:
        raise BadImage("the file object has nothing left to read", "the bytes of an image file")
    if len(data) > MAX_FILE_BYTES:
        raise BadImage(f"more than {MAX_FILE_BYTES:,} bytes", f"at most {MAX_FILE_BYTES:,} bytes")
    return data


def memory_to_decode(data: bytes, *, at_least_px: int | None = None) -> int:
    """Return the estimated peak memory of `decode` in bytes, from the header.

    It is 0 for files that `decode` rejects.
    """
    try:
        return OpenImage(data, at_least_px=at_least_px).memory_bytes
    except BadImage:
        return 0


def on_white(image: Image.Image) -> Image.Image:
    """Return the image in mode RGB, on white where it is transparent."""
    if image.mode == "RGB":
        return image
    if image.mode == "L":
        return image.convert("RGB")
    white = Image.new("RGB", image.size, (255, 255, 255))
    rgba = image if image.mode == "RGBA" else image.convert("RGBA")
    white.paste(rgba, mask=rgba.getchannel("A"))
    return white


def _read_once(path: Path | str) -> ImageFile | None:
    """Return the file's content, or `None` if it changed while it was read."""
    try:
        with open(path, "rb", opener=without_waiting) as file:
            return _content(file)
    except (OSError, ValueError) as problem:
        reason = problem.strerror if isinstance(problem, OSError) else str(problem)
        raise BadImage(f"cannot be read: {reason}") from problem


def _content(file: BinaryIO) -> ImageFile | None:
    before = os.fstat(file.fileno())
    if not stat.S_ISREG(before.st_mode):
        raise BadImage("not a regular file")
    if before.st_size == 0:
        raise BadImage("the file is empty")
    if before.st_size > MAX_FILE_BYTES:
        raise BadImage(
            f"the file has {before.st_size:,} bytes", f"at most {MAX_FILE_BYTES:,} bytes"
        )
    # One byte more reveals a file that has grown.
    data = file.read(before.st_size + 1)
    after = os.fstat(file.fileno())
    if len(data) != before.st_size or after.st_mtime_ns != before.st_mtime_ns:
        return None
    return ImageFile(data, before.st_size, before.st_mtime_ns)


def _screen(data: bytes, clock: Clock) -> ScreenedImage:
    format_ = detect_format(data)
    if format_ is None:
        raise BadImage("not an image in a supported format", ", ".join(FORMATS))
    if format_ == HEIC_FORMAT:
        _heif_reader()
    return screen_image(data, format_, clock.check)


def _open(file: ScreenedImage, at_least_px: int | None, clock: Clock) -> PillowFile.ImageFile:
    """Return the image with its header read and, for a JPEG, its scale set."""
    reader = _heif_reader() if file.format == HEIC_FORMAT else _READERS[file.format]
    with _damage_translated():
        feed = Feed(file.data, clock)
        # A JPEG header takes a known number of small reads.
        image = reader(io.BytesIO(file.data) if file.format == "JPEG" else feed)
        if file.format == "JPEG":
            image.fp = feed
            if at_least_px is not None:
                image.draft("RGB", (at_least_px, at_least_px))
            if file.scans > _ORDINARY_SCANS:
                # A few bytes can start a pass over the whole image.
                image.decodermaxblock = 512
        elif isinstance(image, TiffImagePlugin.TiffImageFile):
            _fix_tiff(image)
        elif file.format == "PNG" and file.bits < 8 and image.mode == "L":
            # Pillow scales the samples to eight bits, but not the transparent value.
            grey = image.info.get("transparency")
            if isinstance(grey, int):
                image.info["transparency"] = grey * 255 // ((1 << file.bits) - 1)
        return image


def _fix_tiff(image: TiffImagePlugin.TiffImageFile) -> None:
    """Decode with libtiff what Pillow misreads, and fix 8-bit colour maps."""
    tags = image.tag_v2
    if tags.get(_PLANAR, 1) == 2 and len(image.getbands()) == 1:
        # Pillow misreads the mode of an image with a single plane.
        tags[_PLANAR] = 1
        image._setup()
    bits = set(tags.get(_BITS, (1,)))
    is_misread = tags.get(_PLANAR, 1) == 2 and (bits != {8} or image.mode not in _PLAIN_PLANES)
    is_subsampled = image.mode == "YCbCr" and tags.get(_SUBSAMPLING, (2, 2)) != (1, 1)
    if not image.use_load_libtiff and (is_misread or is_subsampled):
        rawmode = image.mode + (";16N" if bits == {16} else "")
        if image.mode == "YCbCr":
            image._mode, rawmode = "RGB", "RGBX"
        width, height = image._tile_size
        image.use_load_libtiff = True
        args = (rawmode, False, tags.offset)
        image.tile = [PillowFile._Tile("libtiff", (0, 0, width, height), 0, args)]
    if image.mode in ("P", "PA") and max(tags[_COLOUR_MAP]) < 256:
        # The 16-bit map holds 8-bit values.
        image.palette = ImagePalette.raw("RGB;L", bytes(tags[_COLOUR_MAP]))


def _bytes_each(image: PillowFile.ImageFile) -> int:
    is_transparent = "transparency" in image.info
    each = _MIXED_BYTES if is_transparent else _MODE_BYTES.get(image.mode, _MIXED_BYTES)
    is_converted = "exif" in image.info or "icc_profile" in image.info
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        is_converted |= image.tag_v2.get(_ORIENTATION, 1) != 1
    return each + (_CONVERTED_BYTES if is_converted else 0)


def _finish(
    pixels: Image.Image,
    header: Image.Image,
    file: ScreenedImage,
    open_: Open,
    missing: Mask | None = None,
    *,
    keeps_grey: bool = False,
) -> Image.Image:
    """Return decoded pixels upright, in sRGB, and grey where pixels are missing.

    Args:
        pixels: the pixels as stored.
        header: the open file they come from.
        file: the bytes of that file.
        open_: opens the file again.
        missing: `(H, W) bool`, true where nothing was decoded.
        keeps_grey: as in `OpenImage`.
    """
    orientation = _orientation(header, is_whole=pixels is header)
    if is_wide(pixels):
        tags = header.tag_v2 if isinstance(header, TiffImagePlugin.TiffImageFile) else {}
        pixels = to_eight_bit_grey(
            pixels,
            is_scaled=file.is_scaled,
            is_unsigned=bool(tags) and tags.get(_SAMPLE_FORMAT, (1,))[0] == 1,
            is_inverted=bool(tags) and tags.get(_PHOTOMETRIC) == 0,
        )
    elif file.bits == 16 and missing is None:
        pixels = from_used_bits(pixels, lambda: open_(file.data))
    image = to_rgb_or_rgba(pixels, keeps_grey=keeps_grey)
    if missing is not None:
        image.paste((128,) * 3, mask=Image.fromarray(missing))
    turn = _TURNS.get(orientation)
    return image if turn is None else image.transpose(turn)


def _orientation(header: Image.Image, *, is_whole: bool) -> int:
    try:
        if isinstance(header, TiffImagePlugin.TiffImageFile):
            # Pillow rotates a TIFF that it can decode whole, and removes the tag.
            return int(header.tag_v2.get(_ORIENTATION, 1))
        # For a damaged PNG, Pillow would look for EXIF after the pixels.
        exif = header.getexif() if is_whole else Image.Image.getexif(header)
        return int(exif.get(_ORIENTATION, 1))
    # Damaged metadata do not make good pixels unusable (python-pillow/Pillow#5509).
    except Exception:
        return 1


@contextlib.contextmanager
def _damage_translated() -> Iterator[None]:
    """Translate what Pillow raises on damaged files, which can be anything."""
    try:
        yield
    except BadImage:
        raise
    except Exception as problem:
        raise _damaged_error(problem) from problem


def _damaged_error(problem: Exception) -> BadImage:
    if isinstance(problem, BadImage):
        return problem
    return BadImage(f"damaged image: {problem or type(problem).__name__}")


def _heif_reader() -> type[PillowFile.ImageFile]:
    try:
        import pillow_heif
    except ImportError as problem:
        raise BadImage(
            "a HEIC image, and pillow-heif is not installed",
            "the extra 'photos'",
            'pip install "sbtk[photos]"',
        ) from problem
    pillow_heif.register_heif_opener()
    reader: type[PillowFile.ImageFile] = pillow_heif.HeifImageFile
    return reader
