"""Routes of photos: list, details, thumbnail and file. Photos are named by ids, never by paths."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import BinaryIO
from urllib.parse import quote

from fastapi import APIRouter, Request, Response
from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from sbtk_runtime.exif import read_details
from sbtk_runtime.web.errors import error_answers
from sbtk_runtime.web.photos import (
    SizePx,
    Thumbnails,
    etag_of,
    media_type_of,
    read_photo,
    size_of,
)
from sbtk_runtime.web.schemas import (
    DetailsAnswer,
    Folder,
    Id,
    ListedPhoto,
    Offset,
    PageSize,
    PhotoAnswer,
    PhotosAnswer,
    Size,
    Taken,
)
from sbtk_runtime.web.service import Service
from sbtk_runtime.web.uploads import run_until_disconnect

_CHUNK_BYTES = 256 << 10
# Photos can change, and in a recreated gallery the id can be another photo's.
_CACHING = "private, no-cache"
_NOT_MODIFIED = {304: {"description": "The copy with the tag in If-None-Match is up to date."}}


def photo_routes(service: Service, thumbnails: Thumbnails) -> APIRouter:
    """Return the routes that show photos."""
    router = APIRouter(tags=["Photos"])

    @router.get(
        "/v1/photos",
        summary="Photos by modification time, newest first",
        response_model=PhotosAnswer,
        response_model_exclude_none=True,
        responses=error_answers(422, 503, 504),
    )
    async def photos(
        request: Request,
        under: Folder,
        taken: Taken,
        limit: PageSize = 24,
        offset: Offset = 0,
    ) -> Response:
        generation, listed = await run_until_disconnect(
            request, service.reads.submit(lambda: service.recent(limit, offset, under, taken))
        )
        answer = PhotosAnswer(photos=[ListedPhoto.of(one) for one in listed], generation=generation)
        return Response(answer.model_dump_json(exclude_none=True), media_type="application/json")

    @router.get(
        "/v1/photos/{photo_id}",
        summary="Details of a photo",
        response_model=PhotoAnswer,
        response_model_exclude_none=True,
        responses=error_answers(404, 503, 504),
    )
    async def photo(request: Request, photo_id: Id) -> Response:
        found = await run_until_disconnect(
            request, service.reads.submit(lambda: service.photo(photo_id))
        )
        answer = PhotoAnswer.of(found).model_dump_json(exclude_none=True)
        return Response(answer, media_type="application/json")

    @router.get(
        "/v1/photos/{photo_id}/details",
        summary="Size, date, camera and place, from the photo's file",
        response_model=DetailsAnswer,
        response_model_exclude_none=True,
        responses=error_answers(404, 503, 504),
    )
    async def details(request: Request, photo_id: Id) -> Response:
        def read() -> DetailsAnswer:
            known, opened = service.photo_file(photo_id)
            with opened as file:
                is_changed = known.has_changed(os.fstat(file.fileno()))
                return DetailsAnswer.of(read_details(read_photo(file)), is_changed=is_changed)

        found = await run_until_disconnect(request, service.thumbnails.submit(read))
        return Response(found.model_dump_json(exclude_none=True), media_type="application/json")

    @router.get(
        "/v1/photos/{photo_id}/thumbnail",
        summary="A photo as a small JPEG, upright, without metadata",
        response_class=Response,
        responses=error_answers(404, 422, 503, 504)
        | _NOT_MODIFIED
        | {200: {"content": {"image/jpeg": _BYTES}}},
    )
    async def thumbnail(request: Request, photo_id: Id, size: Size = SizePx.CARD) -> Response:
        def made() -> Response:
            _, opened = service.photo_file(photo_id)
            with opened as file:
                tag = etag_of(file, f"{size:d}")
                if _is_known(request, tag):
                    return _not_modified(tag)
                jpeg = thumbnails.jpeg(file, tag, size)
            return Response(jpeg, media_type="image/jpeg", headers=_headers(tag))

        return await run_until_disconnect(request, service.thumbnails.submit(made))

    @router.get(
        "/v1/photos/{photo_id}/file",
        summary="The file of a photo",
        response_class=Response,
        responses=error_answers(404, 503, 504) | _NOT_MODIFIED | {200: {"content": _IMAGES}},
    )
    async def file(request: Request, photo_id: Id) -> Response:
        def open_file() -> Response:
            known, content = service.photo_file(photo_id)
            try:
                return _file_answer(request, os.fsencode(known.path), content)
            except BaseException:
                content.close()
                raise

        return await run_until_disconnect(request, service.reads.submit(open_file))

    return router


_BYTES = {"schema": {"type": "string", "format": "binary"}}
_IMAGES = {"image/*": _BYTES}


def _file_answer(request: Request, path: bytes, file: BinaryIO) -> Response:
    """Return a response that sends an open file and close it."""
    tag = etag_of(file, "file")
    if _is_known(request, tag):
        file.close()
        return _not_modified(tag)
    media_type, size_bytes = media_type_of(file), size_of(file)
    headers = _headers(tag) | {
        "content-disposition": f"inline; filename*=UTF-8''{quote(path.rpartition(b'/')[2])}",
        "content-length": f"{size_bytes}",
    }
    if request.method == "HEAD":
        file.close()
        return Response(media_type=media_type, headers=headers)
    return _FileResponse(file, size_bytes, media_type, headers)


class _FileResponse(StreamingResponse):
    """Sends the first `size_bytes` of an open file, and closes it even if the client disconnects.

    Starlette leaves the iterator to the garbage collector.
    """

    def __init__(
        self, file: BinaryIO, size_bytes: int, media_type: str, headers: dict[str, str]
    ) -> None:
        super().__init__(_chunks(file, size_bytes), media_type=media_type, headers=headers)
        self._file = file

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._file:
            await super().__call__(scope, receive, send)


def _is_known(request: Request, tag: str) -> bool:
    """Return whether the client has the version with this tag."""
    known = request.headers.get("if-none-match", "").split(",")
    return any(text.strip().removeprefix("W/") in (tag, "*") for text in known)


def _not_modified(tag: str) -> Response:
    return Response(status_code=304, headers=_headers(tag))


def _headers(tag: str) -> dict[str, str]:
    return {"etag": tag, "cache-control": _CACHING}


def _chunks(file: BinaryIO, size_bytes: int) -> Iterator[bytes]:
    """Yield the first `size_bytes` of a file.

    Raises:
        OSError: the file was truncated; the connection ends, which tells the client.
    """
    while size_bytes > 0:
        chunk = file.read(min(_CHUNK_BYTES, size_bytes))
        if not chunk:
            raise OSError("a photo was truncated while it was sent")
        size_bytes -= len(chunk)
        yield chunk
