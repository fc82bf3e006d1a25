"""`--recipe paper`: new layers, all seen classes, and an epoch selected by held-out images."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from sbtk_cli.main import main
from sbtk_export.card import collect_facts
from sbtk_runtime.preprocess import CROPPED, WHOLE
from sbtk_train.batches.sampler import make_generator
from sbtk_train.config import (
    CONFIG_NAME,
    RECIPES,
    SbtknetRecipe,
    TrainConfig,
    make_recipe,
    parse_setting,
    read_config,
)
from sbtk_train.data.dataset import read_dataset
from sbtk_train.data.splits import Split, divide
from sbtk_train.models.backbone import build_trunk
from sbtk_train.models.student import SbtknetStudent, Student
from sbtk_train.runs.checkpoint import LAST, load_run, load_state
from sbtk_train.runs.context import build_context
from tests.tiny_data import CLASSES, quick_config

pytestmark = pytest.mark.slow

SMALL = "--backbone resnet18 --size 32 --dim 8 --precision fp32 --threads 1".split()  # noqa: SIM905


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    trunk, channels = build_trunk("resnet18")
    generator = make_generator(1)
    head = {"fc.weight": torch.randn(1000, channels, generator=generator) / 10}
    path = tmp_path_factory.mktemp("weights") / "resnet18.safetensors"
    tensors = {**trunk.state_dict(), **head, "fc.bias": torch.zeros(1000)}
    save_file(tensors, path, {"backbone": "resnet18"})
    return path


@pytest.fixture(scope="module")
def runs(data: Path, weights: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ...]:
    """Two runs of the recipe, which differ in the seed."""
    root = tmp_path_factory.mktemp("runs")
    words = ["train", str(data), *SMALL, "--recipe", "paper", "--weights", str(weights)]
    folders = (root / "a", root / "b")
    for seed, folder in enumerate(folders):
        cache = pytest.MonkeyPatch()
        cache.setenv("XDG_CACHE_HOME", str(root / "cache"))
        named = ["--epochs", "1", "--quadruplets", "2", "--seed", str(seed), "--out", str(folder)]
        assert main([*words, *named]) == 0
        cache.undo()
    return folders


def test_the_hyperparameters_are_those_of_the_paper() -> None:
    found = make_recipe("paper")
    assert isinstance(found, SbtknetRecipe)
    assert (found.optimizer, found.learning_rate, found.momentum) == ("sgd", 1e-4, 0.9)
    assert (found.weight_decay, found.schedule, found.step_epochs) == (5e-4, "step", 10)
    assert (found.epochs, found.patience, found.selection) == (25, 5, "held-out-accuracy")
    assert (found.metric, found.margin, found.quadruplets) == ("quadruplet", 0.2, 16)
    assert (found.batches, found.identity, found.knowledge) == ("quadruplets", True, True)
    assert (found.attention, found.refit, found.augment) == (False, False, False)
    assert (found.average_decay, found.head_rate_factor, found.warmup_steps) == (0.0, 1.0, 0)
    assert found.preprocessing == WHOLE


def test_only_the_papers_recipe_shows_whole_sketches() -> None:
    named = [recipe for recipes in RECIPES.values() for recipe in recipes.values()]
    assert {recipe.name for recipe in named if not recipe.ink_crop} == {"paper"}
    assert parse_setting("ink_crop=false").recipe == {"ink_crop": False}


def test_a_run_from_before_whole_sketches_has_cropped_ones(tmp_path: Path) -> None:
    config = TrainConfig("data", "SK-YE", make_recipe("paper", ink_crop=True))
    config.write(tmp_path)
    file = tmp_path / CONFIG_NAME
    lines = file.read_text().splitlines(keepends=True)
    assert "ink_crop = true\n" in lines
    file.write_text("".join(line for line in lines if not line.startswith("ink_crop")))
    assert read_config(tmp_path).recipe.preprocessing == CROPPED


@pytest.mark.parametrize("name", ["paper", "sbtk"])
def test_paper_layers_start_at_random_and_default_ones_from_the_classifier(
    name: str, data: Path, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    config = quick_config(data, make_recipe(name, knowledge=False), weights=str(weights))
    student = build_context(config, lambda text: None).student
    assert isinstance(student, SbtknetStudent)
    classifier = load_file(weights)["fc.weight"]
    assert torch.equal(student.soft.weight.detach().cpu(), classifier) == (name == "sbtk")
    assert bool((student.embedding.bias == 0).all()) == (name == "sbtk")


def test_held_out_photos_are_of_every_class_and_not_trained_on(data: Path) -> None:
    images = read_dataset(data)
    parts = [
        divide(
            images,
            Split("none", ("nothing",)),
            seed=0,
            validation_classes=0,
            held_out_share=0.25,
            is_holding_out_photos=is_holding_out,
        )
        for is_holding_out in (True, False)
    ]
    assert parts[1].held_out_photos is None
    assert parts[0].training.sketches == parts[1].training.sketches
    held = parts[0].held_out_photos
    assert held is not None
    assert held.sketches == ()
    assert np.bincount(held.photo_labels).tolist() == [1] * len(CLASSES)
    assert not set(held.photos) & set(parts[0].training.photos)
    assert {*held.photos, *parts[0].training.photos} == set(images.photos)
    assert [path.parent.name for path in held.photos] == list(CLASSES)


def test_a_run_trains_on_all_seen_classes_and_is_selected_by_held_out_images(
    runs: tuple[Path, ...],
) -> None:
    record = json.loads((runs[0] / "run.json").read_text())
    assert record["validation_classes"] == []
    assert record["training_classes"] == list(CLASSES)
    assert (record["held_out_sketches"], record["held_out_photos"]) == (6, 6)
    # Twelve images: six sketches and six photos.
    assert (record["best"]["held_out_accuracy"] * 12) % 1 == pytest.approx(0, abs=1e-6)
    assert "validation_map" not in record["best"]
    assert read_config(runs[0]).validation_classes == 0
    rule = collect_facts(load_run(runs[0])).metrics["held_out_accuracy"]["rule"]
    assert "held-out sketches and photos" in rule
    assert "used to select the epoch" in rule


def test_runs_without_validation_classes_are_averaged(
    runs: tuple[Path, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mean = tmp_path / "mean"
    assert main(["average", *map(str, runs), "--out", str(mean), "--threads", "1"]) == 0
    shown = capsys.readouterr().err
    assert "accuracy on held-out images" in shown
    record = json.loads((mean / "run.json").read_text())
    assert 0 <= record["best"]["held_out_accuracy"] <= 1
    assert all("held_out_accuracy" in part for part in record["averaged"])
    parts = [load_run(folder).student.state_dict()["soft.weight"] for folder in runs]
    found = load_run(mean).student.state_dict()["soft.weight"]
    torch.testing.assert_close(found, (parts[0] + parts[1]) / 2)


def test_the_names_in_a_checkpoint_have_not_changed(data: Path, tmp_path: Path) -> None:
    """Runs of every version must resume: an average is saved with the student, under its keys."""
    words = ["train", str(data), *SMALL, "--weights", "none", "--validation-classes", "2"]
    words += ["--no-refit", "--final-epochs", "0", "--quadruplets", "2", "--epochs", "1"]
    assert main([*words, "--out", str(tmp_path / "run")]) == 0
    tensors, position = load_state(tmp_path / "run")
    student = load_run(tmp_path / "run").student
    assert isinstance(student, Student)
    prefixes = {name.partition(".")[0] for name in tensors}
    assert prefixes == {"student", "average", "optimizer"}
    for prefix in ("student", "average"):
        names = {n.partition(".")[2] for n in tensors if n.startswith(f"{prefix}.")}
        assert names == set(student.state_dict())
    assert position.updates > 0
    assert (tmp_path / "run" / LAST).is_file()
