"""Benchmarks measure no model on classes that it was trained on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest


def test_a_model_is_not_measured_on_classes_that_it_was_trained_on(tmp_path: Path) -> None:
    from benchmarks.drawings import are_held_out, require_held_out

    (tmp_path / "run.json").write_text(json.dumps({"validation_classes": ["cat", "dog"]}))
    assert are_held_out(tmp_path, ["dog"])
    assert not are_held_out(tmp_path, ["cat", "cow"])
    require_held_out(tmp_path, ["cat", "dog"])
    with pytest.raises(SystemExit, match="was trained on some of cat, cow"):
        require_held_out(tmp_path, ["cat", "cow"])
    # All its seen classes were trained on.
    assert not are_held_out(None, ["apple"])


@pytest.mark.parametrize("in_a_bundle", [False, True])
def test_a_model_is_not_measured_on_classes_of_other_data_that_it_was_trained_on(
    tmp_path: Path, *, in_a_bundle: bool
) -> None:
    from benchmarks.drawings import require_no_others

    known = ["ant", "bat", "cat", "dog", "emu"]
    for trained in (["ant", "dog"], ["ant", "dog", "umbrella"]):
        facts = {
            "training_classes": len(trained) if in_a_bundle else trained,
            "validation_classes": ["cat"],
            "unseen_classes": ["bat", "emu"],
        }
        (tmp_path / "run.json").write_text(json.dumps(facts))
        if len(trained) == 2:
            require_no_others(tmp_path, known)
        else:
            with pytest.raises(SystemExit, match="was trained on 3 classes, some from elsewhere"):
                require_no_others(tmp_path, known)
