"""Open a gallery's photos safely, and make thumbnails of them.

After indexing, a photo or a folder above it may have been replaced by a link to any file. So every
path component below the indexed root is opened relative to its parent, and must not be a link: the
file that is read is the one that was checked. Only a photo that was a link when it was indexed may
be one, as long as it leads to the same, unchanged file.
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
from sbtk_runtime.gallery.catalogue import Photo
from sbtk_runtime.gallery.changes import signed_inode
from sbtk_runtime.image_limits import is_heic
from sbtk_runtime.images import FORMATS, memory_to_decode, read_open_file
from sbtk_runtime.raw_photo import is_raw
from sbtk_runtime.thumbnail import jpeg_bytes, thumbnail
from sbtk_runtime.web.queue import Busy

_FOLDER = os.O_DIRECTORY | os.O_CLOEXEC | getattr(os, "O_PATH", os.O_RDONLY)
_FILE = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
_SIGNATURE_BYTES = 4096
# The photo may be fine; the request can be repeated.
_EXHAUSTED = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)
_UPDATE = "update its folder on the page Collection, or with 'sbtk index'"


class PhotoNotFound(SbtkError):
    """A photo cannot be shown: its file is no longer there, or no longer a photo."""


def open_photo(path: bytes, roots: Iterable[bytes], indexed: Photo | None = None) -> BinaryIO:
    """Return the photo at an absolute `path`, open for reading.

    Args:
        path: from the catalogue.
        roots: the indexed absolute paths; if there are none, no folder may be a link.
        indexed: the catalogue's entry, for photos that were links when they were indexed.

    Raises:
        PhotoNotFound: it is not a readable regular file below one of the roots, a folder of its
            path below the root is a link, or it is a link to anything but the indexed file.
        Busy: the system has no more files or memory.
    """
    for root in list(roots) or [b"/"]:
        parts = _parts_below(root, path)
        if parts is None:
            continue
        try:
            return _open_within(root, parts, indexed)
        except ValueError:  # a path with a NUL byte
            continue
        except OSError as problem:
            if problem.errno in _EXHAUSTED:
                raise Busy("too many files are open", "", "try again in a second") from problem
    raise PhotoNotFound(
        "the photo is no longer there, or has become a link to another file",
        "the file that was indexed",
        _UPDATE,
    )


def etag_of(file: BinaryIO, purpose: str) -> str:
    """Return a quoted ETag that changes with the file, and differs between purposes."""
    status = os.fstat(file.fileno())
    stamp = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, purpose)
    return f'"{hashlib.sha256(repr(stamp).encode()).hexdigest()[:24]}"'


def size_of(file: BinaryIO) -> int:
    """Return the size of an open file in bytes."""
    return os.fstat(file.fileno()).st_size


def media_type_of(file: BinaryIO) -> str:
    """Return the media type of an image, by its first bytes.

    Raises:
        PhotoNotFound: it is not an image in a supported format.
    """
    head = file.read(_SIGNATURE_BYTES).ljust(_SIGNATURE_BYTES, b"\0")
    file.seek(0)
    if is_heic(head):
        return "image/heic"
    if is_raw(head):
        return "image/x-raw"
    for name in FORMATS:
        # Pillow's own check. The rest of the header may come after megabytes of metadata.
        _, is_accepted = Image.OPEN[name]
        if is_accepted is not None and is_accepted(head):
            return Image.MIME[name]
    raise PhotoNotFound("the file is no longer an image", ", ".join(FORMATS), _UPDATE)


def read_photo(file: BinaryIO) -> bytes:
    """Return the content of an open photo.

    Raises:
        PhotoNotFound: it cannot be read.
    """
    try:
        return read_open_file(file).data
    except BadImage as problem:
        raise PhotoNotFound(
            f"the photo cannot be read: {problem.found}", problem.expected
        ) from problem


def _parts_below(root: bytes, path: bytes) -> list[bytes] | None:
    """Return the components of `path` below `root`; `None` if it is not below it."""
    folder = root.rstrip(b"/")
    if path == root:  # a file that was indexed by its name
        return [b""]
    if not path.startswith(folder + b"/"):
        return None
    parts = path[len(folder) + 1 :].split(b"/")
    return None if any(part in (b"", b".", b"..") for part in parts) else parts


def _open_within(root: bytes, parts: list[bytes], indexed: Photo | None) -> BinaryIO:
    if parts == [b""]:
        root, name = os.path.split(root)
        parts = [name]
    folder = os.open(root or b"/", _FOLDER)
    try:
        for part in parts[:-1]:
            below = os.open(part, _FOLDER | os.O_NOFOLLOW, dir_fd=folder)
            os.close(folder)
            folder = below
        descriptor = _open_file(parts[-1], folder, indexed)
    finally:
        os.close(folder)
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError("not a regular file")
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def _open_file(name: bytes, folder: int, indexed: Photo | None) -> int:
    """Return a descriptor of a file, which may be a link to the file that was indexed."""
    try:
        return os.open(name, _FILE, dir_fd=folder)
    except OSError as problem:
        if indexed is None or problem.errno != errno.ELOOP:
            raise
        # Before it is opened, which a device may notice, and afterwards, if the link has changed.
        if not _is_same(os.stat(name, dir_fd=folder), indexed):
            raise
        descriptor = os.open(name, _FILE & ~os.O_NOFOLLOW, dir_fd=folder)
        if _is_same(os.fstat(descriptor), indexed):
            return descriptor
        os.close(descriptor)
        raise


def _is_same(status: os.stat_result, indexed: Photo) -> bool:
    """Return whether a file is the indexed one: no other file can have its inode and ctime."""
    stamps = (status.st_size, status.st_mtime_ns, status.st_ctime_ns, signed_inode(status.st_ino))
    return stamps == (indexed.size_bytes, indexed.mtime_ns, indexed.ctime_ns, indexed.inode)


KEPT_BYTES = 64 << 20
#: The most memory of all threads for decoding; larger photos are decoded one at a time.
DECODE_BYTES = 256 << 20


class SizePx(IntEnum):
    """The sizes of thumbnails: the most pixels of the longer side."""

    SMALL = 180
    CARD = 360
    LARGE = 720
    SCREEN = 1600


class Thumbnails:
    """Makes thumbnails, and caches the most recently used ones. Thread-safe.

    Args:
        kept_bytes: the size of the cache.
    """

    def __init__(self, kept_bytes: int = KEPT_BYTES) -> None:
        self._limit_bytes = kept_bytes
        self._kept: OrderedDict[str, bytes] = OrderedDict()
        self._kept_bytes = 0
        self._lock = threading.Lock()
        self._decoding = MemoryBudget(DECODE_BYTES)

    @property
    def kept_bytes(self) -> int:
        """The size of the cached thumbnails."""
        return self._kept_bytes

    def jpeg(self, file: BinaryIO, tag: str, size_px: SizePx) -> bytes:
        """Return a photo as a small upright JPEG without metadata.

        Args:
            file: an open photo.
            tag: identifies the version of the file and the size.
            size_px: the size.

        Raises:
            PhotoNotFound: it cannot be read, or is no longer an image.
        """
        with self._lock:
            if (kept := self._kept.get(tag)) is not None:
                self._kept.move_to_end(tag)
                return kept
        made = self._make(file, size_px)
        with self._lock:
            self._kept_bytes += len(made) - len(self._kept.pop(tag, b""))
            self._kept[tag] = made
            while self._kept_bytes > self._limit_bytes:
                _, dropped = self._kept.popitem(last=False)
                self._kept_bytes -= len(dropped)
        return made

    def _make(self, file: BinaryIO, size_px: SizePx) -> bytes:
        try:
            data = read_open_file(file).data
            with self._decoding.reserve(memory_to_decode(data, at_least_px=size_px)):
                return jpeg_bytes(thumbnail(data, size_px))
        except BadImage as problem:
            raise PhotoNotFound(
                f"the photo cannot be shown: {problem.found}", problem.expected
            ) from problem
