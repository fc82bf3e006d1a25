"""Check ONNX files before any library parses them, write their messages, and name their inputs.

ONNX Runtime follows external-data locations wherever they point (onnx/onnx#3991, #7686). The check
walks over the protobuf fields instead: it needs no ONNX library, skips the weights, and also finds
truncated files.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import starmap

from sbtk_runtime.errors import BadModel

#: The input, `(N, 224, 224, 3) uint8`, and the output, `(N, D) float32`, of every model.
INPUT_NAME = "images"
OUTPUT_NAME = "embeddings"
#: The second input, `(N,) float32`, of models that take the kind of image: 0 sketch, 1 photo.
DOMAIN_NAME = "domain"

#: Number and value of a protobuf field: an integer, or the bytes of a delimited field.
Field = tuple[int, int | bytes]
#: Protobuf's limit for one message.
MAX_ONNX_BYTES = (1 << 31) - 1

_MAX_DEPTH = 64
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5

# Where tensors can be: message -> field number -> message, after onnx.proto3.
_MESSAGES: dict[str, dict[int, str]] = {
    "model": {7: "graph", 20: "training", 25: "function"},
    "training": {1: "graph", 2: "graph"},
    "function": {7: "node", 11: "attribute"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
    "tensor": {},
}
_GRAPH_OF_MODEL, _OPSETS_OF_MODEL = 7, 8
_DOMAIN_OF_OPSET, _VERSION_OF_OPSET = 1, 2
_STANDARD_DOMAINS = (b"", b"ai.onnx")
_EXTERNAL_DATA, _DATA_LOCATION = 13, 14
_OUTPUT_OF_NODE, _TEXTS_OF_NODE = 2, (1, 2, 3, 4)


def check_onnx(content: bytes, name: str) -> None:
    """Check that `content` is a complete ONNX model that contains all of its weights.

    It also checks that nodes have names and outputs, without which TensorRT's parser ends the
    process.

    Args:
        content: the bytes of the file.
        name: the file in error messages.

    Raises:
        BadModel: it is empty, too large, truncated, not an ONNX model, or names external data.
    """
    if not content:
        raise BadModel(f"{name} is empty", "an ONNX model")
    if len(content) > MAX_ONNX_BYTES:
        raise BadModel(f"{name} has {len(content):,} bytes", f"at most {MAX_ONNX_BYTES:,} bytes")
    model = memoryview(content)
    try:
        _check_message(model, "model", name, depth=0)
        has_graph = any(number == _GRAPH_OF_MODEL for number, _ in fields(model))
    except NotProtobuf as problem:
        raise BadModel(
            f"{name} is truncated or not an ONNX model ({problem})", "the file as exported"
        ) from problem
    if not has_graph:
        raise BadModel(f"{name} has no graph", "an ONNX model")


def opset_of_onnx(content: bytes) -> int:
    """Return the version of ONNX's standard operators that a model requires; 0 if it names none.

    Args:
        content: a model that `check_onnx` has accepted.

    Raises:
        BadModel: the list of operator sets is damaged.
    """
    versions = [0]
    try:
        for number, value in fields(memoryview(content)):
            if number == _OPSETS_OF_MODEL and isinstance(value, memoryview):
                entry = dict(fields(value))
                version = entry.get(_VERSION_OF_OPSET, 0)
                if entry.get(_DOMAIN_OF_OPSET, b"") in _STANDARD_DOMAINS:
                    versions.append(version if isinstance(version, int) else 0)
    except NotProtobuf as problem:
        raise BadModel(f"the model's operator sets are damaged ({problem})") from problem
    return max(versions)


class NotProtobuf(Exception):
    """The bytes are not a protobuf message; the text says why."""


def _check_message(message: memoryview, kind: str, name: str, depth: int) -> None:
    if depth > _MAX_DEPTH:
        raise NotProtobuf(f"more than {_MAX_DEPTH} levels of graphs")
    children = _MESSAGES[kind]
    for number, value in fields(message):
        if kind == "tensor" and _is_external(number, value):
            raise BadModel(
                f"{name} has weights in another file",
                "an ONNX file with all of its weights",
                "save it with onnx.save(model, path, save_as_external_data=False)",
            )
        if number in children and isinstance(value, memoryview):
            _check_message(value, children[number], name, depth + 1)
    if kind == "node":
        _check_node(message)


def _check_node(message: memoryview) -> None:
    has_output = False
    for number, value in fields(message):
        if number in _TEXTS_OF_NODE:
            if not isinstance(value, memoryview) or not _is_text(value):
                raise NotProtobuf("a node whose name is not text")
            has_output |= number == _OUTPUT_OF_NODE
    if not has_output:
        raise NotProtobuf("a node without an output")


def _is_text(value: memoryview) -> bool:
    try:
        bytes(value).decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def _is_external(number: int, value: int | memoryview) -> bool:
    return number == _EXTERNAL_DATA or (number == _DATA_LOCATION and value != 0)


def fields(message: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """Yield number and value of each field: an integer, or the bytes of a delimited field.

    Raises:
        NotProtobuf: the bytes are not a protobuf message.
    """
    position, end = 0, len(message)
    while position < end:
        tag, position = varint(message, position)
        number, wire_type = tag >> 3, tag & 7
        if number == 0:
            raise NotProtobuf("a field without a number")
        if wire_type == _VARINT:
            value, position = varint(message, position)
            yield number, value
            continue
        if wire_type == _BYTES:
            size, position = varint(message, position)
        elif wire_type in (_FIXED64, _FIXED32):
            size = 8 if wire_type == _FIXED64 else 4
        else:
            raise NotProtobuf(f"wire type {wire_type}")
        if size > end - position:
            raise NotProtobuf(f"{size:,} bytes announced, {end - position:,} left")
        yield number, message[position : position + size]
        position += size


def message(parts: Iterable[Field]) -> bytes:
    """Return the protobuf message that has these fields."""
    return b"".join(starmap(_field, parts))


def _field(number: int, value: int | bytes) -> bytes:
    if isinstance(value, int):
        return _as_varint(number << 3 | _VARINT) + _as_varint(value)
    return _as_varint(number << 3 | _BYTES) + _as_varint(len(value)) + value


def _as_varint(value: int) -> bytes:
    """Return a number as protobuf writes it; negative ones as 64 bits."""
    value &= (1 << 64) - 1
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*encoded, value])


def varint(message: memoryview, position: int) -> tuple[int, int]:
    """Return the number at `position`, and the position after it.

    Raises:
        NotProtobuf: the message ends within the number, or the number is too long.
    """
    value = 0
    for shift in range(0, 70, 7):
        if position >= len(message):
            raise NotProtobuf("it ends inside a number")
        byte = message[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
    raise NotProtobuf("a number of more than 10 bytes")
