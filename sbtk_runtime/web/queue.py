"""A bounded work queue: a few threads do the jobs, some jobs may wait, the others are refused."""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from sbtk_runtime.errors import SbtkError

Item = TypeVar("Item")
Result = TypeVar("Result")

#: A client has given up by then.
STUCK_AFTER_S = 10.0

_CLOSE_TIMEOUT_S = 10.0


class Busy(SbtkError):
    """The queue is full; the client should try again later."""


@dataclass(frozen=True, eq=False)
class Batch(Generic[Item, Result]):
    """Work that is done for several items at once; see `WorkQueue.submit_to`.

    Attributes:
        run: returns one result for each item, in order. An exception in place of a result is
            raised for that item alone.
        max_items: the most items of one call of `run`.
    """

    run: Callable[[Sequence[Item]], Sequence[Result | Exception]]
    max_items: int


@dataclass(frozen=True, eq=False)
class _Job:
    batch: Batch[Any, Any]
    item: Any
    future: Future[Any]


class WorkQueue:
    """Threads that do jobs in the order in which they were submitted.

    Args:
        name: of the threads.
        workers: the number of threads.
        waiting: the most jobs that wait. A job that is cancelled leaves the queue at once, and
            releases what it holds, such as the image of a query.
        stuck_after_s: the queue is stuck if all of its threads are busy with one job for longer.

    Attributes:
        name: as given.
    """

    def __init__(
        self, name: str, *, workers: int, waiting: int, stuck_after_s: float = STUCK_AFTER_S
    ) -> None:
        self.name = name
        self._waiting = waiting
        self._stuck_after_s = stuck_after_s
        # When each busy thread began its job.
        self._started: dict[int, float] = {}
        self._jobs: deque[_Job] = deque()
        self._lock = threading.Lock()
        # Of the threads that wait, the last to have worked comes last: it is woken first, since
        # what it needs is still in the processor's caches.
        self._idle: list[threading.Condition] = []
        self._is_closed = False
        self._threads = [
            threading.Thread(target=self._work, name=f"{name}-{number}", daemon=True)
            for number in range(workers)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, work: Callable[[], Result]) -> Future[Result]:
        """Return the future result of `work`, which is not called if the future is cancelled.

        Raises:
            Busy: too many jobs wait, or the queue is closed.
        """
        return self.submit_to(_SINGLE, work)

    def submit_to(self, batch: Batch[Item, Result], item: Item) -> Future[Result]:
        """Return the future result of `batch` for `item`.

        A thread takes the oldest job and, if it belongs to a batch, its share of the items that
        wait for the same batch: idle threads divide them. If a call with several items fails, each
        is tried again on its own.

        Raises:
            Busy: too many jobs wait, or the queue is closed.
        """
        job = _Job(batch, item, Future())
        with self._lock:
            if self._is_closed or len(self._jobs) >= self._waiting:
                raise Busy("the server is overloaded", "", "try again in a second")
            self._jobs.append(job)
            if self._idle:
                self._idle.pop().notify()
        job.future.add_done_callback(self._remove_cancelled)
        return job.future

    @property
    def length(self) -> int:
        """The number of jobs that wait."""
        return len(self._jobs)

    @property
    def stuck_s(self) -> float:
        """Seconds since a thread last started a job; 0 if the queue is not stuck.

        The queue is stuck while every thread has been busy with its job for `stuck_after_s`.
        """
        with self._lock:
            if len(self._started) < len(self._threads):
                return 0.0
            busy_s = time.monotonic() - max(self._started.values())
        return busy_s if busy_s > self._stuck_after_s else 0.0

    def close(self, timeout_s: float = _CLOSE_TIMEOUT_S) -> bool:
        """Cancel the jobs that wait, and return whether the running jobs ended in time."""
        with self._lock:
            self._is_closed = True
            jobs, self._jobs = self._jobs, deque()
            while self._idle:
                self._idle.pop().notify()
        for job in jobs:
            job.future.cancel()
        end = time.monotonic() + timeout_s
        for thread in self._threads:
            thread.join(max(0.0, end - time.monotonic()))
        return not any(thread.is_alive() for thread in self._threads)

    def _remove_cancelled(self, future: Future[Any]) -> None:
        if future.cancelled():
            with self._lock:
                self._jobs = deque(job for job in self._jobs if job.future is not future)

    def _work(self) -> None:
        wake = threading.Condition(self._lock)
        while True:
            with self._lock:
                while not self._jobs:
                    if self._is_closed:
                        return
                    self._idle.append(wake)
                    wake.wait()
                jobs = self._take()
                self._started[threading.get_ident()] = time.monotonic()
            try:
                _run([job for job in jobs if job.future.set_running_or_notify_cancel()])
            finally:
                with self._lock:
                    del self._started[threading.get_ident()]
            # A thread that waits must not keep an image in memory, nor a result's open file.
            del jobs

    def _take(self) -> list[_Job]:
        """Remove the oldest job, and those that can be done with it, from the queue."""
        batch = self._jobs[0].batch
        if batch.max_items == 1:
            return [self._jobs.popleft()]
        idle = len(self._threads) - len(self._started)
        share = math.ceil(sum(job.batch is batch for job in self._jobs) / idle)
        most = min(share, batch.max_items)
        taken: list[_Job] = []
        left: deque[_Job] = deque()
        for job in self._jobs:
            is_taken = job.batch is batch and len(taken) < most
            (taken if is_taken else left).append(job)
        self._jobs = left
        return taken


def _run(jobs: list[_Job]) -> None:
    """Run jobs of one batch, and set the results of their futures."""
    if not jobs:
        return
    try:
        results = jobs[0].batch.run([job.item for job in jobs])
    except BaseException as problem:
        if len(jobs) == 1:
            jobs[0].future.set_exception(problem)
            return
        for job in jobs:
            _run([job])
        return
    for job, result in zip(jobs, results, strict=True):
        if isinstance(result, Exception):
            job.future.set_exception(result)
        else:
            job.future.set_result(result)


def _call(work: Sequence[Callable[[], Any]]) -> list[Any]:
    return [work[0]()]


_SINGLE: Batch[Callable[[], Any], Any] = Batch(_call, 1)
