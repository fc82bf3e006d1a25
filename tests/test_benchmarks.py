"""Benchmarks measure no model on classes that it was trained on."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
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


def test_the_rank_of_a_sketchs_own_photo_is_that_of_a_plain_loop(tmp_path: Path) -> None:
    from benchmarks.reranking import own_photos, own_ranks
    from sbtk_train.data.dataset import read_dataset

    for name in ("sketch/cat/n01_5-1.png", "sketch/cat/n01_5-12.png", "sketch/dog/n02_7-2.png"):
        touch(tmp_path / name)
    for name in ("photo/cat/n01_5.jpg", "photo/cat/n01_9.jpg", "photo/dog/n02_7.jpg"):
        touch(tmp_path / name)
    touch(tmp_path / "sketch/dog/n01_5-3.png")  # of a photo of another class
    data = read_dataset(tmp_path)
    photos = list(reversed(data.photos))
    found = own_photos(data, photos)
    for sketch, row in zip(data.sketch_files, found, strict=True):
        wanted = sketch.name.partition("-")[0] + ".jpg"
        own = tmp_path / "photo" / sketch.parent.name / wanted
        assert (photos[row] if row >= 0 else None) == (own if own.exists() else None)
    assert found.tolist().count(-1) == 1
    random = np.random.default_rng(0)
    scores = random.standard_normal((50, 30)).astype(np.float32)
    own_rows = random.integers(0, 30, 50)
    ranks = own_ranks(scores, own_rows)
    for row, own_row, rank in zip(scores, own_rows, ranks, strict=True):
        assert np.argsort(-row).tolist().index(own_row) + 1 == rank


def touch(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"")


def test_held_out_sketches_are_those_of_the_models_own_division(tmp_path: Path) -> None:
    from benchmarks.reranking import own_division
    from sbtk_train.data.dataset import read_dataset
    from sbtk_train.data.splits import divide, open_split
    from tests.tiny_data import write_dataset

    data = read_dataset(write_dataset(tmp_path / "data"))
    split = open_split("SK-YE", data.classes)
    for count in (0, 2):
        division = divide(data, split, seed=3, validation_classes=count)
        facts = {
            "validation_classes": list(division.validation.classes),
            "division_seed": 3,
            "split": {"name": "SK-YE"},
        }
        (tmp_path / "run.json").write_text(json.dumps(facts))
        found = own_division(data, tmp_path, "SK-YE", 3)
        assert found is not None
        assert found.held_out.sketches == division.held_out.sketches
        assert own_division(data, tmp_path, "SK-YE", 1) is None
