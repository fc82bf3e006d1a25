"""The refit at the end of a run, also with feature maps and without validation classes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from sbtk_runtime.preprocess import CROPPED
from sbtk_train.compute import choose_compute
from sbtk_train.runs.checkpoint import RECORD, STUDENT, load_run
from sbtk_train.runs.context import build_context
from sbtk_train.runs.evaluate import score
from sbtk_train.runs.loop import Trainer
from sbtk_train.runs.run import train
from sbtk_train.runs.sources import make_pixel_embedder
from tests.train.runs.test_run import run, tiny_config

pytestmark = pytest.mark.slow


def test_a_run_on_stored_feature_maps_is_refitted_on_the_images(data: Path, tmp_path: Path) -> None:
    config = replace(
        tiny_config(data, epochs=1, refit=True),
        freeze_until="layer4",
        feature_folder=str(tmp_path / "maps"),
        feature_variants=2,
        seed=2,
    )
    folder = tmp_path / "run"
    messages = run(config, folder)
    record = json.loads((folder / RECORD).read_text())
    refit = record["refit"]
    assert refit["kept"] == (refit["refitted_map"] >= refit["trained_map"])
    assert any(f"{refit['refitted_map']:.4f} refitted" in str(text) for text in messages)
    # The figure is of the student that is kept, at the size that production has.
    division = build_context(config, lambda text: None).division
    embed = make_pixel_embedder(CROPPED, choose_compute("cpu", "fp32"), 2)
    found = score(load_run(folder).student, division.validation, embed)
    assert record["best"]["validation_map"] == pytest.approx(found["mAP@all"], abs=1e-6)
    student = (folder / STUDENT).read_bytes()
    run(config, folder, resume=True)
    assert (folder / STUDENT).read_bytes() == student
    again = json.loads((folder / RECORD).read_text())
    assert (again["refit"], again["best"]) == (refit, record["best"])


def test_a_refit_that_is_stopped_is_made_when_the_run_is_resumed(
    data: Path, tmp_path: Path
) -> None:
    config = replace(tiny_config(data, epochs=1, refit=True, selection="last"), seed=2)
    run(config, tmp_path / "whole")
    trainers: list[Trainer] = []

    def stop_in_refit(event: object) -> None:
        if "refitting" in str(event):
            trainers[0].stop_soon()

    (tmp_path / "run").mkdir()
    with pytest.raises(KeyboardInterrupt):
        train(config, tmp_path / "run", stop_in_refit, on_trainer=trainers.append)
    assert "refit" not in json.loads((tmp_path / "run" / RECORD).read_text())
    run(config, tmp_path / "run", resume=True)
    whole, resumed = (tmp_path / name / STUDENT for name in ("whole", "run"))
    assert resumed.read_bytes() == whole.read_bytes()


def test_without_validation_classes_a_run_says_that_the_refit_was_not_compared(
    data: Path, tmp_path: Path
) -> None:
    config = tiny_config(data, epochs=1, refit=True, selection="last")
    messages = run(replace(config, validation_classes=0), tmp_path / "run")
    assert any("refitting the embedding" in str(text) for text in messages)
    refit = json.loads((tmp_path / "run" / RECORD).read_text())["refit"]
    assert refit["kept"]
    assert "validation classes" in refit["reason"]
