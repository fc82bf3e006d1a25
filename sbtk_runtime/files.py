"""Files: atomic writes, hashes, JSON, the writer's lock, and folders of the user's own."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import shlex
import shutil
import stat
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

from sbtk_runtime.errors import DiskFull, GalleryBusy, SbtkError

MAX_JSON_BYTES = 1 << 20
# A folder in place of a file, a file or link in place of a folder.
_OF_ANOTHER_KIND = (errno.EISDIR, errno.ENOTDIR, errno.EEXIST, errno.ELOOP)
_OUT_OF_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# SQLite adds files of its own to a temporary database.
_TEMPORARY = re.compile(r"^\..+\.tmp-(\d+)(-wal|-shm|-journal)?$")


def sha256_of_file(path: Path) -> str:
    """Return the file's SHA-256 as 64 hexadecimal digits.

    Raises:
        OSError: it is not a regular file or cannot be read; a FIFO does not block.
    """
    with os.fdopen(open_regular(path), "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def is_as_written(status: os.stat_result, size_bytes: int | None, mtime_ns: int | None) -> bool:
    """Return whether a file has the size and the time of modification that were recorded."""
    return (status.st_size, status.st_mtime_ns) == (size_bytes, mtime_ns)


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path that durably replaces `path` when the block succeeds.

    The block writes the temporary file. If it fails, the temporary file is removed and `path` is
    not changed.

    Raises:
        DiskFull: no space is left; the message says how much is free.
    """
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        with disk_full_explained(path):
            yield temporary
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())
            temporary.replace(path)
            fsync_folder(path.parent)
    except BaseException as problem:
        with contextlib.suppress(OSError):
            temporary.unlink()
        if isinstance(problem, OSError) and problem.filename in (temporary, str(temporary)):
            problem.filename = str(path)
        raise


def write_atomically(path: Path, data: bytes) -> None:
    """Replace the file with `data`; readers, and power cuts, see the old file or the new one."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)


def write_json_atomically(path: Path, value: object) -> None:
    """Write `value` as indented UTF-8 JSON, atomically."""
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    # Names that are not UTF-8 contain lone surrogates, which are valid JSON as escapes.
    write_atomically(path, text.encode("utf-8", "backslashreplace"))


def read_json_object(path: Path, error: type[SbtkError]) -> dict[str, Any]:
    """Return the JSON object in a file that is not trusted.

    Raises:
        SbtkError: of the given type, if the file is missing, not a regular file, over 1 MiB, not
            UTF-8, not JSON, or not an object; a FIFO does not block.
    """
    if path.is_symlink():
        raise error(f"{path} is a symbolic link", "a regular file")
    try:
        with open(path, "rb", opener=without_waiting) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise error(f"{path} is not a regular file", "a regular file")
            data = file.read(MAX_JSON_BYTES + 1)
    except FileNotFoundError as problem:
        raise error(f"{path} cannot be read: {problem.strerror}") from problem
    except OSError as problem:
        raise error(*read_refused(path, problem)) from problem
    if len(data) > MAX_JSON_BYTES:
        raise error(f"{path} is larger than {MAX_JSON_BYTES} bytes", "a small JSON file")
    try:
        value = json.loads(data.decode("utf-8"))
    # ValueError: not UTF-8, not JSON, or a number of more digits than Python converts.
    except (ValueError, RecursionError) as problem:
        raise error(f"{path} is not JSON: {problem}", "a UTF-8 JSON object") from problem
    if not isinstance(value, dict):
        raise error(f"{path} contains a JSON {type(value).__name__}", "a JSON object")
    return value


def read_refused(path: Path, problem: OSError) -> tuple[str, str, str]:
    """Return the three parts of the error for a file that cannot be read."""
    reason = problem.strerror or str(problem)
    advice = "check the drive and its connection, then run the same command again"
    if problem.errno in (errno.EACCES, errno.EPERM):
        advice = f"chmod u+r {shlex.quote(str(path))}, as its owner"
    elif problem.errno in _OF_ANOTHER_KIND:
        advice = f"put {path} aside, then run the same command again"
    return f"{path} cannot be read: {reason}", "a file that this user may read", advice


def without_waiting(path: str, flags: int) -> int:
    """Open a file, as the `opener` of `open`, without blocking on a FIFO."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def open_regular(path: Path) -> int:
    """Return a descriptor for reading a regular file, without blocking on a FIFO.

    Raises:
        OSError: it is missing, not a regular file, or cannot be opened.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return descriptor


def fsync_folder(folder: Path) -> None:
    """Make renames in `folder` durable, on systems that can sync folders."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def disk_full_explained(path: Path) -> Iterator[None]:
    """Turn a full disk, quota or file size limit inside the block into a `DiskFull` error."""
    try:
        yield
    except OSError as problem:
        if problem.errno not in _OUT_OF_SPACE:
            raise
        raise write_error(path, problem) from problem


def write_error(path: Path, problem: OSError, kind: type[SbtkError] = SbtkError) -> SbtkError:
    """Return the error for a file that could not be written.

    Args:
        path: the file or folder.
        problem: the system's error.
        kind: of the error; if no space is left, it is a `DiskFull` instead.
    """
    again = "run the same command again to resume"
    kept = "what was committed before is kept"
    reason = os.strerror(problem.errno) if problem.errno else str(problem)
    if problem.errno == errno.ENOSPC:
        free = free_bytes(path.parent)
        return DiskFull(
            f"no space left while writing {path} ({free:,} bytes free)",
            kept,
            f"free some space and {again}",
        )
    if problem.errno == errno.EDQUOT:
        return DiskFull(
            f"{path} cannot be written: {reason} (this user's quota)",
            kept,
            f"delete some of your files or have the quota raised, then {again}",
        )
    if problem.errno == errno.EFBIG:
        limit = file_size_limit()
        return DiskFull(
            f"{path} cannot be written: {reason}"
            + (f" (the limit of this shell is {limit:,} bytes)" if limit is not None else ""),
            kept,
            f"run 'ulimit -f unlimited' or use another file system, then {again}",
        )
    advice = {
        errno.EIO: f"check the drive and its connection, then {again}",
        errno.EROFS: f"remount it writable, then {again}",
        errno.EACCES: f"give this user write permission, then {again}",
        errno.EPERM: f"give this user write permission, then {again}",
        errno.EMFILE: f"raise the limit of open files: ulimit -n 4096, then {again}",
        **dict.fromkeys(_OF_ANOTHER_KIND, f"put {path} aside, then {again}"),
    }
    return kind(f"{path} cannot be written: {reason}", kept, advice.get(problem.errno or 0, again))


def file_size_limit() -> int | None:
    """Return the largest file size in bytes (`ulimit -f`); `None` if unlimited."""
    import resource

    limit, _ = resource.getrlimit(resource.RLIMIT_FSIZE)
    return None if limit == resource.RLIM_INFINITY else limit


def free_bytes(folder: Path) -> int:
    """Return the free space of a folder's file system, in bytes; 0 if it is unknown."""
    try:
        return shutil.disk_usage(folder).free
    except OSError:
        return 0


def remove_stale_temporaries(folder: Path) -> list[Path]:
    """Remove temporary files of processes that have ended from `folder`, and return them."""
    removed = []
    for path in folder.iterdir():
        match = _TEMPORARY.match(path.name)
        if match and not path.is_dir() and not _is_alive(int(match.group(1))):
            path.unlink(missing_ok=True)
            removed.append(path)
    return removed


class WriterLock:
    """The lock of a folder's only writer; the kernel releases it when the process ends.

    Raises:
        GalleryBusy: on entry, if another process holds it; names its PID and start time.
        SbtkError: on entry, if the folder cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._descriptor: int | None = None

    def __enter__(self) -> Self:
        try:
            descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as problem:
            raise self._not_writable(problem) from problem
        try:
            _lock(descriptor)
        except OSError as problem:
            holder = _printable(os.pread(descriptor, 200, 0))
            os.close(descriptor)
            if problem.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                raise self._not_writable(problem) from problem
            raise GalleryBusy(
                f"{self._path.parent} is being written by another sbtk ({holder or 'starting'})",
                "one writer at a time",
                "wait until it ends, then run the same command again",
            ) from problem
        started = time.strftime("%Y-%m-%d %H:%M:%S")
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"PID {os.getpid()}, since {started}\n".encode(), 0)
        self._descriptor = descriptor
        return self

    def __exit__(self, *_: object) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def _not_writable(self, problem: OSError) -> SbtkError:
        return SbtkError(
            f"{self._path.parent} cannot be written: {problem.strerror}",
            "a folder that this user may write, on a file system with locks",
            write_error(self._path, problem).next_step,
        )


def _printable(data: bytes) -> str:
    return "".join(letter for letter in data.decode("utf-8", "replace") if letter.isprintable())


def _lock(descriptor: int) -> None:
    import fcntl

    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _is_alive(pid: int) -> bool:
    if pid == os.getpid():
        return False
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


def count_text(count: int, noun: str) -> str:
    """Return "1 photo", "1,000 photos"."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def printable_name(path: str | bytes | os.PathLike[str]) -> str:
    """Return a path on one line: bytes that are not UTF-8 and control characters are escaped.

    File names may contain line breaks and terminal escapes. In JSON, `path_bytes` has them as they
    are.
    """
    raw = os.fspath(path)
    data = raw if isinstance(raw, bytes) else raw.encode("utf-8", "surrogateescape")
    return printable_text(data.decode("utf-8", "backslashreplace"))


def printable_text(text: str) -> str:
    """Return text on one line: control characters and lone surrogates are escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


_WRITABLE_BY_OTHERS = stat.S_IWGRP | stat.S_IWOTH


class UnsafeFolder(SbtkError):
    """A folder that others own or may write, or that cannot be created, read or written."""


class UnsafeFile(Exception):
    """A file that must not be used; the message names the file and the reason."""


class PrivateFolder:
    """An open folder that only the user may write; see `opened`. Names are those of its files."""

    def __init__(self, path: Path, descriptor: int) -> None:
        self.path = path
        self._descriptor = descriptor

    @classmethod
    @contextlib.contextmanager
    def opened(cls, path: Path) -> Iterator[Self]:
        """Yield the folder at `path`.

        Raises:
            UnsafeFolder: it is missing, a symbolic link, owned by another user or writable by
                others; or a file in it could not be written or removed.
        """
        flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            descriptor = os.open(path, flags)
        except OSError as problem:
            is_link = problem.errno in (errno.ELOOP, errno.ENOTDIR) and path.is_symlink()
            why = "is a symbolic link" if is_link else f"cannot be opened: {problem.strerror}"
            raise UnsafeFolder(f"{path} {why}", "a folder that you own") from problem
        try:
            reason = _not_ours(os.fstat(descriptor))
            if reason:
                raise UnsafeFolder(
                    f"{path} {reason}",
                    "a folder that you own, with mode 0700",
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
        """Set the folder's mode to 0700."""
        if stat.S_IMODE(os.fstat(self._descriptor).st_mode) != 0o700:
            os.fchmod(self._descriptor, 0o700)

    def names(self, suffix: str) -> list[str]:
        """Return the names that end with `suffix`, sorted, without hidden ones."""
        names = os.listdir(self._descriptor)  # noqa: PTH208  # a Path has no descriptor
        return sorted(name for name in names if name.endswith(suffix) and not name.startswith("."))

    def read(self, name: str, most_bytes: int) -> bytes:
        """Return the whole content of a file.

        Raises:
            UnsafeFile: it is missing, a link, not a regular file, owned by another user, writable
                by others, too large, or cannot be read; a FIFO does not block.
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
        """Replace a file, atomically and durably; only this user may read or write it.

        Raises:
            DiskFull: no space is left.
        """
        with atomic_path(self.path / name) as temporary:
            temporary.unlink(missing_ok=True)
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
            # Regardless of the umask: a file that others may write would not be used.
            with os.fdopen(os.open(temporary, flags, 0o600), "wb") as file:
                file.write(content)

    def remove(self, name: str) -> None:
        """Remove a file, or a link without its target, if it exists."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name, dir_fd=self._descriptor)

    def remove_temporaries(self) -> None:
        """Remove temporary files of processes that have ended."""
        remove_stale_temporaries(self.path)

    def size_bytes(self, name: str) -> int:
        """Return the size of a file, or of a link itself; 0 if it does not exist."""
        try:
            return os.stat(name, dir_fd=self._descriptor, follow_symlinks=False).st_size
        except OSError:
            return 0


def _not_ours(status: os.stat_result) -> str:
    """Return why other users could have changed a file or folder; empty if they could not."""
    if status.st_uid != os.geteuid():
        return f"belongs to user {status.st_uid}, not to you ({os.geteuid()})"
    if status.st_mode & _WRITABLE_BY_OTHERS:
        return f"may be written by others (mode {stat.S_IMODE(status.st_mode):04o})"
    return ""
