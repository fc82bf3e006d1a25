"""Which pictures an export looks at, above all which it does not."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from sbtk_export.pictures import ExportPictures, choose_pictures
from sbtk_runtime.errors import BadData
from tests.tiny_student import TRAINING, UNSEEN, VALIDATION


def test_sketches_and_photos_come_in_equal_parts(pictures: ExportPictures) -> None:
    assert len(pictures.parity) == 200
    assert pictures.parity.is_sketch.mean() == 0.5
    assert pictures.calibration.is_sketch.mean() == 0.5
    assert pictures.parity.pixels.shape == (200, 224, 224, 3)
    # Every class has its share: 25 sketches and 25 photos each.
    assert np.bincount(pictures.parity.labels).tolist() == [50] * len(TRAINING)
    for path, is_sketch in zip(pictures.parity.paths, pictures.parity.is_sketch, strict=True):
        assert path.parent.parent.name == ("sketch" if is_sketch else "photo")


def test_no_picture_serves_twice(pictures: ExportPictures) -> None:
    used = [*pictures.calibration.paths, *pictures.parity.paths, *pictures.ranking.paths]
    assert len(set(used)) == len(used)


def test_classes_are_used_for_what_they_were_seen_as(pictures: ExportPictures) -> None:
    for part in (pictures.calibration, pictures.parity):
        assert {path.parent.name for path in part.paths} == set(TRAINING)
    assert {path.parent.name for path in pictures.ranking.paths} == set(VALIDATION)


def test_unseen_classes_are_not_even_opened(textures: Path, tmp_path: Path) -> None:
    """Opening one of these would be noticed: they are no images."""
    data = Path(shutil.copytree(textures, tmp_path / "data"))
    for path in data.glob(f"*/{UNSEEN}/*"):
        path.write_bytes(b"of an unseen class")
    chosen = choose_pictures(data, TRAINING, VALIDATION)
    assert chosen.notices == ()
    used = [*chosen.calibration.paths, *chosen.parity.paths, *chosen.ranking.paths]
    assert UNSEEN not in {path.parent.name for path in used}


def test_unreadable_pictures_are_named_and_replaced(textures: Path, tmp_path: Path) -> None:
    data = Path(shutil.copytree(textures, tmp_path / "data"))
    broken = data / "photo" / TRAINING[0] / "0.png"
    broken.write_bytes(b"no image")
    chosen = choose_pictures(data, TRAINING, VALIDATION)
    assert len(chosen.parity) == 200
    assert [notice for notice in chosen.notices if str(broken) in notice]


def test_fewer_than_200_images_are_refused(textures: Path, tmp_path: Path) -> None:
    data = Path(shutil.copytree(textures, tmp_path / "data"))
    for path in sorted(data.glob(f"sketch/{TRAINING[0]}/*"))[:33]:
        path.unlink()
    with pytest.raises(BadData, match=r"has 198 pictures for parity") as caught:
        choose_pictures(data, TRAINING, VALIDATION)
    assert "at least 200" in caught.value.expected
    assert "--images DATA" in caught.value.next_step


def test_parity_leaves_pictures_for_calibration(textures: Path, tmp_path: Path) -> None:
    data = Path(shutil.copytree(textures, tmp_path / "data"))
    for name in TRAINING:
        for path in sorted(data.glob(f"*/{name}/*"))[: 2 * 7 : 2]:
            path.unlink()
    with pytest.raises(BadData, match="pictures for calibration"):
        choose_pictures(data, TRAINING, VALIDATION)
    assert len(choose_pictures(data, TRAINING, VALIDATION, is_calibrating=False).parity) == 200


def test_without_held_out_classes_parity_pictures_are_ranked(textures: Path) -> None:
    chosen = choose_pictures(textures, TRAINING, ())
    assert chosen.ranking is chosen.parity


def test_the_choice_is_the_same_each_time(textures: Path, pictures: ExportPictures) -> None:
    again = choose_pictures(textures, TRAINING, VALIDATION)
    assert again.calibration.paths == pictures.calibration.paths
    assert again.ranking.paths == pictures.ranking.paths
    other = choose_pictures(textures, TRAINING, VALIDATION, seed=1)
    assert other.parity.paths != pictures.parity.paths
