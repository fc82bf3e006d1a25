"""Gives quantised layers back the mean output that rounding their weights took from them.

A rounded weight is off by some error, and a layer's output by error times input. Inputs that come
out of a ReLU are positive, so these do not cancel: each output channel is shifted by
`sum_i (W' - W)_i E[x_i]`, which is taken off the bias (Nagel et al. 2019, section 4.2,
https://arxiv.org/abs/1906.04721). It costs nothing when the model runs.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from sbtk_export.model_inputs import ModelInputs
from sbtk_runtime.onnx_file import INPUT_NAME

Means = Mapping[str, NDArray[np.float64]]

# What the mean is taken over, for inputs (N, C, H, W) and (N, C).
_AXES = {"Conv": (0, 2, 3), "Gemm": (0,)}
_BATCH = 10


def mean_inputs(model: onnx.ModelProto, inputs: ModelInputs) -> Means:
    """Returns the mean `(C,) float64` of what each convolution and Linear reads, by tensor name.

    Args:
        model: the FP32 model.
        inputs: the pictures of the calibration.
    """
    session = onnxruntime.InferenceSession(
        _with_means(model).SerializeToString(), providers=["CPUExecutionProvider"]
    )
    outputs = [output.name for output in session.get_outputs()][1:]
    sums: dict[str, NDArray[np.float64]] = {}
    for feeds in inputs.batches(model, _BATCH):
        count = len(feeds[INPUT_NAME])
        for name, mean in zip(outputs, session.run(outputs, feeds), strict=True):
            sums[name] = sums.get(name, 0.0) + mean.astype(np.float64) * count
    return {name.removesuffix("_mean"): total / len(inputs) for name, total in sums.items()}


def correct_biases(quantised: onnx.ModelProto, original: onnx.ModelProto, means: Means) -> None:
    """Changes the biases of `quantised`, a QDQ model, so that mean outputs are as before.

    Biases are INT32 behind a DequantizeLinear, or FP32. Layers without one, in groups, or with
    weights that are not quantised stay as they are.

    Args:
        quantised: made from `original`, whose node names it has.
        original: the FP32 model.
        means: from `mean_inputs`.
    """
    weights = {tensor.name: tensor for tensor in original.graph.initializer}
    constants = {tensor.name: tensor for tensor in quantised.graph.initializer}
    makers = {name: node for node in quantised.graph.node for name in node.output}
    layers = {node.name: node for node in original.graph.node if node.op_type in _AXES}
    for node in quantised.graph.node:
        if node.name not in layers or len(node.input) < 3 or node.input[1] not in makers:
            continue
        source = layers[node.name]
        exact = numpy_helper.to_array(weights[source.input[1]])
        rounded = _dequantised(constants, makers[node.input[1]])
        errors = (rounded - exact).reshape(*exact.shape[:2], -1).sum(axis=2)
        mean = means[source.input[0]]
        if errors.shape[1] != len(mean):
            continue
        shift = errors @ mean
        name = node.input[2]
        if name not in constants:
            name, scale_name = makers[name].input[:2]
            shift = np.rint(shift / numpy_helper.to_array(constants[scale_name]))
        before = numpy_helper.to_array(constants[name])
        bias = before - shift.astype(before.dtype)
        constants[name].CopyFrom(numpy_helper.from_array(bias, name))


def _with_means(model: onnx.ModelProto) -> onnx.ModelProto:
    """Returns a copy of the model that also puts out the mean of each layer's input."""
    copied = onnx.ModelProto()
    copied.CopyFrom(model)
    wanted = {node.input[0]: node.op_type for node in model.graph.node if node.op_type in _AXES}
    for name, operator in wanted.items():
        axes = np.array(_AXES[operator], dtype=np.int64)
        copied.graph.initializer.append(numpy_helper.from_array(axes, f"{name}_axes"))
        copied.graph.node.append(
            helper.make_node("ReduceMean", [name, f"{name}_axes"], [f"{name}_mean"], keepdims=0)
        )
        copied.graph.output.append(
            helper.make_tensor_value_info(f"{name}_mean", TensorProto.FLOAT, None)
        )
    return copied


def _dequantised(
    constants: Mapping[str, onnx.TensorProto], node: onnx.NodeProto
) -> NDArray[np.float64]:
    """Returns the weights `(O, ...)` that a DequantizeLinear node, one scale a row, gives."""
    value, scale = (numpy_helper.to_array(constants[name]) for name in node.input[:2])
    return value.astype(np.float64) * scale.astype(np.float64).reshape(-1, *[1] * (value.ndim - 1))
