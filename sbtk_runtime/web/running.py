"""Which server has a gallery open: `sbtk open` joins it instead of starting another one."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from urllib.parse import quote

from sbtk_runtime.errors import SbtkError
from sbtk_runtime.files import printable_name

#: In the gallery's folder. The server holds a lock on it, which the kernel releases with the
#: process, and writes its address into it.
RECORD_NAME = ".server"

_STARTS_WITHIN_S = 10.0
_LOOK_EVERY_S = 0.1
_TIMEOUT_S = 10.0


class AlreadyOpen(SbtkError):
    """Another server has the gallery open, at `address`."""

    def __init__(self, folder: Path, address: str) -> None:
        super().__init__(f"{printable_name(folder)} is already open at {address}")
        self.address = address


class ServerRecord:
    """The record of the server of a gallery, held by this process."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def write(self, address: str) -> None:
        """Store the address of the page, for others that open the gallery."""
        content = json.dumps({"address": address, "pid": os.getpid()}).encode()
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, content, 0)


@contextlib.contextmanager
def claim_server(folder: Path) -> Iterator[ServerRecord]:
    """Yield the record of the gallery's server, unless another process holds it.

    Args:
        folder: the gallery's; it must exist.

    Raises:
        AlreadyOpen: another process serves the gallery.
        SbtkError: the folder cannot be written, or the other process did not start in time.
    """
    path = folder / RECORD_NAME
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError as problem:
        raise SbtkError(
            f"{printable_name(path)} cannot be written: {problem.strerror}",
            "a folder that this user may write",
            "--gallery FOLDER",
        ) from problem
    try:
        end = time.monotonic() + _STARTS_WITHIN_S
        while not _is_locked_by_us(descriptor):
            if address := _address_in(descriptor):
                raise AlreadyOpen(folder, address)
            if time.monotonic() > end:
                raise SbtkError(
                    f"another sbtk is starting to serve {printable_name(folder)}",
                    "its address",
                    "try again in a minute",
                )
            time.sleep(_LOOK_EVERY_S)
        os.ftruncate(descriptor, 0)
        yield ServerRecord(descriptor)
        os.ftruncate(descriptor, 0)
    finally:
        os.close(descriptor)


def update_at(address: str, roots: Sequence[Path]) -> None:
    """Ask the server at `address` to index folders; all of its folders if there are none.

    Raises:
        SbtkError: it refuses, or does not respond.
    """
    for root in roots or (None,):
        name = "" if root is None else f"?under={quote(os.fsencode(root.absolute()), safe='/')}"
        request = urllib.request.Request(  # noqa: S310 -- a loopback address of sbtk itself
            f"{address}v1/indexing{name}", method="POST"
        )
        try:
            with urllib.request.urlopen(request, timeout=_TIMEOUT_S):  # noqa: S310
                pass
        except urllib.error.HTTPError as problem:
            with contextlib.suppress(ValueError, KeyError, TypeError):
                error = json.load(problem)["error"]
                raise SbtkError(error["message"].rstrip("."), "", error["next"]) from problem
            raise SbtkError(f"{address} refused to index: {problem}") from problem
        except OSError as problem:
            raise SbtkError(f"{address} does not respond: {problem}") from problem


def _is_locked_by_us(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as problem:
        if problem.errno in (errno.EWOULDBLOCK, errno.EACCES):
            return False
        raise SbtkError(
            f"the gallery's folder has no locks: {problem.strerror}",
            "a file system with locks",
            "--gallery FOLDER",
        ) from problem
    return True


def _address_in(descriptor: int) -> str | None:
    """Return the address that the holder of the lock has written; `None` if it has not yet."""
    try:
        address = json.loads(os.pread(descriptor, 4096, 0))["address"]
    except (ValueError, KeyError, TypeError):
        return None
    is_ours = isinstance(address, str) and address.startswith("http://127.0.0.1:")
    return address if is_ours else None
