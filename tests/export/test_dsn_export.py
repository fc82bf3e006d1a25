"""A DSN bundle of 64 dimensions: its domain input and channel weights in every file."""

from __future__ import annotations

import contextlib
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, numpy_helper

from sbtk_export.card import StudentFacts, collect_facts
from sbtk_export.export import ExportPlan, export_student
from sbtk_export.fp16 import make_half_trunk_student
from sbtk_export.images import ExportImages
from sbtk_export.int8 import find_se_nodes
from sbtk_export.onnx_graph import ModelInputs, takes_domains
from sbtk_export.parity import LIMITS, embed_with_torch
from sbtk_export.regions import measure_regions
from sbtk_runtime.bundle import Bundle, OnnxForm
from sbtk_runtime.embedding.embedder import Embedder
from sbtk_runtime.engines.base import EngineOptions
from sbtk_runtime.engines.registry import open_engine
from sbtk_runtime.engines.tensorrt.build import BuildSettings, build_plan
from sbtk_runtime.engines.tensorrt.library import find_tensorrt
from sbtk_runtime.errors import BadModel
from sbtk_runtime.gallery.gallery import Gallery
from sbtk_runtime.gallery.update import update_gallery
from sbtk_runtime.generated_inputs import generate_photos
from sbtk_runtime.manifest import PRECISIONS, Precision
from sbtk_runtime.preprocess import KINDS, Kind
from sbtk_runtime.regions import RegionGrid
from sbtk_train.config import make_recipe
from sbtk_train.models.student import DsnStudent
from sbtk_train.runs.checkpoint import TrainedRun
from tests.tiny import write_photos, write_sketch
from tests.tiny_student import fitted, telling, tiny_dsn_student

pytestmark = pytest.mark.slow

ENGINES = ("onnxruntime", "openvino")


@pytest.fixture(scope="module")
def dsn(samples: ExportImages) -> DsnStudent:
    return telling(fitted(tiny_dsn_student(), [samples.parity]), samples.parity)


@pytest.fixture(scope="module")
def dsn_bundle(
    tmp_path_factory: pytest.TempPathFactory,
    dsn: DsnStudent,
    facts: StudentFacts,
    samples: ExportImages,
) -> Bundle:
    plan = ExportPlan(
        tmp_path_factory.mktemp("bundles") / "dsn", "dsn", ("fp32", "fp16", "int8", "int8.trt")
    )
    # Of the few images of held-out classes, one that changes places would be too much.
    samples = replace(samples, ranking=samples.parity)
    return export_student(dsn, replace(facts, method="dsn"), samples, plan, print).bundle


def model_of(bundle: Bundle, precision: Precision, form: OnnxForm = "plain") -> onnx.ModelProto:
    return onnx.load(bundle.onnx_path(precision, form))


def pixels_of(samples: ExportImages) -> NDArray[np.uint8]:
    return samples.parity.pixels[96:104]


def test_the_manifest_and_the_card_describe_the_domain_input(dsn_bundle: Bundle) -> None:
    manifest = dsn_bundle.manifest
    assert (manifest.method, manifest.dim, manifest.domain_input) == ("dsn", 64, "domain")
    card = (dsn_bundle.folder / "MODEL_CARD.md").read_text()
    assert "`domain (N,) float32`: 0 for a sketch, 1 for a photo" in card
    assert "trained by dsn, 64 dimensions" in card
    dsn_bundle.verify()


def test_parity_holds_for_sketches_and_for_photos(dsn_bundle: Bundle) -> None:
    assert set(dsn_bundle.manifest.parity) == {"fp32", "fp16", "int8", "int8.trt"}
    for variant, figures in dsn_bundle.manifest.parity.items():
        least = {figures["cosine_min_sketches"], figures["cosine_min_photos"]}
        assert figures["cosine_min"] == min(least) >= LIMITS[variant].cosine_min
        assert figures["norm_error"] <= 1e-3


@pytest.mark.parametrize("name", ENGINES)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_every_file_agrees_with_torch_for_sketches_and_photos(
    dsn_bundle: Bundle, dsn: DsnStudent, samples: ExportImages, precision: Precision, name: str
) -> None:
    pytest.importorskip(name)
    pixels = pixels_of(samples)
    wanted = {kind: embed_with_torch(dsn, ModelInputs.of_kind(pixels, kind)) for kind in KINDS}
    between = float((wanted["sketch"] * wanted["photo"]).sum(axis=1).max())
    assert between < 0.9, "the kind must make more of a difference than rounding does"
    engine = open_engine(dsn_bundle, EngineOptions(engine=name, precision=precision, threads=1))
    with contextlib.closing(engine):
        for kind in KINDS:
            rows = engine.run(pixels, kind)
            assert rows.shape == (8, 64)
            cosines = (rows * wanted[kind]).sum(axis=1)
            assert cosines.min() > {"fp32": 0.9999, "fp16": 0.999, "int8": 0.95}[precision]


@pytest.mark.parametrize(("precision", "form"), [("int8", "plain"), ("int8", "tensorrt")])
def test_channel_weights_stay_in_fp32_and_their_products_are_quantised(
    dsn_bundle: Bundle, precision: Precision, form: OnnxForm
) -> None:
    gates = find_se_nodes(model_of(dsn_bundle, "fp32"))
    model = model_of(dsn_bundle, precision, form)
    makers = {name: node for node in model.graph.node for name in node.output}
    constants = {tensor.name for tensor in model.graph.initializer}
    kinds = Counter(node.op_type for node in model.graph.node if node.name in gates)
    assert {k: kinds[k] for k in ("ReduceMean", "Gemm", "Sigmoid")} == {
        "ReduceMean": 2,
        "Gemm": 4,
        "Sigmoid": 2,
    }
    for node in model.graph.node:
        if node.op_type == "Gemm":
            assert (node.input[1] in constants) == (node.name in gates)
    adds = [node for node in model.graph.node if node.op_type == "Add" and "layer" not in node.name]
    products = [n for n in model.graph.node if n.op_type == "Mul" and "scale" not in n.input]
    assert len(products) == 2 and adds
    if form == "plain":
        for product in products:
            assert any(makers[name].op_type == "DequantizeLinear" for name in product.input)


def test_channel_means_are_fp32_in_an_fp16_trunk(dsn_bundle: Bundle) -> None:
    model = onnx.shape_inference.infer_shapes(model_of(dsn_bundle, "fp16"), strict_mode=True)
    types = {v.name: v.type.tensor_type.elem_type for v in model.graph.value_info}
    types |= {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    means = [node for node in model.graph.node if node.op_type == "ReduceMean"]
    assert len(means) == 3
    assert {types[node.input[0]] for node in means} == {TensorProto.FLOAT}
    convolutions = [node for node in model.graph.node if node.op_type == "Conv"]
    assert {types[node.input[1]] for node in convolutions} == {TensorProto.FLOAT16}


def test_channel_weights_stay_fp32_in_an_fp16_trunk(dsn: DsnStudent) -> None:
    half = make_half_trunk_student(dsn)
    weights = dict(dsn.named_parameters())
    kept = {name.replace(".whole", ""): value for name, value in half.named_parameters()}
    gates = [name for name in weights if ".se." in name]
    assert len(gates) == 8
    assert all(np.array_equal(weights[name].detach(), kept[name].detach()) for name in gates)


def test_strides_move_up_past_the_channel_weights(dsn_bundle: Bundle) -> None:
    model = model_of(dsn_bundle, "fp32")
    strides = [
        list(value.ints)
        for node in model.graph.node
        for value in node.attribute
        if node.op_type == "Conv" and value.name == "strides"
    ]
    assert strides == [[8, 8], *[[1, 1]] * 6]
    picked = {name for node in model.graph.node for name in node.input if "every_second" in name}
    products = [node for node in model.graph.node if node.op_type == "Mul"]
    assert any(picked.intersection(node.input) for node in products)


def test_models_without_channel_weights_have_none(bundle: Bundle) -> None:
    assert find_se_nodes(model_of(bundle, "fp32")) == []
    assert not takes_domains(model_of(bundle, "fp32"))


def test_images_keep_their_kind_through_mixing_and_batches(dsn_bundle: Bundle) -> None:
    pixels = np.zeros((40, 224, 224, 3), dtype=np.uint8)
    pixels[:, 0, 0, 0] = np.arange(40)
    inputs = ModelInputs.of_kinds(pixels, np.arange(40) < 20).mixed()
    assert 4 < inputs.first(20).domains.sum() < 16
    model, seen = model_of(dsn_bundle, "fp32"), []
    for feeds in inputs.batches(model, 16):
        assert set(feeds) == {"images", "domain"}
        numbers = feeds["images"][:, 0, 0, 0]
        assert np.array_equal(feeds["domain"], (numbers >= 20).astype(np.float32))
        seen += numbers.tolist()
    assert sorted(seen) == list(range(40))
    del model.graph.input[1]
    assert set(next(inputs.batches(model, 16))) == {"images"}


@pytest.mark.parametrize("precision", PRECISIONS)
def test_tensorrt_accepts_both_inputs(dsn_bundle: Bundle, precision: Precision) -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
    content = dsn_bundle.read_onnx(precision, "tensorrt")
    settings = BuildSettings(1, 2, 4, optimisation_level=0)
    trt = find_tensorrt("tensorrt_rtx")
    assert len(build_plan(trt, content, settings, domain_input="domain").plan) > 10_000
    with pytest.raises(BadModel, match="and domain: FLOAT"):
        build_plan(trt, content, settings)


def test_a_gallery_of_64_dimensions_is_indexed_and_queried(
    dsn_bundle: Bundle, tmp_path: Path
) -> None:
    photos = write_photos(tmp_path / "photos", 8)
    sketch = write_sketch(tmp_path / "sketch.png").read_bytes()
    with Embedder(dsn_bundle, threads=1) as embedder:
        update_gallery(tmp_path / "gallery", [tmp_path / "photos"], embedder)
        with Gallery.open(tmp_path / "gallery") as gallery:
            assert gallery.manifest.dim == 64
            (best, *_) = gallery.query(photos[5].read_bytes(), embedder, 3, "photo")
            assert best.path.endswith(photos[5].name) and best.score > 0.999
            asked: dict[Kind, list[float]] = {
                kind: [hit.score for hit in gallery.query(sketch, embedder, 8, kind)]
                for kind in KINDS
            }
    assert asked["sketch"] != pytest.approx(asked["photo"], abs=1e-3)


def test_the_method_is_read_from_the_run(run: TrainedRun) -> None:
    config = replace(run.config, method="dsn", recipe=make_recipe("dsn-sketchy", "dsn"))
    best = {**run.record["best"], "held_out_bits_map": 0.25}
    facts = collect_facts(replace(run, config=config, record={**run.record, "best": best}))
    assert facts.method == "dsn"
    assert facts.metrics["held_out_bits_map"]["rule"].endswith("; used to select the epoch")
    assert "chose" not in facts.metrics["validation_map"]["rule"]


def test_the_weights_of_a_quantised_trunk_have_8_bits(dsn_bundle: Bundle) -> None:
    model = model_of(dsn_bundle, "int8")
    kinds = Counter(
        numpy_helper.to_array(tensor).dtype.name
        for tensor in model.graph.initializer
        if len(tensor.dims) == 4 and max(tensor.dims) > 1
    )
    assert kinds["int8"] == 7


def test_regions_use_the_domain_of_photos(dsn: DsnStudent, dsn_bundle: Bundle) -> None:
    grid = RegionGrid(320, ((5, 2), (3, 7)))
    metrics = measure_regions(dsn_bundle, grid, generate_photos(3), print, dsn)
    assert list(metrics) == ["regions_fp32", "regions_fp16", "regions_int8", "regions_int8_trt"]
    assert metrics["regions_fp32"]["value"] > 0.99999
    assert metrics["regions_fp32"]["one_window"] > 0.9999
