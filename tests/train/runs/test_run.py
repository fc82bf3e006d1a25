"""Whole runs of a small backbone: their files, and that interrupted runs end the same."""

from __future__ import annotations

import csv
import json
import shutil
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from sbtk_runtime.errors import BadConfig, BadData
from sbtk_runtime.files import sha256_of_file
from sbtk_runtime.preprocess import CROPPED
from sbtk_train.compute import choose_compute
from sbtk_train.config import SbtknetRecipe, TrainConfig, make_recipe, read_config
from sbtk_train.progress import EpochDone, StepDone
from sbtk_train.runs.checkpoint import STUDENT, load_run, load_state, newest_run
from sbtk_train.runs.context import build_context
from sbtk_train.runs.evaluate import score
from sbtk_train.runs.loop import Trainer, TrainingDiverged
from sbtk_train.runs.run import new_run_folder, train
from sbtk_train.runs.sources import make_pixel_embedder
from tests.freed_memory import NEEDS_GLIBC, cleared_bytes
from tests.processes import run_python
from tests.tiny_data import polygon, quick_config, write_dataset, write_strokes

_BLOCK_BYTES = 64 << 20


def tiny_config(data: Path, name: str = "sbtk", **knobs: Any) -> TrainConfig:
    changes: dict[str, Any] = {
        "knowledge": False,
        "quadruplets": 2,
        "epochs": 2,
        "train_size_px": 32,
        "final_epochs": 0,
        "warmup_steps": 2,
        "refit": False,
    }
    return quick_config(data, make_recipe(name, **(changes | knobs)), checkpoint_minutes=0)


def run(config: TrainConfig, folder: Path, **options: Any) -> list[object]:
    folder.mkdir(exist_ok=True)
    events: list[object] = []
    train(config, folder, events.append, **options)
    return events


def test_a_run_writes_the_documented_files(data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    events = run(tiny_config(data), folder)
    epochs = [event for event in events if isinstance(event, EpochDone)]
    assert len(epochs) == 2
    assert any(isinstance(event, StepDone) and event.images_per_s > 0 for event in events)
    rows = list(csv.DictReader((folder / "metrics.csv").open()))
    assert [row["epoch"] for row in rows] == ["1", "2"]
    assert 0 <= float(rows[0]["validation_map"]) <= 1
    record = json.loads((folder / "run.json").read_text())
    assert set(record["training_classes"]).isdisjoint(record["validation_classes"])
    assert record["epochs_done"] == 2
    assert len(record["unseen_classes"]) == 21
    assert read_config(folder) == tiny_config(data)
    assert tomllib.loads((folder / "config.resolved.toml").read_text())["recipe"]["epochs"] == 2
    assert (folder / "curves.png").read_bytes()[:4] == b"\x89PNG"
    assert not list(folder.glob(".*tmp*"))


@NEEDS_GLIBC
@pytest.mark.slow
def test_a_run_keeps_memory_for_its_next_step(data: Path, tmp_path: Path) -> None:
    """In a process of its own, in which no other test has left free memory."""
    (tmp_path / "run").mkdir()
    code = (
        "import sys; from pathlib import Path; import tests.train.runs.test_run as here; "
        "print(here.cleared_in_a_run(Path(sys.argv[1]), Path(sys.argv[2])))"
    )
    # What the next epoch has already taken is not there for the block.
    assert int(run_python(code, data, tmp_path / "run")) < _BLOCK_BYTES / 2


def cleared_in_a_run(data: Path, folder: Path) -> int:
    """Return how much of a block the system clears after the second epoch."""
    cleared = []

    def listener(event: object) -> None:
        if isinstance(event, EpochDone):
            cleared.append(cleared_bytes(_BLOCK_BYTES))

    train(tiny_config(data), folder, listener)
    return cleared[1]


@pytest.mark.slow
def test_without_validation_classes_a_run_ends_with_its_curves(data: Path, tmp_path: Path) -> None:
    config = replace(tiny_config(data, selection="last", epochs=1), validation_classes=0)
    folder = tmp_path / "run"
    run(config, folder)
    record = json.loads((folder / "run.json").read_text())
    assert "validation_map" not in record["best"]
    assert len(record["training_classes"]) == 6
    assert (folder / "curves.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.slow
def test_a_trained_run_is_loaded_with_its_best_student(data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "2026-01-01-a"
    run(tiny_config(data, epochs=1), folder)
    loaded = load_run(folder)
    assert not loaded.student.training
    with torch.inference_mode():
        rows = loaded.student.embed(torch.zeros(1, 3, 64, 64))
    assert rows.shape == (1, 8)
    assert newest_run(tmp_path) == folder
    with pytest.raises(BadConfig, match="sbtk train"):
        newest_run(tmp_path / "none")
    with pytest.raises(BadConfig):
        load_run(tmp_path)


class _Killed(Exception):
    pass


@pytest.mark.parametrize(("name", "steps_before"), [("sbtk", 4), ("paper", 2)])
@pytest.mark.slow
def test_a_killed_and_resumed_run_equals_an_uninterrupted_one(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, steps_before: int
) -> None:
    config = tiny_config(data, name)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    run(config, whole)
    broken.mkdir()
    monkeypatch.setattr("sbtk_train.runs.loop._REPORT_SECONDS", 0.0)
    steps = 0

    def killed_later(event: object) -> None:
        nonlocal steps
        steps += isinstance(event, StepDone)
        if steps == steps_before:
            raise _Killed

    with pytest.raises(_Killed):
        train(config, broken, killed_later)
    run(config, broken, resume=True)
    first, first_position = load_state(whole)
    second, second_position = load_state(broken)
    assert first_position == second_position
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert (whole / STUDENT).read_bytes() == (broken / STUDENT).read_bytes()
    assert (whole / "metrics.csv").read_text() == (broken / "metrics.csv").read_text()


def test_a_run_that_is_stopped_saves_after_the_step(data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    with pytest.raises(KeyboardInterrupt):
        train(tiny_config(data), folder, lambda e: None, on_trainer=lambda t: t.stop_soon())
    assert load_state(folder)[1].step == 1


@pytest.mark.slow
def test_resuming_with_other_data_is_refused_with_both_hashes(tmp_path: Path) -> None:
    data = write_dataset(tmp_path / "data")
    folder = tmp_path / "run"
    run(tiny_config(data, epochs=1), folder)
    before = load_state(folder)[1].data_sha256
    next((data / "photo").rglob("*.jpg")).unlink()
    for extra in data.rglob("*.jpg"):
        extra.write_bytes(extra.read_bytes() + b"\0")
    with pytest.raises(BadConfig, match="training data changed") as caught:
        run(tiny_config(data, epochs=1), folder, resume=True)
    assert before[:12] in str(caught.value)


@pytest.mark.slow
@pytest.mark.parametrize("updates", [5, 6])
def test_nan_stops_a_run_and_keeps_the_last_good_checkpoint(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, updates: int
) -> None:
    monkeypatch.setattr("sbtk_train.runs.loop._REPORT_SECONDS", 0.0)
    trainers: list[Any] = []
    steps = 0

    def poison_later(event: object) -> None:
        nonlocal steps
        steps += isinstance(event, StepDone)
        if steps == updates:
            with torch.no_grad():
                trainers[0]._student.embedding.weight.fill_(float("nan"))

    config = replace(tiny_config(data), checkpoint_minutes=1000.0)
    # An epoch has three steps: the fifth is followed by another one, the sixth by a save.
    with pytest.raises(TrainingDiverged, match="nan in epoch 2"):
        train(config, tmp_path, poison_later, on_trainer=trainers.append)
    tensors, position = load_state(tmp_path)
    assert (position.epoch, position.step) == (1, 0)
    assert all(bool(torch.isfinite(value).all()) for value in tensors.values())
    load_run(tmp_path)


@pytest.mark.slow
def test_runs_depend_only_on_the_seed(data: Path, tmp_path: Path) -> None:
    config = tiny_config(data, epochs=1)
    other = replace(config, seed=1)
    for folder, one in (("a", config), ("b", config), ("c", other)):
        run(one, tmp_path / folder)
    bytes_of = {name: (tmp_path / name / STUDENT).read_bytes() for name in "abc"}
    assert bytes_of["a"] == bytes_of["b"]
    assert bytes_of["a"] != bytes_of["c"]


@pytest.mark.parametrize(
    "knobs",
    [
        {"metric": "triplet"},
        {"identity": False},
        {"attention": True},
        {"augment": True, "patience": 1},
        {"batches": "class-balanced", "metric": "triplet"},
        {"metric": "contrastive", "optimizer": "adamw", "schedule": "cosine", "average_decay": 0.9},
    ],
)
@pytest.mark.slow
def test_every_ablation_can_be_trained(data: Path, tmp_path: Path, knobs: dict[str, Any]) -> None:
    folder = tmp_path / "run"
    events = run(tiny_config(data, "paper", epochs=1, **knobs), folder)
    row = next(event.row for event in events if isinstance(event, EpochDone))
    assert ("identity" in row) == knobs.get("identity", True)
    trained = load_run(folder).config.recipe
    assert isinstance(trained, SbtknetRecipe)
    assert trained.metric == knobs.get("metric", "quadruplet")


@pytest.mark.slow
def test_the_refitted_embedding_is_kept_unless_it_is_worse(data: Path, tmp_path: Path) -> None:
    # With this seed the refitted one is better.
    config = replace(tiny_config(data, epochs=1, refit=True), seed=2)
    trainers: list[Trainer] = []
    messages = run(config, tmp_path / "run", on_trainer=trainers.append)
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    refit = record["refit"]
    assert any(f"{refit['refitted_map']:.4f} refitted" in str(text) for text in messages)
    assert refit["kept"] == (refit["refitted_map"] >= refit["trained_map"])
    # What the epochs had stays what is drawn and resumed from.
    assert trainers[0].history[0]["validation_map"] == refit["trained_map"]
    best = max(refit["refitted_map"], refit["trained_map"])
    assert record["best"]["validation_map"] == best
    student = load_run(tmp_path / "run").student
    division = build_context(config, lambda text: None).division
    found = score(
        student, division.validation, make_pixel_embedder(CROPPED, choose_compute("cpu", "fp32"), 2)
    )
    assert found["mAP@all"] == pytest.approx(best, abs=1e-6)
    once = (tmp_path / "run" / STUDENT).read_bytes()
    run(config, tmp_path / "run", resume=True)
    assert (tmp_path / "run" / STUDENT).read_bytes() == once
    assert json.loads((tmp_path / "run" / "run.json").read_text())["best"] == record["best"]


def test_run_folders_have_new_names(tmp_path: Path) -> None:
    names = {new_run_folder(tmp_path, "x").name for _ in range(3)}
    assert len(names) == 3
    assert any(name.endswith("-x") for name in names)


def test_too_few_held_out_sketches_for_dsns_rule_are_refused_at_the_start(data: Path) -> None:
    config = tiny_config(data, selection="held-out-bits")
    with pytest.raises(BadData, match="4 held-out sketches"):
        build_context(config, lambda text: None)


def test_embeddings_too_short_for_dsns_rule_are_refused_at_the_start(data: Path) -> None:
    config = replace(tiny_config(data, selection="held-out-bits"), dim=4)
    with pytest.raises(BadConfig, match=r"--dim 4(.|\n)*at least 8"):
        build_context(config, lambda text: None)


@pytest.mark.parametrize("kind", ["sketch", "photo"])
def test_a_class_whose_images_cannot_be_read_is_named_at_the_start(
    tmp_path: Path, kind: str
) -> None:
    names = [*"abcdefghijklmnop"]
    write_dataset(tmp_path, names, sketches=6, photos=2)
    lone = sorted((tmp_path / kind / "h").iterdir())
    for path in lone[2:]:
        path.unlink()
    for path in lone[:2]:
        path.write_bytes(b"not an image")
    with pytest.raises(BadData, match=rf"{kind}\w+ of the class 'h'.*can be read: .*not an image"):
        build_context(tiny_config(tmp_path), lambda text: None)


def test_a_backbone_of_another_method_is_refused(data: Path) -> None:
    with pytest.raises(BadConfig, match="--method dsn"):
        replace(tiny_config(data), backbone="se-resnet50")


@pytest.mark.slow
def test_a_run_with_further_drawings_resumes_to_the_same_student(
    data: Path, tmp_path: Path
) -> None:
    names = sorted(folder.name for folder in (data / "sketch").iterdir())
    strokes = write_strokes(
        tmp_path / "s.npz", [(name, [polygon(3 + i)]) for i, name in enumerate(names) for _ in "ab"]
    )
    config = replace(
        tiny_config(data, redrawn=0.5, augment=True, epochs=2), more_sketches=(str(strokes),)
    )
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    run(config, whole)
    trainers: list[Trainer] = []

    def stop_early(trainer: Trainer) -> None:
        trainers.append(trainer)
        trainer.stop_soon()

    stopped.mkdir()
    with pytest.raises(KeyboardInterrupt):
        train(config, stopped, lambda event: None, on_trainer=stop_early)
    train(config, stopped, lambda event: None, resume=True)
    assert read_config(stopped) == config
    assert (whole / STUDENT).read_bytes() == (stopped / STUDENT).read_bytes()


def test_a_further_class_without_a_readable_photo_is_left_out(data: Path, tmp_path: Path) -> None:
    more = write_dataset(tmp_path / "more", ("kite", "lamp"), sketches=2, photos=2)
    for photo in (more / "photo" / "kite").iterdir():
        photo.write_bytes(b"no photo")
    (more / "photo" / "lamp" / "0.jpg").write_bytes(b"no photo")
    config = replace(
        tiny_config(data),
        more_sketches=(str(more / "sketch"),),
        more_photos=(str(more / "photo"),),
    )
    told: list[str] = []
    with pytest.raises(BadData, match="3 of 8 images cannot be read"):
        build_context(config, told.append)
    for number in range(60):
        shutil.copy(
            more / "photo" / "lamp" / "1.jpg", more / "photo" / "lamp" / f"{number + 2}.jpg"
        )
    context = build_context(config, told.append)
    training = context.division.training
    assert training.classes[-1] == "lamp"
    assert "kite" not in training.classes
    assert len(context.unreadable) == 3
    assert sum("left out" in text and "kite" in text for text in told) == 3


@pytest.mark.slow
def test_without_validation_classes_the_recipe_decides_on_the_refit(
    data: Path, tmp_path: Path
) -> None:
    config = replace(
        tiny_config(data, refit=True, selection="last", epochs=1), validation_classes=0
    )
    folder = tmp_path / "run"
    run(config, folder)
    record = json.loads((folder / "run.json").read_text())
    assert record["refit"]["kept"] is True
    assert record["validation_classes"] == []
    assert record["student_sha256"] == sha256_of_file(folder / STUDENT)


@pytest.mark.parametrize(
    "changes",
    [{"feature_folder": "maps", "freeze_until": "layer3"}, {"class_map": "quickdraw-caltech"}],
)
def test_unusable_further_images_are_refused(data: Path, changes: dict[str, Any]) -> None:
    more: dict[str, Any] = {} if "class_map" in changes else {"more_photos": ("photos",)}
    with pytest.raises(BadConfig, match="further"):
        replace(tiny_config(data), **changes, **more)
