"""What may be uploaded for a query, and how it is decoded while other clients are answered.

Most uploads are small and decoded side by side on several threads. Costly ones, by their memory or
their work, which are known from the header, wait for each other on threads of their own, and hold
up nobody else. Both are bounded in time and in memory, and neither is the engine's thread.
"""

from __future__ import annotations

from starlette.requests import Request

from sbtk_runtime.embedding.memory_budget import MemoryBudget
from sbtk_runtime.errors import BadImage, LargeImage
from sbtk_runtime.images import MAX_DECODE_BYTES, OpenImage
from sbtk_runtime.preprocess import Kind, Prepared, opened, prepared_from
from sbtk_runtime.web.waiting import answer_of
from sbtk_runtime.web.work_queue import WorkQueue

MEDIA_TYPES = ("image/png", "image/jpeg", "image/webp")
#: Core-seconds for one upload; honest ones take a tenth of one.
MAX_DECODE_S = 5.0
#: What a small upload takes at most while it is decoded: a drawing of 1,300 pixels a side.
SMALL_BYTES = 24 << 20
#: What a small upload has at most to be decoded, each scan counted: half a core-second.
SMALL_PIXELS = 64 << 20
#: What all costly ones together take.
COSTLY_BYTES = 224 << 20

_SMALL_WORKERS, _COSTLY_WORKERS = 8, 2
# Many threads share few cores under attack, so that a job may take long without being stuck.
_STUCK_AFTER_S = 30.0


def is_accepted(content_type: str) -> bool:
    """Whether a Content-Type header names a format that may be uploaded."""
    return content_type.partition(";")[0].strip().lower() in MEDIA_TYPES


class UploadDecoder:
    """Decodes the uploads of a server.

    Args:
        waiting: uploads that may wait.

    Attributes:
        small: the queue of all uploads.
        costly: the queue of those whose decoding takes much memory or work.
    """

    def __init__(self, waiting: int) -> None:
        self.small = WorkQueue(
            "upload", workers=_SMALL_WORKERS, waiting=waiting, stuck_after_s=_STUCK_AFTER_S
        )
        self.costly = WorkQueue(
            "costly-upload", workers=_COSTLY_WORKERS, waiting=waiting, stuck_after_s=_STUCK_AFTER_S
        )
        self._budget = MemoryBudget(COSTLY_BYTES)

    async def prepared(self, request: Request, data: bytes, kind: Kind) -> Prepared:
        """Returns the model's input for an upload.

        Raises:
            BadImage: it is empty, of another format, damaged, or takes too much memory or time.
            EmptySketch: nothing is drawn on the sketch.
            Busy: too many uploads wait.
            ClientGone: nobody waits for the answer any more.
            TimedOut: it was not decoded in time.
        """
        found = await answer_of(request, self.small, lambda: _prepared_if_small(data, kind))
        if isinstance(found, Prepared):
            return found
        return await answer_of(request, self.costly, lambda: self._decoded_costly(found, kind))

    def close(self, timeout_s: float) -> None:
        """Cancels what waits, and lets what is under way end."""
        self.small.close(timeout_s)
        self.costly.close(timeout_s)

    def _decoded_costly(self, image: OpenImage, kind: Kind) -> Prepared:
        with self._budget.taking(image.memory_bytes):
            return _prepared(image, kind)


def _prepared_if_small(data: bytes, kind: Kind) -> Prepared | OpenImage:
    """Returns the model's input, or a costly image to be decoded elsewhere."""
    if not data:
        raise BadImage("the request has no picture in its body", "the bytes of an image file")
    if not _has_signature(data):
        raise BadImage("this is no picture that can be uploaded", "PNG, JPEG or WebP")
    try:
        image = opened(data, kind, limit_s=MAX_DECODE_S)
    except LargeImage as problem:
        raise BadImage(
            "the picture has too many pixels for an upload",
            f"one that takes at most {MAX_DECODE_BYTES >> 20} MiB of memory",
            "send it smaller: 1,000 pixels a side are plenty",
        ) from problem
    is_small = image.memory_bytes <= SMALL_BYTES and image.work_pixels <= SMALL_PIXELS
    return _prepared(image, kind) if is_small else image


def _prepared(image: OpenImage, kind: Kind) -> Prepared:
    picture = image.decode()
    return prepared_from(picture.image, kind, notices=picture.notices)


def _has_signature(data: bytes) -> bool:
    is_webp = data[:4] == b"RIFF" and data[8:12] == b"WEBP"
    return is_webp or data.startswith((b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff"))
