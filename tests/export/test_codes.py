"""Binary codes of an export: fitted on training classes, measured, and usable."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest

from sbtk_export.card import StudentFacts
from sbtk_export.export import ExportPlan, export_run, export_student
from sbtk_export.images import ExportImages, choose_images
from sbtk_runtime.binary_codes import fit_itq
from sbtk_runtime.bundle import Bundle
from sbtk_runtime.embedding.embedder import Embedder
from sbtk_runtime.errors import BadConfig, BadModel
from sbtk_runtime.gallery.gallery import Gallery
from sbtk_runtime.gallery.update import update_gallery
from sbtk_runtime.preprocess import Kind
from sbtk_train.models.sbtknet import SbtknetStudent
from sbtk_train.runs.checkpoint import TrainedRun
from tests.tiny_student import TRAINING, VALIDATION

PER_KIND = 24


@pytest.fixture(scope="module")
def code_samples(textures: Path) -> ExportImages:
    return choose_images(
        textures, TRAINING, VALIDATION, is_calibrating=False, codes_per_kind=PER_KIND
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
        assert len(set(files)) == PER_KIND
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
        assert f"{PER_KIND} sketches and {PER_KIND} photos" in figure["rule"]
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
