"""The options that benchmarks share."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import click

from sbtk_cli import options
from sbtk_runtime.errors import BadConfig

if TYPE_CHECKING:
    from pathlib import Path

    from sbtk_cli.bench_runs import Chosen
    from sbtk_runtime.binary_codes import Rotation
    from sbtk_runtime.evaluation.protocol import (
        Distance,
        FittedOn,
        Protocol,
        QueryKind,
        Setting,
        Ties,
    )
    from sbtk_runtime.rerank import Rerank

Function = TypeVar("Function", bound=Callable[..., Any])

_MAX_BATCH = 4096


def counts(largest: int, example: str) -> Callable[..., tuple[int, ...]]:
    """Return a callback that takes lists such as `1,8,32` apart, each number once, in order."""

    def taken_apart(
        context: click.Context, parameter: click.Parameter, values: tuple[str, ...]
    ) -> tuple[int, ...]:
        found: list[int] = []
        for value in values:
            parts = [part.strip() for part in value.split(",")]
            digits = [part for part in parts if part.isascii() and part.isdecimal()]
            # Python refuses to convert a number of thousands of digits.
            numbers = [int(part) for part in digits if len(part) < 10]
            if len(numbers) < len(parts) or not all(1 <= number <= largest for number in numbers):
                raise click.BadParameter(
                    f"{value!r} is not a number from 1 to {largest}, or several with commas "
                    f"between, as in {example}.",
                    context,
                    parameter,
                )
            found += numbers
        return tuple(dict.fromkeys(found))

    return taken_apart


plot = click.option(
    "--plot",
    type=options.PATH,
    metavar="FILE",
    help="Draw the results: a .png, .svg or .pdf (needs matplotlib).",
)
gallery = click.option(
    "--gallery",
    type=options.PATH,
    envvar="SBTK_GALLERY",
    show_envvar=True,
    metavar="FOLDER",
    help=f"The gallery to search.  [default: {options.DEFAULT_GALLERY} if it exists, else "
    "synthetic vectors]",
)
engine_or_all = click.option(
    "--engine",
    default="auto",
    show_default=True,
    metavar="NAME",
    help="Inference engine; auto takes the first that works, all measures every one that works "
    "('sbtk doctor' lists them).",
)
batches = click.option(
    "--batch",
    "batches",
    callback=counts(_MAX_BATCH, "1,8,32"),
    multiple=True,
    metavar="N[,N...]",
    help="Images per run of the engine; may be repeated.  [default: 1,8,32]",
)
torch = click.option(
    "--torch/--no-torch",
    "with_torch",
    default=True,
    help="Measure torch eager beside the engines, where torch is installed.  [default: yes]",
)
compiled = click.option(
    "--compile/--no-compile",
    "with_compiled",
    default=None,
    help="Measure torch compiled, too: it compiles for each batch, up to a minute, with a C++ "
    "compiler.  [default: with --engine all, without --quick]",
)
quick = click.option(
    "--quick", is_flag=True, help="Measure for seconds instead of minutes: rough figures."
)


def shared(function: Function) -> Function:
    """Add the options of every benchmark."""
    for option in (options.quiet, options.json, plot, options.threads):
        function = option(function)
    return function


def of_a_model(function: Function) -> Function:
    """Add the options of every benchmark of a model."""
    return options.model(options.engine(options.device(shared(function))))


def of_all_engines(function: Function) -> Function:
    """Add the options of a benchmark that can measure several engines."""
    return options.model(engine_or_all(options.device(shared(function))))


def chosen(
    model: str | None, engine: str, device: str | None, threads: int | None, quiet: bool
) -> Chosen:
    """Return what the options of a model choose."""
    from sbtk_cli.bench_runs import Chosen
    from sbtk_runtime.bundle import Bundle

    return Chosen(Bundle.open(model), engine, device, threads, quiet)


def check_plot(file: Path | None) -> None:
    """Find out before minutes of measuring that the picture cannot be drawn."""
    if file is not None:
        from sbtk_cli.bench_plots import check_plottable

        check_plottable(file)


_MAX_CUT = 1_000_000

_queries = click.option(
    "--queries",
    type=click.Choice(["sketch", "photo"]),
    default="sketch",
    show_default=True,
    help="What asks: the sketches, or the first 10 photos of each class, against the others.",
)
_setting = click.option(
    "--setting",
    type=click.Choice(["zero-shot", "generalised-20", "generalised-all"]),
    default="zero-shot",
    show_default=True,
    help="generalised-20 adds seen sketches and photos, 20 % of the unseen ones, by SEM-PCYC's "
    "draw with seed 0; generalised-all searches unseen and seen photos together.",
)
_distance = click.option(
    "--distance",
    type=click.Choice(["cosine", "euclidean"]),
    help="What embeddings are ranked by; codes (--bits) go by the Hamming distance.  "
    "[default: cosine]",
)
_ties = click.option(
    "--ties",
    type=click.Choice(["index", "expected"]),
    default="index",
    show_default=True,
    help="Equal scores stand in the order of the gallery, or figures are expected values over "
    "all their orders (without VOC figures, which have none).",
)
_keep_duplicates = click.option(
    "--keep-duplicates",
    is_flag=True,
    help="Count photos that the data set has twice more than once, as published galleries of "
    "Sketchy Ext do.",
)
_bits = click.option(
    "--bits",
    type=click.IntRange(min=8),
    metavar="N",
    help="Measure binary codes of N bits by ITQ (64 in the papers) instead of embeddings.",
)
_itq_on = click.option(
    "--itq-on",
    type=click.Choice(["gallery", "training", "queries", "bundle"]),
    help="What ITQ is fitted on: the gallery, training images, the queries with each side about "
    "its own mean (as DSN does), or what the bundle brings.  [default: gallery]",
)
_itq_rotation = click.option(
    "--itq-rotation",
    type=click.Choice(["procrustes", "released"]),
    help="ITQ's rotation as its paper has it, or as SEM-PCYC's and DSN's code computes it.  "
    "[default: procrustes]",
)
_cuts = click.option(
    "--at",
    "cuts",
    callback=counts(_MAX_CUT, "10,100,200"),
    multiple=True,
    metavar="K[,K...]",
    help="Ranks of mAP@K and P@K; may be repeated.  [default: mAP@200, P@10, P@100, P@200]",
)


def protocol(function: Function) -> Function:
    """Add the options of a protocol."""
    for option in (
        *(_cuts, _itq_rotation, _itq_on, _bits, _keep_duplicates),
        *(options.rerank, _ties, _distance, _setting, _queries),
    ):
        function = option(function)
    return function


def chosen_protocol(
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
    """Return the protocol that the options choose.

    Raises:
        BadConfig: they contradict each other.
    """
    from sbtk_runtime.evaluation.protocol import CodeRule, Protocol

    if bits is None and (itq_on or itq_rotation):
        option = "--itq-on" if itq_on else "--itq-rotation"
        raise BadConfig(
            f"{option} without --bits", "binary codes to make", f"{option} ... --bits 64"
        )
    if bits is not None and distance is not None:
        raise BadConfig(
            f"--distance {distance} of --bits {bits}", "no --distance: codes go by bits"
        )
    if itq_on == "bundle" and itq_rotation is not None:
        raise BadConfig(
            f"--itq-rotation {itq_rotation} of --itq-on bundle",
            "the rotation that the bundle brings",
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
