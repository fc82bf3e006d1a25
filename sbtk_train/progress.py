"""Events reported by a training run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class StepDone:
    """Some steps of an epoch are finished; `means` are over the epoch so far."""

    epoch: int
    epochs: int
    step: int
    steps: int
    means: dict[str, float]
    images_per_s: float
    eta_s: float


@dataclass(frozen=True)
class EpochDone:
    """An epoch was validated and saved; `row` is its line of `metrics.csv`."""

    row: dict[str, float]
    improved: bool
    since_best: int


#: Receives messages.
Notify = Callable[[str], None]
#: Receives steps, epochs and messages.
Listener = Callable[[StepDone | EpochDone | str], None]
