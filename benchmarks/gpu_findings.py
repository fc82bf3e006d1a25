"""Tasks and findings of the GPU benchmark's stages, as JSON lines."""

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
    """A point of a stage and its result.

    Attributes:
        stage: name of the stage.
        subject: what is measured.
        source: source of the input, or variant; empty if there is only one.
        batch: images per run; 0 if not applicable.
        state: points are announced as `planned`, so that missing ones are known.
        reason: why there are no results, or a library's message.
        figures: results by name, which ends with the unit.
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
        """Identify the point."""
        return self.stage, self.subject, self.source, self.batch

    def measured(self, figures: Figures) -> Finding:
        """Return this point with its results."""
        return replace(self, state="measured", reason="", figures=figures)

    def failed(self, reason: str) -> Finding:
        """Return this point with the reason why measuring failed."""
        return replace(self, state="failed", reason=reason)

    def not_reached(self, reason: str) -> Finding:
        """Return this point with the reason why it was not reached."""
        return replace(self, state="not reached", reason=reason)

    def to_line(self) -> str:
        """Return the finding as one line of JSON."""
        return json.dumps(asdict(self))

    @classmethod
    def from_line(cls, line: str) -> Finding:
        """Return the finding of a line of `to_line`.

        Raises:
            ValueError: the line is not a finding.
        """
        values = json.loads(line)
        if not isinstance(values, dict) or "stage" not in values:
            raise ValueError(line)
        return cls(**values)


Report = Callable[[Finding], None]


@dataclass(frozen=True)
class Task:
    """The task of a stage.

    Attributes:
        stage: name of the stage.
        end_s: deadline by the monotonic clock, which all processes share.
        scratch: folder shared by all stages of a run.
        is_dry_run: run everything on the CPU with a small model, without measuring.
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
        """Remaining seconds; negative after the deadline."""
        return self.end_s - time.monotonic()

    def to_text(self) -> str:
        """Return the task as JSON."""
        return json.dumps(asdict(self), default=str)

    @classmethod
    def from_text(cls, text: str) -> Task:
        """Return the task of a text of `to_text`."""
        values = json.loads(text)
        data = values.pop("data")
        return cls(
            **values | {"scratch": Path(values["scratch"])},
            data=Path(data) if data is not None else None,
        )


def attempt(report: Report, point: Finding, measure: Callable[[], Figures]) -> bool:
    """Report the result of `measure` for a point, or its failure; return whether it succeeded.

    Compilers, drivers and engines may raise anything; later points are still measured.
    """
    try:
        figures = measure()
    except Exception as problem:
        report(point.failed(format_error(problem)))
        return False
    report(point.measured(figures))
    return True


def format_error(problem: BaseException) -> str:
    """Return an exception's message, preceded by its type unless it is an sbtk error."""
    from sbtk_runtime.errors import SbtkError

    text = str(problem).strip()[:_REASON_LETTERS]
    return text if isinstance(problem, SbtkError) else f"{type(problem).__name__}: {text}"
