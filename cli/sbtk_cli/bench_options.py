"""Options shared by benchmarks."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

import click

from sbtk_cli import options
from sbtk_cli.options import Function
from sbtk_runtime.errors import BadConfig

if TYPE_CHECKING:
    from pathlib import Path

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

_MAX_BATCH = 4096


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


plot = click.option(
    "--plot",
    type=options.PATH,
    metavar="FILE",
    help="Plot the results to a .png, .svg or .pdf file (needs matplotlib).",
)
gallery = click.option(
    "--gallery",
    type=options.PATH,
    envvar="SBTK_GALLERY",
    show_envvar=True,
    metavar="FOLDER",
    help=f"Gallery to search.  [default: {options.DEFAULT_GALLERY} if it exists, else "
    "synthetic vectors]",
)
engine_or_all = click.option(
    "--engine",
    default="auto",
    show_default=True,
    metavar="NAME",
    help="Inference engine: a name ('sbtk doctor' lists them), auto for the first that works, or "
    "all for every working one.",
)
batches = click.option(
    "--batch",
    "batches",
    callback=counts(_MAX_BATCH, "1,8,32"),
    multiple=True,
    metavar="N[,N...]",
    help="Batch sizes; may be repeated.  [default: 1,8,32]",
)
torch = click.option(
    "--torch/--no-torch",
    "with_torch",
    default=True,
    help="Compare with torch eager, if installed.  [default: yes]",
)
compiled = click.option(
    "--compile/--no-compile",
    "with_compiled",
    default=None,
    help="Compare with torch compiled, which takes up to a minute per batch size and a C++ "
    "compiler.  [default: with --engine all, without --quick]",
)
quick = click.option(
    "--quick", is_flag=True, help="Measure for seconds instead of minutes, for rough results."
)


def shared(function: Function) -> Function:
    """Add the options of all benchmarks."""
    for option in (options.quiet, options.json, plot, options.threads):
        function = option(function)
    return function


def of_a_model(function: Function) -> Function:
    """Add the options of all benchmarks of a model."""
    collected = options.collect_engine_options(function)
    return options.model(options.engine(options.device(shared(collected))))


def of_all_engines(function: Function) -> Function:
    """Add the options of a benchmark of several engines."""
    collected = options.collect_engine_options(function)
    return options.model(engine_or_all(options.device(shared(collected))))


def check_plot(file: Path | None) -> None:
    """Check, before measuring, that the plot can be written."""
    if file is not None:
        from sbtk_cli.bench_plots import check_plottable

        check_plottable(file)


_MAX_CUT = 1_000_000

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
