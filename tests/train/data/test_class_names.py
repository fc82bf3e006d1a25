"""Two names mean one class, or they do not; a wrong answer trains on unseen classes."""

from __future__ import annotations

import pytest

from sbtk_train.data.class_folders import common_names
from sbtk_train.data.class_names import ClassNames, class_key, is_near, is_plural, match_key
from sbtk_train.data.splits import open_split, split_names


@pytest.mark.parametrize(
    ("name", "other"),
    [
        ("palm tree", "palm_tree"),
        ("Palm-Tree", "palmtree"),
        ("hot-air_balloon", "hot air balloon"),
        ("jack-o-lantern", "jack_o_lantern"),
        ("giraffe", "griaffe"),
        ("space shuttle", "spacesshuttle"),
        ("wrist-watch", "wristwatching"),
        ("bear (animal)", "bearanimal"),
        ("cafe\u0301", "caf\u00e9"),
    ],
)
def test_spellings_of_one_class_have_one_key(name: str, other: str) -> None:
    assert match_key(name) == match_key(other)


@pytest.mark.parametrize("split", split_names())
def test_no_two_classes_of_a_published_split_have_one_key(split: str) -> None:
    opened = open_split(split)
    names = [*opened.seen, *opened.unseen]
    assert len(names) in (110, 125, 250)
    assert len({match_key(name) for name in names}) == len(names)
    assert not [name for name in opened.seen if opened.is_unseen(name)]
    assert all(opened.is_unseen(name) for name in opened.unseen)


def test_an_addition_in_brackets_may_be_missing_and_may_not_differ() -> None:
    assert ClassNames(["mouse (animal)"]).find("mouse") == "mouse (animal)"
    assert "mouse_(animal)" in ClassNames(["mouse"])
    assert "crane (machine)" not in ClassNames(["crane (bird)"])
    assert ClassNames(["crane (bird)", "crane"]).find("crane (machine)") == "crane"


def test_names_of_signs_alone_are_their_own_classes() -> None:
    assert match_key("++") != match_key("--")
    assert class_key("hot-air balloon") == "hot_air_balloon"


def test_names_that_nearly_match_are_told_from_others() -> None:
    assert is_near("palmtre", "palm tree")
    assert is_near("scissor", "scissors")
    assert not is_near("bear", "pear")
    assert not is_near("bat", "cat")
    assert is_plural("glasses", "glass")
    assert not is_plural("glasses", "grass")


def test_folders_are_matched_run_together_only_where_no_exact_counterpart_is() -> None:
    found = common_names(["seal ion", "sea lion", "c#"], ["sea_lion", "sealion", "c++", "c#"])
    assert found == {
        "c#": "c#",
        "c++": "c++",
        "sea lion": "sea lion",
        "sea_lion": "sea lion",
        "seal ion": "seal ion",
        "sealion": "seal ion",
    }


def test_folders_with_two_possible_counterparts_are_left_alone() -> None:
    found = common_names(["crane (bird)", "crane (machine)"], ["crane"])
    assert found["crane"] == "crane"
