"""Images on both sides of a split are found by class, ImageNet photo, bytes and name."""

from __future__ import annotations

import shutil
from pathlib import Path

from sbtk_train.data.check import check_images
from sbtk_train.data.dataset import open_dataset
from sbtk_train.data.leakage import Leakage, find_leakage
from sbtk_train.data.splits import Split
from tests.tiny_layouts import SEEN, UNSEEN, write_classes, write_sake_sketchy

SPLIT = Split("own", UNSEEN)


def leakage_in(root: Path, *, is_quick: bool = False) -> Leakage:
    found = open_dataset(root)
    opened = check_images(found.images, threads=2, advance=lambda done, total: None)
    sha256 = None if is_quick else opened.sha256
    return find_leakage(found.images, SPLIT, found.list_folders, sha256)


def test_a_clean_data_set_has_no_leaks(tmp_path: Path) -> None:
    leakage = leakage_in(write_sake_sketchy(tmp_path))
    assert leakage.classes == leakage.photo_ids == leakage.contents == ()
    # The extended photo `c.jpg` is in every class, as `ext_12.jpg` might be.
    assert {Path(leak.seen).name for leak in leakage.file_names} == {"c.jpg"}


def test_identical_files_in_seen_and_unseen_classes_are_found(tmp_path: Path) -> None:
    root = write_sake_sketchy(tmp_path)
    seen = root / "EXTEND_image_sketchy_ready" / "ant" / "ext_0.jpg"
    unseen = root / "EXTEND_image_sketchy_ready" / "tree" / "ext_5.jpg"
    shutil.copy(seen, unseen)
    leakage = leakage_in(root)
    assert leakage.contents is not None
    assert [(leak.seen, leak.unseen) for leak in leakage.contents] == [(str(seen), str(unseen))]
    assert leakage_in(root, is_quick=True).contents is None


def test_a_sketch_of_a_photo_on_the_other_side_is_found_by_its_name(tmp_path: Path) -> None:
    names = {"ant": ["n02206856_17-3.png"], "tree": ["n09876543_1-1.png"]}
    write_classes(tmp_path / "sketch", names)
    photos = {"ant": ["n01111111_1.jpg"], "tree": ["n02206856_17.jpg", "n02206856_171.jpg"]}
    write_classes(tmp_path / "photo", photos, seed=50)
    leakage = leakage_in(tmp_path)
    assert [Path(leak.unseen).name for leak in leakage.photo_ids] == ["n02206856_17.jpg"]
    assert leakage.file_names == ()


def test_numbered_files_of_two_classes_are_only_a_possible_leak(tmp_path: Path) -> None:
    write_classes(tmp_path / "sketch", {"ant": ["1.png"], "tree": ["1.png"]})
    write_classes(tmp_path / "photo", {"ant": ["1.jpg"], "tree": ["2.jpg"]}, seed=50)
    leakage = leakage_in(tmp_path)
    assert [Path(leak.seen).name for leak in leakage.file_names] == ["1.png"]
    assert leakage.classes == leakage.photo_ids == leakage.contents == ()


def test_a_class_on_both_lists_is_found_in_either_spelling(tmp_path: Path) -> None:
    root = write_sake_sketchy(tmp_path, seen=(*SEEN, "wine bottle"), unseen=UNSEEN)
    leakage = leakage_in(root)
    assert [leak.unseen for leak in leakage.classes] == ["wine_bottle"]
    assert leakage.classes[0].seen == "zeroshot1: wine bottle"
