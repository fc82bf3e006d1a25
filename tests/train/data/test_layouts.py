"""Published layouts of data sets."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path

import pytest

from sbtk_runtime.errors import BadData
from sbtk_train.data.dataset import open_dataset, read_dataset
from sbtk_train.data.image_set import ImageSet
from sbtk_train.data.layouts import recognise
from sbtk_train.data.splits import Split, divide, open_split
from tests.tiny_data import write_dataset
from tests.tiny_layouts import (
    SEEN,
    TX,
    UNSEEN,
    write_classes,
    write_image,
    write_list,
    write_names,
    write_sake_lists,
    write_sake_sketchy,
)

OWN = Split("own", UNSEEN)


def sketches_of(data: ImageSet) -> Counter[str]:
    return Counter(data.classes[label] for label in data.sketch_labels)


def photos_of(data: ImageSet) -> Counter[str]:
    return Counter(data.classes[label] for label in data.photo_labels)


def test_sakes_sketchy_is_read_by_its_lists_without_duplicate_photos(tmp_path: Path) -> None:
    found = open_dataset(write_sake_sketchy(tmp_path))
    assert found.layout.name == "sake-sketchy"
    assert found.images.classes == tuple(sorted((*SEEN, *UNSEEN)))
    assert set(sketches_of(found.images).values()) == {6}
    # One original is in both folders by name, the other by its bytes: `c.jpg`.
    assert set(photos_of(found.images).values()) == {3}
    assert {path.parent.parent.name for path in found.images.photos} == {
        "EXTEND_image_sketchy_ready"
    }
    assert found.duplicates == 2 * 7
    assert any("14 duplicate photos" in notice for notice in found.images.notices)


def test_duplicates_are_kept_as_in_published_galleries(tmp_path: Path) -> None:
    data = read_dataset(write_sake_sketchy(tmp_path), keep_duplicates=True)
    assert set(photos_of(data).values()) == {5}
    assert not data.notices


def test_images_keep_the_order_of_the_list_within_their_class(tmp_path: Path) -> None:
    data = read_dataset(write_sake_sketchy(tmp_path))
    ants = [path.name for path in data.sketch_files if path.parent.name == "ant"]
    assert ants == [f"n00000000_1-{drawing}.png" for drawing in (4, 3, 2, 1, 6, 5)]


def test_the_division_holds_out_the_sketches_of_the_lists(tmp_path: Path) -> None:
    data = read_dataset(write_sake_sketchy(tmp_path))
    division = divide(data, OWN, seed=0, validation_classes=1)
    assert len(division.training.classes) == 4
    assert len(division.held_out.sketches) == 2 * 4
    assert {path.stem[-1] for path in division.held_out.sketch_files} == {"5", "6"}
    assert {path.stem[-1] for path in division.training.sketch_files} == set("1234")
    assert any("zeroshot1" in notice for notice in division.notices)


def test_lists_of_another_split_do_not_affect_the_held_out_images(tmp_path: Path) -> None:
    data = read_dataset(write_sake_sketchy(tmp_path))
    division = divide(data, Split("other", ("ant",)), seed=0, validation_classes=1)
    assert len(division.held_out.sketches) == len(division.training.classes) == 5
    assert not any("zeroshot1" in notice for notice in division.notices)


def test_each_split_finds_its_lists_among_several(tmp_path: Path) -> None:
    root = write_sake_sketchy(tmp_path)
    other_unseen = ("ant", "bell")
    other_seen = tuple(name for name in (*SEEN, *UNSEEN) if name not in other_unseen)
    folder = write_sake_lists(root, other_seen, other_unseen, "zeroshot2")
    # As in ZSE-SBIR's repository, where no list names the sketches that are held out.
    (folder / f"sketch_{TX}_ready_filelist_test.txt").unlink()
    kept = folder / f"sketch_{TX}_ready_filelist_train.txt"
    rows = [line.rpartition(" ") for line in kept.read_text().splitlines()]
    write_list(kept, [(path, int(label)) for path, _, label in rows if "-4." not in path])
    data = read_dataset(root)
    assert [listing.name for listing in data.listings] == ["zeroshot1", "zeroshot2"]
    first = divide(data, OWN, seed=0, validation_classes=1)
    second = divide(data, Split("x", other_unseen), seed=0, validation_classes=1)
    assert {path.stem[-1] for path in first.held_out.sketch_files} == {"5", "6"}
    assert {path.stem[-1] for path in second.held_out.sketch_files} == {"4", "5", "6"}


def test_a_few_missing_images_are_skipped_and_named(tmp_path: Path) -> None:
    root = write_sake_sketchy(tmp_path)
    gone = root / "EXTEND_image_sketchy_ready" / "bell" / "ext_1.jpg"
    gone.unlink()
    data = read_dataset(root)
    assert photos_of(data)["bell"] == 2
    notice = next(notice for notice in data.notices if "all_photo_filelist_train" in notice)
    assert "1 missing images" in notice
    assert str(gone) in notice
    assert open_dataset(root).missing[0].missing == (gone,)


def test_a_list_whose_images_were_not_unpacked_is_refused(tmp_path: Path) -> None:
    root = write_sake_sketchy(tmp_path)
    shutil.rmtree(root / "EXTEND_image_sketchy_ready" / "ant")
    with pytest.raises(BadData, match=r"lists 25 images, of which 3 are missing.*ant"):
        read_dataset(root)


def test_spaces_in_paths_and_class_names_of_tu_berlin_are_supported(tmp_path: Path) -> None:
    seen, unseen = ("alarm clock", "flower with stem"), ("hot air balloon", "t-shirt")
    for label, names in enumerate((seen, unseen)):
        part = ("train", "zero")[label]
        rows: dict[str, list[tuple[str, int]]] = {"png_ready": [], "ImageResized_ready": []}
        for number, name in enumerate(names):
            for folder in rows:
                path = f"{folder}/{name}/{10 * label + number}.png"
                write_image(tmp_path / path, len(path))
                rows[folder].append((path, number))
        for folder, listed in rows.items():
            write_list(tmp_path / "zeroshot" / f"{folder}_filelist_{part}.txt", listed)
        write_names(tmp_path / "zeroshot" / f"cname_cid{'_zero' * label}.txt", names)
    data = read_dataset(tmp_path)
    assert data.classes == ("alarm clock", "flower with stem", "hot air balloon", "t-shirt")
    assert sketches_of(data) == photos_of(data) == Counter(data.classes)
    assert [open_split("TUB-SH").is_unseen(name) for name in data.classes] == [0, 0, 1, 1]


def test_sem_pcycs_sketchy_is_read_with_its_renamed_folders(tmp_path: Path) -> None:
    names = ("hot_air_balloon", "jack_o_lantern", "wine_bottle")
    write_classes(tmp_path / "sketch" / TX, {name: ["n00000001_1-1.png"] for name in names})
    # The archive also brings sketches that were moved or scaled; they are not used.
    write_classes(tmp_path / "sketch" / "tx_000000000010", {"ant": ["n00000001_1-1.png"]})
    write_classes(tmp_path / "photo" / TX, {name: ["n00000001_1.jpg"] for name in names})
    extended = {name: ["n00000001_1.jpg", "ext_1.jpg"] for name in names}
    write_classes(tmp_path / "extended_photo", extended)
    found = open_dataset(tmp_path)
    assert found.layout.name == "sem-pcyc-sketchy"
    assert found.images.classes == names
    assert set(photos_of(found.images).values()) == {2}
    assert found.duplicates == 3
    assert open_split("SK-SH-sempcyc").is_unseen("jack_o_lantern")
    assert open_split("SK-SH-sempcyc").seen_among(names) == ["hot_air_balloon", "wine_bottle"]


def test_photo_folders_of_tu_berlin_are_matched_with_the_sketches_classes(tmp_path: Path) -> None:
    folder_of = {
        "flying bird": "flyingbird",
        "space shuttle": "spacesshuttle",
        "giraffe": "griaffe",
        "chandelier": "chandeler",
        "diamond": "diamod",
        "spider": "spidar",
        "trombone": "tromobone",
        "wrist-watch": "wristwatching",
        "bear (animal)": "bearanimal",
        "mouse (animal)": "mouse",
        "computer-mouse": "computermouse",
        "pipe (for smoking)": "pipe",
        "ant": "ant",
    }
    write_classes(tmp_path / "sketches", {name: ["1.png"] for name in folder_of})
    write_classes(tmp_path / "images", {name: ["1.jpg", "2.jpg"] for name in folder_of.values()})
    found = open_dataset(tmp_path)
    assert found.layout.name == "sketches-images"
    assert found.images.classes == tuple(sorted(folder_of))
    for label, path in zip(found.images.photo_labels, found.images.photos, strict=True):
        assert folder_of[found.images.classes[label]] == path.parent.name
    assert set(photos_of(found.images).values()) == {2}
    assert dict(found.renamed) == {to: name for name, to in folder_of.items() if name != to}


@pytest.mark.parametrize(
    ("sketches", "photos"),
    [
        ("QuickDraw_sketches_final", "QuickDraw_images_final"),
        ("QuickDraw_sketches", "EXTEND_image_quickdraw"),
        ("sketches", "images"),
    ],
)
@pytest.mark.parametrize("spelling", ["palm tree", "palm_tree"])
def test_palm_tree_of_quickdraw_is_never_trained_on(
    tmp_path: Path, sketches: str, photos: str, spelling: str
) -> None:
    names = ("ant", "bee", "cruise ship", "axe", "pizza")
    write_classes(tmp_path / sketches, {name: ["1.png", "2.png"] for name in (*names, spelling)})
    write_classes(tmp_path / photos, {name: ["1.jpg"] for name in (*names, "palm tree")})
    data = read_dataset(tmp_path)
    division = divide(data, open_split("QD-DE"), seed=0, validation_classes=1)
    assert photos_of(data)[spelling] == 1
    used = {*division.training.classes, *division.validation.classes}
    assert used == set(names)


def test_with_lists_of_unseen_classes_only_quickdraw_folders_are_read(
    tmp_path: Path,
) -> None:
    names = {name: ["1.png", "2.png"] for name in ("ant", "bee", "palm tree")}
    write_classes(tmp_path / "sketches", names)
    write_classes(tmp_path / "images", names, seed=100)
    zero = tmp_path / "zeroshot"
    write_list(zero / "sketch_zero.txt", [("sketches/palm tree/1.png", 0)])
    write_list(zero / "all_photo_zero.txt", [("images/palm tree/9.png", 0)])
    write_names(zero / "cname_cid_zero.txt", ["palm tree"])
    write_names(zero / "cname_cid.txt", ["bee", "ant"])
    found = open_dataset(tmp_path)
    assert set(sketches_of(found.images).values()) == set(photos_of(found.images).values()) == {2}
    assert found.images.listings[0].unseen == ("palm tree",)
    assert [path.name for path in found.missing[0].missing] == ["9.png"]


def test_train_and_val_folders_are_one_data_set_with_a_split(
    tmp_path: Path,
) -> None:
    for part, names in (("train", SEEN), ("val", UNSEEN)):
        write_dataset(tmp_path / part, classes=names, sketches=2, photos=2)
    found = open_dataset(tmp_path)
    assert found.layout.name == "train-val"
    assert set(sketches_of(found.images).values()) == {2}
    assert found.duplicates == 0
    assert OWN.is_of(found.images.listings[0].unseen)


def test_spellings_of_one_class_in_two_domains_are_matched(tmp_path: Path) -> None:
    write_classes(tmp_path / "sketch", {"palm tree": ["1.png"]})
    write_classes(tmp_path / "photo", {"palm-tree": ["1.png"], "c++": ["1.png"], "c#": ["1.png"]})
    data = read_dataset(tmp_path)
    assert data.classes == ("c#", "c++", "palm tree")
    assert photos_of(data)["palm tree"] == 1
    assert any("palm-tree is palm tree" in notice for notice in data.notices)


def test_files_that_are_not_images_are_ignored(tmp_path: Path) -> None:
    write_classes(tmp_path / "sketch", {"ant": ["1.png"]})
    write_classes(tmp_path / "photo", {"ant": ["1.JPEG"]})
    (tmp_path / "photo" / "ant" / "._1.jpg").write_bytes(b"of macOS")
    (tmp_path / "photo" / "ant" / "Thumbs.db").write_bytes(b"of Windows")
    (tmp_path / "photo" / ".hidden").mkdir()
    data = read_dataset(tmp_path)
    assert data.classes == ("ant",)
    assert [path.name for path in data.photos] == ["1.JPEG"]


def test_the_parent_folder_of_a_single_data_set_is_accepted(tmp_path: Path) -> None:
    write_sake_sketchy(tmp_path / "Sketchy")
    assert recognise(tmp_path).root == tmp_path / "Sketchy"
    write_dataset(tmp_path / "TUBerlin", sketches=1, photos=1)
    with pytest.raises(BadData, match="2 data sets: Sketchy, TUBerlin"):
        recognise(tmp_path)


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(BadData, match=r"no folder .*nowhere"):
        read_dataset(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("file", "line", "message"),
    [
        ("all_photo_filelist_zero.txt", "EXTEND_image_sketchy_ready/tree/ext_5.jpg", "a label"),
        ("all_photo_filelist_zero.txt", "../../tree/ext_5.jpg 0", "below"),
        ("all_photo_filelist_zero.txt", "/tree/ext_5.jpg 0", "below"),
        ("all_photo_filelist_zero.txt", "EXTEND_image_sketchy_ready/tree/ext_5.jpg 2", "0 to 1"),
        ("all_photo_filelist_zero.txt", "EXTEND_image_sketchy_ready/tree/x.jpg 1", "wine_bottle"),
        ("cname_cid.txt", "bat", "its number"),
        ("cname_cid.txt", "bat 7", "from 0"),
    ],
)
def test_a_damaged_list_is_refused_with_its_line(
    tmp_path: Path, file: str, line: str, message: str
) -> None:
    root = write_sake_sketchy(tmp_path)
    path = root / "zeroshot1" / file
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(BadData, match=file) as caught:
        read_dataset(root)
    assert message in str(caught.value)
