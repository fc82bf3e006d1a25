"""The work in an ONNX file, against sums by hand, torch's layers and inferred shapes."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from sbtk_export.fp16 import half_trunk_student
from sbtk_export.onnx_from_student import write_onnx
from sbtk_runtime.bench.onnx_macs import multiply_accumulates
from sbtk_runtime.bundle import Bundle
from sbtk_runtime.errors import BadModel
from sbtk_train.students.sbtknet import SbtknetStudent
from sbtk_train.students.student import Student
from tests.tiny import tiny_model
from tests.tiny_dsn import tiny_dsn_student
from tests.tiny_student import tiny_student


def test_the_tiny_model_multiplies_once_in_its_gemm() -> None:
    assert multiply_accumulates(tiny_model(dim=16).SerializeToString()) == 16 * 8 * 8 * 3


def test_an_exported_student_costs_what_torch_runs(tmp_path: Path) -> None:
    student = tiny_student()
    write_onnx(student, tmp_path / "model.onnx")
    counted = multiply_accumulates((tmp_path / "model.onnx").read_bytes())
    assert counted == macs_by_torch(student)


@pytest.mark.parametrize("half", [False, True])
def test_channel_weights_and_a_second_input_are_counted_too(tmp_path: Path, half: bool) -> None:
    student = tiny_dsn_student()
    write_onnx(half_trunk_student(student) if half else student, tmp_path / "model.onnx")
    content = (tmp_path / "model.onnx").read_bytes()
    assert multiply_accumulates(content) == macs_by_torch(student)


@pytest.mark.parametrize("precision", ["int8", "fp16"])
def test_the_shipped_model_is_a_resnet50(precision: str) -> None:
    bundle = Bundle.open()
    content = bundle.checked_content("int8" if precision == "int8" else "fp16")
    dim = bundle.manifest.dim
    whole = macs_by_torch(SbtknetStudent(bundle.manifest.backbone, dim, classes=2))
    counted = multiply_accumulates(content)
    assert counted == macs_by_onnx(onnx.load_from_string(content))
    # Export may have moved strides up, which spares a tenth and never adds any.
    assert 0.85 * whole < counted <= whole


def test_another_size_of_picture_costs_another_sum() -> None:
    weights = helper.make_tensor("w", TensorProto.FLOAT, [4, 3, 3, 3], [0.0] * 108)
    node = helper.make_node("Conv", ["x", "w"], ["y"], strides=[2, 2], pads=[1, 1, 1, 1])
    content = _model([node], [weights]).SerializeToString()
    assert multiply_accumulates(content, size_px=9) == 4 * 3 * 9 * 5 * 5


@pytest.mark.parametrize(
    ("node", "complaint"),
    [
        (helper.make_node("Resize", ["x"], ["y"]), "Resize"),
        (helper.make_node("MatMul", ["x", "x"], ["y"]), "MatMul"),
        (helper.make_node("Conv", ["x", "w"], ["y"], auto_pad="SAME_UPPER"), "pads by itself"),
    ],
)
def test_a_layer_whose_size_cannot_be_told_is_no_guess(
    node: onnx.NodeProto, complaint: str
) -> None:
    weights = helper.make_tensor("w", TensorProto.FLOAT, [4, 3, 3, 3], [0.0] * 108)
    with pytest.raises(BadModel, match=complaint):
        multiply_accumulates(_model([node], [weights]).SerializeToString())


def test_what_is_no_onnx_file_is_refused() -> None:
    whole = tiny_model().SerializeToString()
    with pytest.raises(BadModel, match="not an ONNX model"):
        multiply_accumulates(whole[: len(whole) // 2])


def macs_by_torch(student: Student) -> int:
    """Returns the multiplications of the layers that torch really calls, by their outputs."""
    total = 0

    def count(module: nn.Module, _: object, output: torch.Tensor) -> None:
        nonlocal total
        if isinstance(module, nn.Conv2d):
            total += module.weight.numel() * output.shape[2] * output.shape[3]
        elif isinstance(module, nn.Linear):
            total += module.weight.numel()

    for module in student.modules():
        module.register_forward_hook(count)
    with torch.inference_mode():
        student.eval().embed(torch.zeros(1, 3, 224, 224), torch.zeros(1))
    return total


def macs_by_onnx(model: onnx.ModelProto) -> int:
    """Returns the same by the shapes that the onnx package infers."""
    inferred = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
    shapes = {
        value.name: [dim.dim_value for dim in value.type.tensor_type.shape.dim]
        for value in (*inferred.value_info, *inferred.input, *inferred.output)
    }
    shapes |= {tensor.name: list(tensor.dims) for tensor in inferred.initializer}
    total = 0
    for node in inferred.node:
        if node.op_type in ("Conv", "Gemm"):
            product = 1
            for size in shapes[node.input[1]]:
                product *= size
            for size in shapes[node.output[0]][2:]:
                product *= size
            total += product
    return total


def _model(nodes: list[onnx.NodeProto], constants: list[onnx.TensorProto]) -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes,
        "one layer",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 3, "h", "w"])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(numpy_helper.to_array(value), value.name) for value in constants],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)])
