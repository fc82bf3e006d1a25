"""The state of the server: routes of gallery, health and metrics, and counting of requests."""

from __future__ import annotations

import os
import threading
import time
import weakref
from collections.abc import Iterator

from fastapi import APIRouter, Request, Response
from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Histogram,
    ProcessCollector,
    generate_latest,
)
from prometheus_client.core import GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.registry import Collector
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sbtk_runtime.gallery.gallery import Gallery
from sbtk_runtime.web.errors import error_answers, problem_answer
from sbtk_runtime.web.photos import Thumbnails
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
        return Response(metrics.text(), media_type=CONTENT_TYPE_LATEST)

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


_SECONDS = (0.005, 0.01, 0.02, 0.03, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)


class Metrics:
    """The metrics of one server.

    Attributes:
        query_seconds: from the complete query to its response.
    """

    def __init__(self, service: Service, thumbnails: Thumbnails) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_LiveMetrics(service, thumbnails))
        ProcessCollector(registry=self._registry)
        self.query_seconds = Histogram(
            "sbtk_query_seconds",
            "From the complete query to its response.",
            buckets=_SECONDS,
            registry=self._registry,
        )
        self._requests = Counter(
            "sbtk_requests",
            "Requests by route, method and status.",
            ["route", "method", "status"],
            registry=self._registry,
        )
        self._request_seconds = Histogram(
            "sbtk_request_seconds",
            "From the request's headers to the end of its response.",
            ["route"],
            buckets=_SECONDS,
            registry=self._registry,
        )

    def text(self) -> bytes:
        """Return all metrics in the text format of Prometheus."""
        return generate_latest(self._registry)

    def count(self, scope: Scope, status: int, seconds: float) -> None:
        """Count a request that was answered."""
        # Not the path: clients could create any number of time series.
        route = getattr(scope.get("route"), "path", "other") or "other"
        method = scope["method"] if scope["method"] in ("GET", "HEAD", "POST") else "other"
        self._requests.labels(route, method, f"{status}").inc()
        self._request_seconds.labels(route).observe(seconds)


class MetricsMiddleware:
    """ASGI middleware that counts and times requests."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = time.perf_counter()
        status = 500

        async def send_noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, send_noted)
        finally:
            self._metrics.count(scope, status, time.perf_counter() - started)


class _LiveMetrics(Collector):
    """Metrics that are computed when they are collected."""

    def __init__(self, service: Service, thumbnails: Thumbnails) -> None:
        self._service = service
        self._thumbnails = thumbnails

    def collect(self) -> Iterator[Metric]:
        state = self._service.state()
        yield _gauge("sbtk_ready", "1 if queries are answered, else 0.", state.status == "ok")
        if state.gallery is not None:
            yield _gauge("sbtk_photos", "Searchable photos.", state.gallery.live)
            yield _gauge(
                "sbtk_gallery_generation",
                "Generation of the gallery.",
                state.gallery.generation,
            )
        if state.engine is not None:
            engine = InfoMetricFamily("sbtk_engine", "The engine that runs the model.")
            of_engine = {
                "name": state.engine.name,
                "version": state.engine.version,
                "device": state.engine.device,
                "precision": state.engine.precision,
            }
            engine.add_metric([], of_engine)
            yield engine
        waiting = GaugeMetricFamily("sbtk_waiting", "Waiting requests by queue.", labels=["queue"])
        waiting.add_metric(["queries"], self._service.uploads.queries.length)
        waiting.add_metric(["searches"], self._service.searches.length)
        waiting.add_metric(["reads"], self._service.reads.length)
        waiting.add_metric(["thumbnails"], self._service.thumbnails.length)
        waiting.add_metric(["uploads"], self._service.uploads.small.length)
        waiting.add_metric(["costly_uploads"], self._service.uploads.costly.length)
        yield waiting
        yield _gauge(
            "sbtk_thumbnail_bytes", "Size of the thumbnails in memory.", self._thumbnails.kept_bytes
        )


def _gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(name, text, value=value)
