from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from sbtk_runtime.errors import BadConfig, BadData
from sbtk_runtime.files import printable_text
from sbtk_train.data.class_names import ClassNames
from sbtk_train.data.dataset import read_dataset
from sbtk_train.data.more_images import (
    ClassMap,
    append_images,
    list_class_maps,
    open_class_map,
    read_more,
)
from sbtk_train.data.splits import Division, Split, divide, open_split, split_names
from sbtk_train.data.strokes import Drawing
from tests.tiny_data import polygon, write_dataset, write_strokes

SPLIT = Split("own", ("fence",))


@pytest.fixture(scope="module")
def division(tmp_path_factory: pytest.TempPathFactory) -> Division:
    root = write_dataset(tmp_path_factory.mktemp("data"))
    return divide(read_dataset(root), SPLIT, seed=0, validation_classes=2)


@pytest.fixture
def strokes(tmp_path: Path, division: Division) -> Path:
    names = (
        *division.training.classes,
        *division.validation.classes,
        "fence",
        "fences",
        "kite",
        "star",
    )
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
    assert any("keeps unseen: fence, fences" in notice for notice in whole.notices)


@pytest.mark.parametrize(
    ("name", "target"),
    [("fence", "arch"), ("star", "Fence"), ("kite", "fences"), ("fences", "arch")],
)
def test_a_map_that_trains_on_an_unseen_class_is_refused(
    division: Division, strokes: Path, name: str, target: str
) -> None:
    more = read_more([strokes], [])
    with pytest.raises(BadData, match=r"(?i)keeps 'fence' unseen"):
        append_images(division, SPLIT, more, ClassMap("map", {name: target}))


def test_an_included_map_leaves_out_what_a_split_keeps_unseen(
    division: Division, tmp_path: Path
) -> None:
    photos = write_dataset(tmp_path / "more", ("airplanes", "kite"), sketches=0, photos=1) / "photo"
    split = Split("own", ("airplane",))
    names = open_class_map("quickdraw-caltech")
    whole = append_images(division, split, read_more([], [photos]), names)
    assert whole.training.classes == (*division.training.classes, "kite")
    assert "left out 1 class that own keeps unseen: airplanes" in whole.notices


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


def test_the_folder_above_a_source_is_refused_with_its_name(tmp_path: Path) -> None:
    more = write_dataset(tmp_path / "more", ("kite",), sketches=0, photos=1)
    with pytest.raises(BadData, match=r"next: name .*/more/photo$"):
        read_more([], [more])


@pytest.mark.parametrize(
    "text",
    [
        *(
            "no toml",
            "[classes]\na = 1\n",
            '[imagenet]\na = "n1"\n',
            "[imagenet]\na = []\n",
            "[x]\n",
        ),
        *("classes = 1\n", '[classes]\n"pine tree" = "tree"\nPine_Tree = ""\n'),
    ],
)
def test_bad_class_maps_are_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "map.toml"
    path.write_text(text)
    with pytest.raises(BadConfig, match="class map"):
        open_class_map(str(path))


@pytest.mark.parametrize("wnid", ["n00000001", "2701002", "ambulance", "N02701002"])
def test_ids_that_are_no_imagenet_class_are_refused_by_name(tmp_path: Path, wnid: str) -> None:
    path = tmp_path / "map.toml"
    path.write_text(f'[imagenet]\nkite = ["n02701002", "{wnid}"]\n')
    with pytest.raises(BadConfig, match=f"'kite' the ImageNet class '{wnid}'"):
        open_class_map(str(path))


def test_included_class_maps_name_no_unseen_class_of_sketchy() -> None:
    assert list_class_maps() == ["quickdraw-caltech"]
    names = open_class_map("quickdraw-caltech")
    unseen = ClassNames(open_split("SK-YE").unseen)
    used = {*names.classes, *names.classes.values(), *names.imagenet} - {""}
    assert not [name for name in used if name in unseen]
    assert "SK-YE" in split_names()


@pytest.mark.parametrize(
    "name",
    [
        *("fences", "Fence (wood)", "FENCES"),
        # A wide letter, wide brackets, a space without width, a soft hyphen.
        *("f\uff45nce", "Fence\uff08wood\uff09", "fence\u200b", "fen\u00adce"),
    ],
)
def test_other_names_of_unseen_classes_are_left_out_and_named(
    division: Division, tmp_path: Path, name: str
) -> None:
    photos = write_dataset(tmp_path / "more", (name,), sketches=0, photos=1) / "photo"
    more = read_more([], [photos])
    whole = append_images(division, SPLIT, more, ClassMap())
    assert whole.training.classes == division.training.classes
    assert f"left out 1 class that own keeps unseen: {printable_text(name)}" in whole.notices
    with pytest.raises(BadData, match="keeps 'fence' unseen"):
        append_images(division, SPLIT, more, ClassMap("map", {name: name}))


def test_plurals_of_validation_classes_are_kept_for_validation(
    division: Division, tmp_path: Path
) -> None:
    name = f"{division.validation.classes[0]}s"
    photos = write_dataset(tmp_path / "more", (name,), sketches=0, photos=1) / "photo"
    whole = append_images(division, SPLIT, read_more([], [photos]), ClassMap())
    assert whole.training.classes == division.training.classes
    assert f"left out 1 class kept for validation: {name}" in whole.notices


def test_similar_names_are_questioned_unless_the_map_has_them(
    division: Division, tmp_path: Path
) -> None:
    plural = f"{division.training.classes[0]}s"
    photos = (
        write_dataset(tmp_path / "more", ("fenze", "kite", "Kites", plural), sketches=0, photos=1)
        / "photo"
    )
    more = read_more([], [photos])
    asked = append_images(division, SPLIT, more, ClassMap()).notices
    assert "WARNING: 'fenze' is trained on; is it the unseen 'fence'?" in asked
    for name, other in ((plural, plural[:-1]), ("kite", "Kites")):
        assert any(f"{name!r} and {other!r} are two classes" in each for each in asked)
    checked = ClassMap("map", {"fenze": "fenze", plural: plural})
    told = append_images(division, SPLIT, more, checked).notices
    assert not [each for each in told if "fenze" in each or plural in each]


def test_spellings_of_a_name_are_one_class_in_sources_and_in_the_map(
    division: Division, strokes: Path, tmp_path: Path
) -> None:
    photos = write_dataset(tmp_path / "more", ("Kite", "LAMP"), sketches=0, photos=1) / "photo"
    names = ClassMap("map", {"lamp": " ", "lmap": "x"}, {"STAR": ("n02701002",)})
    whole = append_images(division, SPLIT, read_more([strokes], [photos]), names)
    assert whole.training.classes == (*division.training.classes, "Kite", "STAR")
    label = whole.training.classes.index("Kite")
    assert int((whole.training.sketch_labels == label).sum()) == 2
    assert "left out 1 class that the class map leaves out: LAMP" in whole.notices
    assert "1 of 2 classes of the class map are in no source: lmap" in whole.notices


def test_what_is_not_read_in_folders_is_counted(tmp_path: Path) -> None:
    photos = write_dataset(tmp_path / "more", ("kite",), sketches=0, photos=1) / "photo"
    (photos / "kite" / "notes.txt").write_text("")
    (photos / "kite" / "older").mkdir()
    shutil.copy(photos / "kite" / "0.jpg", photos / "kite" / "older")
    (photos / "lamp").mkdir()
    told = "\n".join(read_more([], [photos]).notices)
    assert "1 file among the photo images not read: 1 .txt" in told
    assert "1 photo images in folders below a class folder" in told
    assert "class folders without an image: lamp" in told


def test_images_on_a_list_are_of_the_class_of_their_folder(tmp_path: Path) -> None:
    root = write_dataset(tmp_path / "more", ("kite", "lamp"), sketches=2, photos=2)
    (root / "lists").mkdir()
    listed = root / "lists" / "photos.txt"
    listed.write_text("photo/kite/0.jpg 0\nphoto/lamp/1.jpg\n\nphoto/lamp/9.jpg 1\n")
    own = root / "sketch" / "sketches.txt"
    own.write_text("kite/1.png\n")
    more = read_more([own], [listed])
    assert more.sketches == {"kite": (root / "sketch" / "kite" / "1.png",)}
    assert more.photos == {
        "kite": (root / "photo" / "kite" / "0.jpg",),
        "lamp": (root / "photo" / "lamp" / "1.jpg",),
    }
    (told,) = more.notices
    assert "photos.txt: 1 of 3 images missing; first " in told
    assert "lamp/9.jpg" in told
    listed.write_text("kite/0.png 0\n")
    with pytest.raises(BadData, match="none of the 1 image on"):
        read_more([], [listed])


def test_names_in_messages_are_on_one_line(division: Division, tmp_path: Path) -> None:
    strokes = write_strokes(tmp_path / "s.npz", [("a\x1b[31m\nb", [polygon(4)])])
    whole = append_images(division, SPLIT, read_more([strokes], []), ClassMap())
    assert whole.notices[-1].endswith(r"a\x1b[31m\nb")
