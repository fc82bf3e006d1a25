"""Follow what is published while it is served: generations of a gallery, pushes to a collection."""

from __future__ import annotations

import contextlib
import shlex
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from sbtk_runtime.errors import BadGallery, ModelMismatch, SbtkError
from sbtk_runtime.files import printable_name
from sbtk_runtime.gallery.gallery import Gallery
from sbtk_runtime.gallery.remote_gallery import RemoteGallery
from sbtk_runtime.manifest import MANIFEST_NAME

_LOOK_EVERY_S = 0.5

#: Device, inode, size and mtime of a manifest; those of the next manifest differ.
_Stamp = tuple[int, int, int, int]
_NO_FILES_STAMP: _Stamp = (-1, -1, -1, -1)


class GalleryDeleted(BadGallery):
    """The gallery was deleted while it was served."""


@dataclass
class _Opened:
    """An open generation, with the number of requests that read it."""

    gallery: Gallery
    readers: int = 0
    is_current: bool = True


class FollowedGallery:
    """Follows the generations of a gallery, and serves the newest one that can be opened.

    Thread-safe. A reader keeps the generation that it started with. A new generation is opened
    first, and then replaces the old one, which is closed after its last reader. Damaged generations
    are not served.

    Args:
        folder: the gallery's.
        check: raises if a generation cannot be served, such as one of another model.

    Raises:
        BadGallery: there is no gallery, or it is damaged.
        SbtkError: whatever `check` raises.
    """

    def __init__(self, folder: Path, check: Callable[[Gallery], None]) -> None:
        self.folder = folder
        self._check = check
        self._lock = threading.Lock()
        self._stamp = _stamp(folder)
        self._opened: _Opened | None = _Opened(self._open())
        self._problem: SbtkError | None = None
        self._ended = threading.Event()
        self._looking = threading.Lock()
        self._follower = threading.Thread(target=self._follow, name="gallery", daemon=True)
        self._follower.start()

    @contextlib.contextmanager
    def reading(self) -> Iterator[Gallery]:
        """Yield the current generation, which stays open until the block ends.

        Raises:
            GalleryDeleted: the gallery was deleted.
            BadGallery: it is damaged.
            ModelMismatch: it was replaced by one of another model.
        """
        with self._lock:
            opened = self._opened
            if opened is None:
                raise _copy_of(self._problem or _deleted(self.folder))
            opened.readers += 1
        try:
            yield opened.gallery
        finally:
            with self._lock:
                opened.readers -= 1
                is_over = not opened.is_current and not opened.readers
            if is_over:
                opened.gallery.close()

    @property
    def problem(self) -> SbtkError | None:
        """Why the gallery, or its newest generation, is not served; `None` if it is."""
        return self._problem

    def close(self) -> None:
        """Stop following, and close the files after the last reader."""
        self._ended.set()
        self._follower.join()
        self._put(None, None)

    def refresh(self) -> None:
        """Serve the newest generation now; by default that takes half a second."""
        with self._looking:
            self._look()

    def _follow(self) -> None:
        while not self._ended.wait(_LOOK_EVERY_S):
            self.refresh()

    def _look(self) -> None:
        """Open the generation that was published since the last call, if any."""
        stamp = _stamp(self.folder)
        if stamp == self._stamp:
            return
        if stamp is None:
            self._put(None, _deleted(self.folder))
        else:
            try:
                self._put(_Opened(self._open()), None)
            except ModelMismatch as problem:
                self._put(None, _copy_of(problem))
            # The thread must survive any error. The old generation is intact and stays; the next
            # call tries again, even if it finds the previous manifest.
            except Exception as problem:
                self._problem = _not_opened(self.folder, problem)
                stamp = _NO_FILES_STAMP
        self._stamp = stamp

    def _open(self) -> Gallery:
        gallery = Gallery.open(self.folder)
        try:
            self._check(gallery)
        except BaseException:
            gallery.close()
            raise
        return gallery

    def _put(self, opened: _Opened | None, problem: SbtkError | None) -> None:
        with self._lock:
            old, self._opened, self._problem = self._opened, opened, problem
            if old is not None:
                old.is_current = False
            is_over = old is not None and not old.readers
        if old is not None and is_over:
            old.gallery.close()


class RemoteFollower:
    """A collection in a database, which has one state for all and follows pushes by itself.

    Args:
        gallery: the collection, which is closed with this.
    """

    def __init__(self, gallery: RemoteGallery) -> None:
        self._gallery = gallery

    @contextlib.contextmanager
    def reading(self) -> Iterator[RemoteGallery]:
        """Yield the collection."""
        yield self._gallery

    @property
    def problem(self) -> SbtkError | None:
        """Why the collection did not answer when it was last read; `None` if it did."""
        return self._gallery.problem

    def close(self) -> None:
        """Close all connections."""
        self._gallery.close()


def _stamp(folder: Path) -> _Stamp | None:
    """Return the stamp of the manifest; `None` if there is none."""
    try:
        status = (folder / MANIFEST_NAME).stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _copy_of(problem: SbtkError) -> SbtkError:
    """Return a copy to raise: an error that is raised repeatedly collects all frames."""
    return type(problem)(problem.found, problem.expected, problem.next_step)


def _not_opened(folder: Path, problem: Exception) -> BadGallery:
    found = problem.found if isinstance(problem, SbtkError) else f"{problem}"
    return BadGallery(
        f"the newest generation of {printable_name(folder)} cannot be opened: {found}",
        "",
        f"sbtk index --verify --gallery {shlex.quote(printable_name(folder))}",
    )


def _deleted(folder: Path) -> GalleryDeleted:
    return GalleryDeleted(
        f"the gallery {printable_name(folder)} was deleted",
        "a gallery that 'sbtk index' has made",
        f"sbtk index PHOTOS --gallery {shlex.quote(printable_name(folder))}",
    )
