"""The order in which a fake GPU does what it is asked for, and whether that order is certain.

Work is only queued when it is asked for, and done as late as possible: when the host waits for it,
and then no more of it than the order of streams and events demands. So a forgotten wait gives wrong
numbers. Every piece of work also carries a vector clock, and two pieces that touch the same memory
must be ordered by it; if they are not, that is an assertion, whatever order they happen to run in.
Beside the real order there is a modelled time, in which copies and runs take as long as on a GPU.
"""

from __future__ import annotations

from tests.fakes.gpu_work import Done, Span, Stream, Task, Work


class Order:
    """All work of all streams, and how much of it the host has waited for.

    Attributes:
        history: copies and runs, in the order in which they were asked for.
    """

    def __init__(self) -> None:
        self.history: list[Done] = []
        self._accesses: list[tuple[Work, Span, bool]] = []
        self._host_clock: dict[int, int] = {}
        self._host_us = 0.0

    def add(self, task: Task, stream: Stream, after: Work | None) -> Work:
        """Queue a task behind its stream's other work and behind `after`."""
        number = stream.clock.get(stream.handle, 0) + 1
        clock = _merged(self._host_clock, stream.clock, {} if after is None else after.clock)
        clock[stream.handle] = number
        start = max(self._host_us, stream.free_us, 0.0 if after is None else after.end_us)
        work = Work(task, stream, number, clock, start, start + task.duration_us, after)
        self._check_races(work)
        stream.clock, stream.free_us = clock, work.end_us
        stream.pending.append(work)
        if task.label not in ("mark", "wait"):
            done = Done(task.label, stream.handle, task.images, task.size, start, work.end_us)
            self.history.append(done)
        return work

    def wait(self, work: Work) -> None:
        """Do a piece of work and all that it needs, for a host that waits for it."""
        _do(work)
        self._host_clock = _merged(self._host_clock, work.clock)
        self._host_us = max(self._host_us, work.end_us)
        self._accesses = [access for access in self._accesses if not self._host_has_seen(access[0])]

    def user_of(self, span: Span) -> str | None:
        """Return what may be using memory now, as far as the host knows."""
        return next(
            (
                work.task.label
                for work, there, _ in self._accesses
                if there.overlaps(span) and not self._host_has_seen(work)
            ),
            None,
        )

    def _host_has_seen(self, work: Work) -> bool:
        return self._host_clock.get(work.stream.handle, 0) >= work.number

    def _check_races(self, work: Work) -> None:
        spans = [(span, False) for span in work.task.reads]
        spans += [(span, True) for span in work.task.writes]
        for span, is_write in spans:
            for other, there, was_write in self._accesses:
                in_order = work.clock.get(other.stream.handle, 0) >= other.number
                harmless = in_order or not (is_write or was_write) or not span.overlaps(there)
                assert harmless, (
                    f"{work.task.label!r} may run at the same time as {other.task.label!r}, "
                    "and both touch the same memory"
                )
        self._accesses += [(work, span, is_write) for span, is_write in spans]


def _do(work: Work) -> None:
    """Do a piece of work, after all that stands before it in its stream."""
    while not work.is_done:
        first = work.stream.pending[0]
        if first.after is not None:
            _do(first.after)
        first.task.action()
        first.is_done = True
        work.stream.pending.popleft()


def _merged(*clocks: dict[int, int]) -> dict[int, int]:
    merged: dict[int, int] = {}
    for clock in clocks:
        for handle, number in clock.items():
            merged[handle] = max(merged.get(handle, 0), number)
    return merged
