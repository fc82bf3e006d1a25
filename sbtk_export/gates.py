"""The parts of a graph that weigh channels, as squeeze-and-excitation modules do.

Of each feature map they take the means, and make of these one factor for each channel. That is a
thousandth of the work, and a factor that is off is off everywhere: these parts stay in FP32, and
only the product that they end in is quantised.
"""

from __future__ import annotations

from collections.abc import Mapping

import onnx

_MEANS = frozenset({"ReduceMean", "GlobalAveragePool"})


def gate_nodes(model: onnx.ModelProto) -> list[str]:
    """Returns the names of the nodes that lead from means of feature maps to channels' factors.

    Means and sigmoids are among them, the products with the factors are not.
    """
    makers = {name: node for node in model.graph.node for name in node.output}
    found: dict[str, None] = {}
    for node in model.graph.node:
        if node.op_type == "Sigmoid":
            _collect(node, makers, found)
    return list(found)


def _collect(
    node: onnx.NodeProto, makers: Mapping[str, onnx.NodeProto], found: dict[str, None]
) -> None:
    """Adds a node and all that it depends on, back to the means of feature maps."""
    if node.name in found:
        return
    found[node.name] = None
    if node.op_type not in _MEANS:
        for name in node.input:
            if name in makers:
                _collect(makers[name], makers, found)
