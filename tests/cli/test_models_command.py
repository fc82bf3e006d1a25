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


def test_bundles_are_json_for_programs(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models", "--json"]) == 0
    described = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    tiny = next(bundle for bundle in described if bundle["name"] == "tiny")
    assert tiny["precisions"] == ["fp32", "int8"]
    assert tiny["dim"] == 16
    assert sum(bundle["default"] for bundle in described) <= 1


def test_a_broken_bundle_is_left_out_and_named(
    workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (workplace / "bundles" / "torn").mkdir()
    (workplace / "bundles" / "torn" / "manifest.json").write_text("{")
    assert main(["models"]) == 0
    shown = capsys.readouterr()
    assert "tiny@" in shown.out
    assert "torn" in shown.err


def test_a_whole_bundle_passes(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
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


def test_an_unknown_bundle_is_told_from_those_there_are(
    workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["models", "check", "giant"]) == 1
    shown = capsys.readouterr().err
    assert "giant" in shown
    assert "tiny" in shown
