"""Python in a process of its own, for tests of imports, limits and the environment."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def run_python(
    code: str, *arguments: Path | str, stdin: str | None = None, **environment: str
) -> str:
    """Return what a program prints that imports from where this process does.

    Args:
        code: the program, which must succeed.
        arguments: its arguments.
        stdin: its input.
        environment: variables to set.
    """
    path = os.pathsep.join(filter(None, sys.path))
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        input=stdin,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path, **environment},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
