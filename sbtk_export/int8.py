"""Static INT8 quantisation of an ONNX student, calibrated on real sketches and photos.

One file serves ONNX Runtime and OpenVINO: QDQ form, unsigned activations, signed weights per
channel. Everything up to the last Linear is quantised and nothing after it: a quantised L2 norm
gives rows of length 1.003 to 1.37, which a cosine does not see.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import onnx
from onnxruntime.quantization import (
    CalibrationDataReader,
    CalibrationMethod,
    QuantFormat,
    QuantType,
    quantize_static,
)

from sbtk_export.bias_correction import correct_biases, mean_inputs
from sbtk_export.fp16 import single_precision
from sbtk_export.gates import gate_nodes
from sbtk_export.model_inputs import Feeds, ModelInputs, domain_input_of
from sbtk_export.onnx_from_student import check_model, without_traces
from sbtk_export.saturation import require_same_sums
from sbtk_runtime.errors import BadModel
from sbtk_runtime.files import atomic_path
from sbtk_runtime.onnx_file import INPUT_NAME

_OPERATORS = ["Conv", "Relu", "MaxPool", "Add", "Mul", "Gemm"]
# ONNX Runtime's own mark of a model whose shapes are inferred; without it the quantiser warns.
_PREPARED = ("onnx.quant.pre_process", "onnxruntime.quant")
_BATCH = 8


def quantise(source: Path, target: Path, inputs: ModelInputs) -> None:
    """Writes the INT8 form of the model `source` to `target`, atomically.

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
    excluded = nodes_outside(model)
    with tempfile.TemporaryDirectory(prefix="sbtk-int8-") as folder, atomic_path(target) as result:
        prepared = Path(folder) / "prepared.onnx"
        save_prepared(model, prepared)
        quantize_static(
            prepared,
            result,
            CalibrationBatches(model, inputs.mixed()),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=_OPERATORS,
            nodes_to_exclude=[*excluded, *gate_nodes(model)],
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            per_channel=True,
            # 7-bit weights do not saturate on CPUs without VNNI (see `saturation`), at no cost in
            # speed elsewhere.
            reduce_range=True,
            calibrate_method=CalibrationMethod.MinMax,
            extra_options={
                "OpTypesToExcludeOutputQuantization": ["Gemm"],
                # The extremes of all pictures together would spend the range on outliers.
                "CalibMovingAverage": True,
                "CalibMovingAverageConstant": 0.02,
            },
        )
        quantised = onnx.load(result)
        correct_biases(quantised, model, mean_inputs(model, inputs))
        input_first(quantised)
        without_traces(quantised)
        require_same_sums(quantised, target.name)
        check_model(quantised, dim, has_domain_input=domain_input_of(model) is not None)
        onnx.save(quantised, result)


def save_prepared(model: onnx.ModelProto, path: Path) -> None:
    """Writes the FP32 model to `path` as ONNX Runtime's quantiser wants it."""
    prepared = onnx.ModelProto()
    prepared.CopyFrom(model)
    prepared.metadata_props.add(key=_PREPARED[0], value=_PREPARED[1])
    onnx.save(prepared, path)


def nodes_outside(model: onnx.ModelProto) -> list[str]:
    """Returns the names of the nodes before the first convolution and after the last Linear.

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
    """Moves Cast and Transpose of the input to the front, where the quantiser puts constants."""
    nodes = list(model.graph.node)
    cast = next(node for node in nodes if INPUT_NAME in node.input)
    transpose = next(node for node in nodes if cast.output[0] in node.input)
    rest = [node for node in nodes if node is not cast and node is not transpose]
    del model.graph.node[:]
    model.graph.node.extend([cast, transpose, *rest])


class CalibrationBatches(CalibrationDataReader):  # type: ignore[misc]
    """Pictures as the calibrator asks for them.

    Args:
        model: that is calibrated.
        inputs: in an order that mixes sketches and photos.
    """

    def __init__(self, model: onnx.ModelProto, inputs: ModelInputs) -> None:
        self._batches = inputs.batches(model, _BATCH)

    def get_next(self) -> Feeds | None:
        """Returns the next inputs of the model, or `None` after the last."""
        return next(self._batches, None)
