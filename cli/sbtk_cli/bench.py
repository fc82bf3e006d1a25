"""`sbtk bench`: latency, retrieval quality and search, as tables, JSON and pictures."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from sbtk_cli import options
from sbtk_runtime.errors import BadConfig
from sbtk_runtime.manifest import PRECISIONS, Precision

if TYPE_CHECKING:
    from sbtk_cli.bench_data import Classes
    from sbtk_cli.bench_runs import Chosen

Function = TypeVar("Function", bound=Callable[..., Any])

_plot = click.option(
    "--plot",
    type=options.PATH,
    metavar="FILE",
    help="Draw the results: a .png, .svg or .pdf (needs matplotlib).",
)
_gallery = click.option(
    "--gallery",
    type=options.PATH,
    envvar="SBTK_GALLERY",
    show_envvar=True,
    metavar="FOLDER",
    help=f"The gallery to search.  [default: {options.DEFAULT_GALLERY} if it exists, else "
    "synthetic vectors]",
)
_torch = click.option(
    "--torch/--no-torch",
    "with_torch",
    default=True,
    help="Measure torch eager beside the engines, where torch is installed.  [default: yes]",
)
_quick = click.option(
    "--quick", is_flag=True, help="Measure for seconds instead of minutes: rough figures."
)


def _shared(function: Function) -> Function:
    """Adds the options of every benchmark."""
    for option in (options.quiet, options.json, _plot, options.threads):
        function = option(function)
    return function


def _of_a_model(function: Function) -> Function:
    """Adds the options of every benchmark of a model."""
    return options.model(options.engine(options.device(_shared(function))))


@click.group("bench", invoke_without_command=True)
@_of_a_model
@click.option(
    "--data",
    type=options.PATH,
    envvar="SBTK_DATA",
    show_envvar=True,
    metavar="DATA",
    help="Folder of sketch/<class>/* and photo/<class>/*: measures mAP, too.",
)
@_torch
@_quick
@click.pass_context
def command(
    context: click.Context,
    model: str | None,
    engine: str,
    device: str | None,
    threads: int | None,
    data: Path | None,
    with_torch: bool,
    quick: bool,
    plot: Path | None,
    as_json: bool,
    quiet: bool,
) -> int | None:
    """Measure latency, retrieval quality or search.

    Without a subcommand: latency of the default model, and mAP on unseen classes when there are
    data to measure it on.
    """
    if context.invoked_subcommand is not None:
        _refuse_misplaced_options(context)
        return None
    from sbtk_cli.bench_runs import hand_over, run_latency, run_map
    from sbtk_runtime.machine import this_machine

    _check_plot(plot)
    machine = this_machine()
    chosen = _chosen(model, engine, device, threads, quiet)
    latency = run_latency(chosen, with_torch=with_torch, is_quick=quick)
    maps = [] if data is None else run_map(chosen, data)
    return hand_over(machine, latency=latency, maps=maps, plot=plot, as_json=as_json)


@command.command("latency")
@_of_a_model
@click.option(
    "--precision",
    type=click.Choice(PRECISIONS),
    help="Only this one.  [default: all in the bundle]",
)
@click.option(
    "--batch",
    "batches",
    type=click.IntRange(1, 4096),
    multiple=True,
    metavar="N",
    help="Images per run of the engine; may be repeated.  [default: 1, 8, 32]",
)
@_torch
@click.option(
    "--data",
    type=options.PATH,
    metavar="DATA",
    help="Decode images of DATA/sketch and DATA/photo.  [default: generated pictures]",
)
@_gallery
@_quick
def latency(
    model: str | None,
    engine: str,
    device: str | None,
    precision: Precision | None,
    threads: int | None,
    batches: tuple[int, ...],
    with_torch: bool,
    data: Path | None,
    gallery: Path | None,
    quick: bool,
    plot: Path | None,
    as_json: bool,
    quiet: bool,
) -> int:
    """Measure decode, preprocess, engine and search, and images per second by batch.

    Every engine that works and every precision in the bundle is measured by turns, beside torch
    eager in the same run on as many threads.
    """
    from sbtk_cli.bench_runs import hand_over, run_latency
    from sbtk_runtime.machine import this_machine

    _check_plot(plot)
    machine = this_machine()
    report = run_latency(
        _chosen(model, engine, device, threads, quiet),
        precision=precision,
        batches=batches,
        data=data,
        gallery=gallery,
        with_torch=with_torch,
        is_quick=quick,
    )
    return hand_over(machine, latency=report, plot=plot, as_json=as_json)


@command.command("map")
@click.argument("data", type=options.PATH, envvar="SBTK_DATA", required=False)
@_of_a_model
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
    help="Which classes are unseen: a published split, or a file.  [default: the model's own]",
)
@click.option(
    "--classes",
    type=click.Choice(["unseen", "validation"]),
    default="unseen",
    show_default=True,
    help="The split's unseen classes, or seen ones that were held out from training.",
)
@click.option(
    "--log",
    type=options.PATH,
    metavar="FILE",
    help="Append date, bundle, protocol and figure to FILE.  [default: for unseen classes, "
    "benchmarks/unseen.log if it exists]",
)
def map_(
    data: Path | None,
    model: str | None,
    engine: str,
    device: str | None,
    precisions: tuple[Precision, ...],
    threads: int | None,
    batch: int,
    split: str | None,
    classes: Classes,
    log: Path | None,
    plot: Path | None,
    as_json: bool,
    quiet: bool,
) -> int:
    """Measure mAP and precision of sketches against photos in DATA.

    DATA holds sketch/<class>/* and photo/<class>/*; it is SBTK_DATA when left out. Every figure
    is printed with its definition. Exit code 3: some images could not be read.
    """
    if data is None:
        raise BadConfig(
            "no data to measure on", "a folder, or SBTK_DATA", "sbtk bench map DATA --split SK-YE"
        )
    from sbtk_cli.bench_runs import hand_over, run_map
    from sbtk_runtime.machine import this_machine

    _check_plot(plot)
    machine = this_machine()
    reports = run_map(
        _chosen(model, engine, device, threads, quiet),
        data,
        precisions=precisions,
        batch=batch,
        split=split,
        classes=classes,
        log=log,
    )
    return hand_over(machine, maps=reports, plot=plot, as_json=as_json)


@command.command("search")
@_shared
@_gallery
@click.option(
    "--synthetic",
    type=click.IntRange(min=1),
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
    help="Ask the embeddings of a .npz file.  [default: vectors like those that are searched]",
)
@click.option("--dim", type=click.IntRange(2, 65536), default=512, show_default=True)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
@click.option("-k", "k", type=click.IntRange(min=1), default=10, show_default=True)
@click.option(
    "--ef",
    "efs",
    type=click.IntRange(1, 100_000),
    multiple=True,
    help="Search width of the graph; may be repeated.  [default: 16, 32, 64, 128, 256]",
)
@click.option(
    "--peer", type=click.Choice(["faiss"]), help="Measure another library beside, if installed."
)
def search(
    gallery: Path | None,
    synthetic: int | None,
    embeddings: Path | None,
    query_file: Path | None,
    dim: int,
    seed: int,
    k: int,
    efs: tuple[int, ...],
    peer: str | None,
    threads: int | None,
    plot: Path | None,
    as_json: bool,
    quiet: bool,
) -> int:
    """Measure recall@k against exact search, latency and queries per second.

    Over a gallery, over embeddings of your own, or over synthetic vectors. Recall is judged by
    score, so that ties cost nothing. --threads build the graph; one thread searches it.
    """
    from sbtk_cli.bench_runs import hand_over
    from sbtk_cli.bench_searches import run_search
    from sbtk_runtime.machine import this_machine

    _check_plot(plot)
    machine = this_machine()
    report = run_search(
        gallery=gallery,
        synthetic=synthetic,
        embeddings=embeddings,
        query_file=query_file,
        dim=dim,
        seed=seed,
        k=k,
        efs=efs,
        peer=peer,
        threads=threads,
        quiet=quiet,
    )
    return hand_over(machine, search=report, plot=plot, as_json=as_json)


def _chosen(
    model: str | None, engine: str, device: str | None, threads: int | None, quiet: bool
) -> Chosen:
    from sbtk_cli.bench_runs import Chosen
    from sbtk_runtime.bundle import Bundle

    return Chosen(Bundle.open(model), engine, device, threads, quiet)


def _check_plot(plot: Path | None) -> None:
    """Finds out before minutes of measuring that the picture cannot be drawn."""
    if plot is not None:
        from sbtk_cli.bench_plots import check_plottable

        check_plottable(plot)


def _refuse_misplaced_options(context: click.Context) -> None:
    for name in context.params:
        if context.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE:
            context.fail(
                f"Options come after the subcommand: sbtk bench {context.invoked_subcommand} ..."
            )
