"""Counts of a data set, compared with the published ones, and reasons to refuse it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sbtk_runtime.errors import BadData
from sbtk_runtime.preprocess import Kind
from sbtk_train.data.check import ImageCheck, check_data, check_images, find_splits
from sbtk_train.data.dataset import Dataset, open_dataset
from sbtk_train.data.leakage import PUBLISHED_DATA, match_published_data
from sbtk_train.data.splits import Split, divide, open_split
from tests.tiny_data import write_dataset
from tests.tiny_layouts import SEEN, UNSEEN, write_classes, write_sake_sketchy

OWN = Split("own", UNSEEN)


@pytest.fixture(scope="module")
def sketchy(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """Return the 125 classes of Sketchy with one sketch and photo each, all of them empty."""
    root = tmp_path_factory.mktemp("sketchy")
    split = open_split("SK-SH")
    for kind in ("sketch", "photo"):
        for name in (*split.seen, *split.unseen):
            (root / kind / name).mkdir(parents=True)
            (root / kind / name / f"{name}.png").touch()
    return open_dataset(root)


def opened(dataset: Dataset) -> ImageCheck:
    return check_images(dataset.images, threads=2, advance=lambda done, total: None)


def test_per_class_counts_are_those_of_table_1(tmp_path: Path) -> None:
    counts = {"ant": 2, "bee": 5, "cow": 2}
    write_classes(
        tmp_path / "sketch", {n: [f"{i}.png" for i in range(c)] for n, c in counts.items()}
    )
    write_classes(tmp_path / "photo", {"ant": ["1.jpg"], "dog": ["1.jpg"]})
    check = check_data(open_dataset(tmp_path), [])
    assert (check.sketches.total, check.sketches.smallest, check.sketches.largest) == (9, 2, 5)
    assert check.sketches.mean == pytest.approx(3.0)
    assert check.sketches.deviation == pytest.approx(np.std([2, 5, 2]))
    assert check.photos.total == 2
    assert check.one_sided == ("bee", "cow", "dog")
    assert check.published is None


def test_a_split_by_the_data_sets_lists_is_counted_with_its_held_out_images(tmp_path: Path) -> None:
    check = check_data(open_dataset(write_sake_sketchy(tmp_path)), [OWN])
    split = check.splits[0]
    assert split.listing == "zeroshot1"
    assert (split.training_sketches, split.held_out_sketches) == (4 * 5, 2 * 5)
    assert (split.training_photos, split.queries, split.gallery) == (15, 12, 6)
    assert check.problems() == []
    assert check.skipped() == 0


def test_without_a_name_the_splits_of_lists_and_data_are_used(
    tmp_path: Path, sketchy: Dataset
) -> None:
    own = find_splits(open_dataset(write_sake_sketchy(tmp_path)), None)
    assert [(split.name, split.unseen) for split in own] == [("zeroshot1", UNSEEN)]
    assert [split.name for split in find_splits(sketchy, None)] == ["SK-SH", "SK-YE"]
    assert len(find_splits(sketchy, "random:7:1")[0].unseen) == 7


def test_sketchy_is_recognised_and_compared_with_its_published_counts(sketchy: Dataset) -> None:
    check = check_data(sketchy, find_splits(sketchy, None))
    assert check.published is not None
    assert check.published.name == "Sketchy Ext"
    by_name = {split.name: split for split in check.splits}
    assert by_name["SK-YE"].queries == 21
    published = by_name["SK-YE"].published
    assert published is not None
    assert published.queries == 12_694


def test_published_counts_add_up() -> None:
    sketchy = PUBLISHED_DATA[0]
    for split in sketchy.splits:
        assert split.training_sketches is not None
        assert split.held_out_sketches is not None
        assert split.training_photos is not None
        drawn = split.training_sketches + split.held_out_sketches + split.queries
        assert drawn == sketchy.sketches
        assert split.training_photos + split.gallery == sketchy.photos
    for data in PUBLISHED_DATA:
        of = open_split(data.splits[0].split)
        assert len(of.seen) + len(of.unseen) == data.classes
        assert match_published_data([*of.seen, *of.unseen]) is data
    assert match_published_data(["arch", "ball"]) is None


def test_missing_and_unreadable_images_are_counted_once(tmp_path: Path) -> None:
    root = write_sake_sketchy(tmp_path)
    (root / "EXTEND_image_sketchy_ready" / "ant" / "ext_0.jpg").unlink()
    torn = root / "EXTEND_image_sketchy_ready" / "bell" / "ext_1.jpg"
    torn.write_bytes(torn.read_bytes()[:200])
    found = open_dataset(root)
    check = check_data(found, [OWN], opened(found))
    assert check.skipped() == 2
    assert check.images is not None
    assert [path for path, _ in check.images.unreadable] == [torn]


def test_images_of_all_sizes_and_modes_are_read_and_counted(tmp_path: Path) -> None:
    write_dataset(tmp_path, classes=("arch", "ball"), sketches=1, photos=1)
    folder = tmp_path / "photo" / "arch"
    for number, (mode, size) in enumerate(
        [("L", (30, 50)), ("P", (9, 9)), ("CMYK", (80, 20)), ("RGBA", (5, 7)), ("I;16", (6, 6))]
    ):
        suffix = "jpg" if mode == "CMYK" else "png"
        Image.new(mode, size).save(folder / f"of_{number}.{suffix}")
    Image.new("L", (20, 20), 255).save(tmp_path / "sketch" / "arch" / "empty.png")
    found = open_dataset(tmp_path)
    images = opened(found)
    photo: Kind = "photo"
    assert {mode: count for (kind, mode), count in images.modes.items() if kind == photo} == {
        **{"RGB": 2, "L": 1, "P": 1, "CMYK": 1, "RGBA": 1, "I;16": 1}
    }
    assert images.sizes[photo, 30, 50] == images.sizes[photo, 80, 20] == 1
    assert [(path.name, reason) for path, reason in images.unreadable] == [
        ("empty.png", "the sketch is empty")
    ]


def test_progress_counts_every_image_once(tmp_path: Path) -> None:
    found = open_dataset(write_sake_sketchy(tmp_path), keep_duplicates=True)
    steps: list[tuple[int, int | None]] = []
    check_images(found.images, threads=3, advance=lambda done, total: steps.append((done, total)))
    total = len(found.images.sketches) + len(found.images.photos)
    assert steps == [(done, total) for done in range(1, total + 1)]


def test_a_split_without_any_unseen_class_in_the_data_is_a_problem(tmp_path: Path) -> None:
    found = open_dataset(write_dataset(tmp_path, sketches=2, photos=1))
    problems = check_data(found, [open_split("SK-YE")]).problems()
    assert problems == ["the data have none of the 21 unseen classes of SK-YE"]


def test_classes_that_look_unseen_and_leaks_are_problems(tmp_path: Path) -> None:
    root = write_sake_sketchy(tmp_path, seen=(*SEEN, "trees"))
    source = root / "EXTEND_image_sketchy_ready" / "ant" / "ext_0.jpg"
    (root / "EXTEND_image_sketchy_ready" / "tree" / "ext_6.jpg").write_bytes(source.read_bytes())
    found = open_dataset(root)
    problems = check_data(found, [OWN], opened(found)).problems()
    assert len(problems) == 2
    assert "'trees' counts as seen in own and looks like the unseen 'tree'" in problems[0]
    assert "the same bytes" in problems[1]
    assert check_data(found, [OWN]).problems() == problems[:1]


def test_files_that_training_does_not_read_are_counted_by_suffix(tmp_path: Path) -> None:
    root = write_dataset(tmp_path, sketches=2, photos=2)
    (root / "photo" / "ball" / "0.jpg").rename(root / "photo" / "ball" / "0.JFIF")
    for name in ("a.svg", "b.SVG", "notes.txt", "Thumbs.db", ".DS_Store", "._0.jpg", "plain"):
        (root / "photo" / "arch" / name).write_bytes(b"x")
    check = check_data(open_dataset(root), [])
    assert check.photos.total == 12
    assert check.notices()[0] == (
        "4 files among the photo images not read: 2 .svg, 1 without a suffix, 1 .txt"
    )
    assert not any("not read" in notice for notice in check.notices()[1:])
    assert check.notices()[0] in check.dataset.images.notices
    assert check.skipped() == 2
    assert not check.is_whole()
    for name in ("a.svg", "b.SVG"):
        (root / "photo" / "arch" / name).unlink()
    assert check_data(open_dataset(root), []).is_whole()


def test_a_nested_class_folder_is_a_problem(tmp_path: Path) -> None:
    root = write_dataset(tmp_path, sketches=2, photos=2)
    (root / "photo" / "animals").mkdir()
    (root / "photo" / "ball").rename(root / "photo" / "animals" / "ball")
    check = check_data(open_dataset(root), [])
    assert check.problems() == [
        "the photo images of 1 of the class folders are in subfolders; move them up: "
        f"{root}/photo/animals"
    ]
    assert check.skipped() == 2
    assert check.too_few == ("animals", "ball")


def test_an_empty_domain_is_a_problem(tmp_path: Path) -> None:
    root = write_dataset(tmp_path, sketches=2, photos=2)
    for path in root.glob("photo/*/*"):
        path.unlink()
    check = check_data(open_dataset(root), [])
    assert check.problems() == ["there are no photo images in the class folders"]


def test_classes_with_one_sketch_are_named_and_too_few_others_are_a_problem(
    tmp_path: Path,
) -> None:
    root = write_dataset(tmp_path, sketches=2, photos=2)
    (root / "sketch" / "ball" / "0.png").unlink()
    check = check_data(open_dataset(root), [])
    assert check.too_few == ("ball",)
    assert any("two sketches and one photo in each: ball" in each for each in check.notices())
    assert not check.problems()
    assert not check.is_whole()
    split = Split("x", ("arch", "crate", "disc"))
    (problem,) = check_data(open_dataset(root), [split]).problems()
    assert problem.startswith("2 seen classes of x have two sketches and one photo; training needs")


@pytest.mark.parametrize(
    ("classes", "way_out"),
    [(3, "0 --selection last"), (4, "1 or fewer"), (12, "9 or fewer"), (13, "")],
)
def test_too_few_classes_for_the_defaults_are_reported_with_the_options(
    tmp_path: Path, classes: int, way_out: str
) -> None:
    root = write_dataset(tmp_path, [f"c{i}" for i in range(classes + 1)], sketches=2, photos=1)
    data = open_dataset(root)
    split = Split("x", ("c0",))
    check = check_data(data, [split])
    notices = [line for line in check.notices() if "unless you lower --validation-classes" in line]
    assert check.problems() == []
    if way_out:
        (line,) = notices
        assert line.endswith(f": --validation-classes {way_out}")
        count = int(way_out.split()[0])
        assert len(divide(data.images, split, seed=0, validation_classes=count).training.classes)
        with pytest.raises(BadData, match="at least 13"):
            divide(data.images, split, seed=0)
    else:
        assert notices == []
        divide(data.images, split, seed=0)


def test_archive_and_system_folders_are_not_classes(tmp_path: Path) -> None:
    root = write_dataset(tmp_path / "data", sketches=2, photos=2)
    for folder in ("__MACOSX", "@eaDir"):
        for kind in ("sketch", "photo"):
            (root / kind / folder / "arch").mkdir(parents=True)
            (root / kind / folder / "._0.png").write_bytes(b"x")
    (tmp_path / "__MACOSX" / "sketch" / "arch").mkdir(parents=True)
    (tmp_path / "__MACOSX" / "photo" / "arch").mkdir(parents=True)
    (root / "photo" / "arch" / "@eaDir").mkdir()
    (root / "photo" / "arch" / "@eaDir" / "SYNOPHOTO.jpg").write_bytes(b"x")
    check = check_data(open_dataset(tmp_path), [])
    assert len(check.dataset.images.classes) == 6
    assert f"{root / 'sketch' / '__MACOSX'} is not a class and is not read" in check.notices()
    assert check.is_whole()


def test_one_photo_in_two_classes_is_reported_with_both(tmp_path: Path) -> None:
    root = write_dataset(tmp_path, sketches=2, photos=2)
    source, copy = root / "photo" / "arch" / "0.jpg", root / "photo" / "ball" / "copy.jpg"
    copy.write_bytes(source.read_bytes())
    (root / "photo" / "arch" / "again.jpg").write_bytes(source.read_bytes())
    found = open_dataset(root)
    check = check_data(found, [], opened(found))
    assert check.in_two_classes == ((str(source), str(copy)),)
    assert f"in two classes: 1 of the images, such as {source} and {copy}" in check.notices()
    assert not check.is_whole()


def test_data_too_small_to_export_are_reported_with_and_without_a_split(tmp_path: Path) -> None:
    data = open_dataset(write_dataset(tmp_path, sketches=4, photos=4))
    for splits in ([], [Split("x", ("arch",))]):
        notices = [line for line in check_data(data, splits).notices() if "sbtk export" in line]
        assert len(notices) == 1
        assert "sbtk export will refuse a model of these data" in notices[0]
    larger = open_dataset(write_dataset(tmp_path / "larger", sketches=6, photos=6))
    assert not any("sbtk export" in line for line in check_data(larger, []).notices())
