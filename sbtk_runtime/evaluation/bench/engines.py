"""The engines and precisions that a benchmark measures."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal, Protocol, runtime_checkable

from sbtk_runtime.bundle import Bundle
from sbtk_runtime.engines.base import AUTO, EngineInfo, EngineOptions, Notify, no_notify
from sbtk_runtime.engines.registry import Engine, open_engine, probe_engines
from sbtk_runtime.engines.tensorrt.pipeline import DeviceTimes
from sbtk_runtime.errors import BadConfig, BadModel, EngineUnavailable, MissingExtra
from sbtk_runtime.evaluation.bench.interleave import Embeddings
from sbtk_runtime.manifest import PRECISIONS, Precision
from sbtk_runtime.preprocess import Kind, Pixels

#: As `--engine`: every engine that works.
ALL = "all"

#: Kind of a contender: an engine, a baseline (torch eager or compiled), or another comparison.
Role = Literal["engine", "eager", "compiled", "other"]


@runtime_checkable
class TimedEngine(Protocol):
    """An engine that measures the parts of a run on its GPU."""

    def run_timed(self, images: Pixels, kind: Kind) -> tuple[Embeddings, DeviceTimes]:
        """Return the embeddings `(N, D) float32` of a batch, and the times of the run's parts."""
        ...


@dataclass(frozen=True)
class Contender:
    """An engine or baseline to be measured.

    Attributes:
        engine: its name; for an engine, as in `--engine`.
        precision: precision of its multiplications.
        device: `cpu`, or a GPU such as `cuda:0`; contenders are compared on the same device.
        run: embeds `(N, 224, 224, 3) uint8` photos; its result is ignored.
        role: kind of contender.
        timed: the engine, if it measures the parts of a run.
    """

    engine: str
    precision: str
    device: str
    run: Callable[[Pixels], object]
    role: Role = "engine"
    timed: TimedEngine | None = None

    @property
    def name(self) -> str:
        """Engine and precision."""
        return f"{self.engine} {self.precision}"


def open_default(bundle: Bundle, options: EngineOptions, notify: Notify = no_notify) -> Engine:
    """Open the engine on which stages are measured; for `all`, the one that `auto` selects.

    Raises:
        EngineUnavailable, MissingExtra, BadModel, BadConfig: as `open_engine`.
    """
    if options.engine == ALL:
        options = replace(options, engine=AUTO)
    return open_engine(bundle, options, notify=notify)


def open_contenders(
    stack: contextlib.ExitStack,
    bundle: Bundle,
    default: EngineInfo,
    options: EngineOptions,
    notify: Notify = no_notify,
) -> tuple[list[Contender], list[str]]:
    """Open the engines to measure; return them with notes on skipped engines.

    For `all`, these are all working engines, otherwise the default one, each in the requested
    precision or in all precisions that the bundle has for it.

    Args:
        stack: closes the engines.
        bundle: the model.
        default: the engine on which the stages were measured.
        options: the requested engine, or `all`; `batch` is the largest to run.
        notify: called with messages about slow steps.
    """
    notes = [f"not {reason}" for reason in default.passed_over]
    names = [default.name]
    if options.engine == ALL:
        reports = probe_engines()
        notes = [f"{r.name} skipped: {r.reason}" for r in reports if not r.works]
        names = [r.name for r in reports if r.works]
    contenders = []
    for name in names:
        for precision in _precisions(bundle, options.precision):
            try:
                one = replace(options, engine=name, precision=precision, threads=default.threads)
                opened = open_engine(bundle, one, notify=notify)
            except (EngineUnavailable, MissingExtra, BadConfig, BadModel) as problem:
                notes.append(f"{name} {precision} skipped: {problem.found}")
                continue
            stack.callback(opened.close)
            contenders.append(make_contender(opened))
    return contenders, notes


def make_contender(engine: Engine) -> Contender:
    """Return an open engine as a contender."""
    info = engine.info
    timed = engine if isinstance(engine, TimedEngine) else None
    run = partial(engine.run, kind="photo")
    return Contender(info.name, info.precision, info.device, run, timed=timed)


def _precisions(bundle: Bundle, precision: Precision | None) -> Sequence[Precision]:
    """Return the requested precision, or all in the bundle, fastest first."""
    if precision is not None:
        return (precision,)
    there = {*bundle.precisions_of("plain"), *bundle.precisions_of("tensorrt")}
    return [p for p in reversed(PRECISIONS) if p in there]
