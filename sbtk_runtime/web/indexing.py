"""Index while the server runs: one thread updates the gallery and reports its progress."""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal, Self

from sbtk_runtime.embedding.embedder import Embedder
from sbtk_runtime.errors import SbtkError
from sbtk_runtime.gallery.folder import folder_counts, open_published
from sbtk_runtime.gallery.index import drop_photos
from sbtk_runtime.gallery.update import IndexReport, update_gallery
from sbtk_runtime.manifest import MANIFEST_NAME
from sbtk_runtime.web.queue import Busy

#: Idle; opening an engine or finding files; embedding photos; removing a folder's photos.
Phase = Literal["idle", "finding", "embedding", "forgetting"]

#: Seconds between two generations while photos are embedded.
PUBLISH_EVERY_S = 2.0
#: The most jobs that wait. Each covers whole folders.
MAX_JOBS = 16

_LOOK_EVERY_S = 0.1


@dataclass(frozen=True)
class Progress:
    """The state of indexing.

    Attributes:
        phase: what is being done.
        done: photos done in this phase, or files found.
        total: photos to embed; `None` unless embedding.
        rate: photos per second; 0 unless embedding.
        report: the result of the last update that ended without an error; `None` after a removal.
        problem: why the last job failed; `None` if it did not.
        jobs: the number of jobs that have ended.
    """

    phase: Phase = "idle"
    done: int = 0
    total: int | None = None
    rate: float = 0.0
    report: IndexReport | None = None
    problem: SbtkError | None = None
    jobs: int = 0

    @property
    def is_idle(self) -> bool:
        """Whether nothing is being done."""
        return self.phase == "idle"


#: Called on the indexing thread after each change.
Listener = Callable[[Progress], None]


class Indexer:
    """Updates a gallery on its own thread, one job after the other. A `with` block ends it.

    Readers of the gallery see photos while others are still being embedded. Errors end a job, not
    the thread; they are in `progress`.

    Args:
        folder: the gallery's.
        embedder: opens an embedder of the gallery's model for a job, and is closed after it.
        listener: called after each change.
        on_published: called when a job may have published a generation, before it counts as ended.
    """

    def __init__(
        self,
        folder: Path,
        embedder: Callable[[], Embedder],
        *,
        listener: Listener = lambda progress: None,
        on_published: Callable[[], None] = lambda: None,
    ) -> None:
        self.folder = folder
        self._open_embedder = embedder
        self._listener = listener
        self._on_published = on_published
        self._progress = Progress()
        self._jobs: deque[Callable[[], IndexReport | None]] = deque()
        self._changed = threading.Condition()
        self._is_closed = False
        self._thread = threading.Thread(target=self._work, name="indexing", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def progress(self) -> Progress:
        """The state now."""
        return self._progress

    def update(self, roots: Sequence[Path] = (), regions: int | None = None) -> None:
        """Index folders and files; by default all of the gallery.

        Args:
            roots: the folders and files.
            regions: from now on keep so many regions of each photo; by default what the gallery
                keeps.

        Raises:
            Busy: too many jobs wait, or the server is stopping.
        """
        self._submit(partial(self._update, tuple(roots), regions))

    def forget(self, folder: Path) -> None:
        """Remove a folder's photos from the gallery; no file is deleted.

        Raises:
            Busy: too many jobs wait, or the server is stopping.
        """
        self._submit(partial(self._forget, folder))

    def wait_for_gallery(self) -> None:
        """Wait until a generation is published, as long as there are jobs that may do it.

        Raises:
            SbtkError: the last job failed.
            Busy: the server is stopping.
        """
        while not (self.folder / MANIFEST_NAME).exists():
            with self._changed:
                is_over = self._progress.is_idle and not self._jobs
            if self._is_closed:
                raise Busy("the server is stopping")
            if is_over and self._progress.problem is not None:
                raise self._progress.problem
            if is_over:
                return
            time.sleep(_LOOK_EVERY_S)

    def close(self) -> None:
        """Stop after the photos that are being embedded; they are kept."""
        with self._changed:
            self._is_closed = True
            self._jobs.clear()
            self._changed.notify_all()
        if self._thread.is_alive():
            self._thread.join()

    def _submit(self, job: Callable[[], IndexReport | None]) -> None:
        with self._changed:
            if self._is_closed or len(self._jobs) >= MAX_JOBS:
                raise Busy("too many changes are waiting", "", "try again in a minute")
            self._jobs.append(job)
            if self._progress.is_idle:
                self._set(phase="finding", done=0, total=None, rate=0.0, problem=None)
            self._changed.notify_all()

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._jobs or self._is_closed)
                if self._is_closed:
                    return
                job = self._jobs.popleft()
            self._run(job)

    def _run(self, job: Callable[[], IndexReport | None]) -> None:
        self._set(phase="finding", done=0, total=None, rate=0.0, problem=None)
        report, problem = self._progress.report, None
        try:
            report = job()
        except KeyboardInterrupt:  # raised by `_tick`
            return
        except SbtkError as found:
            problem = found
        # The thread must survive any error of a job.
        except Exception as found:
            text = f"internal error ({type(found).__name__}: {found})"
            problem = SbtkError(text, "", "please report this message")
        self._on_published()
        with self._changed:
            self._set(
                phase="finding" if self._jobs else "idle",
                report=report,
                problem=problem,
                jobs=self._progress.jobs + 1,
                rate=0.0,
            )

    def _update(self, roots: Sequence[Path], regions: int | None) -> IndexReport:
        with self._open_embedder() as embedder:
            return update_gallery(
                self.folder,
                roots or known_roots(self.folder),
                embedder,
                progress=self._tick,
                publish_every_s=PUBLISH_EVERY_S,
                regions=regions,
            )

    def _forget(self, folder: Path) -> None:
        self._set(phase="forgetting")
        drop_photos(self.folder, folder)

    def _tick(self, done: int, total: int | None, rate: float) -> None:
        if self._is_closed:
            raise KeyboardInterrupt
        phase: Phase = "finding" if total is None else "embedding"
        self._set(phase=phase, done=done, total=total, rate=rate)

    def _set(self, **changes: object) -> None:
        self._progress = replace(self._progress, **changes)  # type: ignore[arg-type]
        self._listener(self._progress)


def known_roots(folder: Path) -> list[Path]:
    """Return the folders and files that a gallery was made of, and that `sbtk index` would update.

    Raises:
        BadGallery: there is no gallery, or it is damaged.
    """
    with closing(open_published(folder, lambda text: None)[1]) as view:
        roots = list(view.roots())
    # Older versions did not store what they were given.
    names = roots or [count.path for count in folder_counts(folder)]
    return [Path(os.fsdecode(name)) for name in names]
