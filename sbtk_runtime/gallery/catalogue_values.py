"""What a catalogue's columns may hold: SQLite keeps any value in any column, damage included.

Python's own conversions are too kind: `int("7")` is 7, `bytes(7)` is seven zeros, and a float has a
`hex()`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from sbtk_runtime.gallery.catalogue_database import catalogue_errors, damaged

_SHOWN = 40


def integer(value: object) -> int:
    """Returns a whole number as it is.

    Raises:
        ValueError: it is something else.
    """
    if type(value) is not int:
        raise _strange(value, "a whole number")
    return value


def blob(value: object) -> bytes:
    """Returns bytes, such as a path or a hash, as they are.

    Raises:
        ValueError: it is something else.
    """
    if not isinstance(value, bytes):
        raise _strange(value, "bytes")
    return value


def text(value: object) -> str:
    """Returns a text as it is.

    Raises:
        ValueError: it is something else.
    """
    if not isinstance(value, str):
        raise _strange(value, "a text")
    return value


@contextlib.contextmanager
def values_checked(path: Path, *, is_writer: bool = False) -> Iterator[None]:
    """Turns SQLite's errors into ours, and those of values that no sbtk has written.

    Raises:
        BadGallery: the catalogue at `path` is damaged, or cannot be read.
    """
    with catalogue_errors(path, is_writer=is_writer):
        try:
            yield
        except (KeyError, OverflowError, TypeError, ValueError) as problem:
            raise damaged(path, problem) from problem


def _strange(value: object, expected: str) -> ValueError:
    shown = repr(value)
    shown = shown if len(shown) <= _SHOWN else f"{shown[:_SHOWN]}..."
    return ValueError(f"{shown} where {expected} belongs")
