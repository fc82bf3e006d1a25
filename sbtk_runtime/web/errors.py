"""Errors as HTTP responses: a status, a code, a sentence and a next step."""

from __future__ import annotations

import asyncio
import logging
import os
import re
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.routing import compile_path
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sbtk_runtime.errors import (
    BadConfig,
    BadData,
    BadGallery,
    BadImage,
    BadRegion,
    EmptySketch,
    GalleryBusy,
    ModelMismatch,
    SbtkError,
)
from sbtk_runtime.gallery.remote import RemoteError, RemoteUnavailable
from sbtk_runtime.web.photos import PhotoNotFound
from sbtk_runtime.web.queue import Busy
from sbtk_runtime.web.refusals import (
    Refusal,
    Refused,
    is_for_people,
    send_refusal,
    send_refusal_page,
)
from sbtk_runtime.web.schemas import ErrorAnswer, ProblemAnswer
from sbtk_runtime.web.service import GalleryDeleted, Loading, Stuck
from sbtk_runtime.web.uploads import ClientDisconnected, TimedOut

#: Status and code of each class of errors; the first match counts.
_KNOWN: tuple[tuple[type[SbtkError], int, str], ...] = (
    (EmptySketch, 400, "empty_sketch"),
    (BadImage, 400, "bad_image"),
    (BadConfig, 422, "bad_parameter"),
    (BadRegion, 422, "bad_region"),
    (BadData, 422, "bad_folder"),
    (PhotoNotFound, 404, "no_photo"),
    (Busy, 503, "busy"),
    (Loading, 503, "loading"),
    (Stuck, 503, "stuck"),
    (GalleryBusy, 503, "gallery_busy"),
    (GalleryDeleted, 503, "gallery_gone"),
    (BadGallery, 503, "bad_gallery"),
    (RemoteUnavailable, 503, "gallery_unavailable"),
    (RemoteError, 503, "bad_gallery"),
    (ModelMismatch, 503, "model_mismatch"),
    (TimedOut, 504, "timed_out"),
)
_RETRY_AFTER_S = {"busy": 1, "loading": 1, "gallery_unavailable": 5}
_HTTP_ERRORS = {
    404: ("not_found", "There is nothing at this URL."),
    405: ("method_not_allowed", "This URL does not support this method."),
}
# nginx's status for a client that disconnected. It is not sent, but counted.
_CLIENT_GONE = 499

_DESCRIPTIONS = {
    400: "The image cannot be used, the sketch is empty, or the form is malformed.",
    401: "The server's token is missing.",
    403: "The host name is not allowed, or another web page sent the request.",
    404: "There is no such photo, or its file is no longer there.",
    408: "The request's body took too long.",
    409: "The server's machine has no file manager.",
    413: "The request's body is too large.",
    415: "The request's body has an unsupported type.",
    422: "A parameter is out of range, unknown, or given twice.",
    500: "Internal error.",
    503: "Loading, busy, shutting down, or the gallery cannot be served.",
    504: "It took too long.",
}

_log = logging.getLogger("sbtk.web")


def error_answers(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Return the OpenAPI description of a route's errors, with those of every route."""
    every = sorted({*statuses, 401, 403, 422, 500})
    return {
        status: {"model": ErrorAnswer, "description": _DESCRIPTIONS[status]} for status in every
    }


def refusal_of(problem: SbtkError) -> Refusal:
    """Return the response for an error."""
    status, code = next(
        ((status, code) for kind, status, code in _KNOWN if isinstance(problem, kind)),
        (500, "fault"),
    )
    return Refusal(
        *(status, code, _sentence(problem), problem.next_step),
        retry_after_s=_RETRY_AFTER_S.get(code, 0),
    )


def problem_answer(problem: SbtkError) -> ProblemAnswer:
    """Return the JSON model of an error."""
    refusal = refusal_of(problem)
    return ProblemAnswer(code=refusal.code, message=refusal.message, next=refusal.next_step)


def add_error_answers(app: FastAPI) -> None:
    """Give all error responses of `app` the same form."""

    @app.exception_handler(Refused)
    async def refused(request: Request, problem: Refused) -> Response:
        return _answer(request, problem.refusal)

    @app.exception_handler(SbtkError)
    async def known(request: Request, problem: SbtkError) -> Response:
        return _answer(request, refusal_of(problem))

    @app.exception_handler(ClientDisconnected)
    async def gone(_: Request, __: ClientDisconnected) -> Response:
        return Response(status_code=_CLIENT_GONE)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, problem: RequestValidationError) -> Response:
        return _answer(request, _refusal_of_parameters(problem))

    @app.exception_handler(Exception)
    async def failed(_: Request, __: Exception) -> Response:
        return _response(_FAULT)

    @app.exception_handler(HTTPException)
    async def unknown(request: Request, problem: HTTPException) -> Response:
        unusual = ("bad_request", _as_sentence(problem.detail))
        code, text = _HTTP_ERRORS.get(problem.status_code, unusual)
        path, next_step = request.url.path, "see /docs"
        if problem.status_code == 404:
            if path.startswith("/g/"):
                text = "This server has no gallery of this name."
            next_step = "open /, or see /docs for the API"
        refusal = Refusal(problem.status_code, code, text, next_step)
        if problem.status_code == 404:
            return _answer(request, refusal)
        response = _response(refusal)
        response.headers.update(problem.headers or {})
        if problem.status_code == 405:
            found = response.headers.get("allow", "")
            response.headers["allow"] = _list_allowed(app, request, found)
        return response


def _list_allowed(app: FastAPI, request: Request, found: str) -> str:
    """Return the methods of all routes of a path; Starlette finds those of the first."""
    methods = {method.strip() for method in found.split(",")}
    for path, operations in app.openapi()["paths"].items():
        if compile_path(path)[0].match(request.url.path):
            methods |= {method.upper() for method in operations}
    # HEAD is not described; see `answer_head`.
    return ", ".join(sorted(methods | ({"HEAD"} if "GET" in methods else set())))


class ErrorMiddleware:
    """ASGI middleware that logs exceptions, and sends a 500 if no response was started.

    Requests that are cancelled because the server stops get a 503.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on."""
        is_begun = False

        async def send_noted(message: Message) -> None:
            nonlocal is_begun
            is_begun = True
            await send(message)

        try:
            await self._app(scope, receive, send_noted)
        # No exception may affect the next request.
        except Exception as problem:
            kind = type(problem).__name__
            _log.error(
                *("internal error (%s: %s); SBTK_DEBUG=1 prints a traceback", kind, problem),
                exc_info=bool(os.environ.get("SBTK_DEBUG")),
            )
            if not is_begun:
                await send_refusal(send, _FAULT)
        # Requests are cancelled only when the server stops.
        except asyncio.CancelledError:
            if not is_begun:
                await send_refusal(send, _STOPPING)


_FAULT = Refusal(
    500,
    "fault",
    "Internal error.",
    "please report it with the server's output under SBTK_DEBUG=1",
)
_STOPPING = Refusal(
    503,
    "stopping",
    "The server is shutting down.",
    "try again when it has restarted",
    closes=True,
)


def _answer(request: Request, refusal: Refusal) -> Response:
    """Return a page for people, and JSON for programs."""
    path = request.url.path
    if is_for_people(path, request.headers.get("accept", "")):
        return _Page(refusal, path)
    return _response(refusal)


def _response(refusal: Refusal) -> Response:
    headers = {name.decode(): value.decode() for name, value in refusal.headers()}
    return Response(refusal.body(), refusal.status, headers)


class _Page(Response):
    """A refusal for people."""

    def __init__(self, refusal: Refusal, path: str) -> None:
        super().__init__(status_code=refusal.status)
        self._refusal = refusal
        self._path = path

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send_refusal_page(send, self._refusal, self._path)


def _refusal_of_parameters(problem: RequestValidationError) -> Refusal:
    first = problem.errors()[0]
    place, *names = (str(part) for part in first["loc"])
    if place == "path":
        return Refusal(404, "no_photo", "There is no such photo.", "take the id of a hit")
    what = first["msg"].removeprefix("Value error, ")
    if first["type"] == "string_pattern_mismatch":
        what = "it is not written like the examples in /docs"
    what = what[:1].lower() + what[1:]
    text = f"The parameter {' '.join(names)} is wrong: {what}."
    return Refusal(422, "bad_parameter", text, "see /docs")


def _sentence(problem: SbtkError) -> str:
    text = problem.found
    if problem.expected:
        text += f"; expected: {problem.expected}"
    return _as_sentence(text)


def _as_sentence(text: str) -> str:
    # Names of files and options stay as they are.
    if re.match(r"[a-z][a-z-]*[,:]?(\s|$)", text):
        text = text[:1].upper() + text[1:]
    return text if text.endswith(".") else f"{text}."
