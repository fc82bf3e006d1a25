"""A stream of files becomes a stream of embeddings, in the same order, in little memory.

    paths -> decode pool -> runs of the engine -> items

Each arrow is a bounded queue of futures. The decoders are some batches ahead of the engine, and
the engine has two runs for each of its lanes, so that neither waits for the other or for the
caller as long as there is work.
"""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import astuple, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sbtk_runtime.embedding.decode_pool import Decoded, DecodePool, IsKnown, Source
from sbtk_runtime.engines.engine import Embeddings, Engine, Images, checked_rows
from sbtk_runtime.engines.engine_lanes import EngineLanes
from sbtk_runtime.preprocess import Kind

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
            rows = zip(*checked_rows(self.rows.result()), strict=True)
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
