"""`sbtk bench map`: retrieval quality of a model on labelled images."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from sbtk_cli import bench_options, options, protocol_options
from sbtk_runtime.errors import BadConfig
from sbtk_runtime.manifest import PRECISIONS, Precision

if TYPE_CHECKING:
    from sbtk_cli.bench_data import Classes
    from sbtk_runtime.itq import Rotation
    from sbtk_runtime.rerank import Rerank
    from sbtk_runtime.retrieval.protocol import Distance, FittedOn, QueryKind, Setting, Ties


@click.command("map")
@click.argument("data", type=options.PATH, envvar="SBTK_DATA", required=False)
@bench_options.of_a_model
@click.option(
    "--precision",
    "precisions",
    type=click.Choice(PRECISIONS),
    multiple=True,
    help="Which ONNX file to measure; may be repeated.  [default on a CPU: int8]",
)
@options.batch
@click.option(
    "--split",
    metavar="NAME",
    help="Which classes are unseen: a published split, random:N:SEED, or a file.  "
    "[default: the model's own]",
)
@click.option(
    "--classes",
    type=click.Choice(["unseen", "validation"]),
    default="unseen",
    show_default=True,
    help="The split's unseen classes, or seen ones that were held out from training.",
)
@protocol_options.protocol
@click.option(
    "--log",
    type=options.PATH,
    metavar="FILE",
    help="Append date, bundle, protocol and figure to FILE.  [default: for unseen classes, "
    "benchmarks/unseen.log if it exists]",
)
def command(
    data: Path | None,
    model: str | None,
    engine: str,
    device: str | None,
    precisions: tuple[Precision, ...],
    threads: int | None,
    batch: int,
    split: str | None,
    classes: Classes,
    queries: QueryKind,
    setting: Setting,
    distance: Distance | None,
    ties: Ties,
    keep_duplicates: bool,
    bits: int | None,
    itq_on: FittedOn | None,
    itq_rotation: Rotation | None,
    rerank: Rerank,
    cuts: tuple[int, ...],
    log: Path | None,
    plot: Path | None,
    as_json: bool,
    quiet: bool,
) -> int:
    """Measure mAP and precision of sketches against photos in DATA.

    DATA is a data set in any layout that 'sbtk data check' knows, such as sketch/<class>/* beside
    photo/<class>/*; it is SBTK_DATA when left out. Every figure is printed with its definition,
    and --json has the rules that it was taken by. Exit code 3: some images could not be read.
    """
    if data is None:
        raise BadConfig(
            "no data to measure on", "a folder, or SBTK_DATA", "sbtk bench map DATA --split SK-YE"
        )
    from sbtk_cli.bench_runs import hand_over, run_map
    from sbtk_runtime.machine import this_machine

    bench_options.check_plot(plot)
    protocol = protocol_options.chosen_protocol(
        queries, setting, distance, ties, keep_duplicates, bits, itq_on, itq_rotation, rerank
    )
    machine = this_machine()
    reports = run_map(
        bench_options.chosen(model, engine, device, threads, quiet),
        data,
        precisions=precisions,
        batch=batch,
        split=split,
        classes=classes,
        protocol=protocol,
        cuts=cuts,
        log=log,
    )
    return hand_over(machine, maps=reports, plot=plot, as_json=as_json)
