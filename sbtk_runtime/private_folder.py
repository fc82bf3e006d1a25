"""A folder whose files only this user can have written, for content that is as good as a program.

Folder and files are opened once, without following links, and judged by their descriptors; a file
is read into memory as a whole. So nobody can swap what was judged for something else.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Self

from sbtk_runtime.errors import SbtkError
from sbtk_runtime.files import atomic_path, remove_stale_temporaries

_WRITABLE_BY_OTHERS = stat.S_IWGRP | stat.S_IWOTH


class UnsafeFolder(SbtkError):
    """A folder that others own or may write, or that cannot be made, read or written."""


class UnsafeFile(Exception):
    """A file that must not be used; says why, with its name."""


class PrivateFolder:
    """An open folder of the user's own; see `opened`. Names are those of files in it."""

    def __init__(self, path: Path, descriptor: int) -> None:
        self.path = path
        self._descriptor = descriptor

    @classmethod
    @contextlib.contextmanager
    def opened(cls, path: Path) -> Iterator[Self]:
        """Yields the folder at `path`; problems with writing it are explained.

        Raises:
            UnsafeFolder: it is missing, a symbolic link, somebody else's, writable by others, or
                something in it could not be written or removed.
        """
        flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            descriptor = os.open(path, flags)
        except OSError as problem:
            is_link = problem.errno in (errno.ELOOP, errno.ENOTDIR) and path.is_symlink()
            why = "is a symbolic link" if is_link else f"cannot be opened: {problem.strerror}"
            raise UnsafeFolder(f"{path} {why}", "a folder of your own") from problem
        try:
            reason = _not_ours(os.fstat(descriptor))
            if reason:
                raise UnsafeFolder(
                    f"{path} {reason}",
                    "a folder of your own with mode 0700",
                    f"remove it, or chmod 700 {path}",
                )
            yield cls(path, descriptor)
        except OSError as problem:
            raise UnsafeFolder(
                f"{path} cannot be written: {problem.strerror}", "a folder that you may write"
            ) from problem
        finally:
            os.close(descriptor)

    def hide(self) -> None:
        """Gives the folder mode 0700, if it has another."""
        if stat.S_IMODE(os.fstat(self._descriptor).st_mode) != 0o700:
            os.fchmod(self._descriptor, 0o700)

    def names(self, suffix: str) -> list[str]:
        """Returns the names that end so, sorted, without hidden ones."""
        names = os.listdir(self._descriptor)  # noqa: PTH208  # a Path has no descriptor
        return sorted(name for name in names if name.endswith(suffix) and not name.startswith("."))

    def read(self, name: str, most_bytes: int) -> bytes:
        """Returns the whole content of a file.

        Raises:
            UnsafeFile: it is missing, a link, no regular file (a FIFO is not waited for),
                somebody else's, writable by others, too large, or cannot be read.
        """
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        try:
            with os.fdopen(os.open(name, flags, dir_fd=self._descriptor), "rb") as file:
                status = os.fstat(file.fileno())
                if not stat.S_ISREG(status.st_mode):
                    raise UnsafeFile(f"{name} is not a regular file")
                reason = _not_ours(status)
                if reason:
                    raise UnsafeFile(f"{name} {reason}")
                if status.st_size > most_bytes:
                    raise UnsafeFile(f"{name} has {status.st_size:,} bytes, over {most_bytes:,}")
                content = file.read(status.st_size + 1)
        except OSError as problem:
            is_link = problem.errno == errno.ELOOP
            why = "is a symbolic link" if is_link else f"cannot be read: {problem.strerror}"
            raise UnsafeFile(f"{name} {why}") from problem
        if len(content) != status.st_size:
            raise UnsafeFile(f"{name} changed while it was read")
        return content

    def write(self, name: str, content: bytes) -> None:
        """Replaces a file, atomically and durably, by one that only this user may read or write.

        Raises:
            DiskFull: the device ran out of space.
        """
        with atomic_path(self.path / name) as temporary:
            temporary.unlink(missing_ok=True)
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
            # Whatever the umask: what others may write would never be used.
            with os.fdopen(os.open(temporary, flags, 0o600), "wb") as file:
                file.write(content)

    def remove(self, name: str) -> None:
        """Removes a file, or a link and not what it points to; nothing when there is none."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name, dir_fd=self._descriptor)

    def remove_temporaries(self) -> None:
        """Removes what interrupted writes of dead processes left."""
        remove_stale_temporaries(self.path)

    def size_bytes(self, name: str) -> int:
        """Returns the size of a file, or of a link itself; 0 when there is none."""
        try:
            return os.stat(name, dir_fd=self._descriptor, follow_symlinks=False).st_size
        except OSError:
            return 0


def _not_ours(status: os.stat_result) -> str:
    """Returns why others could have made or changed a file or folder; empty when they could not."""
    if status.st_uid != os.geteuid():
        return f"belongs to user {status.st_uid}, not to you ({os.geteuid()})"
    if status.st_mode & _WRITABLE_BY_OTHERS:
        return f"may be written by others (mode {stat.S_IMODE(status.st_mode):04o})"
    return ""
