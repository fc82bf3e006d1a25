"""The options that benchmarks share."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import click

from sbtk_cli import options

if TYPE_CHECKING:
    from pathlib import Path

    from sbtk_cli.bench_runs import Chosen

Function = TypeVar("Function", bound=Callable[..., Any])

_MAX_BATCH = 4096


def counts(largest: int, example: str) -> Callable[..., tuple[int, ...]]:
    """Returns a callback that takes lists such as `1,8,32` apart, each number once, in order."""

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
    """Adds the options of every benchmark."""
    for option in (options.quiet, options.json, plot, options.threads):
        function = option(function)
    return function


def of_a_model(function: Function) -> Function:
    """Adds the options of every benchmark of a model."""
    return options.model(options.engine(options.device(shared(function))))


def of_all_engines(function: Function) -> Function:
    """Adds the options of a benchmark that can measure several engines."""
    return options.model(engine_or_all(options.device(shared(function))))


def chosen(
    model: str | None, engine: str, device: str | None, threads: int | None, quiet: bool
) -> Chosen:
    """Returns what the options of a model choose."""
    from sbtk_cli.bench_runs import Chosen
    from sbtk_runtime.bundle import Bundle

    return Chosen(Bundle.open(model), engine, device, threads, quiet)


def check_plot(file: Path | None) -> None:
    """Finds out before minutes of measuring that the picture cannot be drawn."""
    if file is not None:
        from sbtk_cli.bench_plots import check_plottable

        check_plottable(file)
