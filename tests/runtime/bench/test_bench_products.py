"""Products are what NumPy says they are, in whatever library, and the quickest is found."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import numpy_helper

from sbtk_runtime.bench.floor import fastest_product, floor_of, times_floor
from sbtk_runtime.bench.products import Product, ProductKind, library_products, product_graph
from sbtk_runtime.onnx_file import check_onnx

KINDS: tuple[ProductKind, ...] = ("int8", "fp32")


@pytest.mark.parametrize("kind", KINDS)
def test_the_graph_is_valid_onnx(kind: ProductKind) -> None:
    content = product_graph(kind, 64)
    check_onnx(content, "product")
    onnx.checker.check_model(onnx.load_from_string(content), full_check=True)


@pytest.mark.parametrize("kind", KINDS)
def test_every_library_computes_what_numpy_computes(kind: ProductKind) -> None:
    products = list(library_products(kind, (32, 64), threads=1))
    assert [(p.library, p.size) for p in products] == [
        (library, size) for library in ("onnxruntime", "openvino") for size in (32, 64)
    ]
    for product in products:
        result = np.asarray(product.run())
        expected = by_numpy(kind, product.size)
        assert result.shape == (product.size, product.size)
        # OpenVINO and NumPy may round a half to different sides.
        assert np.abs(result.astype(np.float64) - expected).max() <= (1 if kind == "int8" else 1e-3)
        assert len(np.unique(result)) > 20
        assert product.macs == product.size**3


def test_a_library_that_is_not_there_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    found = list(library_products("fp32", (32, 64), threads=1))
    assert [product.library for product in found] == ["onnxruntime", "onnxruntime"]


def test_the_fastest_product_is_that_of_most_multiplications_a_second() -> None:
    alive: list[str] = []

    def candidates() -> Iterator[Product]:
        for name, size, seconds in (("slow", 100, 0.01), ("fast", 100, 0.001), ("tiny", 10, 0.001)):
            alive.append(name)
            yield Product(name, "int8", size, lambda seconds=seconds: time.sleep(seconds))  # type: ignore[misc]

    found = fastest_product(candidates(), seconds=0.0)
    assert found is not None
    assert found.library == "fast"
    assert alive == ["slow", "fast", "tiny"]
    assert fastest_product([], seconds=0.0) is None


def test_the_floor_follows_from_the_products_runs() -> None:
    product = Product("lib", "int8", 1000, lambda: None)
    blocks = [[2.0, 2.0], [2.0]]  # 1000 ** 3 in 2 ms are 500 GMAC/s
    floor = floor_of(product, blocks, model_macs=4_000_000_000)
    assert floor.gmac_per_s == pytest.approx(500)
    assert floor.ms == pytest.approx(8.0)
    # 24 ms for a batch of 2 are 12 ms a picture: 1.5 times 8 ms.
    assert times_floor([[24.0], [24.0]], 2, product, blocks, 4_000_000_000) == pytest.approx(1.5)


def by_numpy(kind: ProductKind, size: int) -> NDArray[np.float64]:
    """Returns the product as the graph's own constants and NumPy have it."""
    model = onnx.load_from_string(product_graph(kind, size))
    values = {value.name: numpy_helper.to_array(value) for value in model.graph.initializer}
    random = np.random.default_rng(size)
    weights = values["weights"].astype(np.float64)
    if kind == "fp32":
        return random.standard_normal((size, size), dtype=np.float32).astype(np.float64) @ weights
    left = random.integers(0, 255, (size, size), np.uint8, endpoint=True).astype(np.float64)
    scaled = left @ weights * float(values["scale"]) ** 2 / float(values["result_scale"])
    return np.clip(np.rint(scaled), 0, 255)
