"""A headless Chromium, for benchmarks of the page."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from playwright.sync_api import Browser


@contextlib.contextmanager
def open_chromium() -> Iterator[Browser]:
    """Yield Debian's Chromium, or the one that SBTK_CHROMIUM names; without one, exit."""
    from playwright.sync_api import sync_playwright

    path = shutil.which(os.environ.get("SBTK_CHROMIUM", "chromium"))
    if path is None:
        sys.exit("Chromium is not installed; install it, or set SBTK_CHROMIUM")
    with sync_playwright() as driver:
        browser = driver.chromium.launch(
            executable_path=path, args=["--no-sandbox", "--disable-gpu"]
        )
        yield browser
        browser.close()
