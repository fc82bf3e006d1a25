"""The command line of sbtk: one thin file per command."""

import sys

try:
    import sbtk_runtime  # noqa: F401
except ImportError as problem:
    if problem.name != "fcntl":
        raise
    sys.exit(f"Error: {problem}")
