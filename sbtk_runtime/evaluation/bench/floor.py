"""The floor: the time that a CPU needs for a model's multiplications alone."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from sbtk_runtime.engines.onnxruntime import CPU, find_onnxruntime
from sbtk_runtime.engines.openvino import openvino_core
from sbtk_runtime.errors import BadModel, EngineUnavailable, MissingExtra
from sbtk_runtime.evaluation.bench.interleave import Blocks, compute_ratio
from sbtk_runtime.evaluation.metrics import percentiles
from sbtk_runtime.onnx_file import DOMAIN_NAME, Field, NotProtobuf, fields, message, varint
from sbtk_runtime.preprocess import SIZE_PX


@dataclass(frozen=True)
class Floor:
    """The time of a model's multiplications at the speed of the fastest matrix product.

    Attributes:
        kind: type of the multiplied numbers.
        library, size: library and matrix size of the fastest product.
        gmac_per_s: its median speed in billions of multiply-accumulates per second.
        model_macs: multiply-accumulates of the model for one image.
        ms: milliseconds for one image at that speed.
    """

    kind: ProductKind
    library: str
    size: int
    gmac_per_s: float
    model_macs: int
    ms: float


def find_fastest_product(candidates: Iterable[Product], seconds: float) -> Product | None:
    """Return the product with the fastest run, or `None` if there are no candidates.

    Each candidate runs for some `seconds`. They are created one by one, and only the best is kept.
    """
    best, best_speed = None, 0.0
    for product in candidates:
        product.run()
        fastest_s = math.inf
        started = time.perf_counter()
        while fastest_s == math.inf or time.perf_counter() - started < seconds:
            run_started = time.perf_counter()
            product.run()
            fastest_s = min(fastest_s, time.perf_counter() - run_started)
        if product.macs / fastest_s > best_speed:
            best, best_speed = product, product.macs / fastest_s
    return best


def compute_floor(product: Product, blocks: Blocks, model_macs: int) -> Floor:
    """Return the floor, from the milliseconds of the product's runs."""
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
    """Return an engine's time as a multiple of the floor, from runs in the same rounds."""
    return compute_ratio(product_blocks, engine) * product.macs / (batch * model_macs)


#: Type of the multiplied numbers.
ProductKind = Literal["int8", "fp32"]

#: Opens a graph with its input and returns a function that runs it.
_Opened = Callable[[bytes, NDArray[Any]], Callable[[], object]]

_LEFT, _RESULT = "left", "result"
_OPSET, _IR_VERSION = 18, 8
_ONNX_TYPES = {"float32": 1, "uint8": 2, "int8": 3}
# With these scales, most results fit into 8 bits.
_SCALE, _RESULT_SCALE = 1 / 128, 1 / 8
# 7-bit weights, as in quantised models. Processors without VNNI multiply bytes by `vpmaddubsw`,
# which adds two products in 16 bits and saturates: 8-bit weights reach 2 * 255 * 128 = 65,280,
# 7-bit weights at most 2 * 255 * 64 = 32,640 < 32,768. These also fit Arm's `smlal`.
_MOST_INT8_WEIGHT = 64


@dataclass(frozen=True)
class Product:
    """A matrix product, ready to run.

    Attributes:
        library: the library that computes it.
        kind: type of the numbers.
        size: rows and columns of both matrices.
        run: computes it once.
    """

    library: str
    kind: ProductKind
    size: int
    run: Callable[[], object]

    @property
    def macs(self) -> int:
        """Multiply-accumulates of one run."""
        return self.size**3


def iterate_products(kind: ProductKind, sizes: Sequence[int], threads: int) -> Iterator[Product]:
    """Yield a product of each size for each installed inference library."""
    for library, find in (("onnxruntime", _on_onnxruntime), ("openvino", _on_openvino)):
        try:
            open_graph = find(threads)
        except (EngineUnavailable, MissingExtra):
            continue
        for size in sizes:
            left = _matrix(size, np.uint8 if kind == "int8" else np.float32)
            yield Product(library, kind, size, open_graph(product_graph(kind, size), left))


def product_graph(kind: ProductKind, size: int) -> bytes:
    """Return the ONNX file of `result = left @ weights`, both `(size, size)`.

    INT8 multiplies `uint8` by `int8` weights from -64 to 64, which do not saturate on any
    processor, and rounds to `uint8`; engines fuse its quantise and dequantise nodes into one
    integer product.
    """
    shape = (size, size)
    if kind == "fp32":
        nodes = [_node("MatMul", [_LEFT, "weights"], _RESULT)]
        constants: dict[str, NDArray[Any]] = {"weights": _matrix(size, np.float32)}
        return _model(nodes, constants, shape, "float32")
    nodes = [
        _node("DequantizeLinear", [_LEFT, "scale", "zero"], "left_float"),
        _node("DequantizeLinear", ["weights", "scale", "weights_zero"], "weights_float"),
        _node("MatMul", ["left_float", "weights_float"], "result_float"),
        _node("QuantizeLinear", ["result_float", "result_scale", "zero"], _RESULT),
    ]
    constants = {
        "weights": _matrix(size, np.int8),
        "scale": np.array(_SCALE, dtype=np.float32),
        "result_scale": np.array(_RESULT_SCALE, dtype=np.float32),
        "zero": np.array(0, dtype=np.uint8),
        "weights_zero": np.array(0, dtype=np.int8),
    }
    return _model(nodes, constants, shape, "uint8")


def _on_onnxruntime(threads: int) -> _Opened:
    runtime = find_onnxruntime()
    options = runtime.SessionOptions()
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.force_spinning_stop", "1")

    def open_graph(graph: bytes, left: NDArray[Any]) -> Callable[[], object]:
        session = runtime.InferenceSession(graph, options, providers=[CPU])
        return lambda: session.run([_RESULT], {_LEFT: left})[0]

    return open_graph


def _on_openvino(threads: int) -> _Opened:
    core = openvino_core()
    settings = {
        "NUM_STREAMS": 1,
        "INFERENCE_NUM_THREADS": threads,
        "INFERENCE_PRECISION_HINT": "f32",
        "ENABLE_CPU_PINNING": False,
    }

    def open_graph(graph: bytes, left: NDArray[Any]) -> Callable[[], object]:
        compiled = core.compile_model(core.read_model(graph), "CPU", settings)
        request = compiled.create_infer_request()
        return lambda: request.infer({_LEFT: left}, share_inputs=True)[0]

    return open_graph


def _matrix(size: int, dtype: type[np.generic]) -> NDArray[Any]:
    random = np.random.default_rng(size)
    if dtype is np.float32:
        return random.standard_normal((size, size), dtype=np.float32)
    low, high = (0, 255) if dtype is np.uint8 else (-_MOST_INT8_WEIGHT, _MOST_INT8_WEIGHT)
    return random.integers(low, high, (size, size), dtype, endpoint=True)


# Writing ONNX's protobuf messages, with the field numbers of onnx.proto3.


def _model(
    nodes: Sequence[bytes],
    constants: Mapping[str, NDArray[Any]],
    shape: tuple[int, ...],
    dtype: str,
) -> bytes:
    graph: list[Field] = [*((1, node) for node in nodes), (2, b"product")]
    graph += [(5, _tensor(name, value)) for name, value in constants.items()]
    graph += [(11, _port(_LEFT, shape, dtype)), (12, _port(_RESULT, shape, dtype))]
    opset = message([(1, b""), (2, _OPSET)])
    return message([(1, _IR_VERSION), (7, message(graph)), (8, opset)])


def _node(op: str, inputs: Sequence[str], output: str) -> bytes:
    named: list[Field] = [(1, name.encode()) for name in inputs]
    return message([*named, (2, output.encode()), (4, op.encode())])


def _tensor(name: str, value: NDArray[Any]) -> bytes:
    dims: list[Field] = [(1, size) for size in value.shape]
    kind = _ONNX_TYPES[value.dtype.name]
    return message([*dims, (2, kind), (8, name.encode()), (9, value.tobytes())])


def _port(name: str, shape: tuple[int, ...], dtype: str) -> bytes:
    dims = message((1, message([(1, size)])) for size in shape)
    tensor = message([(1, _ONNX_TYPES[dtype]), (2, dims)])
    return message([(1, name.encode()), (2, message([(1, tensor)]))])


#: Height and width of a feature map.
_Size = tuple[int, int]

_ONE: _Size = (1, 1)
_POOLS = frozenset({"AveragePool", "MaxPool"})
_PRODUCTS = frozenset({"Gemm", "MatMul"})
#: Operators that keep height and width, and the shape of a constant.
_SAME_SIZE = frozenset(
    {"Add", "BatchNormalization", "Cast", "Clip", "Concat", "DequantizeLinear", "Div", "Identity"}
    | {"LpNormalization", "Mul", "QuantizeLinear", "Relu", "Sigmoid", "Softmax", "Sub", "Transpose"}
    | {"Unsqueeze"}
)
#: Operators that reduce a feature map to one position.
_POOLED = frozenset({"Flatten", "GlobalAveragePool", "ReduceL2", "ReduceMean", "Reshape"})

# Numbers of onnx.proto3's fields.
_GRAPH_OF_MODEL = 7
_NODE, _INITIALIZER, _INPUT = 1, 5, 11
_NODE_INPUT, _NODE_OUTPUT, _NODE_OP, _NODE_ATTRIBUTE = 1, 2, 4, 5
_TENSOR_DIM, _TENSOR_NAME = 1, 8
_ATTRIBUTE_NAME, _ATTRIBUTE_TEXT, _ATTRIBUTE_INTS = 1, 4, 8


def count_macs(content: bytes, size_px: int = SIZE_PX) -> int:
    """Return the multiply-accumulates of all convolutions and matrix products for one image.

    Args:
        content: an ONNX file in which every weight is a constant.
        size_px: height and width of the image.

    Raises:
        BadModel: not an ONNX model, or the size of a layer cannot be determined.
    """
    try:
        graph = _graph_of(memoryview(content))
    except (NotProtobuf, UnicodeDecodeError) as problem:
        raise BadModel(f"not an ONNX model ({problem})", "a file of sbtk export") from problem
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
        size, macs = _measure_node(node, weights, sizes)
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


def _measure_node(
    node: _Node, weights: dict[str, list[int]], sizes: dict[str, _Size]
) -> tuple[_Size, int]:
    """Return the size of a node's output, and its multiply-accumulates."""
    # A factor per channel is broadcast to the whole map.
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
    raise BadModel(f"cannot count the multiplications of {node.op}", "a model of sbtk export")


def _windows(node: _Node, size: _Size, kernel: Sequence[int]) -> _Size:
    """Return the output size of a convolution or pool."""
    if node.texts.get("auto_pad", b"NOTSET") not in (b"NOTSET", b"VALID"):
        raise BadModel(f"{node.op} with auto_pad", "explicit pads")
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
    for content in _messages(model, _GRAPH_OF_MODEL):
        for number, value in fields(content):
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


def _node_of(content: memoryview) -> _Node:
    node = _Node()
    for number, value in fields(content):
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


def _messages(content: memoryview, wanted: int) -> list[memoryview]:
    found = fields(content)
    return [value for number, value in found if number == wanted and not isinstance(value, int)]


def _ints(content: memoryview, wanted: int) -> list[int]:
    """Return the integers of a repeated field, packed or not."""
    found: list[int] = []
    for number, value in fields(content):
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
