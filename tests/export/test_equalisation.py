"""Channels become even, and the model computes what it did."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from sbtk_export.equalisation import equalise_channels
from sbtk_export.model_inputs import ModelInputs
from sbtk_export.onnx_from_student import write_onnx
from sbtk_export.pictures import ExportPictures
from sbtk_train.students.sbtknet import SbtknetStudent

BLACK = np.zeros((1, 224, 224, 3), np.uint8)


@pytest.fixture
def model(tmp_path: Path, student: SbtknetStudent) -> onnx.ModelProto:
    """The tiny student: two convolutions with ReLU and pooling in between, and then a mean."""
    write_onnx(student, tmp_path / "model.onnx")
    return onnx.load(tmp_path / "model.onnx")


def test_the_model_computes_what_it_did(model: onnx.ModelProto, pictures: ExportPictures) -> None:
    pixels = pictures.parity.pixels[:20]
    before, weights = embedded(model, pixels), weights_of(model)
    assert equalise_channels(model, pictures.calibration.inputs.first(30)) == 1
    np.testing.assert_allclose(embedded(model, pixels), before, atol=2e-6)
    changed = [name for name, value in weights_of(model).items() if (value != weights[name]).any()]
    assert len(changed) == 3  # the first one's weights and bias, and the second one's weights
    onnx.checker.check_model(model, full_check=True)


def test_channels_are_more_even_than_before(
    model: onnx.ModelProto, pictures: ExportPictures
) -> None:
    """One channel is made a hundred times as large; evening out takes most of that back."""
    first, second = (node for node in model.graph.node if node.op_type == "Conv")
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    for name, factor, axis in ((first.input[1], 100, 0), (first.input[2], 100, 0)):
        scale_channel(constants[name], factor, axis)
    scale_channel(constants[second.input[1]], 1 / 100, axis=1)
    inputs = pictures.calibration.inputs.first(30)
    pixels = inputs.pixels
    before = spread(model, second.input[0], pixels)
    rows = embedded(model, pixels)
    equalise_channels(model, inputs)
    assert spread(model, second.input[0], pixels) < before / 5
    np.testing.assert_allclose(embedded(model, pixels), rows, atol=1e-5)


@pytest.mark.parametrize("between", ["Sigmoid", "Add", "output", "group"])
def test_channels_that_others_read_stay_as_they_are(between: str) -> None:
    model = pair_of_convolutions(between)
    before = model.SerializeToString()
    assert equalise_channels(model, ModelInputs.of_kind(BLACK, "photo")) == 0
    assert model.SerializeToString() == before


def test_channels_that_are_never_used_stay_as_they_are() -> None:
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
    """Returns a model of two convolutions with something between them."""
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
    """Returns how many times the largest channel's largest value is that of a middling one."""
    copied = onnx.ModelProto()
    copied.CopyFrom(model)
    copied.graph.output.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, None))
    session = onnxruntime.InferenceSession(copied.SerializeToString())
    values = session.run([name], {"images": pixels})[0].max(axis=(0, 2, 3))
    return float(values.max() / np.median(values))


def weights_of(model: onnx.ModelProto) -> dict[str, NDArray[np.float32]]:
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}


def scale_channel(tensor: onnx.TensorProto, factor: float, axis: int) -> None:
    """Scales the first channel along an axis."""
    values = np.moveaxis(numpy_helper.to_array(tensor).copy(), axis, 0)
    values[0] *= factor
    changed = np.ascontiguousarray(np.moveaxis(values, 0, axis))
    tensor.CopyFrom(numpy_helper.from_array(changed, tensor.name))
