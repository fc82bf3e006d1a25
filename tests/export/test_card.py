"""What a bundle tells about the run it comes from."""

from __future__ import annotations

from dataclasses import replace

import pytest

from sbtk_export.card import collect_facts, describe_licence
from sbtk_runtime.errors import BadConfig, BadData
from sbtk_train.runs.checkpoint import TrainedRun
from tests.tiny_student import TRAINING, UNSEEN, VALIDATION


def test_facts_are_the_records(run: TrainedRun) -> None:
    facts = collect_facts(run)
    assert facts.training_classes == TRAINING
    assert facts.validation_classes == VALIDATION
    assert facts.training["split"]["name"] == "SK-YE"
    assert facts.metrics["held_out_map"]["value"] == 0.75
    rule = facts.metrics["validation_map"]["rule"]
    assert "the 2 validation classes" in rule and rule.endswith("; chose the epoch")
    assert "chose" not in facts.metrics["held_out_map"]["rule"]
    assert str(run.config.data) not in str(facts.training)


def test_the_figure_of_a_mean_chose_no_epoch_of_it(run: TrainedRun) -> None:
    recipe = run.record["recipe"]
    parts = [{"run": name, "seed": 0, "recipe": recipe, "epoch": 3.0} for name in ("a", "b")]
    averaged = replace(run, record={**run.record, "averaged": parts})
    metrics = collect_facts(averaged).metrics
    assert metrics["validation_map"]["rule"].endswith(
        "; of the mean of 2 students' weights; each taken at the epoch that its own such figure "
        "chose"
    )
    assert metrics["held_out_map"]["rule"].endswith("; of the mean of 2 students' weights")
    # Where the parts' recipes differ, none of them is the mean's.
    other = recipe | {"selection": "last"}
    parts[1] = parts[1] | {"recipe": other}
    facts = collect_facts(replace(run, record={**run.record, "averaged": parts}))
    assert "; 1 of them taken at" in facts.metrics["validation_map"]["rule"]
    assert "recipe" not in facts.training
    assert [part["recipe"] for part in facts.training["averaged"]] == [recipe, other]


@pytest.mark.parametrize(
    ("told", "size"), [({}, "; images of 128 px"), ({"refit": {"refitted_map": 0.5}}, "")]
)
def test_a_figure_of_smaller_images_says_so(
    run: TrainedRun, told: dict[str, object], size: str
) -> None:
    """Feature maps are kept of images of the training's size; a refit measures anew."""
    record = {**run.record, "validation_px": 128, **told}
    metrics = collect_facts(replace(run, record=record)).metrics
    assert metrics["validation_map"]["rule"].endswith(f"{size}; chose the epoch")
    assert ("px" in metrics["validation_map"]["rule"]) == bool(size)
    assert metrics["held_out_map"]["rule"].endswith("; images of 128 px")


@pytest.mark.parametrize("key", ["training_classes", "validation_classes"])
def test_unseen_class_among_the_seen_is_refused(run: TrainedRun, key: str) -> None:
    """A record that was edited by hand must not open the way to the unseen classes."""
    record = {**run.record, key: [*run.record[key], UNSEEN.upper()]}
    with pytest.raises(BadData, match="lists WINDOW as seen"):
        collect_facts(replace(run, record=record))


@pytest.mark.parametrize("value", [None, "bars", [1, 2]])
def test_record_without_its_lists_is_refused(run: TrainedRun, value: object) -> None:
    record = {**run.record, "training_classes": value}
    with pytest.raises(BadConfig, match="training_classes"):
        collect_facts(replace(run, record=record))


def test_run_that_was_not_validated_has_no_metrics(run: TrainedRun) -> None:
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
def test_licence_says_what_is_known(sources: list[str], words: str) -> None:
    assert words in describe_licence(sources)


def test_licence_of_free_drawings_alone_is_not_research_only() -> None:
    assert "Research use only" not in describe_licence(["quickdraw"])
