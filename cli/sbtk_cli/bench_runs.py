"""Runs of `sbtk bench`, and output of their results."""

from __future__ import annotations

import contextlib
import importlib.util
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from sbtk_cli.bench_data import Classes, load_labelled_set
from sbtk_cli.bench_output import write_csv
from sbtk_cli.options import DEFAULT_GALLERY, existing_gallery
from sbtk_cli.output import answer_json, notice, progress
from sbtk_runtime.bundle import Bundle
from sbtk_runtime.embedding.embedder import Embedder
from sbtk_runtime.engines.base import EngineOptions
from sbtk_runtime.errors import BadConfig, BadData, BadImage
from sbtk_runtime.evaluation.bench.floor import Product, ProductKind
from sbtk_runtime.evaluation.bench.interleave import QUICK, USUAL, Embeddings, Search
from sbtk_runtime.evaluation.bench.latency import (
    BATCHES,
    Baselines,
    BenchImages,
    LatencyReport,
    measure_latency,
)
from sbtk_runtime.evaluation.bench.map import (
    LabelledSet,
    MapReport,
    append_log,
    find_earlier_runs,
    measure_map,
)
from sbtk_runtime.evaluation.bench.search import SearchReport
from sbtk_runtime.evaluation.bench.speed import ALL, Contender
from sbtk_runtime.evaluation.metrics import AP_CUTS, PRECISION_CUTS
from sbtk_runtime.evaluation.protocol import ZERO_SHOT, Protocol
from sbtk_runtime.gallery.gallery import Gallery
from sbtk_runtime.generated_inputs import (
    IMAGES_DESCRIBED,
    clustered_named,
    clustered_vectors,
    generate_photos,
    generate_sketches,
)
from sbtk_runtime.images import read_image_bytes
from sbtk_runtime.machine import Machine
from sbtk_runtime.manifest import MANIFEST_NAME, BundleManifest, Precision
from sbtk_runtime.preprocess import CROPPED, Kind
from sbtk_train.data.dataset import read_dataset

#: Default log of evaluations on unseen classes, in a checkout of sbtk.
UNSEEN_LOG = Path("benchmarks/unseen.log")

_QUICK_BATCHES = (1, 8)


@dataclass(frozen=True)
class BenchScope:
    """What to measure besides the speed of engines; `None` depends on the other options.

    Attributes:
        with_torch: torch eager, if installed.
        with_compiled: torch compiled; by default with `--engine all` and without `is_quick`.
        with_map: mAP; by default with data and without `is_quick`.
        is_quick: measure for seconds instead of minutes.
    """

    with_torch: bool = True
    with_compiled: bool | None = None
    with_map: bool | None = None
    is_quick: bool = False


def run_latency(
    bundle: Bundle,
    options: EngineOptions,
    *,
    batches: tuple[int, ...] = (),
    data: Path | None = None,
    gallery: Path | None = None,
    scope: BenchScope = BenchScope(),
    quiet: bool = False,
) -> LatencyReport:
    """Measure latency and speed, by default of all precisions at the usual batch sizes."""
    manifest = bundle.manifest
    notify = partial(notice, quiet=quiet)
    labelled, notes = _load_labelled(manifest, data, scope)
    baselines = Baselines()
    if scope.with_torch:
        is_compiled = scope.with_compiled
        if is_compiled is None:
            is_compiled = options.engine == ALL and not scope.is_quick
        baselines = torch_baselines(manifest, with_compiled=is_compiled, notify=notify)
    with open_search(gallery, manifest) as (search, searched_named):
        report = measure_latency(
            bundle,
            load_images(data),
            search,
            searched_named,
            options=options,
            batches=batches or (_QUICK_BATCHES if scope.is_quick else BATCHES),
            baselines=baselines,
            labelled=labelled,
            config=QUICK if scope.is_quick else USUAL,
            progress=notify,
        )
    return replace(report, notes=(*notes, *report.notes))


def run_map(
    bundle: Bundle,
    options: EngineOptions,
    data: Path,
    *,
    precisions: Sequence[Precision] = (),
    split: str | None = None,
    classes: Classes = "unseen",
    protocol: Protocol = ZERO_SHOT,
    cuts: tuple[int, ...] = (),
    log: Path | None = None,
    quiet: bool = False,
) -> list[MapReport]:
    """Measure and log the quality of each precision, by default of the engine's own choice.

    `cuts` are the ranks k of mAP@k and P@k, by default the usual ones.
    """
    images = load_labelled_set(data, bundle.manifest, split, classes, protocol)
    for line in images.notices:
        notice(line, quiet=quiet)
    if log is None and classes == "unseen" and UNSEEN_LOG.is_file():
        log = UNSEEN_LOG
    reports = []
    for precision in precisions or (None,):
        embedder = Embedder(bundle, options, precision=precision)
        with embedder, progress(f"mAP on {images.of}", quiet=quiet) as advance:
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
        for line in _list_missing(report, cuts):
            notice(line, quiet=quiet)
        for line in report.unreadable:
            notice(f"skipped {line}", quiet=quiet)
        if log is not None:
            _append_to_log(log, report, quiet)
        reports.append(report)
    return reports


def emit_results(
    machine: Machine,
    *,
    latency: LatencyReport | None = None,
    maps: Sequence[MapReport] = (),
    search: SearchReport | None = None,
    csv: Path | None = None,
    plot: Path | None = None,
    as_json: bool = False,
) -> int:
    """Print the results as tables or as one JSON line, and return the exit code.

    Speeds are also written to `csv`, and all results plotted to `plot`.
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
        _save_plot(plot, machine, latency, maps, search)
    return 3 if any(map(_is_incomplete, maps)) else 0


def _is_incomplete(report: MapReport) -> bool:
    """Return whether images were left out, other than by a draw of seen images."""
    is_drawn = report.rules.setting == "generalised-20"
    return bool(report.unreadable) or (report.unanswerable > 0 and not is_drawn)


def _list_missing(report: MapReport, cuts: tuple[int, ...]) -> list[str]:
    """Return messages about requested metrics that cannot be computed."""
    lines = [
        f"no P@{k}: the gallery has only {report.photos:,} photos"
        for k in cuts
        if k > report.photos
    ]
    if report.unanswerable:
        queries = "sketches" if report.rules.queries == "sketch" else "photos"
        lines.append(f"{report.unanswerable} {queries} without a photo of their class left out")
    if report.rules.ties == "expected":
        lines.append("no VOC metrics: not defined as expected values over ties")
    return lines


def _load_labelled(
    manifest: BundleManifest, data: Path | None, scope: BenchScope
) -> tuple[LabelledSet | None, list[str]]:
    """Return images of the model's validation classes to measure mAP on, or a note.

    Unseen classes are only measured by `sbtk bench map`.
    """
    if scope.with_map is False or (scope.with_map is None and scope.is_quick):
        return None, []
    if data is None:
        if scope.with_map:
            raise BadConfig("--map without data", "--data DATA, or SBTK_DATA")
        return None, ["mAP not measured: no --data or SBTK_DATA"]
    try:
        return load_labelled_set(data, manifest, None, "validation"), []
    except BadData as problem:
        if scope.with_map:
            raise
        return None, [f"mAP not measured: {problem.found}"]


def _append_to_log(log: Path, report: MapReport, quiet: bool) -> None:
    earlier = find_earlier_runs(log, report.model_sha256)
    if earlier:
        notice(f"{os.fsdecode(log)} already has this model file: {earlier[-1]}", quiet=quiet)
    append_log(log, report)
    notice(f"appended to {os.fsdecode(log)}", quiet=quiet)


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


def _save_plot(
    plot: Path,
    machine: Machine,
    latency: LatencyReport | None,
    maps: Sequence[MapReport],
    search: SearchReport | None,
) -> None:
    from sbtk_cli import bench_plots

    panels: list[bench_plots.Panel] = []
    if latency is not None:
        panels += [bench_plots.stages_panel(latency), *bench_plots.speed_panels(latency)]
    panels += [bench_plots.classes_panel(report) for report in maps]
    if search is not None:
        panels.append(bench_plots.recall_panel(search))
    bench_plots.save_plot(plot, panels, machine)


_IMAGES = 32
_SYNTHETIC_ROWS = 10_000
_HITS = 10


def load_images(data: Path | None) -> BenchImages:
    """Return evenly spaced sketches and photos of a data set, or generated ones."""
    if data is None:
        return BenchImages(generate_sketches(8), generate_photos(8), IMAGES_DESCRIBED)
    images = read_dataset(data)
    sketches, photos = (
        _read_images(images.sketch_files, "sketch"),
        _read_images(images.photos, "photo"),
    )
    if not sketches or not photos:
        raise BadData(f"no readable sketches or photos in {data}", "at least one of each")
    named = f"{len(sketches)} sketches and {len(photos)} photos of {data.name}"
    return BenchImages(sketches, photos, named)


@contextlib.contextmanager
def open_search(folder: Path | None, manifest: BundleManifest) -> Iterator[tuple[Search, str]]:
    """Yield the last stage of a query, and a description of what it searches.

    Args:
        folder: a gallery; if `None`, the default one if it exists and has this model, else exact
            search over synthetic vectors.
        manifest: manifest of the model.
    """
    gallery = _gallery(folder, manifest)
    if gallery is not None:
        with gallery:
            named = f"top {_HITS} of {gallery.count:,} photos in a gallery"
            yield lambda row: gallery.search(row, _HITS), named
        return
    vectors = clustered_vectors(_SYNTHETIC_ROWS, manifest.dim)

    def search(row: Embeddings) -> object:
        scores = vectors @ row
        best = np.argpartition(scores, -_HITS)[-_HITS:]
        return best[np.argsort(-scores[best])]

    named = clustered_named(_SYNTHETIC_ROWS, manifest.dim, seed=0)
    yield search, f"top {_HITS} of {named}, exact"


def _read_images(paths: tuple[Path, ...], kind: Kind) -> list[bytes]:
    """Return the contents of up to `_IMAGES` evenly spaced files, without unreadable ones."""
    contents = []
    for path in paths[:: max(1, len(paths) // _IMAGES)][:_IMAGES]:
        with contextlib.suppress(BadImage):
            content = read_image_bytes(path)
            CROPPED.prepare(content, kind)
            contents.append(content)
    return contents


def _gallery(folder: Path | None, manifest: BundleManifest) -> Gallery | None:
    if folder is not None:
        return Gallery.open(existing_gallery(folder))
    if not (DEFAULT_GALLERY / MANIFEST_NAME).is_file():
        return None
    gallery = Gallery.open(DEFAULT_GALLERY)
    if gallery.manifest.model_id == manifest.model_id:
        return gallery
    gallery.close()
    return None


def torch_baselines(
    manifest: BundleManifest, *, with_compiled: bool, notify: Callable[[str], None]
) -> Baselines:
    """Return torch as a baseline for the engines of a model; nothing without torch.

    Args:
        manifest: manifest of the model; the baseline has random weights.
        with_compiled: also measure torch compiled, with channels_last.
        notify: called with messages about slow steps and missing libraries.
    """
    if any(importlib.util.find_spec(name) is None for name in ("torch", "torchvision")):
        notify("torch is not installed: no comparison")
        return Baselines()
    return Baselines(partial(_contenders, manifest, with_compiled, notify), _products)


def _contenders(
    manifest: BundleManifest,
    with_compiled: bool,
    notify: Callable[[str], None],
    threads: int,
    devices: Sequence[str],
) -> Iterator[Contender]:
    import torch

    from sbtk_train.models.eager import (
        TorchSettings,
        make_compiled_run,
        make_eager_run,
        make_random_student,
    )

    student = make_random_student(manifest.method, manifest.backbone, manifest.dim)
    for device in devices:
        if device != "cpu" and not torch.cuda.is_available():
            notify(f"torch has no working CUDA: no comparison on {device}")
            continue
        where = "" if device == "cpu" else f" {device}"
        # Half precision is slow on most CPUs.
        best = TorchSettings(threads, device, "fp32" if device == "cpu" else "fp16", True)
        yield Contender(
            f"torch eager{where}",
            "fp32",
            device,
            make_eager_run(student, TorchSettings(threads, device)),
            "eager",
        )
        yield Contender(
            f"torch eager channels_last{where}",
            best.precision,
            device,
            make_eager_run(student, best),
            "other",
        )
        if with_compiled:
            yield Contender(
                f"torch compiled{where}",
                best.precision,
                device,
                make_compiled_run(student, best, notify),
                "compiled",
            )


def _products(kind: ProductKind, sizes: Sequence[int], threads: int) -> Iterator[Product]:
    from sbtk_train.models.eager import make_product_run

    for size in sizes:
        yield Product("torch", kind, size, make_product_run(kind, size, threads))
