from __future__ import annotations

from pathlib import Path

import pytest

from sbtk_runtime.errors import BadConfig
from sbtk_train.splits import Split, open_split, split_names


def test_published_splits_have_their_published_sizes() -> None:
    sizes = {name: len(open_split(name).unseen) for name in split_names()}
    assert sizes["SK-SH"] == 25
    assert sizes["SK-YE"] == 21
    assert sizes["TUB-SH"] == 30
    assert sizes["QD-DE"] == 30


def test_split_of_a_file_is_the_set_of_its_lines(tmp_path: Path) -> None:
    file = tmp_path / "mine.txt"
    file.write_text("cow\n\ncat\ncow\n")
    assert open_split(str(file)) == Split("mine.txt", ("cat", "cow"))


@pytest.mark.parametrize("content", [None, "", "\n \n"])
def test_missing_or_empty_file_names_the_known_splits(tmp_path: Path, content: str | None) -> None:
    file = tmp_path / "mine.txt"
    if content is not None:
        file.write_text(content)
    with pytest.raises(BadConfig):
        open_split(str(file))


def test_class_is_unseen_however_its_name_is_written() -> None:
    split = Split("x", ("hot-air balloon", "tree"))
    assert split.is_unseen("hot_air_balloon")
    assert split.is_unseen("Hot-Air_Balloon")
    assert split.seen_among(["tree", "cat", "hot air balloon"]) == ["cat"]


def test_hash_depends_on_the_classes_and_not_on_their_spelling_or_order() -> None:
    assert Split("a", ("x y", "z")).sha256 == Split("b", ("z", "x_y")).sha256
    assert Split("a", ("x",)).sha256 != Split("a", ("y",)).sha256
