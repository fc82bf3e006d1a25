"""A student of whole sketches stays one: in training, as a bundle, and in search."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sbtk_cli.main import main
from sbtk_runtime.bundle import Bundle, read_golden
from sbtk_runtime.preprocess import CROPPED, WHOLE, Kind, Preprocessing
from sbtk_train.compute import Compute, choose_compute
from sbtk_train.models.student import Student
from sbtk_train.runs.checkpoint import load_run
from sbtk_train.runs.sources import make_pixel_embedder
from tests.tiny_student import write_textures

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("narrow_resnet18")]

PAGE_PX = 240
ENGINE = ("--engine", "onnxruntime", "--precision", "fp16", "--threads", "1")


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder whose sketches are small, each somewhere on its page."""
    root = write_textures(tmp_path_factory.mktemp("data") / "pages")
    random = np.random.default_rng(0)
    for path in sorted((root / "sketch").rglob("*.png")):
        page = Image.new("L", (PAGE_PX, PAGE_PX), 255)
        left, top = (int(place) for place in random.integers(0, PAGE_PX - 96, 2))
        with Image.open(path) as sketch:
            page.paste(sketch, (left, top))
        page.save(path)
    return root


@pytest.fixture(scope="module")
def run(pages: Path, tmp_path_factory: pytest.TempPathFactory, narrow_resnet18: None) -> Path:
    """A run of the paper's recipe, without a teacher."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    words = ["train", str(pages), "--recipe", "paper", "--weights", "none", "--no-knowledge"]
    words += ["--backbone", "resnet18", "--size", "32", "--dim", "8", "--precision", "fp32"]
    words += ["--threads", "1", "--epochs", "1", "--quadruplets", "8", "--out", str(folder)]
    assert main(words) == 0
    return folder


@pytest.fixture(scope="module")
def bundle(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = tmp_path_factory.mktemp("bundles") / "whole"
    assert main(["export", str(run), "--fp16", "-o", str(folder)]) == 0
    return Bundle.open(folder)


def by_torch(
    student: Student, files: list[Path], kind: Kind, preprocessing: Preprocessing
) -> np.ndarray:
    compute: Compute = choose_compute("cpu", "fp32")
    return make_pixel_embedder(preprocessing, compute, 1)(student, files, kind).rows


def test_the_run_and_the_bundle_say_how_sketches_are_prepared(run: Path, bundle: Bundle) -> None:
    trained = load_run(run)
    assert trained.config.recipe.preprocessing == WHOLE
    assert trained.record["recipe"]["ink_crop"] is False
    assert bundle.preprocessing == WHOLE
    assert bundle.manifest.training["recipe"]["ink_crop"] is False
    card = (bundle.folder / "MODEL_CARD.md").read_text()
    assert "prepared by `sbtk-1-whole`" in card
    assert "Sketches are shown whole, not cropped to their ink." in card
    assert "It is not cropped" in (bundle.folder / "PREPROCESSING.md").read_text()
    for golden in read_golden(bundle):
        pixels = WHOLE.prepare(golden.image, golden.kind).pixels
        assert np.array_equal(pixels, golden.pixels)
    assert main(["models", "check", str(bundle.folder)]) == 0


def test_search_gives_the_hits_of_the_student_in_torch(
    run: Path, bundle: Bundle, pages: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    student = load_run(run).student
    photos = sorted((pages / "photo" / "ladder").iterdir())
    sketches = sorted((pages / "sketch" / "ladder").iterdir())
    model = ["--model", str(bundle.folder), *ENGINE]
    out = tmp_path / "rows.npz"
    words = ["embed", *map(str, sketches), "--as", "sketch", "-o", str(out), *model]
    assert main(words) == 0
    rows = np.load(out)["embeddings"]
    wanted, cropped = (by_torch(student, sketches, "sketch", each) for each in (WHOLE, CROPPED))
    assert (rows * wanted).sum(axis=1).min() > 0.999
    # Otherwise this could not tell one from the other.
    assert (rows * cropped).sum(axis=1).max() < 0.999

    gallery = ["--gallery", str(tmp_path / "g.sbtk")]
    assert main(["index", str(pages / "photo" / "ladder"), *gallery, *model]) == 0
    capsys.readouterr()
    scores = wanted @ by_torch(student, photos, "photo", WHOLE).T
    for sketch, row in zip(sketches[:3], scores, strict=False):
        assert main(["query", str(sketch), *gallery, *model, "-k", "40", "--json"]) == 0
        found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        by_path = {str(photo): score for photo, score in zip(photos, row, strict=True)}
        assert {hit["path"] for hit in found} == set(by_path)
        np.testing.assert_allclose(
            [hit["score"] for hit in found], [by_path[hit["path"]] for hit in found], atol=5e-3
        )
