"""Matching of class names; a mistake would train on unseen classes."""

from __future__ import annotations

import unicodedata
from pathlib import Path

import pytest

from sbtk_runtime.errors import BadConfig, BadData
from sbtk_train.data.class_names import (
    ClassNames,
    class_key,
    is_near,
    is_plural,
    plain_key,
    published_key,
    read_names,
    suggest_names,
)
from sbtk_train.data.dataset import read_dataset
from sbtk_train.data.image_set import match_names
from sbtk_train.data.splits import open_split, split_names
from tests.tiny_data import write_dataset

#: No two of these are one class.
DIFFERENT = (
    *("c", "c++", "c#", "1", "-1", "1.0", "10", "+1", "1+", "_1"),
    *(
        "เสือ",
        "เสื้อ",
        "कल",
        "काला",
        "가",
        "각",
        "猫",
        "貓",
        "ネコ",
        "ねこ",
        "😀",
        "😁",
        "👩‍🚀",
        "👩🚀",
    ),
    *(
        "cat (animal)",
        "cat",
        "(cat)",
        "cat!",
        "c.a.t",
        "bread",
        "breadfruit",
        "sea lion",
        "sealion",
    ),
    *("sea lion", "sealion", "cafe", "café", "tree", "tree.", "-tree", "x²", "x2", "n°", "no"),
)


@pytest.mark.parametrize(
    ("name", "other"),
    [
        ("palm tree", "palm_tree"),
        ("Palm-Tree", "PALM TREE"),
        ("hot-air_balloon", "hot air balloon"),
        ("jack-o-lantern", "jack_o_lantern"),
        ("T-shirt", "t shirt"),
        ("cat_(animal)", "Cat (animal)"),
        ("cafe\u0301", "caf\u00e9"),
        ("Straße", "STRASSE"),
        ("ice  cream -_ cone", "ice\u00a0cream cone"),
        (" tree ", "tree"),
    ],
)
def test_spellings_of_one_class_have_one_key(name: str, other: str) -> None:
    assert class_key(name) == class_key(other)
    assert other in ClassNames([name], renames=False)


def test_other_differences_keep_names_distinct() -> None:
    for key_of in (class_key, published_key, plain_key):
        keys = {name: key_of(name) for name in DIFFERENT}
        same = [name for name in DIFFERENT if list(keys.values()).count(keys[name]) > 1]
        assert not same, (key_of, same)
    for name in DIFFERENT:
        assert ClassNames(other for other in DIFFERENT if other != name).find(name) is None
        assert ClassNames(DIFFERENT).find(unicodedata.normalize("NFD", name)) == name


@pytest.mark.parametrize(
    ("name", "other"),
    [
        ("palm tree", "palmtree"),
        ("giraffe", "griaffe"),
        ("space shuttle", "spacesshuttle"),
        ("wrist-watch", "wristwatching"),
        ("bear (animal)", "bearanimal"),
        ("hot dog", "hotdog"),
    ],
)
def test_published_classes_keep_their_documented_renames(name: str, other: str) -> None:
    assert published_key(name) == published_key(other)
    assert other in ClassNames([name])
    assert other not in ClassNames([name], renames=False)


@pytest.mark.parametrize("split", split_names())
def test_no_two_classes_of_a_published_split_have_one_key(split: str) -> None:
    opened = open_split(split)
    names = [*opened.seen, *opened.unseen]
    assert len(names) in (110, 125, 250)
    assert len({published_key(name) for name in names}) == len(names)
    assert not [name for name in opened.seen if opened.is_unseen(name)]
    assert all(opened.is_unseen(name) for name in opened.unseen)


def test_an_addition_in_brackets_may_be_missing_but_not_differ() -> None:
    assert ClassNames(["mouse (animal)"]).find("mouse") == "mouse (animal)"
    assert "mouse_(animal)" in ClassNames(["mouse"])
    assert "crane (machine)" not in ClassNames(["crane (bird)"])
    assert ClassNames(["crane (bird)", "crane"]).find("crane (machine)") == "crane"


def test_brackets_are_part_of_the_name_of_other_classes() -> None:
    assert "kite" not in ClassNames(["kite (toy)"])
    assert "mouse" not in ClassNames(["mouse (animal)"], renames=False)


@pytest.mark.parametrize(
    "name",
    [
        *("tee\uff0dsh\uff49rt", "tee\u2013shirt"),  # a wide hyphen and a wide i; a dash
        *("Tee\u2011Shirts", "tee-\u200bshirt"),  # a hyphen without a break; a space without width
    ],
)
def test_invisible_differences_are_recognised(name: str) -> None:
    assert is_plural(name, "tee-shirt")
    assert is_near("tee-shirt", name)
    assert name not in ClassNames(["tee-shirt"])


def test_similar_names_are_recognised() -> None:
    assert is_near("palmtre", "palm tree")
    assert is_near("scissor", "scissors")
    assert not is_near("bear", "pear")
    assert not is_near("bat", "cat")
    assert is_plural("glasses", "glass")
    assert not is_plural("glasses", "grass")


def test_close_names_are_suggested() -> None:
    classes = ["palm tree", "mouse (animal)", "shoe", "breadfruit", "tree"]
    assert suggest_names("plam tree", classes)[0] == "palm tree"
    assert suggest_names("palmtree", classes)[0] == "palm tree"
    assert suggest_names("mouse", classes)[0] == "mouse (animal)"
    assert suggest_names("shoe (left)", classes)[0] == "shoe"
    assert suggest_names("xylophone", classes) == []


def test_only_published_classes_match_folders_written_as_one_word() -> None:
    found = match_names(["c#", "hot dog", "sea lion"], ["c#", "c++", "hotdog", "sealion"])
    assert found == {
        "c#": "c#",
        "c++": "c++",
        "hot dog": "hot dog",
        "hotdog": "hot dog",
        "sea lion": "sea lion",
        "sealion": "sealion",
    }


def test_folders_with_two_possible_counterparts_are_not_matched() -> None:
    found = match_names(["crane (bird)", "crane (machine)"], ["crane"])
    assert found["crane"] == "crane"


def test_two_folders_of_one_class_are_refused(tmp_path: Path) -> None:
    for pair in (("t-shirt", "T shirt"), ("caf\u00e9", "cafe\u0301")):
        root = write_dataset(tmp_path / pair[0], classes=[*pair, "tree"], sketches=1, photos=1)
        with pytest.raises(BadData, match="are one class") as caught:
            read_dataset(root)
        assert all(repr(name) in caught.value.found for name in pair)


@pytest.mark.parametrize(
    ("text", "encoding"),
    [
        ("shoe\nhat\n", "utf-8"),
        ("\ufeffshoe\r\nhat  \r\n\r\n", "utf-8"),
        ("shoe\rhat", "utf-8"),
    ],
)
def test_a_list_of_names_may_have_any_line_ends(tmp_path: Path, text: str, encoding: str) -> None:
    file = tmp_path / "names.txt"
    file.write_bytes(text.encode(encoding))
    assert read_names(file, "the list") == ["shoe", "hat"]


def test_unicode_line_separators_are_part_of_a_name(tmp_path: Path) -> None:
    file = tmp_path / "names.txt"
    file.write_text("a\u2028b\nc\x0bd\n", "utf-8")
    assert read_names(file, "the list") == ["a\u2028b", "c\x0bd"]


@pytest.mark.parametrize(
    ("data", "encoding"),
    [
        ("café\nsoufflé\n".encode("latin-1"), "ISO-8859-1"),
        ("café\nshoe\n".encode("utf-16"), "UTF-16"),
        ("shoe\nhat\n".encode("utf-16-le"), "UTF-16LE"),
        ("shoe\nhat\n".encode("utf-16-be"), "UTF-16BE"),
        ("shoe\nhat\n".encode("utf-32"), "UTF-32"),
    ],
)
def test_a_list_in_another_encoding_is_refused_with_the_command_that_converts_it(
    tmp_path: Path, data: bytes, encoding: str
) -> None:
    file = tmp_path / "names.txt"
    file.write_bytes(data)
    with pytest.raises(BadConfig, match=f"looks like {encoding}") as caught:
        read_names(file, "the list")
    assert f"iconv -f {encoding} -t UTF-8" in caught.value.next_step
