"""What `sbtk bench` measures, and how the results are handed over."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from sbtk_cli.bench_csv import write_csv
from sbtk_cli.bench_data import Classes, measured_images
from sbtk_cli.bench_subjects import pictures_of, searched
from sbtk_cli.bench_torch import torch_beside
from sbtk_cli.output import answer_json, notice, progress
from sbtk_runtime.bench.engines import ALL, Wanted
from sbtk_runtime.bench.latency import Beside, LatencyReport, measure_latency
from sbtk_runtime.bench.map import LabelledSet, MapReport, append_log, earlier_runs, measure_map
from sbtk_runtime.bench.search import SearchReport
from sbtk_runtime.bench.turns import QUICK, USUAL
from sbtk_runtime.bundle import Bundle
from sbtk_runtime.embedding.embed import Embedder
from sbtk_runtime.errors import BadConfig, BadData
from sbtk_runtime.machine import Machine
from sbtk_runtime.manifest import BundleManifest, Precision
from sbtk_runtime.retrieval.metrics import AP_CUTS, PRECISION_CUTS
from sbtk_runtime.retrieval.protocol import ZERO_SHOT, Protocol

#: In a checkout of sbtk, runs on unseen classes are put on record here without being asked.
UNSEEN_LOG = Path("benchmarks/unseen.log")

_QUICK_BATCHES = (1, 8)


@dataclass(frozen=True)
class Chosen:
    """The model, and what runs it, as `--engine`, `--device` and `--threads` take it."""

    bundle: Bundle
    engine: str
    device: str | None
    threads: int | None
    quiet: bool


@dataclass(frozen=True)
class Extent:
    """How much is measured beside the engines' speed; `None` leaves it to the other choices.

    Attributes:
        with_torch: torch eager, where torch is installed.
        with_compiled: torch compiled; by default with `--engine all` and not `is_quick`.
        with_map: mAP; by default with data and not `is_quick`.
        is_quick: measure for seconds instead of minutes.
    """

    with_torch: bool = True
    with_compiled: bool | None = None
    with_map: bool | None = None
    is_quick: bool = False


def run_latency(
    chosen: Chosen,
    *,
    precision: Precision | None = None,
    batches: tuple[int, ...] = (),
    data: Path | None = None,
    gallery: Path | None = None,
    extent: Extent = Extent(),
) -> LatencyReport:
    """Returns latency and speed; `precision=None` are all, `batches=()` the usual ones."""
    manifest = chosen.bundle.manifest
    said = partial(notice, quiet=chosen.quiet)
    labelled, notes = _labelled(manifest, data, extent)
    beside = Beside()
    if extent.with_torch:
        is_compiled = extent.with_compiled
        if is_compiled is None:
            is_compiled = chosen.engine == ALL and not extent.is_quick
        beside = torch_beside(manifest, with_compiled=is_compiled, said=said)
    with searched(gallery, manifest) as (search, searched_named):
        report = measure_latency(
            chosen.bundle,
            pictures_of(data),
            search,
            searched_named,
            wanted=Wanted(
                chosen.engine,
                chosen.device,
                precision,
                chosen.threads,
                batches or (_QUICK_BATCHES if extent.is_quick else Wanted.batches),
            ),
            beside=beside,
            labelled=labelled,
            effort=QUICK if extent.is_quick else USUAL,
            progress=said,
        )
    return replace(report, notes=(*notes, *report.notes))


def run_map(
    chosen: Chosen,
    data: Path,
    *,
    precisions: Sequence[Precision] = (),
    batch: int = 32,
    split: str | None = None,
    classes: Classes = "unseen",
    protocol: Protocol = ZERO_SHOT,
    cuts: tuple[int, ...] = (),
    log: Path | None = None,
) -> list[MapReport]:
    """Returns a report for each precision, `()` being the engine's own choice; logs each.

    `cuts` are the ranks k of mAP@k and P@k, `()` the usual ones.
    """
    images = measured_images(data, chosen.bundle.manifest, split, classes, protocol)
    for line in images.notices:
        notice(line, quiet=chosen.quiet)
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
                embedder,
                images.sketches,
                images.photos,
                of=images.of,
                protocol=images.protocol,
                learnt_on=images.learnt_on,
                ap_cuts=cuts or AP_CUTS,
                precision_cuts=cuts or PRECISION_CUTS,
                progress=advance,
            )
        for line in _left_out(report, cuts):
            notice(line, quiet=chosen.quiet)
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
    csv: Path | None = None,
    plot: Path | None = None,
    as_json: bool = False,
) -> int:
    """Prints the results as tables or as one JSON line, and returns the exit code.

    The speeds also go to the file `csv`, and everything into the picture `plot`.
    """
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
    if csv is not None and latency is not None:
        write_csv(csv, latency, machine)
    if plot is not None:
        _draw(plot, machine, latency, maps, search)
    return 3 if any(report.unreadable for report in maps) else 0


def _left_out(report: MapReport, cuts: tuple[int, ...]) -> list[str]:
    """Returns sentences about figures that were asked for and cannot be."""
    lines = [
        f"no P@{k}: the gallery has {report.photos:,} photos" for k in cuts if k > report.photos
    ]
    if report.rules.ties == "expected":
        lines.append("no VOC figures: the envelope of equal scores has no expected value")
    return lines


def _labelled(
    manifest: BundleManifest, data: Path | None, extent: Extent
) -> tuple[LabelledSet | None, list[str]]:
    """Returns the pictures to measure mAP on, and a note where that was not asked for in vain.

    They are of the model's validation classes: measuring unseen ones is `sbtk bench map`'s.
    """
    if extent.with_map is False or (extent.with_map is None and extent.is_quick):
        return None, []
    if data is None:
        if extent.with_map:
            raise BadConfig("--map without data", "--data DATA, or SBTK_DATA")
        return None, ["mAP not measured: no --data, and no SBTK_DATA"]
    try:
        return measured_images(data, manifest, None, "validation"), []
    except BadData as problem:
        if extent.with_map:
            raise
        return None, [f"mAP not measured: {problem.found}"]


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
    from sbtk_cli import bench_plots, bench_speed_plots

    panels: list[bench_plots.Panel] = []
    if latency is not None:
        panels += [bench_plots.stages_panel(latency), *bench_speed_plots.speed_panels(latency)]
    panels += [bench_plots.classes_panel(report) for report in maps]
    if search is not None:
        panels.append(bench_plots.recall_panel(search))
    bench_plots.save_plot(plot, panels, machine)
