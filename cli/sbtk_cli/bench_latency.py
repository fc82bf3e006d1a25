"""`sbtk bench latency`: what each engine and precision gives and costs, by batch."""

from __future__ import annotations

from pathlib import Path

import click

from sbtk_cli import bench_options, options
from sbtk_runtime.manifest import PRECISIONS, Precision


@click.command("latency")
@bench_options.of_all_engines
@click.option(
    "--precision",
    type=click.Choice(PRECISIONS),
    help="Only this one.  [default: all in the bundle]",
)
@bench_options.batches
@bench_options.torch
@bench_options.compiled
@click.option(
    "--data",
    type=options.PATH,
    envvar="SBTK_DATA",
    show_envvar=True,
    metavar="DATA",
    help="Decode images of DATA/sketch and DATA/photo, and measure mAP on the model's validation "
    "classes among them.  [default: generated pictures, no mAP]",
)
@click.option(
    "--map/--no-map",
    "with_map",
    default=None,
    help="Measure mAP of each engine and precision, and how far it is from FP32's.  "
    "[default: with DATA, without --quick]",
)
@bench_options.gallery
@bench_options.quick
@click.option(
    "--csv",
    type=options.PATH,
    metavar="FILE",
    help="Write a row for each engine, precision and batch, with everything measured.",
)
def command(
    model: str | None,
    engine: str,
    device: str | None,
    precision: Precision | None,
    threads: int | None,
    batches: tuple[int, ...],
    with_torch: bool,
    with_compiled: bool | None,
    data: Path | None,
    with_map: bool | None,
    gallery: Path | None,
    quick: bool,
    csv: Path | None,
    plot: Path | None,
    as_json: bool,
    quiet: bool,
) -> int:
    """Measure decode, preprocess, engine and search, and images per second by batch.

    The engine is measured in every precision of the bundle, by turns beside torch eager on the
    same device and threads, and beside the fastest INT8 and FP32 matrix products of this CPU,
    which say how quick an engine could be; memory in a process of its own. --engine all measures
    every engine that works, and torch compiled.
    """
    from sbtk_cli.bench_runs import Extent, hand_over, run_latency
    from sbtk_runtime.machine import this_machine

    bench_options.check_plot(plot)
    if csv is not None:
        options.check_output_file(csv)
    machine = this_machine()
    report = run_latency(
        bench_options.chosen(model, engine, device, threads, quiet),
        precision=precision,
        batches=batches,
        data=data,
        gallery=gallery,
        extent=Extent(with_torch, with_compiled, with_map, quick),
    )
    return hand_over(machine, latency=report, csv=csv, plot=plot, as_json=as_json)
