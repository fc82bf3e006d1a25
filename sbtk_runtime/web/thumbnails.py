"""Thumbnails: photos made small and written anew, the last ones kept in bounded memory."""

from __future__ import annotations

import threading
from collections import OrderedDict
from enum import IntEnum
from typing import BinaryIO

from sbtk_runtime.embedding.memory_budget import MemoryBudget
from sbtk_runtime.errors import BadImage
from sbtk_runtime.images import memory_to_decode, read_open_file
from sbtk_runtime.thumbnail import jpeg_bytes, thumbnail
from sbtk_runtime.web.photo_files import PhotoGone

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
            PhotoGone: it cannot be read, or is no picture any more.
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
            with self._decoding.taking(memory_to_decode(data, at_least_px=size_px)):
                return jpeg_bytes(thumbnail(data, size_px))
        except BadImage as problem:
            raise PhotoGone(
                f"the photo cannot be shown: {problem.found}", problem.expected
            ) from problem
