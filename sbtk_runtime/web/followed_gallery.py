"""A gallery that is followed: when 'sbtk index' publishes a generation, readers get that one."""

from __future__ import annotations

import contextlib
import shlex
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from sbtk_runtime.errors import BadGallery, ModelMismatch, SbtkError
from sbtk_runtime.gallery.gallery import Gallery
from sbtk_runtime.manifest import MANIFEST_NAME
from sbtk_runtime.names import printable_name

_LOOK_EVERY_S = 0.5

#: What tells one manifest file from the next, which always has another inode or time.
_Stamp = tuple[int, int, int, int]
_NO_FILES_STAMP: _Stamp = (-1, -1, -1, -1)


class GalleryGone(BadGallery):
    """The gallery was removed while it was served."""


@dataclass
class _Opened:
    """A generation, and how many requests read it now."""

    gallery: Gallery
    readers: int = 0
    is_current: bool = True


class FollowedGallery:
    """The newest generation of a gallery that can be opened; any number of threads may read.

    Whoever reads keeps the generation that they began with. A new one is opened beside it and
    takes its place in one step; the old one is closed when its last reader is through. One that
    is damaged does not take its place.

    Args:
        folder: the gallery's.
        check: raises when a generation cannot be served, as one that another model made.

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
        self._follower = threading.Thread(target=self._follow, name="gallery", daemon=True)
        self._follower.start()

    @contextlib.contextmanager
    def reading(self) -> Iterator[Gallery]:
        """Yields the current generation, which stays open until the block ends.

        Raises:
            GalleryGone: it was removed.
            BadGallery: it came back damaged.
            ModelMismatch: it was replaced by one of another model.
        """
        with self._lock:
            opened = self._opened
            if opened is None:
                raise _anew(self._problem or _gone(self.folder))
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
        """Stops following, and lets the files go once nobody reads."""
        self._ended.set()
        self._follower.join()
        self._put(None, None)

    def _follow(self) -> None:
        while not self._ended.wait(_LOOK_EVERY_S):
            self._look()

    def _look(self) -> None:
        """Opens what was published since the last look."""
        stamp = _stamp(self.folder)
        if stamp == self._stamp:
            return
        if stamp is None:
            self._put(None, _gone(self.folder))
        else:
            try:
                self._put(_Opened(self._open()), None)
            except ModelMismatch as problem:
                self._put(None, _anew(problem))
            # The thread must outlive anything. What was opened before is whole, so it stays, and
            # the next look tries again, even if it finds the file that was there before.
            except Exception as problem:
                self._problem = _unopened(self.folder, problem)
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


def _stamp(folder: Path) -> _Stamp | None:
    """Returns what tells the manifest's file from others; `None` if there is none."""
    try:
        status = (folder / MANIFEST_NAME).stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _anew(problem: SbtkError) -> SbtkError:
    """Returns the same error to raise: one that is raised again and again keeps every frame."""
    return type(problem)(problem.found, problem.expected, problem.next_step)


def _unopened(folder: Path, problem: Exception) -> BadGallery:
    found = problem.found if isinstance(problem, SbtkError) else f"{problem}"
    return BadGallery(
        f"the newest state of {printable_name(folder)} cannot be opened: {found}",
        "",
        f"sbtk index --verify --gallery {shlex.quote(printable_name(folder))}",
    )


def _gone(folder: Path) -> GalleryGone:
    return GalleryGone(
        f"the gallery {printable_name(folder)} is gone",
        "a gallery that 'sbtk index' has made",
        f"sbtk index PHOTOS --gallery {shlex.quote(printable_name(folder))}",
    )
