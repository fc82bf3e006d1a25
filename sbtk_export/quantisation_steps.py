"""Quantisation steps of activations for symmetric INT8, from histograms of their values."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from sbtk_export.model_inputs import Feeds, ModelInputs

_LEVELS = 127
_REACHES_PER_TOP = 100
_BINS = 4096
# Every value of a large activation would only take time.
_EVERY = 3
_BATCH = 4

Steps = Mapping[str, np.float32]


@dataclass(frozen=True)
class Histogram:
    """Sizes of an activation's values: `counts (4096,) int64` of even bins from 0 to `top`."""

    counts: NDArray[np.int64]
    top: float


def histograms_of(
    model: onnx.ModelProto, names: Sequence[str], inputs: ModelInputs
) -> dict[str, Histogram]:
    """Returns the histogram of each named activation.

    Args:
        model: in FP32.
        names: of the tensors.
        inputs: pictures to calibrate on.
    """
    session = _session_of(model, names)
    tops = {name: 0.0 for name in names}
    for name, values in _values(session, names, inputs.batches(model, _BATCH)):
        tops[name] = max(tops[name], float(np.abs(values).max()))
    counts = {name: np.zeros(_BINS, dtype=np.int64) for name in names}
    for name, values in _values(session, names, inputs.batches(model, _BATCH)):
        if tops[name] > 0:
            bins = np.abs(values.reshape(-1)[::_EVERY]) * np.float32(_BINS / tops[name])
            places = np.minimum(bins.astype(np.int32), _BINS - 1)
            counts[name] += np.bincount(places, minlength=_BINS)
    return {name: Histogram(counts[name], tops[name]) for name in names}


def best_steps(histograms: Mapping[str, Histogram], least_reach: float) -> Steps:
    """Returns, by tensor, the step of INT8 whose squared error is smallest.

    Args:
        histograms: by tensor.
        least_reach: share of the largest value that INT8 has to reach; what is larger is clipped.
            With 1 nothing is, and the steps are those of the largest values.
    """
    return {name: _best_step(histogram, least_reach) for name, histogram in histograms.items()}


def set_steps(quantised: onnx.ModelProto, steps: Steps) -> None:
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
    session: onnxruntime.InferenceSession, names: Sequence[str], every: Iterable[Feeds]
) -> Iterator[tuple[str, NDArray[np.float32]]]:
    for feeds in every:
        yield from zip(names, session.run(list(names), feeds), strict=True)


def _best_step(histogram: Histogram, least_reach: float) -> np.float32:
    top = histogram.top
    if top == 0:
        return np.float32(1)
    centres = (np.arange(_BINS) + 0.5) * (top / _BINS)
    count = 1 + round((1 - least_reach) * _REACHES_PER_TOP)
    steps = np.linspace(least_reach, 1, count) * (top / _LEVELS)
    levels = np.minimum(np.rint(centres / steps[:, None]), _LEVELS)
    errors = np.square(levels * steps[:, None] - centres) @ histogram.counts
    return np.float32(steps[np.argmin(errors)])
