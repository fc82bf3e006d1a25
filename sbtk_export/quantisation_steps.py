"""The quantisation step of each activation that loses least, from histograms of its values."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from sbtk_runtime.onnx_file import INPUT_NAME
from sbtk_runtime.preprocess import Pixels

# A step is sought that reaches from this share of the largest value to all of it.
_LEAST_REACH = 0.2
_REACHES = 81
_LEVELS = 127
_BINS = 4096
# Every value of a large activation would only take time.
_EVERY = 3
_BATCH = 4


def best_steps(
    model: onnx.ModelProto, names: Sequence[str], pixels: Pixels
) -> dict[str, np.float32]:
    """Returns, by tensor, the step of symmetric INT8 whose squared error is smallest.

    Large values are clipped where that pays: a few of them would spend the range of all others.

    Args:
        model: in FP32.
        names: of the tensors to be quantised.
        pixels: `(N, 224, 224, 3) uint8`, to calibrate on.
    """
    session = _session_of(model, names)
    tops = {name: 0.0 for name in names}
    for name, values in _values(session, names, pixels):
        tops[name] = max(tops[name], float(np.abs(values).max()))
    counts = {name: np.zeros(_BINS, dtype=np.int64) for name in names}
    for name, values in _values(session, names, pixels):
        if tops[name] > 0:
            bins = np.abs(values.reshape(-1)[::_EVERY]) * np.float32(_BINS / tops[name])
            places = np.minimum(bins.astype(np.int32), _BINS - 1)
            counts[name] += np.bincount(places, minlength=_BINS)
    return {name: _best_step(counts[name], tops[name]) for name in names}


def set_steps(quantised: onnx.ModelProto, steps: Mapping[str, np.float32]) -> None:
    """Gives the QuantizeLinear nodes that read these tensors, and their partners, other steps."""
    constants = {tensor.name: tensor for tensor in quantised.graph.initializer}
    for node in quantised.graph.node:
        if node.op_type == "QuantizeLinear" and node.input[0] in steps:
            tensor = constants[node.input[1]]
            shape = numpy_helper.to_array(tensor).shape
            step = np.full(shape, steps[node.input[0]], dtype=np.float32)
            tensor.CopyFrom(numpy_helper.from_array(step, tensor.name))


def quantised_tensors(quantised: onnx.ModelProto) -> list[str]:
    """Returns the names of the activations that a QDQ model quantises."""
    readers = (node for node in quantised.graph.node if node.op_type == "QuantizeLinear")
    return list(dict.fromkeys(node.input[0] for node in readers))


def _session_of(model: onnx.ModelProto, names: Sequence[str]) -> onnxruntime.InferenceSession:
    copied = onnx.ModelProto()
    copied.CopyFrom(model)
    for name in names:
        copied.graph.output.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, None))
    return onnxruntime.InferenceSession(
        copied.SerializeToString(), providers=["CPUExecutionProvider"]
    )


def _values(
    session: onnxruntime.InferenceSession, names: Sequence[str], pixels: Pixels
) -> Iterator[tuple[str, NDArray[np.float32]]]:
    for start in range(0, len(pixels), _BATCH):
        batch = session.run(list(names), {INPUT_NAME: pixels[start : start + _BATCH]})
        yield from zip(names, batch, strict=True)


def _best_step(counts: NDArray[np.int64], top: float) -> np.float32:
    if top == 0:
        return np.float32(1)
    centres = (np.arange(_BINS) + 0.5) * (top / _BINS)
    steps = np.linspace(_LEAST_REACH, 1, _REACHES) * (top / _LEVELS)
    levels = np.minimum(np.rint(centres / steps[:, None]), _LEVELS)
    errors = np.square(levels * steps[:, None] - centres) @ counts
    return np.float32(steps[np.argmin(errors)])
