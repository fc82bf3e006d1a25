"""Waiting for a job as long as somebody wants its answer."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, TypeVar

from starlette.requests import Request

from sbtk_runtime.errors import SbtkError
from sbtk_runtime.web.body import ClientGone
from sbtk_runtime.web.work_queue import WorkQueue

Answer = TypeVar("Answer")

TIMEOUT_S = 10.0


class TimedOut(SbtkError):
    """An answer took too long."""


async def answer_of(
    request: Request, queue: WorkQueue, work: Callable[[], Answer], timeout_s: float = TIMEOUT_S
) -> Answer:
    """Returns what `work` answers on the queue. It is not begun when nobody waits any more.

    The request's body must have been read.

    Raises:
        Busy: the queue is full.
        ClientGone: the client closed the connection.
        TimedOut: there was no answer in time.
    """
    job = queue.submit(work)
    answer = asyncio.wrap_future(job)
    gone = asyncio.create_task(_until_gone(request))
    try:
        ends: set[asyncio.Future[Any]] = {answer, gone}
        await asyncio.wait(ends, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        if answer.done():
            return answer.result()
        if gone.done():
            raise ClientGone
        raise TimedOut(
            f"there was no answer within {timeout_s:g} seconds", "", "try again in a moment"
        )
    finally:
        gone.cancel()
        answer.cancel()


async def _until_gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
