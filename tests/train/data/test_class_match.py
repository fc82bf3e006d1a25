"""Class names that do not match a split are told, and slips that would leak are refused."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from sbtk_runtime.errors import BadData
from sbtk_train.data import divide, read_dataset
from sbtk_train.data.class_match import (
    LookAlike,
    match_classes,
    match_notices,
    named,
    refuse_absent,
)
from sbtk_train.data.splits import Split, open_split
from tests.tiny_data import write_dataset

QUICKDRAW = open_split("QD-DE")
ALL_QUICKDRAW = (*QUICKDRAW.seen, *QUICKDRAW.unseen)


def renamed(old: str, new: str) -> list[str]:
    return sorted(new if name == old else name for name in ALL_QUICKDRAW)


def test_a_whole_data_set_matches_its_split() -> None:
    match = match_classes(ALL_QUICKDRAW, QUICKDRAW)
    assert (len(match.seen), len(match.unseen)) == (80, 30)
    assert not (match.absent or match.unknown or match.look_alikes)
    assert match.is_own
    assert match_notices(match) == []


def test_a_misspelt_unseen_class_is_found_among_the_seen() -> None:
    match = match_classes(renamed("palm tree", "plam tree"), QUICKDRAW)
    assert match.absent == ("palm tree",)
    assert match.unknown == ("plam tree",)
    assert match.look_alikes == (LookAlike("plam tree", "palm tree"),)


def test_training_refuses_a_misspelt_unseen_class(tmp_path: Path) -> None:
    names = [*QUICKDRAW.seen[:12], "plam tree"]
    data = read_dataset(write_dataset(tmp_path, classes=names, sketches=2, photos=1))
    with pytest.raises(BadData, match=r"'plam tree'.*'palm tree'") as caught:
        divide(data, QUICKDRAW, seed=0, validation_classes=2)
    assert "rename" in caught.value.next_step


def test_a_plural_beside_its_unseen_singular_is_found() -> None:
    match = match_classes([*ALL_QUICKDRAW, "zebras"], QUICKDRAW)
    assert match.look_alikes == (LookAlike("zebras", "zebra"),)


def test_data_of_another_data_set_are_only_warned_about(tmp_path: Path) -> None:
    # TU-Berlin has a cabinet and no cabin, which SK-YE keeps unseen.
    names = ["cabinet", "angel", "arm", "ashtray", "barn", "tree"]
    match = match_classes(names, open_split("SK-YE"))
    assert match.look_alikes == (LookAlike("cabinet", "cabin"),)
    assert not match.is_own
    data = read_dataset(write_dataset(tmp_path, classes=names, sketches=2, photos=1))
    division = divide(data, open_split("SK-YE"), seed=0, validation_classes=1)
    assert any("'cabinet' is trained on" in notice for notice in division.notices)


def test_unseen_classes_that_the_data_lack_are_counted_and_named() -> None:
    notices = match_notices(match_classes(["ant", "bat", "cow"], Split("x", ("bat", "elk"))))
    assert notices == ["1 of 2 unseen classes of x are not in the data: elk"]


def test_a_list_of_classes_that_the_data_lack_is_refused_with_close_names() -> None:
    classes = ("T-shirt", "breadfruit", "palm tree", "cat_(animal)", "ปลา")
    refuse_absent(["t shirt", "Cat (Animal)", "ปลา"], classes, "mine.txt")
    with pytest.raises(BadData) as caught:
        refuse_absent(["t shirt", "bread", "plam tree", "cat", "ปล"], classes, "mine.txt")
    said = caught.value.found
    assert said.startswith("4 of 5 classes in mine.txt are not in the data: bread, plam tree, cat")
    assert "'plam tree' (did you mean 'palm tree'" in said
    assert "'cat' (did you mean 'cat_(animal)'" in said
    assert "--allow-missing" in caught.value.next_step


@pytest.mark.parametrize(
    ("names", "text"), [(["a", "b"], "a, b"), (["a", "b", "c"], "a, b and 1 more")]
)
def test_long_lists_of_names_are_cut(names: Sequence[str], text: str) -> None:
    assert named(names, most=2) == text
