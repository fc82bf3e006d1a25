"""Routes of the server's state: gallery, health and metrics."""

from __future__ import annotations

import os
import threading
import weakref

from fastapi import APIRouter, Request, Response

from sbtk_runtime.gallery.gallery import Gallery
from sbtk_runtime.web.errors import error_answers, problem_answer
from sbtk_runtime.web.metrics import MEDIA_TYPE, Metrics
from sbtk_runtime.web.schemas import (
    EngineAnswer,
    FolderAnswer,
    GalleryAnswer,
    GalleryLink,
    HealthAnswer,
)
from sbtk_runtime.web.service import AnyGallery, Service
from sbtk_runtime.web.uploads import run_until_disconnect

MAX_FOLDERS = 1_000


def state_routes(service: Service, metrics: Metrics) -> APIRouter:
    """Return the routes that describe the server."""
    router = APIRouter(tags=["Server"])
    described = _Described(service)

    @router.get(
        "/v1/gallery",
        summary="The gallery",
        response_model=GalleryAnswer,
        responses=error_answers(503, 504),
    )
    async def gallery(request: Request) -> Response:
        content = await run_until_disconnect(request, service.reads.submit(described.json))
        return Response(content, media_type="application/json")

    @router.get(
        "/healthz",
        summary="Health of the server, and its engine",
        response_model=HealthAnswer,
        responses={
            **error_answers(403),
            200: {"description": "Queries are answered."},
            503: {"model": HealthAnswer, "description": "Queries are not answered, or not yet."},
        },
    )
    async def healthz(request: Request) -> Response:
        health = _health(service)
        public = {"status", "stuck_s"} if health.status == "stuck" else {"status"}
        content = health.model_dump_json(include=None if request.state.is_trusted else public)
        status = 200 if health.status == "ok" else 503
        headers = {"cache-control": "no-store"}
        return Response(content, status, headers, media_type="application/json")

    @router.get(
        "/metrics",
        summary="Metrics for Prometheus",
        response_class=Response,
        responses={**error_answers(), 200: {"content": {"text/plain": {"schema": _TEXT}}}},
    )
    async def figures() -> Response:
        return Response(metrics.text(), media_type=MEDIA_TYPE)

    return router


_TEXT = {"type": "string"}


class _Described:
    """A gallery's description as JSON, cached for each generation. Thread-safe."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._lock = threading.Lock()
        # A weak reference, so that an old generation does not stay in memory.
        self._described: weakref.ref[AnyGallery] | None = None
        self._generation = 0
        self._json = ""

    def json(self) -> str:
        with self._service.reading() as gallery, self._lock:
            count = gallery.count  # a collection asks for its newest generation
            is_same = self._described is not None and self._described() is gallery
            if not is_same or self._generation != gallery.manifest.generation:
                self._json = self._answer(gallery, count).model_dump_json(exclude_unset=True)
                self._described = weakref.ref(gallery)
                self._generation = gallery.manifest.generation
            return self._json

    def _answer(self, gallery: AnyGallery, count: int) -> GalleryAnswer:
        counts = gallery.folders()
        fullest = sorted(counts, key=lambda path: -counts[path])[:MAX_FOLDERS]
        manifest = gallery.manifest
        return GalleryAnswer(
            name=self._service.shown_name,
            count=count,
            generation=manifest.generation,
            model_id=manifest.model_id,
            precision=manifest.precision,
            bits=manifest.bits,
            regions=None if manifest.regions is None else manifest.regions.count,
            has_dates=isinstance(gallery, Gallery),
            folders=[FolderAnswer.of(os.fsencode(path), counts[path]) for path in sorted(fullest)],
            command=self._service.command,
            index_command=self._service.index_command,
            galleries=[
                GalleryLink(name=name, is_current=name == self._service.name)
                for name in self._service.galleries
            ],
        )


def _health(service: Service) -> HealthAnswer:
    state = service.state()
    answer = HealthAnswer(status=state.status)
    if state.status == "stuck":
        answer.stuck_s = round(state.stuck_s, 1)
    if state.engine is not None:
        answer.engine = EngineAnswer.model_validate(state.engine, from_attributes=True)
    if state.gallery is not None:
        answer.generation = state.gallery.generation
        answer.photos = state.gallery.live
    answer.is_indexing = not service.indexing.is_idle
    if state.problem is not None:
        answer.problem = problem_answer(state.problem)
    return answer
