"""The model card and the facts of the run in it."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from sbtk_cli.main import main
from sbtk_export.card import CARD_NAME, collect_facts, describe_licence, describe_student
from sbtk_runtime.bundle import Bundle
from sbtk_runtime.errors import BadConfig, BadData
from sbtk_train.config import make_recipe
from sbtk_train.runs.checkpoint import TrainedRun
from tests.tiny_student import TRAINING, UNSEEN, VALIDATION


def test_the_cards_facts_are_those_of_the_run(run: TrainedRun) -> None:
    facts = collect_facts(run)
    assert facts.training_classes == TRAINING
    assert facts.validation_classes == VALIDATION
    assert facts.training["split"]["name"] == "SK-YE"
    assert facts.metrics["held_out_map"]["value"] == 0.75
    rule = facts.metrics["validation_map"]["rule"]
    assert "the 2 validation classes" in rule and rule.endswith("; used to select the epoch")
    assert "selected" not in facts.metrics["held_out_map"]["rule"]
    assert str(run.config.data) not in str(facts.training)


def test_the_metrics_of_an_average_say_how_epochs_were_selected(run: TrainedRun) -> None:
    recipe = run.record["recipe"]
    parts = [{"run": name, "seed": 0, "recipe": recipe, "epoch": 3.0} for name in ("a", "b")]
    averaged = replace(run, record={**run.record, "averaged": parts})
    metrics = collect_facts(averaged).metrics
    assert metrics["validation_map"]["rule"].endswith(
        "; of the mean of 2 students' weights; each from the epoch that its own value of this "
        "metric selected"
    )
    assert metrics["held_out_map"]["rule"].endswith("; of the mean of 2 students' weights")
    # Where the parts' recipes differ, none of them is the mean's.
    other = recipe | {"selection": "last"}
    parts[1] = parts[1] | {"recipe": other}
    facts = collect_facts(replace(run, record={**run.record, "averaged": parts}))
    assert "; 1 of them from the epoch" in facts.metrics["validation_map"]["rule"]
    assert "recipe" not in facts.training
    assert [part["recipe"] for part in facts.training["averaged"]] == [recipe, other]


@pytest.mark.parametrize(
    ("refit", "size"), [({}, "; images of 128 px"), ({"refit": {"refitted_map": 0.5}}, "")]
)
def test_a_metric_measured_on_smaller_images_says_so(
    run: TrainedRun, refit: dict[str, object], size: str
) -> None:
    """Feature maps are of images of the training size; a refit measures at the full size."""
    record = {**run.record, "validation_px": 128, **refit}
    metrics = collect_facts(replace(run, record=record)).metrics
    assert metrics["validation_map"]["rule"].endswith(f"{size}; used to select the epoch")
    assert ("px" in metrics["validation_map"]["rule"]) == bool(size)
    assert metrics["held_out_map"]["rule"].endswith("; images of 128 px")


def test_the_summary_names_the_losses_the_refit_and_its_gain(run: TrainedRun) -> None:
    contrastive = make_recipe("sbtk")
    refit = {"trained_map": 0.6641, "refitted_map": 0.7099, "kept": True}
    config = replace(run.config, recipe=contrastive, dim=16)
    facts = collect_facts(replace(run, config=config, record={**run.record, "refit": refit}))
    assert facts.training["summary"] == (
        "SBTKNet with classification loss, knowledge loss and a supervised contrastive loss in "
        "place of the paper's quadruplet loss; its embedding is refitted from the soft-label head, "
        "which raised validation mAP@all from 0.664 to 0.710."
    )
    parts = [{"refit": refit}, {"refit": refit | {"trained_map": 0.6}}]
    assert describe_student(config, {"averaged": parts}).endswith(
        "loss, the mean of 2 runs; its embedding is refitted from the soft-label head, which "
        "raised validation mAP@all of the runs from 0.664 to 0.710 and from 0.600 to 0.710."
    )
    assert "refitted" not in describe_student(config, {"refit": refit | {"kept": False}})
    paper = describe_student(replace(config, recipe=make_recipe("paper")), {})
    assert paper.endswith("knowledge loss and the domain-aware quadruplet loss.")
    sake = replace(config, method="sake", recipe=make_recipe("sake-sketchy", "sake"))
    assert describe_student(sake, {}) == "Trained with the recipe sake-sketchy."


def test_the_card_quotes_the_unseen_metric_of_the_log_with_its_protocol(
    bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "bundle"
    shutil.copytree(bundle.folder, folder)
    card = (folder / CARD_NAME).read_text()
    assert "Not measured on unseen classes." in card
    assert "they also chose the recipe and the epochs" in " ".join(card.split())
    log = tmp_path / "unseen.log"
    line = "2026-11-22T08:31:49Z\t{}\tabc\t21 unseen classes; onnxruntime int8\tmAP@all {}\n"
    log.write_text("# date\n" + line.format("other@0", 0.9))
    assert main(["export", str(folder), "--unseen-log", str(log)]) == 2
    assert f"has no mAP@all of {bundle.manifest.model_id}" in capsys.readouterr().err
    with log.open("a") as file:
        file.write(
            line.format(bundle.manifest.model_id, 0.4)
            + line.format(bundle.manifest.model_id, 0.5237)
        )
    assert main(["export", str(folder), "--unseen-log", str(log)]) == 0
    assert "mAP@all 0.5237 on unseen classes" in capsys.readouterr().out
    marked = Bundle.open(folder)
    marked.verify()
    assert marked.manifest.model_id == bundle.manifest.model_id
    card = (folder / CARD_NAME).read_text()
    assert "Not measured on unseen classes." not in card
    assert "value: 0.5237" in card
    assert "mAP@all of the 21 unseen classes; onnxruntime int8; measured 2026-11-22" in card


@pytest.mark.parametrize("key", ["training_classes", "validation_classes"])
def test_an_unseen_class_among_the_seen_ones_is_refused(run: TrainedRun, key: str) -> None:
    """A record that was edited by hand must not open the way to the unseen classes."""
    record = {**run.record, key: [*run.record[key], UNSEEN.upper()]}
    with pytest.raises(BadData, match="lists WINDOW as seen"):
        collect_facts(replace(run, record=record))


@pytest.mark.parametrize("value", [None, "bars", [1, 2]])
def test_a_run_without_its_class_lists_is_refused(run: TrainedRun, value: object) -> None:
    record = {**run.record, "training_classes": value}
    with pytest.raises(BadConfig, match="training_classes"):
        collect_facts(replace(run, record=record))


def test_a_run_without_validation_has_no_metrics(run: TrainedRun) -> None:
    record = {key: value for key, value in run.record.items() if key != "best"}
    assert collect_facts(replace(run, record=record)).metrics == {}


@pytest.mark.parametrize(
    ("sources", "words"),
    [
        (["sketchy125"], "Research use only"),
        (["my-photos", "resnet50-v1-imagenet-fp16.safetensors"], "ImageNet"),
        (["QuickDraw"], "CC BY 4.0"),
        (["my-photos"], "Not known"),
        ([""], "not recorded"),
    ],
)
def test_the_licence_follows_from_the_training_data(sources: list[str], words: str) -> None:
    assert words in describe_licence(sources)


def test_training_on_free_drawings_alone_is_not_research_only() -> None:
    assert "Research use only" not in describe_licence(["quickdraw"])
