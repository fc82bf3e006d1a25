"""What lives on a fake GPU: pieces of work, streams, events, graphs and allocations."""

from __future__ import annotations

import ctypes
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

#: What fresh and freed memory holds: NaN as float32.
POISON = 0xFF
ALIGNMENT = 256

Check = Callable[[], None]


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
