"""What an update has embedded and not committed yet, and copies that wait for it."""

from __future__ import annotations

import os
import sqlite3
import threading
from dataclasses import replace
from typing import Self

from sbtk_runtime.embedding.embedder import Embedded, Failed, Known
from sbtk_runtime.gallery.catalogue import Embedding, Failure
from sbtk_runtime.gallery.changes import Changes
from sbtk_runtime.gallery.schema import catalogue_errors
from sbtk_runtime.gallery.writer import Catalogue, Stamps

_QUERY = "SELECT EXISTS (SELECT 1 FROM photos WHERE sha256 = ? AND removed_in IS NULL)"


class Copies:
    """Finds files of an update that are identical, so that each content is embedded once.

    The first file with a content that is not in the catalogue is embedded, and later ones wait for
    it. Only uncommitted and failed files are in memory.

    Attributes:
        waiting: copies of files that are not committed yet.
    """

    def __init__(self, catalogue: Catalogue) -> None:
        self._path = catalogue.path
        self._lock = threading.Lock()
        # A separate connection, for the threads of the decoders.
        self._connection = sqlite3.connect(
            catalogue.path, isolation_level=None, check_same_thread=False, timeout=30
        )
        self._first: set[str] = set()
        self._failed: dict[str, str] = {}
        self.waiting: list[Known] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._connection.close()

    def is_known(self, sha256: str) -> bool:
        """Return whether a content is in the catalogue, is being embedded, or has failed."""
        with self._lock, catalogue_errors(self._path):
            if sha256 in self._first or sha256 in self._failed:
                return True
            content = bytes.fromhex(sha256)
            if self._connection.execute(_QUERY, (content,)).fetchone()[0]:
                return True
            self._first.add(sha256)
            return False

    def note_failed(self, item: Failed) -> None:
        """Record that a file, and so its copies, cannot be embedded."""
        if item.source is not None:
            with self._lock:
                self._failed[item.source.sha256] = item.reason
                self._first.discard(item.source.sha256)

    def note_committed(self, items: list[Embedded]) -> None:
        """Record that files are in the catalogue."""
        with self._lock:
            self._first.difference_update(item.source.sha256 for item in items)

    def why_failed(self, item: Known) -> str | None:
        """Return why the original of a copy could not be embedded; `None` if it could."""
        return self._failed.get(item.source.sha256)


class PendingCommit:
    """Results of an update that its next commit writes."""

    def __init__(self, copies: Copies) -> None:
        self._copies = copies
        self.embedded: list[Embedded] = []
        self.failures: list[Failure] = []

    @property
    def size(self) -> int:
        """The number of files that wait."""
        return len(self.embedded) + len(self.failures) + len(self._copies.waiting)

    def take(self, item: Embedded | Failed | Known, changes: Changes) -> None:
        """Add a result of the embedder."""
        if isinstance(item, Embedded):
            self.embedded.append(item)
        elif isinstance(item, Known):
            self._copies.waiting.append(item)
        else:
            self._copies.note_failed(item)
            path = os.fsencode(item.path)
            self.failures.append(
                changes.failure(path, item.reason, was_read=item.source is not None)
            )

    def copies(
        self, catalogue: Catalogue, photos: list[Embedding], changes: Changes
    ) -> list[Embedding]:
        """Return the copies of photos that are in the catalogue or in this commit.

        Copies of failed files fail, too. Copies of files that are not embedded yet keep waiting.
        """
        here = {photo.sha256: photo for photo in photos}
        found, waiting = [], []
        for item in self._copies.waiting:
            path, sha256 = os.fsencode(item.path), item.source.sha256
            first = here.get(sha256) or catalogue.embedding_of(sha256)
            if first is not None:
                found.append(_copy(item, first, changes.stamps(path)))
            elif (reason := self._copies.why_failed(item)) is not None:
                self.failures.append(changes.failure(path, reason, was_read=True))
            else:
                waiting.append(item)
        self._copies.waiting[:] = waiting
        return found

    def clear(self) -> None:
        """Forget what was committed; copies keep waiting."""
        self._copies.note_committed(self.embedded)
        self.embedded.clear()
        self.failures.clear()


def _copy(item: Known, first: Embedding, stamps: Stamps) -> Embedding:
    mtime_ns, ctime_ns, inode = stamps
    path = os.fsencode(item.path)
    return replace(first, path=path, mtime_ns=mtime_ns, ctime_ns=ctime_ns, inode=inode)


def embedding_of(item: Embedded, row: int, stamps: Stamps) -> Embedding:
    """Return what the catalogue stores of a photo whose embedding is at `row`."""
    mtime_ns, ctime_ns, inode = stamps
    return Embedding(
        path=os.fsencode(item.path),
        size_bytes=item.source.size_bytes,
        mtime_ns=mtime_ns,
        sha256=item.source.sha256,
        row=row,
        ctime_ns=ctime_ns,
        inode=inode,
        partial="; ".join(item.notices) or None,
    )
