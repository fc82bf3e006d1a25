"""Running `sbtk` of a checkout in a process of its own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

SBTK = (sys.executable, "-m", "sbtk_cli")
ROOT = Path(__file__).resolve().parent.parent


def environment(root: Path = ROOT) -> dict[str, str]:
    """Return an environment in which Python imports the packages of a checkout."""
    path = os.pathsep.join([str(root), str(root / "cli"), os.environ.get("PYTHONPATH", "")])
    # Without PYTHONSAFEPATH the packages in the current folder come first.
    return os.environ | {"PYTHONPATH": path, "PYTHONSAFEPATH": "1"}


def run(command: Sequence[str]) -> str:
    """Return the output of a command; exit with its error output if it fails."""
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command[:6])} ... failed ({done.returncode}):\n{done.stderr}")
    return done.stdout


def run_sbtk(*arguments: str) -> str:
    """Return the output of `sbtk` with these arguments."""
    return run([*SBTK, *arguments])


def resident_bytes(pid: int, field: str = "VmRSS") -> int:
    """Return the resident memory of a process, or its peak with `VmHWM`; 0 if it has ended."""
    try:
        text = Path("/proc", str(pid), "status").read_text()
    except OSError:
        return 0
    match = re.search(rf"^{field}:\s+(\d+) kB$", text, re.MULTILINE)
    return int(match[1]) * 1024 if match else 0
