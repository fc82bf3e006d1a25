"""What a stage of the GPU benchmark is asked and what it answers, one JSON line each."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

State = Literal["planned", "measured", "failed", "not reached"]
Figures = Mapping[str, Any]
Key = tuple[str, str, str, int]

_REASON_LETTERS = 4000


@dataclass(frozen=True)
class Finding:
    """One point of one stage: what was to be measured, and what came of it.

    Attributes:
        stage: the stage that it belongs to.
        subject: what was measured.
        source: where the input came from, or which variant; empty where there is only one.
        batch: pictures in a run; 0 where that makes no sense.
        state: `planned` points are announced first, so that those which never come are known.
        reason: why there are no figures; what a library said, where it said something.
        figures: by name, with the unit at the end of the name.
    """

    stage: str
    subject: str
    source: str = ""
    batch: int = 0
    state: State = "planned"
    reason: str = ""
    figures: Figures = field(default_factory=dict)

    @property
    def key(self) -> Key:
        """What tells it from every other point."""
        return self.stage, self.subject, self.source, self.batch

    def measured(self, figures: Figures) -> Finding:
        """Return this point with its figures."""
        return replace(self, state="measured", reason="", figures=figures)

    def failed(self, reason: str) -> Finding:
        """Return this point with the reason why it could not be measured."""
        return replace(self, state="failed", reason=reason)

    def not_reached(self, reason: str) -> Finding:
        """Return this point with the reason why nobody came to it."""
        return replace(self, state="not reached", reason=reason)

    def to_line(self) -> str:
        """Return the finding as one line of JSON."""
        return json.dumps(asdict(self))

    @classmethod
    def from_line(cls, line: str) -> Finding:
        """Return the finding that `to_line` made the line of.

        Raises:
            ValueError: it is another line.
        """
        values = json.loads(line)
        if not isinstance(values, dict) or "stage" not in values:
            raise ValueError(line)
        return cls(**values)


Report = Callable[[Finding], None]


@dataclass(frozen=True)
class Task:
    """What a stage is asked to do.

    Attributes:
        stage: its name.
        end_s: when it is ended, by the monotonic clock, which processes of a machine share.
        scratch: folder that all stages of a run share.
        is_dry_run: go through everything on the CPU with a small model; no measurement.
        data: folder of sketches and photos for the training stage, if any.
        model: bundle for the engines, if any.
    """

    stage: str
    end_s: float
    scratch: Path
    is_dry_run: bool = False
    data: Path | None = None
    model: str | None = None

    @property
    def device(self) -> str:
        """The device to measure on."""
        return "cpu" if self.is_dry_run else "cuda"

    @property
    def left_s(self) -> float:
        """Seconds that are left, below 0 when the time is over."""
        return self.end_s - time.monotonic()

    def to_text(self) -> str:
        """Return the task as JSON."""
        return json.dumps(asdict(self), default=str)

    @classmethod
    def from_text(cls, text: str) -> Task:
        """Return the task that `to_text` made the text of."""
        values = json.loads(text)
        data = values.pop("data")
        return cls(
            **values | {"scratch": Path(values["scratch"])},
            data=Path(data) if data is not None else None,
        )


def attempt(report: Report, point: Finding, measure: Callable[[], Figures]) -> bool:
    """Reports what `measure` returns for a point, or why it failed; returns whether it went well.

    Anything may be raised by a compiler, a driver or an engine, and the points after this one are
    measured all the same.
    """
    try:
        figures = measure()
    except Exception as problem:
        report(point.failed(told(problem)))
        return False
    report(point.measured(figures))
    return True


def told(problem: BaseException) -> str:
    """Return what an exception says, its type before it unless it is one of sbtk's own."""
    from sbtk_runtime.errors import SbtkError

    text = str(problem).strip()[:_REASON_LETTERS]
    return text if isinstance(problem, SbtkError) else f"{type(problem).__name__}: {text}"
