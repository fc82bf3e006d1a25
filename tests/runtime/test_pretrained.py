"""The included bundle is complete, and as good as its card says."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import TensorProto, numpy_helper

from sbtk_runtime.bundle import Bundle, list_bundles, pretrained_folder
from sbtk_runtime.embedding.embedder import Embedder
from sbtk_runtime.evaluation.metrics import evaluate
from sbtk_runtime.preprocess import PREPROCESSING
from sbtk_train.data.splits import open_split
from tests.saturation import can_saturate

MAX_BYTES = 80_000_000


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    return Bundle.open(None)


def test_the_default_bundle_is_the_included_one_and_intact(bundle: Bundle) -> None:
    assert bundle.folder.parent == pretrained_folder()
    assert bundle.manifest.model_id in {found.manifest.model_id for found in list_bundles()}
    bundle.verify()
    assert sum(record.size_bytes for record in bundle.manifest.files.values()) <= MAX_BYTES
    assert bundle.manifest.preprocessing == PREPROCESSING


def test_the_manifest_lists_no_unseen_class_as_training_class(bundle: Bundle) -> None:
    training = bundle.manifest.training
    unseen = open_split(training["split"]["name"])
    assert training["split"]["sha256"] == unseen.sha256
    assert set(training["unseen_classes"]) == set(unseen.unseen)
    trained_on = run_record()["training_classes"]
    assert len(trained_on) == training["training_classes"] == 104
    assert not any(unseen.is_unseen(name) for name in trained_on)


def test_int8_is_the_same_on_processors_without_vnni(bundle: Bundle) -> None:
    graph = onnx.load(bundle.onnx_path("int8")).graph
    weights = {
        tensor.name: numpy_helper.to_array(tensor)
        for tensor in graph.initializer
        if tensor.data_type == TensorProto.INT8 and len(tensor.dims) > 1
    }
    products = [node for node in graph.node if node.op_type in ("Conv", "Gemm")]
    assert len(weights) == len(products) == 54
    for name, values in weights.items():
        assert not can_saturate(values.reshape(len(values), -1).T), name


@pytest.mark.data
@pytest.mark.skipif(not os.environ.get("SBTK_DATA"), reason="SBTK_DATA names no research images")
def test_the_parity_in_the_card_can_be_reproduced(bundle: Bundle) -> None:
    from sbtk_export.images import choose_images

    data = Path(os.environ["SBTK_DATA"])
    images = choose_images(data, run_record()["training_classes"], ()).ranking
    is_sketch = images.is_sketch
    with Embedder(bundle, precision="int8") as embedder:
        sketches = embedder.embed_images(images.pixels[is_sketch], "sketch")
        photos = embedder.embed_images(images.pixels[~is_sketch], "photo")
    found = evaluate(sketches, images.labels[is_sketch], photos, images.labels[~is_sketch])
    # Other processors round INT8 in other ways, hence not exactly.
    known = bundle.manifest.parity["int8"]["map_model"]
    assert found.summary()["mAP@all"] == pytest.approx(known, abs=0.01)


def run_record() -> dict[str, Any]:
    """The record of the run that was exported."""
    path = Path(__file__).parents[2] / "benchmarks/sbtknet-sketchy/run.json"
    record: dict[str, Any] = json.loads(path.read_text())
    return record
