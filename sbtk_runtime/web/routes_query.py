"""Routes of queries: photos that look like an uploaded image, or like one of the gallery."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query, Request, Response
from pydantic_core import to_json

from sbtk_runtime.errors import BadImage
from sbtk_runtime.preprocess import Kind
from sbtk_runtime.web.errors import error_answers, problem_answer
from sbtk_runtime.web.refusals import Refusal, Refused
from sbtk_runtime.web.schemas import (
    BatchAnswer,
    ByRegions,
    Disliked,
    Fold,
    Folder,
    Hits,
    Id,
    Liked,
    Limit,
    Offset,
    Part,
    QueryAnswer,
    RerankBy,
    SomeLiked,
    Taken,
    box_of,
    ids_of,
)
from sbtk_runtime.web.service import NO_FEEDBACK, Feedback, Found, SearchOptions, Service
from sbtk_runtime.web.uploads import (
    FORM_FIELD,
    FORM_TYPE,
    MEDIA_TYPES,
    BodyReader,
    Upload,
    image_of_body,
    images_of_form,
    is_accepted,
    is_form,
    run_until_disconnect,
)

_UNSUPPORTED = Refusal(
    415,
    "unsupported_type",
    f"The request's body must be a PNG, JPEG or WebP image, or a form with the field {FORM_FIELD}.",
    f"send it with the header 'Content-Type: {MEDIA_TYPES[0]}', or {' or '.join(MEDIA_TYPES[1:])}",
    closes=True,
)
_BINARY = {"type": "string", "format": "binary"}
_IMAGE = {"schema": _BINARY}
_FORM = {
    "schema": {
        "type": "object",
        "properties": {FORM_FIELD: _BINARY},
        "required": [FORM_FIELD],
        "additionalProperties": False,
    }
}
#: The most images of a batch.
MAX_BATCH = 32
_NOT_A_FORM = Refusal(
    415,
    "unsupported_type",
    f"The request's body must be a form with fields {FORM_FIELD}.",
    f"curl -F {FORM_FIELD}=@a.png -F {FORM_FIELD}=@b.png",
    closes=True,
)
_BATCH_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "description": "Image files, together at most 8 MiB.",
        "content": {
            FORM_TYPE: {
                "schema": {
                    "type": "object",
                    "properties": {
                        FORM_FIELD: {
                            "type": "array",
                            "items": _BINARY,
                            "minItems": 1,
                            "maxItems": MAX_BATCH,
                        }
                    },
                    "required": [FORM_FIELD],
                    "additionalProperties": False,
                }
            }
        },
    }
}
_REQUEST_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "description": "The bytes of an image file, at most 8 MiB.",
        "content": {**dict.fromkeys(MEDIA_TYPES, _IMAGE), FORM_TYPE: _FORM},
    }
}


async def _count(k: Hits = 24, limit: Limit = None) -> int:
    return limit or k


async def _search_options(
    under: Folder,
    taken: Taken,
    offset: Offset = 0,
    fold: Fold = True,
    rerank: RerankBy = None,
    regions: ByRegions = True,
) -> SearchOptions:
    return SearchOptions(under, taken, fold, offset, rerank, regions)


_Count = Annotated[int, Depends(_count)]
_Options = Annotated[SearchOptions, Depends(_search_options)]


def query_routes(service: Service, observe_s: Callable[[float], None]) -> APIRouter:
    """Return the routes whose responses are hits.

    `observe_s` is called with the seconds from a complete query to its response.
    """
    router = APIRouter(tags=["Search"])
    bodies = BodyReader()

    async def answer(
        request: Request,
        search: Callable[[], Found],
        options: SearchOptions,
        started: float,
        upload: Upload | None = None,
    ) -> dict[str, Any]:
        """Return the `QueryAnswer` to a search as a JSON object."""
        found = await run_until_disconnect(request, service.searches.submit(search))
        fields: dict[str, Any] = {"hits": [hit.to_json() for hit in found.answer.hits]}
        if not options.offset and found.answer.no_close_match is not None:
            fields["no_close_match"] = found.answer.no_close_match
        notices = found.answer.notices
        if upload is not None:
            fields["kind"] = upload.kind
            notices = (*upload.prepared.notices, *notices)
        took_s = time.perf_counter() - started
        observe_s(took_s)
        return fields | {
            "generation": found.generation,
            "engine": found.engine,
            "took_ms": round(took_s * 1e3, 2),
            "notices": list(notices),
        }

    async def answer_upload(
        request: Request,
        upload: Upload,
        count: int,
        options: SearchOptions,
        started: float,
        feedback: Feedback = NO_FEEDBACK,
    ) -> dict[str, Any]:
        embedding = await run_until_disconnect(request, service.uploads.embed(upload))

        def search() -> Found:
            return service.search(embedding, upload.kind, count, options, feedback)

        return await answer(request, search, options, started, upload)

    @router.post(
        "/v1/query",
        summary="Photos that look like a sketch or a photo",
        response_model=QueryAnswer,
        response_model_exclude_none=True,
        responses=error_answers(400, 404, 408, 413, 415, 422, 503, 504),
        openapi_extra=_REQUEST_BODY,
    )
    async def query(
        request: Request,
        count: _Count,
        options: _Options,
        kind: Annotated[
            Kind | None,
            Query(alias="as", description="What the image is; detected by default."),
        ] = None,
        like: Liked = None,
        unlike: Disliked = None,
    ) -> Response:
        feedback = Feedback(ids_of(like), ids_of(unlike))
        content_type = request.headers.get("content-type", "")
        if not is_accepted(content_type):
            raise Refused(_UNSUPPORTED)
        service.require_engine()
        async with bodies.read(request.scope, request.receive) as data:
            started = time.perf_counter()
            image = image_of_body(content_type, data)
            upload = await service.uploads.prepare(request, image, kind)
        return _json(await answer_upload(request, upload, count, options, started, feedback))

    @router.post(
        "/v1/queries",
        summary="Photos for each of several sketches or photos",
        response_model=BatchAnswer,
        response_model_exclude_none=True,
        responses=error_answers(400, 408, 413, 415, 422, 503, 504),
        openapi_extra=_BATCH_BODY,
        description="An image that cannot be used has an error in place of its hits.",
    )
    async def queries(
        request: Request,
        options: _Options,
        kind: Annotated[
            Kind | None,
            Query(alias="as", description="What the images are; detected by default."),
        ] = None,
        limit: Hits = 24,
    ) -> Response:
        content_type = request.headers.get("content-type", "")
        if not is_form(content_type):
            raise Refused(_NOT_A_FORM)
        service.require_engine()

        async def result(image: bytes) -> dict[str, Any]:
            started = time.perf_counter()
            try:
                upload = await service.uploads.prepare(request, image, kind)
                return await answer_upload(request, upload, limit, options, started)
            except BadImage as problem:
                return {"error": problem_answer(problem)}

        async with bodies.read(request.scope, request.receive) as data:
            images = images_of_form(content_type, data, MAX_BATCH)
            # One after the other: other clients' queries must not wait for a whole batch.
            results = [await result(image) for image in images]
        return _json({"results": results})

    @router.get(
        "/v1/similar",
        summary="Photos that look like several of the gallery, and unlike others",
        response_model=QueryAnswer,
        response_model_exclude_none=True,
        responses=error_answers(404, 422, 503, 504),
    )
    async def like_several(
        request: Request,
        like: SomeLiked,
        count: _Count,
        options: _Options,
        unlike: Disliked = None,
    ) -> Response:
        service.require_engine()
        started = time.perf_counter()
        feedback = Feedback(ids_of(like), ids_of(unlike))

        def search() -> Found:
            return service.search(None, "photo", count, options, feedback)

        return _json(await answer(request, search, options, started))

    @router.get(
        "/v1/photos/{photo_id}/similar",
        summary="Photos that look like one of the gallery, or like a part of it",
        response_model=QueryAnswer,
        response_model_exclude_none=True,
        responses=error_answers(404, 422, 503, 504),
    )
    async def similar(
        request: Request,
        photo_id: Id,
        count: _Count,
        options: _Options,
        region: Part = None,
    ) -> Response:
        service.require_engine()
        started = time.perf_counter()

        def search() -> Found:
            return service.similar(photo_id, count, options, box_of(region))

        return _json(await answer(request, search, options, started))

    return router


def _json(answer: dict[str, Any]) -> Response:
    # Without models of the response, whose fields take longer to fill than to print.
    return Response(to_json(answer), media_type="application/json")
