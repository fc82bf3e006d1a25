"""A GPU made of host memory: streams, events, graphs and allocations, modelled strictly.

What is asked of it is put in order by `tests.fakes.gpu_order`, which says how strict that is.
"""

from __future__ import annotations

import threading
import weakref
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from tests.fakes.gpu_order import Order
from tests.fakes.gpu_work import (
    ALIGNMENT,
    POISON,
    Allocation,
    Capture,
    Done,
    Event,
    Graph,
    Span,
    Stream,
    Task,
    Work,
)


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


def _held_by(holder: Any) -> list[Span]:
    if isinstance(holder, Graph):
        return [span for task in holder.tasks for span in (*task.reads, *task.writes)]
    return [] if isinstance(holder, Stream | Event) else list(holder._held())
