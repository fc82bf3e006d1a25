"""Proof that an INT8 model gives the same sums on every kind of processor.

Processors without VNNI multiply 8-bit numbers by `vpmaddubsw`: it takes unsigned activations and
signed weights, and adds two neighbouring products in 16 bits that saturate at 32,767. Such sums
differ from those of VNNI, of ARM and of GPUs, which add in 32 bits. Which weights are neighbours
depends on the kernel, so the two largest of an output channel are taken: with activations of up to
255 their sizes may add up to 128.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

from sbtk_runtime.errors import BadModel

#: The largest sum of two products that 16 bits hold.
LARGEST_SUM = 32_767
#: The largest activation; signed ones are shifted to unsigned before they are multiplied.
LARGEST_ACTIVATION = 255

# These have their weights in second place.
_DEQUANTISED = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})
# Where the others have their weights, and the zero points of these.
_INTEGER = {
    "QLinearConv": (3, 5),
    "QLinearMatMul": (3, 5),
    "ConvInteger": (1, 3),
    "MatMulInteger": (1, 3),
    "QGemm": (3, 5),
    "MatMulIntegerToFloat": (1, 5),
    "DynamicQuantizeMatMul": (1, 3),
}
_LARGEST_WEIGHT = 128


def largest_pair_sums(model: onnx.ModelProto) -> dict[str, int]:
    """Find the largest sum of two products that each quantised layer can form.

    Args:
        model: any ONNX model, in QDQ form or of integer operators.

    Returns:
        By the name of each convolution, Linear and matrix product with quantised weights (by its
        output's name where it has none itself): `255 * (|w1| + |w2|)`, with the two largest
        weights of one output channel. Weights that are not signed constants with a zero point of
        0 count as the worst that 8 bits can hold.
    """
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    makers = {name: node for node in model.graph.node for name in node.output}
    sums = {}
    for node in model.graph.node:
        rows = _quantised_rows(node, constants, makers)
        if rows is not None:
            sums[node.name or node.output[0]] = LARGEST_ACTIVATION * _largest_pair(rows)
    return sums


def require_same_sums(model: onnx.ModelProto, name: str) -> int:
    """Check that no sum of an INT8 model depends on the processor.

    Args:
        model: what is checked.
        name: what to call it in a complaint.

    Returns:
        The largest sum of two products in the model, at most 32,767; 0 without quantised layers.

    Raises:
        BadModel: a layer can form a larger one; names the worst, and how many there are.
    """
    sums = largest_pair_sums(model)
    over = {layer: found for layer, found in sums.items() if found > LARGEST_SUM}
    if over:
        worst = max(over, key=lambda layer: over[layer])
        raise BadModel(
            f"{name} depends on the kind of processor: two products of {worst} can add up to "
            f"{over[worst]:,} ({len(over)} of {len(sums)} quantised layers are like that)",
            f"at most {LARGEST_SUM:,}, which 16 bits hold",
            "export the run again: sbtk export RUN --int8",
        )
    return max(sums.values(), default=0)


def _largest_pair(rows: NDArray[np.int64]) -> int:
    """Return the two largest sizes of a row together, of the row where that is largest."""
    sizes = np.abs(rows)
    if sizes.size == 0:
        return 0
    if sizes.shape[1] == 1:
        return int(sizes.max())
    return int(np.partition(sizes, -2, axis=1)[:, -2:].sum(axis=1).max())


def _quantised_rows(
    node: onnx.NodeProto,
    constants: Mapping[str, onnx.TensorProto],
    makers: Mapping[str, onnx.NodeProto],
) -> NDArray[np.int64] | None:
    """Return a layer's weights as `(outputs, inputs)`; `None` for what is not a quantised layer."""
    zero_point = ""
    if node.op_type in _INTEGER:
        position, at = _INTEGER[node.op_type]
        name = node.input[position]
        zero_point = node.input[at] if len(node.input) > at else ""
    elif node.op_type in _DEQUANTISED and len(node.input) > 1:
        before = makers.get(node.input[1])
        if before is None or before.op_type != "DequantizeLinear":
            return None
        name = before.input[0]
        zero_point = before.input[2] if len(before.input) > 2 else ""
    else:
        return None
    unknown = np.full((1, 2), _LARGEST_WEIGHT, dtype=np.int64)
    if name not in constants or (zero_point and zero_point not in constants):
        return unknown
    weights = numpy_helper.to_array(constants[name])
    is_shifted = bool(zero_point) and numpy_helper.to_array(constants[zero_point]).any()
    if weights.dtype != np.int8 or is_shifted:
        return unknown
    return _rows(node, weights.astype(np.int64))


def _rows(node: onnx.NodeProto, weights: NDArray[np.int64]) -> NDArray[np.int64]:
    if node.op_type == "ConvTranspose":
        # (inputs, outputs / groups, ...): what a kernel adds up differs; take all inputs together.
        return np.moveaxis(weights, 1, 0).reshape(weights.shape[1], -1)
    if "Conv" in node.op_type:
        return weights.reshape(weights.shape[0], -1)
    is_transposed = any(a.name == "transB" and a.i for a in node.attribute)
    if is_transposed:
        return weights
    if weights.ndim == 1:
        return weights[None]
    return np.moveaxis(weights, -2, -1).reshape(-1, weights.shape[-2])
