"""Photos below folders, found without following links to folders and without running in circles."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from sbtk_runtime.errors import BadData
from sbtk_runtime.images import SUFFIXES
from sbtk_runtime.names import printable_name


@dataclass(frozen=True)
class Found:
    """A regular file that may be a photo, with what tells whether it changed.

    `path` is absolute; bytes that are not UTF-8 are in it as surrogates. `ctime_ns` also changes
    when only the permissions do.
    """

    path: str
    size_bytes: int
    mtime_ns: int
    ctime_ns: int


@dataclass(frozen=True)
class Skipped:
    """A path that was not walked, and why.

    `may_hide_photos` is true where nothing is known about what lies there (a folder that cannot
    be read), so photos that were found below it before must not be taken for vanished.
    """

    path: str
    reason: str
    may_hide_photos: bool


def absolute_roots(roots: Sequence[Path]) -> list[str]:
    """Returns the absolute paths of `roots`, links kept, in the given order, each once.

    Raises:
        BadData: there are none, or one does not exist.
    """
    if not roots:
        raise BadData("no photos were named", "one or more folders or files")
    for root in roots:
        try:
            root.stat()
        except (OSError, ValueError) as problem:
            reason = problem.strerror if isinstance(problem, OSError) else str(problem)
            raise BadData(
                f"{printable_name(root)} cannot be read: {reason}", "a folder of photos"
            ) from problem
    return list(dict.fromkeys(os.path.abspath(root) for root in roots))  # noqa: PTH100


def walk(roots: Sequence[str]) -> Iterator[Found | Skipped]:
    """Yields what lies below absolute `roots`, in no particular order, in flat memory.

    A folder is entered once, whatever the number of its names, and a link to a folder never;
    a link to a file counts as a file. Of files in folders only those with an image's suffix
    count; a file that is a root itself always does.
    """
    visited: set[tuple[int, int]] = set()
    for root in roots:
        status = _status(root)
        if isinstance(status, Skipped):
            yield status
        elif not stat.S_ISDIR(status.st_mode):
            yield _file(root, status)
        elif _is_new(status, visited):
            yield from _walk_folder(root, visited)


def refuse_nothing(roots: Sequence[str]) -> None:
    """Makes sure that there is a file to look at; otherwise a disk may not be mounted.

    Raises:
        BadData: there is none below the absolute `roots`; says what was skipped.
    """
    skipped: list[Skipped] = []
    for item in walk(roots):
        if isinstance(item, Found):
            return
        skipped.append(item)
    named = ", ".join(printable_name(root) for root in roots)
    reasons = "; ".join(f"{printable_name(item.path)}: {item.reason}" for item in skipped[:3])
    raise BadData(
        f"no photo in {named}" + (f" ({reasons})" if reasons else ""),
        "image files, such as .jpg or .png, at any depth",
    )


def _walk_folder(root: str, visited: set[tuple[int, int]]) -> Iterator[Found | Skipped]:
    folders = [root]
    while folders:
        folder = folders.pop()
        try:
            with os.scandir(folder) as entries:
                for entry in entries:
                    if not _is_folder(entry):
                        if _has_image_suffix(entry.name):
                            yield _file_or_skipped(entry.path)
                        continue
                    status = _status(entry.path)
                    if isinstance(status, Skipped):
                        yield status
                    elif _is_new(status, visited):
                        folders.append(entry.path)
        except OSError as problem:
            reason = f"the folder cannot be read: {problem.strerror}"
            yield Skipped(folder, reason, may_hide_photos=True)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir(follow_symlinks=False)
    except OSError:
        return False


def _has_image_suffix(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in SUFFIXES  # noqa: PTH122


def _is_new(status: os.stat_result, visited: set[tuple[int, int]]) -> bool:
    key = (status.st_dev, status.st_ino)
    if key in visited:
        return False
    visited.add(key)
    return True


def _status(path: str) -> os.stat_result | Skipped:
    try:
        return os.stat(path)  # noqa: PTH116 -- a Path for each of a million files costs seconds
    except OSError as problem:
        # A link to nowhere or in a circle hides nothing; what cannot be looked at may.
        is_known = isinstance(problem, FileNotFoundError) or os.path.islink(path)  # noqa: PTH114
        return Skipped(path, f"cannot be read: {problem.strerror}", may_hide_photos=not is_known)


def _file_or_skipped(path: str) -> Found | Skipped:
    status = _status(path)
    if isinstance(status, Skipped):
        return status
    if stat.S_ISDIR(status.st_mode):
        return Skipped(path, "a link to a folder is not followed", may_hide_photos=False)
    return _file(path, status)


def _file(path: str, status: os.stat_result) -> Found | Skipped:
    if not stat.S_ISREG(status.st_mode):
        return Skipped(path, "not a regular file", may_hide_photos=False)
    return Found(path, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
