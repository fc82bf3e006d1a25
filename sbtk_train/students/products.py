"""Matrix products as torch computes them: the speed of this machine's multiplications."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch


def product_run(kind: Literal["int8", "fp32"], size: int, threads: int) -> Callable[[], object]:
    """Returns a function that multiplies two `(size, size)` matrices on the CPU.

    INT8 is `int8` times `int8` summed in `int32`.

    Args:
        kind: of numbers.
        size: rows and columns.
        threads: CPU threads of torch; this is a setting of the whole process.
    """
    torch.set_num_threads(threads)
    random = torch.Generator().manual_seed(size)
    if kind == "fp32":
        factors = torch.randn(2, size, size, generator=random)
        return lambda: torch.mm(factors[0], factors[1])
    integers = torch.randint(-128, 128, (2, size, size), dtype=torch.int8, generator=random)
    return lambda: torch._int_mm(integers[0], integers[1])
