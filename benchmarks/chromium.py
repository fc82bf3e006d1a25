"""A headless Chromium, for benchmarks of the page."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page


def chromium_path() -> str:
    """Return the path of Debian's Chromium, or of SBTK_CHROMIUM's; without one, exit."""
    path = shutil.which(os.environ.get("SBTK_CHROMIUM", "chromium"))
    if path is None:
        sys.exit("Chromium is not installed; install it, or set SBTK_CHROMIUM")
    return path


@contextlib.contextmanager
def open_chromium() -> Iterator[Browser]:
    """Yield Debian's Chromium, or the one that SBTK_CHROMIUM names; without one, exit."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        browser = driver.chromium.launch(
            executable_path=chromium_path(), args=["--no-sandbox", "--disable-gpu"]
        )
        yield browser
        browser.close()


def open_page(browser: Browser, port: int, script: str = "") -> Page:
    """Return the page of a local server, ready for use; `script` runs before its own scripts."""
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    page.add_init_script(script)
    page.goto(f"http://127.0.0.1:{port}/")
    page.wait_for_selector('#server-status[data-status="ok"]')
    return page
