"""The HNSW graph over a gallery's rows: a cache that can be rebuilt from the vectors.

hnswlib neither validates its files nor reports failed writes, so it is checked from outside:
SHA-256 and header before a file is loaded, size and content after one is written. Labels are the
row numbers of the vectors; deleted rows are marked in the file.

hnswlib is optional, since it must be built from source. Without it there is no graph, and
galleries are searched by sign codes.
"""

from __future__ import annotations

import contextlib
import errno
import hmac
import os
import struct
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from sbtk_runtime.errors import BadGallery, MissingExtra
from sbtk_runtime.files import atomic_path, read_refused, sha256_of_file
from sbtk_runtime.gallery.rows import Embeddings, Rows, Vectors
from sbtk_runtime.machine import cpu_threads
from sbtk_runtime.manifest import GraphRecord

Scores = NDArray[np.float32]

M = 16
EF_CONSTRUCTION = 200
EF = 128

#: From this number of photos on, searches by graph are so much faster than by sign codes that a
#: graph is worth hours of building, and 2 kB of memory for each photo.
GRAPH_FROM = 2_000_000

_SEED = 100
_PROBE_BYTES = 1 << 20
#: The command that installs hnswlib.
INSTALL_HNSWLIB = 'pip install "sbtk[hnsw]"'

# offset of level 0, capacity, count, bytes per row, offset of the label, offset of the vector,
# highest level, entry point, links per row, links per row on level 0, M, 1 / ln M, ef_construction
_HEADER = struct.Struct("=6QiI3QdQ")


def has_hnswlib() -> bool:
    """Return whether graphs can be built and searched here."""
    try:
        import_hnswlib()
    except MissingExtra:
        return False
    return True


def import_hnswlib() -> Any:
    """Return the module hnswlib.

    Raises:
        MissingExtra: it is not installed, or cannot be loaded.
    """
    try:
        import hnswlib
    except ImportError as problem:
        raise MissingExtra(
            f"HNSW graphs need hnswlib, which cannot be imported ({problem})",
            "the extra 'hnsw'; everything else works without it",
            INSTALL_HNSWLIB,
        ) from problem
    return hnswlib


class Graph:
    """An hnswlib graph of unit rows, scored by cosine."""

    def __init__(self, index: Any, m: int, ef_construction: int, ef: int) -> None:
        self._index = index
        self.m = m
        self.ef_construction = ef_construction
        self._widening = threading.Lock()
        self.set_ef(ef)

    @classmethod
    def new(cls, dim: int, capacity: int) -> Self:
        """Return an empty graph that takes up to `capacity` rows.

        Raises:
            MemoryError: there is not enough memory.
            MissingExtra: hnswlib is not installed.
        """
        index = import_hnswlib().Index("ip", dim)
        with _memory_errors():
            index.init_index(
                max(1, capacity), M=M, ef_construction=EF_CONSTRUCTION, random_seed=_SEED
            )
        return cls(index, M, EF_CONSTRUCTION, EF)

    @classmethod
    def load(cls, folder: Path, record: GraphRecord, dim: int, *, room_for: int = 0) -> Self:
        """Return the graph that `record` describes, with room for more rows.

        Raises:
            BadGallery: the file is missing, unreadable, or not the one that was written.
            MemoryError: there is not enough memory.
            MissingExtra: hnswlib is not installed.
        """
        path = folder / record.file
        hnswlib = import_hnswlib()
        check_graph_file(path, record, dim)
        index = hnswlib.Index("ip", dim)
        try:
            with _memory_errors():
                index.load_index(str(path), max_elements=record.count + room_for)
        except RuntimeError as problem:
            raise BadGallery(f"{path} cannot be loaded: {problem}") from problem
        return cls(index, record.m, record.ef_construction, record.ef)

    @property
    def count(self) -> int:
        """The number of rows in the graph, deleted ones included."""
        return int(self._index.get_current_count())

    def set_ef(self, ef: int) -> None:
        """Set the size of the candidate list; larger ones find more and take longer."""
        with self._widening:
            self.ef = ef
            self._index.set_ef(ef)

    def add(self, rows: Rows, embeddings: Embeddings, threads: int | None = None) -> None:
        """Add unit rows `(N, D) float32`; with more than one thread their order varies."""
        if len(rows):
            self._index.add_items(embeddings, rows, num_threads=threads or cpu_threads())

    def drop(self, rows: Iterable[int]) -> None:
        """Delete rows from the results; ignore rows that the graph does not have."""
        for row in rows:
            try:
                self._index.mark_deleted(row)
            except RuntimeError:
                continue

    def search(self, query: Embeddings, k: int) -> tuple[Rows, Scores]:
        """Return rows and cosines of at most `k` hits, best first.

        Thread-safe as long as no rows are added or dropped. `query` is `(D,) float32`, of length 1.
        """
        if k <= self.ef:
            return self._nearest(query, k)
        with self._widening:
            self._index.set_ef(k)
            try:
                return self._nearest(query, k)
            finally:
                self._index.set_ef(self.ef)

    def save(self, path: Path, expected: tuple[Rows, Embeddings]) -> GraphRecord:
        """Move the graph into a file, durably, and return its record; it cannot be used afterwards.

        The file is reopened before it gets its name, and after the memory has been freed, so that
        there is never more than one copy in memory.

        Args:
            path: the file's final name.
            expected: rows `(n,) int64` and their unit embeddings `(n, D) float32`, to compare with
                those in the reopened file.

        Raises:
            DiskFull: there is not enough space for the file.
            BadGallery: the reopened file has other content.
        """
        count, dim = self.count, int(self._index.dim)
        with atomic_path(path) as temporary:
            size_bytes = int(self._index.index_file_size())
            self._index.save_index(str(temporary))
            if not temporary.exists() or temporary.stat().st_size != size_bytes:
                raise _why_short(temporary, size_bytes)
            del self._index
            record = GraphRecord(
                path.name, sha256_of_file(temporary), count, self.m, self.ef_construction, self.ef
            )
            _check_content(temporary, record, dim, expected)
        return record

    def _nearest(self, query: Embeddings, k: int) -> tuple[Rows, Scores]:
        while k > 0:
            try:
                rows, distances = self._index.knn_query(query, k=k, num_threads=1)
            except RuntimeError:  # hnswlib found fewer than k
                k //= 2
                continue
            return rows[0].astype(np.int64), np.asarray(1.0 - distances[0], dtype=np.float32)
        return np.empty(0, dtype=np.int64), np.empty(0, dtype=np.float32)


def build_graph(vectors: Vectors, rows: Rows) -> Graph:
    """Return a graph of the ascending `rows`, read and added in chunks; damaged ones are left out.

    Args:
        vectors: the gallery's vectors.
        rows: `(N,) int64`, numbers of the rows to add.
    """
    graph = Graph.new(vectors.dim, len(rows))
    add_rows(graph, vectors, rows)
    return graph


def add_rows(graph: Graph, vectors: Vectors, rows: Iterable[int]) -> None:
    """Add ascending `rows` of the vectors to a graph that has room for them."""
    for numbers, embeddings, is_whole in vectors.chunks(rows):
        if not is_whole.all():
            numbers, embeddings = numbers[is_whole], embeddings[is_whole]
        graph.add(numbers, embeddings)


def check_graph_file(path: Path, record: GraphRecord, dim: int) -> None:
    """Check that hnswlib can load a file safely.

    Raises:
        BadGallery: it is missing, its SHA-256 is not the recorded one, or its header is not that
            of a graph of `record.count` rows of `dim` numbers.
    """
    try:
        if path.is_symlink() or not path.is_file():
            raise BadGallery(f"{path} is missing", "the graph that the manifest names")
        sha256 = sha256_of_file(path)
    except OSError as problem:
        raise BadGallery(*read_refused(path, problem)) from problem
    if not hmac.compare_digest(sha256, record.sha256):
        raise BadGallery(f"{path} has SHA-256 {sha256}", f"{record.sha256}: it is damaged")
    with path.open("rb") as file:
        header = file.read(_HEADER.size)
    if len(header) < _HEADER.size or not _is_expected(_HEADER.unpack(header), record, dim):
        raise BadGallery(
            f"{path} is not a graph of {record.count:,} rows of {dim} numbers",
            "the graph that the manifest describes",
        )


@contextlib.contextmanager
def _memory_errors() -> Iterator[None]:
    """Translate hnswlib's `RuntimeError` on lack of memory into a `MemoryError`."""
    try:
        yield
    except RuntimeError as problem:
        if "memory" in str(problem).lower():
            raise MemoryError(str(problem)) from problem
        raise


def _why_short(path: Path, size_bytes: int) -> OSError:
    """Return why a file is too short: hnswlib does not report it, so write the rest again."""
    try:
        with path.open("ab") as file:
            file.truncate(min(file.tell(), size_bytes))
            for _ in range(file.tell(), size_bytes, _PROBE_BYTES):
                file.write(bytes(_PROBE_BYTES))
            file.flush()
            os.fsync(file.fileno())
    except OSError as problem:
        return OSError(problem.errno, problem.strerror, str(path))
    return OSError(errno.EIO, os.strerror(errno.EIO), str(path))


def _is_expected(header: tuple[Any, ...], record: GraphRecord, dim: int) -> bool:
    offset_0, capacity, count, row_bytes, label_at, vector_at, _, entry, *links, _, _ = header
    links_bytes = 4 + 4 * 2 * record.m
    return (
        count == record.count
        and capacity >= count
        and entry < max(1, count)
        and links == [record.m, 2 * record.m, record.m]
        and (offset_0, vector_at, label_at) == (0, links_bytes, links_bytes + 4 * dim)
        and row_bytes == links_bytes + 4 * dim + 8
    )


def _check_content(
    path: Path, record: GraphRecord, dim: int, expected: tuple[Rows, Embeddings]
) -> None:
    index = import_hnswlib().Index("ip", dim)
    with _memory_errors():
        index.load_index(str(path))
    rows, embeddings = expected
    try:
        held = np.asarray(index.get_items(rows), dtype=np.float32).reshape(-1, dim)
        is_same = index.get_current_count() == record.count and np.allclose(
            held, embeddings, atol=1e-6
        )
        index.set_ef(record.ef)
        index.knn_query(embeddings[:1], k=1, num_threads=1)
    except RuntimeError as problem:
        raise BadGallery(f"the graph just written to {path} cannot be used: {problem}") from problem
    if not is_same:
        raise BadGallery(f"{path} does not hold what was written", "a file system that keeps files")
