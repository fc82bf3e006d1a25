"""Splits: published, random and from files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from sbtk_runtime.errors import BadConfig, BadData
from sbtk_train.data.dataset import read_dataset
from sbtk_train.data.splits import (
    LookAlike,
    Split,
    describe_matches,
    divide,
    join_names,
    match_classes,
    open_split,
    refuse_absent,
    split_names,
)
from tests.tiny_data import write_dataset

SIZES = {
    "SK-SH": (100, 25),
    "SK-YE": (104, 21),
    "TUB-SH": (220, 30),
    "QD-DE": (80, 30),
    "SK-SH-sempcyc": (100, 25),
    "TUB-SH-sempcyc": (220, 30),
}
CLASSES = [f"class{number:02}" for number in range(40)]


def test_published_splits_have_their_published_sizes() -> None:
    opened = {name: open_split(name) for name in split_names()}
    assert {name: (len(s.seen), len(s.unseen)) for name, s in opened.items()} == SIZES


def test_lists_with_the_same_name_in_the_literature_differ() -> None:
    for ours, theirs, common in (("SK-SH", "SK-SH-sempcyc", 4), ("TUB-SH", "TUB-SH-sempcyc", 1)):
        other = open_split(theirs)
        assert sum(other.is_unseen(name) for name in open_split(ours).unseen) == common


def test_the_hash_of_a_published_split_has_not_changed() -> None:
    """Bundles and runs name it; a new way to compare names must not change it."""
    assert open_split("SK-YE").sha256.startswith("e9111ba44e60f0c4")
    assert open_split("TUB-SH-sempcyc").sha256.startswith("defae506a5716f13")
    assert open_split("sk-ye") == open_split("SK-YE")


def test_a_split_file_has_a_class_per_line(tmp_path: Path) -> None:
    file = tmp_path / "mine.txt"
    file.write_text("cow\n\ncat\ncow\n")
    assert open_split(str(file)) == Split("mine.txt", ("cat", "cow"))
    file.write_bytes("\ufeffT-shirt\r\nt shirt \r\ncat\r\n".encode())
    assert open_split(str(file)).unseen == ("T-shirt", "cat")


def test_a_file_in_another_encoding_is_refused_with_that_reason(tmp_path: Path) -> None:
    file = tmp_path / "mine.txt"
    file.write_bytes("café\n".encode("latin-1"))
    with pytest.raises(BadConfig, match="not UTF-8 text"):
        open_split(str(file))


def test_the_numbers_in_sakes_class_files_are_not_part_of_the_names(tmp_path: Path) -> None:
    file = tmp_path / "cname_cid_zero.txt"
    file.write_text("hot air balloon 0 \ncow 1 \n")
    assert open_split(str(file)).unseen == ("cow", "hot air balloon")
    file.write_text("route 66\ncow\n")
    assert open_split(str(file)).unseen == ("cow", "route 66")


def test_a_number_is_part_of_a_name_unless_the_file_is_a_list_with_ids(tmp_path: Path) -> None:
    file = tmp_path / "unseen.txt"
    file.write_text("shoe 0\n")
    assert open_split(str(file), ["shoe 0", "shoe 1", "hat"]).unseen == ("shoe 0",)
    assert open_split(str(file), ["shoe", "hat"]).unseen == ("shoe 0",)
    file.write_text("shoe 0\nshoe 1\n")
    assert open_split(str(file)).unseen == ("shoe 0", "shoe 1")
    file.write_text("shoe 0\nhat 1\n")
    assert open_split(str(file), ["shoe-0", "Hat 1", "cup 2"]).unseen == ("hat 1", "shoe 0")
    assert open_split(str(file), ["shoe", "hat", "cup"]).unseen == ("hat", "shoe")
    listed = tmp_path / "cname_cid_zero.txt"
    listed.write_text("cow 0\n")
    assert open_split(str(listed), ["cow", "hat"]).unseen == ("cow",)


@pytest.mark.parametrize("content", [None, "", "\n \n"])
def test_the_error_for_a_missing_or_empty_file_names_the_known_splits(
    tmp_path: Path, content: str | None
) -> None:
    file = tmp_path / "mine.txt"
    if content is not None:
        file.write_text(content)
    with pytest.raises(BadConfig):
        open_split(str(file))


def test_random_split_is_drawn_by_its_seed_from_the_classes_of_the_data() -> None:
    drawn = open_split("random:25:3", CLASSES)
    assert drawn.name == "random:25:3"
    assert len(drawn.unseen) == 25
    assert sorted((*drawn.seen, *drawn.unseen)) == CLASSES
    assert open_split("random:25:3", CLASSES[::-1]) == drawn
    assert open_split("random:25:4", CLASSES).unseen != drawn.unseen
    spelled = open_split("random:25:3", [name.replace("ss", "s S") for name in CLASSES])
    assert [name.replace("s S", "ss") for name in spelled.unseen] == list(drawn.unseen)
    thai = ["เสือ", "เสื้อ", "ปลา"]
    assert open_split("random:1:0", thai).unseen == open_split("random:1:0", thai[::-1]).unseen


def test_random_split_is_the_same_on_every_machine() -> None:
    assert open_split("random:3:0", CLASSES).unseen == ("class20", "class22", "class25")


@pytest.mark.parametrize(
    ("name", "classes", "message"),
    [
        ("random:25", CLASSES, "random:N:SEED"),
        ("random:x:1", CLASSES, "random:N:SEED"),
        ("random:40:1", CLASSES, "1 to 39"),
        ("random:0:1", CLASSES, "1 to 39"),
        ("random:5:1", None, "no data are given"),
    ],
)
def test_random_split_that_cannot_be_drawn_is_refused(
    name: str, classes: list[str] | None, message: str
) -> None:
    with pytest.raises(BadConfig) as caught:
        open_split(name, classes)
    assert message in str(caught.value)


def test_an_unseen_class_is_recognised_in_any_spelling() -> None:
    split = Split("x", ("hot-air balloon", "tree"))
    assert split.is_unseen("hot_air_balloon")
    assert split.is_unseen("Hot-Air_Balloon")
    assert split.is_unseen("hotairballoon")
    assert not replace(split, is_file=True).is_unseen("hotairballoon")
    assert split.seen_among(["tree", "cat", "hot air balloon"]) == ["cat"]


def test_the_hash_depends_on_the_classes_but_not_on_spelling_or_order() -> None:
    assert Split("a", ("x y", "z")).sha256 == Split("b", ("z", "x_y")).sha256
    assert Split("a", ("x",)).sha256 != Split("a", ("y",)).sha256


QUICKDRAW = open_split("QD-DE")
ALL_QUICKDRAW = (*QUICKDRAW.seen, *QUICKDRAW.unseen)


def renamed(old: str, new: str) -> list[str]:
    return sorted(new if name == old else name for name in ALL_QUICKDRAW)


def test_a_complete_data_set_matches_its_split() -> None:
    match = match_classes(ALL_QUICKDRAW, QUICKDRAW)
    assert (len(match.seen), len(match.unseen)) == (80, 30)
    assert not (match.absent or match.unknown or match.look_alikes)
    assert match.is_own
    assert describe_matches(match) == []


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


def test_a_plural_of_an_unseen_class_is_found() -> None:
    match = match_classes([*ALL_QUICKDRAW, "zebras"], QUICKDRAW)
    assert match.look_alikes == (LookAlike("zebras", "zebra"),)


def test_other_data_sets_give_only_a_warning(tmp_path: Path) -> None:
    # TU-Berlin has a cabinet and no cabin, which SK-YE keeps unseen.
    names = ["cabinet", "angel", "arm", "ashtray", "barn", "tree"]
    match = match_classes(names, open_split("SK-YE"))
    assert match.look_alikes == (LookAlike("cabinet", "cabin"),)
    assert not match.is_own
    data = read_dataset(write_dataset(tmp_path, classes=names, sketches=2, photos=1))
    division = divide(data, open_split("SK-YE"), seed=0, validation_classes=1)
    assert any("'cabinet' is trained on" in notice for notice in division.notices)


def test_unseen_classes_that_the_data_lack_are_counted_and_named() -> None:
    notices = describe_matches(match_classes(["ant", "bat", "cow"], Split("x", ("bat", "elk"))))
    assert notices == ["1 of 2 unseen classes of x are not in the data: elk"]


def test_a_list_of_missing_classes_is_refused_with_close_names() -> None:
    classes = ("T-shirt", "breadfruit", "palm tree", "cat_(animal)", "ปลา")
    refuse_absent(["t shirt", "Cat (Animal)", "ปลา"], classes, "mine.txt")
    with pytest.raises(BadData) as caught:
        refuse_absent(["t shirt", "bread", "plam tree", "cat", "ปล"], classes, "mine.txt")
    message = caught.value.found
    assert message.startswith(
        "4 of 5 classes in mine.txt are not in the data: bread, plam tree, cat"
    )
    assert "'plam tree' (did you mean 'palm tree'" in message
    assert "'cat' (did you mean 'cat_(animal)'" in message
    assert "--allow-missing" in caught.value.next_step


@pytest.mark.parametrize(
    ("names", "text"), [(["a", "b"], "a, b"), (["a", "b", "c"], "a, b and 1 more")]
)
def test_long_lists_of_names_are_shortened(names: Sequence[str], text: str) -> None:
    assert join_names(names, most=2) == text
