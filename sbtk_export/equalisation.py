"""Evens out the channels that one quantisation step has to serve, without changing the model.

There is one step for all channels of an activation, so that a few large channels leave few values
to the rest. ReLU and maximum do not care about a positive factor: a channel may be made smaller by
the convolution before, and larger again by those behind (Nagel et al. 2019, section 4.1,
https://arxiv.org/abs/1906.04721). Its excess is shared between the activation and the weights that
read it as in Xiao et al. 2022, equation 4, https://arxiv.org/abs/2211.10438.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from sbtk_export.model_inputs import ModelInputs

_POSITIVE = frozenset({"Relu", "MaxPool"})
# The exponent alpha of Xiao et al.
_SHARE_OF_ACTIVATIONS = 0.5
_LEAST = 1e-6
_BATCH = 10

_Maxima = Mapping[str, NDArray[np.float64]]


def equalise_channels(model: onnx.ModelProto, inputs: ModelInputs) -> int:
    """Evens out, in place, what convolutions hand on to others; returns how many of them do so.

    What the model computes stays the same, up to rounding in FP32. Channels that reach anything
    but convolutions, ReLU and maxima stay as they are, and so do convolutions in groups.

    Args:
        model: in FP32.
        inputs: pictures that show how large each channel gets.
    """
    readers = _readers(model)
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    behind = {
        node.output[0]: found
        for node in model.graph.node
        if _is_scalable(node, constants) and (found := _convolutions_behind(node, readers))
    }
    read = sorted({convolution.input[0] for found in behind.values() for convolution in found})
    maxima = _channel_maxima(model, read, inputs)
    for node in model.graph.node:
        if not node.output or node.output[0] not in behind:
            continue
        found = behind[node.output[0]]
        factors = _factors(found, constants, maxima)
        for name in node.input[1:]:
            _scale(constants[name], 1 / factors, axis=0)
        for convolution in found:
            _scale(constants[convolution.input[1]], factors, axis=1)
    return len(behind)


def _readers(model: onnx.ModelProto) -> dict[str, list[onnx.NodeProto]]:
    # Whoever runs the model reads its outputs.
    readers: dict[str, list[onnx.NodeProto]] = {
        value.name: [onnx.NodeProto()] for value in model.graph.output
    }
    for node in model.graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    return readers


def _is_scalable(node: onnx.NodeProto, constants: Mapping[str, onnx.TensorProto]) -> bool:
    return _is_whole(node) and all(name in constants for name in node.input[1:])


def _is_whole(node: onnx.NodeProto) -> bool:
    """Whether a node is a convolution each of whose outputs reads all of its inputs."""
    is_in_groups = any(a.name == "group" and a.i != 1 for a in node.attribute)
    return node.op_type == "Conv" and not is_in_groups


def _convolutions_behind(
    node: onnx.NodeProto, readers: Mapping[str, list[onnx.NodeProto]]
) -> list[onnx.NodeProto]:
    """Returns the convolutions that alone read a node's channels; none if others do too."""
    found: list[onnx.NodeProto] = []
    for reader in readers.get(node.output[0], []):
        if _is_whole(reader):
            found.append(reader)
        elif reader.op_type in _POSITIVE and len(reader.output) == 1:
            further = _convolutions_behind(reader, readers)
            if not further:
                return []
            found += further
        else:
            return []
    return found


def _channel_maxima(model: onnx.ModelProto, names: list[str], inputs: ModelInputs) -> _Maxima:
    """Returns the largest value `(C,) float64` of each channel, as a mean over batches."""
    if not names:
        return {}
    copied = onnx.ModelProto()
    copied.CopyFrom(model)
    axes = numpy_helper.from_array(np.array([0, 2, 3], dtype=np.int64), "equalised_axes")
    copied.graph.initializer.append(axes)
    for name in names:
        top = f"{name}_top"
        copied.graph.node.append(
            helper.make_node("ReduceMax", [name, axes.name], [top], keepdims=0)
        )
        copied.graph.output.append(helper.make_tensor_value_info(top, TensorProto.FLOAT, None))
    session = onnxruntime.InferenceSession(
        copied.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    outputs = [f"{name}_top" for name in names]
    batches = [session.run(outputs, feeds) for feeds in inputs.batches(model, _BATCH)]
    return {
        name: np.mean([batch[index] for batch in batches], axis=0, dtype=np.float64)
        for index, name in enumerate(names)
    }


def _factors(
    behind: list[onnx.NodeProto], constants: Mapping[str, onnx.TensorProto], maxima: _Maxima
) -> NDArray[np.float64]:
    """Returns what each channel `(C,)` is divided by; 1 for channels that are never used."""
    activations = np.max([maxima[node.input[0]] for node in behind], axis=0)
    weights = np.max([_reach(constants[node.input[1]]) for node in behind], axis=0)
    is_used = (activations > _LEAST) & (weights > _LEAST)
    factors: NDArray[np.float64] = np.ones_like(activations)
    factors[is_used] = activations[is_used] ** _SHARE_OF_ACTIVATIONS / weights[is_used] ** (
        1 - _SHARE_OF_ACTIVATIONS
    )
    return factors


def _reach(weights: onnx.TensorProto) -> NDArray[np.float64]:
    """Returns the largest size `(C,)` of the weights that read each channel."""
    values = np.abs(numpy_helper.to_array(weights)).max(axis=(0, 2, 3))
    return np.asarray(values, dtype=np.float64)


def _scale(tensor: onnx.TensorProto, factors: NDArray[np.float64], axis: int) -> None:
    values = numpy_helper.to_array(tensor)
    shape = [1] * values.ndim
    shape[axis] = -1
    scaled = (values * factors.reshape(shape)).astype(values.dtype)
    tensor.CopyFrom(numpy_helper.from_array(scaled, tensor.name))
