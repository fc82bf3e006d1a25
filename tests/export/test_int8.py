"""Quantised layers keep their mean outputs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from sbtk_export.fp16 import single_precision
from sbtk_export.images import ExportImages
from sbtk_export.int8 import (
    LARGEST_SUM,
    correct_biases,
    equalise_channels,
    measure_mean_inputs,
    measure_pair_sums,
    quantise,
    require_same_sums,
)
from sbtk_export.onnx_graph import ModelInputs, write_onnx
from sbtk_runtime.bundle import Bundle, pretrained_folder
from sbtk_runtime.errors import BadModel
from sbtk_train.models.student import SbtknetStudent


def test_mean_inputs_are_means_over_images_and_positions(
    bundle: Bundle, samples: ExportImages
) -> None:
    """The first convolution reads the normalised image, whose mean is computed by hand."""
    inputs = samples.calibration.inputs.first(13)
    model = onnx.load(bundle.onnx_path("fp32"))
    means = measure_mean_inputs(model, inputs)
    first = next(node for node in model.graph.node if node.op_type == "Conv")
    channels = inputs.pixels.reshape(-1, 3).mean(axis=0) / 255
    wanted = (channels - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    np.testing.assert_allclose(means[first.input[0]], wanted, atol=1e-4)
    layers = [node for node in model.graph.node if node.op_type in ("Conv", "Gemm")]
    assert set(means) == {node.input[0] for node in layers}


def test_rounded_weights_and_biases_shift_no_mean(bundle: Bundle, samples: ExportImages) -> None:
    """What the weights' rounding adds to a channel's mean, the bias takes off, to half a step."""
    original, quantised = (onnx.load(bundle.onnx_path(p)) for p in ("fp32", "int8"))
    means = measure_mean_inputs(original, samples.calibration.inputs)
    exact = {tensor.name: numpy_helper.to_array(tensor) for tensor in original.graph.initializer}
    shifts = 0
    for node, weight, bias, step in quantised_layers(quantised):
        source = next(n for n in original.graph.node if n.name == node.name)
        errors = (weight - exact[source.input[1]]).reshape(*weight.shape[:2], -1).sum(axis=2)
        shift = errors @ means[source.input[0]] + bias - exact[source.input[2]]
        assert (np.abs(shift) <= 1.01 * step).all()
        # Without the correction some channel would be several steps off.
        assert (np.abs(errors @ means[source.input[0]]) > 3 * step).any()
        shifts += 1
    assert shifts == 3


def test_layers_without_a_bias_stay_as_they_are(bundle: Bundle) -> None:
    original, quantised = (onnx.load(bundle.onnx_path(p)) for p in ("fp32", "int8"))
    for node in quantised.graph.node:
        if node.op_type in ("Conv", "Gemm"):
            del node.input[2:]
    before = quantised.SerializeToString()
    correct_biases(quantised, original, {})
    assert quantised.SerializeToString() == before


def quantised_layers(
    model: onnx.ModelProto,
) -> list[tuple[onnx.NodeProto, NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]]:
    """Return node, weights, bias and step of the bias of each quantised layer, as real numbers."""
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    makers = {name: node for node in model.graph.node for name in node.output}
    layers = []
    for node in model.graph.node:
        if node.op_type not in ("Conv", "Gemm"):
            continue
        values, scales = (constants[name] for name in makers[node.input[1]].input[:2])
        biases, steps = (constants[name] for name in makers[node.input[2]].input[:2])
        shape = (-1, *[1] * (values.ndim - 1))
        weight = values.astype(np.float64) * scales.reshape(shape)
        layers.append((node, weight, biases * steps.astype(np.float64), steps))
    return layers


BLACK = np.zeros((1, 224, 224, 3), np.uint8)


@pytest.fixture
def model(tmp_path: Path, student: SbtknetStudent) -> onnx.ModelProto:
    """The tiny student: two convolutions with ReLU and pooling in between, and then a mean."""
    write_onnx(student, tmp_path / "model.onnx")
    return onnx.load(tmp_path / "model.onnx")


def test_equalisation_does_not_change_the_models_results(
    model: onnx.ModelProto, samples: ExportImages
) -> None:
    pixels = samples.parity.pixels[:20]
    before, weights = embedded(model, pixels), weights_of(model)
    assert equalise_channels(model, samples.calibration.inputs.first(30)) == 1
    np.testing.assert_allclose(embedded(model, pixels), before, atol=2e-6)
    changed = [name for name, value in weights_of(model).items() if (value != weights[name]).any()]
    assert len(changed) == 3  # the first one's weights and bias, and the second one's weights
    onnx.checker.check_model(model, full_check=True)


def test_equalisation_makes_channel_ranges_more_even(
    model: onnx.ModelProto, samples: ExportImages
) -> None:
    """One channel is made a hundred times as large; evening out takes most of that back."""
    first, second = (node for node in model.graph.node if node.op_type == "Conv")
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    for name, factor, axis in ((first.input[1], 100, 0), (first.input[2], 100, 0)):
        scale_channel(constants[name], factor, axis)
    scale_channel(constants[second.input[1]], 1 / 100, axis=1)
    inputs = samples.calibration.inputs.first(30)
    pixels = inputs.pixels
    before = spread(model, second.input[0], pixels)
    rows = embedded(model, pixels)
    equalise_channels(model, inputs)
    assert spread(model, second.input[0], pixels) < before / 5
    np.testing.assert_allclose(embedded(model, pixels), rows, atol=1e-5)


@pytest.mark.parametrize("between", ["Sigmoid", "Add", "output", "group"])
def test_channels_with_other_consumers_are_not_equalised(between: str) -> None:
    model = pair_of_convolutions(between)
    before = model.SerializeToString()
    assert equalise_channels(model, ModelInputs.of_kind(BLACK, "photo")) == 0
    assert model.SerializeToString() == before


def test_unused_channels_are_not_equalised() -> None:
    model = pair_of_convolutions("Relu")
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    for name, axis in (("first", 0), ("bias", 0)):
        scale_channel(constants[name], 0, axis)
    pixels = np.random.default_rng(0).integers(0, 255, (2, 224, 224, 3)).astype(np.uint8)
    rows = embedded(model, pixels)
    assert equalise_channels(model, ModelInputs.of_kind(pixels, "photo")) == 1
    assert all(np.isfinite(value).all() for value in weights_of(model).values())
    np.testing.assert_allclose(embedded(model, pixels), rows, rtol=1e-4, atol=1e-2)


def pair_of_convolutions(between: str) -> onnx.ModelProto:
    """Return a model of two convolutions with something between them."""
    random = np.random.default_rng(0)
    groups = 2 if between == "group" else 1
    constants: dict[str, NDArray[np.float64]] = {
        "first": random.standard_normal((4, 3, 8, 8)),
        "bias": random.uniform(1, 2, 4),
        "second": random.standard_normal((2, 4 // groups, 1, 1)),
    }
    outputs = [helper.make_tensor_value_info("embeddings", TensorProto.FLOAT, None)]
    middle = helper.make_node("Relu", ["given"], ["handed"])
    if between == "Sigmoid":
        middle = helper.make_node("Sigmoid", ["given"], ["handed"])
    if between == "Add":
        middle = helper.make_node("Add", ["given", "given"], ["handed"])
    if between == "output":
        outputs.append(helper.make_tensor_value_info("handed", TensorProto.FLOAT, None))
    nodes = [
        helper.make_node("Cast", ["images"], ["cast"], to=TensorProto.FLOAT),
        helper.make_node("Transpose", ["cast"], ["planes"], perm=[0, 3, 1, 2]),
        helper.make_node("Conv", ["planes", "first", "bias"], ["given"], strides=[8, 8]),
        middle,
        helper.make_node("Conv", ["handed", "second"], ["embeddings"], group=groups),
    ]
    graph = helper.make_graph(
        nodes,
        "pair",
        [helper.make_tensor_value_info("images", TensorProto.UINT8, ["batch", 224, 224, 3])],
        outputs,
        [
            numpy_helper.from_array(value.astype(np.float32), name)
            for name, value in constants.items()
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)])
    model.ir_version = 9
    return model


def embedded(model: onnx.ModelProto, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
    session = onnxruntime.InferenceSession(model.SerializeToString())
    return np.asarray(session.run(["embeddings"], {"images": pixels})[0])


def spread(model: onnx.ModelProto, name: str, pixels: NDArray[np.uint8]) -> float:
    """Return how many times the largest channel's largest value is that of a middling one."""
    copied = onnx.ModelProto()
    copied.CopyFrom(model)
    copied.graph.output.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, None))
    session = onnxruntime.InferenceSession(copied.SerializeToString())
    values = session.run([name], {"images": pixels})[0].max(axis=(0, 2, 3))
    return float(values.max() / np.median(values))


def weights_of(model: onnx.ModelProto) -> dict[str, NDArray[np.float32]]:
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}


def scale_channel(tensor: onnx.TensorProto, factor: float, axis: int) -> None:
    """Scale the first channel along an axis."""
    values = np.moveaxis(numpy_helper.to_array(tensor).copy(), axis, 0)
    values[0] *= factor
    changed = np.ascontiguousarray(np.moveaxis(values, 0, axis))
    tensor.CopyFrom(numpy_helper.from_array(changed, tensor.name))


SHIPPED = sorted(pretrained_folder().glob("*/model.int8.onnx"))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.parent.name)
def test_no_layer_of_the_shipped_models_can_saturate(path: Path) -> None:
    model = onnx.load(path)
    layers = [node for node in model.graph.node if node.op_type in ("Conv", "Gemm")]
    sums = measure_pair_sums(model)
    assert set(sums) == {node.name for node in layers}
    assert len(sums) >= 54
    assert 0 < require_same_sums(model, str(path)) <= LARGEST_SUM


def test_an_export_is_checked_and_its_card_says_so(bundle: Bundle) -> None:
    model = onnx.load(bundle.folder / "model.int8.onnx")
    largest = require_same_sums(model, "model.int8.onnx")
    assert 0 < largest <= LARGEST_SUM
    assert bundle.manifest.parity["int8"]["largest_pair_sum"] == largest
    assert f"at most {largest:,}" in (bundle.folder / "MODEL_CARD.md").read_text()


def test_a_model_that_can_saturate_is_refused_with_its_layer(bundle: Bundle) -> None:
    model = onnx.load(bundle.folder / "model.int8.onnx")
    makers = {name: node for node in model.graph.node for name in node.output}
    layer = [node for node in model.graph.node if node.op_type == "Conv"][1]
    name = makers[layer.input[1]].input[0]
    tensor = next(t for t in model.graph.initializer if t.name == name)
    weights = numpy_helper.to_array(tensor).copy()
    weights.reshape(len(weights), -1)[3, [0, 7]] = (-65, 64)  # by a single step too large
    tensor.CopyFrom(numpy_helper.from_array(weights, name))
    with pytest.raises(BadModel) as caught:
        require_same_sums(model, "it")
    assert f"two products of {layer.name} can add up to 32,895 (1 of " in caught.value.found


@given(
    st.lists(st.integers(-128, 127), min_size=2, max_size=12),
    st.randoms(use_true_random=False),
)
def test_weights_that_pass_saturate_in_no_order(row: list[int], random: object) -> None:
    """16-bit sums of neighbours, in any order and for the worst activations, against 32 bits."""
    weights = np.array(row, dtype=np.int8)
    found = measure_pair_sums(of_gemm(weights[None]))["layer"]
    random.shuffle(row)  # type: ignore[attr-defined]
    row += [0] * (len(row) % 2)
    pairs = np.array(row, dtype=np.int64).reshape(-1, 2)
    for activations in ((255, 255), (255, 0), (0, 255)):
        exact = pairs @ np.array(activations)
        assert np.abs(exact).max() <= found
        if found <= LARGEST_SUM:
            np.testing.assert_array_equal(np.clip(exact, -32_768, 32_767), exact)
    ordered = sorted(map(abs, row), reverse=True)
    assert found == 255 * sum(ordered[:2])


@pytest.mark.parametrize("is_transposed", [False, True])
def test_weights_of_a_linear_are_paired_along_its_inputs(is_transposed: bool) -> None:
    weights = np.zeros((5, 3), dtype=np.int8)  # (outputs, inputs)
    weights[2] = (60, -50, 7)
    weights[4, 0] = 100
    given_weights = weights if is_transposed else weights.T.copy()
    model = of_gemm(given_weights, is_transposed=is_transposed)
    assert measure_pair_sums(model) == {"layer": 255 * 110}


def test_unsigned_weights_count_as_the_worst_case() -> None:
    assert measure_pair_sums(of_gemm(np.zeros((2, 2), np.uint8))) == {"layer": 255 * 256}


def test_int8_can_be_made_from_an_fp16_file(
    bundle: Bundle, samples: ExportImages, tmp_path: Path
) -> None:
    source = bundle.folder / "model.fp16.onnx"
    single = single_precision(onnx.load(source))
    kinds = {tensor.data_type for tensor in single.graph.initializer}
    assert TensorProto.FLOAT16 not in kinds
    onnx.checker.check_model(single, full_check=True)
    pixels = samples.parity.pixels[:20]
    wanted = rows_of(onnx.load(bundle.folder / "model.fp32.onnx"), pixels)
    np.testing.assert_allclose(rows_of(single, pixels), wanted, atol=2e-3)
    quantise(source, tmp_path / "model.int8.onnx", samples.calibration.inputs)
    again = onnx.load(tmp_path / "model.int8.onnx")
    require_same_sums(again, "it")
    cosines = (rows_of(again, pixels) * wanted).sum(axis=1)
    assert cosines.min() > 0.95


def of_gemm(weights: NDArray[np.generic], *, is_transposed: bool = True) -> onnx.ModelProto:
    nodes = [
        helper.make_node("DequantizeLinear", ["weights", "scale"], ["w"]),
        helper.make_node("Gemm", ["x", "w"], ["y"], name="layer", transB=int(is_transposed)),
    ]
    constants = {"weights": weights, "scale": np.float32(1)}
    graph = helper.make_graph(
        nodes,
        "linear",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, None)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    return helper.make_model(graph)


def rows_of(model: onnx.ModelProto, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    rows: NDArray[np.float32] = session.run(["embeddings"], {"images": pixels})[0]
    return rows
