"""A run resumes in another place and for longer, and a new one starts from an old model."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sbtk_cli.main import main
from sbtk_train.config import read_config
from sbtk_train.runs.checkpoint import RECORD, STUDENT, load_state
from tests.tiny_data import write_dataset
from tests.train.models.test_backbone import resnet18_tensors

pytestmark = pytest.mark.slow

TINY = """
    --backbone resnet18 --size 32 --final-epochs 0 --quadruplets 2 --validation-classes 2
    --precision fp32 --threads 1 --quiet --no-refit
""".split()  # noqa: SIM905


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with data, weights, a split file, and a run that named all relatively."""
    place = tmp_path_factory.mktemp("place")
    write_dataset(place / "data")
    save_file(resnet18_tensors(), place / "w.safetensors", {"backbone": "resnet18"})
    (place / "unseen.txt").write_text("Ball\n")
    before = Path.cwd()
    os.chdir(place)
    try:
        words = ["--weights", "w.safetensors", "--split", "unseen.txt", "--no-knowledge"]
        assert (
            main(["train", "data", *TINY, *words, "--dim", "8", "--epochs", "1", "--out", "run"])
            == 0
        )
    finally:
        os.chdir(before)
    return place


def test_paths_are_stored_as_absolute_and_a_finished_run_says_so_from_anywhere(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = read_config(place / "run")
    assert config.data == str(place / "data")
    assert config.weights == str(place / "w.safetensors")
    assert config.split == str(place / "unseen.txt")
    shutil.copytree(place / "run", tmp_path / "copy")
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    assert main(["train", "--resume", "copy"]) == 0
    assert "all of its epochs are done" in capsys.readouterr().err
    assert main(["train", "--resume", "copy", "--epochs", "2"]) == 0
    assert load_state(tmp_path / "copy")[1].epoch == 2
    assert read_config(tmp_path / "copy").recipe.epochs == 2
    assert json.loads((tmp_path / "copy" / RECORD).read_text())["epochs_done"] == 2
    capsys.readouterr()
    assert main(["train", "--resume", "copy", "--epochs", "1"]) == 2
    assert "--epochs 1, but the run has finished 2" in capsys.readouterr().err


def test_moved_data_is_accepted_and_other_data_refused(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(place, moved)
    run = moved / "run"
    text = (run / "config.resolved.toml").read_text()
    (run / "config.resolved.toml").write_text(text.replace(str(place), str(tmp_path / "deleted")))
    assert main(["train", "--resume", str(run)]) == 2
    shown = capsys.readouterr().err
    assert f"sbtk train --resume {run} --weights FILE" in shown
    words = ["--weights", str(moved / "w.safetensors"), "--split", str(moved / "unseen.txt")]
    assert main(["train", "--resume", str(run), *words]) == 2
    assert f"sbtk train DATA --resume {run}" in capsys.readouterr().err
    others = write_dataset(tmp_path / "others", photos=5)
    assert main(["train", str(others), "--resume", str(run), *words]) == 2
    shown = capsys.readouterr().err
    assert f"DATA {others}, but the run was started with {tmp_path / 'deleted' / 'data'}" in shown
    assert "the training data changed" in shown
    save_file(resnet18_tensors(), moved / "other.safetensors", {"backbone": "resnet18"})
    other = ["--weights", str(moved / "other.safetensors")]
    assert main(["train", str(moved / "data"), "--resume", str(run), *other]) == 2
    assert "is not the file that the run was started with" in capsys.readouterr().err
    assert main(["train", str(moved / "data"), "--resume", str(run), *words]) == 0
    assert read_config(run).data == str(moved / "data")
    assert main(["train", "--resume", str(run)]) == 0


def test_a_new_run_starts_from_the_model_of_an_old_one(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = write_dataset(tmp_path / "more", classes=["ball", "owl", "pig", "rug", "sun", "tie"])
    words = ["train", str(more), *TINY[:-2], "--no-refit", "--split", "random:1:0"]
    words += ["--learning-rate", "1e-12", "--epochs", "1", "--out", str(tmp_path / "run")]
    assert main([*words, "--weights", str(place / "run"), "--dim", "16"]) == 1
    assert "next: --dim 8" in capsys.readouterr().err
    assert main([*words, "--weights", str(place / "run")]) == 0
    shown = capsys.readouterr().err
    assert f"starting from the model in {place / 'run' / STUDENT}" in shown
    assert "the classification head is new" in shown
    config = read_config(tmp_path / "run")
    assert (config.dim, config.backbone) == (8, "resnet18")
    assert config.recipe.knowledge  # type: ignore[attr-defined]
    old, new = load_file(place / "run" / STUDENT), load_file(tmp_path / "run" / STUDENT)
    assert torch.allclose(old["embedding.weight"], new["embedding.weight"], atol=1e-4)


def test_an_embedding_longer_than_the_logits_is_refused_with_the_refit_and_trains_without(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["train", str(place / "data"), *TINY[:-1], "--epochs", "1"]
    words += ["--weights", str(place / "w.safetensors"), "--dim", "1024", "--no-knowledge"]
    assert main([*words, "--refit", "--out", str(tmp_path / "refused")]) == 2
    assert "--no-refit, or --dim 1000" in capsys.readouterr().err
    assert not (tmp_path / "refused").exists()
    assert main([*words, "--no-refit", "--out", str(tmp_path / "run")]) == 0
    assert load_file(tmp_path / "run" / STUDENT)["embedding.weight"].shape == (1024, 128)


def test_moved_further_images_and_class_maps_are_accepted(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    old = tmp_path / "old"
    old.mkdir()
    more = write_dataset(old / "more", classes=("pail", "lamp"))
    (old / "map.toml").write_text('[classes]\npail = "crate"\n')
    monkeypatch.chdir(old)
    words = ["--weights", "none", "--split", "unseen.txt", "--dim", "8", "--epochs", "1"]
    shutil.copy(place / "unseen.txt", old)
    words += ["--more-sketches", "more/sketch", "--more-photos", "more/photo"]
    words += ["--class-map", "map.toml", "--out", "run"]
    assert main(["train", str(place / "data"), *TINY, *words]) == 0
    assert read_config(old / "run").class_map == str(old / "map.toml")
    monkeypatch.chdir(tmp_path)
    assert main(["train", "--resume", "old/run", "--epochs", "2"]) == 0
    old = old.rename(tmp_path / "new")
    capsys.readouterr()
    assert main(["train", "--resume", "new/run"]) == 2
    shown = capsys.readouterr().err
    assert "the run's class map is no longer in" in shown
    assert "next: sbtk train --resume new/run --class-map FILE" in shown
    words = ["train", "--resume", "new/run", "--split", "new/unseen.txt"]
    words += ["--more-sketches", "new/more/sketch", "--more-photos", "new/more/photo"]
    (tmp_path / "other.toml").write_text('[classes]\npail = ""\n')
    assert main([*words, "--class-map", "other.toml"]) == 2
    assert "is not the file that the run was started with" in capsys.readouterr().err
    assert main([*words, "--class-map", "new/map.toml"]) == 0
    config = read_config(tmp_path / "new" / "run")
    assert config.class_map == str(tmp_path / "new" / "map.toml")
    assert config.more_photos == (str(more / "photo").replace("/old/", "/new/"),)
    assert load_state(tmp_path / "new" / "run")[1].epoch == 2
