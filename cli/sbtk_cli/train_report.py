"""What `sbtk train` prints while a run goes on, and how a signal ends it."""

from __future__ import annotations

import contextlib
import math
import os
import signal
from collections.abc import Callable, Iterator
from types import FrameType
from typing import TYPE_CHECKING

from sbtk_cli import output
from sbtk_cli.stopping import Terminated, ending_of, ending_signals

if TYPE_CHECKING:
    from sbtk_train.progress import EpochDone, StepDone
    from sbtk_train.runs.loop import Trainer


class Reporter:
    """Prints what a run tells: progress on stderr, with `--json` a line for each epoch."""

    def __init__(self, as_json: bool, quiet: bool) -> None:
        self._as_json = as_json
        self._quiet = quiet

    def __call__(self, event: StepDone | EpochDone | str) -> None:
        """Prints one event."""
        from sbtk_train.progress import EpochDone

        if isinstance(event, str):
            output.notice(event, quiet=self._quiet)
        elif isinstance(event, EpochDone):
            self._epoch(event)
        elif not self._quiet:
            terms = "  ".join(f"{name} {value:.3f}" for name, value in event.means.items())
            output.notice(
                f"epoch {event.epoch}/{event.epochs}  step {event.step}/{event.steps}  {terms}  "
                f"{event.images_per_s:.1f} images/s  "
                f"{output.duration_text(event.eta_s)} left"
            )

    def _epoch(self, event: EpochDone) -> None:
        row = event.row
        if self._as_json:
            # A figure that a small gallery cannot have is NaN, which JSON does not know.
            known = {name: None if math.isnan(value) else value for name, value in row.items()}
            output.answer_json(known)
        mark = "best so far" if event.improved else f"{event.since_best} since the best"
        whole = (
            f"validation mAP@all {row['validation_map']:.4f}, " if "validation_map" in row else ""
        )
        output.notice(
            f"epoch {row['epoch']:.0f} ({mark}): {whole}"
            f"held-out sketches {row['held_out_map']:.4f}",
            quiet=self._quiet,
        )


class Holder:
    """Holds the running trainer for the signal handler."""

    def __init__(self) -> None:
        self.trainer: Trainer | None = None
        self.is_stopping = False

    def __call__(self, trainer: Trainer) -> None:
        """Takes the trainer that is about to start."""
        self.trainer = trainer
        if self.is_stopping:
            trainer.stop_soon()


@contextlib.contextmanager
def stopping_by_signal(is_heard: Callable[[], bool] = lambda: True) -> Iterator[Holder]:
    """Makes the first ending signal save and stop after the step under way; a second kills.

    Args:
        is_heard: whether this process is the one to say so.

    Raises:
        KeyboardInterrupt: the run was stopped; a `Terminated` if that was not by Ctrl-C.
    """
    holder = Holder()
    first: list[int] = []
    before = {number: signal.getsignal(number) for number in ending_signals()}

    def stop(number: int, frame: FrameType | None) -> None:
        signal.signal(number, before[signal.Signals(number)])
        if holder.trainer is None:
            os.kill(os.getpid(), number)
            return
        output.notice("saving after this step; press again to stop at once", quiet=not is_heard())
        first.append(number)
        holder.is_stopping = True
        holder.trainer.stop_soon()

    for number in before:
        signal.signal(number, stop)
    try:
        yield holder
    except KeyboardInterrupt as stopped:
        if first and not isinstance(stopped, Terminated):
            raise ending_of(first[0]) from stopped
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
