"""`sbtk bench`: latency, retrieval quality and search, as tables, JSON and plots."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sbtk_cli import bench_options, options
from sbtk_runtime.errors import BadConfig
from sbtk_runtime.manifest import PRECISIONS, Precision

if TYPE_CHECKING:
    from sbtk_cli.bench_data import Classes
    from sbtk_runtime.engines.base import EngineOptions
    from sbtk_runtime.evaluation.protocol import Protocol


@click.group("bench", invoke_without_command=True)
@bench_options.of_all_engines
@click.option(
    "--data",
    type=options.PATH,
    envvar="SBTK_DATA",
    show_envvar=True,
    metavar="DATA",
    help="Folder of sketch/<class>/* and photo/<class>/*; also measures mAP.",
)
@bench_options.torch
@bench_options.quick
@click.pass_context
def command(
    context: click.Context,
    model: str | None,
    engine_options: EngineOptions,
    data: Path | None,
    with_torch: bool,
    quick: bool,
    plot: Path | None,
    as_json: bool,
    quiet: bool,
) -> int | None:
    """Measure latency, retrieval quality or search.

    Without a subcommand: latency of the default model, and with data, mAP on unseen classes.
    """
    if context.invoked_subcommand is not None:
        _refuse_misplaced_options(context)
        return None
    from sbtk_cli.bench_runs import BenchScope, emit_results, run_latency, run_map
    from sbtk_runtime.bundle import Bundle
    from sbtk_runtime.engines.base import AUTO
    from sbtk_runtime.evaluation.bench.engines import ALL
    from sbtk_runtime.machine import this_machine

    bench_options.check_plot(plot)
    machine = this_machine()
    bundle = Bundle.open(model)
    # mAP has its own table.
    scope = BenchScope(with_torch, with_map=False, is_quick=quick)
    latency = run_latency(bundle, engine_options, scope=scope, quiet=quiet)
    # One engine suffices for unseen classes, which should be evaluated as rarely as possible.
    if engine_options.engine == ALL:
        engine_options = replace(engine_options, engine=AUTO)
    maps = [] if data is None else run_map(bundle, engine_options, data, quiet=quiet)
    return emit_results(machine, latency=latency, maps=maps, plot=plot, as_json=as_json)


def _refuse_misplaced_options(context: click.Context) -> None:
    for name in context.params:
        if context.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE:
            context.fail(
                f"Options come after the subcommand: sbtk bench {context.invoked_subcommand} ..."
            )


@command.command("latency")
@bench_options.of_all_engines
@click.option(
    "--precision",
    type=click.Choice(PRECISIONS),
    help="Precision to measure.  [default: all in the bundle]",
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
    "classes.  [default: generated images, no mAP]",
)
@click.option(
    "--map/--no-map",
    "with_map",
    default=None,
    help="Measure mAP of each engine and precision, and its difference to FP32.  "
    "[default: with DATA, without --quick]",
)
@bench_options.gallery
@bench_options.quick
@click.option(
    "--csv",
    type=options.PATH,
    metavar="FILE",
    help="Write all results, a row for each engine, precision and batch size.",
)
def latency_command(
    model: str | None,
    engine_options: EngineOptions,
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

    Measures every precision in the bundle, interleaved with torch eager on the same device and
    threads, and with the fastest INT8 and FP32 matrix products of this CPU, the floor of what an
    engine could reach. Memory is measured in separate processes. --engine all measures every
    working engine, and torch compiled.
    """
    from sbtk_cli.bench_runs import BenchScope, emit_results, run_latency
    from sbtk_runtime.bundle import Bundle
    from sbtk_runtime.machine import this_machine

    bench_options.check_plot(plot)
    if csv is not None:
        options.check_output_file(csv)
    machine = this_machine()
    report = run_latency(
        Bundle.open(model),
        engine_options,
        batches=batches,
        data=data,
        gallery=gallery,
        scope=BenchScope(with_torch, with_compiled, with_map, quick),
        quiet=quiet,
    )
    return emit_results(machine, latency=report, csv=csv, plot=plot, as_json=as_json)


@command.command("map")
@click.argument("data", type=options.PATH, envvar="SBTK_DATA", required=False)
@bench_options.of_a_model
@click.option(
    "--precision",
    "precisions",
    type=click.Choice(PRECISIONS),
    multiple=True,
    help="Precision to measure; may be repeated.  [default on a CPU: int8]",
)
@options.batch
@click.option(
    "--split",
    metavar="NAME",
    help="Split that defines the unseen classes: a published one, random:N:SEED, or a file.  "
    "[default: the model's own]",
)
@options.classes
@bench_options.protocol
@click.option(
    "--log",
    type=options.PATH,
    metavar="FILE",
    help="Append date, bundle, protocol and mAP to FILE.  [default: for unseen classes, "
    "benchmarks/unseen.log if it exists]",
)
def map_command(
    data: Path | None,
    model: str | None,
    engine_options: EngineOptions,
    precisions: tuple[Precision, ...],
    split: str | None,
    classes: Classes,
    protocol: Protocol,
    cuts: tuple[int, ...],
    log: Path | None,
    plot: Path | None,
    as_json: bool,
    quiet: bool,
) -> int:
    """Measure mAP and precision of sketches against photos in DATA.

    DATA (default: SBTK_DATA) is a data set in any layout that 'sbtk data check' supports, such as
    sketch/<class>/* and photo/<class>/*. Every metric is printed with its definition; --json has
    its rules. Exit code 3: some images could not be read.
    """
    if data is None:
        raise BadConfig(
            "no data set given", "a folder, or SBTK_DATA", "sbtk bench map DATA --split SK-YE"
        )
    from sbtk_cli.bench_runs import emit_results, run_map
    from sbtk_runtime.bundle import Bundle
    from sbtk_runtime.machine import this_machine

    bench_options.check_plot(plot)
    machine = this_machine()
    reports = run_map(
        Bundle.open(model),
        engine_options,
        data,
        precisions=precisions,
        split=split,
        classes=classes,
        protocol=protocol,
        cuts=cuts,
        log=log,
        quiet=quiet,
    )
    return emit_results(machine, maps=reports, plot=plot, as_json=as_json)


@command.command("search")
@bench_options.shared
@bench_options.gallery
@click.option(
    "--synthetic",
    type=options.IntRange(min=1),
    metavar="N",
    help="Search N synthetic vectors.  [default without a gallery: 20000]",
)
@click.option(
    "--embeddings",
    type=options.PATH,
    metavar="FILE",
    help="Search the embeddings of a .npz file that 'sbtk embed' wrote.",
)
@click.option(
    "--queries",
    "query_file",
    type=options.PATH,
    metavar="FILE",
    help="Use the embeddings of a .npz file as queries.  [default: similar to the searched ones]",
)
@click.option("--dim", type=options.IntRange(2, 65536), default=512, show_default=True)
@click.option("--seed", type=options.IntRange(min=0), default=0, show_default=True)
@click.option("-k", "k", type=options.IntRange(min=1), default=10, show_default=True)
@click.option(
    "--ef",
    "efs",
    type=options.IntRange(1, 100_000),
    multiple=True,
    help="Search width of the graph; may be repeated.  [default: 16, 32, 64, 128, 256]",
)
@click.option(
    "--peer",
    "peers",
    type=click.Choice(["faiss", "usearch"]),
    multiple=True,
    help="Also measure another library, if installed; may be repeated.",
)
@click.option(
    "--graphs/--no-graphs",
    "has_graphs",
    default=True,
    help="Build graphs, which takes hours for millions of vectors.  [default: --graphs]",
)
def search_command(plot: Path | None, as_json: bool, **wanted: Any) -> int:
    """Measure recall@k against exact search, latency and queries per second.

    Searches a gallery, your own embeddings, or synthetic vectors. Recall compares scores, so ties
    do not matter. The graph is built with --threads and searched with one thread.
    """
    from sbtk_cli.bench_runs import emit_results
    from sbtk_cli.bench_searches import run_search
    from sbtk_runtime.machine import this_machine

    bench_options.check_plot(plot)
    machine = this_machine()
    report = run_search(**wanted)
    return emit_results(machine, search=report, plot=plot, as_json=as_json)
