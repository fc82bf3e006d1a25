"""Static INT8 quantisation of an ONNX student, calibrated on real sketches and photos.

One file serves ONNX Runtime and OpenVINO: QDQ form, unsigned activations, signed weights per
channel. Everything up to the last Linear is quantised and nothing after it: a quantised L2 norm
gives rows of length 1.003 to 1.37, which a cosine does not see.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import (
    CalibrationDataReader,
    CalibrationMethod,
    QuantFormat,
    QuantType,
    quantize_static,
)

from sbtk_export.fp16 import single_precision
from sbtk_export.onnx_graph import Feeds, ModelInputs, check_model, find_domain_input, strip_traces
from sbtk_runtime.errors import BadModel
from sbtk_runtime.files import atomic_path
from sbtk_runtime.onnx_file import INPUT_NAME

_OPERATORS = ["Conv", "Relu", "MaxPool", "Add", "Mul", "Gemm"]
# ONNX Runtime's own mark of a model whose shapes are inferred; without it the quantiser warns.
_PREPARED = ("onnx.quant.pre_process", "onnxruntime.quant")
_CALIBRATION_BATCH = 8


def quantise(source: Path, target: Path, inputs: ModelInputs) -> None:
    """Write the INT8 form of the model `source` to `target`, atomically.

    Args:
        source: made by `write_onnx`, in FP32; or in FP16, whose weights are then taken as they
            are. So a bundle's INT8 can be made again where only its FP16 file is left.
        target: the file to make.
        inputs: what to calibrate on.

    Raises:
        BadModel: the model has no Linear or convolution to quantise between, or what came of it
            would depend on the kind of processor.
    """
    model = single_precision(onnx.load(source))
    dim = model.graph.output[0].type.tensor_type.shape.dim[1].dim_value
    excluded = find_nodes_outside(model)
    with tempfile.TemporaryDirectory(prefix="sbtk-int8-") as folder, atomic_path(target) as result:
        prepared = Path(folder) / "prepared.onnx"
        save_prepared(model, prepared)
        quantize_static(
            prepared,
            result,
            CalibrationBatches(model, inputs.mixed()),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=_OPERATORS,
            nodes_to_exclude=[*excluded, *find_se_nodes(model)],
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            per_channel=True,
            # 7-bit weights do not saturate on CPUs without VNNI (see `saturation`), at no cost in
            # speed elsewhere.
            reduce_range=True,
            calibrate_method=CalibrationMethod.MinMax,
            extra_options={
                "OpTypesToExcludeOutputQuantization": ["Gemm"],
                # The extremes of all images together would spend the range on outliers.
                "CalibMovingAverage": True,
                "CalibMovingAverageConstant": 0.02,
            },
        )
        quantised = onnx.load(result)
        correct_biases(quantised, model, measure_mean_inputs(model, inputs))
        input_first(quantised)
        strip_traces(quantised)
        require_same_sums(quantised, target.name)
        check_model(quantised, dim, has_domain_input=find_domain_input(model) is not None)
        onnx.save(quantised, result)


def save_prepared(model: onnx.ModelProto, path: Path) -> None:
    """Write the FP32 model to `path` in the form that ONNX Runtime's quantiser needs."""
    prepared = onnx.ModelProto()
    prepared.CopyFrom(model)
    prepared.metadata_props.add(key=_PREPARED[0], value=_PREPARED[1])
    onnx.save(prepared, path)


def find_nodes_outside(model: onnx.ModelProto) -> list[str]:
    """Return the names of the nodes before the first convolution and after the last Linear.

    Raises:
        BadModel: there is none of one of them, or they are in the wrong order.
    """
    operators = [node.op_type for node in model.graph.node]
    if "Conv" not in operators or "Gemm" not in operators:
        raise BadModel("the model has no Conv and no Gemm node", "a student's graph")
    first = operators.index("Conv")
    last = len(operators) - 1 - operators[::-1].index("Gemm")
    return [node.name for node in (*model.graph.node[:first], *model.graph.node[last + 1 :])]


def input_first(model: onnx.ModelProto) -> None:
    """Move Cast and Transpose of the input to the front, where the quantiser puts constants."""
    nodes = list(model.graph.node)
    cast = next(node for node in nodes if INPUT_NAME in node.input)
    transpose = next(node for node in nodes if cast.output[0] in node.input)
    rest = [node for node in nodes if node is not cast and node is not transpose]
    del model.graph.node[:]
    model.graph.node.extend([cast, transpose, *rest])


class CalibrationBatches(CalibrationDataReader):  # type: ignore[misc]
    """Images as the calibrator asks for them.

    Args:
        model: that is calibrated.
        inputs: in an order that mixes sketches and photos.
    """

    def __init__(self, model: onnx.ModelProto, inputs: ModelInputs) -> None:
        self._batches = inputs.batches(model, _CALIBRATION_BATCH)

    def get_next(self) -> Feeds | None:
        """Return the next inputs of the model, or `None` after the last."""
        return next(self._batches, None)


Means = Mapping[str, NDArray[np.float64]]

# What the mean is taken over, for inputs (N, C, H, W) and (N, C).
_AXES = {"Conv": (0, 2, 3), "Gemm": (0,)}
_STATISTICS_BATCH = 10


def measure_mean_inputs(model: onnx.ModelProto, inputs: ModelInputs) -> Means:
    """Return the mean `(C,) float64` of what each convolution and Linear reads, by tensor name.

    Args:
        model: the FP32 model.
        inputs: the images of the calibration.
    """
    session = onnxruntime.InferenceSession(
        _with_means(model).SerializeToString(), providers=["CPUExecutionProvider"]
    )
    outputs = [output.name for output in session.get_outputs()][1:]
    sums: dict[str, NDArray[np.float64]] = {}
    for feeds in inputs.batches(model, _STATISTICS_BATCH):
        count = len(feeds[INPUT_NAME])
        for name, mean in zip(outputs, session.run(outputs, feeds), strict=True):
            sums[name] = sums.get(name, 0.0) + mean.astype(np.float64) * count
    return {name.removesuffix("_mean"): total / len(inputs) for name, total in sums.items()}


def correct_biases(quantised: onnx.ModelProto, original: onnx.ModelProto, means: Means) -> None:
    """Change the biases of `quantised`, a QDQ model, so that mean outputs are as before.

    Biases are INT32 behind a DequantizeLinear, or FP32. Layers without one, in groups, or with
    weights that are not quantised stay as they are.

    Args:
        quantised: made from `original`, whose node names it has.
        original: the FP32 model.
        means: from `measure_mean_inputs`.
    """
    weights = {tensor.name: tensor for tensor in original.graph.initializer}
    constants = {tensor.name: tensor for tensor in quantised.graph.initializer}
    makers = {name: node for node in quantised.graph.node for name in node.output}
    layers = {node.name: node for node in original.graph.node if node.op_type in _AXES}
    for node in quantised.graph.node:
        if node.name not in layers or len(node.input) < 3 or node.input[1] not in makers:
            continue
        source = layers[node.name]
        exact = numpy_helper.to_array(weights[source.input[1]])
        rounded = _dequantised(constants, makers[node.input[1]])
        errors = (rounded - exact).reshape(*exact.shape[:2], -1).sum(axis=2)
        mean = means[source.input[0]]
        if errors.shape[1] != len(mean):
            continue
        shift = errors @ mean
        name = node.input[2]
        if name not in constants:
            name, scale_name = makers[name].input[:2]
            shift = np.rint(shift / numpy_helper.to_array(constants[scale_name]))
        before = numpy_helper.to_array(constants[name])
        bias = before - shift.astype(before.dtype)
        constants[name].CopyFrom(numpy_helper.from_array(bias, name))


def _with_means(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a copy of the model that also puts out the mean of each layer's input."""
    copied = onnx.ModelProto()
    copied.CopyFrom(model)
    wanted = {node.input[0]: node.op_type for node in model.graph.node if node.op_type in _AXES}
    for name, operator in wanted.items():
        axes = np.array(_AXES[operator], dtype=np.int64)
        copied.graph.initializer.append(numpy_helper.from_array(axes, f"{name}_axes"))
        copied.graph.node.append(
            helper.make_node("ReduceMean", [name, f"{name}_axes"], [f"{name}_mean"], keepdims=0)
        )
        copied.graph.output.append(
            helper.make_tensor_value_info(f"{name}_mean", TensorProto.FLOAT, None)
        )
    return copied


def _dequantised(
    constants: Mapping[str, onnx.TensorProto], node: onnx.NodeProto
) -> NDArray[np.float64]:
    """Return the weights `(O, ...)` that a DequantizeLinear node, one scale a row, gives."""
    value, scale = (numpy_helper.to_array(constants[name]) for name in node.input[:2])
    return value.astype(np.float64) * scale.astype(np.float64).reshape(-1, *[1] * (value.ndim - 1))


_POSITIVE = frozenset({"Relu", "MaxPool"})
# The exponent alpha of Xiao et al.
_SHARE_OF_ACTIVATIONS = 0.5
_LEAST = 1e-6

_Maxima = Mapping[str, NDArray[np.float64]]


def equalise_channels(model: onnx.ModelProto, inputs: ModelInputs) -> int:
    """Even out, in place, what convolutions hand on to others; return how many of them do so.

    What the model computes stays the same, up to rounding in FP32. Channels that reach anything
    but convolutions, ReLU and maxima stay as they are, and so do convolutions in groups.

    Args:
        model: in FP32.
        inputs: images that show how large each channel gets.
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
    """Return the convolutions that alone read a node's channels; none if others do too."""
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
    """Return the largest value `(C,) float64` of each channel, as a mean over batches."""
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
    batches = [session.run(outputs, feeds) for feeds in inputs.batches(model, _STATISTICS_BATCH)]
    return {
        name: np.mean([batch[index] for batch in batches], axis=0, dtype=np.float64)
        for index, name in enumerate(names)
    }


def _factors(
    behind: list[onnx.NodeProto], constants: Mapping[str, onnx.TensorProto], maxima: _Maxima
) -> NDArray[np.float64]:
    """Return what each channel `(C,)` is divided by; 1 for channels that are never used."""
    activations = np.max([maxima[node.input[0]] for node in behind], axis=0)
    weights = np.max([_reach(constants[node.input[1]]) for node in behind], axis=0)
    is_used = (activations > _LEAST) & (weights > _LEAST)
    factors: NDArray[np.float64] = np.ones_like(activations)
    factors[is_used] = activations[is_used] ** _SHARE_OF_ACTIVATIONS / weights[is_used] ** (
        1 - _SHARE_OF_ACTIVATIONS
    )
    return factors


def _reach(weights: onnx.TensorProto) -> NDArray[np.float64]:
    """Return the largest size `(C,)` of the weights that read each channel."""
    values = np.abs(numpy_helper.to_array(weights)).max(axis=(0, 2, 3))
    return np.asarray(values, dtype=np.float64)


def _scale(tensor: onnx.TensorProto, factors: NDArray[np.float64], axis: int) -> None:
    values = numpy_helper.to_array(tensor)
    shape = [1] * values.ndim
    shape[axis] = -1
    scaled = (values * factors.reshape(shape)).astype(values.dtype)
    tensor.CopyFrom(numpy_helper.from_array(scaled, tensor.name))


_MEANS = frozenset({"ReduceMean", "GlobalAveragePool"})


def find_se_nodes(model: onnx.ModelProto) -> list[str]:
    """Return the names of the nodes that lead from means of feature maps to channels' factors.

    Means and sigmoids are among them, the products with the factors are not.
    """
    makers = {name: node for node in model.graph.node for name in node.output}
    found: dict[str, None] = {}
    for node in model.graph.node:
        if node.op_type == "Sigmoid":
            _collect(node, makers, found)
    return list(found)


def _collect(
    node: onnx.NodeProto, makers: Mapping[str, onnx.NodeProto], found: dict[str, None]
) -> None:
    """Add a node and all that it depends on, back to the means of feature maps."""
    if node.name in found:
        return
    found[node.name] = None
    if node.op_type not in _MEANS:
        for name in node.input:
            if name in makers:
                _collect(makers[name], makers, found)


#: The largest sum of two products that 16 bits hold.
LARGEST_SUM = 32_767
#: The largest activation; signed ones are shifted to unsigned before they are multiplied.
LARGEST_ACTIVATION = 255

# These have their weights in second place.
_DEQUANTISED = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})
# Where the others have their weights, and the zero points of these.
_INTEGER = {
    "QLinearConv": (3, 5),
    "QLinearMatMul": (3, 5),
    "ConvInteger": (1, 3),
    "MatMulInteger": (1, 3),
    "QGemm": (3, 5),
    "MatMulIntegerToFloat": (1, 5),
    "DynamicQuantizeMatMul": (1, 3),
}
_LARGEST_WEIGHT = 128


def measure_pair_sums(model: onnx.ModelProto) -> dict[str, int]:
    """Find the largest sum of two products that each quantised layer can form.

    Args:
        model: any ONNX model, in QDQ form or of integer operators.

    Returns:
        By the name of each convolution, Linear and matrix product with quantised weights (by its
        output's name where it has none itself): `255 * (|w1| + |w2|)`, with the two largest
        weights of one output channel. Weights that are not signed constants with a zero point of
        0 count as the worst that 8 bits can hold.
    """
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    makers = {name: node for node in model.graph.node for name in node.output}
    sums = {}
    for node in model.graph.node:
        rows = _quantised_rows(node, constants, makers)
        if rows is not None:
            sums[node.name or node.output[0]] = LARGEST_ACTIVATION * _largest_pair(rows)
    return sums


def require_same_sums(model: onnx.ModelProto, name: str) -> int:
    """Check that no sum of an INT8 model depends on the processor.

    Args:
        model: what is checked.
        name: what to call it in a complaint.

    Returns:
        The largest sum of two products in the model, at most 32,767; 0 without quantised layers.

    Raises:
        BadModel: a layer can form a larger one; names the worst, and how many there are.
    """
    sums = measure_pair_sums(model)
    over = {layer: found for layer, found in sums.items() if found > LARGEST_SUM}
    if over:
        worst = max(over, key=lambda layer: over[layer])
        raise BadModel(
            f"{name} depends on the kind of processor: two products of {worst} can add up to "
            f"{over[worst]:,} ({len(over)} of {len(sums)} quantised layers are like that)",
            f"at most {LARGEST_SUM:,}, which 16 bits hold",
            "export the run again: sbtk export RUN --int8",
        )
    return max(sums.values(), default=0)


def _largest_pair(rows: NDArray[np.int64]) -> int:
    """Return the two largest sizes of a row together, of the row where that is largest."""
    sizes = np.abs(rows)
    if sizes.size == 0:
        return 0
    if sizes.shape[1] == 1:
        return int(sizes.max())
    return int(np.partition(sizes, -2, axis=1)[:, -2:].sum(axis=1).max())


def _quantised_rows(
    node: onnx.NodeProto,
    constants: Mapping[str, onnx.TensorProto],
    makers: Mapping[str, onnx.NodeProto],
) -> NDArray[np.int64] | None:
    """Return a layer's weights as `(outputs, inputs)`; `None` for what is not a quantised layer."""
    zero_point = ""
    if node.op_type in _INTEGER:
        position, at = _INTEGER[node.op_type]
        name = node.input[position]
        zero_point = node.input[at] if len(node.input) > at else ""
    elif node.op_type in _DEQUANTISED and len(node.input) > 1:
        before = makers.get(node.input[1])
        if before is None or before.op_type != "DequantizeLinear":
            return None
        name = before.input[0]
        zero_point = before.input[2] if len(before.input) > 2 else ""
    else:
        return None
    unknown = np.full((1, 2), _LARGEST_WEIGHT, dtype=np.int64)
    if name not in constants or (zero_point and zero_point not in constants):
        return unknown
    weights = numpy_helper.to_array(constants[name])
    is_shifted = bool(zero_point) and numpy_helper.to_array(constants[zero_point]).any()
    if weights.dtype != np.int8 or is_shifted:
        return unknown
    return _rows(node, weights.astype(np.int64))


def _rows(node: onnx.NodeProto, weights: NDArray[np.int64]) -> NDArray[np.int64]:
    if node.op_type == "ConvTranspose":
        # (inputs, outputs / groups, ...): what a kernel adds up differs; take all inputs together.
        return np.moveaxis(weights, 1, 0).reshape(weights.shape[1], -1)
    if "Conv" in node.op_type:
        return weights.reshape(weights.shape[0], -1)
    is_transposed = any(a.name == "transB" and a.i for a in node.attribute)
    if is_transposed:
        return weights
    if weights.ndim == 1:
        return weights[None]
    return np.moveaxis(weights, -2, -1).reshape(-1, weights.shape[-2])
