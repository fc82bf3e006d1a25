"""The graph of regions: windows of the map by a plain loop, one window is the plain model."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray

from sbtk_runtime.bundle import Bundle, pretrained_folder
from sbtk_runtime.engines.base import EngineOptions
from sbtk_runtime.engines.registry import open_engine
from sbtk_runtime.engines.session import validate_embeddings
from sbtk_runtime.errors import BadConfig, BadModel
from sbtk_runtime.manifest import Precision
from sbtk_runtime.preprocess import KINDS, SIZE_PX, Kind
from sbtk_runtime.region_graph import region_graph
from sbtk_runtime.regions import RegionGrid
from tests.tiny import tiny_model
from tests.tiny_regions import head_by_numpy, map_by_numpy, tiny_map_bundle, tiny_map_model

ENGINES = ("onnxruntime", "openvino")
GRIDS = (
    RegionGrid(224, ((7, 1),)),
    RegionGrid(224, ((3, 2), (7, 7))),
    RegionGrid(448, ((8, 3), (5, 3))),
    RegionGrid(320, ((10, 1), (1, 9))),
    RegionGrid(64, ((1, 1),)),
)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return Bundle.open(tiny_map_bundle(tmp_path_factory.mktemp("map")))


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return Bundle.open(tiny_map_bundle(tmp_path_factory.mktemp("told"), has_domain=True))


def images(count: int, side: int, seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (count, side, side, 3), dtype=np.uint8)


def embedded(
    bundle: Bundle,
    engine: str,
    pixels: NDArray[np.uint8],
    kind: Kind = "photo",
    grid: RegionGrid | None = None,
    precision: Precision | None = None,
) -> NDArray[np.float32]:
    options = EngineOptions(engine=engine, precision=precision, threads=1)
    opened = open_engine(bundle, options, regions=grid)
    try:
        assert opened.info.regions == grid
        return opened.run(pixels, kind)
    finally:
        opened.close()


def windows_by_loop(maps: NDArray[np.float64], grid: RegionGrid) -> Iterator[NDArray[np.float64]]:
    """Yield the mean `(N, C)` of each window that a box of the grid covers."""
    for x, y, width, height in (grid.boxes() * grid.cells).round().astype(int).tolist():
        yield maps[:, :, y : y + height, x : x + width].mean(axis=(2, 3))


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("engine", ENGINES)
def test_rows_belong_to_the_windows_of_their_boxes(
    bundle: Bundle, engine: str, grid: RegionGrid
) -> None:
    pixels = images(3, grid.size_px)
    rows = embedded(bundle, engine, pixels, grid=grid)
    assert rows.shape == (3, len(grid), 16)
    expected = [head_by_numpy(pooled) for pooled in windows_by_loop(map_by_numpy(pixels), grid)]
    np.testing.assert_allclose(rows, np.stack(expected, axis=1), atol=1e-4)


@pytest.mark.parametrize("engine", ENGINES)
def test_one_window_is_the_plain_model(bundle: Bundle, engine: str) -> None:
    pixels = images(5, SIZE_PX)
    plain = embedded(bundle, engine, pixels)
    one = embedded(bundle, engine, pixels, grid=RegionGrid(SIZE_PX, ((7, 1),)))
    np.testing.assert_allclose(one[:, 0], plain, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("engine", ENGINES)
def test_the_domain_reaches_every_window(told: Bundle, engine: str, kind: Kind) -> None:
    grid = RegionGrid(96, ((2, 1),))
    pixels = images(2, 96)
    rows = embedded(told, engine, pixels, kind, grid)
    maps = map_by_numpy(pixels, kind)
    expected = [head_by_numpy(pooled) for pooled in windows_by_loop(maps, grid)]
    np.testing.assert_allclose(rows, np.stack(expected, axis=1), atol=1e-4)


@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_the_included_model_pools_its_windows_in_every_precision(precision: Precision) -> None:
    bundle = Bundle.open()
    pixels = images(1, SIZE_PX)
    plain = embedded(bundle, "onnxruntime", pixels, precision=precision)
    grid = RegionGrid(SIZE_PX, ((7, 1), (4, 3)))
    rows = embedded(bundle, "onnxruntime", pixels, grid=grid, precision=precision)
    assert rows.shape == (1, 5, 512)
    assert not validate_embeddings(rows)[1].any()
    assert float((rows[:, 0] * plain).sum()) > 0.99999


def test_the_graph_is_valid_and_holds_the_same_weights() -> None:
    path = next(pretrained_folder().glob("*/model.int8.onnx"))
    content, grid = path.read_bytes(), RegionGrid(448, ((8, 3),))
    made = onnx.load_from_string(region_graph(content, grid, 512, str(path)))
    onnx.checker.check_model(made, full_check=True)
    plain = onnx.load_from_string(content)
    weights = {tensor.name: tensor.raw_data for tensor in plain.graph.initializer}
    added = [each for each in made.graph.initializer if weights.get(each.name) != each.raw_data]
    assert len(made.graph.initializer) - len(weights) == len(added) == 2
    sizes = [value.dim_value for value in made.graph.output[0].type.tensor_type.shape.dim]
    assert sizes == [0, 9, 512]
    # What TensorRT requires of a uint8 input still holds.
    assert [node.op_type for node in made.graph.node if "images" in node.input] == ["Cast"]


def _flat(model: onnx.ModelProto) -> None:
    model.CopyFrom(tiny_model())


def _kept_dimensions(model: onnx.ModelProto) -> None:
    mean = next(node for node in model.graph.node if node.op_type == "ReduceMean")
    del mean.attribute[:]


def _other_input(model: onnx.ModelProto) -> None:
    model.graph.input[0].type.tensor_type.shape.dim[1].dim_value = 192


def _no_output(model: onnx.ModelProto) -> None:
    model.graph.node[-1].output[0] = "something"


def _attention(model: onnx.ModelProto) -> None:
    model.graph.node[4].op_type = "Softmax"


@pytest.mark.parametrize("change", [_flat, _kept_dimensions, _other_input, _no_output, _attention])
def test_models_without_a_map_are_refused(change: Callable[[onnx.ModelProto], None]) -> None:
    model = tiny_map_model()
    change(model)
    with pytest.raises(BadModel, match=r"here\.onnx cannot embed regions") as refusal:
        region_graph(model.SerializeToString(), RegionGrid(64, ((1, 1),)), 16, "here.onnx")
    assert "without --regions" in refusal.value.next_step


def test_a_truncated_file_is_refused() -> None:
    content = tiny_map_model().SerializeToString()
    for end in (1, 50, len(content) // 2, len(content) - 1):
        with pytest.raises(BadModel):
            region_graph(content[:end], GRIDS[0], 16, "cut.onnx")


@pytest.mark.parametrize(
    ("size_px", "windows"),
    [(224, ()), (225, ((7, 1),)), (224, ((8, 1),)), (224, ((0, 1),)), (224, ((3, 0),))],
)
def test_windows_outside_the_map_are_refused(
    size_px: int, windows: tuple[tuple[int, int], ...]
) -> None:
    with pytest.raises(BadConfig, match="windows"):
        RegionGrid(size_px, windows)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_boxes_lie_within_the_photo(grid: RegionGrid) -> None:
    boxes = grid.boxes()
    assert boxes.shape == (len(grid), 4)
    assert (boxes[:, :2] >= 0).all()
    assert (boxes[:, :2] + boxes[:, 2:] <= 1 + 1e-6).all()
    assert len(np.unique(boxes, axis=0)) == len(grid)
