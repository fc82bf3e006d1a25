"""Ctrl-C, SIGTERM and SIGHUP, answered at a place where nothing is lost."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from types import FrameType


class Terminated(KeyboardInterrupt):
    """SIGTERM or SIGHUP: the end of the work as by Ctrl-C, but with another exit code."""


def ending_signals() -> tuple[signal.Signals, ...]:
    """Signals that end the work: SIGINT, SIGTERM, and SIGHUP unless `nohup` made it ignored."""
    ignores_hangup = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    asked = (signal.SIGINT, signal.SIGTERM)
    return asked if ignores_hangup else (*asked, signal.SIGHUP)


def ending_of(number: int) -> KeyboardInterrupt:
    """The exception that stands for a signal, and so for its exit code: 130 or 143."""
    return KeyboardInterrupt() if number == signal.SIGINT else Terminated()


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
        ending = ending_of(number)
        if self._wanted is not None or not self._is_held_back:
            raise ending
        self._wanted = ending


@contextlib.contextmanager
def stops_between_photos() -> Iterator[Stopping]:
    """Yields what holds these signals back until it is told that a photo is done."""
    stopping = Stopping()
    before = {number: signal.getsignal(number) for number in ending_signals()}
    try:
        for number in before:
            signal.signal(number, stopping.want)
        yield stopping
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
