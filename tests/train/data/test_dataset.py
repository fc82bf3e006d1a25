from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from sbtk_runtime.errors import BadData
from sbtk_train.data.dataset import read_dataset
from sbtk_train.data.splits import Division, Split, divide
from tests.tiny_data import CLASSES, write_dataset

NONE_UNSEEN = Split("none", ("nothing",))


def every_path(division: Division) -> list[Path]:
    parts = (division.training, division.held_out, division.validation)
    return [path for part in parts for path in (*part.sketch_files, *part.photos)]


def test_unseen_classes_are_in_no_part(tmp_path: Path) -> None:
    data = read_dataset(write_dataset(tmp_path))
    division = divide(data, Split("x", ("disc", "Arch")), seed=0, validation_classes=1)
    names = {path.parent.name for path in every_path(division)}
    assert names == set(CLASSES) - {"disc", "arch"}
    assert not {"disc", "arch"} & set(division.training.classes)


def test_validation_classes_and_held_out_sketches_are_not_trained_on(tmp_path: Path) -> None:
    data = read_dataset(write_dataset(tmp_path))
    division = divide(data, NONE_UNSEEN, seed=0, validation_classes=2)
    assert len(division.validation.classes) == 2
    assert not set(division.validation.classes) & set(division.training.classes)
    assert not set(division.held_out.sketches) & set(division.training.sketches)
    assert len(division.held_out.sketches) == len(division.training.classes)
    assert len(every_path(division)) == len(data.sketches) + 2 * len(data.photos) - 2 * 4


def test_labels_name_the_folder_of_each_image(tmp_path: Path) -> None:
    division = divide(
        read_dataset(write_dataset(tmp_path)), NONE_UNSEEN, seed=3, validation_classes=2
    )
    for part in (division.training, division.held_out, division.validation):
        for paths, labels in (
            (part.sketch_files, part.sketch_labels),
            (part.photos, part.photo_labels),
        ):
            assert [part.classes[label] for label in labels] == [p.parent.name for p in paths]


def test_division_depends_on_the_seed_alone(tmp_path: Path) -> None:
    data = read_dataset(write_dataset(tmp_path))
    first, second, other = (
        divide(data, NONE_UNSEEN, seed=seed, validation_classes=2) for seed in (0, 0, 2)
    )
    assert first.training.sketches == second.training.sketches
    assert first.validation.classes == second.validation.classes
    assert first.validation.classes != other.validation.classes


def test_a_class_in_only_one_domain_is_skipped_and_named(tmp_path: Path) -> None:
    root = write_dataset(tmp_path)
    shutil.rmtree(root / "photo" / "ball")
    shutil.rmtree(root / "sketch" / "disc")
    division = divide(read_dataset(root), NONE_UNSEEN, seed=0, validation_classes=1)
    assert not {"ball", "disc"} & {path.parent.name for path in every_path(division)}
    assert len(division.notices) == 2
    assert any("'ball'" in notice and "0 photos" in notice for notice in division.notices)


def test_too_few_classes_are_refused_with_both_numbers(tmp_path: Path) -> None:
    data = read_dataset(write_dataset(tmp_path))
    with pytest.raises(BadData, match="6 seen classes") as caught:
        divide(data, NONE_UNSEEN, seed=0, validation_classes=4)
    assert "at least 7" in str(caught.value)


def test_an_unseen_class_on_the_training_list_is_refused(tmp_path: Path) -> None:
    data = read_dataset(write_dataset(tmp_path))
    with pytest.raises(BadData, match="arch"):
        divide(data, Split("x", ("arch",)), seed=0, only_classes=["arch", "ball"])


def test_missing_classes_of_the_training_list_are_reported(tmp_path: Path) -> None:
    data = read_dataset(write_dataset(tmp_path))
    listed = ["Arch", "ball", "crate", "disk", "easel"]
    division = divide(data, NONE_UNSEEN, seed=0, validation_classes=1, only_classes=listed)
    used = {*division.training.classes, *division.validation.classes}
    assert used == {"arch", "ball", "crate", "easel"}
    assert "1 of 5 classes on the list to train on are not in the data: disk" in division.notices


@pytest.mark.parametrize("missing", ["sketch", "photo"])
def test_a_missing_domain_folder_is_named(tmp_path: Path, missing: str) -> None:
    root = write_dataset(tmp_path)
    shutil.rmtree(root / missing)
    with pytest.raises(BadData, match=missing):
        read_dataset(root)


def test_the_hash_changes_with_a_file(tmp_path: Path) -> None:
    root = write_dataset(tmp_path)
    before = read_dataset(root).sha256
    assert read_dataset(root).sha256 == before
    (root / "sketch" / "ball" / "0.png").unlink()
    after = read_dataset(root)
    assert after.sha256 != before
    assert after.photo_labels.dtype == np.int64


def test_hashes_of_plain_data_sets_have_not_changed(tmp_path: Path) -> None:
    """Run and bundles name them; they were taken before other layouts could be read."""
    names = ("ant", "bat", "car_(sedan)", "door", "hot-air_balloon", "zebra")
    for kind in ("sketch", "photo"):
        for number, name in enumerate(names):
            folder = tmp_path / kind / name
            folder.mkdir(parents=True)
            for copy in range(4):
                (folder / f"n{number}_{copy}.png").write_bytes(b"x" * (1 + number + copy))
    data = read_dataset(tmp_path)
    division = divide(data, Split("x", ("bat",)), seed=0, validation_classes=2)
    assert data.sha256.startswith("60493c15ca22c3a7")
    assert division.training.sha256.startswith("e6dab76faa7e87c3")
    assert division.held_out.sha256.startswith("43d493b70bd86cbd")
    assert division.validation.sha256.startswith("0602d62df1fb5172")
