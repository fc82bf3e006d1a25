"""Static INT8 quantisation of an ONNX student, calibrated on real sketches and photos.

One file serves ONNX Runtime and OpenVINO: QDQ form, unsigned activations, signed weights per
channel. Everything up to the last Linear is quantised, and nothing after it: a quantised L2 norm
returns rows of length 1.003 to 1.37, which cosines do not reveal.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

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
from sbtk_export.onnx_graph import Feeds, ModelInputs, check_model, strip_traces, takes_domains
from sbtk_runtime.errors import BadModel
from sbtk_runtime.files import atomic_path
from sbtk_runtime.onnx_file import INPUT_NAME

_OPERATORS = ["Conv", "Relu", "MaxPool", "Add", "Mul", "Gemm"]
_CALIBRATION_BATCH = 8


def quantise(source: Path, target: Path, inputs: ModelInputs) -> None:
    """Write the INT8 form of the model `source` to `target`, atomically.

    Args:
        source: from `write_onnx`, in FP32 or FP16. FP16 weights are used as they are, so the INT8
            file of a bundle can be made from its FP16 file.
        target: the file to write.
        inputs: images to calibrate on.

    Raises:
        BadModel: the model has no convolution or Linear, or the results of its INT8 form would
            depend on the processor.
    """
    model = single_precision(onnx.load(source))
    with write_quantised(
        model,
        target,
        inputs.mixed(),
        _OPERATORS,
        activation_type=QuantType.QUInt8,
        # 7-bit weights do not saturate on CPUs without VNNI (see `require_same_sums`) and are as
        # fast elsewhere.
        reduce_range=True,
        extra_options={
            "OpTypesToExcludeOutputQuantization": ["Gemm"],
            # The extremes of all images would widen the range for outliers.
            "CalibMovingAverage": True,
            "CalibMovingAverageConstant": 0.02,
        },
    ) as quantised:
        correct_biases(quantised, model, measure_mean_inputs(model, inputs))
        require_same_sums(quantised, target.name)


@contextlib.contextmanager
def write_quantised(
    model: onnx.ModelProto,
    target: Path,
    inputs: ModelInputs,
    operators: list[str],
    excluded: Iterable[str] = (),
    **options: Any,
) -> Iterator[onnx.ModelProto]:
    """Yield the QDQ form of an FP32 model for changes; then check it and write it, atomically.

    Args:
        model: in FP32.
        target: the file to write.
        inputs: images to calibrate on, sketches and photos mixed.
        operators: the types of nodes to quantise.
        excluded: names of further nodes to leave alone.
        **options: for ONNX Runtime's `quantize_static`.

    Raises:
        BadModel: the model has no convolution or Linear, or the result breaks the contract with
            the engines.
    """
    dim = model.graph.output[0].type.tensor_type.shape.dim[1].dim_value
    prepared = onnx.ModelProto()
    prepared.CopyFrom(model)
    # Says that shapes have been inferred; without it ONNX Runtime's quantiser warns.
    prepared.metadata_props.add(key="onnx.quant.pre_process", value="onnxruntime.quant")
    with tempfile.TemporaryDirectory(prefix="sbtk-int8-") as folder, atomic_path(target) as result:
        onnx.save(prepared, Path(folder) / "prepared.onnx")
        quantize_static(
            Path(folder) / "prepared.onnx",
            result,
            CalibrationBatches(model, inputs),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=operators,
            nodes_to_exclude=[*find_nodes_outside(model), *find_se_nodes(model), *excluded],
            weight_type=QuantType.QInt8,
            per_channel=True,
            calibrate_method=CalibrationMethod.MinMax,
            **options,
        )
        quantised = onnx.load(result)
        yield quantised
        input_first(quantised)
        strip_traces(quantised)
        check_model(quantised, dim, has_domain_input=takes_domains(model))
        onnx.save(quantised, result)


def find_nodes_outside(model: onnx.ModelProto) -> list[str]:
    """Return the names of the nodes before the first convolution and after the last Linear.

    Raises:
        BadModel: the model lacks one of them.
    """
    operators = [node.op_type for node in model.graph.node]
    if "Conv" not in operators or "Gemm" not in operators:
        raise BadModel("the model has no Conv or no Gemm node", "a student's graph")
    first = operators.index("Conv")
    last = len(operators) - 1 - operators[::-1].index("Gemm")
    return [node.name for node in (*model.graph.node[:first], *model.graph.node[last + 1 :])]


def input_first(model: onnx.ModelProto) -> None:
    """Move the input's Cast and Transpose to the front, before the constants of the quantiser."""
    nodes = list(model.graph.node)
    cast = next(node for node in nodes if INPUT_NAME in node.input)
    transpose = next(node for node in nodes if cast.output[0] in node.input)
    rest = [node for node in nodes if node is not cast and node is not transpose]
    del model.graph.node[:]
    model.graph.node.extend([cast, transpose, *rest])


class CalibrationBatches(CalibrationDataReader):  # type: ignore[misc]
    """Batches of images for ONNX Runtime's calibrator.

    Args:
        model: the model to calibrate.
        inputs: images in an order that mixes sketches and photos.
    """

    def __init__(self, model: onnx.ModelProto, inputs: ModelInputs) -> None:
        self._batches = inputs.batches(model, _CALIBRATION_BATCH)

    def get_next(self) -> Feeds | None:
        """Return the next batch of the model's inputs; `None` after the last."""
        return next(self._batches, None)


Means = Mapping[str, NDArray[np.float64]]

# Axes that the mean is taken over, for inputs (N, C, H, W) and (N, C).
_AXES = {"Conv": (0, 2, 3), "Gemm": (0,)}
_STATISTICS_BATCH = 10


def measure_mean_inputs(model: onnx.ModelProto, inputs: ModelInputs) -> Means:
    """Return the mean `(C,) float64` of the input of each convolution and Linear, by tensor name.

    Args:
        model: in FP32.
        inputs: images to calibrate on.
    """
    axes = {
        node.input[0]: _AXES[node.op_type] for node in model.graph.node if node.op_type in _AXES
    }
    sums: dict[str, Any] = dict.fromkeys(axes, 0.0)
    for count, means in _reduced(model, "ReduceMean", axes, inputs):
        for name, mean in means.items():
            sums[name] = sums[name] + mean * count
    return {name: total / len(inputs) for name, total in sums.items()}


def correct_biases(quantised: onnx.ModelProto, original: onnx.ModelProto, means: Means) -> None:
    """Correct the biases of the QDQ model `quantised`, so that mean outputs equal those of FP32.

    Biases are INT32 before a DequantizeLinear, or FP32. Grouped layers, layers without bias and
    layers whose weights are not quantised stay as they are (Nagel et al. 2019, section 4.2).

    Args:
        quantised: made from `original`, with the same node names.
        original: the FP32 model.
        means: from `measure_mean_inputs`.
    """
    weights = {tensor.name: tensor for tensor in original.graph.initializer}
    constants = {tensor.name: tensor for tensor in quantised.graph.initializer}
    producers = {name: node for node in quantised.graph.node for name in node.output}
    layers = {node.name: node for node in original.graph.node if node.op_type in _AXES}
    for node in quantised.graph.node:
        if node.name not in layers or len(node.input) < 3 or node.input[1] not in producers:
            continue
        source = layers[node.name]
        exact = numpy_helper.to_array(weights[source.input[1]])
        rounded = _dequantise(constants, producers[node.input[1]])
        errors = (rounded - exact).reshape(*exact.shape[:2], -1).sum(axis=2)
        mean = means[source.input[0]]
        if errors.shape[1] != len(mean):
            continue
        shift = errors @ mean
        name = node.input[2]
        if name not in constants:
            name, scale_name = producers[name].input[:2]
            shift = np.rint(shift / numpy_helper.to_array(constants[scale_name]))
        before = numpy_helper.to_array(constants[name])
        bias = before - shift.astype(before.dtype)
        constants[name].CopyFrom(numpy_helper.from_array(bias, name))


def open_session(
    model: onnx.ModelProto, outputs: Iterable[str] = ()
) -> onnxruntime.InferenceSession:
    """Return a session on the CPU that returns the named FP32 tensors on request, too."""
    copied = onnx.ModelProto()
    copied.CopyFrom(model)
    copied.graph.output.extend(
        helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs
    )
    return onnxruntime.InferenceSession(
        copied.SerializeToString(), providers=["CPUExecutionProvider"]
    )


def _reduced(
    model: onnx.ModelProto, operator: str, axes: Mapping[str, tuple[int, ...]], inputs: ModelInputs
) -> Iterator[tuple[int, Means]]:
    """Yield the size of each batch, and the tensors `(C,) float64` reduced over their axes."""
    copied = onnx.ModelProto()
    copied.CopyFrom(model)
    outputs = []
    for name, along in axes.items():
        constant = numpy_helper.from_array(np.array(along, dtype=np.int64), f"{name}_axes")
        copied.graph.initializer.append(constant)
        outputs.append(f"{name}_reduced")
        copied.graph.node.append(
            helper.make_node(operator, [name, constant.name], outputs[-1:], keepdims=0)
        )
    session = open_session(copied, outputs)
    for feeds in inputs.batches(model, _STATISTICS_BATCH):
        values = session.run(outputs, feeds)
        reduced = {name: each.astype(np.float64) for name, each in zip(axes, values, strict=True)}
        yield len(feeds[INPUT_NAME]), reduced


def _dequantise(
    constants: Mapping[str, onnx.TensorProto], node: onnx.NodeProto
) -> NDArray[np.float64]:
    """Return the output `(O, ...)` of a DequantizeLinear node with one scale for each row."""
    value, scale = (numpy_helper.to_array(constants[name]) for name in node.input[:2])
    return value.astype(np.float64) * scale.astype(np.float64).reshape(-1, *[1] * (value.ndim - 1))


_POSITIVE = frozenset({"Relu", "MaxPool"})
# The exponent alpha of SmoothQuant (Xiao et al. 2023).
_SHARE_OF_ACTIVATIONS = 0.5
_LEAST = 1e-6


def equalise_channels(model: onnx.ModelProto, inputs: ModelInputs) -> int:
    """Equalise the channels between convolutions in place; return the number of equalised tensors.

    Activations are divided, and the weights that read them multiplied, by factors of SmoothQuant
    (Xiao et al. 2023). The model's output stays the same, up to rounding in FP32. Channels that are
    read by anything but convolutions, ReLU and max pooling stay as they are, and so do grouped
    convolutions.

    Args:
        model: in FP32.
        inputs: images to measure each channel's maximum on.
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
    # The model's outputs are read by its callers.
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
    """Return whether a node is a convolution without groups."""
    is_in_groups = any(a.name == "group" and a.i != 1 for a in node.attribute)
    return node.op_type == "Conv" and not is_in_groups


def _convolutions_behind(
    node: onnx.NodeProto, readers: Mapping[str, list[onnx.NodeProto]]
) -> list[onnx.NodeProto]:
    """Return the convolutions that read a node's channels; none if other operators do too."""
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


def _channel_maxima(model: onnx.ModelProto, names: list[str], inputs: ModelInputs) -> Means:
    """Return the largest value `(C,) float64` of each channel, as a mean over batches."""
    if not names:
        return {}
    axes = dict.fromkeys(names, _AXES["Conv"])
    batches = [maxima for _, maxima in _reduced(model, "ReduceMax", axes, inputs)]
    return {name: np.mean([maxima[name] for maxima in batches], axis=0) for name in names}


def _factors(
    behind: list[onnx.NodeProto], constants: Mapping[str, onnx.TensorProto], maxima: Means
) -> NDArray[np.float64]:
    """Return the divisor of each channel, `(C,)`; 1 for unused channels."""
    activations = np.max([maxima[node.input[0]] for node in behind], axis=0)
    weights = np.max([_reach(constants[node.input[1]]) for node in behind], axis=0)
    is_used = (activations > _LEAST) & (weights > _LEAST)
    factors: NDArray[np.float64] = np.ones_like(activations)
    factors[is_used] = activations[is_used] ** _SHARE_OF_ACTIVATIONS / weights[is_used] ** (
        1 - _SHARE_OF_ACTIVATIONS
    )
    return factors


def _reach(weights: onnx.TensorProto) -> NDArray[np.float64]:
    """Return the largest absolute weight `(C,)` that reads each channel."""
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
    """Return the names of the squeeze-and-excitation nodes, from means to sigmoids, inclusive.

    The products with the sigmoids are not included.
    """
    producers = {name: node for node in model.graph.node for name in node.output}
    found: dict[str, None] = {}
    for node in model.graph.node:
        if node.op_type == "Sigmoid":
            _collect(node, producers, found)
    return list(found)


def _collect(
    node: onnx.NodeProto, producers: Mapping[str, onnx.NodeProto], found: dict[str, None]
) -> None:
    """Add a node and its dependencies, back to the means of feature maps."""
    if node.name in found:
        return
    found[node.name] = None
    if node.op_type not in _MEANS:
        for name in node.input:
            if name in producers:
                _collect(producers[name], producers, found)


#: The largest sum of two products that 16 signed bits hold.
LARGEST_SUM = 32_767
#: The largest activation; signed ones are shifted to unsigned before they are multiplied.
LARGEST_ACTIVATION = 255

# Operators whose second input is their weights.
_DEQUANTISED = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})
# By operator, the positions of the weights and of their zero points among its inputs.
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
    """Return the largest sum of two products that each quantised layer can form.

    Args:
        model: any ONNX model, in QDQ form or of integer operators.

    Returns:
        `255 * (|w1| + |w2|)`, with the two largest weights of one output channel, by the name of
        each convolution, Linear and matrix product with quantised weights (or of its output, if it
        has no name). Weights that are not signed constants with a zero point of 0 count as 128.
    """
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    producers = {name: node for node in model.graph.node for name in node.output}
    sums = {}
    for node in model.graph.node:
        rows = _quantised_rows(node, constants, producers)
        if rows is not None:
            sums[node.name or node.output[0]] = LARGEST_ACTIVATION * _largest_pair(rows)
    return sums


def require_same_sums(model: onnx.ModelProto, name: str) -> int:
    """Check that no sum of an INT8 model depends on the processor.

    Args:
        model: the model to check.
        name: its name in error messages.

    Returns:
        The largest sum of two products in the model, at most 32,767; 0 without quantised layers.

    Raises:
        BadModel: a layer can form a larger sum; the message names the worst layer.
    """
    sums = measure_pair_sums(model)
    over = {layer: found for layer, found in sums.items() if found > LARGEST_SUM}
    if over:
        worst = max(over, key=lambda layer: over[layer])
        raise BadModel(
            f"the results of {name} depend on the processor: two products of {worst} can add up to "
            f"{over[worst]:,} ({len(over)} of {len(sums)} quantised layers have such sums)",
            f"at most {LARGEST_SUM:,}, which 16 bits hold",
            "export the run again: sbtk export RUN --int8",
        )
    return max(sums.values(), default=0)


def _largest_pair(rows: NDArray[np.int64]) -> int:
    """Return the largest sum of two absolute values of a row."""
    sizes = np.abs(rows)
    if sizes.size == 0:
        return 0
    if sizes.shape[1] == 1:
        return int(sizes.max())
    return int(np.partition(sizes, -2, axis=1)[:, -2:].sum(axis=1).max())


def _quantised_rows(
    node: onnx.NodeProto,
    constants: Mapping[str, onnx.TensorProto],
    producers: Mapping[str, onnx.NodeProto],
) -> NDArray[np.int64] | None:
    """Return a layer's weights as `(outputs, inputs)`; `None` if it is not a quantised layer."""
    zero_point = ""
    if node.op_type in _INTEGER:
        position, at = _INTEGER[node.op_type]
        name = node.input[position]
        zero_point = node.input[at] if len(node.input) > at else ""
    elif node.op_type in _DEQUANTISED and len(node.input) > 1:
        before = producers.get(node.input[1])
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
        # (inputs, outputs / groups, ...): kernels sum differently, so take all inputs together.
        return np.moveaxis(weights, 1, 0).reshape(weights.shape[1], -1)
    if "Conv" in node.op_type:
        return weights.reshape(weights.shape[0], -1)
    is_transposed = any(a.name == "transB" and a.i for a in node.attribute)
    if is_transposed:
        return weights
    if weights.ndim == 1:
        return weights[None]
    return np.moveaxis(weights, -2, -1).reshape(-1, weights.shape[-2])
