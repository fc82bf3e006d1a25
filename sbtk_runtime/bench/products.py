"""Matrix products, the fastest thing that a CPU does with numbers: what engines are held against.

Products are square, of constant weights, as in a network, and run by the libraries that engines
use: ONNX Runtime and OpenVINO, both from one graph that is written here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from sbtk_runtime.engines.engine_openvino import openvino_core
from sbtk_runtime.engines.onnxruntime_library import CPU, find_onnxruntime
from sbtk_runtime.errors import EngineUnavailable, MissingExtra

#: What is multiplied: 8-bit integers, or float32.
ProductKind = Literal["int8", "fp32"]

#: Given a graph and its input, returns what runs it.
_Opened = Callable[[bytes, NDArray[Any]], Callable[[], object]]

_LEFT, _RESULT = "left", "result"
_OPSET, _IR_VERSION = 18, 8
_ONNX_TYPES = {"float32": 1, "uint8": 2, "int8": 3}
# Most results then lie within 8 bits.
_SCALE, _RESULT_SCALE = 1 / 128, 1 / 8
# Weights of seven bits, as quantised models have. Processors without VNNI multiply bytes by
# `vpmaddubsw`, which adds two neighbouring products in 16 bits and saturates: a pair of 8-bit
# weights reaches 2 * 255 * 128 = 65,280, one of these at most 2 * 255 * 64 = 32,640 < 32,768. The
# 16-bit sums of Arm's `smlal`, of signed bytes, hold them too.
_MOST_INT8_WEIGHT = 64


@dataclass(frozen=True)
class Product:
    """One matrix product, ready to run.

    Attributes:
        library: what computes it.
        kind: of numbers.
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


def library_products(kind: ProductKind, sizes: Sequence[int], threads: int) -> Iterator[Product]:
    """Yields a product of each size for each library that is here, made when it is asked for."""
    for library, find in (("onnxruntime", _on_onnxruntime), ("openvino", _on_openvino)):
        try:
            opened = find(threads)
        except (EngineUnavailable, MissingExtra):
            continue
        for size in sizes:
            left = _matrix(size, np.uint8 if kind == "int8" else np.float32)
            yield Product(library, kind, size, opened(product_graph(kind, size), left))


def product_graph(kind: ProductKind, size: int) -> bytes:
    """Returns the ONNX file of `result = left @ weights`, both `(size, size)`.

    INT8 is `uint8` times `int8` weights from -64 to 64, which no processor's instructions
    saturate; scaled and rounded to `uint8`, in the pairs of quantised and dequantised values of
    which engines make one product of integers.
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

    def opened(graph: bytes, left: NDArray[Any]) -> Callable[[], object]:
        session = runtime.InferenceSession(graph, options, providers=[CPU])
        return lambda: session.run([_RESULT], {_LEFT: left})[0]

    return opened


def _on_openvino(threads: int) -> _Opened:
    core = openvino_core()
    settings = {
        "NUM_STREAMS": 1,
        "INFERENCE_NUM_THREADS": threads,
        "INFERENCE_PRECISION_HINT": "f32",
        "ENABLE_CPU_PINNING": False,
    }

    def opened(graph: bytes, left: NDArray[Any]) -> Callable[[], object]:
        compiled = core.compile_model(core.read_model(graph), "CPU", settings)
        request = compiled.create_infer_request()
        return lambda: request.infer({_LEFT: left}, share_inputs=True)[0]

    return opened


def _matrix(size: int, dtype: type[np.generic]) -> NDArray[Any]:
    random = np.random.default_rng(size)
    if dtype is np.float32:
        return random.standard_normal((size, size), dtype=np.float32)
    low, high = (0, 255) if dtype is np.uint8 else (-_MOST_INT8_WEIGHT, _MOST_INT8_WEIGHT)
    return random.integers(low, high, (size, size), dtype, endpoint=True)


# What follows writes ONNX's protobuf messages; the numbers are those of onnx.proto3's fields.


def _model(
    nodes: Sequence[bytes],
    constants: Mapping[str, NDArray[Any]],
    shape: tuple[int, ...],
    dtype: str,
) -> bytes:
    graph = b"".join(_bytes(1, node) for node in nodes) + _text(2, "product")
    graph += b"".join(_bytes(5, _tensor(name, value)) for name, value in constants.items())
    graph += _bytes(11, _port(_LEFT, shape, dtype)) + _bytes(12, _port(_RESULT, shape, dtype))
    opset = _text(1, "") + _int(2, _OPSET)
    return _int(1, _IR_VERSION) + _bytes(7, graph) + _bytes(8, opset)


def _node(op: str, inputs: Sequence[str], output: str) -> bytes:
    return b"".join(_text(1, name) for name in inputs) + _text(2, output) + _text(4, op)


def _tensor(name: str, value: NDArray[Any]) -> bytes:
    dims = b"".join(_int(1, size) for size in value.shape)
    kind = _int(2, _ONNX_TYPES[value.dtype.name])
    return dims + kind + _text(8, name) + _bytes(9, value.tobytes())


def _port(name: str, shape: tuple[int, ...], dtype: str) -> bytes:
    dims = b"".join(_bytes(1, _int(1, size)) for size in shape)
    tensor = _int(1, _ONNX_TYPES[dtype]) + _bytes(2, dims)
    return _text(1, name) + _bytes(2, _bytes(1, tensor))


def _text(number: int, text: str) -> bytes:
    return _bytes(number, text.encode())


def _bytes(number: int, content: bytes) -> bytes:
    return _varint(number << 3 | 2) + _varint(len(content)) + content


def _int(number: int, value: int) -> bytes:
    return _varint(number << 3) + _varint(value)


def _varint(value: int) -> bytes:
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes((*encoded, value))
