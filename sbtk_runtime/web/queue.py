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

#: When nobody waits any more for what a queue is at.
STUCK_AFTER_S = 10.0

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
        stuck_after_s: a queue all of whose threads have been at one job for longer is stuck.

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
        self._begun: dict[int, float] = {}
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

    @property
    def stuck_s(self) -> float:
        """For how many seconds no thread has ended or begun a job; 0 while the queue is not stuck.

        It is so while every thread has been at its present job for `stuck_after_s`, and over when
        one of them ends.
        """
        with self._changed:
            if len(self._begun) < len(self._threads):
                return 0.0
            busy_s = time.monotonic() - max(self._begun.values())
        return busy_s if busy_s > self._stuck_after_s else 0.0

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
                self._begun[threading.get_ident()] = time.monotonic()
            try:
                self._do(work, future)
            finally:
                with self._changed:
                    del self._begun[threading.get_ident()]
            # A thread that waits must not keep the last picture alive, nor an answer's open file.
            del work, future

    @staticmethod
    def _do(work: Callable[[], Any], future: Future[Any]) -> None:
        if future.set_running_or_notify_cancel():
            try:
                answer = work()
            except BaseException as problem:
                future.set_exception(problem)
            else:
                future.set_result(answer)
