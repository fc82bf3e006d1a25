"""How far the build of a TensorRT plan is, and the way to stop it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class BuildProgress:
    """How far a build is.

    Attributes:
        elapsed_s: seconds since it began.
        phase: the outermost phase that TensorRT is in, in its words; empty before the first.
        done: steps of that phase that are done.
        total: steps that the phase has; 0 when that is not known.
        waiting_for: what is being waited for now, for people: the innermost phase.
    """

    elapsed_s: float
    phase: str
    done: int
    total: int
    waiting_for: str

    def sentence(self) -> str:
        """Returns one line for people: time, steps and what is waited for."""
        steps = f", {self.phase}: {self.done} of {self.total}" if self.total else ""
        return f"{self.elapsed_s:.0f} s{steps}, waiting for {self.waiting_for}"


Progress = Callable[[BuildProgress], None]


def no_progress(_: BuildProgress) -> None:
    """Takes the state of a build and keeps it to itself."""


@dataclass
class _Phase:
    name: str
    total: int
    done: int = 0

    def told(self) -> str:
        return f"{self.name} ({self.done} of {self.total})" if self.total > 1 else self.name


_monitors_alive: list[Any] = []


class BuildWatch:
    """What is known of a running build; TensorRT's threads tell it, the caller's thread asks."""

    def __init__(self) -> None:
        self._started = time.perf_counter()
        self._lock = threading.Lock()
        self._cancelled = threading.Event()
        self._stage = "TensorRT to load"
        # In the order in which they began, so that the last one is the innermost.
        self._phases: dict[str, _Phase] = {}

    def enter(self, stage: str) -> None:
        """Notes what is waited for until TensorRT reports phases of its own."""
        with self._lock:
            self._stage = stage

    def cancel(self) -> None:
        """Asks the build to stop at its next step."""
        self._cancelled.set()

    def progress(self) -> BuildProgress:
        """Returns how far the build is now."""
        with self._lock:
            phases = list(self._phases.values())
            outermost = phases[0] if phases else _Phase("", 0)
            return BuildProgress(
                elapsed_s=time.perf_counter() - self._started,
                phase=outermost.name,
                done=outermost.done,
                total=outermost.total,
                waiting_for=phases[-1].told() if phases else self._stage,
            )

    def monitor(self, module: Any) -> Any:
        """Returns an object for `IBuilderConfig.progress_monitor` that reports to this one."""
        watch = self
        base: Any = module.IProgressMonitor

        class Monitor(base):  # type: ignore[misc]  # its base is known only at run time
            """Forwards TensorRT's phases; called from any of its threads."""

            def __init__(self) -> None:
                # The bindings do not survive super() here: they want their own class named.
                base.__init__(self)

            def phase_start(
                self, phase_name: str, parent_phase: str | None, num_steps: int
            ) -> None:
                """Notes that a phase begins, inside `parent_phase` or on its own."""
                watch.begin(phase_name, num_steps)

            def step_complete(self, phase_name: str, step: int) -> bool:
                """Notes that step number `step` is done; returns whether to go on."""
                return watch.advance(phase_name, step + 1)

            def phase_finish(self, phase_name: str) -> None:
                """Notes that a phase has ended."""
                watch.end(phase_name)

        monitor = Monitor()
        # It has to outlive everything of TensorRT's that knows it, and the garbage collector keeps
        # no such order.
        _monitors_alive.append(monitor)
        return monitor

    def begin(self, phase: str, steps: int) -> None:
        """Notes that a phase begins."""
        with self._lock:
            self._phases[phase] = _Phase(phase, steps)

    def advance(self, phase: str, done: int) -> bool:
        """Notes how many steps of a phase are done; returns whether the build is to go on."""
        with self._lock:
            if phase in self._phases:
                self._phases[phase].done = done
        return not self._cancelled.is_set()

    def end(self, phase: str) -> None:
        """Notes that a phase has ended."""
        with self._lock:
            self._phases.pop(phase, None)
