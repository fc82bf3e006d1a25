"""The state that all requests share: engine, gallery with its newest generation, work queues."""

from __future__ import annotations

import contextlib
import os
import shlex
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, Literal, Self

from sbtk_runtime.bundle import Bundle
from sbtk_runtime.embedding.embedder import Embedder
from sbtk_runtime.engines.base import (
    DEFAULT_OPTIONS,
    Embeddings,
    Engine,
    EngineInfo,
    EngineOptions,
    Notify,
    no_notify,
)
from sbtk_runtime.engines.registry import open_engine
from sbtk_runtime.errors import BadGallery, ModelMismatch, SbtkError
from sbtk_runtime.files import printable_name
from sbtk_runtime.gallery.catalogue import Photo
from sbtk_runtime.gallery.folder import check_model
from sbtk_runtime.gallery.gallery import Gallery
from sbtk_runtime.gallery.hnsw import import_hnswlib
from sbtk_runtime.gallery.photo_filter import Period
from sbtk_runtime.gallery.queries import Answer, Box, PhotoCopies, Search
from sbtk_runtime.gallery.remote_gallery import RemoteGallery
from sbtk_runtime.generated_inputs import generate_sketches
from sbtk_runtime.machine import trim_malloc
from sbtk_runtime.manifest import MANIFEST_NAME, GalleryManifest
from sbtk_runtime.preprocess import Kind
from sbtk_runtime.rerank import Rerank, RerankChoice
from sbtk_runtime.web.indexing import Indexer, Listener, Progress
from sbtk_runtime.web.photos import PhotoNotFound, open_photo
from sbtk_runtime.web.queue import WorkQueue
from sbtk_runtime.web.uploads import QUERY_BATCH, Uploads

#: The most waiting jobs; each takes some 25 ms (queries) or 10 ms (reads).
MAX_QUERIES, MAX_READS = 64, 256

#: How long closing waits for jobs other than the engine's.
_LAST_JOBS_S = 1.0

#: On disk, or in a database.
AnyGallery = Gallery | RemoteGallery
Status = Literal["loading", "ok", "stuck", "failed"]


class Stuck(SbtkError):
    """A queue has made no progress for so long that clients have given up."""


class Loading(SbtkError):
    """The engine or the gallery is not ready yet."""


class GalleryDeleted(BadGallery):
    """The gallery was deleted while it was served."""


@dataclass(frozen=True)
class Found:
    """The answer to a query, with the gallery's generation and the engine."""

    answer: Answer
    generation: int
    engine: str


@dataclass(frozen=True)
class Feedback:
    """Ids of photos that are liked, and of those that are not."""

    liked: tuple[int, ...] = ()
    disliked: tuple[int, ...] = ()


NO_FEEDBACK = Feedback()


@dataclass(frozen=True)
class SearchOptions:
    """What all queries can choose; see `Gallery.answer`."""

    under: str | None = None
    taken: Period | None = None
    fold: bool = True
    offset: int = 0
    rerank: Rerank | None = None
    regions: bool = True


@dataclass(frozen=True)
class State:
    """The state of a service.

    With the status "ok", `problem` is why a newer generation of the gallery is not served. With
    "stuck", a queue has made no progress for `stuck_s` seconds; it may recover.
    """

    status: Status
    engine: EngineInfo | None
    gallery: GalleryManifest | None
    problem: SbtkError | None
    stuck_s: float = 0.0


class Service:
    """A gallery and its model. A `with` block loads and closes them.

    Thread-safe. Work that takes long belongs in one of the queues.

    Args:
        gallery: its folder, or an open collection, which the service closes.
        bundle: the model that made it.
        options: the engine to open.
        search: how to search.
        rerank: how to reorder hits.
        notify: called with a sentence about what takes long, or was changed to make an engine work.
        command: the command line that starts the server.
        listener: called with the progress of indexing, on the indexing thread.
        name: the gallery's name in URLs, if the server has several.
        galleries: the names of all galleries of the server.

    Attributes:
        folder: the gallery's; `None` if it is a collection.
        indexer: updates the gallery; `None` for a collection. For a gallery that does not exist
            yet, submit an update before the block.
        is_stopping: whether the server stops, so that event streams end; it waits for them.
        uploads: decodes and embeds what clients send.
        searches: for searches, which run while the engine does.
        reads: for reading the catalogue and photo files.
        thumbnails: for decoding photos.
        loaded: done when queries are answered, or failed with the error.
    """

    def __init__(
        self,
        gallery: Path | RemoteGallery,
        bundle: Bundle,
        options: EngineOptions = DEFAULT_OPTIONS,
        *,
        search: Search = "auto",
        rerank: RerankChoice = "auto",
        notify: Notify = no_notify,
        command: str = "sbtk serve",
        listener: Listener = lambda progress: None,
        name: str = "",
        galleries: Sequence[str] = (),
    ) -> None:
        self.folder = gallery if isinstance(gallery, Path) else None
        self.command = command
        self.name = name
        self.galleries = tuple(galleries)
        self.bundle = bundle
        self.indexer: Indexer | None = None
        if isinstance(gallery, Path):
            self.indexer = Indexer(
                gallery,
                lambda: Embedder(bundle, options, notify=notify, lazy=True),
                listener=listener,
                on_published=self._refresh,
            )
        self.is_stopping: Callable[[], bool] = lambda: False
        self.uploads = Uploads(
            MAX_QUERIES, bundle.preprocessing, self.require_engine, self._open_lanes
        )
        self.searches = WorkQueue("search", workers=2, waiting=MAX_QUERIES)
        self.reads = WorkQueue("read", workers=2, waiting=MAX_READS)
        self.thumbnails = WorkQueue("thumbnail", workers=2, waiting=MAX_READS)
        self.loaded: Future[None] = Future()
        self._options = options
        self._search: Search = search
        self._rerank: RerankChoice = rerank
        self._notify = notify
        self._embedder: Embedder | None = None
        self._source = gallery
        self._gallery: FollowedGallery | RemoteGallery | None = None
        self._loading = threading.Thread(target=self._load, name="loading", daemon=True)

    def __enter__(self) -> Self:
        """Start to open the engine and the gallery; `loaded` is set when that is done."""
        if self.indexer is not None:
            self.indexer.__enter__()
        self._loading.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close everything after running jobs, and loading, have ended."""
        if self.indexer is not None:
            self.indexer.close()
        # Closing an engine while it loads or runs would end the process.
        self._loading.join()
        is_idle = self.uploads.close(_LAST_JOBS_S)
        self.searches.close(_LAST_JOBS_S)
        self.thumbnails.close(_LAST_JOBS_S)
        self.reads.close(_LAST_JOBS_S)
        if self._gallery is not None:
            self._gallery.close()
        if self._embedder is not None and is_idle:
            self._embedder.close()

    @property
    def shown_name(self) -> str:
        """The gallery's name for people."""
        if isinstance(self._source, Path):
            return printable_name(self._source.absolute().name)
        return self._source.collection

    @property
    def index_command(self) -> str | None:
        """The command that indexes photos into the gallery; `None` if it is a collection."""
        if self.folder is None:
            return None
        name = shlex.quote(printable_name(self.folder.absolute()))
        return f"sbtk index PHOTOS --gallery {name}"

    @property
    def indexing(self) -> Progress:
        """The progress of indexing; idle if the gallery is a collection."""
        return Progress() if self.indexer is None else self.indexer.progress

    def state(self) -> State:
        """Return the current state."""
        if self._gallery is None:
            return State("loading", None, None, None)
        engine = None if self._embedder is None else self._embedder.engine.info
        try:
            with self.reading() as gallery:
                if engine is None:
                    return State("loading", None, gallery.manifest, self._gallery.problem)
                if (stuck := self._stuck()) is not None:
                    name, stuck_s = stuck
                    problem = Stuck(f"the queue {name!r} has made no progress for {stuck_s:.0f} s")
                    return State("stuck", engine, gallery.manifest, problem, stuck_s)
                return State("ok", engine, gallery.manifest, self._gallery.problem)
        except SbtkError as problem:
            return State("failed", engine, None, problem)

    def _stuck(self) -> tuple[str, float] | None:
        """Return the queue that has been stuck longest, and its seconds; `None` if none is."""
        queues = (self.uploads.queries, self.searches, self.reads, self.uploads.small)
        name, stuck_s = max(
            ((queue.name, queue.stuck_s) for queue in queues), key=lambda one: one[1]
        )
        return (name, stuck_s) if stuck_s else None

    def require_engine(self) -> Engine:
        """Return the engine, without which no query is answered.

        Raises:
            Loading: it is not ready yet.
        """
        if self._embedder is None:
            raise Loading("the model is loading", "", "try again in a second")
        return self._embedder.engine

    def reading(self) -> contextlib.AbstractContextManager[AnyGallery]:
        """Return the gallery's current generation, for a `with` block.

        Raises:
            Loading: it is not open yet.
            SbtkError: on entry, if the gallery was deleted or cannot be served.
        """
        if self._gallery is None:
            raise Loading("the gallery is opening", "", "try again in a second")
        if isinstance(self._gallery, RemoteGallery):
            return contextlib.nullcontext(self._gallery)
        return self._gallery.reading()

    def search(
        self,
        embedding: Embeddings | None,
        kind: Kind,
        k: int,
        options: SearchOptions,
        feedback: Feedback = NO_FEEDBACK,
    ) -> Found:
        """Return the photos nearest to an embedding `(D,) float32`, with feedback, or to feedback.

        Raises:
            PhotoNotFound: there is no photo of the feedback.
            SbtkError: the gallery was deleted or cannot be served.
        """
        return self._found(
            lambda gallery: gallery.answer(
                *(_refine(gallery, embedding, feedback), k, self._search),
                **self._arguments(gallery, kind, options),
                match_rule=self.bundle.manifest.match_rule if kind == "sketch" else None,
            )
        )

    def similar(
        self, photo_id: int, k: int, options: SearchOptions, region: Box | None = None
    ) -> Found:
        """Return the photos that look like one of the gallery, or like a part of it, without it.

        Raises:
            PhotoNotFound: there is no such photo.
            BadRegion: `region` is not a part of the photo, or none of it is kept.
            SbtkError: the gallery was deleted or cannot be served.
        """

        def answer(gallery: AnyGallery) -> Answer:
            _photo(gallery, photo_id)
            arguments = self._arguments(gallery, "photo", options)
            return gallery.similar(photo_id, k, self._search, **arguments, region=region)

        return self._found(answer)

    def recent(
        self,
        limit: int,
        offset: int = 0,
        under: str | None = None,
        taken: Period | None = None,
    ) -> tuple[int, list[PhotoCopies]]:
        """Return the generation and its photos, newest first by modification time.

        Raises:
            SbtkError: the gallery was deleted or cannot be served.
        """
        with self.reading() as gallery:
            return gallery.manifest.generation, gallery.recent(
                limit, offset, under=under, taken=taken
            )

    def photo(self, photo_id: int) -> Photo:
        """Return the catalogue's entry of a photo.

        Raises:
            PhotoNotFound: there is no such photo.
            SbtkError: the gallery was deleted or cannot be served.
        """
        with self.reading() as gallery:
            return _photo(gallery, photo_id)

    def photo_file(self, photo_id: int) -> tuple[Photo, BinaryIO]:
        """Return the catalogue's entry of a photo, and its open file; see `open_photo`.

        Raises:
            PhotoNotFound: there is no such photo, or its file is no longer there.
            SbtkError: the gallery was deleted or cannot be served.
        """
        with self.reading() as gallery:
            photo = _photo(gallery, photo_id)
            roots = map(os.fsencode, gallery.roots())
            return photo, open_photo(os.fsencode(photo.path), roots, photo)

    def _load(self) -> None:
        try:
            self._open()
        except BaseException as problem:
            self.loaded.set_exception(problem)
        else:
            self.loaded.set_result(None)

    def _open(self) -> None:
        """Open gallery and engine, and run both once, because the first run is slow."""
        trim_malloc()
        if self._search == "hnsw":
            import_hnswlib()
        if self.indexer is not None:
            self.indexer.wait_for_gallery()
        # First, because it opens or fails quickly, and photos can be shown.
        if isinstance(self._source, Path):
            self._gallery = FollowedGallery(self._source, self._check)
        else:
            self._gallery = self._source
        embedder = Embedder(self.bundle, self._options, batch=QUERY_BATCH, notify=self._notify)
        try:
            embedding, _ = embedder.embed_one(generate_sketches(1)[0], "sketch")
            with self.reading() as gallery:
                if gallery.count:
                    reranked = gallery.choose_rerank(self._rerank, "sketch")
                    gallery.answer(embedding, 1, self._search, rerank=reranked)
        except BaseException:
            embedder.close()
            raise
        self._embedder = embedder

    def _open_lanes(self, lanes: int) -> Engine | None:
        info = self.require_engine().info
        options = replace(
            self._options, engine=info.name, precision=info.precision, device=info.device
        )
        try:
            return open_engine(self.bundle, options, lanes=lanes)
        except (SbtkError, MemoryError) as problem:
            self._notify(f"queries of several clients take turns on the engine: {problem}")
            return None

    def _refresh(self) -> None:
        if isinstance(self._gallery, FollowedGallery):
            self._gallery.refresh()

    def _check(self, gallery: Gallery) -> None:
        made_by, preprocessing = gallery.manifest.model_id, gallery.manifest.preprocessing
        check_model(gallery.folder, made_by, preprocessing, self.bundle)

    def _arguments(self, gallery: AnyGallery, kind: Kind, options: SearchOptions) -> dict[str, Any]:
        rerank = options.rerank or gallery.choose_rerank(self._rerank, kind)
        return vars(options) | {"rerank": rerank}

    def _found(self, ask: Callable[[AnyGallery], Answer]) -> Found:
        engine = self.require_engine().info.name
        with self.reading() as gallery:
            answer = ask(gallery) if gallery.count else self._answer_empty()
            return Found(answer, gallery.manifest.generation, engine)

    def _answer_empty(self) -> Answer:
        command = self.index_command or "'sbtk push' where photos are indexed"
        return Answer([], (f"the gallery has no photos yet: run {command}",))


def _refine(gallery: AnyGallery, embedding: Embeddings | None, feedback: Feedback) -> Embeddings:
    if embedding is not None and feedback == NO_FEEDBACK:
        return embedding
    for photo_id in (*feedback.liked, *feedback.disliked):
        _photo(gallery, photo_id)
    return gallery.refined(embedding, feedback.liked, feedback.disliked)


def _photo(gallery: AnyGallery, photo_id: int) -> Photo:
    photo = gallery.photo(photo_id)
    if photo is None:
        raise PhotoNotFound(f"there is no photo {photo_id}", "", "use the id of a hit")
    return photo


_LOOK_EVERY_S = 0.5

#: Device, inode, size and mtime of a manifest; those of the next manifest differ.
_Stamp = tuple[int, int, int, int]
_NO_FILES_STAMP: _Stamp = (-1, -1, -1, -1)


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
