from __future__ import annotations

from pathlib import Path

import pytest

from sbtk_runtime.errors import BadConfig, BadData
from sbtk_train.data import Division, divide, read_dataset
from sbtk_train.data.class_names import ClassNames
from sbtk_train.data.more_images import (
    ClassMap,
    append_images,
    list_class_maps,
    open_class_map,
    read_more,
)
from sbtk_train.data.splits import Split, open_split, split_names
from sbtk_train.data.stroke_files import Drawing
from tests.tiny_data import polygon, write_dataset, write_strokes

SPLIT = Split("own", ("fence",))


@pytest.fixture(scope="module")
def division(tmp_path_factory: pytest.TempPathFactory) -> Division:
    root = write_dataset(tmp_path_factory.mktemp("data"))
    return divide(read_dataset(root), SPLIT, seed=0, validation_classes=2)


@pytest.fixture
def strokes(tmp_path: Path, division: Division) -> Path:
    names = (*division.training.classes, *division.validation.classes, "fence", "kite", "star")
    return write_strokes(tmp_path / "s.npz", [(name, [polygon(4)]) for name in names for _ in "ab"])


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    return write_dataset(tmp_path / "more", ("kite", "lamp"), sketches=0, photos=3) / "photo"


def test_images_of_known_and_of_further_classes_are_added_to_the_training_part(
    division: Division, strokes: Path, photos: Path
) -> None:
    names = ClassMap("map", {}, {"star": ("n02701002",)})
    whole = append_images(division, SPLIT, read_more([strokes], [photos]), names)
    own = division.training.classes
    assert whole.training.classes == (*own, "kite", "lamp", "star")
    assert whole.training.further_classes == 3
    drawn = [sketch for sketch in whole.training.sketches if isinstance(sketch, Drawing)]
    assert len(drawn) == 2 * (len(own) + 2)
    assert whole.training.sketches[: len(division.training.sketches)] == division.training.sketches
    assert len(whole.training.photos) == len(division.training.photos) + 6
    assert whole.validation == division.validation
    assert whole.held_out == division.held_out
    assert any("kept for validation" in notice for notice in whole.notices)


def test_unseen_classes_are_never_added(division: Division, strokes: Path) -> None:
    names = ClassMap("map", {}, {"fence": ("n02701002",), "star": ("n02701002",)})
    whole = append_images(division, SPLIT, read_more([strokes], []), names)
    assert "fence" not in whole.training.classes
    assert any("keeps unseen: fence" in notice for notice in whole.notices)


@pytest.mark.parametrize(
    ("name", "target"), [("fence", "arch"), ("star", "Fence"), ("kite", "fence")]
)
def test_a_map_that_trains_on_an_unseen_class_is_refused(
    division: Division, strokes: Path, name: str, target: str
) -> None:
    more = read_more([strokes], [])
    with pytest.raises(BadData, match=r"(?i)keeps 'fence' unseen"):
        append_images(division, SPLIT, more, ClassMap("map", {name: target}))


def test_a_class_without_photos_or_synset_is_skipped_and_named(
    division: Division, strokes: Path
) -> None:
    whole = append_images(division, SPLIT, read_more([strokes], []), ClassMap())
    assert whole.training.classes == division.training.classes
    assert any("kite, star" in notice for notice in whole.notices)


def test_classes_can_be_renamed_and_left_out(
    division: Division, strokes: Path, photos: Path
) -> None:
    known = division.training.classes[0]
    names = ClassMap("map", {"kite": known.upper(), "lamp": ""})
    whole = append_images(division, SPLIT, read_more([strokes], [photos]), names)
    assert whole.training.classes == division.training.classes
    label = whole.training.classes.index(known)
    before = int((division.training.photo_labels == label).sum())
    assert int((whole.training.photo_labels == label).sum()) == before + 3


def test_the_hash_depends_on_further_images(division: Division, strokes: Path) -> None:
    whole = append_images(division, SPLIT, read_more([strokes], []), ClassMap())
    assert whole.training.sha256 != division.training.sha256
    again = append_images(division, SPLIT, read_more([strokes], []), ClassMap())
    assert whole.training.sha256 == again.training.sha256


def test_empty_sources_are_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for sketches, photos in (
        ([tmp_path / "empty"], []),
        ([], [tmp_path / "empty"]),
        ([tmp_path / "nosuch"], []),
        ([], [tmp_path / "nosuch.npz"]),
    ):
        with pytest.raises(BadData):
            read_more(sketches, photos)


@pytest.mark.parametrize(
    "text",
    ["no toml", "[classes]\na = 1\n", '[imagenet]\na = "n1"\n', "[imagenet]\na = []\n", "[x]\n"],
)
def test_bad_class_maps_are_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "map.toml"
    path.write_text(text)
    with pytest.raises(BadConfig, match="class map"):
        open_class_map(str(path))


def test_included_class_maps_name_no_unseen_class_of_sketchy() -> None:
    assert list_class_maps() == ["quickdraw-caltech"]
    names = open_class_map("quickdraw-caltech")
    unseen = ClassNames(open_split("SK-YE").unseen)
    used = {*names.classes, *names.classes.values(), *names.imagenet} - {""}
    assert not [name for name in used if name in unseen]
    assert "SK-YE" in split_names()
