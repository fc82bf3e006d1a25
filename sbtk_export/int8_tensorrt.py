"""Static INT8 quantisation for TensorRT: symmetric, with FP32 biases.

TensorRT supports neither the unsigned activations nor the quantised biases of `int8`, so its INT8
is a separate file. It fuses each convolution with the Add and the Relu after it, if nothing is
quantised in between, and moves quantisation ahead of poolings by itself. So pairs of QuantizeLinear
and DequantizeLinear are placed before convolutions and Linears, and at the shortcut of each Add.

Positive values have one bit less than in the other file. Equalised channels, and steps that clip
where that helps, compensate. The output of the first convolution is not quantised: its few large
channels, and the uniform background of sketches, would cause half of the total error. It is read
in FP16, which is 2 % of the work.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import QuantType

from sbtk_export.int8 import (
    correct_biases,
    equalise_channels,
    measure_mean_inputs,
    open_session,
    write_quantised,
)
from sbtk_export.onnx_graph import ModelInputs
from sbtk_runtime.onnx_file import OUTPUT_NAME

_OPERATORS = ["Conv", "Add", "Gemm"]
# Images to measure ranges on; more do not change them.
_FOR_RANGES = 100
# Candidates for the smallest share of an activation's range to keep; the best depends on the model.
_LEAST_REACHES = (0.2, 0.5, 0.8, 1.0)
_FOR_CHOICE = 40
_BATCH = 10


def quantise_for_tensorrt(source: Path, target: Path, inputs: ModelInputs) -> None:
    """Write TensorRT's INT8 form of the FP32 model `source` to `target`, atomically.

    Args:
        source: from `write_onnx`.
        target: the file to write.
        inputs: images to calibrate on.

    Raises:
        BadModel: the model has no convolution or Linear.
    """
    model = onnx.load(source)
    inputs = inputs.mixed()
    equalise_channels(model, inputs.first(_FOR_RANGES))
    in_half = find_behind_first_convolution(model)
    with write_quantised(
        model,
        target,
        inputs.first(1),  # `set_closest_steps` replaces the ranges
        _OPERATORS,
        in_half,
        activation_type=QuantType.QInt8,
        extra_options={
            "ActivationSymmetric": True,
            "WeightSymmetric": True,
            "QuantizeBias": False,
            "DedicatedQDQPair": True,
            # Only the inputs of these operators are quantised; their outputs stay FP32 through Add
            # and Relu, up to the next of these operators.
            "OpTypesToExcludeOutputQuantization": _OPERATORS,
        },
    ) as quantised:
        unquantise_fused_inputs(quantised)
        set_closest_steps(quantised, model, inputs.first(_FOR_RANGES))
        correct_biases(quantised, model, measure_mean_inputs(model, inputs))
        compute_in_half(quantised, in_half)


def find_behind_first_convolution(model: onnx.ModelProto) -> list[str]:
    """Return the names of the convolutions that read the output of the first one.

    ReLU and pooling may come between.
    """
    reach: set[str] = set()
    names = []
    for node in model.graph.node:
        if node.op_type == "Conv" and not reach:
            reach = set(node.output)
        elif node.input and node.input[0] in reach:
            if node.op_type == "Conv":
                names.append(node.name)
            elif node.op_type in ("Relu", "MaxPool"):
                reach |= set(node.output)
    return names


def compute_in_half(model: onnx.ModelProto, names: Collection[str]) -> None:
    """Make the named convolutions compute in FP16, with a Cast before and after each."""
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    changed: set[str] = set()
    nodes = list(model.graph.node)
    del model.graph.node[:]
    for node in nodes:
        if node.name not in names:
            model.graph.node.append(node)
            continue
        for name in node.input[1:]:
            values = numpy_helper.to_array(constants[name]).astype(np.float16)
            constants[name].CopyFrom(numpy_helper.from_array(values, name))
            changed.add(name)
        whole_in, whole_out = node.input[0], node.output[0]
        node.input[0], node.output[0] = f"{node.name}_input_half", f"{node.name}_half"
        half, whole = TensorProto.FLOAT16, TensorProto.FLOAT
        model.graph.node.extend(
            [
                helper.make_node("Cast", [whole_in], [node.input[0]], to=half),
                node,
                helper.make_node("Cast", [node.output[0]], [whole_out], to=whole),
            ]
        )
    # `value_info` records the types of constants, too.
    for value in [v for v in model.graph.value_info if v.name in changed]:
        model.graph.value_info.remove(value)


def unquantise_fused_inputs(model: onnx.ModelProto) -> int:
    """Make each Add read one convolution's output in FP32; return the number of changed Adds.

    TensorRT fuses that Add with the convolution, before rounding. The other input, the shortcut,
    stays quantised, so that it is stored and read in 8 bits.
    """
    producers = {name: node for node in model.graph.node for name in node.output}
    removed: list[onnx.NodeProto] = []
    for add in (node for node in model.graph.node if node.op_type == "Add"):
        pairs = [_pair_before(name, producers) for name in add.input]
        if not all(pairs):
            continue
        for position, (first, last) in enumerate(pair for pair in pairs if pair):
            if producers[first.input[0]].op_type == "Conv":
                add.input[position] = first.input[0]
                removed += [first, last]
                break
    for node in removed:
        model.graph.node.remove(node)
    read = {name for node in model.graph.node for name in node.input}
    for constant in [c for c in model.graph.initializer if c.name not in read]:
        model.graph.initializer.remove(constant)
    return len(removed) // 2


def set_closest_steps(
    quantised: onnx.ModelProto, model: onnx.ModelProto, inputs: ModelInputs
) -> float:
    """Set the steps whose embeddings are closest to those in FP32.

    Steps of least squared error are usually best, but they clip large values that the model may
    depend on. So several limits of clipping are tried.

    Args:
        quantised: made from `model`; changed in place.
        model: in FP32.
        inputs: images to calibrate on.

    Returns:
        The chosen limit: the smallest share of an activation's range to keep.
    """
    histograms = collect_histograms(model, list_quantised_tensors(quantised), inputs)
    choices = {reach: choose_steps(histograms, reach) for reach in _LEAST_REACHES}
    few = inputs.first(_FOR_CHOICE)
    wanted = _embedded(model, few)
    closeness = {}
    for reach, steps in choices.items():
        set_steps(quantised, steps)
        closeness[reach] = float((_embedded(quantised, few) * wanted).sum(axis=1).mean())
    best = max(closeness, key=lambda reach: closeness[reach])
    set_steps(quantised, choices[best])
    return best


def _embedded(model: onnx.ModelProto, inputs: ModelInputs) -> NDArray[np.float32]:
    """Return the model's `(N, D) float32` unit rows."""
    session = open_session(model)
    batches = inputs.batches(model, _BATCH)
    return np.concatenate([session.run([OUTPUT_NAME], feeds)[0] for feeds in batches])


def _pair_before(
    name: str, producers: Mapping[str, onnx.NodeProto]
) -> tuple[onnx.NodeProto, onnx.NodeProto] | None:
    """Return the QuantizeLinear and DequantizeLinear before a tensor; `None` if there are none."""
    last = producers.get(name)
    if last is None or last.op_type != "DequantizeLinear":
        return None
    first = producers.get(last.input[0])
    return None if first is None else (first, last)


_LEVELS = 127
_REACHES_PER_TOP = 100
_BINS = 4096
# A third of an activation's values is enough, and takes less time.
_EVERY = 3
_CALIBRATION_BATCH = 4

Steps = Mapping[str, np.float32]


@dataclass(frozen=True)
class Histogram:
    """Absolute values of an activation: `counts (4096,) int64` of equal bins from 0 to `top`."""

    counts: NDArray[np.int64]
    top: float


def collect_histograms(
    model: onnx.ModelProto, names: Sequence[str], inputs: ModelInputs
) -> dict[str, Histogram]:
    """Return the histogram of each named activation.

    Args:
        model: in FP32.
        names: names of the tensors.
        inputs: images to calibrate on.
    """
    session = open_session(model, names)

    def activations() -> Iterator[tuple[str, NDArray[np.float32]]]:
        for feeds in inputs.batches(model, _CALIBRATION_BATCH):
            yield from zip(names, session.run(list(names), feeds), strict=True)

    tops = dict.fromkeys(names, 0.0)
    for name, values in activations():
        tops[name] = max(tops[name], float(np.abs(values).max()))
    counts = {name: np.zeros(_BINS, dtype=np.int64) for name in names}
    for name, values in activations():
        if tops[name] > 0:
            bins = np.abs(values.reshape(-1)[::_EVERY]) * np.float32(_BINS / tops[name])
            places = np.minimum(bins.astype(np.int32), _BINS - 1)
            counts[name] += np.bincount(places, minlength=_BINS)
    return {name: Histogram(counts[name], tops[name]) for name in names}


def choose_steps(histograms: Mapping[str, Histogram], least_reach: float) -> Steps:
    """Return, by tensor, the step of INT8 with the smallest squared error.

    Args:
        histograms: by tensor.
        least_reach: smallest share of the largest value that must not be clipped; 1 clips nothing.
    """
    return {name: _best_step(histogram, least_reach) for name, histogram in histograms.items()}


def set_steps(quantised: onnx.ModelProto, steps: Steps) -> None:
    """Set the steps of the nodes that quantise these tensors, and of their inverses."""
    constants = {tensor.name: tensor for tensor in quantised.graph.initializer}
    for node in quantised.graph.node:
        if node.op_type == "QuantizeLinear" and node.input[0] in steps:
            tensor = constants[node.input[1]]
            shape = numpy_helper.to_array(tensor).shape
            step = np.full(shape, steps[node.input[0]], dtype=np.float32)
            tensor.CopyFrom(numpy_helper.from_array(step, tensor.name))


def list_quantised_tensors(quantised: onnx.ModelProto) -> list[str]:
    """Return the names of the activations that a QDQ model quantises."""
    readers = (node for node in quantised.graph.node if node.op_type == "QuantizeLinear")
    return list(dict.fromkeys(node.input[0] for node in readers))


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
