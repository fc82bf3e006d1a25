"""Plans that embed regions: what is built, what they return, and that no other plan is taken.

The GPUs and TensorRT are those of `tests.fakes`, which compute through ONNX Runtime; TensorRT-RTX's
own parser and builder take the graph, too, where it is installed.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray

from sbtk_runtime.bundle import Bundle
from sbtk_runtime.embedding.embedder import Embedder
from sbtk_runtime.engines.base import EngineOptions, EngineRequest
from sbtk_runtime.engines.cuda import find_device
from sbtk_runtime.engines.registry import open_engine
from sbtk_runtime.engines.tensorrt.build import BuildSettings, build_plan
from sbtk_runtime.engines.tensorrt.cache import PlanCache, cache_folder
from sbtk_runtime.engines.tensorrt.check import require_sound
from sbtk_runtime.engines.tensorrt.engine import (
    ReadyPlan,
    TensorRtEngine,
    open_plan,
    open_tensorrt,
    ready_plan,
)
from sbtk_runtime.engines.tensorrt.library import find_tensorrt
from sbtk_runtime.errors import BadModel, EngineUnavailable, SbtkError
from sbtk_runtime.preprocess import KINDS, Kind
from sbtk_runtime.region_graph import region_graph
from sbtk_runtime.regions import GRIDS, RegionGrid, grid_of
from tests.fakes.machine import FakeMachine
from tests.fakes.tensorrt_world import PLAN_MAGIC
from tests.tiny import tiny_bundle, tiny_photo
from tests.tiny_regions import embed_photos, tiny_map_bundle, tiny_map_model

pytestmark = pytest.mark.usefixtures("cache")

#: A map of 3 x 3 cells with four windows and one: small, so that many images are quick.
SMALL = RegionGrid(96, ((2, 1), (3, 1)))
BATCHES = BuildSettings(1, 4, 8)

Rows = NDArray[np.float32]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return Bundle.open(tiny_map_bundle(tmp_path_factory.mktemp("map")))


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A bundle whose model takes the kind of image as well."""
    return Bundle.open(tiny_map_bundle(tmp_path_factory.mktemp("told"), has_domain=True))


def images(count: int, side: int, seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (count, side, side, 3), dtype=np.uint8)


def by_onnx_runtime(
    bundle: Bundle, pixels: NDArray[np.uint8], grid: RegionGrid, kind: Kind = "photo"
) -> Rows:
    """Return the rows `(N, R, D)` of the same model on ONNX Runtime."""
    options = EngineOptions(engine="onnxruntime", precision="fp32", threads=1)
    engine = open_engine(bundle, options, regions=grid)
    try:
        return engine.run(pixels, kind)
    finally:
        engine.close()


def ready(
    bundle: Bundle, grid: RegionGrid | None, machine: FakeMachine, notices: list[str] | None = None
) -> ReadyPlan:
    """Return a plan of the model from the cache, or a new one."""
    trt = find_tensorrt(machine.world.surface.module)
    notify = (notices if notices is not None else []).append
    return ready_plan(bundle, "fp32", trt, find_device(), BATCHES, notify=notify, regions=grid)


def request_of(bundle: Bundle, grid: RegionGrid | None) -> EngineRequest:
    options = EngineOptions(precision="fp32", threads=1, device="cuda", batch=8)
    return EngineRequest(bundle, options, form="tensorrt", regions=grid)


def opened(bundle: Bundle, grid: RegionGrid | None, machine: FakeMachine) -> TensorRtEngine:
    return open_tensorrt(request_of(bundle, grid), machine.world.surface.module)


def parts_of(plan: bytes) -> tuple[dict[str, list[list[int]]], bytes]:
    """Return the profile and the ONNX graph that a plan of the fake was built with."""
    head, _, graph = plan.removeprefix(PLAN_MAGIC).partition(b"\n")
    return json.loads(head)["profile"], graph


# --- what is built -----------------------------------------------------------------------------


@pytest.mark.parametrize("count", sorted(GRIDS))
def test_the_profile_and_the_graph_are_those_of_the_grid(
    machine: FakeMachine, bundle: Bundle, count: int
) -> None:
    grid, notices = grid_of(count), list[str]()
    built = ready(bundle, grid, machine, notices)
    profile, graph = parts_of(built.plan)
    assert profile == {"images": [[batch, 448, 448, 3] for batch in (1, 4, 8)]}
    name = str(bundle.onnx_path("fp32", "tensorrt"))
    assert graph == region_graph(bundle.read_onnx("fp32", "tensorrt"), grid, 16, name)
    (output,) = onnx.load_from_string(graph).graph.output
    sizes = output.type.tensor_type.shape.dim
    assert [size.dim_value for size in sizes[1:]] == [count, 16]
    assert sizes[0].dim_param
    assert any(f"building the fp32 plan for {count} regions of tinymap@" in s for s in notices)
    assert built.record.settings == BATCHES


def test_the_domain_input_is_in_the_profile(machine: FakeMachine, told: Bundle) -> None:
    profile, _ = parts_of(ready(told, SMALL, machine).plan)
    assert profile == {
        "images": [[batch, 96, 96, 3] for batch in (1, 4, 8)],
        "domain": [[1], [4], [8]],
    }


def test_each_grid_has_a_plan_of_its_own_that_is_built_once(
    machine: FakeMachine, bundle: Bundle
) -> None:
    grids = (None, grid_of(9), grid_of(16), RegionGrid(448, ((5, 3), (6, 4))))
    built = [ready(bundle, grid, machine) for grid in grids]
    assert all(each.is_new for each in built)
    assert len({each.record.onnx_sha256 for each in built}) == len(grids)
    assert len(PlanCache(cache_folder()).entries()) == len(grids)
    again = [ready(bundle, grid, machine) for grid in grids]
    assert not any(each.is_new for each in again)
    assert [each.plan for each in again] == [each.plan for each in built]


def test_a_plan_is_built_again_when_the_model_changes(
    ten: FakeMachine, bundle: Bundle, tmp_path: Path
) -> None:
    ready(bundle, SMALL, ten)
    folder = tiny_map_bundle(tmp_path / "other", dim=12)
    assert ready(Bundle.open(folder), SMALL, ten).is_new


@pytest.mark.parametrize("count", sorted(GRIDS))
def test_tensorrt_rtx_itself_builds_the_graph(bundle: Bundle, count: int) -> None:
    pytest.importorskip("tensorrt_rtx", reason="the extra 'tensorrt-rtx' is not installed")
    grid, rtx = grid_of(count), find_tensorrt("tensorrt_rtx")
    content = region_graph(bundle.read_onnx("fp32", "tensorrt"), grid, 16, "tiny")
    assert build_plan(rtx, content, BuildSettings(1, 2, 4), regions=grid).plan
    with pytest.raises(BadModel, match=rf"returns embeddings: FLOAT \(any, {count}, 16\)"):
        build_plan(rtx, content, BATCHES, regions=RegionGrid(448, ((7, 7),)))


# --- what it returns ---------------------------------------------------------------------------


@pytest.mark.parametrize("count", [0, 1, 3, 8, 9, 17])
def test_rows_are_those_of_onnx_runtime(machine: FakeMachine, bundle: Bundle, count: int) -> None:
    expected = by_onnx_runtime(bundle, images(17, 96), SMALL)[:count]
    engine = opened(bundle, SMALL, machine)
    assert engine.info.regions == SMALL
    # Thrice: plainly, while graphs are captured, and from graphs.
    for _ in range(3):
        rows = engine.run(images(17, 96)[:count], "photo")
        assert rows.shape == (count, 5, 16)
        assert rows.dtype == np.float32
        np.testing.assert_allclose(rows, expected, atol=1e-6)
    engine.close()


def test_the_default_grid_returns_a_row_for_each_region(ten: FakeMachine, bundle: Bundle) -> None:
    grid, pixels = grid_of(16), images(3, 448)
    engine = opened(bundle, grid, ten)
    before = len(ten.gpus.history)
    rows = engine.run(pixels, "photo")
    assert rows.shape == (3, 16, 16)
    np.testing.assert_allclose(np.linalg.norm(rows, axis=2), 1, atol=1e-5)
    np.testing.assert_allclose(rows, by_onnx_runtime(bundle, pixels, grid), atol=1e-6)
    to_device, _, to_host = ten.gpus.history[before:]
    assert (to_device.size, to_host.size) == (3 * 448 * 448 * 3, 3 * 16 * 16 * 4)
    with pytest.raises(EngineUnavailable, match="failed on 1 images"):
        engine.run(images(1, 224), "photo")
    engine.close()


@pytest.mark.parametrize("kind", KINDS)
def test_the_kind_of_image_reaches_every_region(
    machine: FakeMachine, told: Bundle, kind: Kind
) -> None:
    pixels = images(5, 96)
    engine = opened(told, SMALL, machine)
    rows = engine.run(pixels, kind)
    engine.close()
    np.testing.assert_allclose(rows, by_onnx_runtime(told, pixels, SMALL, kind), atol=1e-6)
    other = by_onnx_runtime(told, pixels, SMALL, "photo" if kind == "sketch" else "sketch")
    assert np.abs(rows - other).max() > 1e-3


def test_photos_are_embedded_with_their_regions(
    ten: FakeMachine, bundle: Bundle, tmp_path: Path
) -> None:
    """Both plans are on the GPU at once; boxes and rows are those of the CPU."""
    photos = [tmp_path / f"{number}.png" for number in range(5)]
    for number, photo in enumerate(photos):
        # Smaller ones have no regions.
        tiny_photo(number).resize((480, 360)).save(photo)
    found = []
    for engine in ("tensorrt", "onnxruntime"):
        with Embedder(bundle, engine=engine, precision="fp32", threads=1, batch=4) as embedder:
            found.append(embed_photos(embedder, photos, grid_of(9)))
    for by_gpu, by_cpu in zip(*found, strict=True):
        assert by_gpu.regions.shape == (9, 16)
        np.testing.assert_allclose(by_gpu.regions, by_cpu.regions, atol=1e-5)
        np.testing.assert_array_equal(by_gpu.boxes, by_cpu.boxes)
        np.testing.assert_allclose(by_gpu.row, by_cpu.row, atol=1e-5)


# --- what is refused ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("built_for", "wanted", "found", "expected"),
    [
        (9, 16, "embeddings: FLOAT (-1, 9, 16)", "embeddings: FLOAT (-1, 16, 16)"),
        (None, 16, "images: UINT8 (-1, 224, 224, 3)", "images: UINT8 (-1, 448, 448, 3)"),
        (16, None, "embeddings: FLOAT (-1, 16, 16)", "embeddings: FLOAT (-1, 16)"),
    ],
)
def test_a_plan_of_other_regions_is_refused(
    machine: FakeMachine,
    bundle: Bundle,
    built_for: int | None,
    wanted: int | None,
    found: str,
    expected: str,
) -> None:
    grids = [None if count is None else grid_of(count) for count in (built_for, wanted)]
    plan = ready(bundle, grids[0], machine).plan
    trt = find_tensorrt(machine.world.surface.module)
    problem = refusal(lambda: open_plan(plan, trt, find_device(), request_of(bundle, grids[1])))
    assert isinstance(problem, BadModel)
    assert problem.found.startswith("the plan has ")
    assert found in problem.found
    assert expected in problem.expected


def test_a_graph_of_other_regions_is_not_built(machine: FakeMachine, bundle: Bundle) -> None:
    trt, plain = find_tensorrt(machine.world.surface.module), bundle.read_onnx("fp32", "tensorrt")
    problem = refusal(lambda: build_plan(trt, plain, BATCHES, name="m", regions=grid_of(16)))
    assert isinstance(problem, BadModel)
    assert problem.found == "m takes images: UINT8 (any, 224, 224, 3)"
    assert problem.expected.startswith("images: UINT8 (any batch, 448, 448, 3), and nothing else")
    nine = region_graph(plain, grid_of(9), 16, "m")
    problem = refusal(lambda: build_plan(trt, nine, BATCHES, name="m", regions=grid_of(16)))
    assert isinstance(problem, BadModel)
    assert problem.found == "m returns embeddings: FLOAT (any, 9, 16)"
    assert problem.expected.startswith("embeddings: FLOAT (any batch, 16, D), and nothing else")
    problem = refusal(lambda: build_plan(trt, nine, BATCHES, name="m"))
    assert isinstance(problem, BadModel)
    assert problem.found == "m takes images: UINT8 (any, 448, 448, 3)"


def test_a_model_without_a_map_has_no_plan_of_regions(machine: FakeMachine, tmp_path: Path) -> None:
    plain = Bundle.open(tiny_bundle(tmp_path / "plain"))
    problem = refusal(lambda: opened(plain, grid_of(16), machine))
    assert isinstance(problem, BadModel)
    assert PlanCache(cache_folder()).entries() == []


def test_a_correct_plan_is_measured_and_kept(machine: FakeMachine, bundle: Bundle) -> None:
    trt, built = find_tensorrt(machine.world.surface.module), ready(bundle, SMALL, machine)
    check = require_sound(built, bundle, trt, find_device(), regions=SMALL)
    assert check.cosine_min is not None
    assert 0.9999 <= check.cosine_min <= 1.0001
    assert len(PlanCache(cache_folder()).entries()) == 1


def test_a_plan_that_computes_other_rows_is_removed(ten: FakeMachine, bundle: Bundle) -> None:
    """What a kernel that pools the wrong windows would look like: the same shapes, other rows."""
    built = ready(bundle, SMALL, ten)
    turned = RegionGrid(96, ((3, 1), (2, 1)))
    assert len(turned) == len(SMALL)
    graph = region_graph(tiny_map_model().SerializeToString(), turned, 16, "turned")
    profile = {"images": [(batch, 96, 96, 3) for batch in (1, 4, 8)]}
    wrong = ReadyPlan(
        ten.world.plan(graph, profile), built.record, is_new=True, kept_in=built.kept_in
    )
    trt = find_tensorrt("tensorrt")
    problem = refusal(lambda: require_sound(wrong, bundle, trt, find_device(), regions=SMALL))
    assert isinstance(problem, EngineUnavailable)
    assert "disagree: their embeddings of an image have a cosine of" in problem.found
    assert PlanCache(cache_folder()).entries() == []


def refusal(use: Callable[[], object]) -> SbtkError:
    """Return the error of a call, without the frames that could keep things alive."""
    with pytest.raises(SbtkError) as caught:
        use()
    return caught.value.with_traceback(None)
