"""Which engines and precisions a benchmark measures, opened and ready to run."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, Protocol, runtime_checkable

from sbtk_runtime.bundle import Bundle
from sbtk_runtime.engines.base import EngineInfo, Notify, no_notify
from sbtk_runtime.engines.registry import AUTO, Engine, open_engine, probe_engines
from sbtk_runtime.errors import BadConfig, BadModel, EngineUnavailable, MissingExtra
from sbtk_runtime.evaluation.bench.interleave import Embeddings
from sbtk_runtime.manifest import PRECISIONS, Precision
from sbtk_runtime.preprocess import Kind, Pixels

#: As `--engine`: every engine that works.
ALL = "all"

#: What a contender is: an engine; torch as it is, or compiled, which engines are compared with;
#: or something else that runs beside them.
Role = Literal["engine", "eager", "compiled", "other"]


class DeviceTimes(Protocol):
    """Milliseconds of one run on a GPU: copied there, computed, copied back."""

    @property
    def h2d_ms(self) -> float: ...  # noqa: D102 - the class says it

    @property
    def compute_ms(self) -> float: ...  # noqa: D102

    @property
    def d2h_ms(self) -> float: ...  # noqa: D102


@runtime_checkable
class TimedEngine(Protocol):
    """An engine that can tell where the time of a run went on its GPU."""

    def run_timed(self, images: Pixels, kind: Kind) -> tuple[Embeddings, DeviceTimes]:
        """Return the embeddings `(N, D) float32` of a batch, and the times of its parts."""
        ...


@dataclass(frozen=True)
class Contender:
    """Something that embeds images and is measured.

    Attributes:
        engine: its name; for an engine of ours as `--engine` takes it.
        precision: of its multiplications.
        device: `cpu`, or a GPU such as `cuda:0`; only contenders on one device are compared.
        run: embeds `(N, 224, 224, 3) uint8` photos; what it returns is not looked at.
        role: what it is.
        timed: the engine, if it can tell where the time went.
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


@dataclass(frozen=True)
class Wanted:
    """Which engines are measured, and how they run.

    Attributes:
        engine: a name, `auto` for the first that works, or `all` for every one that works.
        device: `cpu`, `cuda` or `cuda:N`, or `None` for whatever an engine runs on.
        precision: one of the bundle's, or `None` for all.
        threads: CPU threads of each contender; by default all that this process may use.
        batches: numbers of images per run.
    """

    engine: str = AUTO
    device: str | None = None
    precision: Precision | None = None
    threads: int | None = None
    batches: tuple[int, ...] = (1, 8, 32)


def open_default(bundle: Bundle, wanted: Wanted, said: Said = said_nothing) -> Engine:
    """Return the engine that the stages are measured on; of `all` it is the one `auto` takes.

    Raises:
        EngineUnavailable, MissingExtra, BadModel, BadConfig: as `open_engine`.
    """
    return open_engine(
        bundle,
        engine=AUTO if wanted.engine == ALL else wanted.engine,
        precision=wanted.precision,
        threads=wanted.threads,
        device=wanted.device,
        notify=notify,
    )


def open_contenders(
    stack: contextlib.ExitStack,
    bundle: Bundle,
    default: EngineInfo,
    wanted: Wanted,
    notify: Notify = no_notify,
) -> tuple[list[Contender], list[str]]:
    """Return the engines to measure, and notes on those that are left out.

    They are every engine that works, for `all`, or else the default one, each in every precision
    that the bundle has for it or in the one that is asked for.

    Args:
        stack: closes what is opened.
        bundle: the model.
        default: the engine that the stages were measured on.
        wanted: what was asked for.
        notify: told what takes long.
    """
    notes = [f"not {reason}" for reason in default.passed_over]
    names = [default.name]
    if wanted.engine == ALL:
        reports = probe_engines()
        notes = [f"{r.name} left out: {r.reason}" for r in reports if not r.works]
        names = [r.name for r in reports if r.works]
    contenders = []
    for name in names:
        for precision in _precisions(bundle, wanted.precision):
            try:
                opened = open_engine(
                    bundle,
                    engine=name,
                    precision=precision,
                    threads=default.threads,
                    device=wanted.device,
                    batch=max(wanted.batches),
                    notify=notify,
                )
            except (EngineUnavailable, MissingExtra, BadConfig, BadModel) as problem:
                notes.append(f"{name} {precision} left out: {problem.found}")
                continue
            stack.callback(opened.close)
            contenders.append(contender_of(opened))
    return contenders, notes


def contender_of(engine: Engine) -> Contender:
    """Return an open engine as a contender."""
    info = engine.info
    timed = engine if isinstance(engine, TimedEngine) else None
    run = partial(engine.run, kind="photo")
    return Contender(info.name, info.precision, info.device, run, timed=timed)


def _precisions(bundle: Bundle, precision: Precision | None) -> Sequence[Precision]:
    """Return the one asked for, or whatever the bundle has for some engine, quickest first."""
    if precision is not None:
        return (precision,)
    there = {*bundle.precisions_of("plain"), *bundle.precisions_of("tensorrt")}
    return [p for p in reversed(PRECISIONS) if p in there]
