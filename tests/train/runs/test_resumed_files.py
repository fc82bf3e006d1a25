"""A resumed run compares the files that it depends on with those of its start."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from sbtk_runtime.errors import BadConfig, BadModel
from sbtk_train.config import CONFIG_NAME, SbtknetRecipe, make_recipe
from sbtk_train.data.dataset import read_dataset
from sbtk_train.objectives.sbtknet import SbtknetObjective
from sbtk_train.progress import StepDone
from sbtk_train.runs.checkpoint import LAST, RECORD, STUDENT, load_state
from sbtk_train.runs.run import train
from tests.tiny_data import polygon, write_dataset, write_strokes
from tests.train.runs.test_run import run, tiny_config

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with `data`, and the runs `one` and `other` of one epoch."""
    place = tmp_path_factory.mktemp("trained")
    data = write_dataset(place / "data")
    run(tiny_config(data, epochs=1), place / "one")
    run(replace(tiny_config(data, epochs=1), seed=9), place / "other")
    return place


@pytest.fixture
def place(trained: Path, tmp_path: Path) -> Path:
    """Return a copy of `trained`."""
    return shutil.copytree(trained, tmp_path / "place")


def resume(place: Path) -> list[object]:
    return run(tiny_config(place / "data", epochs=1), place / "one", resume=True)


@pytest.mark.parametrize("kind", ["swapped", "cut off", "missing"])
def test_the_best_student_is_written_again_from_its_checkpoint(place: Path, kind: str) -> None:
    student = place / "one" / STUDENT
    content = student.read_bytes()
    student.unlink()
    if kind != "missing":
        other = (place / "other" / STUDENT).read_bytes()
        student.write_bytes(other if kind == "swapped" else content[:-1000])
    assert f"{student} is not the student that this run saved: written from {LAST}" in resume(place)
    assert student.read_bytes() == content


def test_another_student_than_the_runs_own_is_refused_within_an_epoch(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sbtk_train.runs.loop._REPORT_SECONDS", 0.0)
    config, folder = tiny_config(place / "data"), place / "longer"
    folder.mkdir()

    def stop(event: object) -> None:
        if isinstance(event, StepDone) and (event.epoch, event.step) == (2, 2):
            raise InterruptedError

    with pytest.raises(InterruptedError):
        train(config, folder, stop)
    assert load_state(folder)[1].step > 0
    shutil.copy(place / "other" / STUDENT, folder / STUDENT)
    with pytest.raises(BadModel, match="is not the student that this run saved: SHA-256"):
        run(config, folder, resume=True)


def _swap_checkpoint(place: Path) -> None:
    shutil.copy(place / "other" / LAST, place / "one" / LAST)


def _edit_config(place: Path) -> None:
    file = place / "one" / CONFIG_NAME
    text = file.read_text()
    assert "seed = 0\n" in text
    file.write_text(text.replace("\nseed = 0\n", "\nseed = 1\n"))


@pytest.mark.parametrize("change", [_swap_checkpoint, _edit_config])
def test_a_checkpoint_of_another_configuration_is_refused(
    place: Path, change: Callable[[Path], None]
) -> None:
    change(place)
    with pytest.raises(BadConfig, match=f"is not a checkpoint of the run in {CONFIG_NAME}"):
        resume(place)


def test_a_missing_record_is_refused(place: Path) -> None:
    (place / "one" / RECORD).unlink()
    with pytest.raises(BadConfig, match=RECORD):
        resume(place)


def test_changed_validation_images_are_refused(place: Path) -> None:
    for photo in (place / "data" / "photo").rglob("*.jpg"):
        if photo.parent.name in _validation_classes(place):
            photo.write_bytes(photo.read_bytes() + b"\0")
    with pytest.raises(BadConfig, match="the validation or held-out data changed"):
        resume(place)


def test_a_changed_stroke_file_is_named(trained: Path, tmp_path: Path) -> None:
    names = sorted(folder.name for folder in (trained / "data" / "sketch").iterdir())
    drawings = [(name, [polygon(3 + corners)]) for corners, name in enumerate(names)]
    strokes = write_strokes(tmp_path / "s.npz", drawings)
    config = replace(tiny_config(trained / "data", epochs=1), more_sketches=(str(strokes),))
    run(config, tmp_path / "run")
    write_strokes(strokes, [(name, [*parts, polygon(9)]) for name, parts in drawings])
    with pytest.raises(BadConfig, match=r"the training data changed since .*s\.npz"):
        run(config, tmp_path / "run", resume=True)


def test_a_checkpoint_that_is_not_finite_says_that_the_run_diverged(place: Path) -> None:
    path = place / "one" / LAST
    tensors, _ = load_state(place / "one")
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors["student.embedding.weight"][0, 0] = torch.nan
    save_file(tensors, path, metadata)
    with pytest.raises(BadModel, match="diverged before it was saved") as refused:
        resume(place)
    assert "start a new run with --learning-rate below" in refused.value.next_step


def test_other_soft_labels_are_refused_and_rounding_is_not(trained: Path) -> None:
    recipe = make_recipe("sbtk")
    assert isinstance(recipe, SbtknetRecipe)
    data = read_dataset(trained / "data")
    labels = torch.eye(1000)[: len(data.classes)]
    state = SbtknetObjective(recipe, data, 0, labels).state()
    rounded = SbtknetObjective(recipe, data, 0, labels + 0.001)
    rounded.load_state(state)
    assert rounded.soft_labels is not None
    assert torch.equal(rounded.soft_labels, labels)
    with pytest.raises(BadConfig, match="the soft labels differ"):
        SbtknetObjective(recipe, data, 0, labels.flip(0)).load_state(state)
    # Earlier versions did not save them.
    SbtknetObjective(recipe, data, 0, labels).load_state({})


def _validation_classes(place: Path) -> list[str]:
    from sbtk_runtime.files import read_json_object

    names = read_json_object(place / "one" / RECORD, BadConfig)["validation_classes"]
    assert isinstance(names, list)
    return names
