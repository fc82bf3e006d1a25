"""Latency and speed of a bundle on every engine that works, in every precision that it has."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from sbtk_runtime.bench_latency import (
    Run,
    Search,
    StageLatency,
    Throughput,
    measure_stages,
    measure_throughput,
)
from sbtk_runtime.bundle import Bundle
from sbtk_runtime.engine import AUTO, Engine, open_engine, survey_engines
from sbtk_runtime.errors import BadConfig, EngineUnavailable, MissingExtra
from sbtk_runtime.manifest import Precision
from sbtk_runtime.preprocess import prepare

Progress = Callable[[str], None]

BATCHES = (1, 8, 32)


@dataclass(frozen=True)
class Pictures:
    """Image files to decode, and what they are, in words."""

    sketches: Sequence[bytes]
    photos: Sequence[bytes]
    named: str


@dataclass(frozen=True)
class Effort:
    """How long is measured.

    Attributes:
        samples: pictures of each kind whose stages are timed.
        rounds: blocks of runs of each engine and batch.
        block_s: seconds of a block.
    """

    samples: int = 200
    rounds: int = 5
    block_s: float = 0.4


@dataclass(frozen=True)
class LatencyReport:
    """Latency and speed of one bundle.

    Attributes:
        model_id: of the bundle.
        engine, precision: which the stages were measured with.
        threads: CPU threads of every contender.
        pictures: what was decoded, in words.
        searched: what was searched, in words.
        stages: latency of one picture at a time.
        throughput: speed of each engine and precision, and of the reference.
        reference: the contender that the others are compared with; `None` without torch.
        notes: what was left out, and why.
    """

    model_id: str
    engine: str
    precision: str
    threads: int
    pictures: str
    searched: str
    stages: tuple[StageLatency, ...]
    throughput: tuple[Throughput, ...]
    reference: str | None
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Returns the report as a JSON object."""
        return asdict(self)


def measure_latency(
    bundle: Bundle,
    pictures: Pictures,
    search: Search,
    searched: str,
    *,
    engine: str = AUTO,
    device: str | None = None,
    precision: Precision | None = None,
    threads: int | None = None,
    batches: Sequence[int] = BATCHES,
    peers: Callable[[int], Mapping[str, Run]] = lambda threads: {},
    effort: Effort = Effort(),
    progress: Progress = lambda _: None,
) -> LatencyReport:
    """Returns the latency of each stage and the speed of each engine and precision.

    Args:
        bundle: the model.
        pictures: to decode and embed.
        search: answers an embedding, the last stage of a query.
        searched: what it searches, in words.
        engine: a name, or `auto` for every engine that works; the stages take the first.
        device: `cpu`, `cuda` or `cuda:N`, or `None` for whatever an engine runs on.
        precision: one of the bundle's, or `None` for all; the stages take the engine's default.
        threads: CPU threads of each contender; by default all that this process may use.
        batches: numbers of pictures per run.
        peers: given the number of threads, what else is measured; the first is the reference.
        effort: how long is measured.
        progress: told what is measured next.

    Raises:
        EngineUnavailable: the named engine, or every engine, does not work here.
    """
    with contextlib.ExitStack() as stack:
        default = open_engine(
            bundle, engine=engine, precision=precision, threads=threads, device=device
        )
        stack.callback(default.close)
        info = default.info
        progress(f"stages on {_name(default)}")
        stages = measure_stages(
            pictures.sketches, pictures.photos, default.run, search, samples=effort.samples
        )
        contenders, notes = _open_others(stack, bundle, default, engine, precision, device)
        others = dict(peers(info.threads))
        pixels = np.stack([prepare(photo, "photo").pixels for photo in pictures.photos[:32]])
        throughput = measure_throughput(
            contenders | others,
            batches,
            reference=next(iter(others), None),
            rounds=effort.rounds,
            block_s=effort.block_s,
            pixels=pixels,
            progress=progress,
        )
    return LatencyReport(
        model_id=bundle.manifest.model_id,
        engine=info.name,
        precision=info.precision,
        threads=info.threads,
        pictures=pictures.named,
        searched=searched,
        stages=tuple(stages),
        throughput=tuple(throughput),
        reference=next(iter(others), None),
        notes=tuple(notes),
    )


def _open_others(
    stack: contextlib.ExitStack,
    bundle: Bundle,
    default: Engine,
    engine: str,
    precision: Precision | None,
    device: str | None,
) -> tuple[dict[str, Run], list[str]]:
    """Returns every engine and precision to measure, the default first, and what was left out."""
    contenders: dict[str, Run] = {_name(default): default.run}
    notes: list[str] = []
    for name in _engine_names(engine, notes):
        for wanted in (precision,) if precision else bundle.precisions:
            if f"{name} {wanted}" in contenders:
                continue
            try:
                opened = open_engine(
                    bundle,
                    engine=name,
                    precision=wanted,
                    threads=default.info.threads,
                    device=device,
                )
            except (EngineUnavailable, MissingExtra, BadConfig) as problem:
                notes.append(f"{name} {wanted} left out: {problem.found}")
                continue
            stack.callback(opened.close)
            contenders[_name(opened)] = opened.run
    return contenders, notes


def _engine_names(engine: str, notes: list[str]) -> list[str]:
    if engine != AUTO:
        return [engine]
    reports = survey_engines()
    notes += [f"{r.name} left out: {r.reason}" for r in reports if not r.works]
    return [report.name for report in reports if report.works]


def _name(engine: Engine) -> str:
    return f"{engine.info.name} {engine.info.precision}"
