"""Static INT8 quantisation for TensorRT: symmetric, with biases that stay FP32.

TensorRT takes neither the unsigned activations nor the quantised biases of `int8`, so its INT8 is
a file of its own. It fuses each convolution with the Add and the Relu after it, as long as nothing
is quantised in between, and moves quantisation ahead of poolings by itself. So pairs of
QuantizeLinear and DequantizeLinear stand where convolutions and Linears read, and at the shortcut
of each Add.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path

import onnx
from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static

from sbtk_export.bias_correction import correct_biases, mean_inputs
from sbtk_export.int8 import CalibrationBatches, input_first, nodes_outside, save_prepared
from sbtk_export.onnx_from_student import check_model, without_traces
from sbtk_runtime.files import atomic_path
from sbtk_runtime.preprocess import Pixels

_OPERATORS = ["Conv", "Add", "Gemm"]


def quantise_for_tensorrt(source: Path, target: Path, pixels: Pixels) -> None:
    """Writes TensorRT's INT8 form of the FP32 model `source` to `target`, atomically.

    Args:
        source: made by `write_onnx`.
        target: the file to make.
        pixels: `(N, 224, 224, 3) uint8`, what to calibrate on.

    Raises:
        BadModel: the model has no Linear or convolution to quantise between.
    """
    model = onnx.load(source)
    dim = model.graph.output[0].type.tensor_type.shape.dim[1].dim_value
    excluded = nodes_outside(model)
    with tempfile.TemporaryDirectory(prefix="sbtk-int8-") as folder, atomic_path(target) as result:
        prepared = Path(folder) / "prepared.onnx"
        save_prepared(model, prepared)
        quantize_static(
            prepared,
            result,
            CalibrationBatches(pixels),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=_OPERATORS,
            nodes_to_exclude=excluded,
            activation_type=QuantType.QInt8,
            weight_type=QuantType.QInt8,
            per_channel=True,
            calibrate_method=CalibrationMethod.MinMax,
            extra_options={
                "ActivationSymmetric": True,
                "WeightSymmetric": True,
                "QuantizeBias": False,
                "DedicatedQDQPair": True,
                # Only what these operators read is quantised: what they write goes on in FP32
                # through Add and Relu, up to the next reader.
                "OpTypesToExcludeOutputQuantization": _OPERATORS,
                # As for the other INT8 file.
                "CalibMovingAverage": True,
                "CalibMovingAverageConstant": 0.02,
            },
        )
        quantised = onnx.load(result)
        unquantise_fused_inputs(quantised)
        correct_biases(quantised, model, mean_inputs(model, pixels))
        input_first(quantised)
        without_traces(quantised)
        check_model(quantised, dim)
        onnx.save(quantised, result)


def unquantise_fused_inputs(model: onnx.ModelProto) -> int:
    """Lets each Add read one convolution's output as it is, in FP32; returns how many do now.

    TensorRT computes that Add inside the convolution, before anything is rounded. The other input,
    the shortcut, stays quantised, so that it is kept and read in 8 bits.
    """
    makers = {name: node for node in model.graph.node for name in node.output}
    gone: list[onnx.NodeProto] = []
    for add in (node for node in model.graph.node if node.op_type == "Add"):
        pairs = [_pair_before(name, makers) for name in add.input]
        if not all(pairs):
            continue
        for position, (first, last) in enumerate(pair for pair in pairs if pair):
            if makers[first.input[0]].op_type == "Conv":
                add.input[position] = first.input[0]
                gone += [first, last]
                break
    for node in gone:
        model.graph.node.remove(node)
    read = {name for node in model.graph.node for name in node.input}
    for constant in [c for c in model.graph.initializer if c.name not in read]:
        model.graph.initializer.remove(constant)
    return len(gone) // 2


def _pair_before(
    name: str, makers: Mapping[str, onnx.NodeProto]
) -> tuple[onnx.NodeProto, onnx.NodeProto] | None:
    """Returns the QuantizeLinear and DequantizeLinear that make a tensor; `None` for others."""
    last = makers.get(name)
    if last is None or last.op_type != "DequantizeLinear":
        return None
    first = makers.get(last.input[0])
    return None if first is None else (first, last)
