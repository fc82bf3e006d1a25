"""Files of the same bytes: the first is embedded, the others share its embedding."""

from __future__ import annotations

import sqlite3
import threading
from types import TracebackType
from typing import Self

from sbtk_runtime.embedding.embed import Embedded, Failed, Known
from sbtk_runtime.gallery.catalogue_database import catalogue_errors
from sbtk_runtime.gallery.catalogue_writer import Catalogue

_QUERY = "SELECT EXISTS (SELECT 1 FROM photos WHERE sha256 = ? AND removed_in IS NULL)"


class Copies:
    """Which files of an update are copies, and those that wait for what they are copies of.

    Whoever asks first about bytes that are not in the catalogue is to embed them; whoever asks
    later waits for that. Memory holds only what is not committed, and the failed.
    """

    def __init__(self, catalogue: Catalogue) -> None:
        self._path = catalogue.path
        self._lock = threading.Lock()
        # A connection of its own: it is asked on the threads of the decoders.
        self._connection = sqlite3.connect(
            catalogue.path, isolation_level=None, check_same_thread=False, timeout=30
        )
        self._first: set[str] = set()
        self._failed: dict[str, str] = {}
        self.waiting: list[Known] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        with self._lock:
            self._connection.close()

    def is_known(self, sha256: str) -> bool:
        """Returns whether bytes are in the catalogue, or will be, or cannot be read."""
        with self._lock, catalogue_errors(self._path):
            if sha256 in self._first or sha256 in self._failed:
                return True
            content = bytes.fromhex(sha256)
            if self._connection.execute(_QUERY, (content,)).fetchone()[0]:
                return True
            self._first.add(sha256)
            return False

    def note_failed(self, item: Failed) -> None:
        """Takes in that a file could not be embedded: nor can its copies."""
        if item.source is not None:
            with self._lock:
                self._failed[item.source.sha256] = item.reason
                self._first.discard(item.source.sha256)

    def note_committed(self, items: list[Embedded]) -> None:
        """Takes in that files are in the catalogue."""
        with self._lock:
            self._first.difference_update(item.source.sha256 for item in items)

    def why_failed(self, item: Known) -> str | None:
        """Returns why what a file is a copy of could not be embedded; `None` if it could."""
        return self._failed.get(item.source.sha256)
