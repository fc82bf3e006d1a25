"""Read, check, decode and embed the images that clients send, without delaying other clients.

Most uploads are small, and decoded on several threads. Images that need much memory or work, which
is known from their headers, are decoded on separate threads, so that they do not block others. Both
are limited in time and memory.
"""

from __future__ import annotations

import asyncio
import contextlib
import email
import email.message
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import numpy as np
from starlette.requests import Request
from starlette.types import Receive, Scope

from sbtk_runtime.embedding.stream import BAD_ROW, MemoryBudget
from sbtk_runtime.engines.base import Embeddings, Engine, Images
from sbtk_runtime.engines.session import validate_embeddings
from sbtk_runtime.errors import BadImage, LargeImage, SbtkError
from sbtk_runtime.image_limits import SIGNATURES
from sbtk_runtime.images import MAX_DECODE_BYTES, OpenImage
from sbtk_runtime.preprocess import (
    KINDS,
    Kind,
    Pixels,
    Prepared,
    Preprocessing,
    detect_kind,
    open_image,
)
from sbtk_runtime.web.queue import Batch, WorkQueue
from sbtk_runtime.web.refusals import Refusal, Refused

MEDIA_TYPES = ("image/png", "image/jpeg", "image/webp")
FORM_TYPE = "multipart/form-data"
#: The field of a form that holds the image.
FORM_FIELD = "image"
# RFC 2046 allows no longer boundaries.
_MAX_BOUNDARY = 70
_MAX_PART_HEAD = 4_096
_LOOKS_LIKE_A_PHOTO = (
    "The image looks like a photo and was searched as one; to search it as a sketch: as=sketch"
)
#: Core-seconds for one upload; usual ones take a tenth of a second.
MAX_DECODE_S = 5.0
#: The most memory for decoding a small upload, such as a drawing of 1,300 pixels a side.
SMALL_BYTES = 24 << 20
#: The most pixels of a small upload, counting every scan: half a core-second.
SMALL_PIXELS = 64 << 20
#: The most memory for all costly uploads together.
COSTLY_BYTES = 224 << 20

#: Uploads that the engine embeds together. More would delay the next ones.
QUERY_BATCH = 4
#: Batches that the engine runs at once, each on its share of a CPU's threads.
_LANES = 2

_SMALL_WORKERS, _COSTLY_WORKERS = 8, 2
# In a flood, many threads share few cores: a job may take long without being stuck.
_STUCK_AFTER_S = 30.0


def is_accepted(content_type: str) -> bool:
    """Return whether a Content-Type header names a supported format, or a form."""
    return _media_type(content_type) in (*MEDIA_TYPES, FORM_TYPE)


def image_of_body(content_type: str, body: bytes) -> bytes:
    """Return the image in a request's body: all of it, or of a form the field `image`.

    Raises:
        Refused: `bad_form` (400): the form is malformed, or has other fields.
    """
    if _media_type(content_type) != FORM_TYPE:
        return body
    return images_of_form(content_type, body, most=1)[0]


def is_form(content_type: str) -> bool:
    """Return whether a Content-Type header names a form."""
    return _media_type(content_type) == FORM_TYPE


def images_of_form(content_type: str, body: bytes, most: int) -> list[bytes]:
    """Return the images in a form: one to `most` fields `image`, in their order.

    Raises:
        Refused: `bad_form` (400): the form is malformed, or has other or more fields.
    """
    boundary = _parameters(content_type).get("boundary", "")
    if not 1 <= len(boundary) <= _MAX_BOUNDARY:
        raise Refused(_bad_form("The form's Content-Type has no boundary", most))
    # The first delimiter need not follow a line break.
    parts = (b"\r\n" + body).split(b"\r\n--" + boundary.encode("latin-1"), most + 2)
    if not 3 <= len(parts) <= most + 2 or not parts[-1].startswith(b"--"):
        number = "exactly one field" if most == 1 else f"1 to {most} fields"
        raise Refused(_bad_form(f"The form does not have {number}", most))
    return [_image_of_part(part, most) for part in parts[1:-1]]


def _image_of_part(part: bytes, most: int) -> bytes:
    head, blank, content = part.partition(b"\r\n\r\n")
    if not blank or len(head) > _MAX_PART_HEAD:
        raise Refused(_bad_form("The form's field has no proper headers", most))
    headers = email.message_from_bytes(head.removeprefix(b"\r\n"))
    if headers.get_param("name", header="content-disposition") != FORM_FIELD:
        raise Refused(_bad_form("The form's field has another name", most))
    return content


def _bad_form(found: str, most: int) -> Refusal:
    files = "one file in the field" if most == 1 else f"1 to {most} files in fields"
    return Refusal(
        400,
        "bad_form",
        f"{found}; expected: {files} '{FORM_FIELD}'.",
        f"curl -F {FORM_FIELD}=@sketch.png",
    )


def _media_type(content_type: str) -> str:
    return content_type.partition(";")[0].strip().lower()


def _parameters(content_type: str) -> dict[str, str]:
    """Return the parameters of a Content-Type header, by their names in lower case."""
    message = email.message.Message()
    message["content-type"] = content_type
    return {name.lower(): value for name, value in message.get_params([])[1:]}


@dataclass(frozen=True)
class Upload:
    """The model's input for an upload, and what the upload is."""

    prepared: Prepared
    kind: Kind


class Uploads:
    """Decodes and embeds uploads on threads of its own.

    Args:
        waiting: the most uploads that wait in a queue.
        preprocessing: of the model that embeds them.
        engine: returns the engine of that model, which uses all threads for a batch.
        open_lanes: opens that engine with so many lanes, for batches at the same time; returns
            `None` if it cannot.

    Attributes:
        small: the queue for decoding all uploads.
        costly: the queue for decoding those that need much memory or work.
        queries: the queue for the engine.
    """

    def __init__(
        self,
        waiting: int,
        preprocessing: Preprocessing,
        engine: Callable[[], Engine],
        open_lanes: Callable[[int], Engine | None],
    ) -> None:
        self._preprocessing = preprocessing
        self._engine = _SharedEngine(engine, open_lanes)
        self.small = WorkQueue(
            "upload", workers=_SMALL_WORKERS, waiting=waiting, stuck_after_s=_STUCK_AFTER_S
        )
        self.costly = WorkQueue(
            "costly-upload", workers=_COSTLY_WORKERS, waiting=waiting, stuck_after_s=_STUCK_AFTER_S
        )
        self.queries = WorkQueue("query", workers=_LANES, waiting=waiting)
        self._batches: dict[Kind, Batch[Pixels, Embeddings]] = {
            kind: Batch(partial(self._embed, kind), QUERY_BATCH) for kind in KINDS
        }
        self._budget = MemoryBudget(COSTLY_BYTES)

    async def prepare(self, request: Request, data: bytes, kind: Kind | None) -> Upload:
        """Return the model's input for an upload.

        Args:
            request: whose disconnection cancels the work.
            data: a PNG, JPEG or WebP file.
            kind: what it is; `None` to detect it.

        Raises:
            BadImage: it is empty, damaged, of another format, or needs too much memory or time.
            EmptySketch: nothing is drawn on the sketch.
            Busy: too many uploads wait.
            ClientDisconnected: the client disconnected.
            TimedOut: it was not decoded in time.
        """
        upload = await self._prepare(request, data, kind)
        if upload is None:
            upload = await self._prepare(request, data, "sketch")
        assert upload is not None
        return upload

    def embed(self, upload: Upload) -> Future[Embeddings]:
        """Return the future embedding `(D,) float32` of an upload.

        Uploads that wait for the engine are embedded together. The future raises `BadImage` if the
        model fails on the image.

        Raises:
            Busy: too many uploads wait.
        """
        return self.queries.submit_to(self._batches[upload.kind], upload.prepared.pixels)

    def close(self, timeout_s: float) -> bool:
        """Cancel waiting uploads, and return whether the engine is idle.

        Decoding ends within `timeout_s` seconds, or goes on in the background.
        """
        is_idle = self.queries.close()
        self._engine.close(is_idle=is_idle)
        self.small.close(timeout_s)
        self.costly.close(timeout_s)
        return is_idle

    async def _prepare(self, request: Request, data: bytes, kind: Kind | None) -> Upload | None:
        found = await run_until_disconnect(
            request, self.small.submit(lambda: _prepare_if_small(data, kind, self._preprocessing))
        )
        if not isinstance(found, OpenImage):
            return found
        return await run_until_disconnect(
            request, self.costly.submit(lambda: self._prepare_costly(found, kind))
        )

    def _prepare_costly(self, image: OpenImage, kind: Kind | None) -> Upload | None:
        with self._budget.reserve(image.memory_bytes):
            return _prepare_opened(image, kind, self._preprocessing)

    def _embed(self, kind: Kind, pixels: Sequence[Pixels]) -> list[Embeddings | Exception]:
        rows, is_bad = validate_embeddings(self._engine.run(np.stack(pixels), kind))
        return [BadImage(BAD_ROW) if bad else row for row, bad in zip(rows, is_bad, strict=True)]


class _SharedEngine:
    """Gives a batch all threads while it is alone, and several at once a lane each.

    A batch on all threads waits, layer by layer, for whichever thread decodes an upload or searches
    in between. Lanes do not wait for each other, but one batch alone would take twice as long. They
    are opened in the background when batches first overlap, so a single user does not pay for
    them.
    """

    def __init__(
        self, whole: Callable[[], Engine], open_lanes: Callable[[int], Engine | None]
    ) -> None:
        self._whole = whole
        self._open_lanes = open_lanes
        self._lanes: Engine | None = None
        self._opening: threading.Thread | None = None
        self._running = 0
        self._lock = threading.Lock()

    def run(self, images: Images, kind: Kind) -> Embeddings:
        """Return what `Engine.run` returns."""
        whole = self._whole()
        with self._lock:
            self._running += 1
            engine = whole if self._running == 1 else self._lanes
            can_have_lanes = whole.info.device == "cpu" and whole.info.threads >= _LANES
            if engine is None and self._opening is None and can_have_lanes:
                self._opening = threading.Thread(target=self._open, name="lanes", daemon=True)
                self._opening.start()
        try:
            return (engine or whole).run(images, kind)
        finally:
            with self._lock:
                self._running -= 1

    def close(self, *, is_idle: bool) -> None:
        """Close the lanes; leave them open if they still run, since that would end the process."""
        if self._opening is not None:
            self._opening.join()
        if self._lanes is not None and is_idle:
            self._lanes.close()

    def _open(self) -> None:
        self._lanes = self._open_lanes(_LANES)


def _prepare_if_small(
    data: bytes, kind: Kind | None, preprocessing: Preprocessing
) -> Upload | OpenImage | None:
    """Return a costly image that is not decoded yet, or what `_prepare_opened` returns."""
    if not data:
        raise BadImage("the request has no image in its body", "the bytes of an image file")
    if not any(SIGNATURES[name](data) for name in ("PNG", "JPEG", "WEBP")):
        raise BadImage("unsupported image format", "PNG, JPEG or WebP")
    # As a photo first, decoded like the gallery's photos.
    image = _open(data, kind or "photo")
    is_small = image.memory_bytes <= SMALL_BYTES and image.work_pixels <= SMALL_PIXELS
    return _prepare_opened(image, kind, preprocessing) if is_small else image


def _open(data: bytes, kind: Kind) -> OpenImage:
    try:
        return open_image(data, kind, limit_s=MAX_DECODE_S)
    except LargeImage as problem:
        raise BadImage(
            "the image has too many pixels for an upload",
            f"one that takes at most {MAX_DECODE_BYTES >> 20} MiB of memory",
            "scale it down; 1,000 pixels a side are enough",
        ) from problem


def _prepare_opened(
    image: OpenImage, kind: Kind | None, preprocessing: Preprocessing
) -> Upload | None:
    """Return an upload as `kind`, or as what it seems to be if it was opened as a photo.

    `None` is a sketch that is to be decoded again, at a larger scale.
    """
    decoded = image.decode()
    notices = decoded.notices
    if kind is None and detect_kind(decoded.image) == "photo":
        kind, notices = "photo", (*notices, _LOOKS_LIKE_A_PHOTO)
    if kind is not None:
        return Upload(preprocessing.prepare_image(decoded.image, kind, notices=notices), kind)
    # Only JPEGs are decoded at several scales, with less memory at a smaller one.
    if _open(image.data, "sketch").memory_bytes != image.memory_bytes:
        return None
    prepared = preprocessing.prepare_image(decoded.image, "sketch", notices=notices)
    return Upload(prepared, "sketch")


MAX_BODY_BYTES = 8 << 20
#: For the bodies of all requests together, until they are decoded.
MAX_BODIES_BYTES = 64 << 20
BODY_TIMEOUT_S = 10.0


class ClientDisconnected(Exception):
    """The client disconnected, so that no response is needed."""


class BodyReader:
    """Reads the bodies of all requests, with limits.

    A body may have `max_bytes`, and all bodies in memory `max_held_bytes`. Only received bytes
    count, not Content-Length, so idle connections hold nothing.
    """

    def __init__(
        self,
        max_bytes: int = MAX_BODY_BYTES,
        max_held_bytes: int = MAX_BODIES_BYTES,
        timeout_s: float = BODY_TIMEOUT_S,
    ) -> None:
        self._max_bytes = max_bytes
        self._max_held_bytes = max_held_bytes
        self._timeout_s = timeout_s
        self._held_bytes = 0

    @property
    def held_bytes(self) -> int:
        """The bytes of bodies in memory."""
        return self._held_bytes

    @contextlib.asynccontextmanager
    async def read(self, scope: Scope, receive: Receive) -> AsyncIterator[bytes]:
        """Yield the complete body, which counts until the block ends.

            async with bodies.read(request.scope, request.receive) as body:
                ...

        Raises:
            Refused: `body_too_large` (413), `too_slow` (408) or `busy` (503).
            ClientDisconnected: the client disconnected.
        """
        body, whole = bytearray(), b""
        try:
            if (_content_length(scope) or 0) > self._max_bytes:
                raise Refused(self._too_large())
            try:
                async with asyncio.timeout(self._timeout_s):
                    await self._fill(body, receive)
            except TimeoutError as problem:
                raise Refused(self._too_slow()) from problem
            whole = bytes(body)
            # It counts once, so it must not be in memory twice.
            body.clear()
            yield whole
        finally:
            self._held_bytes -= len(body) + len(whole)

    async def _fill(self, body: bytearray, receive: Receive) -> None:
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ClientDisconnected
            chunk = message.get("body", b"")
            if len(body) + len(chunk) > self._max_bytes:
                raise Refused(self._too_large())
            if self._held_bytes + len(chunk) > self._max_held_bytes:
                raise Refused(_NO_ROOM)
            # Not a list of chunks: some clients send a byte at a time.
            body += chunk
            self._held_bytes += len(chunk)
            if not message.get("more_body", False):
                return

    def _too_large(self) -> Refusal:
        return Refusal(
            413,
            "body_too_large",
            f"The request's body is larger than {self._max_bytes >> 20} MiB.",
            "send a smaller image; 1,000 x 1,000 pixels suffice",
            closes=True,
        )

    def _too_slow(self) -> Refusal:
        return Refusal(
            408,
            "too_slow",
            f"The request's body did not come within {self._timeout_s:g} seconds.",
            "send it again, or send a smaller image",
            closes=True,
        )


_NO_ROOM = Refusal(
    503,
    "busy",
    "Too many images are being received at once.",
    "try again in a moment",
    retry_after_s=1,
    closes=True,
)


def _content_length(scope: Scope) -> int | None:
    """Return the Content-Length, which the HTTP parser has checked, or `None`."""
    for name, value in scope["headers"]:
        if name == b"content-length":
            return int(value)
    return None


Result = TypeVar("Result")

TIMEOUT_S = 10.0


class TimedOut(SbtkError):
    """A response took too long."""


async def run_until_disconnect(
    request: Request, job: Future[Result], timeout_s: float = TIMEOUT_S
) -> Result:
    """Return the result of a job of a `WorkQueue`; cancel it if the client disconnects.

    The request's body must have been read.

    Raises:
        ClientDisconnected: the client closed the connection.
        TimedOut: there was no result in time.
    """
    answer = asyncio.wrap_future(job)
    gone = asyncio.create_task(_until_disconnect(request))
    try:
        ends: set[asyncio.Future[Any]] = {answer, gone}
        await asyncio.wait(ends, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        if answer.done():
            return answer.result()
        if gone.done():
            raise ClientDisconnected
        raise TimedOut(
            f"the request took longer than {timeout_s:g} seconds", "", "try again in a moment"
        )
    finally:
        gone.cancel()
        answer.cancel()


async def _until_disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
