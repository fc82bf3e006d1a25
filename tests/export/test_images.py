"""The images that an export uses, and those that it must not."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from sbtk_export.images import ExportImages, choose_images
from sbtk_runtime.errors import BadData
from sbtk_train.data.splits import export_problem
from tests.tiny_student import TRAINING, UNSEEN, VALIDATION


def test_sketches_and_photos_are_chosen_in_equal_parts(samples: ExportImages) -> None:
    assert len(samples.parity) == 200
    assert samples.parity.is_sketch.mean() == 0.5
    assert samples.calibration.is_sketch.mean() == 0.5
    assert samples.parity.pixels.shape == (200, 224, 224, 3)
    # Every class has its share: 25 sketches and 25 photos each.
    assert np.bincount(samples.parity.labels).tolist() == [50] * len(TRAINING)
    for path, is_sketch in zip(samples.parity.paths, samples.parity.is_sketch, strict=True):
        assert path.parent.parent.name == ("sketch" if is_sketch else "photo")


def test_no_image_is_used_twice(samples: ExportImages) -> None:
    used = [*samples.calibration.paths, *samples.parity.paths, *samples.ranking.paths]
    assert len(set(used)) == len(used)


def test_classes_are_used_for_their_role_in_training(samples: ExportImages) -> None:
    for part in (samples.calibration, samples.parity):
        assert {path.parent.name for path in part.paths} == set(TRAINING)
    assert {path.parent.name for path in samples.ranking.paths} == set(VALIDATION)


def test_unseen_classes_are_not_even_opened(textures: Path, tmp_path: Path) -> None:
    """Opening one of these would be noticed: they are no images."""
    data = Path(shutil.copytree(textures, tmp_path / "data"))
    for path in data.glob(f"*/{UNSEEN}/*"):
        path.write_bytes(b"of an unseen class")
    chosen = choose_images(data, TRAINING, VALIDATION)
    assert chosen.notices == ()
    used = [*chosen.calibration.paths, *chosen.parity.paths, *chosen.ranking.paths]
    assert UNSEEN not in {path.parent.name for path in used}


def test_unreadable_images_are_named_and_replaced(textures: Path, tmp_path: Path) -> None:
    data = Path(shutil.copytree(textures, tmp_path / "data"))
    broken = data / "photo" / TRAINING[0] / "0.png"
    broken.write_bytes(b"no image")
    chosen = choose_images(data, TRAINING, VALIDATION)
    assert len(chosen.parity) == 200
    assert [notice for notice in chosen.notices if str(broken) in notice]


@pytest.mark.parametrize(
    ("kept", "parity", "calibration"),
    [(33, 200, 64), (20, 128, 32), (9, 40, 32), (8, 32, 32)],
)
def test_parity_uses_the_available_images_and_says_so(
    textures: Path, tmp_path: Path, kept: int, parity: int, calibration: int
) -> None:
    data = fewer_sketches(textures, tmp_path / "data", kept)
    chosen = choose_images(data, TRAINING, VALIDATION)
    assert (len(chosen.parity), len(chosen.calibration)) == (parity, calibration)
    notices = [notice for notice in chosen.notices if f"on {parity} images, not 200" in notice]
    assert len(notices) == (parity < 200)
    assert not export_problem(kept * len(TRAINING), 132)


@pytest.mark.parametrize(("kept", "needs_calibration"), [(7, True), (3, False)])
def test_too_few_images_are_refused_with_the_limit_that_training_reports(
    textures: Path, tmp_path: Path, kept: int, needs_calibration: bool
) -> None:
    data = fewer_sketches(textures, tmp_path / "data", kept)
    assert export_problem(kept * len(TRAINING), 132, is_calibrating=needs_calibration)
    with pytest.raises(BadData, match=r"has \d+ images for") as caught:
        choose_images(data, TRAINING, VALIDATION, is_calibrating=needs_calibration)
    assert "at least 32" in caught.value.expected
    assert "--images DATA" in caught.value.next_step


def test_without_int8_no_images_calibrate(textures: Path, tmp_path: Path) -> None:
    data = fewer_sketches(textures, tmp_path / "data", 4)
    chosen = choose_images(data, TRAINING, VALIDATION, is_calibrating=False)
    assert (len(chosen.parity), len(chosen.calibration)) == (32, 0)
    assert "sbtk export RUN --fp16" in export_problem(16, 132)


def fewer_sketches(textures: Path, data: Path, kept: int) -> Path:
    """A copy of the data with `kept` sketches in each training class."""
    shutil.copytree(textures, data)
    for name in TRAINING:
        for path in sorted(data.glob(f"sketch/{name}/*"))[kept:]:
            path.unlink()
    return data


def test_without_held_out_classes_other_training_images_are_ranked(
    textures: Path, tmp_path: Path
) -> None:
    data = Path(shutil.copytree(textures, tmp_path / "data"))
    for path in [path for name in TRAINING for path in data.glob(f"*/{name}/*")]:
        for copy in ("a", "b"):
            shutil.copy(path, path.with_stem(f"{path.stem}{copy}"))
    chosen = choose_images(data, TRAINING, ())
    assert not chosen.ranks_validation
    assert np.bincount(chosen.ranking.labels).tolist() == [50] * len(TRAINING)
    assert not {*chosen.ranking.paths} & {*chosen.parity.paths, *chosen.calibration.paths}


def test_parity_images_are_ranked_if_there_are_no_others(textures: Path) -> None:
    chosen = choose_images(textures, TRAINING, ())
    assert chosen.ranking is chosen.parity
    assert not chosen.ranks_validation


def test_the_choice_is_the_same_each_time(textures: Path, samples: ExportImages) -> None:
    again = choose_images(textures, TRAINING, VALIDATION)
    assert again.calibration.paths == samples.calibration.paths
    assert again.ranking.paths == samples.ranking.paths
    other = choose_images(textures, TRAINING, VALIDATION, seed=1)
    assert other.parity.paths != samples.parity.paths
