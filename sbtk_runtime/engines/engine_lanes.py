"""An engine kept busy from several threads, with an account of how busy it was."""

from __future__ import annotations

import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Self

from sbtk_runtime.engines.engine import Embeddings, Engine, Images
from sbtk_runtime.preprocess import Kind


class EngineLanes:
    """As many threads as the engine has lanes; each runs one batch after the other.

    Attributes:
        busy_s: seconds that runs took, summed over lanes.
        core_s: seconds of work that they cost the cores. Where a lane has several threads, or a
            library threads of its own, all of them count for as long as the run takes.
        waiting_s: seconds in which no lane had anything to do.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._threads = ThreadPoolExecutor(engine.info.lanes, thread_name_prefix="sbtk-engine")
        self._lock = threading.Lock()
        self._running = 0
        self._idle_since = time.perf_counter()
        self.busy_s = self.core_s = self.waiting_s = 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._threads.shutdown(wait=True, cancel_futures=True)

    def submit(self, images: Images, kind: Kind) -> Future[Embeddings]:
        """Returns the future of the embeddings `(N, D)` of `images (N, 224, 224, 3) uint8`."""
        return self._threads.submit(self._run, images, kind)

    def _run(self, images: Images, kind: Kind) -> Embeddings:
        start, start_core = time.perf_counter(), time.thread_time()
        with self._lock:
            if self._running == 0:
                self.waiting_s += start - self._idle_since
            self._running += 1
        try:
            return self._engine.run(images, kind)
        finally:
            end, end_core = time.perf_counter(), time.thread_time()
            info = self._engine.info
            threads = info.threads // info.lanes
            with self._lock:
                self._running -= 1
                self._idle_since = end
                self.busy_s += end - start
                # Elsewhere a library's own threads do the work, and their clocks are not ours.
                is_counted = threads == 1 and info.is_in_calling_thread
                self.core_s += end_core - start_core if is_counted else threads * (end - start)
