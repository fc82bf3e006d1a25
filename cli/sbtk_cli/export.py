"""`sbtk export`: make a model bundle from a training run and compare it with torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sbtk_cli import options, output
from sbtk_cli.engine import build_status
from sbtk_runtime.files import printable_name

if TYPE_CHECKING:
    from sbtk_export.export import Variant
    from sbtk_export.plans import BuiltEngine
    from sbtk_runtime.bundle import Bundle

_HELP = """Turn a training run into a model bundle.

RUN is a run folder, by default the newest in ./runs; with --regions also a bundle. Writes
model.fp32.onnx, model.fp16.onnx and model.int8.onnx, the model card, the manifest and the student's
weights, and where TensorRT works also model.int8.trt.onnx, INT8 in the form that TensorRT needs.

Every file is then run by sbtk's own engine and compared with torch on up to 200 images of seen
classes (at least 32, half of them sketches). If a model differs too much, the export fails and
nothing is written. INT8 is calibrated on other images of the training classes (at least 32), and
gives the same results on all processors.

Where TensorRT works, plans for FP16 and TensorRT's INT8 are then built for this machine, as by
'sbtk engine build', and compared with torch too.

\b
sbtk export
sbtk export runs/2026-11-21-sbtknet -o bundles/mine
sbtk export --int8               FP32 and INT8 only
sbtk export --fp16 --int8-trt    FP32, and the two forms for TensorRT
sbtk export --slim               INT8 and FP16 only, for distribution
sbtk export --bits 64            all of them, and 64-bit codes for small galleries
sbtk export bundles/mine --regions              check that a bundle embeds regions
sbtk export bundles/mine --regions -o models/   write its graphs of regions, for other programs
"""

_HEADING = ("", "COSINE MIN", "MEAN", "|NORM-1|", "TOP 10", "mAP", "OF TORCH")


@click.command(help=_HELP)
@click.argument("run", type=options.PATH, required=False)
@click.option("--fp16", is_flag=True, help="Make FP16.  [default: make all of them]")
@click.option("--int8", is_flag=True, help="Make INT8 for ONNX Runtime and OpenVINO.")
@click.option(
    "--int8-trt",
    is_flag=True,
    help="Make INT8 for TensorRT.  [default: where TensorRT works, but not with --slim]",
)
@click.option(
    "--bits",
    type=options.Bits(),
    multiple=True,
    metavar="B",
    help="Also fit binary codes of B bits on sketches and photos of the training classes; "
    "repeatable.",
)
@click.option(
    "--slim",
    is_flag=True,
    help="Leave FP32 and the student's weights out of the bundle; 80 MB at most.",
)
@click.option(
    "-o",
    "target",
    type=options.PATH,
    metavar="BUNDLE",
    help="Folder to create.  [default: bundles/NAME]",
)
@click.option(
    "--images",
    type=options.PATH,
    metavar="DATA",
    help="Calibrate and compare on DATA/{sketch,photo}/<class>/*.  [default: the run's data]",
)
@click.option(
    "--name", metavar="NAME", help="Name of the model.  [default: BUNDLE's or else RUN's]"
)
@click.option(
    "--opset",
    type=options.IntRange(18, 23),
    metavar="N",
    help="Version of ONNX's operators, 18 to 23.  [default: the exporter's, 20]",
)
@options.regions(
    "Also compare the embeddings of N regions a photo (9 or 16, by default 16) with torch's and "
    "record that in manifest and card. If RUN is a bundle, do only that, and compare with its most "
    "exact file; with -o DIR instead write ONNX files that return embeddings (images, N, D)."
)
@click.option(
    "--unseen-log",
    type=options.PATH,
    metavar="FILE",
    help="Instead of exporting: copy the bundle's mAP on unseen classes from FILE ('sbtk bench map "
    "--log') into its manifest and card; RUN is the bundle.",
)
@options.json
@options.quiet
def command(
    run: Path | None,
    fp16: bool,
    int8: bool,
    int8_trt: bool,
    bits: tuple[int, ...],
    slim: bool,
    target: Path | None,
    images: Path | None,
    name: str | None,
    opset: int | None,
    regions: int | None,
    unseen_log: Path | None,
    as_json: bool,
    quiet: bool,
) -> int:
    """Run `sbtk export`."""
    if unseen_log is not None:
        return _add_unseen_metric(run, unseen_log, as_json)
    if regions is not None and run is not None and (bundle := _as_bundle(run)) is not None:
        return _regions_of_bundle(bundle, regions, target, images, as_json=as_json, quiet=quiet)
    # Cheap checks first: a bad name is refused before torch is imported.
    from sbtk_export.export import require_absent, validate_name

    if target is not None:
        require_absent(target)
    if name is not None:
        validate_name(name)
    from sbtk_export.export import ExportPlan, export_run
    from sbtk_export.plans import build_engines, find_plan_builder
    from sbtk_train.runs.checkpoint import load_run, newest_run

    def notify(text: str) -> None:
        output.notice(text, quiet=quiet)

    folder = newest_run() if run is None else run
    trained = load_run(folder)
    name = name or validate_name((target or folder).absolute().name)
    made: tuple[tuple[Variant, bool], ...] = (
        ("fp16", fp16),
        ("int8", int8),
        ("int8.trt", int8_trt),
    )
    requested = [variant for variant, is_requested in made if is_requested]
    is_for_gpu = not requested or "fp16" in requested or "int8.trt" in requested
    builder = find_plan_builder(notify) if is_for_gpu else None
    variants = variants_to_make(requested, for_tensorrt=builder is not None and not slim)
    plan = ExportPlan(target or Path("bundles") / name, name, variants, slim, bits, opset)
    exported = export_run(trained, plan, images, notify)
    engines: list[BuiltEngine] = []
    if builder is not None:
        with build_status(quiet=quiet) as status:
            engines = build_engines(exported, variants, builder, status.notify, status.progress)
    if regions is None:
        _print(exported.bundle, engines, as_json)
        return 0
    from sbtk_export.regions import add_regions
    from sbtk_runtime.bundle import Bundle
    from sbtk_runtime.regions import grid_of

    folder = exported.bundle.folder
    data = images or Path(trained.config.data)
    add_regions(folder, grid_of(regions), data, notify, trained.student)
    _print(Bundle.open(folder), engines, as_json)
    return 0


def _as_bundle(run: Path) -> Path | None:
    """Return the folder of a bundle that was named in place of a run; `None` for a run."""
    from sbtk_runtime.bundle import Bundle, bundle_folders
    from sbtk_runtime.manifest import MANIFEST_NAME

    is_named = str(run) == run.name and run.name in {path.name for path in bundle_folders()}
    return Bundle.open(run).folder if is_named or (run / MANIFEST_NAME).exists() else None


def _regions_of_bundle(
    folder: Path,
    count: int,
    target: Path | None,
    images: Path | None,
    *,
    as_json: bool,
    quiet: bool,
) -> int:
    from sbtk_export.regions import add_regions, write_region_models
    from sbtk_runtime.bundle import Bundle
    from sbtk_runtime.regions import grid_of

    shown = output.shown_relative(folder)
    if target is not None:
        paths = write_region_models(Bundle.open(folder), grid_of(count), target)
        if as_json:
            output.answer_json({"files": [str(path) for path in paths]})
        else:
            output.answer(f"{shown}: {', '.join(printable_name(path) for path in paths)}")
        return 0
    found = add_regions(
        folder, grid_of(count), images, lambda text: output.notice(text, quiet=quiet)
    )
    if as_json:
        output.answer_json({"bundle": str(folder), "metrics": found})
        return 0
    for name, metric in found.items():
        figures = f"{metric['value']:.5f}, mean {metric['mean']:.5f}"
        output.answer(f"{shown}: {name.removeprefix('regions_')}: smallest cosine {figures}")
    return 0


def _add_unseen_metric(bundle: Path | None, log: Path, as_json: bool) -> int:
    from sbtk_export.export import add_unseen_metric

    if bundle is None:
        raise click.UsageError("--unseen-log needs the bundle's folder as RUN.")
    value = add_unseen_metric(bundle, log)
    if as_json:
        output.answer_json({"bundle": str(bundle), "unseen_map": value})
    else:
        output.answer(f"{printable_name(bundle)}: mAP@all {value:.4f} on unseen classes")
    return 0


def variants_to_make(requested: Sequence[Variant], *, for_tensorrt: bool) -> tuple[Variant, ...]:
    """Return the variants to make: the requested ones, or else all that are useful here."""
    if requested:
        return ("fp32", *requested)
    return ("fp32", "fp16", "int8", "int8.trt") if for_tensorrt else ("fp32", "fp16", "int8")


def _print(bundle: Bundle, engines: Sequence[BuiltEngine], as_json: bool) -> None:
    manifest = bundle.manifest
    if as_json:
        value = {"folder": str(bundle.folder), "model_id": manifest.model_id}
        sizes = {name: record.size_bytes for name, record in manifest.files.items()}
        built = {"engines": [asdict(engine) for engine in engines]}
        figures = {"parity": manifest.parity, "metrics": manifest.metrics}
        output.answer_json(value | {"files": sizes, "bits": list(bundle.bits)} | figures | built)
        return
    rows: list[tuple[str, ...]] = [_HEADING]
    rows += [_row(variant, parity) for variant, parity in manifest.parity.items()]
    for engine in engines:
        if engine.parity is not None:
            rows.append(_row(f"{engine.record.precision} plan", asdict(engine.parity)))
    size_bytes = sum(record.size_bytes for record in manifest.files.values())
    shown = output.shown_relative(bundle.folder)
    output.answer(output.plain_table(rows))
    output.answer(
        f"{shown}: {manifest.model_id}, {' '.join(bundle.precisions)}, "
        f"{output.size_text(size_bytes)}"
    )
    for length in bundle.bits:
        figure = manifest.metrics[f"codes_{length}_map"]
        output.answer(
            f"{length}-bit codes: mAP@all {figure['value']:.4f}, where the embeddings have "
            f"{figure['of_embeddings']:.4f}"
        )
    for engine in engines:
        record = engine.record
        output.answer(
            f"{record.precision} plan for {record.module} {record.version}: "
            f"{output.size_text(record.plan_bytes)}, built in "
            f"{output.duration_text(record.build_s)}"
            + (f", not run: {engine.not_run}" if engine.not_run else "")
        )


def _row(title: str, parity: Mapping[str, Any]) -> tuple[str, ...]:
    return (
        title,
        f"{parity['cosine_min']:.5f}",
        f"{parity['cosine_mean']:.5f}",
        f"{parity['norm_error']:.0e}",
        f"{parity['top10_agreement']:.1%}",
        f"{parity['map_model']:.4f}",
        f"{parity['map_torch']:.4f}",
    )
