"""Exports of a tiny student: what is published, and when nothing is."""

from __future__ import annotations

import copy
import hashlib
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import helper, numpy_helper
from torch import Tensor

from sbtk_export.card import StudentFacts, render_model_card
from sbtk_export.export import (
    ExportPlan,
    check_models,
    export_run,
    export_student,
    hash_files,
    publish_folder,
)
from sbtk_export.images import ExportImages, choose_images
from sbtk_export.parity import compute_reference
from sbtk_runtime.binary_codes import fit_itq
from sbtk_runtime.bundle import Bundle, onnx_name
from sbtk_runtime.embedding.embedder import Embedder
from sbtk_runtime.engines.base import EngineOptions
from sbtk_runtime.engines.registry import open_engine
from sbtk_runtime.errors import BadConfig, BadData, BadModel
from sbtk_runtime.gallery.gallery import Gallery
from sbtk_runtime.gallery.update import update_gallery
from sbtk_runtime.manifest import Precision
from sbtk_runtime.preprocess import KINDS, Kind
from sbtk_train.models.student import SbtknetStudent
from sbtk_train.runs.checkpoint import STUDENT, TrainedRun
from tests.tiny_student import TRAINING, VALIDATION

CONTRACT = {
    "PREPROCESSING.md",
    "golden.json",
    *(f"golden.{kind}{part}.png" for kind in KINDS for part in ("", ".pixels")),
}
CODES_PER_KIND = 24


def quiet(_: str) -> None:
    """Take what an export says."""


def test_a_full_bundle_is_complete(bundle: Bundle, student: SbtknetStudent) -> None:
    bundle.verify()
    assert bundle.precisions == ("fp32", "fp16", "int8")
    assert set(bundle.manifest.files) == {
        *CONTRACT,
        "MODEL_CARD.md",
        "model.fp16.onnx",
        "model.fp32.onnx",
        "model.int8.onnx",
        STUDENT,
    }
    manifest = bundle.manifest
    assert manifest.name == "tiny"
    assert manifest.model_id.startswith("tiny@")
    assert manifest.dim == student.embedding.out_features
    assert manifest.metrics["validation_map"]["value"] == 0.5
    assert "validation classes" in manifest.metrics["validation_map"]["rule"]
    assert manifest.training["seed"] == 5
    assert set(manifest.versions) >= {"torch", "onnx", "onnxruntime", "python"}
    assert not [path for path in bundle.folder.parent.iterdir() if path != bundle.folder]


def test_parity_holds_and_is_recorded(bundle: Bundle) -> None:
    parity = bundle.manifest.parity
    assert set(parity) == {"fp32", "fp16", "int8"}
    for figures in parity.values():
        assert figures["images"] >= 200
        assert figures["norm_error"] <= 1e-3
        assert figures["engine"].startswith("onnxruntime ")
    assert parity["fp32"]["cosine_min"] >= 0.9999
    assert parity["fp16"]["cosine_min"] >= 0.999
    assert parity["int8"]["cosine_min"] >= 0.95
    # Eight bits leave a trace; a figure of one would mean that FP32 was measured.
    assert parity["int8"]["cosine_mean"] < parity["fp16"]["cosine_mean"]


def test_the_engine_gives_the_students_embeddings(
    bundle: Bundle, student: SbtknetStudent, samples: ExportImages
) -> None:
    """The check is made again, with the input normalised by hand."""
    pixels = samples.parity.pixels[:6]
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    images = ((pixels / 255.0 - mean) / std).transpose(0, 3, 1, 2).astype(np.float32)
    with torch.inference_mode():
        wanted = student.embed(torch.from_numpy(images)).numpy()
    engine = open_engine(bundle, EngineOptions(precision="fp32"))
    np.testing.assert_allclose(engine.run(pixels, "photo"), wanted, atol=1e-5)
    engine.close()


def test_the_card_lists_the_runs_of_an_averaged_student(bundle: Bundle) -> None:
    parts = [{"seed": seed, "recipe": {"name": "sbtk"}} for seed in (4, 7)]
    training = bundle.manifest.training | {"averaged": parts}
    card = render_model_card(replace(bundle.manifest, training=training))
    assert "- averaged, 2:\n  - seed: 7\n  - recipe:\n    - name: sbtk\n" in card
    assert "{" not in card


def test_the_card_agrees_with_the_manifest(bundle: Bundle) -> None:
    card = (bundle.folder / "MODEL_CARD.md").read_text()
    for words in (
        bundle.manifest.model_id,
        "Research use only",
        "Intended use",
        "SK-YE",
        "seed: 5",
        "| int8 | ",
        "cosine min",
        bundle.manifest.files["model.int8.onnx"].sha256,
    ):
        assert words in card
    assert str(bundle.folder.parent) not in card


def test_a_slim_bundle_keeps_the_fp32_metrics(
    student: SbtknetStudent, facts: StudentFacts, samples: ExportImages, tmp_path: Path
) -> None:
    plan = ExportPlan(tmp_path / "slim", "slim", ("int8",), is_slim=True)
    slim = export_student(student, facts, samples, plan, quiet).bundle
    assert set(slim.manifest.files) == {*CONTRACT, "MODEL_CARD.md", "model.int8.onnx"}
    assert set(slim.manifest.parity) == {"fp32", "int8"}
    slim.verify()


def test_a_slim_bundle_of_fp32_alone_is_refused(
    student: SbtknetStudent, facts: StudentFacts, samples: ExportImages, tmp_path: Path
) -> None:
    plan = ExportPlan(tmp_path / "slim", "slim", ("fp32",), is_slim=True)
    with pytest.raises(BadConfig, match="empty"):
        export_student(student, facts, samples, plan, quiet)


class Changed(SbtknetStudent):
    """A student that embeds otherwise than its layers, which are what is traced."""

    def embed(self, inputs: Tensor, domains: Tensor | None = None, begin: str = "") -> Tensor:
        return super().embed(inputs.flip(1), domains, begin)


def test_nothing_is_published_when_parity_fails(
    student: SbtknetStudent, facts: StudentFacts, samples: ExportImages, tmp_path: Path
) -> None:
    changed = copy.deepcopy(student)
    changed.__class__ = Changed
    with pytest.raises(BadModel, match=r"fp32: smallest cosine 0\.\d+ is not >= 0\.9999"):
        plan = ExportPlan(tmp_path / "bundles" / "bad", "bad", ("fp32",))
        export_student(changed, facts, samples, plan, quiet)
    assert list((tmp_path / "bundles").iterdir()) == []


def test_weights_changed_after_the_export_are_detected(
    bundle: Bundle, student: SbtknetStudent, samples: ExportImages
) -> None:
    changed = copy.deepcopy(student)
    with torch.no_grad():
        changed.embedding.weight.mul_(
            torch.linspace(0.2, 1.8, changed.embedding.out_features)[:, None]
        )
    with pytest.raises(BadModel) as caught:
        check_models(bundle, compute_reference(changed, samples), samples, ("fp32", "int8"), quiet)
    assert "fp32: smallest cosine" in caught.value.found
    assert "int8: " in caught.value.found


def test_rows_that_are_not_of_length_one_are_refused(
    bundle: Bundle, student: SbtknetStudent, samples: ExportImages, tmp_path: Path
) -> None:
    """A cosine does not see them: NNCF's quantised norm gave lengths up to 1.37."""
    longer = with_edited_model(bundle, "fp32", tmp_path, scaled_by(1.002))
    with pytest.raises(BadModel) as caught:
        check_models(longer, compute_reference(student, samples), samples, ("fp32",), quiet)
    assert "largest |norm - 1| 0.002" in caught.value.found
    assert "cosine" not in caught.value.found


def test_nan_passes_no_limit(
    bundle: Bundle, student: SbtknetStudent, samples: ExportImages, tmp_path: Path
) -> None:
    broken = with_edited_model(bundle, "fp16", tmp_path, scaled_by(float("nan")))
    with pytest.raises(BadModel, match="fp16: smallest cosine nan"):
        check_models(broken, compute_reference(student, samples), samples, ("fp16",), quiet)


@pytest.mark.parametrize("is_folder", [True, False])
def test_a_bundle_that_another_export_made_first_is_kept(tmp_path: Path, is_folder: bool) -> None:
    target = tmp_path / "b"
    theirs = target / "model.onnx" if is_folder else target
    with pytest.raises(BadConfig, match="b exists"), publish_folder(target) as folder:
        (folder / "model.onnx").write_text("ours")
        theirs.parent.mkdir(exist_ok=True)
        theirs.write_text("theirs")
    assert theirs.read_text() == "theirs"
    assert list(tmp_path.iterdir()) == [target]


def test_an_existing_folder_is_not_overwritten(
    run: TrainedRun, bundle: Bundle, tmp_path: Path
) -> None:
    taken = shutil.copytree(bundle.folder, tmp_path / "taken")
    with pytest.raises(BadConfig, match="taken exists"):
        export_run(run, ExportPlan(taken, "taken"), None, quiet)
    Bundle.open(taken).verify()


def test_missing_data_are_reported(run: TrainedRun, tmp_path: Path) -> None:
    gone = replace(run, config=replace(run.config, data=str(tmp_path / "gone")))
    with pytest.raises(BadData) as caught:
        export_run(gone, ExportPlan(tmp_path / "new", "new"), None, quiet)
    assert "the run's data do not exist" in caught.value.found
    assert "--images DATA" in caught.value.next_step
    assert not (tmp_path / "new").exists()


def scaled_by(factor: float) -> onnx.NodeProto:
    value = numpy_helper.from_array(np.array(factor, dtype=np.float32))
    return helper.make_node("Constant", [], ["factor"], value=value)


def with_edited_model(
    bundle: Bundle, precision: Precision, folder: Path, factor: onnx.NodeProto
) -> Bundle:
    """Return a copy of the bundle whose model multiplies its output, and which is signed."""
    copied = Path(shutil.copytree(bundle.folder, folder / "edited"))
    path = copied / onnx_name(precision)
    model = onnx.load(path)
    last = next(node for node in model.graph.node if "embeddings" in node.output)
    last.output[0] = "unscaled"
    model.graph.node.extend(
        [factor, helper.make_node("Mul", ["unscaled", "factor"], ["embeddings"])]
    )
    onnx.save(model, path)
    replace(bundle.manifest, files=hash_files(copied)).write(copied)
    return Bundle.open(copied)


@pytest.fixture(scope="module")
def code_samples(textures: Path) -> ExportImages:
    return choose_images(
        textures, TRAINING, VALIDATION, is_calibrating=False, codes_per_kind=CODES_PER_KIND
    )


@pytest.fixture(scope="module")
def coded(
    tmp_path_factory: pytest.TempPathFactory,
    student: SbtknetStudent,
    facts: StudentFacts,
    code_samples: ExportImages,
) -> Bundle:
    """A bundle of FP32 that makes codes of 8 and 16 bits."""
    plan = ExportPlan(tmp_path_factory.mktemp("coded") / "tiny", "tiny", ("fp32",), bits=(16, 8))
    return export_student(student, facts, code_samples, plan, print).bundle


def test_codes_are_fitted_on_equal_parts_of_training_sketches_and_photos(
    code_samples: ExportImages, samples: ExportImages
) -> None:
    for kind in ("sketch", "photo"):
        files = code_samples.code_files[kind]
        assert len(set(files)) == CODES_PER_KIND
        names = [path.parent.name for path in files]
        assert {name: names.count(name) for name in TRAINING} == dict.fromkeys(TRAINING, 6)
        assert {path.parent.parent.name for path in files} == {kind}
    # What is measured is the same with and without.
    assert code_samples.parity.paths == samples.parity.paths
    assert code_samples.ranking.paths == samples.ranking.paths
    assert not any(samples.code_files.values())


def test_the_manifest_has_the_hash_of_the_itq_file(coded: Bundle) -> None:
    coded.verify()
    assert coded.bits == (8, 16)
    assert {"itq8.npz", "itq16.npz"} <= set(coded.manifest.files)
    for bits in coded.bits:
        assert (coded.itq(bits).bits, coded.itq(bits).dim) == (bits, 16)
    with pytest.raises(BadModel, match="no 64-bit codes"):
        coded.itq(64)
    card = (coded.folder / "MODEL_CARD.md").read_text()
    assert "`--bits 8` or `--bits 16`" in card
    assert "codes 16 map" in card


def test_the_codes_are_those_of_the_bundles_own_embeddings(
    coded: Bundle, code_samples: ExportImages
) -> None:
    kinds: tuple[Kind, Kind] = ("sketch", "photo")
    with Embedder(coded, engine="onnxruntime", threads=1) as embedder:
        rows = np.stack(
            [
                embedder.embed_one(path.read_bytes(), kind)[0]
                for kind in kinds
                for path in code_samples.code_files[kind]
            ]
        )
    wanted, found = fit_itq(rows, 16), coded.itq(16)
    np.testing.assert_allclose(found.mean, wanted.mean, atol=1e-5)
    is_same = np.unpackbits(found.codes(rows)) == np.unpackbits(wanted.codes(rows))
    assert is_same.mean() > 0.99


def test_the_loss_of_codes_is_recorded_with_its_rule(coded: Bundle, facts: StudentFacts) -> None:
    metrics = coded.manifest.metrics
    assert set(metrics) == {*facts.metrics, "codes_8_map", "codes_16_map"}
    for bits in coded.bits:
        figure = metrics[f"codes_{bits}_map"]
        assert 0.5 < figure["value"] <= figure["of_embeddings"] <= 1.0
        assert "validation classes" in figure["rule"]
        assert f"{CODES_PER_KIND} sketches and {CODES_PER_KIND} photos" in figure["rule"]
    assert metrics["codes_8_map"]["of_embeddings"] == metrics["codes_16_map"]["of_embeddings"]


def test_codes_change_neither_models_nor_their_id(coded: Bundle, bundle: Bundle) -> None:
    sha256 = coded.manifest.files["model.fp32.onnx"].sha256
    assert sha256 == bundle.manifest.files["model.fp32.onnx"].sha256
    # The id is the hash of the models alone.
    digest = hashlib.sha256(sha256.encode()).hexdigest()
    assert coded.manifest.model_id == f"tiny@{digest[:12]}"
    assert bundle.bits == ()
    assert "Binary codes" not in (bundle.folder / "MODEL_CARD.md").read_text()


def test_an_exported_bundle_makes_a_binary_gallery(
    coded: Bundle, textures: Path, tmp_path: Path
) -> None:
    photos = textures / "photo" / VALIDATION[0]
    with Embedder(coded, engine="onnxruntime", threads=1) as embedder:
        report = update_gallery(tmp_path / "g.sbtk", [photos], embedder, bits=16)
        assert report.live == len(list(photos.iterdir()))
        with Gallery.open(tmp_path / "g.sbtk") as gallery:
            (hit,) = gallery.query(photos / "0.png", embedder, 1, "photo")
            assert hit.score == 1.0
            assert len(gallery.query(textures / "sketch" / VALIDATION[0] / "0.png", embedder)) == 4


@pytest.mark.parametrize("bits", [24, 12])
def test_impossible_code_lengths_are_refused_before_any_work(
    run: TrainedRun, tmp_path: Path, bits: int
) -> None:
    messages: list[str] = []
    plan = ExportPlan(tmp_path / "long", "long", ("fp32",), bits=(8, bits))
    with pytest.raises(BadConfig, match=f"binary codes of {bits} bits"):
        export_run(run, plan, None, messages.append)
    assert messages == []
    assert list(tmp_path.iterdir()) == []
