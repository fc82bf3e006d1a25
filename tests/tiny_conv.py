"""A small convolutional model in every precision, as sbtk export writes them, made from a seed."""

from __future__ import annotations

from typing import Literal

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto, helper, numpy_helper

DIM = 16
_CHANNELS = 256
_PATCH_PX = 32

Kind = Literal["fp32", "fp16", "int8 for TensorRT", "int8 for CPUs"]
KINDS: tuple[Kind, ...] = ("fp32", "fp16", "int8 for TensorRT", "int8 for CPUs")

_Constants = dict[str, NDArray[np.generic]]


def tiny_conv_model(kind: Kind = "fp32", seed: int = 0) -> onnx.ModelProto:
    """Return a model of two convolutions: `images (N, 224, 224, 3) uint8` to unit rows `(N, 16)`.

    The weights of each take some 3 MB in FP32; INT8 is the second one's alone. Pooling, the last
    product and the norm are FP32 in every precision.
    """
    random = np.random.default_rng(seed)
    first = _weights(random, (_CHANNELS, 3, _PATCH_PX, _PATCH_PX))
    second = _weights(random, (_CHANNELS, _CHANNELS, 3, 3))
    constants: _Constants = {
        "middle": np.array(128.0, np.float32),
        "scale": np.array(1 / 128.0, np.float32),
        "weights": random.standard_normal((DIM, _CHANNELS)).astype(np.float32),
        "bias": np.full(DIM, 0.05, np.float32),
    }
    nodes = [
        helper.make_node("Cast", ["images"], ["cast"], to=TensorProto.FLOAT),
        helper.make_node("Transpose", ["cast"], ["planes"], perm=[0, 3, 1, 2]),
        helper.make_node("Sub", ["planes", "middle"], ["centred"]),
        helper.make_node("Mul", ["centred", "scale"], ["scaled"]),
    ]
    if kind == "fp32":
        nodes += _convolutions(constants, "scaled", first, second, np.dtype(np.float32))
    elif kind == "fp16":
        nodes.append(helper.make_node("Cast", ["scaled"], ["half"], to=TensorProto.FLOAT16))
        nodes += _convolutions(constants, "half", first, second, np.dtype(np.float16))
        nodes.append(helper.make_node("Cast", ["features"], ["full"], to=TensorProto.FLOAT))
    else:
        nodes += _quantised(constants, first, second, is_symmetric=kind == "int8 for TensorRT")
    last = "full" if kind == "fp16" else "features"
    nodes += [
        helper.make_node("GlobalAveragePool", [last], ["pooled"]),
        helper.make_node("Flatten", ["pooled"], ["flat"], axis=1),
        helper.make_node("Gemm", ["flat", "weights", "bias"], ["product"], transB=1),
        helper.make_node("LpNormalization", ["product"], ["embeddings"], axis=1, p=2),
    ]
    graph = helper.make_graph(
        nodes,
        "tiny conv",
        [helper.make_tensor_value_info("images", TensorProto.UINT8, ["batch", 224, 224, 3])],
        [helper.make_tensor_value_info("embeddings", TensorProto.FLOAT, ["batch", DIM])],
        [numpy_helper.from_array(value, key) for key, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)])
    model.ir_version = 9
    onnx.checker.check_model(model)
    return model


def _weights(random: np.random.Generator, shape: tuple[int, ...]) -> NDArray[np.float32]:
    return (random.standard_normal(shape) / 64).astype(np.float32)


def _convolutions(
    constants: _Constants,
    source: str,
    first: NDArray[np.float32],
    second: NDArray[np.float32],
    dtype: np.dtype[np.floating],
) -> list[NodeProto]:
    constants["first"], constants["second"] = first.astype(dtype), second.astype(dtype)
    return [
        _convolution([source, "first"], "patches", _PATCH_PX),
        helper.make_node("Relu", ["patches"], ["positive"]),
        _convolution(["positive", "second"], "features", 1),
    ]


def _quantised(
    constants: _Constants,
    first: NDArray[np.float32],
    second: NDArray[np.float32],
    *,
    is_symmetric: bool,
) -> list[NodeProto]:
    """Quantise the second convolution: input, weights and, for CPUs, an int32 bias."""
    weight_scale = np.abs(second).max() / 127
    constants["first"] = first
    constants["second"] = np.round(second / weight_scale).astype(np.int8)
    constants["second_scale"] = np.array(weight_scale, np.float32)
    constants["second_zero"] = np.array(0, np.int8)
    constants["in_scale"] = np.array(0.05, np.float32)
    constants["in_zero"] = np.array(0, np.int8 if is_symmetric else np.uint8)
    nodes = [
        _convolution(["scaled", "first"], "patches", _PATCH_PX),
        helper.make_node("Relu", ["patches"], ["positive"]),
        helper.make_node("QuantizeLinear", ["positive", "in_scale", "in_zero"], ["whole"]),
        helper.make_node("DequantizeLinear", ["whole", "in_scale", "in_zero"], ["real"]),
        helper.make_node(
            "DequantizeLinear", ["second", "second_scale", "second_zero"], ["second_real"]
        ),
    ]
    if is_symmetric:
        return [*nodes, _convolution(["real", "second_real"], "features", 1)]
    constants["offset"] = np.zeros(_CHANNELS, np.int32)
    constants["offset_scale"] = np.array(0.05 * weight_scale, np.float32)
    nodes.append(
        helper.make_node("DequantizeLinear", ["offset", "offset_scale"], ["offset_real"], "bias_DQ")
    )
    return [*nodes, _convolution(["real", "second_real", "offset_real"], "features", 1)]


def _convolution(inputs: list[str], output: str, stride: int) -> NodeProto:
    return helper.make_node("Conv", inputs, [output], strides=[stride, stride])
