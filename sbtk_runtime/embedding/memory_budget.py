"""A bound on the memory that threads take at the same time."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import threading
from collections.abc import Iterator

_M_MMAP_THRESHOLD = -3
_LARGE_BYTES = 2 << 20


@functools.cache
def give_back_what_is_freed() -> None:
    """Makes the C library return large blocks to the system as soon as they are freed.

    glibc otherwise raises its own threshold to the largest block that it has seen, and each
    thread keeps as much as the largest picture that it ever decoded: eight threads on pictures of
    25 megapixels were seen to hold 1.3 GB, of which 0.3 were in use. Other C libraries are left
    as they are.
    """
    try:
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, _LARGE_BYTES)
    except (AttributeError, OSError, TypeError):
        return


class MemoryBudget:
    """Lets threads take memory up to a limit together; what exceeds it alone must be alone.

    Args:
        limit_bytes: the sum that may be taken at once.
    """

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._taken_bytes = 0
        self._takers = 0
        self._freed = threading.Condition()

    @contextlib.contextmanager
    def taking(self, size_bytes: int) -> Iterator[None]:
        """Waits until `size_bytes` fit, or nobody else has taken any, and holds them."""
        with self._freed:
            self._freed.wait_for(lambda: self._fits(size_bytes))
            self._taken_bytes += size_bytes
            self._takers += 1
        try:
            yield
        finally:
            with self._freed:
                self._taken_bytes -= size_bytes
                self._takers -= 1
                self._freed.notify_all()

    def _fits(self, size_bytes: int) -> bool:
        return self._takers == 0 or self._taken_bytes + size_bytes <= self._limit_bytes
