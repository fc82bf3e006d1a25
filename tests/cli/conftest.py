"""A folder to work in, as a user's: a model, a few photos and a sketch."""

from __future__ import annotations

from pathlib import Path

import pytest

from sbtk_cli.main import main
from tests.tiny import tiny_bundle, write_photos, write_sketch


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Changes to a folder that holds `bundles/tiny`, `photos/` (8) and `sketch.png`."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("SBTK_GALLERY", raising=False)
    monkeypatch.delenv("SBTK_DEBUG", raising=False)
    tiny_bundle(tmp_path / "bundles" / "tiny")
    write_photos(tmp_path / "photos", 8)
    write_sketch(tmp_path / "sketch.png")
    return tmp_path


@pytest.fixture
def gallery(workplace: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    """Returns `gallery.sbtk` in the workplace, made of its photos."""
    assert main(["index", "photos", "--model", "tiny", "--threads", "1"]) == 0
    capsys.readouterr()
    return workplace / "gallery.sbtk"
