"""Metrics of the server for Prometheus: requests, queries, queues, memory."""

from __future__ import annotations

import time
from collections.abc import Iterator

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

from sbtk_runtime.web.photos import Thumbnails
from sbtk_runtime.web.service import Service

MEDIA_TYPE = CONTENT_TYPE_LATEST

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
        waiting.add_metric(["queries"], self._service.queries.length)
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
