"""Make the ONNX graph of regions from a model's own: same trunk, pooled windows, same head.

    images (N, 224, 224, 3) -> trunk -> ReduceMean                -> head -> embeddings (N, D)
    images (N, S, S, 3)     -> trunk -> AveragePool, ..., Flatten -> head -> embeddings (N, R, D)

The trunk is convolutional and takes any size. Weights, quantisation and norm stay as they are, so a
bundle needs no second file for any precision. The protobuf is edited field by field, without an
ONNX library.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from sbtk_runtime.errors import BadModel
from sbtk_runtime.onnx_file import INPUT_NAME, OUTPUT_NAME, Field, NotProtobuf, fields, message
from sbtk_runtime.preprocess import SIZE_PX
from sbtk_runtime.regions import RegionGrid

_PREFIX = "regions_"

# Numbers of fields, after onnx.proto3.
_GRAPH_OF_MODEL = 7
_NODE, _TENSOR, _INPUT, _OUTPUT, _VALUE_INFO = 1, 5, 11, 12, 13
_INPUTS_OF_NODE, _OUTPUTS_OF_NODE, _NAME_OF_NODE, _OP_OF_NODE, _ATTRIBUTE = 1, 2, 3, 4, 5
_NAME_OF_ATTRIBUTE, _INT_OF_ATTRIBUTE, _INTS_OF_ATTRIBUTE, _TYPE_OF_ATTRIBUTE = 1, 3, 8, 20
_ATTRIBUTE_INT, _ATTRIBUTE_INTS = 2, 7
_DIMS_OF_TENSOR, _TYPE_OF_TENSOR, _NAME_OF_TENSOR, _RAW_DATA = 1, 2, 8, 9
_INT64 = 7
# A value's type: ValueInfo.type -> Type.tensor_type -> Tensor.shape -> Shape.dim -> Dim.dim_value.
_TYPE_OF_VALUE, _TENSOR_TYPE, _SHAPE, _DIM, _DIM_VALUE = 2, 1, 2, 1, 1


def region_graph(content: bytes, grid: RegionGrid, dim: int, name: str) -> bytes:
    """Return the ONNX file of a model that returns an embedding of each window of its images.

    Its input `images` is `(N, S, S, 3) uint8`, S being the grid's `size_px`; its output
    `embeddings` is `(N, R, D) float32`, in the order of `grid.boxes()`.

    Args:
        content: the model's own file, which `onnx_file.check_onnx` has accepted.
        grid: the windows.
        dim: length of an embedding.
        name: the file in error messages.

    Raises:
        BadModel: the model does not end with a mean over the map and a head, or weighs the map's
            positions by each other, so that a window has no embedding of its own.
    """
    try:
        return message(
            (number, _edit_graph(_parse(value), grid, dim, name))
            if number == _GRAPH_OF_MODEL and isinstance(value, bytes)
            else (number, value)
            for number, value in _parse(content)
        )
    except NotProtobuf as problem:
        raise _not_ours(name, str(problem)) from problem


def _edit_graph(parts: list[Field], grid: RegionGrid, dim: int, name: str) -> bytes:
    nodes = [value for number, value in parts if number == _NODE and isinstance(value, bytes)]
    if any(_op(node) == b"Softmax" for node in nodes):
        raise _not_ours(name, "its attention is over the whole map")
    # Squeeze-and-excitation has means as well; the last one is the pooling.
    means = [index for index, node in enumerate(nodes) if _op(node) == b"ReduceMean"]
    makers = [index for index, node in enumerate(nodes) if OUTPUT_NAME.encode() in _outputs(node)]
    if not means or len(makers) != 1 or makers[0] <= means[-1]:
        raise _not_ours(name, "no mean over the map before its head")
    mean, maker = means[-1], makers[0]
    if _keeps_dimensions(nodes[mean]):
        raise _not_ours(name, "its mean keeps the map's dimensions")
    pooled, tensors = _pooling(_inputs(nodes[mean])[0], _outputs(nodes[mean])[0], grid)
    rows = f"{_PREFIX}rows".encode()
    ended = _rename_output(nodes[maker], rows)
    shape = f"{_PREFIX}shape".encode()
    tensors.append(_int64_tensor(shape, [-1, len(grid), dim]))
    last = _node(b"Reshape", [rows, shape], OUTPUT_NAME.encode())
    edited = [*nodes[:mean], *pooled, *nodes[mean + 1 : maker], ended, *nodes[maker + 1 :], last]
    kept: list[Field] = [(_NODE, node) for node in edited]
    for number, value in parts:
        if number in (_NODE, _VALUE_INFO) or not isinstance(value, bytes):
            continue  # shapes in between are those of another size
        if number == _INPUT and _text_field(value, 1) == INPUT_NAME.encode():
            value = _replace_shape(value, {1: grid.size_px, 2: grid.size_px}, name)
        elif number == _OUTPUT and _text_field(value, 1) == OUTPUT_NAME.encode():
            value = _insert_dim(value, len(grid))
        kept.append((number, value))
    return message([*kept, *((_TENSOR, tensor) for tensor in tensors)])


def _pooling(source: bytes, target: bytes, grid: RegionGrid) -> tuple[list[bytes], list[bytes]]:
    """Return nodes and tensors that make rows `(N * R, C)` of a map `(N, C, H, W)`."""
    flat = f"{_PREFIX}flat".encode()
    nodes, tensors, parts = [], [_int64_tensor(flat, [0, 0, -1])], []
    for index, (side, stride) in enumerate(grid.windows):
        pool, part = f"{_PREFIX}pool_{index}".encode(), f"{_PREFIX}part_{index}".encode()
        attributes = {b"kernel_shape": [side, side], b"strides": [stride, stride]}
        nodes.append(_node(b"AveragePool", [source], pool, attributes))
        nodes.append(_node(b"Reshape", [pool, flat], part))
        parts.append(part)
    every, turned = f"{_PREFIX}every".encode(), f"{_PREFIX}turned".encode()
    nodes.append(_node(b"Concat", parts, every, {b"axis": 2}))
    nodes.append(_node(b"Transpose", [every], turned, {b"perm": [0, 2, 1]}))
    nodes.append(_node(b"Flatten", [turned], target, {b"axis": 2}))
    return nodes, tensors


def _not_ours(name: str, why: str) -> BadModel:
    return BadModel(
        f"{name} cannot embed regions: {why}",
        "a model made by sbtk export",
        "export the run again, or index without --regions",
    )


def _replace_shape(value: bytes, sizes: dict[int, int], name: str) -> bytes:
    """Return a `ValueInfoProto` with other sizes at some dimensions."""
    dims = _dims(value)
    found = {index: dict(_parse(dims[index])).get(_DIM_VALUE) for index in sizes}
    if set(found.values()) != {SIZE_PX}:
        raise _not_ours(name, f"its input is not {SIZE_PX} x {SIZE_PX} pixels")
    return _replace_dims(
        value, [_dim(sizes[index]) if index in sizes else dim for index, dim in enumerate(dims)]
    )


def _insert_dim(value: bytes, size: int) -> bytes:
    first, *others = _dims(value)
    return _replace_dims(value, [first, _dim(size), *others])


def _dim(size: int) -> bytes:
    return message([(_DIM_VALUE, size)])


def _dims(value: bytes) -> list[bytes]:
    shape = value
    for number in (_TYPE_OF_VALUE, _TENSOR_TYPE, _SHAPE):
        shape = _text_field(shape, number)
    return [part for number, part in _parse(shape) if number == _DIM and isinstance(part, bytes)]


def _replace_dims(value: bytes, dims: Sequence[bytes]) -> bytes:
    def replace(content: bytes, path: tuple[int, ...]) -> bytes:
        if not path:
            return message((_DIM, dim) for dim in dims)
        return message(
            (number, replace(part, path[1:]))
            if number == path[0] and isinstance(part, bytes)
            else (number, part)
            for number, part in _parse(content)
        )

    return replace(value, (_TYPE_OF_VALUE, _TENSOR_TYPE, _SHAPE))


def _node(
    op: bytes,
    inputs: Iterable[bytes],
    output: bytes,
    attributes: Mapping[bytes, int | list[int]] | None = None,
) -> bytes:
    parts: list[Field] = [(_INPUTS_OF_NODE, each) for each in inputs]
    parts += [(_OUTPUTS_OF_NODE, output), (_NAME_OF_NODE, b"node_" + output), (_OP_OF_NODE, op)]
    parts += [(_ATTRIBUTE, _attribute(*each)) for each in (attributes or {}).items()]
    return message(parts)


def _attribute(name: bytes, value: int | list[int]) -> bytes:
    parts: list[Field] = [(_NAME_OF_ATTRIBUTE, name)]
    if isinstance(value, int):
        parts += [(_INT_OF_ATTRIBUTE, value), (_TYPE_OF_ATTRIBUTE, _ATTRIBUTE_INT)]
    else:
        parts += [(_INTS_OF_ATTRIBUTE, each) for each in value]
        parts.append((_TYPE_OF_ATTRIBUTE, _ATTRIBUTE_INTS))
    return message(parts)


def _int64_tensor(name: bytes, values: list[int]) -> bytes:
    return message(
        [
            (_DIMS_OF_TENSOR, len(values)),
            (_TYPE_OF_TENSOR, _INT64),
            (_NAME_OF_TENSOR, name),
            (_RAW_DATA, np.array(values, dtype="<i8").tobytes()),
        ]
    )


def _rename_output(node: bytes, name: bytes) -> bytes:
    return message(
        (number, name) if number == _OUTPUTS_OF_NODE and value == OUTPUT_NAME.encode() else part
        for part in _parse(node)
        for number, value in (part,)
    )


def _op(node: bytes) -> bytes:
    return _text_field(node, _OP_OF_NODE)


def _inputs(node: bytes) -> list[bytes]:
    return _texts(node, _INPUTS_OF_NODE)


def _outputs(node: bytes) -> list[bytes]:
    return _texts(node, _OUTPUTS_OF_NODE)


def _keeps_dimensions(node: bytes) -> bool:
    """Return whether a mean keeps dimensions of size 1, which is ONNX's default."""
    for attribute in _texts(node, _ATTRIBUTE):
        if _text_field(attribute, _NAME_OF_ATTRIBUTE) == b"keepdims":
            return dict(_parse(attribute)).get(_INT_OF_ATTRIBUTE, 0) != 0
    return True


def _texts(content: bytes, wanted: int) -> list[bytes]:
    return [
        value for number, value in _parse(content) if number == wanted and isinstance(value, bytes)
    ]


def _text_field(content: bytes, wanted: int) -> bytes:
    """Return the last field of a number, which counts in protobuf; empty if there is none."""
    return next(reversed(_texts(content, wanted)), b"")


def _parse(content: bytes) -> list[Field]:
    """Return the fields of a message; the parts that are edited have no fields of fixed width."""
    return [
        (number, value if isinstance(value, int) else bytes(value))
        for number, value in fields(memoryview(content))
    ]
