"""Costly uploads delay no others, and a stuck worker is reported."""

from __future__ import annotations

import asyncio
import io
import threading
import tracemalloc
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import pytest
from PIL import Image
from starlette.types import Message, Receive, Scope

from sbtk_runtime.bundle import Bundle
from sbtk_runtime.embedding.embedder import Embedder
from sbtk_runtime.engines.base import EngineOptions
from sbtk_runtime.errors import BadImage, SlowImage
from sbtk_runtime.preprocess import CROPPED, open_image, prepare
from sbtk_runtime.web.app import guarded_app
from sbtk_runtime.web.auth import access_rules
from sbtk_runtime.web.queue import WorkQueue
from sbtk_runtime.web.refusals import Refused
from sbtk_runtime.web.service import Service
from sbtk_runtime.web.uploads import (
    SMALL_BYTES,
    SMALL_PIXELS,
    BodyReader,
    ClientDisconnected,
    Upload,
    _prepare_if_small,
    _prepare_opened,
    _SharedEngine,
)
from tests.serve_client import png, query, resident_bytes, sketch_png
from tests.serve_process import ServeProcess
from tests.tiny import tiny_photo
from tests.web.conftest import Workplace


def many_scans(side_px: int, scans: int) -> bytes:
    """Return a progressive JPEG whose last scan is there many times: much work in few bytes."""
    buffer = io.BytesIO()
    image = tiny_photo(5).convert("L").resize((side_px, side_px))
    image.save(buffer, "JPEG", progressive=True, quality=1)
    data = buffer.getvalue()
    last = data[data.rindex(b"\xff\xda") : -2]
    return data[:-2] + last * scans + data[-2:]


@pytest.fixture(scope="module")
def slow_jpeg() -> bytes:
    return many_scans(2400, 200)


def test_costly_images_are_recognised_before_decoding(slow_jpeg: bytes) -> None:
    for data in (sketch_png(), png(tiny_photo(1)), png(Image.new("RGBA", (1200, 1000)))):
        image = open_image(data, "photo")
        assert image.memory_bytes <= SMALL_BYTES and image.work_pixels <= SMALL_PIXELS
    slow = open_image(slow_jpeg, "photo")
    assert len(slow_jpeg) < 1 << 20 and slow.work_pixels > 200 * 2400 * 2400
    large = open_image(png(Image.new("RGB", (4000, 4000))), "photo")
    assert large.memory_bytes > SMALL_BYTES
    assert large.work_pixels == 4000 * 4000
    reduced = io.BytesIO()
    Image.new("RGB", (4000, 3000)).save(reduced, "JPEG")
    image = open_image(reduced.getvalue(), "photo")
    assert image.memory_bytes <= SMALL_BYTES
    assert image.work_pixels == pytest.approx(4000 * 3000, rel=0.02)


def test_an_upload_has_a_shorter_time_limit_than_a_file(slow_jpeg: bytes) -> None:
    with pytest.raises(SlowImage, match="too long"):
        open_image(slow_jpeg, "photo", limit_s=0.05).decode()
    with pytest.raises(BadImage, match="PNG, JPEG or WebP"):
        _prepare_if_small(b"GIF89a" + bytes(100), "photo", CROPPED)


def test_an_upload_is_decoded_again_only_if_its_kind_needs_another_scale() -> None:
    photo = _prepare_if_small(png(tiny_photo(1)), None, CROPPED)
    assert isinstance(photo, Upload) and photo.kind == "photo"
    assert np.array_equal(photo.prepared.pixels, prepare(png(tiny_photo(1)), "photo").pixels)
    drawing = Image.open(io.BytesIO(sketch_png())).resize((2400, 2400))
    for file_format, is_decoded_once in (("PNG", True), ("JPEG", False)):
        buffer = io.BytesIO()
        drawing.convert("RGB").save(buffer, file_format)
        found = _prepare_opened(open_image(buffer.getvalue(), "photo"), None, CROPPED)
        assert (found is not None) == is_decoded_once
        if found is not None:
            expected = prepare(buffer.getvalue(), "sketch")
            assert found.kind == "sketch"
            assert np.array_equal(found.prepared.pixels, expected.pixels)


def test_large_uploads_are_decoded_and_give_the_hits_of_the_python_api(
    server: ServeProcess, shared: Workplace
) -> None:
    transparent = tiny_photo(4).resize((1700, 1700)).convert("RGBA")
    transparent.putpixel((0, 0), (0, 0, 0, 0))
    image = png(transparent)
    assert open_image(image, "photo").memory_bytes > SMALL_BYTES
    answer = query(server.port, image, "?as=photo&k=5")
    assert answer.status == 200, answer
    assert answer.json()["hits"] == [hit.to_json() for hit in shared.hits(image, "photo", 5)]


def test_other_requests_are_answered_while_costly_uploads_are_decoded(
    server: ServeProcess, slow_jpeg: bytes
) -> None:
    """More of them than there are threads for uploads of any kind."""
    before = resident_bytes(server.process.pid)
    hostile = 12
    answered_meanwhile = 0
    with ThreadPoolExecutor(hostile) as clients:
        waiting = [
            clients.submit(query, server.port, slow_jpeg, "?as=photo", "image/jpeg")
            for _ in range(hostile)
        ]
        while not all(answer.done() for answer in waiting):
            assert query(server.port, sketch_png(), "?k=1").status == 200
            answered_meanwhile += sum(not answer.done() for answer in waiting) >= hostile - 1
            assert server.health()[0] == 200
            assert resident_bytes(server.process.pid) < before + (512 << 20)
        assert {answer.result().status for answer in waiting} <= {200, 400, 503, 504}
    assert answered_meanwhile >= 1
    assert query(server.port, sketch_png()).status == 200


@pytest.fixture
def service(workplace: Workplace) -> Service:
    return Service(
        workplace.gallery, Bundle.open(workplace.bundle), EngineOptions("onnxruntime", threads=1)
    )


def test_health_reports_a_stuck_worker_and_its_recovery(
    service: Service,
) -> None:
    """A real app whose engine's thread is held by a job, as by a driver that hangs."""
    service.uploads.queries = WorkQueue("query", workers=1, waiting=4, stuck_after_s=0.05)
    may_end = threading.Event()
    with service:
        service.loaded.result(60)
        app = guarded_app(service, access_rules("127.0.0.1", token="a-long-token"))

        async def health(token: str | None) -> httpx.Response:
            transport = httpx.ASGITransport(app)
            headers = {"authorization": f"Bearer {token}"} if token else {}
            async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as one:
                return await one.get("/healthz", headers=headers)

        assert asyncio.run(health(None)).json() == {"status": "ok"}
        job = service.uploads.queries.submit(lambda: may_end.wait(60))
        try:
            while (answer := asyncio.run(health("a-long-token"))).status_code == 200:
                pass
            body = answer.json()
            assert (answer.status_code, body["status"]) == (503, "stuck")
            assert body["stuck_s"] > 0
            assert body["problem"]["code"] == "stuck"
            assert "'query'" in body["problem"]["message"]
            public = asyncio.run(health(None))
            assert public.status_code == 503
            assert set(public.json()) == {"status", "stuck_s"}
        finally:
            may_end.set()
        assert job.result(20)
        while asyncio.run(health(None)).status_code != 200:
            pass
        assert asyncio.run(health(None)).json() == {"status": "ok"}


def test_an_upload_has_the_embedding_of_a_file(tmp_path: Path, workplace: Workplace) -> None:
    with Embedder(workplace.bundle, engine="onnxruntime", threads=1) as embedder:
        row, _ = embedder.embed_one(sketch_png(), "sketch")
        prepared = prepare(sketch_png(), "sketch")
        upload = _prepare_if_small(sketch_png(), None, CROPPED)
        assert isinstance(upload, Upload) and upload.kind == "sketch"
        assert np.array_equal(upload.prepared.pixels, prepared.pixels)
        assert np.array_equal(row, embedder.embed_prepared(prepared.pixels, "sketch"))


def test_queries_that_overlap_get_lanes_and_the_embeddings_of_all_threads(
    workplace: Workplace,
) -> None:
    bundle = Bundle.open(workplace.bundle)
    uploads = [
        Upload(prepare(png, "sketch"), "sketch") for png in (sketch_png(), sketch_png(seed=1))
    ]
    with Embedder(bundle, engine="onnxruntime", threads=2) as embedder:
        rows = [embedder.embed_prepared(each.prepared.pixels, "sketch") for each in uploads]
    with Service(workplace.gallery, bundle, EngineOptions("onnxruntime", threads=2)) as service:
        service.loaded.result(60)
        assert np.allclose(service.uploads.embed(uploads[0]).result(20), rows[0], atol=1e-5)
        assert not lanes_of(service), "a query alone opens no lanes"
        for _ in range(200):
            jobs = [service.uploads.embed(uploads[number % 2]) for number in range(12)]
            found = [job.result(20) for job in jobs]
            assert np.allclose(found, [*rows] * 6, atol=1e-5)
            if lanes_of(service):
                break
        assert lanes_of(service) == 2
        found = [job.result(20) for job in map(service.uploads.embed, uploads * 6)]
        assert np.allclose(found, [*rows] * 6, atol=1e-5)


def lanes_of(service: Service) -> int:
    lanes = service.uploads._engine._lanes
    return lanes.info.lanes if lanes is not None else 0


@pytest.mark.parametrize(("threads", "tries"), [(1, 0), (2, 1)])
def test_without_lanes_batches_take_turns(workplace: Workplace, threads: int, tries: int) -> None:
    """One thread cannot be divided, and lanes that do not open are not tried again."""
    asked: list[int] = []
    pixels = prepare(sketch_png(), "sketch").pixels[None]
    with Embedder(workplace.bundle, engine="onnxruntime", threads=threads) as embedder:
        expected = embedder.embed_images(pixels, "sketch")
        engine = _SharedEngine(lambda: embedder.engine, asked.append)
        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(lambda _: engine.run(pixels, "sketch"), range(16)))
        engine.close(is_idle=True)
    assert np.allclose(found, expected, atol=1e-5)
    assert len(asked) == tries


def scope(**headers: str) -> Scope:
    named = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
    return {"type": "http", "headers": named}


def sender(chunks: Iterable[bytes], *, ends: bool = True) -> tuple[Receive, list[int]]:
    """Return an ASGI `receive` that gives these chunks, and a list of the sizes it has given."""
    waiting, taken = list(chunks), list[int]()

    async def receive() -> Message:
        if not waiting:
            if ends:
                return {"type": "http.disconnect"}
            await asyncio.sleep(3600)
        chunk = waiting.pop(0)
        taken.append(len(chunk))
        return {"type": "http.request", "body": chunk, "more_body": bool(waiting) or not ends}

    return receive, taken


async def read(reader: BodyReader, receive: Receive, asked: Scope | None = None) -> bytes:
    async with reader.read(asked or scope(), receive) as body:
        assert reader.held_bytes >= len(body)
        return body


def refused(reader: BodyReader, receive: Receive, asked: Scope | None = None) -> tuple[int, str]:
    with pytest.raises(Refused) as caught:
        asyncio.run(read(reader, receive, asked))
    refusal = caught.value.refusal
    assert refusal.closes
    return refusal.status, refusal.code


def test_a_body_of_many_chunks_is_complete_and_its_budget_is_released() -> None:
    reader = BodyReader(max_bytes=1000)
    receive, _ = sender([b"ab", b"", b"c" * 998])
    assert asyncio.run(read(reader, receive)) == b"ab" + b"c" * 998
    assert reader.held_bytes == 0
    empty, _ = sender([b""])
    assert asyncio.run(read(reader, empty)) == b""


def test_a_body_is_in_memory_once() -> None:
    size_bytes = 4 << 20

    async def held_bytes() -> int:
        receive, _ = sender(bytes(1 << 16) for _ in range(size_bytes >> 16))
        tracemalloc.start()
        try:
            async with BodyReader().read(scope(), receive):
                return tracemalloc.get_traced_memory()[0]
        finally:
            tracemalloc.stop()

    assert size_bytes <= asyncio.run(held_bytes()) < 1.2 * size_bytes


def test_an_endless_body_is_refused_at_the_limit() -> None:
    reader = BodyReader(max_bytes=1000)
    receive, taken = sender([b"x" * 300] * 100)
    assert refused(reader, receive) == (413, "body_too_large")
    assert taken == [300] * 4
    assert reader.held_bytes == 0


def test_a_body_with_too_large_a_content_length_is_not_read() -> None:
    receive, taken = sender([b"x"])
    asked = scope(content_length="1001")
    assert refused(BodyReader(max_bytes=1000), receive, asked) == (413, "body_too_large")
    assert not taken
    short, _ = sender([b"x"])
    promised = scope(content_length="1000")
    assert asyncio.run(read(BodyReader(max_bytes=1000), short, promised)) == b"x"


def test_a_slow_sender_is_refused_even_if_it_keeps_sending() -> None:
    async def drip() -> Message:
        await asyncio.sleep(0.01)
        return {"type": "http.request", "body": b"x", "more_body": True}

    reader = BodyReader(timeout_s=0.1)
    assert refused(reader, drip) == (408, "too_slow")
    assert reader.held_bytes == 0


def test_time_spent_in_the_server_does_not_count_against_the_sender() -> None:
    async def slow_block() -> None:
        receive, _ = sender([b"x"])
        async with BodyReader(timeout_s=0.05).read(scope(), receive):
            await asyncio.sleep(0.1)

    asyncio.run(slow_block())


def test_a_client_that_disconnects_leaves_nothing_behind() -> None:
    reader = BodyReader()

    async def receive() -> Message:
        return {"type": "http.disconnect"}

    with pytest.raises(ClientDisconnected):
        asyncio.run(read(reader, receive))
    assert reader.held_bytes == 0


def test_all_bodies_share_a_budget_of_received_bytes() -> None:
    reader = BodyReader(max_bytes=1000, max_held_bytes=1500)

    async def crowd() -> None:
        held, _ = sender([b"x" * 1000])
        idle, _ = sender([], ends=False)
        waiting = asyncio.create_task(read(reader, idle, scope(content_length="1000")))
        await asyncio.sleep(0)
        async with reader.read(scope(), held):
            late, _ = sender([b"y" * 501])
            with pytest.raises(Refused) as caught:
                await read(reader, late)
            assert (caught.value.refusal.status, caught.value.refusal.code) == (503, "busy")
            assert caught.value.refusal.retry_after_s
            small, _ = sender([b"z" * 500])
            assert await read(reader, small) == b"z" * 500
        late, _ = sender([b"y" * 501])
        assert len(await read(reader, late)) == 501
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting

    asyncio.run(crowd())
    assert reader.held_bytes == 0
