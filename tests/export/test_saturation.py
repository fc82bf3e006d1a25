"""INT8 models give the same sums on every kind of processor."""

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
from sbtk_export.int8 import quantise
from sbtk_export.pictures import ExportPictures
from sbtk_export.saturation import LARGEST_SUM, largest_pair_sums, require_same_sums
from sbtk_runtime.bundle import Bundle, pretrained_folder
from sbtk_runtime.errors import BadModel

SHIPPED = sorted(pretrained_folder().glob("*/model.int8.onnx"))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.parent.name)
def test_no_layer_of_the_shipped_models_can_saturate(path: Path) -> None:
    model = onnx.load(path)
    layers = [node for node in model.graph.node if node.op_type in ("Conv", "Gemm")]
    sums = largest_pair_sums(model)
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
def test_what_passes_saturates_in_no_order(row: list[int], random: object) -> None:
    """16-bit sums of neighbours, in any order and for the worst activations, against 32 bits."""
    weights = np.array(row, dtype=np.int8)
    found = largest_pair_sums(of_gemm(weights[None]))["layer"]
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
    assert largest_pair_sums(model) == {"layer": 255 * 110}


def test_weights_that_are_not_signed_count_as_the_worst() -> None:
    assert largest_pair_sums(of_gemm(np.zeros((2, 2), np.uint8))) == {"layer": 255 * 256}


def test_int8_is_made_of_an_fp16_file_too(
    bundle: Bundle, pictures: ExportPictures, tmp_path: Path
) -> None:
    source = bundle.folder / "model.fp16.onnx"
    single = single_precision(onnx.load(source))
    kinds = {tensor.data_type for tensor in single.graph.initializer}
    assert TensorProto.FLOAT16 not in kinds
    onnx.checker.check_model(single, full_check=True)
    pixels = pictures.parity.pixels[:20]
    wanted = rows_of(onnx.load(bundle.folder / "model.fp32.onnx"), pixels)
    np.testing.assert_allclose(rows_of(single, pixels), wanted, atol=2e-3)
    quantise(source, tmp_path / "model.int8.onnx", pictures.calibration.inputs)
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
