"""File names as people can read them, whatever bytes they are made of."""

from __future__ import annotations

import os


def printable_name(path: str | bytes | os.PathLike[str]) -> str:
    """Returns a path on one line: bytes that are not UTF-8 and control characters are escaped.

    A file's name may hold line ends and terminal commands. Programs get it whole, by `path_bytes`.
    """
    raw = os.fspath(path)
    data = raw if isinstance(raw, bytes) else raw.encode("utf-8", "surrogateescape")
    return printable_text(data.decode("utf-8", "backslashreplace"))


def printable_text(text: str) -> str:
    """Returns text on one line: control characters and lone surrogates are escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
