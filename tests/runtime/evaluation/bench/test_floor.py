"""Products equal NumPy's in every library, and the fastest is found."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from sbtk_export.fp16 import make_half_trunk_student
from sbtk_export.onnx_graph import write_onnx
from sbtk_runtime.bundle import Bundle
from sbtk_runtime.errors import BadModel
from sbtk_runtime.evaluation.bench.floor import (
    Product,
    ProductKind,
    compute_floor,
    count_macs,
    find_fastest_product,
    iterate_products,
    product_graph,
    times_floor,
)
from sbtk_runtime.onnx_file import check_onnx
from sbtk_train.models.student import SbtknetStudent, Student
from tests.saturation import can_saturate, saturating_product
from tests.tiny import tiny_model
from tests.tiny_student import tiny_dsn_student, tiny_student

KINDS: tuple[ProductKind, ...] = ("int8", "fp32")
SIZES = (32, 64)
_ROOT = Path(__file__).parents[4]

# Runs in a separate process, since the instruction set is chosen at its start.
_COMPARE = """
from tests.runtime.evaluation.bench.test_floor import SIZES, furthest_from_numpy
print(furthest_from_numpy("int8", SIZES))
"""


@pytest.mark.parametrize("kind", KINDS)
def test_the_graph_is_valid_onnx(kind: ProductKind) -> None:
    content = product_graph(kind, 64)
    check_onnx(content, "product")
    onnx.checker.check_model(onnx.load_from_string(content), full_check=True)


@pytest.mark.parametrize("kind", KINDS)
def test_every_library_agrees_with_numpy(kind: ProductKind) -> None:
    products = list(iterate_products(kind, SIZES, threads=1))
    assert [(p.library, p.size) for p in products] == [
        (library, size) for library in ("onnxruntime", "openvino") for size in SIZES
    ]
    for product in products:
        result = np.asarray(product.run())
        assert result.shape == (product.size, product.size)
        assert len(np.unique(result)) > 20
        assert product.macs == product.size**3
    # OpenVINO and NumPy may round halves differently.
    assert furthest_from_numpy(kind, SIZES) <= (1 if kind == "int8" else 1e-3)


@pytest.mark.parametrize("size", [2, 33, *SIZES])
def test_no_processor_saturates_the_int8_product(size: int) -> None:
    weights = weights_of(size)
    assert not can_saturate(weights)
    assert weights.min() >= -64 and weights.max() <= 64
    brightest = np.full((1, size), 255, dtype=np.uint8)
    for left in (left_of(size), brightest):
        exact = left.astype(np.int64) @ weights.astype(np.int64)
        assert np.array_equal(saturating_product(left, weights), exact)
    # With one more bit, the product depends on the processor.
    wide = np.where(weights < 0, np.int8(-128), np.int8(127))
    assert can_saturate(wide)
    exact = brightest.astype(np.int64) @ wide.astype(np.int64)
    assert not np.array_equal(saturating_product(brightest, wide), exact)


@pytest.mark.slow
def test_openvino_gives_the_same_without_vnni() -> None:
    """Use its kernels for AVX2; the variable has an effect only on x86-64."""
    environment = {**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2"}
    assert compared_by([sys.executable], environment) <= 1


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("qemu-x86_64") is None, reason="needs qemu-x86_64 (qemu-user)")
def test_every_library_gives_the_same_on_a_haswell() -> None:
    assert compared_by(["qemu-x86_64", "-cpu", "Haswell", sys.executable], os.environ) <= 1


def test_a_missing_library_is_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    found = list(iterate_products("fp32", (32, 64), threads=1))
    assert [product.library for product in found] == ["onnxruntime", "onnxruntime"]


def test_the_fastest_product_has_the_most_multiplications_per_second() -> None:
    alive: list[str] = []

    def candidates() -> Iterator[Product]:
        for name, size, seconds in (("slow", 100, 0.01), ("fast", 100, 0.001), ("tiny", 10, 0.001)):
            alive.append(name)
            yield Product(name, "int8", size, lambda seconds=seconds: time.sleep(seconds))  # type: ignore[misc]

    found = find_fastest_product(candidates(), seconds=0.0)
    assert found is not None
    assert found.library == "fast"
    assert alive == ["slow", "fast", "tiny"]
    assert find_fastest_product([], seconds=0.0) is None


def test_the_floor_follows_from_the_products_runs() -> None:
    product = Product("lib", "int8", 1000, lambda: None)
    blocks = [[2.0, 2.0], [2.0]]  # 1000 ** 3 in 2 ms are 500 GMAC/s
    floor = compute_floor(product, blocks, model_macs=4_000_000_000)
    assert floor.gmac_per_s == pytest.approx(500)
    assert floor.ms == pytest.approx(8.0)
    # 24 ms for a batch of 2 are 12 ms per image: 1.5 times 8 ms.
    assert times_floor([[24.0], [24.0]], 2, product, blocks, 4_000_000_000) == pytest.approx(1.5)


def compared_by(command: Sequence[str], environment: Mapping[str, str]) -> float:
    """Run `furthest_from_numpy` in a process started by `command`."""
    done = subprocess.run(
        [*command, "-c", _COMPARE],
        env=environment,
        cwd=_ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return float(done.stdout)


def furthest_from_numpy(kind: ProductKind, sizes: Sequence[int]) -> float:
    """Return the largest difference of any library's products from NumPy's."""
    return max(
        float(
            np.abs(
                np.asarray(product.run()).astype(np.float64) - by_numpy(kind, product.size)
            ).max()
        )
        for product in iterate_products(kind, sizes, threads=1)
    )


def weights_of(size: int) -> NDArray[np.int8]:
    model = onnx.load_from_string(product_graph("int8", size))
    values = {value.name: numpy_helper.to_array(value) for value in model.graph.initializer}
    return values["weights"]


def left_of(size: int) -> NDArray[np.uint8]:
    return np.random.default_rng(size).integers(0, 255, (size, size), np.uint8, endpoint=True)


def by_numpy(kind: ProductKind, size: int) -> NDArray[np.float64]:
    """Return the product computed by NumPy from the graph's constants."""
    model = onnx.load_from_string(product_graph(kind, size))
    values = {value.name: numpy_helper.to_array(value) for value in model.graph.initializer}
    weights = values["weights"].astype(np.float64)
    if kind == "fp32":
        random = np.random.default_rng(size)
        return random.standard_normal((size, size), dtype=np.float32).astype(np.float64) @ weights
    left = left_of(size).astype(np.float64)
    scaled = left @ weights * float(values["scale"]) ** 2 / float(values["result_scale"])
    return np.clip(np.rint(scaled), 0, 255)


def test_the_tiny_model_multiplies_once_in_its_gemm() -> None:
    assert count_macs(tiny_model(dim=16).SerializeToString()) == 16 * 8 * 8 * 3


def test_macs_of_an_exported_student_equal_those_of_torch(tmp_path: Path) -> None:
    student = tiny_student()
    write_onnx(student, tmp_path / "model.onnx")
    counted = count_macs((tmp_path / "model.onnx").read_bytes())
    assert counted == macs_by_torch(student)


@pytest.mark.parametrize("half", [False, True])
def test_channel_weights_and_a_domain_input_are_counted_too(tmp_path: Path, half: bool) -> None:
    student = tiny_dsn_student()
    write_onnx(make_half_trunk_student(student) if half else student, tmp_path / "model.onnx")
    content = (tmp_path / "model.onnx").read_bytes()
    assert count_macs(content) == macs_by_torch(student)


@pytest.mark.parametrize("precision", ["int8", "fp16"])
def test_the_shipped_model_is_a_resnet50(precision: str) -> None:
    bundle = Bundle.open()
    content = bundle.read_onnx("int8" if precision == "int8" else "fp16")
    dim = bundle.manifest.dim
    whole = macs_by_torch(SbtknetStudent(bundle.manifest.backbone, dim, classes=2))
    counted = count_macs(content)
    assert counted == macs_by_onnx(onnx.load_from_string(content))
    # Export may have moved strides to earlier layers, which saves up to a tenth.
    assert 0.85 * whole < counted <= whole


def test_macs_depend_on_the_size_of_the_image() -> None:
    weights = helper.make_tensor("w", TensorProto.FLOAT, [4, 3, 3, 3], [0.0] * 108)
    node = helper.make_node("Conv", ["x", "w"], ["y"], strides=[2, 2], pads=[1, 1, 1, 1])
    content = _model([node], [weights]).SerializeToString()
    assert count_macs(content, size_px=9) == 4 * 3 * 9 * 5 * 5


@pytest.mark.parametrize(
    ("node", "complaint"),
    [
        (helper.make_node("Resize", ["x"], ["y"]), "Resize"),
        (helper.make_node("MatMul", ["x", "x"], ["y"]), "MatMul"),
        (helper.make_node("Conv", ["x", "w"], ["y"], auto_pad="SAME_UPPER"), "with auto_pad"),
    ],
)
def test_a_layer_of_unknown_size_is_an_error(node: onnx.NodeProto, complaint: str) -> None:
    weights = helper.make_tensor("w", TensorProto.FLOAT, [4, 3, 3, 3], [0.0] * 108)
    with pytest.raises(BadModel, match=complaint):
        count_macs(_model([node], [weights]).SerializeToString())


def test_files_that_are_not_onnx_are_refused() -> None:
    whole = tiny_model().SerializeToString()
    with pytest.raises(BadModel, match="not an ONNX model"):
        count_macs(whole[: len(whole) // 2])


def macs_by_torch(student: Student) -> int:
    """Count the multiplications of the layers that torch calls, by their outputs."""
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
    """Count multiplications by the shapes that the onnx package infers."""
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
