"""Show a folder in the file manager of the server's machine."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading


def opener() -> str | None:
    """Return the program that opens folders here; `None` if there is none, or no screen."""
    if sys.platform == "darwin":
        return shutil.which("open")
    has_screen = os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")
    return shutil.which("xdg-open") if has_screen else None


def open_folder(program: str, folder: str) -> None:
    """Open an absolute path of a folder, without waiting for the file manager."""
    silent = subprocess.DEVNULL
    # Of its own session, because some desktops return only when the window is closed.
    process = subprocess.Popen(  # noqa: S603 -- a program of the system, and no shell
        [program, folder], stdin=silent, stdout=silent, stderr=silent, start_new_session=True
    )
    threading.Thread(target=process.wait, name="file manager", daemon=True).start()
