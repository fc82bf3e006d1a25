"""The three ONNX files as graphs: what engines are promised of them."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from sbtk_cli.main import main
from sbtk_export.bundle_writer import OPSETS
from sbtk_export.int8 import nodes_outside
from sbtk_export.model_files import VARIANTS, file_name, write_models
from sbtk_export.onnx_from_student import check_model
from sbtk_export.parity import torch_embeddings
from sbtk_export.pictures import ExportPictures
from sbtk_runtime.bundle import Bundle
from sbtk_runtime.engines.engine_openvino import openvino_core
from sbtk_runtime.errors import BadModel
from sbtk_runtime.manifest import PRECISIONS, Precision
from sbtk_train.students.sbtknet import SbtknetStudent
from tests.tiny import tiny_model


def model_of(bundle: Bundle, precision: Precision) -> onnx.ModelProto:
    return onnx.load(bundle.onnx_path(precision))


@pytest.mark.parametrize("precision", PRECISIONS)
def test_model_keeps_its_promises(bundle: Bundle, precision: Precision) -> None:
    model = model_of(bundle, precision)
    onnx.checker.check_model(model, full_check=True)
    (images,), (embeddings,) = model.graph.input, model.graph.output
    assert (images.name, images.type.tensor_type.elem_type) == ("images", TensorProto.UINT8)
    sizes = [size.dim_param or size.dim_value for size in images.type.tensor_type.shape.dim]
    assert sizes == ["batch", 224, 224, 3]
    assert embeddings.name == "embeddings"
    assert embeddings.type.tensor_type.elem_type == TensorProto.FLOAT
    assert [node.op_type for node in model.graph.node[:2]] == ["Cast", "Transpose"]
    assert sum("images" in node.input for node in model.graph.node) == 1
    assert "BatchNormalization" not in {node.op_type for node in model.graph.node}


@pytest.mark.parametrize("precision", PRECISIONS)
def test_model_does_not_tell_where_it_was_made(bundle: Bundle, precision: Precision) -> None:
    content = bundle.onnx_path(precision).read_bytes()
    assert b"stack_trace" not in content
    assert str(Path(__file__).parents[2]).encode() not in content


@pytest.mark.parametrize("precision", PRECISIONS)
def test_batch_is_dynamic(bundle: Bundle, pictures: ExportPictures, precision: Precision) -> None:
    session = onnxruntime.InferenceSession(bundle.onnx_path(precision))
    pixels = pictures.parity.pixels[:5]
    together = session.run(["embeddings"], {"images": pixels})[0]
    single = [session.run(["embeddings"], {"images": pixels[i : i + 1]})[0] for i in range(5)]
    np.testing.assert_allclose(together, np.concatenate(single), atol=1e-5)


def test_fp16_is_half_up_to_the_pool_and_single_after_it(bundle: Bundle) -> None:
    model = model_of(bundle, "fp16")
    kinds = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    for node in model.graph.node:
        weights = {kinds[name] for name in node.input[1:] if name in kinds}
        if node.op_type == "Conv":
            assert weights == {TensorProto.FLOAT16}
        if node.op_type == "Gemm":
            assert weights == {TensorProto.FLOAT}
    operators = [node.op_type for node in model.graph.node]
    assert "Cast" in operators[operators.index("Conv") : operators.index("Gemm")]


def test_int8_stops_at_the_last_linear(bundle: Bundle) -> None:
    nodes = list(model_of(bundle, "int8").graph.node)
    operators = [node.op_type for node in nodes]
    last = operators.index("Gemm")
    assert "QuantizeLinear" not in operators[last:]
    assert "DequantizeLinear" not in operators[last:]
    makers = {name: node for node in nodes for name in node.output}
    for node in nodes:
        if node.op_type in ("Conv", "Gemm"):
            assert all(makers[name].op_type == "DequantizeLinear" for name in node.input)


def test_int8_weights_are_signed_per_channel_and_of_seven_bits(bundle: Bundle) -> None:
    model = model_of(bundle, "int8")
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    makers = {name: node for node in model.graph.node for name in node.output}
    found = 0
    for node in model.graph.node:
        if node.op_type not in ("Conv", "Gemm"):
            continue
        weight, scale, zero = (constants[name] for name in makers[node.input[1]].input)
        assert weight.dtype == np.int8
        assert scale.shape == (weight.shape[0],)
        assert not zero.any()
        assert np.abs(weight.astype(int)).max() <= 64
        found += 1
    assert found == 3
    for node in model.graph.node:
        if node.op_type == "QuantizeLinear":
            assert constants[node.input[2]].dtype == np.uint8


def test_int8_file_runs_in_openvino_too(bundle: Bundle, pictures: ExportPictures) -> None:
    if importlib.util.find_spec("openvino") is None:
        pytest.skip("OpenVINO is not installed")
    pixels = pictures.parity.pixels[:8]
    compiled = openvino_core().compile_model(str(bundle.onnx_path("int8")), "CPU")
    rows = compiled(pixels)["embeddings"]
    session = onnxruntime.InferenceSession(bundle.onnx_path("int8"))
    wanted = session.run(["embeddings"], {"images": pixels})[0]
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-5)
    assert ((rows * wanted).sum(axis=1) > 0.99).all()


def test_broken_promises_are_named(bundle: Bundle) -> None:
    with pytest.raises(BadModel, match="FLOAT"):
        check_model(model_of(bundle, "fp32"), dim=7, has_domain_input=False)
    with pytest.raises(BadModel, match="domain"):
        check_model(model_of(bundle, "fp32"), dim=16, has_domain_input=True)
    asked_twice = model_of(bundle, "fp32")
    asked_twice.graph.node.append(helper.make_node("Shape", ["images"], ["sizes"]))
    with pytest.raises(BadModel, match="Shape"):
        check_model(asked_twice, dim=16, has_domain_input=False)
    with pytest.raises(BadModel, match="not valid ONNX"):
        check_model(onnx.ModelProto(), dim=16, has_domain_input=False)


def test_what_lies_outside_is_not_quantised() -> None:
    with pytest.raises(BadModel, match="no Conv"):
        nodes_outside(tiny_model())


@pytest.mark.parametrize("opset", [OPSETS[0], OPSETS[-1]])
def test_every_precision_can_be_written_in_an_opset(
    student: SbtknetStudent, pictures: ExportPictures, tmp_path: Path, opset: int
) -> None:
    calibration = pictures.calibration.inputs.first(16)
    write_models(student, tmp_path, VARIANTS, calibration, lambda _: None, opset)
    pixels = pictures.parity.pixels[:4]
    wanted = torch_embeddings(student, pictures.parity.inputs.first(4))
    for variant in VARIANTS:
        model = onnx.load(tmp_path / file_name(variant))
        assert [entry.version for entry in model.opset_import if not entry.domain] == [opset]
        session = onnxruntime.InferenceSession(
            model.SerializeToString(), providers=["CPUExecutionProvider"]
        )
        rows = session.run(["embeddings"], {"images": pixels})[0]
        assert (rows * wanted).sum(axis=1).min() > 0.9


def test_an_opset_out_of_range_is_refused_with_the_range(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["export", "run", "--opset", "17"]) == 2
    assert "18<=x<=23" in capsys.readouterr().err
    assert (OPSETS[0], OPSETS[-1]) == (18, 23)
