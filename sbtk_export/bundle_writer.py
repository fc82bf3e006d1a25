"""A bundle folder that is either whole or absent."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from sbtk_runtime.errors import BadConfig
from sbtk_runtime.files import disk_full_explained, fsync_folder, sha256_of_file
from sbtk_runtime.manifest import MANIFEST_NAME, FileRecord
from sbtk_runtime.names import printable_name

#: Versions of ONNX's operators that a model can be written in. Means over axes that are an input
#: need 18; newer ones are not read by all engines.
OPSETS = range(18, 24)

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


def checked_name(name: str) -> str:
    """Returns `name` if it can name a bundle.

    Raises:
        BadConfig: it has other characters than these, or is too long.
    """
    if not _NAME.fullmatch(name):
        raise BadConfig(
            f"{name!r} cannot name a bundle",
            "1 to 64 letters, digits, dots, hyphens and underscores, a letter or digit first",
            "--name NAME",
        )
    return name


@contextlib.contextmanager
def published_folder(target: Path) -> Iterator[Path]:
    """Yields a temporary folder beside `target` that becomes `target` when the block succeeds.

    On failure it is removed, and `target` does not come to be.

    Raises:
        BadConfig: `target` exists.
        DiskFull: the device ran out of space.
    """
    require_absent(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.export-{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir()
        with disk_full_explained(temporary):
            yield temporary
            _sync(temporary)
        # A folder that appeared meanwhile and is not empty makes this fail, as it should.
        temporary.rename(target)
        fsync_folder(target.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def require_absent(target: Path) -> None:
    """Refuses a name that is taken, before any work is done.

    Raises:
        BadConfig: `target` exists.
    """
    if target.exists() or target.is_symlink():
        raise BadConfig(
            f"{printable_name(target)} exists",
            "a folder that is not there yet",
            "choose another with -o BUNDLE, or remove it",
        )


def file_records(folder: Path) -> dict[str, FileRecord]:
    """Returns size and SHA-256 of every file in `folder` but the manifest, by name."""
    return {
        path.name: FileRecord(sha256_of_file(path), path.stat().st_size)
        for path in sorted(folder.iterdir())
        if path.name != MANIFEST_NAME
    }


def _sync(folder: Path) -> None:
    for path in folder.iterdir():
        with path.open("rb+") as file:
            os.fsync(file.fileno())
    fsync_folder(folder)
