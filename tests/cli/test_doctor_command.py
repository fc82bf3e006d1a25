"""`sbtk doctor` as users read it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from sbtk_cli.main import main


def test_a_healthy_machine_has_no_problems(
    shared_gallery: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["doctor", "--model", "tiny"]) == 0
    lines = capsys.readouterr().out.splitlines()
    topics = [line.split()[1] for line in lines if not line.startswith(" ")]
    assert topics[:3] == ["machine", "system", "int8"]
    assert topics[-5:] == ["auto", "model", "gallery", "photos", "extras"]
    text = "\n".join(lines)
    works = [line.split()[2] for line in lines if re.match("ok  engine .* works$", line)]
    assert "onnxruntime" in works
    assert f"takes {works[0]}, int8" in text
    assert "8 photos searchable" in text


def test_missing_parts_are_listed_with_the_command_to_type(
    workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["doctor", "--model", "giant", "--gallery", "none.sbtk"]) == 0
    shown = capsys.readouterr().out
    assert "!!  model" in shown
    assert "next: sbtk index" in shown


def test_json_has_everything(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--model", "tiny", "--json"]) == 0
    examination = json.loads(capsys.readouterr().out)
    working = [engine["name"] for engine in examination["engines"] if engine["works"]]
    assert examination["engine"] == working[0]
    assert {"machine", "engines", "engine", "findings"} == set(examination)
    levels = {finding["level"] for finding in examination["findings"]}
    assert levels <= {"ok", "note", "problem"}
