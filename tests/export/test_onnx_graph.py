"""The graphs of the three ONNX files, as engines expect them."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto, helper, numpy_helper
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models.resnet import Bottleneck

from sbtk_cli.main import main
from sbtk_export.export import OPSETS, VARIANTS, file_name, write_models
from sbtk_export.images import ExportImages
from sbtk_export.int8 import find_nodes_outside
from sbtk_export.onnx_graph import Deployed, check_model, move_strides_up, write_onnx
from sbtk_export.parity import embed_with_torch
from sbtk_runtime.bundle import Bundle
from sbtk_runtime.engines.openvino import openvino_core
from sbtk_runtime.errors import BadModel
from sbtk_runtime.manifest import PRECISIONS, Precision
from sbtk_train.models.student import SbtknetStudent
from tests.narrow_resnet import NarrowResNet
from tests.tiny import tiny_model


def model_of(bundle: Bundle, precision: Precision) -> onnx.ModelProto:
    return onnx.load(bundle.onnx_path(precision))


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_model_has_the_documented_inputs_and_outputs(
    bundle: Bundle, precision: Precision
) -> None:
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
def test_the_model_contains_no_paths_of_its_machine(bundle: Bundle, precision: Precision) -> None:
    content = bundle.onnx_path(precision).read_bytes()
    assert b"stack_trace" not in content
    assert str(Path(__file__).parents[2]).encode() not in content


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_batch_size_is_dynamic(
    bundle: Bundle, samples: ExportImages, precision: Precision
) -> None:
    session = onnxruntime.InferenceSession(bundle.onnx_path(precision))
    pixels = samples.parity.pixels[:5]
    together = session.run(["embeddings"], {"images": pixels})[0]
    single = [session.run(["embeddings"], {"images": pixels[i : i + 1]})[0] for i in range(5)]
    np.testing.assert_allclose(together, np.concatenate(single), atol=1e-5)


def test_fp16_models_are_half_precision_up_to_the_pool(bundle: Bundle) -> None:
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


def test_int8_ends_at_the_last_linear(bundle: Bundle) -> None:
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


def test_the_int8_file_runs_in_openvino_too(bundle: Bundle, samples: ExportImages) -> None:
    if importlib.util.find_spec("openvino") is None:
        pytest.skip("OpenVINO is not installed")
    pixels = samples.parity.pixels[:8]
    compiled = openvino_core().compile_model(str(bundle.onnx_path("int8")), "CPU")
    rows = compiled(pixels)["embeddings"]
    session = onnxruntime.InferenceSession(bundle.onnx_path("int8"))
    wanted = session.run(["embeddings"], {"images": pixels})[0]
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-5)
    assert ((rows * wanted).sum(axis=1) > 0.99).all()


def test_undocumented_inputs_and_outputs_are_named(bundle: Bundle) -> None:
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


def test_nodes_outside_the_quantised_part_are_not_quantised() -> None:
    with pytest.raises(BadModel, match="no Conv"):
        find_nodes_outside(tiny_model())


@pytest.mark.parametrize("opset", [OPSETS[0], OPSETS[-1]])
def test_every_precision_can_be_written_in_a_given_opset(
    student: SbtknetStudent, samples: ExportImages, tmp_path: Path, opset: int
) -> None:
    calibration = samples.calibration.inputs.first(16)
    write_models(student, tmp_path, VARIANTS, calibration, lambda _: None, opset)
    pixels = samples.parity.pixels[:4]
    wanted = embed_with_torch(student, samples.parity.inputs.first(4))
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


SIDE = 13


def _conv(source: str, target: str, kernel: int, stride: int = 1) -> NodeProto:
    pad = kernel // 2
    return helper.make_node(
        "Conv",
        [source, f"w{kernel}"],
        [target],
        target,
        kernel_shape=[kernel, kernel],
        strides=[stride, stride],
        pads=[pad] * 4,
    )


def _node(operator: str, sources: Sequence[str], target: str) -> NodeProto:
    return helper.make_node(operator, sources, [target], target)


def _model(nodes: Sequence[NodeProto], outputs: Sequence[str]) -> onnx.ModelProto:
    random = np.random.default_rng(0)
    weights = [
        numpy_helper.from_array(
            random.standard_normal((4, 4, kernel, kernel)).astype(np.float32), f"w{kernel}"
        )
        for kernel in (1, 3)
    ]
    graph = helper.make_graph(
        nodes,
        "block",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 4, SIDE, SIDE])],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs],
        weights,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)])
    model.ir_version = 10
    return onnx.shape_inference.infer_shapes(model, strict_mode=True)


# The last block of a stage, and the first two convolutions of the next, as in ResNet50-v1.
LAST_BLOCK = [
    _conv("x", "entry", 1),
    _node("Relu", ["entry"], "before"),
    _conv("before", "conv1", 1),
    _node("Relu", ["conv1"], "relu1"),
    _conv("relu1", "conv2", 3),
    _node("Relu", ["conv2"], "relu2"),
    _conv("relu2", "conv3", 1),
    _node("Add", ["conv3", "before"], "sum"),
    _node("Relu", ["sum"], "after"),
]
NEXT_STAGE = [_conv("after", "left", 1, 2), _conv("after", "right", 1, 2)]


def _answers(model: onnx.ModelProto) -> list[NDArray[np.float32]]:
    session = onnxruntime.InferenceSession(model.SerializeToString())
    x = np.random.default_rng(1).standard_normal((2, 4, SIDE, SIDE)).astype(np.float32)
    return list(session.run(None, {"x": x}))


def _strides(model: onnx.ModelProto) -> dict[str, int]:
    return {
        node.name: next(a.ints[0] for a in node.attribute if a.name == "strides")
        for node in model.graph.node
        if node.op_type in ("Conv", "MaxPool")
    }


def _check_moved(model: onnx.ModelProto, expected: int) -> onnx.ModelProto:
    before = _answers(model)
    moved = onnx.ModelProto()
    moved.CopyFrom(model)
    assert move_strides_up(moved) == expected
    onnx.checker.check_model(moved, full_check=True)
    for old, new in zip(before, _answers(moved), strict=True):
        np.testing.assert_allclose(new, old, rtol=1e-5, atol=1e-5)
    return moved


def test_a_stages_stride_ends_at_the_3x3_convolution_before_it() -> None:
    moved = _check_moved(_model(LAST_BLOCK + NEXT_STAGE, ["left", "right"]), 2)
    assert _strides(moved) == {
        "entry": 1,
        "conv1": 1,
        "conv2": 2,
        "conv3": 1,
        "before_every_second": 2,
        "left": 1,
        "right": 1,
    }


@pytest.mark.parametrize(
    ("nodes", "outputs"),
    [
        # Somebody else reads every position: a 3x3 convolution, the caller, a plain one.
        ([*LAST_BLOCK, *NEXT_STAGE, _conv("after", "third", 3, 2)], ["left", "right", "third"]),
        ([*LAST_BLOCK, *NEXT_STAGE], ["left", "right", "after"]),
        ([*LAST_BLOCK, *NEXT_STAGE, _conv("after", "plain", 1)], ["left", "right", "plain"]),
        # Nothing is computed above the stride.
        ([_conv("x", "left", 1, 2)], ["left"]),
        # One term of the sum is a single position, repeated.
        (
            [
                _conv("x", "all", 3),
                _node("GlobalAveragePool", ["x"], "mean"),
                _node("Add", ["all", "mean"], "sum"),
                _conv("sum", "left", 1, 2),
            ],
            ["left"],
        ),
    ],
)
def test_strides_do_not_move_past_tensors_with_other_consumers(
    nodes: list[NodeProto], outputs: list[str]
) -> None:
    model = _model(nodes, outputs)
    moved = _check_moved(model, 0)
    assert moved == model


def test_a_shortcut_that_is_an_output_too_is_kept() -> None:
    model = _model(LAST_BLOCK + NEXT_STAGE, ["left", "right", "conv3"])
    moved = _check_moved(model, 1)
    assert _strides(moved)["conv3"] == 1


@pytest.mark.slow
def test_resnet50_v1_computes_less_than_in_torch_and_v15_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The real ResNet50-v1 has 3.48 instead of 3.86 G multiply-adds."""
    monkeypatch.setattr("torchvision.models.resnet50", lambda: NarrowResNet(Bottleneck, 2))
    images = np.random.default_rng(2).integers(0, 256, (2, 224, 224, 3), dtype=np.uint8)
    shares = {}
    for backbone in ("resnet50-v1", "resnet50-v1.5"):
        torch.manual_seed(0)
        student = SbtknetStudent(backbone, 8, 2).eval()
        path = tmp_path / f"{backbone}.onnx"
        write_onnx(student, path)
        session = onnxruntime.InferenceSession(path)
        rows = session.run(None, {"images": images})[0]
        with torch.inference_mode():
            expected = Deployed(student)(torch.from_numpy(images)).numpy()
        np.testing.assert_allclose(rows, expected, atol=2e-5)
        with torch.inference_mode(), FlopCounterMode(display=False) as counter:
            student.feature_map(torch.zeros(1, 3, 224, 224))
        shares[backbone] = 2 * _multiplications(onnx.load(path)) / counter.get_total_flops()
    assert 0.6 < shares["resnet50-v1"] < 0.95
    assert shares["resnet50-v1.5"] == 1


def _multiplications(model: onnx.ModelProto) -> int:
    """Return the multiply-adds of the convolutions for one image."""
    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True)
    shapes = {
        v.name: [d.dim_value for d in v.type.tensor_type.shape.dim]
        for v in inferred.graph.value_info
    }
    weights = {tensor.name: tensor.dims for tensor in model.graph.initializer}
    total = 0
    for node in model.graph.node:
        if node.op_type == "Conv":
            height, width = shapes[node.output[0]][2:]
            total += int(np.prod(weights[node.input[1]])) * height * width
    return total
