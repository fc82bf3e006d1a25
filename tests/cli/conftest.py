"""Folders to work in, as a user's: a model, a few photos, a sketch, and a gallery."""

from __future__ import annotations

from pathlib import Path

import pytest

from sbtk_cli.main import main
from sbtk_runtime.embedding.embedder import Embedder
from sbtk_runtime.gallery.update import update_gallery
from tests.tiny import tiny_bundle, write_photos, write_sketch


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Change to a folder that holds `bundles/tiny`, `photos/` (8) and `sketch.png`."""
    _enter(tmp_path, monkeypatch)
    return _furnished(tmp_path)


@pytest.fixture
def gallery(workplace: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    """Return `gallery.sbtk` in a workplace of its own, made of its photos."""
    assert main(["index", "photos", "--model", "tiny", "--threads", "1"]) == 0
    capsys.readouterr()
    return workplace / "gallery.sbtk"


@pytest.fixture
def shared_gallery(shared_workplace: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Change to a workplace whose gallery other tests ask too; they leave it as it is."""
    _enter(shared_workplace, monkeypatch)
    return shared_workplace / "gallery.sbtk"


@pytest.fixture(scope="session")
def shared_workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder that `shared_gallery` changes to."""
    folder = _furnished(tmp_path_factory.mktemp("shared"))
    with Embedder(folder / "bundles" / "tiny", threads=1) as embedder:
        update_gallery(folder / "gallery.sbtk", [folder / "photos"], embedder)
    return folder


def _furnished(folder: Path) -> Path:
    tiny_bundle(folder / "bundles" / "tiny")
    write_photos(folder / "photos", 8)
    write_sketch(folder / "sketch.png")
    return folder


def _enter(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    for name in ("SBTK_DATA", "SBTK_DEBUG", "SBTK_GALLERY"):
        monkeypatch.delenv(name, raising=False)
