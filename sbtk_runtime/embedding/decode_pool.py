"""Image files to the student's pixels, on threads that work ahead of the engine."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from sbtk_runtime import images, preprocess
from sbtk_runtime.embedding.memory_budget import MemoryBudget, give_back_what_is_freed
from sbtk_runtime.errors import BadImage, LargeImage
from sbtk_runtime.preprocess import Kind, Prepared

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
        give_back_what_is_freed()
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
            with self._files.taking(_size_bytes(path)):
                data = work.read()
                if self._is_known is not None and self._is_known(work.sha256):
                    return work.known()
                try:
                    image = work.open(data)
                    with self._pictures.taking(image.memory_bytes):
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
