"""Opens a gallery's photos for others to see, and nothing else that may lie at their paths.

Since it was indexed a photo may have been replaced by a link to any file, or a folder above it.
So every component below the indexed root is opened from the one above it and must be no link:
what was checked is what is read.
"""

from __future__ import annotations

import errno
import hashlib
import os
import stat
import threading
from collections import OrderedDict
from collections.abc import Iterable
from enum import IntEnum
from typing import BinaryIO

from PIL import Image

from sbtk_runtime.embedding.stream import MemoryBudget
from sbtk_runtime.errors import BadImage, SbtkError
from sbtk_runtime.image_limits import is_heic
from sbtk_runtime.images import FORMATS, memory_to_decode, read_open_file
from sbtk_runtime.raw_photo import is_raw
from sbtk_runtime.thumbnail import jpeg_bytes, thumbnail
from sbtk_runtime.web.queue import Busy

_FOLDER = os.O_DIRECTORY | os.O_CLOEXEC | getattr(os, "O_PATH", os.O_RDONLY)
_FILE = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
_SIGNATURE_BYTES = 4096
# Then the photo is well, and the next request may be lucky.
_EXHAUSTED = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)


class PhotoGone(SbtkError):
    """A photo cannot be shown: it is not where it was found, or is another thing now."""


def open_photo(path: bytes, roots: Iterable[bytes]) -> BinaryIO:
    """Returns the photo at an absolute `path`, open for reading.

    Args:
        path: as the catalogue has it.
        roots: absolute paths that were indexed; without any, no component may be a link.

    Raises:
        PhotoGone: there is no regular file, it cannot be read, it lies below none of the roots,
            or a component of its path below the root is a link.
        Busy: the system gives no more files or memory.
    """
    for root in list(roots) or [b"/"]:
        parts = _parts_below(root, path)
        if parts is None:
            continue
        try:
            return _opened(root, parts)
        except ValueError:  # a path with a NUL byte
            continue
        except OSError as problem:
            if problem.errno in _EXHAUSTED:
                raise Busy("too many files are open", "", "try again in a second") from problem
    raise PhotoGone(
        "the photo is not where it was found", "a regular file, and no link", "sbtk index PHOTOS"
    )


def etag_of(file: BinaryIO, purpose: str) -> str:
    """Returns a tag, with its quotes, that changes with the file and is no other purpose's."""
    status = os.fstat(file.fileno())
    stamp = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, purpose)
    return f'"{hashlib.sha256(repr(stamp).encode()).hexdigest()[:24]}"'


def size_of(file: BinaryIO) -> int:
    """Returns the bytes of an open file."""
    return os.fstat(file.fileno()).st_size


def media_type_of(file: BinaryIO) -> str:
    """Returns the media type of an image, by its first bytes.

    Raises:
        PhotoGone: it is not an image in a supported format.
    """
    head = file.read(_SIGNATURE_BYTES).ljust(_SIGNATURE_BYTES, b"\0")
    file.seek(0)
    if is_heic(head):
        return "image/heic"
    if is_raw(head):
        return "image/x-raw"
    for name in FORMATS:
        # What Pillow itself goes by; the rest of a header may lie behind megabytes of metadata.
        _, is_accepted = Image.OPEN[name]
        if is_accepted is not None and is_accepted(head):
            return Image.MIME[name]
    raise PhotoGone("the file is no longer an image", ", ".join(FORMATS), "sbtk index PHOTOS")


def _parts_below(root: bytes, path: bytes) -> list[bytes] | None:
    """Returns the components of `path` below `root`; `None` if it does not lie there."""
    folder = root.rstrip(b"/")
    if path == root:  # a file that was indexed by its name
        return [b""]
    if not path.startswith(folder + b"/"):
        return None
    parts = path[len(folder) + 1 :].split(b"/")
    return None if any(part in (b"", b".", b"..") for part in parts) else parts


def _opened(root: bytes, parts: list[bytes]) -> BinaryIO:
    if parts == [b""]:
        root, name = os.path.split(root)
        parts = [name]
    folder = os.open(root or b"/", _FOLDER)
    try:
        for part in parts[:-1]:
            below = os.open(part, _FOLDER | os.O_NOFOLLOW, dir_fd=folder)
            os.close(folder)
            folder = below
        descriptor = os.open(parts[-1], _FILE, dir_fd=folder)
    finally:
        os.close(folder)
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError("not a regular file")
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


KEPT_BYTES = 64 << 20
#: What all threads together may take to decode photos; a larger one is decoded alone.
DECODE_BYTES = 256 << 20


class SizePx(IntEnum):
    """The sizes there are: pixels that the longer side has at most."""

    SMALL = 180
    CARD = 360
    LARGE = 720
    SCREEN = 1600


class Thumbnails:
    """Makes thumbnails, and keeps those that were asked for last; any number of threads may ask.

    Args:
        kept_bytes: of all thumbnails that are kept.
    """

    def __init__(self, kept_bytes: int = KEPT_BYTES) -> None:
        self._limit_bytes = kept_bytes
        self._kept: OrderedDict[str, bytes] = OrderedDict()
        self._kept_bytes = 0
        self._lock = threading.Lock()
        self._decoding = MemoryBudget(DECODE_BYTES)

    @property
    def kept_bytes(self) -> int:
        """The size of all thumbnails that are kept."""
        return self._kept_bytes

    def jpeg(self, file: BinaryIO, tag: str, size_px: SizePx) -> bytes:
        """Returns a photo as a small JPEG, upright, without metadata.

        Args:
            file: an open photo.
            tag: names this state of the file and this size.
            size_px: how large.

        Raises:
            PhotoGone: it cannot be read, or is no longer an image.
        """
        with self._lock:
            if (kept := self._kept.get(tag)) is not None:
                self._kept.move_to_end(tag)
                return kept
        made = self._made(file, size_px)
        with self._lock:
            self._kept_bytes += len(made) - len(self._kept.pop(tag, b""))
            self._kept[tag] = made
            while self._kept_bytes > self._limit_bytes:
                _, dropped = self._kept.popitem(last=False)
                self._kept_bytes -= len(dropped)
        return made

    def _made(self, file: BinaryIO, size_px: SizePx) -> bytes:
        try:
            data = read_open_file(file).data
            with self._decoding.reserve(memory_to_decode(data, at_least_px=size_px)):
                return jpeg_bytes(thumbnail(data, size_px))
        except BadImage as problem:
            raise PhotoGone(
                f"the photo cannot be shown: {problem.found}", problem.expected
            ) from problem
