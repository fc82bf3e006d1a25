"""The options that say by which protocol retrieval is measured."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import click

from sbtk_cli import options
from sbtk_cli.bench_options import counts
from sbtk_runtime.errors import BadConfig

if TYPE_CHECKING:
    from sbtk_runtime.itq import Rotation
    from sbtk_runtime.rerank import Rerank
    from sbtk_runtime.retrieval.protocol import (
        Distance,
        FittedOn,
        Protocol,
        QueryKind,
        Setting,
        Ties,
    )

Function = TypeVar("Function", bound=Callable[..., Any])

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
    """Adds the options of a protocol."""
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
    """Returns the protocol that the options choose.

    Raises:
        BadConfig: they contradict each other.
    """
    from sbtk_runtime.retrieval.protocol import CodeRule, Protocol

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
