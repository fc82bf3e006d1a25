"""The examples run as they stand, from a folder like the repository's after `make demo`."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sbtk_runtime.bundle import list_bundles
from tests.tiny import tiny_bundle, write_photos

ROOT = Path(__file__).parents[1]


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """Return a folder with the demo's sketches, other photos, and a model if none is shipped."""
    shutil.copytree(ROOT / "demo" / "sketches", tmp_path / "demo" / "sketches")
    write_photos(tmp_path / ".demo" / "photos", 9)
    if not list_bundles():
        tiny_bundle(tmp_path / "bundles" / "tiny")
    return tmp_path


@pytest.mark.slow
def test_the_api_example_works(checkout: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-P", str(ROOT / "examples" / "query_api.py")],
        cwd=checkout,
        env=os.environ | {"MPLBACKEND": "Agg", "no_proxy": "127.0.0.1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    shown = done.stdout.splitlines()
    assert shown[0].startswith("9 photos, 9 of them new")
    assert re.search(r"^8 hits by \w+ in \d+ ms$", done.stdout, re.MULTILINE)
    # Python's way and the API's ask the same model of the same photos.
    hits = [line.split("  ")[2] for line in shown if re.match(r"\d  -?\d\.\d{3}  /", line)]
    assert hits[:8] == hits[8:]
    assert len(set(hits)) == 8
    for name in ("hits-python.png", "hits-rest.png", "hits-similar.png"):
        with Image.open(checkout / name) as image:
            assert image.size == (1620, 220)
            assert len(np.unique(np.asarray(image.convert("L")))) > 100


def test_each_example_has_the_cells_of_a_notebook() -> None:
    examples = sorted((ROOT / "examples").glob("*.py"))
    assert examples
    for example in examples:
        cells = re.split(r"^# %%", example.read_text(), flags=re.MULTILINE)
        assert len(cells) > 4
        assert sum(cell.startswith(" [markdown]") for cell in cells) >= 3
