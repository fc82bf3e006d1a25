"""What a bundle tells about the run it comes from."""

from __future__ import annotations

from dataclasses import replace

import pytest

from sbtk_export.run_facts import facts_from_run, licence_text
from sbtk_runtime.errors import BadConfig, BadData
from sbtk_train.runs.checkpoint import TrainedRun
from tests.tiny_student import TRAINING, UNSEEN, VALIDATION


def test_facts_are_the_records(run: TrainedRun) -> None:
    facts = facts_from_run(run)
    assert facts.training_classes == TRAINING
    assert facts.validation_classes == VALIDATION
    assert facts.training["split"]["name"] == "SK-YE"
    assert facts.metrics["held_out_map"]["value"] == 0.75
    rule = facts.metrics["validation_map"]["rule"]
    assert "the 2 validation classes" in rule and rule.endswith("; chose the epoch")
    assert "chose" not in facts.metrics["held_out_map"]["rule"]
    assert str(run.config.data) not in str(facts.training)


@pytest.mark.parametrize("key", ["training_classes", "validation_classes"])
def test_unseen_class_among_the_seen_is_refused(run: TrainedRun, key: str) -> None:
    """A record that was edited by hand must not open the way to the unseen classes."""
    record = {**run.record, key: [*run.record[key], UNSEEN.upper()]}
    with pytest.raises(BadData, match="lists WINDOW as seen"):
        facts_from_run(replace(run, record=record))


@pytest.mark.parametrize("value", [None, "bars", [1, 2]])
def test_record_without_its_lists_is_refused(run: TrainedRun, value: object) -> None:
    record = {**run.record, "training_classes": value}
    with pytest.raises(BadConfig, match="training_classes"):
        facts_from_run(replace(run, record=record))


def test_run_that_was_not_validated_has_no_metrics(run: TrainedRun) -> None:
    record = {key: value for key, value in run.record.items() if key != "best"}
    assert facts_from_run(replace(run, record=record)).metrics == {}


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
def test_licence_says_what_is_known(sources: list[str], words: str) -> None:
    assert words in licence_text(sources)


def test_licence_of_free_drawings_alone_is_not_research_only() -> None:
    assert "Research use only" not in licence_text(["quickdraw"])
