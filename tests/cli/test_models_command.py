"""`sbtk models` lists bundles, and `sbtk models check` finds what is wrong with one."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from sbtk_cli.main import main


def test_bundles_are_listed(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models"]) == 0
    shown = capsys.readouterr().out
    assert "MODEL" in shown
    line = next(line for line in shown.splitlines() if "tiny@" in line)
    assert "fp32 int8" in line
    assert line.endswith("bundles/tiny")


def test_bundles_are_listed_as_json(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models", "--json"]) == 0
    described = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    tiny = next(bundle for bundle in described if bundle["name"] == "tiny")
    assert tiny["precisions"] == ["fp32", "int8"]
    assert tiny["dim"] == 16
    assert sum(bundle["default"] for bundle in described) <= 1


def test_a_broken_bundle_is_skipped_and_named(
    workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (workplace / "bundles" / "torn").mkdir()
    (workplace / "bundles" / "torn" / "manifest.json").write_text("{")
    assert main(["models"]) == 0
    shown = capsys.readouterr()
    assert "tiny@" in shown.out
    assert "torn" in shown.err


def test_an_intact_bundle_passes_the_check(
    workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["models", "check", "tiny"]) == 0
    shown = capsys.readouterr().out
    assert "2 files" in shown
    assert re.search(r"fp32  runs on (openvino|onnxruntime) \d", shown)
    assert main(["models", "check", "bundles/tiny", "--json"]) == 0
    assert set(json.loads(capsys.readouterr().out)["trials"]) == {"fp32", "int8"}


def test_a_changed_file_is_found(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = workplace / "bundles" / "tiny" / "model.fp32.onnx"
    data = bytearray(path.read_bytes())
    data[100] ^= 1
    path.write_bytes(data)
    assert main(["models", "check", "tiny"]) == 1
    assert "model.fp32.onnx is damaged" in capsys.readouterr().err


def test_the_error_for_an_unknown_bundle_lists_those_that_exist(
    workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["models", "check", "giant"]) == 1
    shown = capsys.readouterr().err
    assert "giant" in shown
    assert "tiny" in shown


@pytest.mark.parametrize(
    "words",
    [
        ["models", "check", "RUN"],
        ["index", "photos", "--model", "RUN"],
        ["embed", "photos", "--as", "photo", "-o", "rows.npz", "--model", "RUN"],
        ["bench", "--model", "RUN", "--quick"],
        ["bench", "map", "photos", "--model", "RUN"],
        ["bench", "map", "RUN"],
        ["engine", "build", "RUN"],
    ],
)
def test_every_command_given_a_run_suggests_exporting_it(
    workplace: Path, capsys: pytest.CaptureFixture[str], words: list[str]
) -> None:
    run = workplace / "runs" / "horses"
    run.mkdir(parents=True)
    for name in ("config.resolved.toml", "student.safetensors"):
        (run / name).write_bytes(b"")
    assert main([word.replace("RUN", "runs/horses") for word in words]) in (1, 2)
    printed = capsys.readouterr()
    assert "runs/horses is a training run" in printed.err
    assert "sbtk export runs/horses" in printed.err


@pytest.mark.parametrize("words", [["query", "sketch.png"], ["index", "photos"], ["serve"]])
def test_if_the_gallerys_bundle_is_elsewhere_the_error_asks_for_the_model(
    gallery: Path, workplace: Path, capsys: pytest.CaptureFixture[str], words: list[str]
) -> None:
    (workplace / "bundles" / "tiny").rename(workplace / "elsewhere")
    assert main(words) == 1
    printed = capsys.readouterr().err
    assert "gallery.sbtk was made by tiny@" in printed
    assert "--model FOLDER" in printed
    if words[0] == "query":
        assert main([*words, "--model", "elsewhere", "--json"]) == 0
