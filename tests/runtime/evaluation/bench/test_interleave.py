"""Contenders alternate, warm up and drop out alone; no test asserts a duration."""

from __future__ import annotations

import gc
import itertools
import time

import pytest

from sbtk_runtime.errors import EngineUnavailable
from sbtk_runtime.evaluation.bench.interleave import (
    BenchConfig,
    Task,
    compute_ratio,
    run_interleaved,
)

QUICK = BenchConfig(block_s=0.002, measured_s=0.0, rounds=3)


def counted(name: str, order: list[str], seconds: float = 0.001) -> Task:
    """Return a task that takes some time and records its runs."""

    def run() -> None:
        order.append(name)
        time.sleep(seconds)

    return run


def test_contenders_alternate_after_a_first_run_and_a_warm_up() -> None:
    order: list[str] = []
    timings = run_interleaved({name: counted(name, order) for name in ("a", "b")}, QUICK)
    changes = [name for name, _ in itertools.groupby(order)]
    assert changes == ["a", "b"] * 5
    assert order[:2] == ["a", "b"]
    assert {name: len(blocks) for name, blocks in timings.blocks.items()} == {"a": 3, "b": 3}
    timed = sum(len(block) for blocks in timings.blocks.values() for block in blocks)
    # The first run, warm-up runs and one run before each block are not timed.
    assert 6 <= timed <= len(order) - 2 - 2 - 6
    assert timings.failed == {}


def test_measuring_continues_until_each_contender_has_run_long_enough() -> None:
    order: list[str] = []
    config = BenchConfig(block_s=0.001, measured_s=0.02, rounds=1)
    timings = run_interleaved({name: counted(name, order) for name in ("a", "b")}, config)
    for blocks in timings.blocks.values():
        assert sum(ms for block in blocks for ms in block) > 10


def test_a_long_run_needs_no_warm_up() -> None:
    order: list[str] = []
    run_interleaved(
        {"slow": counted("slow", order, 0.26)}, BenchConfig(block_s=0.001, rounds=1, measured_s=0)
    )
    assert len(order) == 2


@pytest.mark.parametrize("failing_run", [0, 1, 4])
@pytest.mark.parametrize(
    ("problem", "reason"),
    [
        (EngineUnavailable("it is full", "less"), "it is full"),
        (RuntimeError("CUDA out of memory.\nTried to allocate"), "CUDA out of memory."),
        (MemoryError(), "MemoryError"),
    ],
)
def test_a_failing_contender_is_dropped_and_the_others_continue(
    failing_run: int, problem: Exception, reason: str
) -> None:
    runs = itertools.count()

    def failing() -> None:
        if next(runs) == failing_run:
            raise problem

    config = BenchConfig(block_s=0.0, measured_s=0.0, rounds=3)
    timings = run_interleaved({"bad": failing, "good": lambda: None}, config)
    assert timings.failed == {"bad": reason}
    assert list(timings.blocks) == ["good"]
    assert len(timings.blocks["good"]) == 3


def test_measuring_ends_if_all_contenders_fail() -> None:
    def failing() -> None:
        raise RuntimeError("no")

    assert run_interleaved({"bad": failing}, QUICK).blocks == {}
    assert run_interleaved({}, QUICK).blocks == {}


def test_programming_errors_are_raised() -> None:
    with pytest.raises(ZeroDivisionError):
        run_interleaved({"bad": lambda: 1 / 0}, QUICK)
    assert gc.isenabled()


def test_ratios_are_computed_within_each_round() -> None:
    # The machine is twice as slow in the second round, and one run of the third is disturbed.
    ours = [[1.0, 1.0], [2.0], [1.0, 1.0, 90.0]]
    theirs = [[4.0], [8.0, 8.0], [4.0]]
    assert compute_ratio(ours, theirs) == 4.0
