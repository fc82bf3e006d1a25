"""A GPU made of host memory: streams, events, graphs and allocations, modelled strictly.

Work is only queued when it is asked for, and done as late as possible: when the host waits for it,
and then no more of it than the order of streams and events demands. So a forgotten wait gives wrong
numbers. Every piece of work also carries a vector clock, and two pieces that touch the same memory
must be ordered by it; if they are not, that is an assertion, whatever order they happen to run in.
Beside the real order there is a modelled time, in which copies and runs take as long as on a GPU.
"""

from __future__ import annotations

import ctypes
import threading
import weakref
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

#: What fresh and freed memory holds: NaN as float32.
POISON = 0xFF
ALIGNMENT = 256

Check = Callable[[], None]


class FakeGpus:
    """The GPUs of a machine and all that lives on them.

    Args:
        count: of GPUs.
        memory_bytes: of each.
    """

    def __init__(self, count: int = 1, memory_bytes: int = 1 << 30) -> None:
        self.count = count
        self.memory_bytes = memory_bytes
        self.was_counted = False
        self.order = Order()
        self.frees: Counter[str] = Counter()
        # Whatever else has memory and tells with `_held()` which.
        self.contexts: weakref.WeakSet[Any] = weakref.WeakSet()
        self._lock = threading.RLock()
        self._of_thread = threading.local()
        self._objects: dict[int, Stream | Event | Graph] = {}
        self._freed_handles: set[int] = set()
        self._allocations: dict[int, Allocation] = {}
        self._freed_addresses: set[int] = set()
        # Keeps freed memory, so that nothing new gets its address and late accesses meet poison.
        self._graveyard: list[Allocation] = []
        self._reserved: Counter[int] = Counter()
        self._next_handle = 0x5000

    # --- devices and threads -------------------------------------------------------------------

    def set_device(self, index: int) -> None:
        assert 0 <= index < self.count, f"there is no GPU {index}"
        self._of_thread.device = index

    def device(self) -> int:
        """Return the GPU of the calling thread, which must have chosen one."""
        assert self.was_counted, "the driver was not asked with cudaGetDeviceCount before"
        index = getattr(self._of_thread, "device", None)
        assert index is not None, "this thread did not call cudaSetDevice"
        return int(index)

    def device_or_first(self) -> int:
        """Return the GPU of the calling thread; the first when it chose none, as CUDA does."""
        return int(getattr(self._of_thread, "device", 0))

    # --- memory --------------------------------------------------------------------------------

    def free_bytes(self, device: int) -> int:
        used = sum(
            allocation.span.size
            for allocation in self._allocations.values()
            if allocation.device == device and allocation.kind == "device memory"
        )
        return self.memory_bytes - used - self._reserved[device]

    def allocate(self, size: int, kind: str) -> int | None:
        """Return the address of new memory, or `None` when there is no room for it."""
        device = self.device()
        with self._lock:
            self._forbid_in_capture("allocating")
            assert size > 0, "an allocation of no bytes"
            if kind == "device memory" and size > self.free_bytes(device):
                return None
            array = np.full(size + ALIGNMENT, POISON, dtype=np.uint8)
            address = -(-array.ctypes.data // ALIGNMENT) * ALIGNMENT
            self._allocations[address] = Allocation(Span(address, size), kind, device, array)
            return address

    def free(self, address: int, kind: str) -> None:
        device = self.device()
        with self._lock:
            self._forbid_in_capture("freeing")
            assert address not in self._freed_addresses, f"{kind} is freed twice"
            allocation = self._allocations.pop(address, None)
            assert allocation is not None, f"{address:#x} is no {kind}"
            assert allocation.kind == kind, f"{allocation.kind} is freed as {kind}"
            assert allocation.device == device, "freed from a thread of another GPU"
            user = self.order.user_of(allocation.span)
            assert user is None, f"{kind} is freed while {user!r} may use it"
            for holder in (*self._objects.values(), *self.contexts):
                held = any(span.overlaps(allocation.span) for span in _held_by(holder))
                assert not held, f"{kind} is freed before the {type(holder).__name__} that has it"
            allocation.array[:] = POISON
            self._graveyard.append(allocation)
            self._freed_addresses.add(address)
            self.frees[kind] += 1

    def require(self, span: Span, kind: str) -> None:
        """Assert that the span lies inside a live allocation of that kind."""
        for allocation in self._allocations.values():
            inside = allocation.span.address <= span.address and (
                span.address + span.size <= allocation.span.address + allocation.span.size
            )
            if inside:
                assert allocation.kind == kind, f"{allocation.kind} where {kind} is needed"
                return
        raise AssertionError(f"{span} is not, or no longer, {kind}")

    def reserve(self, device: int, size: int) -> bool:
        """Take memory that has no address, for a library's own use; say whether there is."""
        with self._lock:
            if size > self.free_bytes(device):
                return False
            self._reserved[device] += size
            return True

    def unreserve(self, device: int, size: int) -> None:
        with self._lock:
            self._reserved[device] -= size

    # --- streams, events and graphs ------------------------------------------------------------

    def new_stream(self) -> Stream:
        stream = Stream(self._new_handle(), self.device())
        self._objects[stream.handle] = stream
        return stream

    def new_event(self, is_timed: bool) -> Event:
        event = Event(self._new_handle(), self.device(), is_timed)
        self._objects[event.handle] = event
        return event

    def stream(self, handle: int) -> Stream:
        found = self._object(handle)
        assert isinstance(found, Stream), f"{found} is no stream"
        assert found.device == self.device(), "a stream is used from a thread of another GPU"
        return found

    def event(self, handle: int) -> Event:
        found = self._object(handle)
        assert isinstance(found, Event), f"{found} is no event"
        assert found.device == self.device(), "an event is used from a thread of another GPU"
        return found

    def graph(self, handle: int, is_executable: bool) -> Graph:
        found = self._object(handle)
        assert isinstance(found, Graph), f"{found} is no graph"
        assert found.is_executable == is_executable, "a graph and its executable are mixed up"
        return found

    def destroy(self, handle: int) -> None:
        with self._lock:
            assert handle not in self._freed_handles, "a stream, event or graph is destroyed twice"
            found = self._object(handle)
            if isinstance(found, Stream):
                assert found.capture is None, "a stream is destroyed while it captures"
                assert not found.pending, "a stream is destroyed before its work was waited for"
            del self._objects[handle]
            self._freed_handles.add(handle)
            self.frees[type(found).__name__] += 1

    def record(self, event: Event, stream: Stream) -> None:
        assert stream.capture is None, "an event is recorded into a graph"
        event.record = self.queue(stream, Task("mark", 0, 0, 0.0, lambda: None))

    def wait_for_event(self, stream: Stream, event: Event) -> None:
        assert stream.capture is None, "a capture waits for work outside of it"
        assert event.record is not None, "a stream waits for an event that was never recorded"
        self.queue(stream, Task("wait", 0, 0, 0.0, lambda: None), after=event.record)

    def queue(self, stream: Stream, task: Task, after: Work | None = None) -> Work | None:
        """Queue a task, or capture it when the stream does that."""
        with self._lock:
            for span in (*task.reads, *task.writes):
                kind = "device memory" if self._is_device_memory(span) else "pinned memory"
                self.require(span, kind)
            task.check()
            if stream.capture is not None:
                assert stream.capture.thread == threading.get_ident(), "captured by two threads"
                stream.capture.tasks.append(task)
                return None
            return self.order.add(task, stream, after)

    def wait(self, work: Work) -> None:
        """Let the host wait for a piece of work: it, and all that it needs, is done."""
        with self._lock:
            self._forbid_in_capture("waiting")
            self.order.wait(work)

    def wait_for_stream(self, stream: Stream) -> None:
        if stream.pending:
            self.wait(stream.pending[-1])

    def begin_capture(self, stream: Stream) -> None:
        assert stream.capture is None, "the stream captures already"
        stream.capture = Capture(threading.get_ident())

    def end_capture(self, stream: Stream) -> Graph | None:
        """Return the captured graph; `None` when the capture was made invalid."""
        capture = stream.capture
        assert capture is not None, "the stream does not capture"
        assert capture.thread == threading.get_ident(), "a capture is ended by another thread"
        stream.capture = None
        if capture.is_invalid:
            return None
        return self._new_graph(tuple(capture.tasks), is_executable=False)

    def instantiate(self, graph: Graph) -> Graph:
        return self._new_graph(graph.tasks, is_executable=True)

    def launch(self, graph: Graph, stream: Stream) -> None:
        assert graph.device == stream.device, "a graph is launched on another GPU"
        for task in graph.tasks:
            task.check()

        def replay() -> None:
            for task in graph.tasks:
                task.action()

        self.queue(
            stream,
            Task(
                "graph",
                sum(task.images for task in graph.tasks),
                sum(task.size for task in graph.tasks),
                sum(task.duration_us for task in graph.tasks),
                replay,
                tuple(span for task in graph.tasks for span in task.reads),
                tuple(span for task in graph.tasks for span in task.writes),
            ),
        )

    # --- accounting ----------------------------------------------------------------------------

    def alive(self) -> Counter[str]:
        """Return how many of what was made on the GPUs was not freed."""
        things: Sequence[str] = [
            *(type(thing).__name__ for thing in self._objects.values()),
            *(allocation.kind for allocation in self._allocations.values()),
        ]
        reserved = Counter({"bytes of a library": sum(self._reserved.values())})
        return +(Counter(things) + reserved)

    @property
    def history(self) -> list[Done]:
        """Return what was asked for, in this order."""
        return self.order.history

    def done(self, *labels: str) -> list[Done]:
        """Return what was asked for under these labels, in this order."""
        return [done for done in self.history if done.label in labels]

    # --- helpers -------------------------------------------------------------------------------

    def _new_handle(self) -> int:
        with self._lock:
            self._forbid_in_capture("creating something")
            self._next_handle += 0x10
            return self._next_handle

    def _new_graph(self, tasks: tuple[Task, ...], is_executable: bool) -> Graph:
        graph = Graph(self._new_handle(), self.device(), tasks, is_executable)
        self._objects[graph.handle] = graph
        return graph

    def _object(self, handle: int) -> Stream | Event | Graph:
        self.device()
        assert handle not in self._freed_handles, "a stream, event or graph is used after its end"
        assert handle in self._objects, f"{handle:#x} is no stream, event or graph"
        return self._objects[handle]

    def _is_device_memory(self, span: Span) -> bool:
        return any(
            allocation.kind == "device memory" and allocation.span.overlaps(span)
            for allocation in self._allocations.values()
        )

    def _forbid_in_capture(self, what: str) -> None:
        for thing in self._objects.values():
            if isinstance(thing, Stream) and thing.capture is not None:
                same_thread = thing.capture.thread == threading.get_ident()
                assert not same_thread, f"{what} while a stream captures"


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


@dataclass(frozen=True)
class Span:
    """A piece of memory."""

    address: int
    size: int

    def overlaps(self, other: Span) -> bool:
        return (
            self.address < other.address + other.size and other.address < self.address + self.size
        )

    def bytes(self) -> NDArray[np.uint8]:
        """Return the memory itself, `(size,) uint8`, not a copy."""
        return np.ctypeslib.as_array((ctypes.c_uint8 * self.size).from_address(self.address))


@dataclass(frozen=True)
class Task:
    """What a piece of work does, as it is queued or captured.

    Attributes:
        label: `to device`, `to host`, `run`, `set` or `graph`.
        images: that a run computes; 0 for copies.
        size: bytes that a copy moves.
        duration_us: in the modelled time.
        action: does it.
        reads: memory.
        writes: memory.
        check: asserts, whenever the task is queued or launched, that it still may be.
    """

    label: str
    images: int
    size: int
    duration_us: float
    action: Check
    reads: tuple[Span, ...] = ()
    writes: tuple[Span, ...] = ()
    check: Check = lambda: None


@dataclass(eq=False)
class Work:
    """One queued task, with its place in the order of all of them."""

    task: Task
    stream: Stream
    number: int
    clock: dict[int, int]
    start_us: float
    end_us: float
    after: Work | None
    is_done: bool = False


@dataclass(eq=False)
class Capture:
    """A capture under way."""

    thread: int
    tasks: list[Task] = field(default_factory=list)
    is_invalid: bool = False


@dataclass(eq=False)
class Stream:
    """A queue of work that is done in order."""

    handle: int
    device: int
    pending: deque[Work] = field(default_factory=deque)
    clock: dict[int, int] = field(default_factory=dict)
    free_us: float = 0.0
    capture: Capture | None = None


@dataclass(eq=False)
class Event:
    """A mark in a stream."""

    handle: int
    device: int
    is_timed: bool
    record: Work | None = None


@dataclass(eq=False)
class Graph:
    """Captured tasks; `is_executable` after instantiation."""

    handle: int
    device: int
    tasks: tuple[Task, ...]
    is_executable: bool


@dataclass(eq=False)
class Allocation:
    """Device memory, or pinned memory of the host."""

    span: Span
    kind: str
    device: int
    array: NDArray[np.uint8]


@dataclass(frozen=True)
class Done:
    """What was asked of the GPU, in this order, and when it ran in the modelled time."""

    label: str
    stream: int
    images: int
    size: int
    start_us: float
    end_us: float


def _held_by(holder: Any) -> list[Span]:
    if isinstance(holder, Graph):
        return [span for task in holder.tasks for span in (*task.reads, *task.writes)]
    return [] if isinstance(holder, Stream | Event) else list(holder._held())


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
