"""`sbtk train` refuses mistakes before the first epoch."""

from __future__ import annotations

from pathlib import Path

import pytest

from sbtk_cli.main import main
from sbtk_train.config import read_config
from sbtk_train.runs.checkpoint import LAST, STUDENT

TINY = """
    --weights none --backbone resnet18 --size 32 --final-epochs 0 --quadruplets 2 --dim 8
    --validation-classes 2 --precision fp32 --threads 1 --seed 3 --no-knowledge --epochs 1 --quiet
""".split()  # noqa: SIM905


@pytest.mark.parametrize("option", ["--split", "--classes"])
def test_a_list_with_a_missing_class_is_refused_unless_allowed(
    data: Path, tmp_path: Path, option: str, capsys: pytest.CaptureFixture[str]
) -> None:
    named = tmp_path / "names.txt"
    listed = ["arch", "bal"] if option == "--split" else ["arch", "ball", "crate", "disc", "easl"]
    named.write_text("\n".join(listed))
    words = ["train", str(data), *TINY, option, str(named), "--out", str(tmp_path / "run")]
    assert main(words) == 1
    shown = capsys.readouterr().err
    assert f"1 of {len(listed)} classes in names.txt are not in the data" in shown
    assert "did you mean 'ball'" in shown or "did you mean 'easel'" in shown
    assert not (tmp_path / "run" / LAST).exists()
    if option == "--split":
        assert main([*words, "--allow-missing"]) == 0
        assert (tmp_path / "run" / STUDENT).is_file()
        assert read_config(tmp_path / "run").allow_missing


def test_data_check_reports_missing_classes_of_a_split_file(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    named = tmp_path / "names.txt"
    named.write_text("arch\nbal\n")
    words = ["data", "check", str(data), "--split", str(named), "--quick"]
    assert main(words) == 1
    assert "PROBLEM: 1 of 2 classes in names.txt are not in the data" in capsys.readouterr().out
    assert main([*words, "--allow-missing"]) == 1  # 'ball' looks like the unseen 'bal'
    named.write_text("arch\nxylophone\n")
    assert main([*words, "--allow-missing"]) == 0


def test_resuming_what_is_not_a_run_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "x.md").touch()
    for path in (tmp_path, tmp_path / "x.md", tmp_path / "nosuch"):
        assert main(["train", "--resume", str(path)]) == 2
        shown = capsys.readouterr().err
        assert f"{path} is not a run: it has no config.resolved.toml" in shown
        assert "a folder made by sbtk train" in shown
