"""Routes of the collection: indexed folders, files that could not be read, and indexing.

Reading them is allowed to every client that the server accepts. Changes are made on behalf of the
user of this machine: the server must listen on a loopback address, and the request must come from
there directly, because it may name any folder.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import AsyncIterator
from pathlib import Path

from fastapi import APIRouter, Request, Response
from fastapi.responses import StreamingResponse

from sbtk_runtime.files import printable_name
from sbtk_runtime.gallery.folder import folder_counts, list_failures, partly_readable, roots_to_walk
from sbtk_runtime.gallery.remote_gallery import RemoteGallery
from sbtk_runtime.regions import grid_of
from sbtk_runtime.web.auth import HOST, is_loopback
from sbtk_runtime.web.errors import error_answers, problem_answer
from sbtk_runtime.web.indexing import Indexer
from sbtk_runtime.web.refusals import Refusal, Refused
from sbtk_runtime.web.schemas import (
    FailuresAnswer,
    FileFailure,
    Folder,
    FolderShown,
    Id,
    IndexedFolder,
    IndexedFolders,
    IndexingAnswer,
    IndexReportAnswer,
    Offset,
    PageSize,
    RegionCount,
)
from sbtk_runtime.web.service import Service
from sbtk_runtime.web.uploads import run_until_disconnect

_EVENT_EVERY_S = 0.25
_HEARTBEAT_S = 15.0
_FORWARDED = ("forwarded", "x-forwarded-for", "x-forwarded-host", "x-real-ip")


def collection_routes(service: Service, *, may_change: bool) -> APIRouter:
    """Return the routes; without `may_change`, those that change the gallery refuse."""
    router = APIRouter(tags=["Collection"])

    def changeable(request: Request) -> tuple[Path, Indexer]:
        if service.folder is None or service.indexer is None:
            raise Refused(_ELSEWHERE)
        if not may_change or not _is_local(request):
            raise Refused(_READ_ONLY)
        return service.folder, service.indexer

    @router.get(
        "/v1/folders",
        summary="The indexed folders, with their numbers of photos",
        response_model=IndexedFolders,
        response_model_exclude_none=True,
        responses=error_answers(503, 504),
    )
    async def folders(request: Request) -> Response:
        def list_folders() -> IndexedFolders:
            with service.reading() as gallery:  # also checks that the gallery can be read
                counts = (
                    gallery.source_folders()
                    if isinstance(gallery, RemoteGallery)
                    else folder_counts(gallery.folder)
                )
            can_change = service.folder is not None and may_change and _is_local(request)
            return IndexedFolders(
                folders=[*map(IndexedFolder.of, counts)],
                can_change=can_change,
                can_show=may_change and _is_local(request) and _find_opener() is not None,
            )

        answer = await run_until_disconnect(request, service.reads.submit(list_folders))
        return _json(answer.model_dump_json(exclude_none=True))

    @router.get(
        "/v1/failures",
        summary="Files that could not be read, or only partly, with the reasons",
        response_model=FailuresAnswer,
        response_model_exclude_none=True,
        responses=error_answers(422, 503, 504),
    )
    async def failures(request: Request, limit: PageSize = 100, offset: Offset = 0) -> Response:
        def list_all() -> FailuresAnswer:
            found: list[FileFailure] = []
            # Whoever pushed photos elsewhere knows what could not be read.
            if folder is not None:
                failed, partial = list_failures(folder), partly_readable(folder)
                found += [FileFailure(**fields, is_searchable=False) for fields in failed]
                found += [FileFailure(**fields, is_searchable=True) for fields in partial]
            return FailuresAnswer(failures=found[offset : offset + limit], count=len(found))

        folder = service.folder
        answer = await run_until_disconnect(request, service.reads.submit(list_all))
        return _json(answer.model_dump_json(exclude_none=True))

    @router.get(
        "/v1/indexing",
        summary="The progress of indexing",
        response_model=IndexingAnswer,
        response_model_exclude_none=True,
        responses=error_answers(),
    )
    async def indexing() -> Response:
        return _json(_progress_json(service))

    @router.get(
        "/v1/indexing/events",
        summary="The progress of indexing as server-sent events",
        response_class=Response,
        responses=error_answers() | {200: {"content": {"text/event-stream": {"schema": _TEXT}}}},
        description="Each event `indexing` has the same JSON as `/v1/indexing`. The first comes at "
        "once, further ones after changes.",
    )
    async def events(request: Request) -> Response:
        headers = {"cache-control": "no-store", "x-accel-buffering": "no"}
        return StreamingResponse(
            _events(service, request), media_type="text/event-stream", headers=headers
        )

    @router.post(
        "/v1/indexing",
        summary="Index a folder, or all folders of the gallery again",
        status_code=202,
        response_model=IndexingAnswer,
        response_model_exclude_none=True,
        responses=error_answers(422, 503),
        description="Only for the user of the server's machine.",
    )
    async def start(request: Request, under: Folder, regions: RegionCount = None) -> Response:
        folder, indexer = changeable(request)
        if regions is not None:
            grid_of(regions)  # refuses other numbers
        roots = [] if under is None else [Path(under)]
        if roots:
            await run_until_disconnect(
                request, service.reads.submit(lambda: roots_to_walk(folder, roots))
            )
        indexer.update(roots, regions)
        return _json(_progress_json(service), 202)

    @router.delete(
        "/v1/folders",
        summary="Remove a folder's photos from the gallery",
        status_code=202,
        response_model=IndexingAnswer,
        response_model_exclude_none=True,
        responses=error_answers(422, 503),
        description="No file is deleted. Only for the user of the server's machine.",
    )
    async def forget(request: Request, under: Folder) -> Response:
        _, indexer = changeable(request)
        if under is None:
            raise Refused(_NO_FOLDER)
        indexer.forget(Path(under))
        return _json(_progress_json(service), 202)

    @router.post(
        "/v1/photos/{photo_id}/folder",
        summary="Show a photo's folder in the file manager of the server's machine",
        status_code=202,
        response_model=FolderShown,
        responses=error_answers(404, 409, 503, 504),
        description="Only for the user of the server's machine.",
    )
    async def show_folder(request: Request, photo_id: Id) -> Response:
        if not may_change or not _is_local(request):
            raise Refused(_NOT_SHOWN)
        program = _find_opener()
        if program is None:
            raise Refused(_NO_FILE_MANAGER)

        def show() -> str:
            photo, file = service.photo_file(photo_id)
            file.close()
            folder = str(Path(photo.path).parent)
            _open_folder(program, folder)
            return folder

        folder = await run_until_disconnect(request, service.reads.submit(show))
        return _json(FolderShown(folder=printable_name(folder)).model_dump_json(), 202)

    return router


_TEXT = {"type": "string"}
_READ_ONLY = Refusal(
    403,
    "read_only",
    "This server does not change the gallery.",
    "on the server's machine, open the page at http://127.0.0.1 without --read-only, or run "
    "'sbtk index'",
)
_ELSEWHERE = Refusal(
    403,
    "read_only",
    "The photos are in a collection of a database, which this server does not change.",
    "run 'sbtk index' and 'sbtk push' where the photos are",
)
_NOT_SHOWN = Refusal(
    403,
    "read_only",
    "This server opens no folders.",
    "on the server's machine, open the page at http://127.0.0.1 without --read-only",
)
_NO_FILE_MANAGER = Refusal(
    409,
    "no_file_manager",
    "No file manager can be opened on the server's machine.",
    "start the server in a desktop session, with xdg-open installed",
)
_NO_FOLDER = Refusal(
    422, "bad_parameter", "The parameter under is missing.", "name a folder of /v1/folders"
)


def _is_local(request: Request) -> bool:
    """Return whether a request comes from this machine, and not through a proxy."""
    host = HOST.fullmatch(request.headers.get("host", ""))
    peer = request.client
    return (
        host is not None
        and is_loopback(host[1])
        and peer is not None
        and is_loopback(peer.host)
        and not any(name in request.headers for name in _FORWARDED)
    )


def _json(content: str, status: int = 200) -> Response:
    headers = {"cache-control": "no-store"}
    return Response(content, status, headers, media_type="application/json")


def _progress_json(service: Service) -> str:
    progress = service.indexing
    manifest = service.state().gallery
    answer = IndexingAnswer(
        phase=progress.phase,
        done=progress.done,
        total=progress.total,
        rate=round(progress.rate, 1),
        jobs=progress.jobs,
        generation=None if manifest is None else manifest.generation,
        photos=None if manifest is None else manifest.live,
    )
    if progress.report is not None:
        answer.report = IndexReportAnswer.of(progress.report)
    if progress.problem is not None:
        answer.problem = problem_answer(progress.problem)
    return answer.model_dump_json(exclude_none=True)


async def _events(service: Service, request: Request) -> AsyncIterator[str]:
    """Yield an event for each change, and comments that keep the connection open."""
    sent, quiet_s = "", 0.0
    while not service.is_stopping() and not await request.is_disconnected():
        content = _progress_json(service)
        if content != sent:
            yield f"event: indexing\ndata: {content}\n\n"
            sent, quiet_s = content, 0.0
        elif quiet_s >= _HEARTBEAT_S:
            yield ": still here\n\n"
            quiet_s = 0.0
        await asyncio.sleep(_EVENT_EVERY_S)
        quiet_s += _EVENT_EVERY_S


def _find_opener() -> str | None:
    """Return the program that opens folders here; `None` if there is none, or no screen."""
    if sys.platform == "darwin":
        return shutil.which("open")
    has_screen = os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")
    return shutil.which("xdg-open") if has_screen else None


def _open_folder(program: str, folder: str) -> None:
    """Open an absolute path of a folder, without waiting for the file manager."""
    silent = subprocess.DEVNULL
    # Of its own session, because some desktops return only when the window is closed.
    process = subprocess.Popen(  # noqa: S603 -- a program of the system, and no shell
        [program, folder], stdin=silent, stdout=silent, stderr=silent, start_new_session=True
    )
    threading.Thread(target=process.wait, name="file manager", daemon=True).start()
