"""Bodies are counted while they stream, against a clock, within a budget for all."""

from __future__ import annotations

import asyncio
import tracemalloc
from collections.abc import Iterable

import pytest
from starlette.types import Message, Receive, Scope

from sbtk_runtime.web.body import BodyReader, ClientGone
from sbtk_runtime.web.refusals import Refused


def scope(**headers: str) -> Scope:
    named = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
    return {"type": "http", "headers": named}


def sender(chunks: Iterable[bytes], *, ends: bool = True) -> tuple[Receive, list[int]]:
    """Returns an ASGI `receive` that gives these chunks, and a list of the sizes it has given."""
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


def test_a_body_of_many_chunks_comes_whole_and_its_room_is_free_again() -> None:
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


def test_an_endless_body_is_refused_at_the_cap() -> None:
    reader = BodyReader(max_bytes=1000)
    receive, taken = sender([b"x" * 300] * 100)
    assert refused(reader, receive) == (413, "body_too_large")
    assert taken == [300] * 4
    assert reader.held_bytes == 0


def test_a_body_that_says_it_is_too_large_is_not_read_at_all() -> None:
    receive, taken = sender([b"x"])
    asked = scope(content_length="1001")
    assert refused(BodyReader(max_bytes=1000), receive, asked) == (413, "body_too_large")
    assert not taken
    short, _ = sender([b"x"])
    promised = scope(content_length="1000")
    assert asyncio.run(read(BodyReader(max_bytes=1000), short, promised)) == b"x"


def test_a_slow_sender_is_refused_however_steadily_it_sends() -> None:
    async def drip() -> Message:
        await asyncio.sleep(0.01)
        return {"type": "http.request", "body": b"x", "more_body": True}

    reader = BodyReader(timeout_s=0.1)
    assert refused(reader, drip) == (408, "too_slow")
    assert reader.held_bytes == 0


def test_what_a_block_takes_long_for_is_not_the_senders_fault() -> None:
    async def slow_block() -> None:
        receive, _ = sender([b"x"])
        async with BodyReader(timeout_s=0.05).read(scope(), receive):
            await asyncio.sleep(0.1)

    asyncio.run(slow_block())


def test_a_client_that_goes_away_leaves_nothing_behind() -> None:
    reader = BodyReader()

    async def receive() -> Message:
        return {"type": "http.disconnect"}

    with pytest.raises(ClientGone):
        asyncio.run(read(reader, receive))
    assert reader.held_bytes == 0


def test_all_bodies_together_have_a_budget_of_what_has_really_come() -> None:
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
