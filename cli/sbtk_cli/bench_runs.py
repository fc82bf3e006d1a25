"""What `sbtk bench` measures, and how the results are handed over."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sbtk_cli.bench_contenders import eager_contenders, pictures_of, searched
from sbtk_cli.bench_data import Classes, measured_images
from sbtk_cli.output import answer_json, notice, progress
from sbtk_runtime.bench_engines import BATCHES, Effort, LatencyReport, measure_latency
from sbtk_runtime.bench_map import MapReport, append_log, earlier_runs, measure_map
from sbtk_runtime.bench_search import SearchReport
from sbtk_runtime.bundle import Bundle
from sbtk_runtime.embed import Embedder
from sbtk_runtime.machine import Machine
from sbtk_runtime.manifest import Precision

#: In a checkout of sbtk, runs on unseen classes are put on record here without being asked.
UNSEEN_LOG = Path("benchmarks/unseen.log")

_QUICK = Effort(samples=5, rounds=1, block_s=0.02)
_QUICK_BATCHES = (1, 8)


@dataclass(frozen=True)
class Chosen:
    """The model, and what runs it, as `--engine`, `--device` and `--threads` take it."""

    bundle: Bundle
    engine: str
    device: str | None
    threads: int | None
    quiet: bool


def run_latency(
    chosen: Chosen,
    *,
    precision: Precision | None = None,
    batches: Sequence[int] = (),
    data: Path | None = None,
    gallery: Path | None = None,
    with_torch: bool = True,
    is_quick: bool = False,
) -> LatencyReport:
    """Returns latency and speed; `precision=None` are all, `batches=()` the usual ones."""
    manifest = chosen.bundle.manifest
    with searched(gallery, manifest) as (search, searched_named):
        return measure_latency(
            chosen.bundle,
            pictures_of(data),
            search,
            searched_named,
            engine=chosen.engine,
            device=chosen.device,
            precision=precision,
            threads=chosen.threads,
            batches=batches or (_QUICK_BATCHES if is_quick else BATCHES),
            peers=eager_contenders(manifest) if with_torch else lambda threads: {},
            effort=_QUICK if is_quick else Effort(),
            progress=lambda text: notice(f"measuring {text}", quiet=chosen.quiet),
        )


def run_map(
    chosen: Chosen,
    data: Path,
    *,
    precisions: Sequence[Precision] = (),
    batch: int = 32,
    split: str | None = None,
    classes: Classes = "unseen",
    log: Path | None = None,
) -> list[MapReport]:
    """Returns a report for each precision, `()` being the engine's own choice; logs each."""
    images = measured_images(data, chosen.bundle.manifest, split, classes)
    if log is None and classes == "unseen" and UNSEEN_LOG.is_file():
        log = UNSEEN_LOG
    reports = []
    for precision in precisions or (None,):
        embedder = Embedder(
            chosen.bundle,
            engine=chosen.engine,
            device=chosen.device,
            precision=precision,
            threads=chosen.threads,
            batch=batch,
        )
        with embedder, progress(f"mAP on {images.of}", quiet=chosen.quiet) as advance:
            report = measure_map(
                embedder, images.sketches, images.photos, of=images.of, progress=advance
            )
        for line in report.unreadable:
            notice(f"left out {line}", quiet=chosen.quiet)
        if log is not None:
            _put_on_record(log, report, chosen.quiet)
        reports.append(report)
    return reports


def hand_over(
    machine: Machine,
    *,
    latency: LatencyReport | None = None,
    maps: Sequence[MapReport] = (),
    search: SearchReport | None = None,
    plot: Path | None = None,
    as_json: bool = False,
) -> int:
    """Prints the results as tables or as one JSON line, draws them, and returns the exit code."""
    if as_json:
        results: dict[str, Any] = {"machine": machine.to_json()}
        if latency is not None:
            results["latency"] = latency.to_json()
        if maps:
            results["map"] = [report.to_json() for report in maps]
        if search is not None:
            results["search"] = search.to_json()
        answer_json(results)
    else:
        _print_tables(machine, latency, maps, search)
    if plot is not None:
        _draw(plot, machine, latency, maps, search)
    return 3 if any(report.unreadable for report in maps) else 0


def _put_on_record(log: Path, report: MapReport, quiet: bool) -> None:
    earlier = earlier_runs(log, report.model_sha256)
    if earlier:
        notice(f"{os.fsdecode(log)} knows this model file: {earlier[-1]}", quiet=quiet)
    append_log(log, report)
    notice(f"put on record in {os.fsdecode(log)}", quiet=quiet)


def _print_tables(
    machine: Machine,
    latency: LatencyReport | None,
    maps: Sequence[MapReport],
    search: SearchReport | None,
) -> None:
    from sbtk_cli import bench_output

    bench_output.print_machine(machine)
    if latency is not None:
        bench_output.print_latency(latency)
    if maps:
        bench_output.print_map(maps)
    if search is not None:
        bench_output.print_search(search)


def _draw(
    plot: Path,
    machine: Machine,
    latency: LatencyReport | None,
    maps: Sequence[MapReport],
    search: SearchReport | None,
) -> None:
    from sbtk_cli import bench_plots

    panels: list[bench_plots.Panel] = []
    if latency is not None:
        panels += [bench_plots.stages_panel(latency), bench_plots.throughput_panel(latency)]
    panels += [bench_plots.classes_panel(report) for report in maps]
    if search is not None:
        panels.append(bench_plots.recall_panel(search))
    bench_plots.save_plot(plot, panels, machine)
