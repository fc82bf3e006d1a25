"""Lets `python -m sbtk_cli` stand for `sbtk`."""

from __future__ import annotations

import sys

from sbtk_cli.main import main

if __name__ == "__main__":
    sys.exit(main())
