"""Imports point one way, and the runtime stays free of training's libraries."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import grimp
import pytest

from tests.processes import run_python

ROOT = Path(__file__).parents[1]
PACKAGES = ("sbtk_runtime", "sbtk_train", "sbtk_export", "cli")
#: What training and production must agree on; the rest of the runtime is production's alone.
LEAVES = {
    "errors",
    "files",
    "images",
    "binary_codes",
    "evaluation.metrics",
    "evaluation.protocol",
    "manifest",
    "preprocess",
    "image_formats",
    "machine",
    "raw_photo",
}
_LINT = "from importlinter.cli import lint_imports; raise SystemExit(lint_imports(no_cache=True))"


def test_the_import_contracts_hold() -> None:
    done = _lint_imports(ROOT)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("module", "line", "contract"),
    [
        ("sbtk_runtime/files.py", "import torch", "The runtime needs neither torch"),
        ("sbtk_runtime/images.py", "import sbtk_train", "one direction"),
        ("sbtk_train/data/splits.py", "import sbtk_runtime.bundle", "shared leaf modules"),
        ("sbtk_train/data/splits.py", "import sbtk_train.models.student", "Training's folders"),
        ("sbtk_runtime/engines/base.py", "import sbtk_runtime.gallery", "runtime's folders"),
        ("sbtk_runtime/web/app.py", "import sbtk_runtime.evaluation", "does not evaluate"),
        (
            "sbtk_runtime/evaluation/metrics.py",
            "import sbtk_runtime.gallery",
            "shared leaf modules",
        ),
    ],
)
def test_a_forbidden_import_is_found(tmp_path: Path, module: str, line: str, contract: str) -> None:
    for name in PACKAGES:
        ignored = shutil.ignore_patterns("__pycache__", "pretrained")
        shutil.copytree(ROOT / name, tmp_path / name, ignore=ignored)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    with (tmp_path / module).open("a") as file:
        file.write(f"\n{line}\n")
    done = _lint_imports(tmp_path)
    assert done.returncode != 0
    assert any(contract in row and "BROKEN" in row for row in done.stdout.splitlines()), done.stdout


def test_training_uses_only_the_runtimes_leaf_modules() -> None:
    """Close the contract's list, which names only the modules that somebody thought of."""
    graph = grimp.build_graph("sbtk_train", "sbtk_runtime")
    used = {
        imported
        for module in graph.find_descendants("sbtk_train")
        for imported in graph.find_modules_directly_imported_by(module)
        if imported.startswith("sbtk_runtime")
    }
    assert used <= {f"sbtk_runtime.{leaf}" for leaf in LEAVES}


def test_the_runtime_loads_no_library_of_training() -> None:
    code = """
import importlib, pkgutil, sys
import sbtk_runtime
early = {"PIL", "hnswlib", "numpy", "onnxruntime", "sbtk_runtime.evaluation"} & set(sys.modules)
assert not early, f"the bare package loads {early}"
for module in pkgutil.walk_packages(sbtk_runtime.__path__, "sbtk_runtime."):
    if not module.name.startswith("sbtk_runtime.web"):  # its server, uvicorn, brings click
        importlib.import_module(module.name)
for name in sbtk_runtime.__all__:
    getattr(sbtk_runtime, name)
print(*sorted({name.partition(".")[0] for name in sys.modules}))
"""
    loaded = set(run_python(code).split())
    assert {"sbtk_runtime", "numpy", "PIL"} <= loaded
    assert not loaded & {"torch", "torchvision", "onnx", "onnxscript", "click", "safetensors"}


def _lint_imports(folder: Path) -> subprocess.CompletedProcess[str]:
    # Only the copy is on the path, ahead of what is installed.
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(folder), str(folder / "cli")])}
    command = [sys.executable, "-c", _LINT]
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
