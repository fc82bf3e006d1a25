"""`sbtk export`: from a training run to a model bundle that was compared with torch."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from sbtk_cli import options, output

if TYPE_CHECKING:
    from sbtk_runtime.bundle import Bundle
    from sbtk_runtime.manifest import Precision

_HELP = """Turn a training run into a model bundle.

RUN is a run folder; by default the newest in ./runs. Makes model.fp32.onnx, model.fp16.onnx and
model.int8.onnx, the model card, the manifest and the student's weights.

Ends by running every file with sbtk's own engine beside torch, on at least 200 pictures of seen
classes, half of them sketches. A model that is too far from torch fails the export, and nothing
is written. INT8 is calibrated on other pictures of the training classes.

\b
sbtk export
sbtk export runs/2026-11-21-sbtknet -o bundles/mine
sbtk export --int8               FP32 and INT8 only
sbtk export --slim               INT8 and FP16 only, to be shipped
"""


@click.command(help=_HELP)
@click.argument("run", type=options.PATH, required=False)
@click.option("--fp16", is_flag=True, help="Make FP16.  [default: make both FP16 and INT8]")
@click.option("--int8", is_flag=True, help="Make INT8.  [default: make both FP16 and INT8]")
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
    help="Folder to make.  [default: bundles/NAME]",
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
@options.json
@options.quiet
def command(
    run: Path | None,
    fp16: bool,
    int8: bool,
    slim: bool,
    target: Path | None,
    images: Path | None,
    name: str | None,
    as_json: bool,
    quiet: bool,
) -> int:
    """Runs `sbtk export`."""
    # Cheap first: a name that cannot be is told before torch is imported.
    from sbtk_export.bundle_writer import checked_name, require_absent

    if target is not None:
        require_absent(target)
    if name is not None:
        checked_name(name)
    from sbtk_export.export import ExportPlan, export_run
    from sbtk_train.checkpoint import load_run, newest_run

    folder = newest_run() if run is None else run
    trained = load_run(folder)
    name = name or checked_name((target or folder).absolute().name)
    plan = ExportPlan(target or Path("bundles") / name, name, _precisions(fp16, int8), slim)
    bundle = export_run(trained, plan, images, lambda text: output.notice(text, quiet=quiet))
    _print(bundle, as_json)
    return 0


def _precisions(fp16: bool, int8: bool) -> tuple[Precision, ...]:
    if fp16 == int8:
        return ("fp32", "fp16", "int8")
    return ("fp32", "fp16") if fp16 else ("fp32", "int8")


def _print(bundle: Bundle, as_json: bool) -> None:
    manifest = bundle.manifest
    if as_json:
        value = {"folder": str(bundle.folder), "model_id": manifest.model_id}
        sizes = {name: record.size_bytes for name, record in manifest.files.items()}
        output.answer_json(value | {"files": sizes, "parity": manifest.parity})
        return
    rows = [("", "COSINE MIN", "MEAN", "|NORM-1|", "TOP 10", "mAP", "OF TORCH")]
    for precision, parity in manifest.parity.items():
        rows.append(
            (
                precision,
                f"{parity['cosine_min']:.5f}",
                f"{parity['cosine_mean']:.5f}",
                f"{parity['norm_error']:.0e}",
                f"{parity['top10_agreement']:.1%}",
                f"{parity['map_model']:.4f}",
                f"{parity['map_torch']:.4f}",
            )
        )
    size_bytes = sum(record.size_bytes for record in manifest.files.values())
    shown = output.shown_relative(bundle.folder)
    output.answer(output.plain_table(rows))
    output.answer(
        f"{shown}: {manifest.model_id}, {' '.join(bundle.precisions)}, "
        f"{output.size_text(size_bytes)}"
    )
