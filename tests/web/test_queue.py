"""A queue runs jobs in order, refuses what is too much, and drops cancelled jobs."""

from __future__ import annotations

import asyncio
import threading
import time
import weakref
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from typing import Any

import pytest
from starlette.requests import Request

from sbtk_runtime.web.queue import Batch, Busy, WorkQueue
from sbtk_runtime.web.uploads import ClientDisconnected, TimedOut, run_until_disconnect


class Gate:
    """A job that has begun, and ends when it is let."""

    def __init__(self) -> None:
        self.has_begun = threading.Event()
        self.may_end = threading.Event()

    def __call__(self) -> str:
        self.has_begun.set()
        assert self.may_end.wait(20)
        return "passed"


@pytest.fixture
def queue() -> Iterator[WorkQueue]:
    opened = WorkQueue("test", workers=1, waiting=3)
    yield opened
    opened.close()


@pytest.fixture
def gate(queue: WorkQueue) -> Iterator[Gate]:
    """Occupy the only thread."""
    made = Gate()
    queue.submit(made)
    assert made.has_begun.wait(20)
    yield made
    made.may_end.set()


def test_jobs_run_in_order_and_return_results(queue: WorkQueue) -> None:
    done: list[int] = []

    def job(number: int) -> int:
        done.append(number)
        return number * number

    for number in range(20):
        assert queue.submit(lambda number=number: job(number)).result(20) == number**2  # type: ignore[misc]
    assert done == list(range(20))


def test_the_error_of_a_job_goes_to_its_caller_and_the_next_job_runs(queue: WorkQueue) -> None:
    def fails() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        queue.submit(fails).result(20)
    assert queue.submit(lambda: "still here").result(20) == "still here"


def test_waiting_items_run_as_a_batch_and_other_jobs_keep_their_place() -> None:
    calls: list[list[int]] = []

    def run(items: Sequence[int]) -> list[int | Exception]:
        calls.append(list(items))
        return [ValueError("three") if item == 3 else item * item for item in items]

    squares, others = Batch(run, 2), Batch(run, 4)
    queue = WorkQueue("batches", workers=1, waiting=8)
    gate = Gate()
    queue.submit(gate)
    assert gate.has_begun.wait(20)
    jobs = [queue.submit_to(squares, number) for number in range(3)]
    jobs.append(queue.submit_to(others, 9))
    jobs += [queue.submit_to(squares, number) for number in (3, 4, 5)]
    assert jobs[5].cancel()
    assert queue.length == 6
    gate.may_end.set()
    assert [jobs[number].result(20) for number in (0, 1, 2, 3, 6)] == [0, 1, 4, 81, 25]
    with pytest.raises(ValueError, match="three"):
        jobs[4].result(20)
    assert calls == [[0, 1], [2, 3], [9], [5]]
    assert queue.close()


def test_idle_threads_share_what_waits_for_a_batch() -> None:
    both_run = threading.Barrier(2)

    def run(items: Sequence[int]) -> list[int | Exception]:
        # Only ends if the other thread has a part of the items, too.
        both_run.wait(20)
        return [item + 1 for item in items]

    queue = WorkQueue("shared", workers=2, waiting=8)
    for _ in range(50):
        batch = Batch(run, 8)
        jobs = [queue.submit_to(batch, number) for number in range(2)]
        assert [job.result(20) for job in jobs] == [1, 2]
    assert queue.close()


def test_an_item_that_fails_a_whole_batch_fails_alone(queue: WorkQueue, gate: Gate) -> None:
    def run(items: Sequence[int]) -> list[float | Exception]:
        return [1 / item for item in items]

    inverses = Batch(run, 3)
    jobs = [queue.submit_to(inverses, number) for number in (1, 0, 4)]
    gate.may_end.set()
    with pytest.raises(ZeroDivisionError):
        jobs[1].result(20)
    assert [jobs[0].result(20), jobs[2].result(20)] == [1.0, 0.25]


def test_the_number_of_waiting_jobs_is_limited(queue: WorkQueue, gate: Gate) -> None:
    waiting = [queue.submit(lambda: "done") for _ in range(3)]
    assert queue.length == 3
    with pytest.raises(Busy):
        queue.submit(lambda: "too many")
    gate.may_end.set()
    assert [job.result(20) for job in waiting] == ["done"] * 3
    assert queue.submit(lambda: "room again").result(20) == "room again"


def test_a_cancelled_job_never_starts_and_frees_its_place(queue: WorkQueue, gate: Gate) -> None:
    done: list[int] = []
    jobs: list[Future[None]] = [
        queue.submit(lambda number=number: done.append(number))  # type: ignore[misc]
        for number in range(3)
    ]
    assert jobs[1].cancel()
    assert queue.length == 2
    late = queue.submit(lambda: done.append(3))
    gate.may_end.set()
    late.result(20)
    assert done == [0, 2, 3]


class Upload:
    """Something large that a job holds."""

    def looked_at(self) -> Upload:
        """Return itself, as an answer that is large too."""
        return self


def test_a_job_is_released_when_cancelled_and_when_done(queue: WorkQueue, gate: Gate) -> None:
    unwanted, looked_at = Upload(), Upload()
    held = [weakref.ref(unwanted), weakref.ref(looked_at)]
    job = queue.submit(unwanted.looked_at)
    del unwanted
    done = queue.submit(looked_at.looked_at)
    del looked_at
    assert held[0]() is not None
    assert job.cancel()
    del job
    assert held[0]() is None, "while the queue is still busy"
    gate.may_end.set()
    assert done.result(20) is held[1]()
    del done
    end = time.monotonic() + 20
    while held[1]() is not None:
        assert time.monotonic() < end, "the thread waits, and keeps it"
        time.sleep(0.01)


def test_closing_returns_whether_the_running_job_has_ended(queue: WorkQueue, gate: Gate) -> None:
    assert not queue.close(timeout_s=0.05)
    gate.may_end.set()
    assert queue.close()


def test_several_threads_run_jobs_at_once() -> None:
    queue = WorkQueue("test", workers=2, waiting=1)
    gates = [Gate(), Gate()]
    jobs = [queue.submit(gates[0])]
    assert gates[0].has_begun.wait(20)
    jobs.append(queue.submit(gates[1]))
    assert gates[1].has_begun.wait(20)
    for gate in gates:
        gate.may_end.set()
    assert [job.result(20) for job in jobs] == ["passed", "passed"]
    queue.close()


def test_closing_cancels_waiting_jobs_and_waits_for_running_ones(
    queue: WorkQueue, gate: Gate
) -> None:
    waiting = queue.submit(lambda: "never")
    threading.Timer(0.2, gate.may_end.set).start()
    assert queue.close()
    assert gate.may_end.is_set()
    assert waiting.cancelled()
    with pytest.raises(Busy):
        queue.submit(lambda: "too late")


def request_of(messages: asyncio.Queue[dict[str, Any]]) -> Request:
    """Return a request whose client says what is put into the queue."""
    return Request({"type": "http"}, messages.get)


def test_a_disconnected_client_cancels_its_job(queue: WorkQueue, gate: Gate) -> None:
    done: list[str] = []

    async def asked() -> None:
        messages: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        waiting = asyncio.create_task(
            run_until_disconnect(request_of(messages), queue.submit(lambda: done.append("work")))
        )
        await asyncio.sleep(0.05)
        assert queue.length == 1
        messages.put_nowait({"type": "http.disconnect"})
        with pytest.raises(ClientDisconnected):
            await waiting

    asyncio.run(asked())
    gate.may_end.set()
    assert queue.submit(lambda: "next").result(20) == "next"
    assert done == []


def test_an_answer_that_takes_too_long_times_out(queue: WorkQueue, gate: Gate) -> None:
    async def asked() -> None:
        with pytest.raises(TimedOut):
            job = queue.submit(lambda: "late")
            await run_until_disconnect(request_of(asyncio.Queue()), job, timeout_s=0.05)

    asyncio.run(asked())


def test_results_and_errors_are_passed_on(queue: WorkQueue) -> None:
    def fails() -> None:
        raise ZeroDivisionError

    async def asked() -> str:
        with pytest.raises(ZeroDivisionError):
            await run_until_disconnect(request_of(asyncio.Queue()), queue.submit(fails))
        return await run_until_disconnect(
            request_of(asyncio.Queue()), queue.submit(lambda: "an answer")
        )

    assert asyncio.run(asked()) == "an answer"


def test_a_queue_is_stuck_while_no_job_ends_and_recovers() -> None:
    queue = WorkQueue("test", workers=2, waiting=3, stuck_after_s=0.05)
    gates = [Gate(), Gate()]
    try:
        assert queue.stuck_s == 0
        first = queue.submit(gates[0])
        assert gates[0].has_begun.wait(20)
        time.sleep(0.1)
        assert queue.stuck_s == 0  # the other thread is free
        queue.submit(gates[1])
        assert gates[1].has_begun.wait(20)
        assert queue.stuck_s == 0
        while not (stuck_s := queue.stuck_s):
            time.sleep(0.01)
        time.sleep(0.05)
        assert queue.stuck_s > stuck_s > 0.05
        gates[0].may_end.set()
        assert first.result(20) == "passed"
        while queue.stuck_s:
            time.sleep(0.01)
    finally:
        for gate in gates:
            gate.may_end.set()
        queue.close()
