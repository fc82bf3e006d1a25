"""Averages of runs: weights, batch norms, records and refusals."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import nn

from sbtk_cli.main import main
from sbtk_export.card import collect_facts
from sbtk_runtime.errors import BadConfig, BadData
from sbtk_runtime.preprocess import CROPPED
from sbtk_train.compute import Compute
from sbtk_train.config import CONFIG_NAME, TrainConfig
from sbtk_train.data.dataset import read_dataset
from sbtk_train.models.student import Student
from sbtk_train.runs.average import average_runs, measure_batch_norms
from sbtk_train.runs.checkpoint import RECORD, STUDENT, load_run
from sbtk_train.runs.run import train
from tests.tiny_data import write_dataset
from tests.train.runs.test_run import tiny_config

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def runs(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two runs of one configuration with seeds 0 and 1."""
    root = tmp_path_factory.mktemp("runs")
    return run(config_of(data), root / "a"), run(replace(config_of(data), seed=1), root / "b")


def config_of(data: Path, **knobs: Any) -> TrainConfig:
    return tiny_config(data, **({"epochs": 1, "refit": True} | knobs))


def run(config: TrainConfig, folder: Path) -> Path:
    folder.mkdir()
    train(config, folder, lambda event: None)
    return folder


def averaged(folders: tuple[Path, ...], target: Path) -> tuple[dict[str, Any], list[str]]:
    target.mkdir()
    messages: list[str] = []
    return average_runs(folders, target, messages.append, threads=1), messages


class Mean(NamedTuple):
    """The mean of both runs, as it was written and reported."""

    folder: Path
    record: dict[str, Any]
    messages: list[str]


@pytest.fixture(scope="module")
def mean_run(runs: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Mean:
    folder = tmp_path_factory.mktemp("mean") / "mean"
    return Mean(folder, *averaged(runs, folder))


def test_weights_are_averaged_and_batch_norms_measured_again(
    runs: tuple[Path, Path], mean_run: Mean
) -> None:
    parts = [load_run(folder).student.state_dict() for folder in runs]
    mean = load_run(mean_run.folder).student.state_dict()
    for name in ("trunk.conv1.weight", "trunk.layer4.0.conv2.weight", "soft.weight"):
        assert not torch.equal(parts[0][name], parts[1][name])
        torch.testing.assert_close(mean[name], (parts[0][name] + parts[1][name]) / 2)
    norm = "trunk.bn1.running_mean"
    assert not torch.allclose(mean[norm], (parts[0][norm] + parts[1][norm]) / 2)


def test_the_record_names_the_parts_and_exports_as_a_run(
    runs: tuple[Path, Path], mean_run: Mean
) -> None:
    folder, record, messages = mean_run
    assert json.loads((folder / RECORD).read_text()) == record
    assert record["seed"] == [0, 1]
    assert [part["student_sha256"] for part in record["averaged"]] == [
        load_run(part).record["student_sha256"] for part in runs
    ]
    assert any(f"{record['best']['validation_map']:.4f}" in text for text in messages)
    assert [part["run"] for part in record["averaged"]] == ["a", "b"]
    assert [part["epoch"] for part in record["averaged"]] == [1, 1]
    facts = collect_facts(load_run(folder))
    assert facts.metrics["validation_map"]["value"] == record["best"]["validation_map"]
    # A common recipe is listed once; values of only one run are listed with that run.
    assert facts.training["recipe"]["name"] == "sbtk"
    assert "epochs_done" not in facts.training
    for listed, part in zip(facts.training["averaged"], record["averaged"], strict=True):
        assert listed == {key: value for key, value in part.items() if key != "recipe"}


def test_an_average_of_averages_says_so(
    runs: tuple[Path, Path], mean_run: Mean, tmp_path: Path
) -> None:
    record, _ = averaged((mean_run.folder, runs[0]), tmp_path / "mean")
    assert [part.get("mean_of") for part in record["averaged"]] == [2, None]
    assert [part["epoch"] for part in record["averaged"]] == [None, 1]
    rule = collect_facts(load_run(tmp_path / "mean")).metrics["validation_map"]["rule"]
    assert "mean of 2 students' weights; 1 of them from the epoch" in rule


class Plain(Student):
    """One batch norm over the pixels themselves."""

    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.norm = nn.BatchNorm2d(3, momentum=0.1)
        self.trunk = nn.Sequential(self.norm)

    dim = property(lambda self: 3)

    def start_from(self, classifier: object) -> None: ...

    def project(self, feature: torch.Tensor) -> torch.Tensor:
        return feature

    def logits(
        self, feature: torch.Tensor, projected: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return feature, feature

    def feature(
        self, inputs: torch.Tensor, domains: torch.Tensor | None = None, begin: str = ""
    ) -> torch.Tensor:
        assert domains is not None
        self.seen = getattr(self, "seen", [])
        self.seen.append((inputs, domains))
        return torch.as_tensor(self.norm(inputs).mean(dim=(2, 3)))


def mean_by_norm(batch: torch.Tensor) -> torch.Tensor:
    """Return a batch's means as a batch norm adds them up: millions of values in float32."""
    norm = nn.BatchNorm2d(3, momentum=1.0)
    with torch.inference_mode():
        norm(batch)
    assert norm.running_mean is not None
    return norm.running_mean


def test_batch_norms_are_the_plain_mean_over_batches_of_both_domains(tmp_path: Path) -> None:
    data = write_dataset(tmp_path, sketches=7, photos=16)
    student = Plain()
    student.norm.running_mean = torch.full((3,), 99.0)
    measure_batch_norms(
        student, read_dataset(data), CROPPED, Compute(torch.device("cpu"), "fp32"), 2
    )
    batches = [inputs for inputs, _ in student.seen]
    assert len(batches) == 3  # of 32 among 96 photos
    assert all((domains == 0).sum() == (domains == 1).sum() > 0 for _, domains in student.seen)
    means = torch.stack([mean_by_norm(batch) for batch in batches]).mean(0)
    assert student.norm.running_mean is not None
    np.testing.assert_allclose(student.norm.running_mean, means, rtol=1e-5)
    assert student.norm.momentum == 0.1
    assert not student.norm.training


def test_incompatible_runs_are_refused(data: Path, runs: tuple[Path, Path], tmp_path: Path) -> None:
    wider = run(replace(config_of(data, refit=False), dim=16), tmp_path / "wider")
    with pytest.raises(BadConfig, match="differ in dim"):
        averaged((runs[0], wider), tmp_path / "mixed")
    with pytest.raises(BadConfig, match="one run"):
        averaged(runs[:1], tmp_path / "single")
    copied = Path(shutil.copytree(runs[0], tmp_path / "copied"))
    with pytest.raises(BadConfig, match=r"copied and .*a have the same student"):
        averaged((*runs, copied), tmp_path / "twice")
    assert not any((tmp_path / "mixed").iterdir())
    whole = Path(shutil.copytree(runs[1], tmp_path / "whole"))
    config = (whole / CONFIG_NAME).read_text().replace("ink_crop = true", "ink_crop = false")
    (whole / CONFIG_NAME).write_text(config)
    with pytest.raises(BadConfig, match="differ in ink crop"):
        averaged((runs[0], whole), tmp_path / "prepared")


def test_runs_with_other_further_images_are_averaged(
    data: Path, runs: tuple[Path, Path], tmp_path: Path
) -> None:
    more = write_dataset(tmp_path / "quickdraw", sketches=2, photos=0) / "sketch"
    config = replace(config_of(data, refit=False), more_sketches=(str(more),))
    wider = run(config, tmp_path / "wider")
    record, messages = averaged((runs[0], wider), tmp_path / "mean")
    assert record["further_data"] == ["quickdraw/sketch"]
    assert record["training_sketches"] > load_run(runs[0]).record["training_sketches"]
    assert [part["run"] for part in record["averaged"]] == ["a", "wider"]
    assert messages[-1].startswith("validation mAP@all ")
    facts = collect_facts(load_run(tmp_path / "mean"))
    assert facts.training["further_data"] == ["quickdraw/sketch"]
    assert "Quick, Draw! drawings by Google, CC BY 4.0" in facts.training["licence"]


def test_runs_selected_by_other_metrics_are_compared_by_one_that_both_have(
    data: Path, tmp_path: Path
) -> None:
    config = replace(config_of(data, selection="held-out-accuracy"), validation_classes=0)
    last = config_of(data, selection="last")
    first = run(config, tmp_path / "first")
    second = run(replace(last, validation_classes=0, seed=1), tmp_path / "second")
    record, messages = averaged((first, second), tmp_path / "mean")
    assert messages[-1].startswith("mAP@all of held-out sketches ")
    assert all(part["held_out_map"] > 0 for part in record["averaged"])


def test_runs_on_different_data_sets_are_refused(runs: tuple[Path, Path], tmp_path: Path) -> None:
    other = write_dataset(tmp_path / "other", photos=5)
    foreign = run(config_of(other, refit=False), tmp_path / "foreign")
    with pytest.raises(BadConfig, match=r"a and .*foreign were trained on different data sets"):
        averaged((runs[0], foreign), tmp_path / "mixed")


def test_changed_data_is_refused(data: Path, runs: tuple[Path, Path], tmp_path: Path) -> None:
    grown = write_dataset(tmp_path / "data", photos=5)
    moved = tuple(Path(shutil.copytree(each, tmp_path / each.name)) for each in runs)
    for folder in moved:
        config = folder / CONFIG_NAME
        config.write_text(config.read_text().replace(str(data), str(grown)))
    with pytest.raises(BadData, match="not what the runs were trained on"):
        averaged(moved, tmp_path / "mean")


def test_the_command_prints_the_new_run_and_keeps_an_old_one(
    runs: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "mean"
    assert main(["average", *map(str, runs), "--out", str(target), "--threads", "1"]) == 0
    printed = capsys.readouterr()
    assert printed.out == f"{target}\n"
    assert f"next: sbtk export {target}" in printed.err
    before = (target / STUDENT).read_bytes()
    assert main(["average", *map(str, runs), "--out", str(target)]) == 2
    assert "exists and is not empty" in capsys.readouterr().err
    assert (target / STUDENT).read_bytes() == before


def test_json_has_the_metrics_and_the_runs(
    runs: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "mean"
    words = ["average", *map(str, runs), "--out", str(target), "--threads", "1", "--json"]
    assert main(words) == 0
    (line,) = capsys.readouterr().out.splitlines()
    shown = json.loads(line, parse_constant=pytest.fail)
    record = json.loads((target / RECORD).read_text())
    assert shown["folder"] == str(target)
    assert shown["best"]["validation_map"] == record["best"]["validation_map"]
    assert [part["run"] for part in shown["averaged"]] == ["a", "b"]
    assert shown["student_sha256"] == record["student_sha256"]


def test_a_refused_average_leaves_no_folder(
    runs: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "mean"
    assert main(["average", str(runs[0]), "--out", str(target)]) == 2
    assert "next: sbtk average RUN RUN" in capsys.readouterr().err
    assert not target.exists()
