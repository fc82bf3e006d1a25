"""The embedder: one sketch at a time, or any number of photos as a stream."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from sbtk_runtime.bundle import Bundle
from sbtk_runtime.embedding.stream import (
    BAD_ROW,
    Embedded,
    EmbeddingStream,
    Failed,
    Known,
    Timings,
)
from sbtk_runtime.engines.base import (
    DEFAULT_OPTIONS,
    Embeddings,
    Engine,
    EngineInfo,
    EngineOptions,
    Images,
    Notify,
    no_notify,
)
from sbtk_runtime.engines.registry import check_engine_options, open_engine
from sbtk_runtime.engines.session import validate_embeddings
from sbtk_runtime.errors import BadData, BadImage, BadModel, EngineUnavailable
from sbtk_runtime.machine import cpu_threads
from sbtk_runtime.manifest import Precision
from sbtk_runtime.preprocess import (
    SIZE_PX,
    ImageInput,
    Kind,
    Pixels,
    require_kind,
    require_several,
)
from sbtk_runtime.regions import RegionGrid


class Embedder:
    """A model bundle on an engine, ready to embed sketches and photos.

    >>> with Embedder() as embedder:
    ...     print(embedder.dim)
    512

    Args:
        bundle: an open bundle, its folder, its name, or `None` for the default one.
        options: the engine and how it runs; its threads also decode.
        engine, precision, threads, batch, device: instead of the same field of `options`.
        single_query: only an image or two will be embedded; see `open_engine`.
        notify: called with notices, such as what takes long.
        lazy: open the engine when it is first used; errors of opening it are raised there.

    Raises:
        BadConfig: the options contradict each other.
        BadModel: there is no such bundle, or it cannot be used.
        EngineUnavailable: no engine works, or not the named one.
    """

    def __init__(
        self,
        bundle: Bundle | str | Path | None = None,
        options: EngineOptions = DEFAULT_OPTIONS,
        *,
        engine: str | None = None,
        precision: Precision | None = None,
        threads: int | None = None,
        batch: int | None = None,
        device: str | None = None,
        single_query: bool = False,
        notify: Notify = no_notify,
        lazy: bool = False,
    ) -> None:
        self.bundle = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)
        fields: dict[str, Any] = {
            **{"engine": engine, "precision": precision, "threads": threads},
            **{"device": device, "batch": batch},
        }
        given = {name: value for name, value in fields.items() if value is not None}
        options = replace(options, **given)
        self._threads = cpu_threads() if options.threads is None else options.threads
        self._options = replace(options, threads=self._threads)
        check_engine_options(self._options)
        self._open = partial(open_engine, self.bundle, single_query=single_query, notify=notify)
        self._lock = threading.Lock()
        self._streams = 0
        self._timings = Timings()
        _take_blas_memory()
        self._is_closed = False
        self._engine: Engine | None = None if lazy else self._open(self._options)
        self._regions: Engine | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def engine(self) -> Engine:
        """The engine in use; a stream may replace it by one with more lanes.

        A lazy embedder opens it here, with the lanes of a stream.
        """
        engine = self._engine
        return self._engine_with(lanes=None) if engine is None else engine

    @property
    def dim(self) -> int:
        """The length of an embedding."""
        return self.bundle.manifest.dim

    @property
    def batch(self) -> int:
        """The largest batch of a run of the engine."""
        return self._options.batch

    @property
    def model_id(self) -> str:
        """The model's id; embeddings of different models cannot be compared."""
        return self.bundle.manifest.model_id

    @property
    def timings(self) -> Timings:
        """The sum of the timings of all streams so far."""
        return self._timings

    def close(self) -> None:
        """Free the engine."""
        self._is_closed = True
        for engine in (self._engine, self._regions):
            if engine is not None:
                engine.close()
        self._engine = self._regions = None

    def embed_one(
        self, image: ImageInput, kind: Kind
    ) -> tuple[NDArray[np.float32], tuple[str, ...]]:
        """Return the embedding `(D,) float32` of an image, of length 1, and notices about it.

        >>> with Embedder() as embedder:
        ...     embedding, notices = embedder.embed_one("sketch.png", "sketch")
        >>> embedding.shape
        (512,)

        Args:
            image: the path of a file, its bytes, a file opened with "rb", a Pillow image, or an
                array `(H, W, 3)`, `(H, W, 1)` or `(H, W) uint8` of RGB or grey.
            kind: "sketch" or "photo"; it decides how the image is prepared.

        Raises:
            BadConfig: `kind` is neither.
            BadImage: there is no readable image, the sketch is empty, or the model fails on it.
        """
        prepared = self.bundle.preprocessing.prepare_input(image, kind)
        return self.embed_prepared(prepared.pixels, kind), prepared.notices

    def embed_prepared(self, pixels: Pixels, kind: Kind) -> NDArray[np.float32]:
        """Return the embedding `(D,) float32` of one prepared image.

        Args:
            pixels: `(224, 224, 3) uint8`, as the bundle's `preprocessing` prepares them.
            kind: "sketch" or "photo".

        Raises:
            BadConfig: `kind` is neither.
            BadData: the pixels have another shape or type.
            BadImage: the model fails on it.
        """
        rows, is_bad = self._embed(pixels[None], kind)
        if is_bad[0]:
            raise BadImage(BAD_ROW)
        row: NDArray[np.float32] = rows[0]
        return row

    def embed_images(self, images: Images, kind: Kind) -> Embeddings:
        """Return the embeddings `(N, D) float32` of prepared `images (N, 224, 224, 3) uint8`.

        >>> with Embedder() as embedder:
        ...     prepared = embedder.bundle.preprocessing.prepare_input("photos/0.jpg", "photo")
        ...     embedder.embed_images(np.stack([prepared.pixels] * 2), "photo").shape
        (2, 512)

        Args:
            images: as the bundle's `preprocessing` prepares them.
            kind: "sketch" or "photo", the same for all of them.

        Raises:
            BadConfig: `kind` is neither.
            BadData: the images have another shape or type.
            BadModel: some embedding is not finite or not of length 1.
        """
        rows, is_bad = self._embed(images, kind)
        if is_bad.any():
            raise BadModel(
                f"{int(is_bad.sum())} of {len(rows)} embeddings are not finite or not of length 1",
                "unit rows",
                "try another --precision, and sbtk models check BUNDLE",
            )
        return rows

    def stream(self, paths: Iterable[Path | str], kind: Kind) -> Iterator[Embedded | Failed]:
        """Yield the embedding of each file, or why it failed, in the order of `paths`.

        Files are read and decoded on threads ahead of the engine. `paths` is consumed in the
        calling thread, a few batches ahead of what is yielded, and memory does not grow with
        their number. Closing the iterator stops the threads.

        >>> with Embedder() as embedder:
        ...     for item in embedder.stream(["photos/0.jpg", "missing.jpg"], "photo"):
        ...         print(item.path, getattr(item, "reason", "embedded"))
        photos/0.jpg embedded
        missing.jpg cannot be read: No such file or directory

        Raises:
            BadConfig: `kind` is neither "sketch" nor "photo", or `paths` is a single path.
            EngineUnavailable: the engine failed as a whole.
        """
        require_kind(kind)
        each = map(Path, require_several(paths))
        first = next(each, None)
        if first is None:
            return
        every = itertools.chain((first,), each)
        with self.open_stream() as stream, closing(stream.embed(every, kind)) as items:
            for item in items:
                assert not isinstance(item, Known)
                yield item

    @contextmanager
    def open_stream(self, grid: RegionGrid | None = None) -> Iterator[EmbeddingStream]:
        """Keep the engine open, with its most lanes, to embed files in the block.

        Args:
            grid: also embed these regions, into `Embedded.regions` and `Embedded.boxes`.

        Raises:
            BadModel: the model embeds no regions.
            EngineUnavailable: the engine cannot be opened.
        """
        engine = self._engine_with(lanes=None)
        regions = None if grid is None else self.open_regions(grid)
        with self._lock:
            self._streams += 1
        try:
            yield EmbeddingStream(
                *(self.bundle.preprocessing, engine, self._options.batch, self._account, regions)
            )
        finally:
            with self._lock:
                self._streams -= 1

    def open_regions(self, grid: RegionGrid) -> Engine:
        """Return the engine that embeds these regions of images; open it if necessary.

        Engine, precision and number of lanes are those for whole frames.

        Raises:
            BadModel: the model has no map whose windows could be pooled.
            EngineUnavailable: the engine does not work with so large an input.
        """
        info = self._engine_with(lanes=None).info
        with self._lock:
            regions = self._regions
            if regions is None or (regions.info.regions, regions.info.lanes) != (grid, info.lanes):
                self._regions = regions = self._open(
                    self._options_of(info), lanes=info.lanes, regions=grid
                )
            return regions

    def _engine_with(self, lanes: int | None) -> Engine:
        """Return the engine, reopened if necessary with that many lanes, by default the most.

        Only one engine is kept, because each holds the weights. Open streams keep theirs.
        """
        with self._lock:
            if self._is_closed:
                raise EngineUnavailable("the embedder is closed", "an open embedder")
            wanted = self._threads if lanes is None else lanes
            engine = self._engine
            if engine is None:
                self._engine = engine = self._open(self._options, lanes=wanted)
                return engine
            info = engine.info
            if info.device != "cpu" or info.lanes == wanted or self._streams:
                return engine
            # Released rather than closed: another thread may still be running it.
            del engine
            self._engine = None
            reopened = self._open(self._options_of(info), lanes=wanted)
            reopened.info = replace(reopened.info, passed_over=info.passed_over)
            self._engine = reopened
            return reopened

    def _embed(self, images: Images, kind: Kind) -> tuple[Embeddings, NDArray[np.bool_]]:
        """Return the embeddings `(N, D) float32` of prepared images, and which of them are bad."""
        require_kind(kind)
        if images.dtype != np.uint8 or images.shape[1:] != (SIZE_PX, SIZE_PX, 3):
            raise BadData(
                f"images {images.shape} {images.dtype}", f"(N, {SIZE_PX}, {SIZE_PX}, 3) uint8"
            )
        return validate_embeddings(self._engine_with(lanes=1).run(images, kind))

    def _options_of(self, info: EngineInfo) -> EngineOptions:
        """Return the options that open an engine like an open one."""
        return replace(
            self._options, engine=info.name, precision=info.precision, device=info.device
        )

    def _account(self, timings: Timings) -> None:
        with self._lock:
            self._timings += timings


def _take_blas_memory() -> None:
    """Make NumPy's BLAS allocate its threads' memory before an engine uses the rest.

    BLAS allocates at the first large product, and ends the process if there is no memory.
    """
    square = np.ones((256, 256), dtype=np.float32)
    np.matmul(square, square)
