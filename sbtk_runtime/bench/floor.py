"""What a model would take if a CPU did nothing but multiply: no engine can be much quicker."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass

from sbtk_runtime.bench.products import Product, ProductKind
from sbtk_runtime.bench.turns import Blocks, ratio
from sbtk_runtime.retrieval.metrics import percentiles


@dataclass(frozen=True)
class Floor:
    """The time that a model's multiplications alone take.

    Attributes:
        kind: of numbers that are multiplied.
        library, size: of the fastest matrix product that was found.
        gmac_per_s: its speed in thousand millions of multiply-accumulates, the median run's.
        model_macs: multiply-accumulates of the model for one picture.
        ms: for one picture at that speed.
    """

    kind: ProductKind
    library: str
    size: int
    gmac_per_s: float
    model_macs: int
    ms: float


def fastest_product(candidates: Iterable[Product], seconds: float) -> Product | None:
    """Returns the product with the quickest run among some `seconds` of each; `None` without any.

    The candidates are made one after the other, and only the best so far is kept.
    """
    best: tuple[float, Product] | None = None
    for product in candidates:
        product.run()
        quickest_s = float("inf")
        started = time.perf_counter()
        while quickest_s == float("inf") or time.perf_counter() - started < seconds:
            run_started = time.perf_counter()
            product.run()
            quickest_s = min(quickest_s, time.perf_counter() - run_started)
        speed = product.macs / quickest_s
        if best is None or speed > best[0]:
            best = speed, product
    return best[1] if best else None


def floor_of(product: Product, blocks: Blocks, model_macs: int) -> Floor:
    """Returns the floor by the milliseconds of the product's runs."""
    run_ms = percentiles([run_ms for block in blocks for run_ms in block])["p50_ms"]
    return Floor(
        kind=product.kind,
        library=product.library,
        size=product.size,
        gmac_per_s=product.macs / run_ms / 1e6,
        model_macs=model_macs,
        ms=run_ms * model_macs / product.macs,
    )


def times_floor(
    engine: Blocks, batch: int, product: Product, product_blocks: Blocks, model_macs: int
) -> float:
    """Returns how many times the floor an engine takes, both by the runs of the same rounds."""
    return ratio(product_blocks, engine) * product.macs / (batch * model_macs)
