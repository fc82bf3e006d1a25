"""TensorRT's INT8 file: symmetric, fused where TensorRT fuses, taken by its parser, and exact."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from sbtk_export.card import StudentFacts
from sbtk_export.export import ExportPlan, export_student
from sbtk_export.images import ExportImages
from sbtk_export.int8_tensorrt import (
    choose_steps,
    collect_histograms,
    find_behind_first_convolution,
    unquantise_fused_inputs,
)
from sbtk_export.onnx_graph import ModelInputs
from sbtk_runtime.bundle import Bundle, OnnxForm
from sbtk_runtime.engines import onnxruntime as engine_onnxruntime
from sbtk_runtime.engines.base import EngineOptions, EngineRequest
from sbtk_runtime.engines.tensorrt.build import BuildSettings, build_plan
from sbtk_runtime.engines.tensorrt.library import find_tensorrt
from sbtk_runtime.errors import BadConfig, BadModel
from sbtk_runtime.manifest import Precision
from sbtk_train.models.student import SbtknetStudent
from tests.tiny_student import fitted

SETTINGS = BuildSettings(1, 4, 8, workspace_bytes=256 << 20, optimisation_level=0)


class Residual(nn.Module):
    """A block as ResNets have them, whose shortcut is a convolution too."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, channels, 3, padding=1)
        self.second = nn.Conv2d(channels, channels, 1)
        self.shortcut = nn.Conv2d(channels, channels, 1)
        self.plain = nn.Conv2d(channels, channels, 1)

    def forward(self, planes: Tensor) -> Tensor:
        """Return planes of the same shape."""
        planes = (self.second(self.first(planes).relu()) + self.shortcut(planes)).relu()
        planes = (self.plain(planes) + planes).relu()
        return planes


@pytest.fixture(scope="module")
def residual_student(student: SbtknetStudent, samples: ExportImages) -> SbtknetStudent:
    """The tiny student with two residual blocks, which depends on a few large values.

    With steps of least squared error some of its embeddings have a cosine of 0.3.
    """
    deeper = copy.deepcopy(student)
    assert isinstance(deeper.trunk, nn.Sequential)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        deeper.trunk.append(Residual(48))
    return fitted(deeper, [samples.parity, samples.ranking])


@pytest.fixture(scope="module")
def trt_bundle(
    tmp_path_factory: pytest.TempPathFactory,
    residual_student: SbtknetStudent,
    facts: StudentFacts,
    samples: ExportImages,
) -> Bundle:
    """A bundle with both INT8 files."""
    target = tmp_path_factory.mktemp("bundles") / "both"
    plan = ExportPlan(target, "both", ("fp32", "int8", "int8.trt"))
    return export_student(residual_student, facts, samples, plan, print).bundle


@pytest.fixture(scope="module")
def model(trt_bundle: Bundle) -> onnx.ModelProto:
    return onnx.load(trt_bundle.onnx_path("int8", "tensorrt"))


def test_a_bundle_has_both_int8_files(trt_bundle: Bundle) -> None:
    trt_bundle.verify()
    assert {"model.int8.onnx", "model.int8.trt.onnx"} < set(trt_bundle.manifest.files)
    assert trt_bundle.precisions_of("tensorrt") == ("fp32", "int8")
    plain, symmetric = (trt_bundle.read_onnx("int8", form) for form in ("plain", "tensorrt"))
    assert plain != symmetric


def test_parity_holds_and_is_recorded_in_the_card(trt_bundle: Bundle) -> None:
    figures = trt_bundle.manifest.parity["int8.trt"]
    assert figures["images"] >= 200
    assert 0.95 <= figures["cosine_min"] < 0.99999
    assert figures["norm_error"] <= 1e-3
    assert abs(figures["map_difference"]) <= 0.005
    assert "| int8.trt | " in (trt_bundle.folder / "MODEL_CARD.md").read_text()


def test_onnx_runtime_runs_the_tensorrt_form_on_request(
    trt_bundle: Bundle, samples: ExportImages
) -> None:
    pixels = samples.parity.pixels[:6]
    rows = []
    runs: tuple[tuple[Precision, OnnxForm], ...] = (
        ("int8", "tensorrt"),
        ("int8", "plain"),
        ("fp32", "plain"),
    )
    for precision, form in runs:
        request = EngineRequest(
            trt_bundle, EngineOptions(precision=precision, threads=1), form=form
        )
        engine = engine_onnxruntime.open_cpu(request)
        assert engine.info.form == form
        rows.append(engine.run(pixels, "photo"))
        engine.close()
    assert not np.array_equal(rows[0], rows[1])
    assert ((rows[0] * rows[2]).sum(axis=1) > 0.99).all()


def test_every_quantiser_is_symmetric_and_signed(model: onnx.ModelProto) -> None:
    constants = constants_of(model)
    kinds = set()
    for node in model.graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            zero = constants[node.input[2]]
            kinds.add(zero.dtype)
            assert not zero.any()
    assert kinds == {np.dtype(np.int8)}


def test_weights_are_quantised_per_channel_with_all_eight_bits(model: onnx.ModelProto) -> None:
    constants, makers = constants_of(model), makers_of(model)
    layers = quantised_layers(model)
    assert len(layers) == 6
    for node in layers:
        weight, scale = (constants[name] for name in makers[node.input[1]].input[:2])
        assert weight.dtype == np.int8
        assert scale.shape == (weight.shape[0],)
        assert np.abs(weight.astype(int)).max() == 127


def test_biases_stay_single_precision(model: onnx.ModelProto) -> None:
    """A bias behind a DequantizeLinear of INT32 is what TensorRT refuses."""
    kinds = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    assert [kinds[node.input[2]] for node in quantised_layers(model)] == [TensorProto.FLOAT] * 6
    assert TensorProto.INT32 not in kinds.values()


def test_the_output_of_the_first_convolution_is_fp16(model: onnx.ModelProto) -> None:
    convolutions = [node for node in model.graph.node if node.op_type == "Conv"]
    assert find_behind_first_convolution(model) == []  # a Cast is in between by now
    kinds = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    second = convolutions[1]
    assert [kinds[name] for name in second.input[1:]] == [TensorProto.FLOAT16] * 2
    makers = makers_of(model)
    cast = makers[second.input[0]]
    assert (cast.op_type, cast.attribute[0].i) == ("Cast", TensorProto.FLOAT16)
    assert makers[cast.input[0]].op_type == "MaxPool"
    (after,) = (node for node in model.graph.node if second.output[0] in node.input)
    assert (after.op_type, after.attribute[0].i) == ("Cast", TensorProto.FLOAT)
    others = [kinds[node.input[2]] for node in convolutions if node is not second]
    assert set(others) == {TensorProto.FLOAT}


def test_a_shortcut_from_the_first_convolution_is_fp16_too() -> None:
    """As in a ResNet, where two convolutions read the first pooling."""
    nodes = [
        helper.make_node(kind, [source], [target], name=target)
        for kind, source, target in (
            ("Conv", "pixels", "stem"),
            ("Relu", "stem", "positive"),
            ("MaxPool", "positive", "pooled"),
            ("Conv", "pooled", "block"),
            ("Conv", "pooled", "shortcut"),
            ("Conv", "block", "deeper"),
        )
    ]
    graph = helper.make_graph(nodes, "stem", [], [])
    assert find_behind_first_convolution(helper.make_model(graph)) == ["block", "shortcut"]


def test_nothing_is_quantised_inside_layers_that_tensorrt_fuses(model: onnx.ModelProto) -> None:
    readers: dict[str, list[str]] = {}
    for node in model.graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node.op_type)
    makers = makers_of(model)
    sums = [node for node in model.graph.node if node.op_type == "Add" and is_inside(node, makers)]
    assert len(sums) == 2
    for node in sums:
        assert readers[node.output[0]] == ["Relu"]
        # The convolution that the Add is computed in, and the shortcut.
        assert sorted(makers[name].op_type for name in node.input) == ["Conv", "DequantizeLinear"]
    for node in quantised_layers(model):
        assert makers[node.input[0]].op_type == "DequantizeLinear"
        if node.op_type == "Conv" and readers[node.output[0]] != ["QuantizeLinear"]:
            assert readers[node.output[0]] in (["Relu"], ["Add"])


def test_nothing_is_quantised_after_the_last_linear(model: onnx.ModelProto) -> None:
    operators = [node.op_type for node in model.graph.node]
    assert not {"QuantizeLinear", "DequantizeLinear"} & set(operators[operators.index("Gemm") :])


def test_no_constant_is_left_over(model: onnx.ModelProto) -> None:
    read = {name for node in model.graph.node for name in node.input}
    assert {tensor.name for tensor in model.graph.initializer} <= read
    before = model.SerializeToString()
    assert unquantise_fused_inputs(model) == 0
    assert model.SerializeToString() == before


def test_rounded_weights_shift_no_mean(trt_bundle: Bundle, model: onnx.ModelProto) -> None:
    """The biases took up what rounding shifts; nearly all of them differ from the student's."""
    original = onnx.load(trt_bundle.onnx_path("fp32"))
    exact, constants = constants_of(original), constants_of(model)
    layers = {node.name: node for node in original.graph.node}
    moved = [
        np.mean(constants[node.input[2]] != exact[layers[node.name].input[2]])
        for node in quantised_layers(model)
    ]
    assert min(moved[:-1]) > 0.9
    assert moved[-1] > 0


def test_scales_clip_outliers_if_that_reduces_the_error() -> None:
    """Many values of up to 8 and a single one of 16: that one is given up."""
    random = np.random.default_rng(0)
    pixels = random.integers(0, 65, (4, 224, 224, 3)).astype(np.uint8)
    nodes = [
        helper.make_node("Cast", ["images"], ["cast"], to=TensorProto.FLOAT),
        helper.make_node("Sqrt", ["cast"], ["values"]),
        helper.make_node("Identity", ["values"], ["embeddings"]),
    ]
    graph = helper.make_graph(
        nodes,
        "values",
        [helper.make_tensor_value_info("images", TensorProto.UINT8, ["batch", 224, 224, 3])],
        [helper.make_tensor_value_info("embeddings", TensorProto.FLOAT, None)],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)])
    model.ir_version = 9

    def reach(least: float = 0.2) -> float:
        histograms = collect_histograms(model, ["values"], ModelInputs.of_kind(pixels, "photo"))
        return float(choose_steps(histograms, least)["values"]) * 127

    assert 7.5 < reach() <= 8.0
    pixels[0, 0, 0, 0] = 255
    assert 7.0 < reach() < 9.0
    assert reach(0.75) == pytest.approx(12, abs=0.2)
    assert reach(1.0) == pytest.approx(np.sqrt(255), abs=0.01)
    pixels[:, :, ::10] = 255
    assert 14.0 < reach() < 16.0
    pixels[:] = 0
    assert reach() == 127


def test_tensorrt_accepts_its_form_and_refuses_the_other(trt_bundle: Bundle) -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
    trt = find_tensorrt("tensorrt_rtx")
    built = build_plan(trt, trt_bundle.read_onnx("int8", "tensorrt"), SETTINGS)
    assert len(built.plan) > 10_000
    with pytest.raises(BadModel, match="refuses"):
        build_plan(trt, trt_bundle.read_onnx("int8"), SETTINGS)


def test_a_slim_bundle_of_tensorrts_form_alone_is_refused(
    student: SbtknetStudent, facts: StudentFacts, samples: ExportImages, tmp_path: Path
) -> None:
    """No engine but TensorRT's could run it."""
    plan = ExportPlan(tmp_path / "slim", "slim", ("int8.trt",), is_slim=True)
    with pytest.raises(BadConfig, match="empty"):
        export_student(student, facts, samples, plan, print)


def test_the_file_for_cpus_has_unsigned_activations_and_integer_biases(
    trt_bundle: Bundle,
) -> None:
    constants = constants_of(onnx.load(trt_bundle.onnx_path("int8")))
    assert {np.dtype(np.uint8), np.dtype(np.int32)} < {value.dtype for value in constants.values()}


def quantised_layers(model: onnx.ModelProto) -> list[onnx.NodeProto]:
    makers = makers_of(model)
    layers = [node for node in model.graph.node if node.op_type in ("Conv", "Gemm")]
    return [node for node in layers if node.input[1] in makers]


def constants_of(model: onnx.ModelProto) -> dict[str, NDArray[np.generic]]:
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}


def makers_of(model: onnx.ModelProto) -> dict[str, onnx.NodeProto]:
    return {name: node for node in model.graph.node for name in node.output}


def is_inside(node: onnx.NodeProto, makers: dict[str, onnx.NodeProto]) -> bool:
    """Whether an Add is one of the trunk's, and not the shift of the input's normalisation."""
    return all(name in makers for name in node.input)
