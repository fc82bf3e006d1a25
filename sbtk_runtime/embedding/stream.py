"""A stream of files becomes a stream of embeddings, in the same order, in little memory.

    paths -> decode pool -> runs of the engine -> items

Each arrow is a bounded queue of futures. The decoders are some batches ahead of the engine, and
the engine has two runs for each of its lanes, so that neither waits for the other or for the
caller as long as there is work.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import itertools
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import astuple, dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
from numpy.typing import NDArray

from sbtk_runtime import images, preprocess
from sbtk_runtime.engines.registry import Embeddings, Engine, Images, validate_embeddings
from sbtk_runtime.errors import BadImage, LargeImage
from sbtk_runtime.preprocess import Kind, Prepared

BAD_ROW = "the model gave no usable embedding: not finite, or not of length 1"


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
class Known:
    """A file whose bytes are known, so that it was neither decoded nor embedded.

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

    def __add__(self, other: Timings) -> Timings:
        return Timings(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))


def embed_stream(
    paths: Iterator[Path],
    kind: Kind,
    engine: Engine,
    batch: int,
    account: Callable[[Timings], None],
    is_known: IsKnown | None = None,
) -> Iterator[Embedded | Failed | Known]:
    """Yields what became of each file, in the order of `paths`.

    Args:
        paths: drawn from in the calling thread, some batches ahead.
        kind: what the files hold.
        engine: shared by all of its lanes.
        batch: images that all lanes together work on at once.
        account: told, now and then, what was spent since it was last told.
        is_known: says which files need not be decoded, by the SHA-256 of their bytes.

    Raises:
        EngineUnavailable: the engine failed as a whole. The threads have ended when it is raised,
            as they have when the iterator is closed.
    """
    start = time.perf_counter()
    with DecodePool(kind, engine.info.threads, is_known) as pool, EngineLanes(engine) as lanes:
        try:
            for run in _runs(paths, pool, lanes, engine, batch, kind):
                account(_cost(run.decoded))
                yield from run.items()
        finally:
            wall_s = time.perf_counter() - start
            account(Timings(engine_s=lanes.core_s, waiting_s=lanes.waiting_s, wall_s=wall_s))


def _runs(
    paths: Iterator[Path],
    pool: DecodePool,
    lanes: EngineLanes,
    engine: Engine,
    batch: int,
    kind: Kind,
) -> Iterator[_Run]:
    """Yields runs in order, each when it is done or nothing better is left than to wait for it."""
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
        # Nothing is being decoded here only if `paths` is exhausted: files that cannot be read
        # leave the window as quickly as they come.
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
    """Takes the next files, waiting for their decoders, and hands their pixels to the engine."""
    decoded: list[Decoded] = []
    pixels: list[Images] = []
    # Bad files do not fill a batch, but they must not pile up either.
    while decoding and len(pixels) < images_per_run and len(decoded) < 4 * images_per_run:
        file = decoding.popleft().result()
        decoded.append(file)
        if file.prepared is not None:
            pixels.append(file.prepared.pixels)
    return _Run(first_index, decoded, lanes.submit(np.stack(pixels), kind) if pixels else None)


@dataclass(frozen=True)
class _Run:
    """Consecutive files, of which those that could be decoded are with the engine."""

    first_index: int
    decoded: list[Decoded]
    rows: Future[Embeddings] | None

    def is_done(self) -> bool:
        return self.rows is None or self.rows.done()

    def items(self) -> Iterator[Embedded | Failed | Known]:
        """Yields one item for each file, once the engine is done; raises what the engine raised."""
        rows: Iterator[tuple[NDArray[np.float32], bool]] = iter(())
        if self.rows is not None:
            rows = zip(*validate_embeddings(self.rows.result()), strict=True)
        for index, file in enumerate(self.decoded, start=self.first_index):
            if file.is_known and file.source is not None:
                yield Known(index, file.path, file.source)
                continue
            if file.prepared is None or file.source is None:
                yield Failed(index, file.path, file.reason, file.source)
                continue
            row, is_bad = next(rows)
            if is_bad:
                yield Failed(index, file.path, BAD_ROW, file.source)
            else:
                yield Embedded(index, file.path, row, file.source, file.prepared.notices)


def _cost(decoded: list[Decoded]) -> Timings:
    return Timings(
        files=len(decoded),
        read_s=sum(file.read_s for file in decoded),
        decode_s=sum(file.decode_s for file in decoded),
        preprocess_s=sum(file.preprocess_s for file in decoded),
    )


# What all threads together hold of file contents, and of images being decoded. A single larger
# one is read or decoded while the others wait.
_FILES_BYTES = 64 << 20
_PICTURES_BYTES = 160 << 20


@dataclass(frozen=True)
class Source:
    """The state of a file that was read.

    Attributes:
        sha256: of exactly the bytes that were decoded, as 64 hexadecimal digits.
        size_bytes: their number.
        mtime_ns: the file's modification time, nanoseconds since 1970.
    """

    path: Path
    sha256: str
    size_bytes: int
    mtime_ns: int


@dataclass(frozen=True)
class Decoded:
    """What became of one file: prepared pixels, or the reason why there are none.

    Attributes:
        source: `None` if the file could not even be read.
        prepared: `None` if it failed, or was not decoded because its bytes are known.
        reason: empty unless it failed.
        is_known: whether its bytes are known, so that nothing was decoded.
        read_s: seconds of reading and hashing.
        decode_s: seconds of a core's work for decoding.
        preprocess_s: seconds of a core's work for resizing and the like.
    """

    path: Path
    source: Source | None
    prepared: Prepared | None
    reason: str
    read_s: float
    decode_s: float
    preprocess_s: float
    is_known: bool = False


#: Says, of the SHA-256 of a file's bytes, whether they need not be decoded. Called on any thread.
IsKnown = Callable[[str], bool]


class DecodePool:
    """Threads that decode files; Pillow works outside the interpreter's lock.

    Args:
        kind: what the files hold.
        threads: how many files are worked on at once.
        is_known: which files are read, but not decoded; by default none.
    """

    def __init__(self, kind: Kind, threads: int, is_known: IsKnown | None = None) -> None:
        self._is_known = is_known
        trim_malloc()
        self._kind: Kind = kind
        self._files = MemoryBudget(_FILES_BYTES)
        self._pictures = MemoryBudget(_PICTURES_BYTES)
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="sbtk-decode")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._threads.shutdown(wait=True, cancel_futures=True)

    def submit(self, path: Path) -> Future[Decoded]:
        """Returns the future of `path`; it never holds an exception that is the file's fault."""
        return self._threads.submit(self._decode, path)

    def _decode(self, path: Path) -> Decoded:
        work = _Work(path, self._kind)
        try:
            with self._files.reserve(_size_bytes(path)):
                data = work.read()
                if self._is_known is not None and self._is_known(work.sha256):
                    return work.known()
                try:
                    image = work.open(data)
                    with self._pictures.reserve(image.memory_bytes):
                        return work.prepare(image)
                except LargeImage as problem:
                    return work.prepare_apart(data, problem)
        except BadImage as problem:
            return work.failed(reason_of(problem))
        # Whatever one file does to a decoder, it must not end the run.
        except Exception as problem:
            return work.failed(" ".join(f"{type(problem).__name__}: {problem}".split()))


def reason_of(problem: BadImage) -> str:
    """Returns on one line why a file was refused."""
    expected = f" (expected: {problem.expected})" if problem.expected else ""
    return " ".join(f"{problem.found}{expected}".split())


class _Work:
    """One file on its way, with what each step took."""

    def __init__(self, path: Path, kind: Kind) -> None:
        self._path = path
        self._kind: Kind = kind
        self._source: Source | None = None
        self._read_s = self._decode_s = self._preprocess_s = 0.0

    @property
    def sha256(self) -> str:
        """Of the bytes that were read."""
        assert self._source is not None
        return self._source.sha256

    def known(self) -> Decoded:
        return self._done(None, "", is_known=True)

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
            return preprocess.opened(data, self._kind)
        finally:
            self._decode_s = time.thread_time() - start

    def prepare(self, image: images.OpenImage) -> Decoded:
        start = time.thread_time()
        try:
            picture = image.decode()
        finally:
            self._decode_s += time.thread_time() - start
        start = time.thread_time()
        try:
            prepared = preprocess.prepared_from(picture.image, self._kind, notices=picture.notices)
        finally:
            self._preprocess_s = time.thread_time() - start
        return self._done(prepared, "")

    def prepare_apart(self, data: bytes, problem: LargeImage) -> Decoded:
        # The other process works on one core, so what it takes is what passes, or less.
        start = time.perf_counter()
        try:
            prepared = preprocess.prepared_apart(data, problem, self._kind)
        finally:
            self._decode_s += time.perf_counter() - start
        return self._done(prepared, "")

    def failed(self, reason: str) -> Decoded:
        return self._done(None, reason)

    def _done(self, prepared: Prepared | None, reason: str, *, is_known: bool = False) -> Decoded:
        return Decoded(
            self._path,
            self._source,
            prepared,
            reason,
            self._read_s,
            self._decode_s,
            self._preprocess_s,
            is_known,
        )


def _size_bytes(path: Path) -> int:
    try:
        return min(Path(path).stat().st_size, images.MAX_FILE_BYTES)
    except (OSError, ValueError):
        return 0


_M_MMAP_THRESHOLD = -3
_LARGE_BYTES = 2 << 20


@functools.cache
def trim_malloc() -> None:
    """Makes the C library return large blocks to the system as soon as they are freed.

    glibc otherwise raises its own threshold to the largest block that it has seen, and each
    thread keeps as much as the largest picture that it ever decoded: eight threads on pictures of
    25 megapixels were seen to hold 1.3 GB, of which 0.3 were in use. Other C libraries are left
    as they are.
    """
    try:
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, _LARGE_BYTES)
    except (AttributeError, OSError, TypeError):
        return


class MemoryBudget:
    """Lets threads take memory up to a limit together; what exceeds it alone must be alone.

    Args:
        limit_bytes: the sum that may be taken at once.
    """

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._taken_bytes = 0
        self._takers = 0
        self._freed = threading.Condition()

    @contextlib.contextmanager
    def reserve(self, size_bytes: int) -> Iterator[None]:
        """Waits until `size_bytes` fit, or nobody else has taken any, and holds them."""
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
    """As many threads as the engine has lanes; each runs one batch after the other.

    Attributes:
        busy_s: seconds that runs took, summed over lanes.
        core_s: seconds of work that they cost the cores. Where a lane has several threads, or a
            library threads of its own, all of them count for as long as the run takes.
        waiting_s: seconds in which no lane had anything to do.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._threads = ThreadPoolExecutor(engine.info.lanes, thread_name_prefix="sbtk-engine")
        self._lock = threading.Lock()
        self._running = 0
        self._idle_since = time.perf_counter()
        self.busy_s = self.core_s = self.waiting_s = 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._threads.shutdown(wait=True, cancel_futures=True)

    def submit(self, images: Images, kind: Kind) -> Future[Embeddings]:
        """Returns the future of the embeddings `(N, D)` of `images (N, 224, 224, 3) uint8`."""
        return self._threads.submit(self._run, images, kind)

    def _run(self, images: Images, kind: Kind) -> Embeddings:
        start, start_core = time.perf_counter(), time.thread_time()
        with self._lock:
            if self._running == 0:
                self.waiting_s += start - self._idle_since
            self._running += 1
        try:
            return self._engine.run(images, kind)
        finally:
            end, end_core = time.perf_counter(), time.thread_time()
            info = self._engine.info
            threads = info.threads // info.lanes
            with self._lock:
                self._running -= 1
                self._idle_since = end
                self.busy_s += end - start
                # Elsewhere a library's own threads do the work, and their clocks are not ours.
                is_counted = threads == 1 and info.is_in_calling_thread
                self.core_s += end_core - start_core if is_counted else threads * (end - start)
