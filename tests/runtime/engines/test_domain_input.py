"""Models with an input for the kind of image: every engine feeds it, and refuses others."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import numpy_helper

from sbtk_runtime.bundle import Bundle
from sbtk_runtime.embedding.embedder import Embedder
from sbtk_runtime.embedding.stream import Embedded
from sbtk_runtime.engines.base import Engine, EngineOptions, EngineRequest
from sbtk_runtime.engines.cuda import find_device
from sbtk_runtime.engines.registry import open_engine
from sbtk_runtime.engines.tensorrt.build import BuildSettings
from sbtk_runtime.engines.tensorrt.check import LEAST_COSINE, require_sound
from sbtk_runtime.engines.tensorrt.engine import TensorRtEngine, open_tensorrt, ready_plan
from sbtk_runtime.engines.tensorrt.library import find_tensorrt
from sbtk_runtime.errors import BadModel
from sbtk_runtime.gallery.gallery import Gallery
from sbtk_runtime.gallery.update import update_gallery
from sbtk_runtime.preprocess import KINDS, Kind, domains_of, prepare
from tests.fakes.machine import SURFACES, FakeMachine, fake_machine
from tests.fakes.tensorrt_world import Surface
from tests.tiny import tiny_bundle, tiny_model, write_photos, write_sketch, write_tiny_manifest

pytestmark = pytest.mark.usefixtures("cache")

ON_A_CPU = ("onnxruntime", "openvino")
BATCH = 8


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return Bundle.open(tiny_bundle(tmp_path_factory.mktemp("told"), has_domain=True))


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return Bundle.open(tiny_bundle(tmp_path_factory.mktemp("plain")))


def images(count: int, seed: int = 0) -> NDArray[np.uint8]:
    coarse = np.random.default_rng(seed).integers(0, 256, (count, 8, 8, 3), dtype=np.uint8)
    return coarse.repeat(28, axis=1).repeat(28, axis=2)


def by_numpy(images: NDArray[np.uint8], kind: Kind) -> NDArray[np.float64]:
    """Return what the tiny model with a domain input makes of images."""
    values = {v.name: numpy_helper.to_array(v) for v in tiny_model().graph.initializer}
    scaled = (images.astype(np.float64) - values["middle"]) * values["scale"]
    cells = scaled.reshape(len(images), 8, 28, 8, 28, 3).mean(axis=(2, 4))
    flat = cells.transpose(0, 3, 1, 2).reshape(len(images), -1)
    features = flat @ values["weights"].T.astype(np.float64) + values["bias"]
    features += np.arange(1, 17) * {"sketch": 0, "photo": 1}[kind]
    return np.asarray(features / np.linalg.norm(features, axis=1, keepdims=True))


def test_sketches_are_0_and_photos_1() -> None:
    assert domains_of("sketch", 3).tolist() == [0, 0, 0]
    assert domains_of("photo", 2).tolist() == [1, 1]
    assert domains_of("photo", 2).dtype == np.float32


@pytest.mark.parametrize("name", ON_A_CPU)
@pytest.mark.parametrize("count", [1, 9, 19])
def test_the_kind_reaches_the_model_in_parts_of_any_size(
    bundle: Bundle, name: str, count: int
) -> None:
    engine = open_engine(bundle, EngineOptions(engine=name, threads=2), lanes=2)
    assert engine.info.domain_input == "domain"
    for kind in KINDS:
        rows = engine.run(images(count)[:, :, ::-1], kind)
        assert np.abs(rows - by_numpy(images(count)[:, :, ::-1], kind)).max() < 1e-5
    engine.close()


@pytest.mark.parametrize("name", ON_A_CPU)
def test_a_model_without_a_domain_input_accepts_either_kind(plain: Bundle, name: str) -> None:
    engine = open_engine(plain, EngineOptions(engine=name))
    assert engine.info.domain_input is None
    assert np.array_equal(engine.run(images(3), "sketch"), engine.run(images(3), "photo"))
    engine.close()


@pytest.mark.parametrize("name", ON_A_CPU)
@pytest.mark.parametrize("declared", [None, "domain"])
def test_a_manifest_that_disagrees_with_the_model_is_refused(
    tmp_path: Path, name: str, declared: str | None
) -> None:
    folder = tiny_bundle(tmp_path / "tiny", has_domain=declared is None)
    write_tiny_manifest(folder, domain_input=declared)
    with pytest.raises(BadModel) as caught:
        open_engine(Bundle.open(folder), EngineOptions(engine=name))
    assert ("domain: tensor(float)" in caught.value.found) == (declared is None)
    assert ("domain: tensor(float)" in caught.value.expected) == (declared is not None)
    assert "manifest" in caught.value.expected


def test_a_domain_input_of_another_name_is_refused(tmp_path: Path) -> None:
    folder = tiny_bundle(tmp_path / "tiny", has_domain=True)
    write_tiny_manifest(folder, domain_input="tag")
    with pytest.raises(BadModel, match="an input 'tag'") as caught:
        Bundle.open(folder)
    assert "'domain'" in caught.value.expected


def test_a_domain_for_the_whole_batch_is_refused(tmp_path: Path) -> None:
    folder = tiny_bundle(tmp_path / "tiny", has_domain=True)
    model = onnx.load(folder / "model.int8.onnx")
    model.graph.input[1].type.tensor_type.shape.dim[0].dim_value = 1
    onnx.save(model, folder / "model.int8.onnx")
    write_tiny_manifest(folder, domain_input="domain")
    with pytest.raises(BadModel, match=r"domain: tensor\(float\) \(1\)"):
        open_engine(Bundle.open(folder), EngineOptions(engine="onnxruntime"))


def test_files_are_embedded_as_the_given_kind(bundle: Bundle, tmp_path: Path) -> None:
    paths = write_photos(tmp_path, 5)
    with Embedder(bundle, threads=2) as embedder:
        for kind in KINDS:
            prepared = [prepare(path.read_bytes(), kind).pixels for path in paths]
            expected = by_numpy(np.stack(prepared), kind)
            items = list(embedder.stream(paths, kind))
            rows = [item.row for item in items if isinstance(item, Embedded)]
            assert np.abs(np.stack(rows) - expected).max() < 1e-5
            one, _ = embedder.embed_one(paths[0].read_bytes(), kind)
            assert np.abs(one - expected[0]).max() < 1e-5
            again = embedder.embed_images(np.stack(prepared), kind)
            assert np.abs(again - expected).max() < 1e-5


def test_a_gallery_embeds_photos_and_queries_by_kind(bundle: Bundle, tmp_path: Path) -> None:
    photos = write_photos(tmp_path / "photos", 6)
    sketch = write_sketch(tmp_path / "sketch.png")
    rows = by_numpy(np.stack([prepare(p.read_bytes(), "photo").pixels for p in photos]), "photo")
    with Embedder(bundle, threads=2) as embedder:
        update_gallery(tmp_path / "gallery", [tmp_path / "photos"], embedder)
        with Gallery.open(tmp_path / "gallery") as gallery:
            for path, kind in ((sketch, KINDS[0]), (photos[2], KINDS[1])):
                asked = by_numpy(prepare(path.read_bytes(), kind).pixels[None], kind)[0]
                hits = gallery.query(path.read_bytes(), embedder, 6, kind)
                found = {Path(hit.path).name: hit.score for hit in hits}
                wanted = dict(zip([p.name for p in photos], rows @ asked, strict=True))
                assert found == pytest.approx(wanted, abs=2e-3)


# --- on a GPU ----------------------------------------------------------------------------------


def opened(bundle: Bundle, surface: Surface) -> TensorRtEngine:
    options = EngineOptions(precision="fp32", threads=2, device="cuda", batch=BATCH)
    return open_tensorrt(EngineRequest(bundle, options), surface.module)


def test_a_plan_gets_the_kind_whatever_ran_before(machine: FakeMachine, bundle: Bundle) -> None:
    engine = opened(bundle, machine.world.surface)
    assert engine.info.domain_input == "domain"
    for turn in range(3):
        for number, kind in enumerate((*KINDS, *KINDS)):
            # Buckets between, whole ones, and runs of several chunks, as graphs from turn 1 on.
            for count in (1, 3, BATCH, 2 * BATCH + 5):
                batch = images(count, seed=10 * turn + number)
                rows = engine.run(batch, kind)
                assert np.abs(rows - by_numpy(batch, kind)).max() < 1e-5
    engine.close()


def test_the_kind_is_copied_only_when_it_changes(
    monkeypatch: pytest.MonkeyPatch, bundle: Bundle
) -> None:
    machine = fake_machine(monkeypatch, SURFACES[0])
    engine = opened(bundle, SURFACES[0])

    def copies(kind: Kind) -> int:
        before = len(machine.gpus.history)
        engine.run(images(2 * BATCH), kind)
        done = machine.gpus.history[before:]
        return sum(one.label == "to device" and one.size == 4 * BATCH for one in done)

    assert [copies(kind) for kind in ("photo", "photo", "sketch", "sketch")] == [2, 0, 2, 0]
    engine.close()
    assert not machine.alive()


@pytest.mark.parametrize("declared", [None, "domain"])
def test_no_plan_is_built_if_the_manifest_contradicts_the_model(
    machine: FakeMachine, tmp_path: Path, declared: str | None
) -> None:
    folder = tiny_bundle(tmp_path / "tiny", has_domain=declared is None)
    write_tiny_manifest(folder, domain_input=declared)
    with pytest.raises(BadModel, match="takes images: UINT8") as caught:
        opened(Bundle.open(folder), machine.world.surface)
    assert ("domain: FLOAT (any)" in caught.value.expected) == (declared is not None)


@pytest.mark.parametrize("declared", [None, "domain"])
def test_a_cached_plan_is_checked_against_the_manifest_too(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, declared: str | None
) -> None:
    fake_machine(monkeypatch, SURFACES[0])
    folder = tiny_bundle(tmp_path / "tiny", has_domain=declared is None)
    trt = find_tensorrt(SURFACES[0].module)
    ready_plan(Bundle.open(folder), "fp32", trt, find_device("cuda"), BuildSettings(1, 4, 8))
    write_tiny_manifest(folder, domain_input=declared)
    with pytest.raises(BadModel, match="the plan has INPUT") as caught:
        opened(Bundle.open(folder), SURFACES[0])
    assert ("domain: FLOAT (-1,)" in caught.value.expected) == (declared is not None)


def test_a_new_plan_is_compared_on_both_kinds(
    monkeypatch: pytest.MonkeyPatch, bundle: Bundle
) -> None:
    fake_machine(monkeypatch, SURFACES[0])
    trt, device = find_tensorrt(SURFACES[0].module), find_device("cuda")
    ready = ready_plan(bundle, "fp32", trt, device, BuildSettings(1, 4, 8))
    check = require_sound(ready, bundle, trt, device)
    assert check.images == 8 and check.cosine_min is not None
    assert check.cosine_min > LEAST_COSINE["fp32"]


def test_every_engine_takes_the_kind_by_the_same_name(bundle: Bundle) -> None:
    engines: list[Engine] = [open_engine(bundle, EngineOptions(engine=name)) for name in ON_A_CPU]
    for engine in engines:
        assert engine.run(images=images(1), kind="sketch").shape == (1, 16)
        engine.close()
