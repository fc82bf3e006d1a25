"""The options that pictures of labelled images share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from sbtk_cli import options
from sbtk_runtime.errors import BadConfig

if TYPE_CHECKING:
    from sbtk_runtime.embedding.embed import Embedder
    from sbtk_runtime.manifest import Precision

Function = TypeVar("Function", bound=Callable[..., Any])

split = click.option(
    "--split",
    metavar="NAME",
    help="Which classes are unseen: a published split, or a file.  [default: the model's own]",
)
classes = click.option(
    "--classes",
    type=click.Choice(["unseen", "validation"]),
    default="unseen",
    show_default=True,
    help="The split's unseen classes, or seen ones that were held out from training.",
)
seed = click.option(
    "--seed", type=click.IntRange(min=0), default=0, show_default=True, help="For what is drawn."
)


def of_labelled_images(function: Function) -> Function:
    """Adds DATA, the choice of its classes, and the options of a model."""
    shared = (options.quiet, options.batch, options.device, options.threads, options.precision)
    for option in (*shared, options.engine, options.model, classes, split):
        function = option(function)
    return click.argument("data", type=options.PATH, envvar="SBTK_DATA", required=False)(function)


@dataclass(frozen=True)
class Chosen:
    """The model, and what runs it, as the options take it."""

    model: str | None
    engine: str
    precision: Precision | None
    threads: int | None
    device: str | None
    batch: int
    quiet: bool

    def embedder(self) -> Embedder:
        """Returns the open model."""
        from sbtk_runtime.embedding.embed import Embedder

        return Embedder(
            self.model,
            engine=self.engine,
            precision=self.precision,
            threads=self.threads,
            device=self.device,
            batch=self.batch,
        )


def required(data: Path | None) -> Path:
    """Returns the folder of labelled images.

    Raises:
        BadConfig: none was named.
    """
    if data is None:
        raise BadConfig(
            "no data to make pictures of",
            "a folder, or SBTK_DATA",
            "sbtk report figure3 DATA --out figure3.png",
        )
    return data
