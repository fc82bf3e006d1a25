"""Contenders run by turns in short blocks, so that whatever else a machine does meets all alike."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from sbtk_runtime.errors import SbtkError

#: Milliseconds of each run, in each round.
Blocks = list[list[float]]
Task = Callable[[], object]

_PAUSE_S = 0.05
# A run this long loses nothing that counts by waking its own threads.
_LONG_RUN_S = 0.25


@dataclass(frozen=True)
class Effort:
    """How long is measured, by trtexec's conventions unless less is asked for.

    Attributes:
        samples: pictures of each kind whose stages are timed.
        block_s: seconds of a block of runs; at least one run is made. A whole block warms up.
        measured_s: seconds of runs of each contender at each batch.
        rounds: fewest blocks of each contender.
        product_sizes: rows of the square matrices of which the fastest product is looked for;
            the products of much larger ones wait for memory.
        with_memory: measure memory, for which every engine is opened once more.
    """

    samples: int = 200
    block_s: float = 0.4
    measured_s: float = 3.0
    rounds: int = 3
    product_sizes: tuple[int, ...] = (512, 1024, 2048)
    with_memory: bool = True


USUAL = Effort()
#: Seconds instead of minutes, for rough figures.
QUICK = Effort(samples=5, block_s=0.02, measured_s=0.0, rounds=1, product_sizes=(512,))


@dataclass(frozen=True)
class Turns:
    """What was measured.

    Attributes:
        blocks: for each contender the milliseconds of its runs in each round.
        failed: for each contender that could not run, why.
    """

    blocks: dict[str, Blocks] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)


def measured_by_turns(tasks: Mapping[str, Task], effort: Effort) -> Turns:
    """Returns the milliseconds of each task's runs.

    Each task runs once before anything is timed, for what only a first run does. Then come rounds,
    the first of which warms up: in each, every task runs for a block of seconds, one task after
    the other. A task that fails is out, and the others go on.
    """
    turns = Turns()
    running = {name: _Contender(task) for name, task in tasks.items()}
    was_collecting = gc.isenabled()
    gc.disable()
    try:
        _let_all(running, turns, _Contender.run)
        _let_all(running, turns, lambda contender: contender.warm_up(effort.block_s))
        while any(contender.has_to_go_on(effort) for contender in running.values()):
            _let_all(running, turns, lambda contender: contender.take_turn(effort.block_s))
    finally:
        if was_collecting:
            gc.enable()
    turns.blocks.update({name: contender.blocks for name, contender in running.items()})
    return turns


def ratio(ours: Blocks, theirs: Blocks) -> float:
    """Returns how many times as long their runs take: the median over rounds of the medians'."""
    return statistics.median(
        statistics.median(slow) / statistics.median(fast)
        for fast, slow in zip(ours, theirs, strict=True)
    )


class _Contender:
    """A task, and how long its runs took."""

    def __init__(self, task: Task) -> None:
        self._task = task
        self._last_s = self._spent_s = 0.0
        self.blocks: Blocks = []

    def run(self) -> float:
        """Runs once and returns the milliseconds."""
        started = time.perf_counter()
        self._task()
        self._last_s = time.perf_counter() - started
        return self._last_s * 1e3

    def warm_up(self, block_s: float) -> None:
        """Runs for a block that does not count, unless the first run was as good as one."""
        if self._last_s < _LONG_RUN_S:
            self._block(block_s)

    def take_turn(self, block_s: float) -> None:
        """Runs for a block that counts."""
        # The pause lets the last contender's idle threads go to sleep; the run after it wakes
        # this one's.
        time.sleep(min(_PAUSE_S, block_s / 4))
        if self._last_s < _LONG_RUN_S:
            self.run()
        started = time.perf_counter()
        self.blocks.append(self._block(block_s))
        self._spent_s += time.perf_counter() - started

    def has_to_go_on(self, effort: Effort) -> bool:
        """Whether too little has been measured yet."""
        return len(self.blocks) < effort.rounds or self._spent_s < effort.measured_s

    def _block(self, seconds: float) -> list[float]:
        times_ms: list[float] = []
        started = time.perf_counter()
        while not times_ms or time.perf_counter() - started < seconds:
            times_ms.append(self.run())
        return times_ms


def _let_all(
    running: dict[str, _Contender], turns: Turns, act: Callable[[_Contender], object]
) -> None:
    """Lets each contender act, one after the other; those that fail run no more."""
    for name, contender in list(running.items()):
        try:
            act(contender)
        # torch and CUDA tell of used-up memory, and a compiler of its absence, by RuntimeError.
        except (SbtkError, RuntimeError, MemoryError) as problem:
            turns.failed[name] = _reason(problem)
            del running[name]


def _reason(problem: BaseException) -> str:
    if isinstance(problem, SbtkError):
        return problem.found
    lines = str(problem).strip().splitlines()
    return lines[0][:200] if lines else type(problem).__name__
