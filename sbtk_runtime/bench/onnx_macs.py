"""How much a model has to multiply for one picture, counted in its ONNX file.

Counted in the file and not in the model that was trained: export folds layers and moves strides,
which spares work. It needs no ONNX library.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from sbtk_runtime.errors import BadModel
from sbtk_runtime.onnx_file import DOMAIN_NAME, NotProtobuf, fields, varint
from sbtk_runtime.preprocess import SIZE_PX

#: Height and width of a feature map.
_Size = tuple[int, int]

_ONE: _Size = (1, 1)
_POOLS = frozenset({"AveragePool", "MaxPool"})
_PRODUCTS = frozenset({"Gemm", "MatMul"})
#: What leaves height and width alone; of a constant, what leaves its shape alone.
_SAME_SIZE = frozenset(
    {"Add", "BatchNormalization", "Cast", "Clip", "Concat", "DequantizeLinear", "Div", "Identity"}
    | {"LpNormalization", "Mul", "QuantizeLinear", "Relu", "Sigmoid", "Softmax", "Sub", "Transpose"}
    | {"Unsqueeze"}
)
#: What leaves one position, or rows that stand for whole pictures.
_POOLED = frozenset({"Flatten", "GlobalAveragePool", "ReduceL2", "ReduceMean", "Reshape"})

# Numbers of onnx.proto3's fields.
_GRAPH_OF_MODEL = 7
_NODE, _INITIALIZER, _INPUT = 1, 5, 11
_NODE_INPUT, _NODE_OUTPUT, _NODE_OP, _NODE_ATTRIBUTE = 1, 2, 4, 5
_TENSOR_DIM, _TENSOR_NAME = 1, 8
_ATTRIBUTE_NAME, _ATTRIBUTE_TEXT, _ATTRIBUTE_INTS = 1, 4, 8


def multiply_accumulates(content: bytes, size_px: int = SIZE_PX) -> int:
    """Returns the multiply-accumulates of all convolutions and matrix products for one picture.

    Args:
        content: an ONNX file in which every weight is a constant.
        size_px: side of the picture.

    Raises:
        BadModel: it is no ONNX model, or has a layer whose size cannot be told.
    """
    try:
        graph = _graph_of(memoryview(content))
    except (NotProtobuf, UnicodeDecodeError) as problem:
        raise BadModel(f"not an ONNX model ({problem})", "the whole file, as exported") from problem
    weights = dict(graph.initializers)
    sizes: dict[str, _Size] = {
        name: _ONE if name == DOMAIN_NAME else (size_px, size_px)
        for name in graph.inputs
        if name not in weights
    }
    total = 0
    for node in graph.nodes:
        if node.inputs and node.inputs[0] in weights and node.op in _SAME_SIZE:
            weights |= dict.fromkeys(node.outputs, weights[node.inputs[0]])
            continue
        size, macs = _judged(node, weights, sizes)
        sizes |= dict.fromkeys(node.outputs, size)
        total += macs
    return total


@dataclass
class _Node:
    op: str = ""
    inputs: list[str] = field(default_factory=list)
    outputs: list[str] = field(default_factory=list)
    ints: dict[str, list[int]] = field(default_factory=dict)
    texts: dict[str, bytes] = field(default_factory=dict)


@dataclass
class _Graph:
    nodes: list[_Node] = field(default_factory=list)
    inputs: list[str] = field(default_factory=list)
    initializers: dict[str, list[int]] = field(default_factory=dict)


def _judged(
    node: _Node, weights: dict[str, list[int]], sizes: dict[str, _Size]
) -> tuple[_Size, int]:
    """Returns the size of what a node makes, and its multiply-accumulates."""
    # A factor for each channel is spread over the whole map.
    size = max((sizes[name] for name in node.inputs if name in sizes), default=_ONE)
    if node.op == "Conv" and node.inputs[1] in weights:
        shape = weights[node.inputs[1]]
        made = _windows(node, size, shape[2:])
        return made, math.prod(shape) * math.prod(made)
    if node.op in _POOLS:
        return _windows(node, size, node.ints["kernel_shape"]), 0
    if node.op in _PRODUCTS and size == _ONE and node.inputs[1] in weights:
        return _ONE, math.prod(weights[node.inputs[1]])
    if node.op in _POOLED:
        return _ONE, 0
    if node.op in _SAME_SIZE:
        return size, 0
    raise BadModel(f"cannot tell how much a layer {node.op} multiplies", "a model of sbtk export")


def _windows(node: _Node, size: _Size, kernel: Sequence[int]) -> _Size:
    """Returns how many windows of a convolution or pool fit into a feature map, each way."""
    if node.texts.get("auto_pad", b"NOTSET") not in (b"NOTSET", b"VALID"):
        raise BadModel(f"a layer {node.op} that pads by itself", "pads in numbers")
    strides = node.ints.get("strides", [1, 1])
    dilations = node.ints.get("dilations", [1, 1])
    pads = node.ints.get("pads", [0, 0, 0, 0])
    rounded = math.ceil if node.ints.get("ceil_mode", [0])[0] else math.floor
    height, width = (
        rounded(
            (size[axis] + pads[axis] + pads[axis + 2] - dilations[axis] * (kernel[axis] - 1) - 1)
            / strides[axis]
        )
        + 1
        for axis in (0, 1)
    )
    return height, width


def _graph_of(model: memoryview) -> _Graph:
    graph = _Graph()
    for message in _messages(model, _GRAPH_OF_MODEL):
        for number, value in fields(message):
            if not isinstance(value, memoryview):
                continue
            if number == _NODE:
                graph.nodes.append(_node_of(value))
            elif number == _INPUT:
                graph.inputs += [bytes(name).decode() for name in _messages(value, 1)]
            elif number == _INITIALIZER:
                name = b"".join(bytes(part) for part in _messages(value, _TENSOR_NAME))
                graph.initializers[name.decode()] = _ints(value, _TENSOR_DIM)
    return graph


def _node_of(message: memoryview) -> _Node:
    node = _Node()
    for number, value in fields(message):
        if not isinstance(value, memoryview):
            continue
        if number == _NODE_INPUT:
            node.inputs.append(bytes(value).decode())
        elif number == _NODE_OUTPUT:
            node.outputs.append(bytes(value).decode())
        elif number == _NODE_OP:
            node.op = bytes(value).decode()
        elif number == _NODE_ATTRIBUTE:
            name = b"".join(bytes(part) for part in _messages(value, _ATTRIBUTE_NAME)).decode()
            # One integer is field 3, several are field 8; none has both.
            node.ints[name] = _ints(value, 3) or _ints(value, _ATTRIBUTE_INTS)
            for text in _messages(value, _ATTRIBUTE_TEXT):
                node.texts[name] = bytes(text)
    return node


def _messages(message: memoryview, wanted: int) -> list[memoryview]:
    return [
        value
        for number, value in fields(message)
        if number == wanted and isinstance(value, memoryview)
    ]


def _ints(message: memoryview, wanted: int) -> list[int]:
    """Returns the integers of a repeated field, packed or not."""
    found: list[int] = []
    for number, value in fields(message):
        if number != wanted:
            continue
        if isinstance(value, int):
            found.append(value)
            continue
        position = 0
        while position < len(value):
            one, position = varint(value, position)
            found.append(one)
    return found
