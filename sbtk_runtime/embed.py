"""Files to embeddings: one sketch quickly, or any number of photos as a stream."""

from __future__ import annotations

import itertools
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
from numpy.typing import NDArray

from sbtk_runtime.bundle import Bundle
from sbtk_runtime.decode_pool import Decoded, DecodePool, Source
from sbtk_runtime.engine import AUTO, Embeddings, Engine, Images, checked_rows, open_engine
from sbtk_runtime.engine_lanes import EngineLanes
from sbtk_runtime.errors import BadConfig, BadData, BadImage, BadModel, EngineUnavailable
from sbtk_runtime.manifest import Precision
from sbtk_runtime.preprocess import SIZE_PX, Kind, prepare

_BAD_ROW = "the model gave no usable embedding: not finite, or not of length 1"


@dataclass(frozen=True)
class Embedded:
    """A file that became an embedding.

    Attributes:
        index: position in the input, from 0.
        path: as given.
        row: `(D,) float32` of length 1.
        source: the state of the file that was embedded.
        notices: what was done to it that its owner may want to know.
    """

    index: int
    path: Path
    row: NDArray[np.float32]
    source: Source
    notices: tuple[str, ...] = ()


@dataclass(frozen=True)
class Failed:
    """A file that did not become an embedding.

    Attributes:
        index: position in the input, from 0.
        path: as given.
        reason: why, on one line.
        source: the state of the file that failed; `None` if it could not even be read.
    """

    index: int
    path: Path
    reason: str
    source: Source | None = None


@dataclass(frozen=True)
class Timings:
    """Where the time of an embedder's streams went.

    Attributes:
        files: number of files, failed ones included.
        read_s: seconds of reading and hashing, summed over threads.
        decode_s: core-seconds of decoding.
        preprocess_s: core-seconds of resizing and the like.
        engine_s: core-seconds of the engine; on a GPU its seconds.
        waiting_s: seconds in which the engine had nothing to do.
        wall_s: seconds that streams were open.
    """

    files: int = 0
    read_s: float = 0.0
    decode_s: float = 0.0
    preprocess_s: float = 0.0
    engine_s: float = 0.0
    waiting_s: float = 0.0
    wall_s: float = 0.0


class Embedder:
    """A model bundle on an engine, ready to embed sketches and photos.

    Args:
        bundle: an open bundle, its folder, its name, or `None` for the default one.
        engine: as `--engine` takes it.
        precision: as `--precision` takes it; by default the engine's fastest.
        threads: CPU threads to use, for decoding and on a CPU for the engine; by default all.
        batch: pictures that the engine works on at once in a stream.
        device: `cpu`, `cuda` or `cuda:N`; by default whatever the engine runs on.

    Raises:
        BadModel: there is no such bundle, or it cannot be used.
        EngineUnavailable: no engine works, or the named one does not.
    """

    def __init__(
        self,
        bundle: Bundle | str | Path | None = None,
        *,
        engine: str = AUTO,
        precision: Precision | None = None,
        threads: int | None = None,
        batch: int = 32,
        device: str | None = None,
    ) -> None:
        if batch < 1:
            raise BadConfig(f"a batch of {batch}", "at least 1")
        self.bundle = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)
        self._batch = batch
        self._lock = threading.Lock()
        self._streams = 0
        self._timings = Timings()
        self._engine: Engine | None = open_engine(
            self.bundle, engine=engine, precision=precision, threads=threads, device=device
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def engine(self) -> Engine:
        """The engine in use; a stream may exchange it for one with more lanes."""
        if self._engine is None:
            raise EngineUnavailable("the embedder is closed", "an open one")
        return self._engine

    @property
    def dim(self) -> int:
        """The length of an embedding."""
        return self.bundle.manifest.dim

    @property
    def model_id(self) -> str:
        """The model's id; embeddings of different ids cannot be compared."""
        return self.bundle.manifest.model_id

    @property
    def timings(self) -> Timings:
        """Where the time of all streams so far went."""
        return self._timings

    def close(self) -> None:
        """Frees the engine."""
        if self._engine is not None:
            self._engine.close()
            self._engine = None

    def embed_one(self, data: bytes, kind: Kind) -> tuple[NDArray[np.float32], tuple[str, ...]]:
        """Returns the embedding `(D,) float32` of an image file's bytes, and notices.

        Raises:
            BadImage: it is no readable image, the sketch is empty, or the model fails on it.
        """
        prepared = prepare(data, kind)
        rows, is_bad = checked_rows(self._engine_with(lanes=1).run(prepared.pixels[None]))
        if is_bad[0]:
            raise BadImage(_BAD_ROW)
        return rows[0], prepared.notices

    def embed_images(self, images: Images) -> Embeddings:
        """Returns the embeddings `(N, D) float32` of prepared `images (N, 224, 224, 3) uint8`.

        Raises:
            BadData: the images have another shape or type.
            BadModel: some embedding is not finite or not of length 1.
        """
        if images.dtype != np.uint8 or images.shape[1:] != (SIZE_PX, SIZE_PX, 3):
            raise BadData(
                f"images {images.shape} {images.dtype}", f"(N, {SIZE_PX}, {SIZE_PX}, 3) uint8"
            )
        rows, is_bad = checked_rows(self._engine_with(lanes=1).run(images))
        if is_bad.any():
            raise BadModel(
                f"{int(is_bad.sum())} of {len(rows)} embeddings are not finite or not of length 1",
                "unit rows",
                "try another --precision, and sbtk models check BUNDLE",
            )
        return rows

    def stream(self, paths: Iterable[Path], kind: Kind) -> Iterator[Embedded | Failed]:
        """Yields what became of each file, in the order of `paths`.

        Files are read and decoded on threads ahead of the engine. `paths` is drawn from in the
        calling thread, a few batches ahead of what is yielded, and memory does not grow with
        their number. Closing the iterator stops the threads.

        Raises:
            EngineUnavailable: the engine failed as a whole.
        """
        paths = iter(paths)
        first = next(paths, None)
        if first is None:
            return
        engine = self._engine_with(lanes=None)
        start = time.perf_counter()
        with self._lock:
            self._streams += 1
        try:
            with DecodePool(kind, engine.info.threads) as pool, EngineLanes(engine) as lanes:
                try:
                    yield from self._flow(itertools.chain((first,), paths), pool, lanes, engine)
                finally:
                    self._account(
                        engine_s=lanes.core_s,
                        waiting_s=lanes.waiting_s,
                        wall_s=time.perf_counter() - start,
                    )
        finally:
            with self._lock:
                self._streams -= 1

    def _flow(
        self, paths: Iterator[Path], pool: DecodePool, lanes: EngineLanes, engine: Engine
    ) -> Iterator[Embedded | Failed]:
        info = engine.info
        images_per_run = max(1, self._batch // info.lanes)
        most_runs = 2 * info.lanes
        most_decoding = max(2 * self._batch, 4 * info.threads)
        decoding: deque[Future[Decoded]] = deque()
        runs: deque[_Run] = deque()
        index = 0
        while True:
            for path in itertools.islice(paths, most_decoding - len(decoding)):
                decoding.append(pool.submit(path))
            if decoding and len(runs) < most_runs:
                runs.append(_start_run(decoding, images_per_run, lanes))
            if runs and (len(runs) == most_runs or not decoding or runs[0].is_done()):
                run = runs.popleft()
                for item in run.items(index):
                    self._account_file(run.decoded[item.index - index])
                    yield item
                index += len(run.decoded)
            if not decoding and not runs:
                return

    def _engine_with(self, lanes: int | None) -> Engine:
        """Returns the engine, reopened if need be with that many lanes (`None`: the most).

        Only one is kept, since each holds the weights. While a stream is open it stays as it is.
        """
        with self._lock:
            engine = self.engine
            info = engine.info
            wanted = info.threads if lanes is None else lanes
            if info.device != "cpu" or info.lanes == wanted or self._streams:
                return engine
            # Not closed but let go: another thread may still be running it.
            del engine
            self._engine = None
            reopened = open_engine(
                self.bundle,
                engine=info.name,
                precision=info.precision,
                threads=info.threads,
                lanes=wanted,
            )
            reopened.info = replace(reopened.info, passed_over=info.passed_over)
            self._engine = reopened
            return reopened

    def _account_file(self, decoded: Decoded) -> None:
        self._account(
            files=1,
            read_s=decoded.read_s,
            decode_s=decoded.decode_s,
            preprocess_s=decoded.preprocess_s,
        )

    def _account(
        self,
        *,
        files: int = 0,
        read_s: float = 0.0,
        decode_s: float = 0.0,
        preprocess_s: float = 0.0,
        engine_s: float = 0.0,
        waiting_s: float = 0.0,
        wall_s: float = 0.0,
    ) -> None:
        with self._lock:
            sofar = self._timings
            self._timings = Timings(
                sofar.files + files,
                sofar.read_s + read_s,
                sofar.decode_s + decode_s,
                sofar.preprocess_s + preprocess_s,
                sofar.engine_s + engine_s,
                sofar.waiting_s + waiting_s,
                sofar.wall_s + wall_s,
            )


@dataclass(frozen=True)
class _Run:
    """Consecutive files, of which those that could be decoded are with the engine."""

    decoded: list[Decoded]
    rows: Future[Embeddings] | None

    def is_done(self) -> bool:
        return self.rows is None or self.rows.done()

    def items(self, first_index: int) -> Iterator[Embedded | Failed]:
        """Yields one item for each file, once the engine is done; raises what the engine raised."""
        rows = (
            iter(())
            if self.rows is None
            else iter(zip(*checked_rows(self.rows.result()), strict=True))
        )
        for index, file in enumerate(self.decoded, start=first_index):
            if file.prepared is None or file.source is None:
                yield Failed(index, file.path, file.reason, file.source)
                continue
            row, is_bad = next(rows)
            if is_bad:
                yield Failed(index, file.path, _BAD_ROW, file.source)
            else:
                yield Embedded(index, file.path, row, file.source, file.prepared.notices)


def _start_run(decoding: deque[Future[Decoded]], images_per_run: int, lanes: EngineLanes) -> _Run:
    """Takes the next files, waiting for their decoders, and hands their pixels to the engine."""
    decoded: list[Decoded] = []
    pixels: list[Images] = []
    # Bad files do not fill a batch, but they must not pile up either.
    while decoding and len(pixels) < images_per_run and len(decoded) < 4 * images_per_run:
        file = decoding.popleft().result()
        decoded.append(file)
        if file.prepared is not None:
            pixels.append(file.prepared.pixels)
    return _Run(decoded, lanes.submit(np.stack(pixels)) if pixels else None)
