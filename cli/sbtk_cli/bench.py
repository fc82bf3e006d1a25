"""`sbtk bench`: latency, retrieval quality and search, as tables, JSON and plots."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import click

from sbtk_cli import options
from sbtk_cli.options import Function
from sbtk_runtime.errors import BadConfig, SbtkError
from sbtk_runtime.manifest import PRECISIONS, Precision

if TYPE_CHECKING:
    from sbtk_cli.bench_data import Classes
    from sbtk_runtime.binary_codes import Rotation
    from sbtk_runtime.engines.base import EngineOptions
    from sbtk_runtime.evaluation.protocol import (
        Distance,
        FittedOn,
        Protocol,
        QueryKind,
        Setting,
        Ties,
    )
    from sbtk_runtime.rerank import Rerank

_MAX_BATCH = 4096
_MAX_CUT = 1_000_000


def counts(largest: int, example: str) -> Callable[..., tuple[int, ...]]:
    """Return a callback that parses lists such as `1,8,32` into distinct numbers, in order."""

    def parse(
        context: click.Context, parameter: click.Parameter, values: tuple[str, ...]
    ) -> tuple[int, ...]:
        found: list[int] = []
        for value in values:
            parts = [part.strip() for part in value.split(",")]
            digits = [part for part in parts if part.isascii() and part.isdecimal()]
            # Python does not convert numbers of thousands of digits.
            numbers = [int(part) for part in digits if len(part) < 10]
            if len(numbers) < len(parts) or not all(1 <= number <= largest for number in numbers):
                raise click.BadParameter(
                    f"{value!r} is not a number from 1 to {largest}, or a list such as {example}.",
                    context,
                    parameter,
                )
            found += numbers
        return tuple(dict.fromkeys(found))

    return parse


_plot = click.option(
    "--plot",
    type=options.PATH,
    metavar="FILE",
    help="Plot the results to a .png, .svg or .pdf file (needs matplotlib).",
)
_gallery = click.option(
    "--gallery",
    type=options.PATH,
    envvar="SBTK_GALLERY",
    show_envvar=True,
    metavar="FOLDER",
    help=f"Gallery to search.  [default: {options.DEFAULT_GALLERY} if it exists, else "
    "synthetic vectors]",
)
_engine_or_all = click.option(
    "--engine",
    default="auto",
    show_default=True,
    metavar="NAME",
    help="Inference engine: a name ('sbtk doctor' lists them), auto for the first that works, or "
    "all for every working one.",
)
_batches = click.option(
    "--batch",
    "batches",
    callback=counts(_MAX_BATCH, "1,8,32"),
    multiple=True,
    metavar="N[,N...]",
    help="Batch sizes; may be repeated.  [default: 1,8,32]",
)
_torch = click.option(
    "--torch/--no-torch",
    "with_torch",
    default=True,
    help="Compare with torch eager, if installed.  [default: yes]",
)
_compiled = click.option(
    "--compile/--no-compile",
    "with_compiled",
    default=None,
    help="Compare with torch compiled, which takes up to a minute per batch size and a C++ "
    "compiler.  [default: with --engine all, without --quick]",
)
_quick = click.option(
    "--quick", is_flag=True, help="Measure for seconds instead of minutes, for rough results."
)


def shared(function: Function) -> Function:
    """Add the options of all benchmarks."""
    for option in (options.quiet, options.json, _plot, options.threads):
        function = option(function)
    return function


def of_a_model(function: Function) -> Function:
    """Add the options of all benchmarks of a model."""
    collected = options.collect_engine_options(function)
    return options.model(options.engine(options.device(shared(collected))))


def of_all_engines(function: Function) -> Function:
    """Add the options of a benchmark of several engines."""
    collected = options.collect_engine_options(function)
    return options.model(_engine_or_all(options.device(shared(collected))))


def check_plot(file: Path | None) -> None:
    """Check, before measuring, that the plot can be written."""
    if file is not None:
        from sbtk_cli.bench_plots import check_plottable

        check_plottable(file)


_queries = click.option(
    "--queries",
    type=click.Choice(["sketch", "photo"]),
    default="sketch",
    show_default=True,
    help="Query modality: sketches, or the first 10 photos of each class.",
)
_setting = click.option(
    "--setting",
    type=click.Choice(["zero-shot", "generalised-20", "generalised-all"]),
    default="zero-shot",
    show_default=True,
    help="zero-shot: unseen classes only; generalised-20: add seen images, 20 % of the number of "
    "unseen ones, drawn as in SEM-PCYC with seed 0; generalised-all: search photos of all classes.",
)
_distance = click.option(
    "--distance",
    type=click.Choice(["cosine", "euclidean"]),
    help="Distance to rank embeddings by; codes (--bits) use the Hamming distance.  "
    "[default: cosine]",
)
_ties = click.option(
    "--ties",
    type=click.Choice(["index", "expected"]),
    default="index",
    show_default=True,
    help="Break ties by gallery order, or report expected values over all orders (not available "
    "for VOC metrics).",
)
_keep_duplicates = click.option(
    "--keep-duplicates",
    is_flag=True,
    help="Keep duplicate photos, as in published galleries of Sketchy Ext.",
)
_bits = click.option(
    "--bits",
    type=options.IntRange(min=8),
    metavar="N",
    help="Measure N-bit codes made by ITQ (64 bits in the papers) instead of embeddings.",
)
_itq_on = click.option(
    "--itq-on",
    type=click.Choice(["gallery", "training", "queries", "bundle"]),
    help="Fit ITQ on the gallery, on training images, or on the queries (as in DSN, with each side "
    "centred on its own mean), or use the bundle's own.  [default: gallery]",
)
_itq_rotation = click.option(
    "--itq-rotation",
    type=click.Choice(["procrustes", "released"]),
    help="ITQ rotation: as in its paper, or as in the code of SEM-PCYC and DSN.  "
    "[default: procrustes]",
)
_rerank = click.option(
    "--rerank",
    type=click.Choice(["none", "expand", "diffusion"]),
    default="none",
    show_default=True,
    help="Rerank the hits: expand the query by its first hits, or diffuse scores over similar "
    "photos.",
)
_cuts = click.option(
    "--at",
    "cuts",
    callback=counts(_MAX_CUT, "10,100,200"),
    multiple=True,
    metavar="K[,K...]",
    help="Ranks K of mAP@K and P@K; may be repeated.  [default: mAP@200, P@10, P@100, P@200]",
)


def protocol(function: Function) -> Function:
    """Add the options of a protocol; the command takes them as one `protocol`, and `cuts`."""

    @functools.wraps(function)
    def command(*arguments: Any, **values: Any) -> Any:
        names = inspect.signature(make_protocol).parameters
        chosen = make_protocol(**{name: values.pop(name) for name in names})
        return function(*arguments, protocol=chosen, **values)

    collected = cast(Function, command)
    for option in (
        *(_cuts, _itq_rotation, _itq_on, _bits, _keep_duplicates),
        *(_rerank, _ties, _distance, _setting, _queries),
    ):
        collected = option(collected)
    return collected


def make_protocol(
    queries: QueryKind,
    setting: Setting,
    distance: Distance | None,
    ties: Ties,
    keep_duplicates: bool,
    bits: int | None,
    itq_on: FittedOn | None,
    itq_rotation: Rotation | None,
    rerank: Rerank,
) -> Protocol:
    """Return the protocol that the options select.

    Raises:
        BadConfig: they contradict each other.
    """
    from sbtk_runtime.evaluation.protocol import CodeRule, Protocol

    if bits is None and (itq_on or itq_rotation):
        option = "--itq-on" if itq_on else "--itq-rotation"
        raise BadConfig(f"{option} without --bits", "--bits N", f"{option} ... --bits 64")
    if bits is not None and distance is not None:
        raise BadConfig(
            f"--distance {distance} with --bits {bits}",
            "no --distance: codes use the Hamming distance",
        )
    if itq_on == "bundle" and itq_rotation is not None:
        raise BadConfig(
            f"--itq-rotation {itq_rotation} with --itq-on bundle",
            "no --itq-rotation: the bundle has its own",
        )
    codes = None
    if bits is not None:
        codes = CodeRule(bits, itq_on or "gallery", itq_rotation or "procrustes")
    return Protocol(
        queries=queries,
        setting=setting,
        distance="hamming" if codes else distance or "cosine",
        ties=ties,
        keeps_duplicates=keep_duplicates,
        codes=codes,
        rerank=rerank,
    )


@click.group("bench", invoke_without_command=True)
@of_all_engines
@click.option(
    "--data",
    type=options.PATH,
    envvar="SBTK_DATA",
    show_envvar=True,
    metavar="DATA",
    help="Folder of sketch/<class>/* and photo/<class>/*; also measures mAP.",
)
@_torch
@_quick
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
    from sbtk_runtime.evaluation.bench.speed import ALL
    from sbtk_runtime.machine import this_machine

    check_plot(plot)
    machine = this_machine()
    bundle = Bundle.open(model)
    # mAP has its own table.
    scope = BenchScope(with_torch, with_map=False, is_quick=quick)
    latency = run_latency(bundle, engine_options, scope=scope, quiet=quiet)
    # One engine suffices for unseen classes, which should be evaluated as rarely as possible.
    if engine_options.engine == ALL:
        engine_options = replace(engine_options, engine=AUTO)
    try:
        maps = [] if data is None else run_map(bundle, engine_options, data, quiet=quiet)
    except SbtkError:
        emit_results(machine, latency=latency, plot=plot, as_json=as_json)
        raise
    return emit_results(machine, latency=latency, maps=maps, plot=plot, as_json=as_json)


def _refuse_misplaced_options(context: click.Context) -> None:
    for name in context.params:
        if context.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE:
            context.fail(
                f"Options come after the subcommand: sbtk bench {context.invoked_subcommand} ..."
            )


@command.command("latency")
@of_all_engines
@click.option(
    "--precision",
    type=click.Choice(PRECISIONS),
    help="Precision to measure.  [default: all in the bundle]",
)
@_batches
@_torch
@_compiled
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
@_gallery
@_quick
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

    check_plot(plot)
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
@of_a_model
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
@protocol
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
    its rules. Exit code 3: some images could not be read, or some queries have no photo of their
    class.
    """
    if data is None:
        raise BadConfig(
            "no data set given", "a folder, or SBTK_DATA", "sbtk bench map DATA --split SK-YE"
        )
    from sbtk_cli.bench_runs import emit_results, run_map
    from sbtk_runtime.bundle import Bundle
    from sbtk_runtime.machine import this_machine

    check_plot(plot)
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
@shared
@_gallery
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
@click.option(
    "--dim",
    type=options.IntRange(2, 65536),
    metavar="N",
    default=512,
    show_default=True,
    help="Length of synthetic vectors.",
)
@click.option(
    "--seed",
    type=options.IntRange(min=0),
    metavar="N",
    default=0,
    show_default=True,
    help="Random seed of synthetic vectors and queries.",
)
@click.option(
    "-k",
    "k",
    type=options.IntRange(min=1),
    metavar="N",
    default=10,
    show_default=True,
    help="Number of hits of a query.",
)
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

    check_plot(plot)
    machine = this_machine()
    report = run_search(**wanted)
    return emit_results(machine, search=report, plot=plot, as_json=as_json)
