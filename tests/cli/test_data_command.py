"""`sbtk data check`: its report and its exit codes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sbtk_cli.main import main
from tests.processes import run_python
from tests.tiny_data import write_dataset
from tests.tiny_layouts import UNSEEN, write_sake_sketchy


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Return Sketchy in SAKE's layout, seven classes of it."""
    return write_sake_sketchy(tmp_path / "data")


def test_a_good_data_set_is_described(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "check", str(data)]) == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert "Sketchy Ext as in SAKE's dataset.zip" in lines[0]
    assert "sketches 42" in lines
    assert "duplicate photos 14, left out" in lines
    assert "split zeroshot1, by the lists of zeroshot1" in lines
    assert "sketches held out 10" in lines
    assert "gallery (photos) 6" in lines
    assert "63 images can be read, 0 cannot" in lines
    assert "sketch sizes: 8 x 8 42 times; modes: L 42 times" in lines


def test_json_has_the_same_facts_as_the_text(
    data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["data", "check", str(data), "--json", "--keep-duplicates", "--quick"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["layout"] == "sake-sketchy"
    assert (answer["sketches"]["total"], answer["photos"]["total"]) == (42, 35)
    assert answer["duplicates"] == 14
    assert answer["keeps_duplicates"] is True
    assert answer["images"] is None
    split = answer["splits"][0]
    assert split["match"]["unseen"] == list(UNSEEN)
    assert split["gallery"] == 10
    assert split["leakage"]["contents"] is None


def test_missing_and_unreadable_images_give_exit_code_3(
    data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (data / "EXTEND_image_sketchy_ready" / "ant" / "ext_0.jpg").unlink()
    assert main(["data", "check", str(data), "--quick"]) == 3
    shown = capsys.readouterr().out
    assert "all_photo_filelist_train.txt: 1 of its 25 images missing; first" in shown
    torn = data / "EXTEND_image_sketchy_ready" / "tree" / "ext_5.jpg"
    torn.write_bytes(b"torn")
    assert main(["data", "check", str(data), "--json"]) == 3
    answer = json.loads(capsys.readouterr().out)
    assert answer["skipped"] == 2
    assert answer["missing"][0]["first"] == [
        str(data / "EXTEND_image_sketchy_ready" / "ant" / "ext_0.jpg")
    ]
    assert answer["images"]["unreadable"][0]["path"] == str(torn)


def test_images_that_training_would_skip_give_exit_code_3(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = write_dataset(tmp_path / "data", sketches=2, photos=2)
    assert main(["data", "check", str(root), "--quick"]) == 0
    (root / "sketch" / "ball" / "0.png").rename(root / "sketch" / "ball" / "0.svg")
    capsys.readouterr()
    assert main(["data", "check", str(root), "--quick"]) == 3
    shown = capsys.readouterr().out
    assert "1 file among the sketch images not read: 1 .svg" in shown
    assert "1 of 6 classes are left out of training" in shown
    assert main(["data", "check", str(root), "--json"]) == 3
    answer = json.loads(capsys.readouterr().out)
    assert answer["ignored"]["sketch"]["suffixes"] == {".svg": 1}
    assert answer["too_few"] == ["ball"]


def test_the_same_photo_in_seen_and_unseen_classes_gives_exit_code_1(
    data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = data / "EXTEND_image_sketchy_ready"
    (folder / "tree" / "ext_5.jpg").write_bytes((folder / "ant" / "ext_0.jpg").read_bytes())
    assert main(["data", "check", str(data)]) == 1
    shown = capsys.readouterr().out
    assert "PROBLEM: the same bytes are on both sides of zeroshot1" in shown
    assert "ext_0.jpg" in shown
    assert main(["data", "check", str(data), "--quick"]) == 0


def test_a_split_file_is_compared_by_class_names(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = write_dataset(tmp_path / "data", sketches=2, photos=1)
    split = tmp_path / "unseen.txt"
    split.write_text("balls\ncrate\n")
    assert main(["data", "check", str(root), "--split", str(split), "--quick"]) == 1
    shown = capsys.readouterr().out
    assert "not in the data: balls" in shown
    assert "'ball' counts as seen in unseen.txt and looks like the unseen 'balls'" in shown
    assert main(["data", "check", str(root), "--split", "random:2:0"]) == 0


def test_the_error_for_another_folder_shows_the_layout_of_a_data_set(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "holiday").mkdir()
    assert main(["data", "check", str(tmp_path)]) == 1
    shown = capsys.readouterr().err
    assert "sketch/<class>/* and photo/<class>/*" in shown
    assert "SAKE" in shown
    assert main(["data", "check", str(tmp_path), "--split", "SK-XX"]) == 1


def test_an_unknown_split_is_a_usage_error(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "check", str(data), "--split", "SK-XX"]) == 2
    assert "SK-SH-sempcyc" in capsys.readouterr().err


def test_checking_data_needs_no_torch(data: Path) -> None:
    run_python(
        "import sys\n"
        "sys.modules['torch'] = None\n"
        "from sbtk_cli.main import main\n"
        "raise SystemExit(main(sys.argv[1:]))\n",
        *("data", "check", data),
    )
