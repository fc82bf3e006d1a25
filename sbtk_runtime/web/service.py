"""What all requests share: the model on its engine, the gallery, and the queues for both."""

from __future__ import annotations

import io
import threading
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Literal, Self

from PIL import Image, ImageDraw

from sbtk_runtime.bundle import Bundle
from sbtk_runtime.embedding.embed import Embedder
from sbtk_runtime.embedding.memory_budget import give_back_what_is_freed
from sbtk_runtime.engines.engine_info import EngineInfo
from sbtk_runtime.engines.engine_request import Said, said_nothing
from sbtk_runtime.errors import SbtkError
from sbtk_runtime.gallery.catalogue import Photo
from sbtk_runtime.gallery.folder import check_model
from sbtk_runtime.gallery.gallery import Gallery, Search
from sbtk_runtime.gallery.hit import Answer, Hit
from sbtk_runtime.gallery.hnsw import import_hnswlib
from sbtk_runtime.manifest import GalleryManifest, Precision
from sbtk_runtime.preprocess import Kind, Prepared
from sbtk_runtime.rerank import Rerank
from sbtk_runtime.web.followed_gallery import FollowedGallery
from sbtk_runtime.web.photo_files import PhotoGone, open_photo
from sbtk_runtime.web.uploads import UploadDecoder
from sbtk_runtime.web.work_queue import WorkQueue

#: How many may wait, and no longer than people do: each is some 25 ms, or some 10 ms, of work.
MOST_QUERIES, MOST_PICTURES = 64, 256

#: How long closing waits for what is not the engine's.
_LAST_JOBS_S = 1.0

Status = Literal["loading", "ok", "stuck", "failed"]


class Stuck(SbtkError):
    """What answers has not moved on for so long that nobody waits for it any more."""


class Loading(SbtkError):
    """The engine or the gallery is not ready yet."""


@dataclass(frozen=True)
class EngineChoice:
    """Which engine to open, as the options of the same names say."""

    engine: str = "auto"
    precision: Precision | None = None
    threads: int | None = None
    device: str | None = None


@dataclass(frozen=True)
class Found:
    """The hits of a query, what they come from, and sentences for the user."""

    hits: list[Hit]
    generation: int
    engine: str
    notices: tuple[str, ...]


@dataclass(frozen=True)
class State:
    """How a service is: what is open now, and what is wrong.

    With the status "ok", a problem is one that keeps a newer gallery from being served. With
    "stuck", what answers has been at the same work for `stuck_s` seconds; it may still end.
    """

    status: Status
    engine: EngineInfo | None
    gallery: GalleryManifest | None
    problem: SbtkError | None
    stuck_s: float = 0.0


class Service:
    """A gallery and its model; in a `with` block they are loaded, and closed at its end.

    Any thread may ask. What takes long is for the threads of the two queues.

    Args:
        folder: the gallery's.
        bundle: the model that made it.
        choice: the engine to run it on.
        search: how to search.
        rerank: how to order what is found.
        said: told what an engine does that takes long.

    Attributes:
        uploads: decodes what clients send.
        queries: for what the engine and the search do.
        pictures: for what reads the catalogue, and photos as they are.
        thumbnails: for what decodes photos.
        loaded: done when queries are answered, or with the error that keeps them from it.
    """

    def __init__(
        self,
        folder: Path,
        bundle: Bundle,
        choice: EngineChoice | None = None,
        *,
        search: Search = "auto",
        rerank: Rerank = "none",
        said: Said = said_nothing,
    ) -> None:
        self.folder = folder
        self.bundle = bundle
        self.uploads = UploadDecoder(MOST_QUERIES)
        self.queries = WorkQueue("query", workers=1, waiting=MOST_QUERIES)
        self.pictures = WorkQueue("picture", workers=2, waiting=MOST_PICTURES)
        self.thumbnails = WorkQueue("thumbnail", workers=2, waiting=MOST_PICTURES)
        self.loaded: Future[None] = Future()
        self._choice = choice or EngineChoice()
        self._search: Search = search
        self._rerank: Rerank = rerank
        self._said = said
        self._embedder: Embedder | None = None
        self._gallery: FollowedGallery | None = None
        self._loading = threading.Thread(target=self._load, name="loading", daemon=True)

    def __enter__(self) -> Self:
        """Begins to open the engine and the gallery; `loaded` tells when it is done."""
        self._loading.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Lets everything go, once what is under way has ended; also what has begun to load."""
        # An engine that is torn down while it loads or runs takes the process with it.
        self._loading.join()
        is_idle = self.queries.close()
        self.uploads.close(_LAST_JOBS_S)
        self.thumbnails.close(_LAST_JOBS_S)
        self.pictures.close(_LAST_JOBS_S)
        if self._gallery is not None:
            self._gallery.close()
        if self._embedder is not None and is_idle:
            self._embedder.close()

    def state(self) -> State:
        """Returns how the service is now."""
        if self._gallery is None:
            return State("loading", None, None, None)
        engine = None if self._embedder is None else self._embedder.engine.info
        try:
            with self._gallery.reading() as gallery:
                if engine is None:
                    return State("loading", None, gallery.manifest, self._gallery.problem)
                if (stuck := self._stuck()) is not None:
                    name, stuck_s = stuck
                    problem = Stuck(
                        f"the queue {name!r} has been at the same work for {stuck_s:.0f} s"
                    )
                    return State("stuck", engine, gallery.manifest, problem, stuck_s)
                return State("ok", engine, gallery.manifest, self._gallery.problem)
        except SbtkError as problem:
            return State("failed", engine, None, problem)

    def _stuck(self) -> tuple[str, float] | None:
        """Returns the queue that is stuck longest and since how many seconds; `None` if none is."""
        queues = (self.queries, self.pictures, self.uploads.small)
        name, stuck_s = max(
            ((queue.name, queue.stuck_s) for queue in queues), key=lambda one: one[1]
        )
        return (name, stuck_s) if stuck_s else None

    def require_ready(self) -> None:
        """Makes sure that queries are answered.

        Raises:
            Loading: not yet.
        """
        if self._embedder is None:
            raise Loading("the model is being loaded", "", "try again in a second")

    def reading(self) -> AbstractContextManager[Gallery]:
        """Returns the gallery's current generation, for a `with` block.

        Raises:
            Loading: it is not open yet.
            SbtkError: on entry, when it is gone, or cannot be served.
        """
        if self._gallery is None:
            raise Loading("the gallery is being opened", "", "try again in a second")
        return self._gallery.reading()

    def query(
        self,
        prepared: Prepared,
        kind: Kind,
        k: int,
        under: str | None = None,
        *,
        fold: bool = True,
    ) -> Found:
        """Returns the photos that look like an upload.

        Raises:
            BadImage: the model fails on it.
            Loading: the model is not ready yet.
            SbtkError: the gallery is gone, or cannot be served.
        """
        self.require_ready()
        assert self._embedder is not None
        embedding = self._embedder.embed_prepared(prepared.pixels, kind)
        return self._found(
            lambda gallery: gallery.answer(
                embedding, k, self._search, under=under, fold=fold, rerank=self._rerank
            ),
            prepared.notices,
        )

    def similar(
        self, photo_id: int, k: int, under: str | None = None, *, fold: bool = True
    ) -> Found:
        """Returns the photos that look like one of the gallery, which is not among them.

        Raises:
            PhotoGone: there is no such photo.
            SbtkError: the gallery is gone, or cannot be served.
        """
        self.require_ready()

        def answer(gallery: Gallery) -> Answer:
            _photo(gallery, photo_id)
            return gallery.similar(
                photo_id, k, self._search, under=under, fold=fold, rerank=self._rerank
            )

        return self._found(answer)

    def photo(self, photo_id: int) -> Photo:
        """Returns what is known of a photo.

        Raises:
            PhotoGone: there is no such photo.
            SbtkError: the gallery is gone, or cannot be served.
        """
        with self.reading() as gallery:
            return _photo(gallery, photo_id)

    def photo_file(self, photo_id: int) -> tuple[Photo, BinaryIO]:
        """Returns what is known of a photo, and its file, open for reading; see `open_photo`.

        Raises:
            PhotoGone: there is no such photo, or it is not where it was found.
            SbtkError: the gallery is gone, or cannot be served.
        """
        with self.reading() as gallery:
            photo = _photo(gallery, photo_id)
            return photo, open_photo(photo.path, gallery.roots())

    def _load(self) -> None:
        try:
            self._open()
        except BaseException as problem:
            self.loaded.set_exception(problem)
        else:
            self.loaded.set_result(None)

    def _open(self) -> None:
        """Opens gallery and engine, and runs both once: the first run takes longer than others."""
        give_back_what_is_freed()
        if self._search == "hnsw":
            import_hnswlib()
        # First, since it is quick to fail, and to show photos.
        self._gallery = FollowedGallery(self.folder, self._check)
        embedder = Embedder(
            self.bundle,
            engine=self._choice.engine,
            precision=self._choice.precision,
            threads=self._choice.threads,
            device=self._choice.device,
            batch=1,
            said=self._said,
        )
        try:
            embedding, _ = embedder.embed_one(_warm_up_sketch(), "sketch")
            with self._gallery.reading() as gallery:
                if gallery.count:
                    gallery.answer(embedding, 1, self._search, rerank=self._rerank)
        except BaseException:
            embedder.close()
            raise
        self._embedder = embedder

    def _check(self, gallery: Gallery) -> None:
        made_by, preprocessing = gallery.manifest.model_id, gallery.manifest.preprocessing
        check_model(self.folder, made_by, preprocessing, self.bundle)

    def _found(self, ask: Callable[[Gallery], Answer], notices: tuple[str, ...] = ()) -> Found:
        assert self._embedder is not None
        engine = self._embedder.engine.info.name
        with self.reading() as gallery:
            answer = ask(gallery) if gallery.count else _EMPTY
            return Found(
                answer.hits, gallery.manifest.generation, engine, (*notices, *answer.notices)
            )


_EMPTY = Answer([], ("the gallery has no photos yet: run 'sbtk index' on some",))


def _photo(gallery: Gallery, photo_id: int) -> Photo:
    photo = gallery.photo(photo_id)
    if photo is None:
        raise PhotoGone(f"there is no photo {photo_id}", "", "take the id of a hit")
    return photo


def _warm_up_sketch() -> bytes:
    picture = Image.new("L", (256, 256), 255)
    ImageDraw.Draw(picture).ellipse((40, 60, 210, 200), outline=0, width=5)
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()
