"""Quantised layers keep their mean outputs."""

from __future__ import annotations

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

from sbtk_export.bias_correction import correct_biases, mean_inputs
from sbtk_export.pictures import ExportPictures
from sbtk_runtime.bundle import Bundle


def test_mean_inputs_are_means_over_pictures_and_positions(
    bundle: Bundle, pictures: ExportPictures
) -> None:
    """The first convolution reads the normalised picture, whose mean is computed by hand."""
    inputs = pictures.calibration.inputs.first(13)
    model = onnx.load(bundle.onnx_path("fp32"))
    means = mean_inputs(model, inputs)
    first = next(node for node in model.graph.node if node.op_type == "Conv")
    channels = inputs.pixels.reshape(-1, 3).mean(axis=0) / 255
    wanted = (channels - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    np.testing.assert_allclose(means[first.input[0]], wanted, atol=1e-4)
    layers = [node for node in model.graph.node if node.op_type in ("Conv", "Gemm")]
    assert set(means) == {node.input[0] for node in layers}


def test_rounded_weights_and_biases_shift_no_mean(bundle: Bundle, pictures: ExportPictures) -> None:
    """What the weights' rounding adds to a channel's mean, the bias takes off, to half a step."""
    original, quantised = (onnx.load(bundle.onnx_path(p)) for p in ("fp32", "int8"))
    means = mean_inputs(original, pictures.calibration.inputs)
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
    """Returns node, weights, bias and step of the bias of each quantised layer, as real numbers."""
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
