"""A small bounded queue: few threads do the work, some jobs may wait, the rest are refused."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

from sbtk_runtime.errors import SbtkError

Answer = TypeVar("Answer")

_LAST_JOBS_S = 10.0


class Busy(SbtkError):
    """The queue is full; it is better to come back than to wait."""


class WorkQueue:
    """Threads that do jobs in the order of their coming.

    Args:
        name: of the threads.
        workers: jobs that are done at once.
        waiting: jobs that may wait. One that its owner cancels is let go at once, and with it what
            it holds, as the picture of a query.
    """

    def __init__(self, name: str, *, workers: int, waiting: int) -> None:
        self._waiting = waiting
        self._jobs: deque[tuple[Callable[[], Any], Future[Any]]] = deque()
        self._changed = threading.Condition()
        self._is_closed = False
        self._threads = [
            threading.Thread(target=self._work, name=f"{name}-{number}", daemon=True)
            for number in range(workers)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, work: Callable[[], Answer]) -> Future[Answer]:
        """Returns what `work` will have answered; cancelled while it waits, it is never begun.

        Raises:
            Busy: too many jobs wait, or the queue is closed.
        """
        future: Future[Answer] = Future()
        with self._changed:
            if self._is_closed or len(self._jobs) >= self._waiting:
                raise Busy("more is asked than this machine answers", "", "try again in a second")
            self._jobs.append((work, future))
            self._changed.notify()
        future.add_done_callback(self._forget_cancelled)
        return future

    @property
    def length(self) -> int:
        """The number of jobs that wait."""
        return len(self._jobs)

    def close(self, timeout_s: float = _LAST_JOBS_S) -> bool:
        """Cancels the jobs that wait, and returns whether those that are done ended in time."""
        with self._changed:
            self._is_closed = True
            jobs, self._jobs = self._jobs, deque()
            self._changed.notify_all()
        for _, future in jobs:
            future.cancel()
        end = time.monotonic() + timeout_s
        for thread in self._threads:
            thread.join(max(0.0, end - time.monotonic()))
        return not any(thread.is_alive() for thread in self._threads)

    def _forget_cancelled(self, future: Future[Any]) -> None:
        if future.cancelled():
            with self._changed:
                self._jobs = deque(job for job in self._jobs if job[1] is not future)

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._jobs or self._is_closed)
                if not self._jobs:
                    return
                work, future = self._jobs.popleft()
            if not future.set_running_or_notify_cancel():
                continue
            try:
                answer = work()
            except BaseException as problem:
                future.set_exception(problem)
            else:
                future.set_result(answer)
                del answer
            # A thread that waits must not keep the last picture alive, nor an answer's open file.
            del work, future
