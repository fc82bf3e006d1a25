"""Keep passwords out of the command line that other users of the machine can see."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Sequence
from pathlib import Path

# Fields of /proc/self/stat after the name of the program: see proc(5).
_FIRST_FIELD, _ARG_START, _ARG_END = 3, 48, 49


def hide_in_command_line(argument: str, secrets: Sequence[str]) -> None:
    """Overwrite the secrets of one argument in the arguments that `ps` shows, on Linux.

    Until then, some tenths of a second after the start, they can be seen.
    """
    with contextlib.suppress(OSError, ValueError, IndexError):
        fields = Path("/proc/self/stat").read_bytes().rpartition(b")")[2].split()
        start, end = (int(fields[number - _FIRST_FIELD]) for number in (_ARG_START, _ARG_END))
        words = ctypes.string_at(start, end - start)
        shown = argument.encode()
        place = words.find(shown)
        hidden = shown
        for secret in secrets:
            hidden = hidden.replace(secret.encode(), b"*" * len(secret.encode()))
        if place >= 0:
            ctypes.memmove(start + place, hidden, len(hidden))
