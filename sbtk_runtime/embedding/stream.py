"""Embeds a stream of files, in order and in little memory.

    paths -> decode pool -> runs of the engine -> items

Each arrow is a bounded queue of futures. The decoders are a few batches ahead of the engine, and
each lane of the engine has two runs, so that neither waits for the other or for the caller.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import astuple, dataclass, replace
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import NDArray

from sbtk_runtime import images
from sbtk_runtime.engines.base import Embeddings, Engine, Images
from sbtk_runtime.engines.session import validate_embeddings
from sbtk_runtime.errors import BadImage, LargeImage
from sbtk_runtime.machine import trim_malloc
from sbtk_runtime.preprocess import Kind, Prepared, Preprocessing, open_image
from sbtk_runtime.regions import Boxes, RegionGrid, Tile, cut_tiles, cut_tiles_apart, input_side

BAD_ROW = "the model's embedding is not finite or not of length 1"


@dataclass(frozen=True)
class Embedded:
    """A file that was embedded.

    Attributes:
        index: position in the input, from 0.
        path: as given.
        row: `(D,) float32` of length 1.
        source: the state of the file that was embedded.
        notices: about the file, such as that it is only partly readable.
        regions: `(R, D) float32` of length 1, if regions were asked for; none of a tiny photo.
        boxes: `(R, 4) float32`, the regions' x, y, width and height, 0 to 1 of the upright photo.
    """

    index: int
    path: Path
    row: NDArray[np.float32]
    source: Source
    notices: tuple[str, ...] = ()
    regions: NDArray[np.float32] | None = None
    boxes: Boxes | None = None


@dataclass(frozen=True)
class Failed:
    """A file that could not be embedded.

    Attributes:
        index: position in the input, from 0.
        path: as given.
        reason: why, on one line.
        source: the state of the file; `None` if it could not be read.
    """

    index: int
    path: Path
    reason: str
    source: Source | None = None


@dataclass(frozen=True)
class Known:
    """A file whose bytes are known, and which was neither decoded nor embedded.

    Attributes:
        index: position in the input, from 0.
        path: as given.
        source: the state of the file that was read.
    """

    index: int
    path: Path
    source: Source


@dataclass(frozen=True)
class Timings:
    """Where an embedder's streams spent their time.

    Attributes:
        files: number of files, including failed ones.
        read_s: seconds of reading and hashing, summed over threads.
        decode_s: core-seconds of decoding.
        preprocess_s: core-seconds of resizing and other preparation.
        engine_s: core-seconds of the engine, or seconds of a GPU.
        waiting_s: seconds in which the engine was idle.
        wall_s: seconds in which streams were open.
    """

    files: int = 0
    read_s: float = 0.0
    decode_s: float = 0.0
    preprocess_s: float = 0.0
    engine_s: float = 0.0
    waiting_s: float = 0.0
    wall_s: float = 0.0

    def __add__(self, other: Timings) -> Timings:
        return Timings(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))


@dataclass(frozen=True)
class EmbeddingStream:
    """An open engine that embeds files, as many as there are.

    Attributes:
        preprocessing: of the engine's model.
        engine: runs on all of its lanes.
        batch: the number of images that all lanes together work on.
        account: called now and then with the timings since its last call.
        regions: an engine with a grid and as many lanes, which also embeds the regions of photos.
    """

    preprocessing: Preprocessing
    engine: Engine
    batch: int
    account: Callable[[Timings], None]
    regions: Engine | None = None

    def embed(
        self, paths: Iterable[Path], kind: Kind, is_known: IsKnown | None = None
    ) -> Generator[Embedded | Failed | Known, None, None]:
        """Yield the result of each file, in the order of `paths`.

        Args:
            paths: consumed in the calling thread, a few batches ahead.
            kind: of the images.
            is_known: called once for each readable file, from any thread, with the SHA-256 of its
                bytes as 64 hexadecimal digits; returns whether to skip the file.

        Raises:
            EngineUnavailable: the engine failed. All threads have ended when this is raised, or
                when the generator is closed.
        """
        start = time.perf_counter()
        grid = None if self.regions is None else self.regions.info.regions
        with (
            DecodePool(kind, self.preprocessing, self.engine.info.threads, is_known, grid) as pool,
            EngineLanes(self.engine, self.regions) as lanes,
        ):
            try:
                for run in _runs(iter(paths), pool, lanes, self.engine, self.batch, kind):
                    self.account(_cost(run.decoded))
                    yield from run.items()
            finally:
                wall_s = time.perf_counter() - start
                self.account(
                    Timings(engine_s=lanes.core_s, waiting_s=lanes.waiting_s, wall_s=wall_s)
                )


def _runs(
    paths: Iterator[Path],
    pool: DecodePool,
    lanes: EngineLanes,
    engine: Engine,
    batch: int,
    kind: Kind,
) -> Iterator[_Run]:
    """Yield runs in order; wait for one only if there is nothing else to do."""
    info = engine.info
    images_per_run = max(1, batch // info.lanes)
    most_runs = 2 * info.lanes
    most_decoding = max(2 * batch, 4 * info.threads)
    decoding: deque[Future[Decoded]] = deque()
    runs: deque[_Run] = deque()
    next_index = 0
    while True:
        for path in itertools.islice(paths, most_decoding - len(decoding)):
            decoding.append(pool.submit(path))
        # `decoding` is empty only if `paths` is exhausted: unreadable files leave it at once.
        if decoding and len(runs) < most_runs:
            runs.append(_start_run(next_index, decoding, images_per_run, lanes, kind))
            next_index += len(runs[-1].decoded)
            if not runs[0].is_done():
                continue
        elif not runs:
            return
        yield runs.popleft()


def _start_run(
    first_index: int,
    decoding: deque[Future[Decoded]],
    images_per_run: int,
    lanes: EngineLanes,
    kind: Kind,
) -> _Run:
    """Wait until the next files are decoded, and submit their pixels to the engine."""
    decoded: list[Decoded] = []
    pixels: list[Images] = []
    tiles: list[Images] = []
    # Bad files do not count towards a batch, but their number is limited too.
    while decoding and len(pixels) < images_per_run and len(decoded) < 4 * images_per_run:
        file = decoding.popleft().result()
        decoded.append(file)
        if file.prepared is not None:
            pixels.append(file.prepared.pixels)
            tiles += [tile.pixels for tile in file.tiles]
    if not pixels:
        return _Run(first_index, decoded, None, lanes.grid)
    rows = lanes.submit(np.stack(pixels), kind, np.stack(tiles) if tiles else None)
    return _Run(first_index, decoded, rows, lanes.grid)


@dataclass(frozen=True)
class _Run:
    """Consecutive files, and the engine's run for those that could be decoded."""

    first_index: int
    decoded: list[Decoded]
    rows: Future[tuple[Embeddings, Embeddings | None]] | None
    grid: RegionGrid | None

    def is_done(self) -> bool:
        return self.rows is None or self.rows.done()

    def items(self) -> Iterator[Embedded | Failed | Known]:
        """Yield an item for each file once the engine is done; raise the engine's errors."""
        rows: Iterator[tuple[NDArray[np.float32], bool]] = iter(())
        regions: Iterator[tuple[NDArray[np.float32], NDArray[np.bool_]]] = iter(())
        if self.rows is not None:
            of_frames, of_tiles = self.rows.result()
            rows = zip(*validate_embeddings(of_frames), strict=True)
            if of_tiles is not None:
                regions = zip(*validate_embeddings(of_tiles), strict=True)
        for index, file in enumerate(self.decoded, start=self.first_index):
            if file.is_known and file.source is not None:
                yield Known(index, file.path, file.source)
                continue
            if file.prepared is None or file.source is None:
                yield Failed(index, file.path, file.reason, file.source)
                continue
            row, is_bad = next(rows)
            parts = [next(regions) for _ in file.tiles]
            if is_bad or any(is_wrong.any() for _, is_wrong in parts):
                yield Failed(index, file.path, BAD_ROW, file.source)
                continue
            embedded = Embedded(index, file.path, row, file.source, file.prepared.notices)
            if self.grid is not None:
                embedded = _with_regions(embedded, [part for part, _ in parts], file, self.grid)
            yield embedded


def _with_regions(
    embedded: Embedded, parts: list[Embeddings], file: Decoded, grid: RegionGrid
) -> Embedded:
    """Return the photo with the regions of its tiles, each `(R, D)`."""
    none = np.empty((0, len(embedded.row)), dtype=np.float32)
    boxes = [tile.boxes(grid) for tile in file.tiles]
    return replace(
        embedded,
        regions=np.concatenate([none, *parts]),
        boxes=np.concatenate([np.empty((0, 4), dtype=np.float32), *boxes]),
    )


def _cost(decoded: list[Decoded]) -> Timings:
    return Timings(
        files=len(decoded),
        read_s=sum(file.read_s for file in decoded),
        decode_s=sum(file.decode_s for file in decoded),
        preprocess_s=sum(file.preprocess_s for file in decoded),
    )


# Limits for the file contents and decoded images of all threads. Larger ones are read or decoded
# alone.
_FILES_BYTES = 64 << 20
_IMAGES_BYTES = 160 << 20


@dataclass(frozen=True)
class Source:
    """The state of a file that was read.

    Attributes:
        path: of the file.
        sha256: of the bytes that were decoded, as 64 hexadecimal digits.
        size_bytes: their number.
        mtime_ns: modification time of the file, in nanoseconds since 1970.
    """

    path: Path
    sha256: str
    size_bytes: int
    mtime_ns: int


@dataclass(frozen=True)
class Decoded:
    """A decoded file: prepared pixels, or the reason why there are none.

    Attributes:
        path: as given.
        source: `None` if the file could not be read.
        prepared: `None` if it failed, or was not decoded because its bytes are known.
        reason: empty unless it failed.
        is_known: whether its bytes are known, so that nothing was decoded.
        read_s: seconds of reading and hashing.
        decode_s: core-seconds of decoding.
        preprocess_s: core-seconds of resizing and other preparation.
        tiles: the parts of which regions are embedded.
    """

    path: Path
    source: Source | None
    prepared: Prepared | None
    reason: str
    read_s: float
    decode_s: float
    preprocess_s: float
    is_known: bool = False
    tiles: tuple[Tile, ...] = ()


#: Returns whether to skip a file, by the SHA-256 of its bytes. Called from any thread.
IsKnown = Callable[[str], bool]


class DecodePool:
    """Threads that decode files; Pillow releases the interpreter's lock.

    Args:
        kind: of the images.
        preprocessing: of the model.
        threads: number of files to decode at once.
        is_known: which files to read but not decode; by default none.
        grid: of the regions to prepare as well; by default none.
    """

    def __init__(
        self,
        kind: Kind,
        preprocessing: Preprocessing,
        threads: int,
        is_known: IsKnown | None = None,
        grid: RegionGrid | None = None,
    ) -> None:
        self._is_known = is_known
        self._grid = grid
        trim_malloc()
        self._kind: Kind = kind
        self._preprocessing = preprocessing
        self._files = MemoryBudget(_FILES_BYTES)
        self._images = MemoryBudget(_IMAGES_BYTES)
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="sbtk-decode")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._threads.shutdown(wait=True, cancel_futures=True)

    def submit(self, path: Path) -> Future[Decoded]:
        """Return the future of `path`; problems with the file are results, not exceptions."""
        return self._threads.submit(self._decode, path)

    def _decode(self, path: Path) -> Decoded:
        work = _Work(path, self._kind, self._preprocessing, self._grid)
        try:
            with self._files.reserve(_size_bytes(path)):
                data = work.read()
                if self._is_known is not None and self._is_known(work.sha256):
                    return work.done(is_known=True)
                try:
                    image = work.open(data)
                    with self._images.reserve(image.memory_bytes):
                        return work.prepare(image)
                except LargeImage as problem:
                    return work.prepare_in_subprocess(data, problem)
        except BadImage as problem:
            return work.done(reason=reason_of(problem))
        # No file may end the run, whatever it does to a decoder.
        except Exception as problem:
            return work.done(reason=" ".join(f"{type(problem).__name__}: {problem}".split()))


def reason_of(problem: BadImage) -> str:
    """Return in one line why a file was refused."""
    expected = f" (expected: {problem.expected})" if problem.expected else ""
    return " ".join(f"{problem.found}{expected}".split())


class _Work:
    """The steps for one file, and the time of each."""

    def __init__(
        self, path: Path, kind: Kind, preprocessing: Preprocessing, grid: RegionGrid | None
    ) -> None:
        self._path = path
        self._preprocessing = preprocessing
        self._grid = grid
        self._tiles: tuple[Tile, ...] = ()
        self._kind: Kind = kind
        self._source: Source | None = None
        self._read_s = self._decode_s = self._preprocess_s = 0.0

    @property
    def sha256(self) -> str:
        """The SHA-256 of the bytes that were read."""
        assert self._source is not None
        return self._source.sha256

    def read(self) -> bytes:
        start = time.perf_counter()
        try:
            file = images.read_image_file(self._path)
            digest = hashlib.sha256(file.data).hexdigest()
        finally:
            self._read_s = time.perf_counter() - start
        self._source = Source(self._path, digest, file.size_bytes, file.mtime_ns)
        return file.data

    def open(self, data: bytes) -> images.OpenImage:
        start = time.thread_time()
        try:
            return open_image(data, self._kind, input_side(self._grid))
        finally:
            self._decode_s = time.thread_time() - start

    def prepare(self, image: images.OpenImage) -> Decoded:
        start = time.thread_time()
        try:
            decoded = image.decode()
        finally:
            self._decode_s += time.thread_time() - start
        start = time.thread_time()
        try:
            prepared = self._preprocessing.prepare_image(
                decoded.image, self._kind, notices=decoded.notices
            )
            if self._grid is not None:
                self._tiles = cut_tiles(decoded.image, self._grid.size_px)
        finally:
            self._preprocess_s = time.thread_time() - start
        return self.done(prepared)

    def prepare_in_subprocess(self, data: bytes, problem: LargeImage) -> Decoded:
        # The other process uses one core, so wall time is an upper bound.
        start = time.perf_counter()
        try:
            prepared = self._preprocessing.prepare_in_subprocess(data, problem, self._kind)
            if self._grid is not None:
                self._tiles = cut_tiles_apart(data, problem, self._grid.size_px)
        finally:
            self._decode_s += time.perf_counter() - start
        return self.done(prepared)

    def done(
        self, prepared: Prepared | None = None, *, reason: str = "", is_known: bool = False
    ) -> Decoded:
        return Decoded(
            self._path,
            self._source,
            prepared,
            reason,
            self._read_s,
            self._decode_s,
            self._preprocess_s,
            is_known,
            self._tiles,
        )


def _size_bytes(path: Path) -> int:
    try:
        return min(path.stat().st_size, images.MAX_FILE_BYTES)
    except (OSError, ValueError):
        return 0


class MemoryBudget:
    """Limits the memory that threads reserve together; larger reservations are made alone.

    Args:
        limit_bytes: the most that may be reserved at once.
    """

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._taken_bytes = 0
        self._takers = 0
        self._freed = threading.Condition()

    @contextlib.contextmanager
    def reserve(self, size_bytes: int) -> Iterator[None]:
        """Reserve memory for the block; wait until it fits, or nothing else is reserved."""
        with self._freed:
            self._freed.wait_for(lambda: self._fits(size_bytes))
            self._taken_bytes += size_bytes
            self._takers += 1
        try:
            yield
        finally:
            with self._freed:
                self._taken_bytes -= size_bytes
                self._takers -= 1
                self._freed.notify_all()

    def _fits(self, size_bytes: int) -> bool:
        return self._takers == 0 or self._taken_bytes + size_bytes <= self._limit_bytes


class EngineLanes:
    """A thread for each lane of the engine, which runs one batch after another.

    Attributes:
        core_s: core-seconds of runs. If a lane has several threads, or the library has its own,
            all of them count for the duration of the run.
        waiting_s: seconds in which all lanes were idle.
        grid: of the regions that are embedded; `None` without.
    """

    def __init__(self, engine: Engine, regions: Engine | None = None) -> None:
        self._engine = engine
        self._regions = regions
        self.grid = None if regions is None else regions.info.regions
        self._threads = ThreadPoolExecutor(engine.info.lanes, thread_name_prefix="sbtk-engine")
        self._lock = threading.Lock()
        self._running = 0
        self._idle_since = time.perf_counter()
        self.core_s = self.waiting_s = 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._threads.shutdown(wait=True, cancel_futures=True)

    def submit(
        self, images: Images, kind: Kind, tiles: Images | None = None
    ) -> Future[tuple[Embeddings, Embeddings | None]]:
        """Return the future embeddings of images, and of the regions of tiles if there are any.

        Args:
            images: `(N, 224, 224, 3) uint8`; their embeddings are `(N, D) float32`.
            kind: of the images and tiles.
            tiles: `(T, S, S, 3) uint8`; their embeddings are `(T, R, D) float32`.
        """
        return self._threads.submit(self._run, images, kind, tiles)

    def _run(
        self, images: Images, kind: Kind, tiles: Images | None
    ) -> tuple[Embeddings, Embeddings | None]:
        start, start_core = time.perf_counter(), time.thread_time()
        with self._lock:
            if self._running == 0:
                self.waiting_s += start - self._idle_since
            self._running += 1
        try:
            rows = self._engine.run(images, kind)
            if tiles is None or self._regions is None:
                return rows, None
            return rows, self._regions.run(tiles, kind)
        finally:
            end, end_core = time.perf_counter(), time.thread_time()
            info = self._engine.info
            threads = info.threads // info.lanes
            with self._lock:
                self._running -= 1
                self._idle_since = end
                # Otherwise the library's threads do the work, whose CPU time is unknown.
                is_counted = threads == 1 and info.is_in_calling_thread
                self.core_s += end_core - start_core if is_counted else threads * (end - start)
