"""The app over a gallery that is not open yet: its responses, and who gets them."""

from __future__ import annotations

import asyncio
import time
import weakref
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from starlette.types import ASGIApp

from sbtk_runtime.bundle import Bundle
from sbtk_runtime.engines.base import EngineOptions
from sbtk_runtime.web.app import guarded_app
from sbtk_runtime.web.auth import access_rules
from sbtk_runtime.web.service import Service
from tests.processes import run_python
from tests.serve_client import sketch_png
from tests.tiny import tiny_bundle, write_photos
from tests.web.conftest import Workplace


@pytest.fixture
def loading(tmp_path: Path) -> Iterator[ASGIApp]:
    """Return an app whose engine and gallery nobody has begun to open."""
    service = Service(tmp_path / "gallery.sbtk", Bundle.open(tiny_bundle(tmp_path / "bundle")))
    yield guarded_app(service, access_rules("127.0.0.1"))
    for queue in (service.searches, service.reads, service.thumbnails):
        queue.close()
    service.uploads.close(1)


def ask(app: ASGIApp, path: str, method: str = "GET", body: bytes = b"") -> httpx.Response:
    async def answered() -> httpx.Response:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
            headers = {"content-type": "image/png"} if body else {}
            return await client.request(method, path, content=body, headers=headers)

    return asyncio.run(answered())


def test_until_it_is_loaded_requests_get_a_503_with_retry_after(loading: ASGIApp) -> None:
    answers = [ask(loading, "/v1/query", "POST", sketch_png())]
    for path in ("gallery", "photos/1", "photos/1/thumbnail", "photos/1/file", "photos/1/similar"):
        answers.append(ask(loading, f"/v1/{path}"))
    for answer in answers:
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "loading")
        assert answer.headers["retry-after"] == "1"
    health = ask(loading, "/healthz")
    assert (health.status_code, health.json()["status"]) == (503, "loading")
    for path in ("/", "/docs", "/openapi.json", "/metrics"):
        assert ask(loading, path).status_code == 200


def test_a_described_generation_is_closed_when_the_next_one_is_opened(
    workplace: Workplace,
) -> None:
    # Its graph may be the largest thing in memory.
    choice = EngineOptions("onnxruntime", threads=1)
    with Service(workplace.gallery, Bundle.open(workplace.bundle), choice) as service:
        service.loaded.result(60)
        app = guarded_app(service, access_rules("127.0.0.1"))
        assert ask(app, "/v1/gallery").json()["generation"] == 1
        with service.reading() as gallery:
            first = weakref.ref(gallery)
        del gallery
        write_photos(workplace.photos / "more", 2, seed=1)
        workplace.index()
        end = time.monotonic() + 30
        while first() is not None:
            assert time.monotonic() < end
            time.sleep(0.05)
        assert ask(app, "/v1/gallery").json()["generation"] == 2


_WITH_TELEMETRY = """
import sys
from opentelemetry import metrics, trace
from opentelemetry.metrics import MeterProvider
from opentelemetry.trace import TracerProvider

class Tracers(TracerProvider):
    def get_tracer(self, *_, **__):
        raise SystemExit("a tracer was asked for")

class Meters(MeterProvider):
    def get_meter(self, *_, **__):
        raise SystemExit("a meter was asked for")

trace.set_tracer_provider(Tracers())
metrics.set_meter_provider(Meters())

from pathlib import Path
from sbtk_runtime.bundle import Bundle
from sbtk_runtime.web.auth import access_rules
from sbtk_runtime.web.app import guarded_app
from sbtk_runtime.web.service import Service
from tests.web.test_app import ask

service = Service(Path(sys.argv[1]), Bundle.open(sys.argv[1]))
print(ask(guarded_app(service, access_rules("127.0.0.1")), "/healthz").status_code)
"""


def test_requests_are_not_reported_to_telemetry(tmp_path: Path) -> None:
    # FastAPI tells one that the environment has set up.
    pytest.importorskip("opentelemetry")
    assert run_python(_WITH_TELEMETRY, tiny_bundle(tmp_path / "bundle")) == "503\n"
