"""The telemetry of libraries is disabled."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tiny import tiny_bundle

_OPEN = (
    "import sys\n"
    "from sbtk_runtime.bundle import Bundle\n"
    "from sbtk_runtime.engines.base import EngineOptions\n"
    "from sbtk_runtime.engines.registry import open_engine, probe_engines\n"
    "open_engine(Bundle.open(sys.argv[1]), EngineOptions(engine='onnxruntime'))\n"
    "probe_engines()\n"
)
_QUANTISER = "import sbtk_export.int8, onnxruntime\n"


@pytest.mark.parametrize("script", [_OPEN, _QUANTISER], ids=["engines", "quantiser"])
def test_nothing_is_left_in_the_home_folder(tmp_path: Path, script: str) -> None:
    bundle, home = tiny_bundle(tmp_path / "tiny"), tmp_path / "home"
    home.mkdir()
    _run(script + "print(__import__('os').environ['ORT_DISABLE_TELEMETRY'])", bundle, home)
    # Plans are ours; an id of the machine is not.
    left = [path for path in home.rglob("*") if path.is_file()]
    assert left == []


def _run(script: str, bundle: Path, home: Path) -> None:
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in ("ORT_DISABLE_TELEMETRY", "XDG_CACHE_HOME")
    }
    environment |= {"HOME": str(home), "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(
        [sys.executable, "-c", script, str(bundle)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
