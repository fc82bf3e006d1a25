"""Ctrl-C and SIGTERM, answered at a place where nothing is lost."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from types import FrameType


class Terminated(KeyboardInterrupt):
    """SIGTERM: the end of the work as by Ctrl-C, but with another exit code."""


class Stopping:
    """Holds back the wish to end until a photo is done; see `stops_between_photos`."""

    def __init__(self) -> None:
        self._is_held_back = False
        self._wanted: KeyboardInterrupt | None = None

    def between_photos(self, *, more_to_come: bool) -> None:
        """Ends the work here if that is wanted; else says whether there will be another such call.

        Raises:
            KeyboardInterrupt: a signal came since the last call.
        """
        self._is_held_back = more_to_come
        if self._wanted is not None:
            raise self._wanted

    def want(self, number: int, _frame: FrameType | None) -> None:
        """Notes a signal; raises at once where no photo is under way, and at the second signal."""
        ending = Terminated() if number == signal.SIGTERM else KeyboardInterrupt()
        if self._wanted is not None or not self._is_held_back:
            raise ending
        self._wanted = ending


@contextlib.contextmanager
def stops_between_photos() -> Iterator[Stopping]:
    """Yields what holds SIGINT and SIGTERM back until it is told that a photo is done."""
    stopping = Stopping()
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        for number in before:
            signal.signal(number, stopping.want)
        yield stopping
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
