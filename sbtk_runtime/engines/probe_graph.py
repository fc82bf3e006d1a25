"""The smallest graph that shows that a library computes, without a model bundle."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from sbtk_runtime.errors import EngineUnavailable

#: The graph y = -x on one float32, as an ONNX file: made once, so that no ONNX library is needed.
PROBE_GRAPH = bytes.fromhex(
    "08083a320a0b0a017812017922034e65671201705a0f0a0178120a0a08080112040a020801"
    "620f0a0179120a0a08080112040a02080142040a00100d"
)
PROBE_INPUT, PROBE_OUTPUT = "x", "y"


def probe_question() -> NDArray[np.float32]:
    """Returns the input `x`, `(1,) float32`."""
    return np.array([2.0], dtype=np.float32)


def check_probe_answer(answer: NDArray[np.float32], library: str) -> None:
    """Checks the graph's output `y (1,) float32`.

    Raises:
        EngineUnavailable: `library` does not compute what it should.
    """
    if answer.tolist() != [-2.0]:
        raise EngineUnavailable(f"{library} computes -2 as {answer.tolist()}", "[-2.0]")
