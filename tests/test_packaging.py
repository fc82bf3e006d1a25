"""The wheel holds the four packages with their data, and nothing else."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.install

ROOT = Path(__file__).parents[1]
PACKAGES = {
    "sbtk_runtime": ROOT / "sbtk_runtime",
    "sbtk_train": ROOT / "sbtk_train",
    "sbtk_export": ROOT / "sbtk_export",
    "sbtk_cli": ROOT / "cli" / "sbtk_cli",
}


@pytest.fixture(scope="module")
def wheel_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a wheel built from a copy of the sources, so that nothing is left in the tree."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("sbtk_runtime", "sbtk_train", "sbtk_export", "cli", "tests", "demo"):
        ignored = shutil.ignore_patterns("__pycache__", "*.egg-info", ".*")
        shutil.copytree(ROOT / name, source / name, ignore=ignored)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps"]
    command += ["--disable-pip-version-check", "--wheel-dir", str(out), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return next(out.glob("sbtk-*.whl"))


def test_the_wheel_contains_exactly_the_packages_and_their_data(wheel_file: Path) -> None:
    expected = {
        f"{package}/{path.relative_to(folder).as_posix()}"
        for package, folder in PACKAGES.items()
        for path in folder.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    with zipfile.ZipFile(wheel_file) as archive:
        names = {name for name in archive.namelist() if not name.endswith("/")}
    found = {name for name in names if ".dist-info/" not in name}
    assert found == expected
    assert {f"{package}/py.typed" for package in PACKAGES} <= found
    assert "sbtk_train/data/splits.json" in found


def test_the_wheel_contains_licence_and_command(wheel_file: Path) -> None:
    with zipfile.ZipFile(wheel_file) as archive:
        texts = {Path(name).name: archive.read(name) for name in archive.namelist()}
    assert texts["LICENSE"] == (ROOT / "LICENSE").read_bytes()
    assert "sbtk = sbtk_cli.main:main" in texts["entry_points.txt"].decode()
    assert "License-Expression: MIT" in texts["METADATA"].decode()


def test_every_included_bundle_is_intact_in_the_wheel(wheel_file: Path, tmp_path: Path) -> None:
    """The copy in the wheel works without the checkout, from another folder."""
    with zipfile.ZipFile(wheel_file) as archive:
        archive.extractall(tmp_path / "site")
    code = (
        "import sbtk_runtime.bundle as b, sbtk_train.data.splits as s, sbtk_cli.main as m, pathlib;"
        "[x.verify() for x in b.list_bundles()];"
        "print(pathlib.Path(b.__file__).parents[1]);"
        "print(len(b.list_bundles()), 'SK-YE' in s.split_names());"
        "raise SystemExit(m.main(['--version']))"
    )
    shipped = len(list((ROOT / "sbtk_runtime" / "pretrained").glob("*/manifest.json")))
    done = subprocess.run(
        [sys.executable, "-P", "-c", code],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(tmp_path / "site")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    place, counts, version = done.stdout.splitlines()
    assert Path(place) == tmp_path / "site"
    assert counts == f"{shipped} True"
    assert version.startswith("sbtk ")
