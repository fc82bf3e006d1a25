"""Strides move up the graph only where nobody misses what is no longer computed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto, helper, numpy_helper

from sbtk_export.onnx_from_student import Deployed, write_onnx
from sbtk_export.strides import move_strides_up
from sbtk_train.students.sbtknet import SbtknetStudent

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
def test_what_somebody_reads_in_full_stays_whole(
    nodes: list[NodeProto], outputs: list[str]
) -> None:
    model = _model(nodes, outputs)
    moved = _check_moved(model, 0)
    assert moved == model


def test_a_shortcut_that_is_an_output_too_is_kept() -> None:
    model = _model(LAST_BLOCK + NEXT_STAGE, ["left", "right", "conv3"])
    moved = _check_moved(model, 1)
    assert _strides(moved)["conv3"] == 1


def test_resnet50_v1_computes_a_tenth_less_and_v15_what_it_did(tmp_path: Path) -> None:
    images = np.random.default_rng(2).integers(0, 256, (2, 224, 224, 3), dtype=np.uint8)
    work = {}
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
        work[backbone] = _multiplications(onnx.load(path))
    assert work["resnet50-v1"] / 1e9 == pytest.approx(3.48, abs=0.02)
    assert work["resnet50-v1.5"] / 1e9 == pytest.approx(4.09, abs=0.02)


def _multiplications(model: onnx.ModelProto) -> int:
    """Returns the multiply-adds of the convolutions for one picture."""
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
