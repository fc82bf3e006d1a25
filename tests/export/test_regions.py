"""Regions of exported models: every file embeds the windows that torch does."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest

from sbtk_export.card import StudentFacts
from sbtk_export.export import ExportPlan, export_student
from sbtk_export.images import ExportImages
from sbtk_export.regions import add_regions, measure_regions, write_region_models
from sbtk_runtime.bundle import Bundle
from sbtk_runtime.engines.base import EngineOptions
from sbtk_runtime.engines.registry import open_engine
from sbtk_runtime.errors import BadConfig, BadData, BadModel
from sbtk_runtime.generated_inputs import generate_photos
from sbtk_runtime.regions import RegionGrid, grid_of
from sbtk_train.models.student import SbtknetStudent
from tests.tiny import tiny_bundle
from tests.tiny_regions import tiny_map_bundle
from tests.tiny_student import TRAINING, fitted

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("narrow_resnet18")]

GRID = RegionGrid(320, ((5, 2), (3, 7)))


def test_every_file_embeds_windows_as_torch_does(
    tmp_path: Path, facts: StudentFacts, samples: ExportImages
) -> None:
    import torch

    torch.manual_seed(1)  # some random weights lose too much in INT8
    student = SbtknetStudent("resnet18", 16, len(TRAINING))
    fitted(student, [samples.parity, samples.ranking], shrinkage=1e-2)
    plan = ExportPlan(tmp_path / "bundle", "x", ("fp32", "fp16", "int8", "int8.trt"))
    few = ExportImages(
        samples.calibration.slice(16, 48), samples.parity.slice(80, 120), samples.ranking
    )
    bundle = export_student(student, facts, few, plan, print).bundle
    metrics = measure_regions(bundle, GRID, generate_photos(2), print, student)
    assert list(metrics) == [f"regions_{name}" for name in ("fp32", "fp16", "int8", "int8_trt")]
    assert metrics["regions_fp32"]["value"] > 0.99999
    for metric in metrics.values():
        assert metric["one_window"] > 0.9999
        assert "with torch's" in metric["rule"]
    # Another student is not taken for the model.
    student.embedding.weight.data.neg_()
    with pytest.raises(BadModel, match="fp32: smallest cosine"):
        measure_regions(bundle, GRID, generate_photos(2), print, student)


def test_regions_can_be_added_to_a_bundle_without_its_run(tmp_path: Path) -> None:
    folder = tiny_map_bundle(tmp_path / "map")
    before = Bundle.open(folder).manifest
    found = add_regions(folder, grid_of(9), None, print)
    assert list(found) == ["regions_fp32", "regions_int8"]
    manifest = Bundle.open(folder).manifest
    assert {name: manifest.metrics[name] for name in found} == found
    assert manifest.model_id == before.model_id
    assert "regions int8" in (folder / "MODEL_CARD.md").read_text()
    # Again, with another number: replaced, not added.
    assert add_regions(folder, grid_of(16), None, print).keys() == found.keys()


def test_images_of_unseen_classes_are_not_used(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(Bundle.open().folder, tmp_path / "copy"))
    for kind in ("sketch", "photo"):
        (tmp_path / "data" / kind / "windmill").mkdir(parents=True)
        for index, photo in enumerate(generate_photos(2)):
            (tmp_path / "data" / kind / "windmill" / f"{index}.jpg").write_bytes(photo)
    with pytest.raises(BadData, match="no photos of seen classes"):
        add_regions(folder, grid_of(9), tmp_path / "data", print)


def test_files_for_other_programs_agree_with_the_engine(tmp_path: Path) -> None:
    import onnxruntime

    bundle = Bundle.open(tiny_map_bundle(tmp_path / "map"))
    paths = write_region_models(bundle, GRID, tmp_path / "models")
    names = [path.name for path in paths]
    assert names == ["model.fp32.regions.onnx", "model.int8.regions.onnx", "boxes.npy"]
    np.testing.assert_array_equal(np.load(paths[-1]), GRID.boxes())
    onnx.checker.check_model(onnx.load(paths[0]), full_check=True)
    pixels = np.random.default_rng(0).integers(0, 256, (2, 320, 320, 3), dtype=np.uint8)
    session = onnxruntime.InferenceSession(paths[0])
    (rows,) = session.run(["embeddings"], {"images": pixels})
    engine = open_engine(bundle, EngineOptions(engine="onnxruntime", threads=1), regions=GRID)
    np.testing.assert_allclose(rows, engine.run(pixels, "photo"), atol=1e-5)
    engine.close()
    with pytest.raises(BadConfig, match="exists"):
        write_region_models(bundle, GRID, tmp_path / "models")


def test_a_model_without_a_map_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    bundle = Bundle.open(tiny_bundle(tmp_path / "tiny"))
    with pytest.raises(BadModel, match="cannot embed regions"):
        write_region_models(bundle, GRID, tmp_path / "models")
    assert not (tmp_path / "models").exists()
