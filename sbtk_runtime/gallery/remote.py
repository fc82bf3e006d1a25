"""Collections of photos in a database: what they hold, and what the database must do.

sbtk writes to the database and searches there; it does not divide or replicate anything itself.
One collection holds the photos of one model. A photo is identified by a hash of its source and its
path relative to it, so that machines with other mount points agree, and pushing again changes
nothing.
"""

from __future__ import annotations

import hashlib
import random
import re
import time
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from sbtk_runtime.binary_codes import Codes, Itq
from sbtk_runtime.errors import ModelMismatch, SbtkError
from sbtk_runtime.gallery.photo_filter import EVER, Period, below
from sbtk_runtime.gallery.queries import Box
from sbtk_runtime.gallery.remote_address import Address
from sbtk_runtime.gallery.rows import Embeddings
from sbtk_runtime.manifest import PhotoShard, path_hash
from sbtk_runtime.regions import Boxes

#: Collections and folders of at most so many photos are searched exactly.
EXACT_BELOW = 20_000
#: The most folders of a push whose numbers of photos are stored.
MOST_FOLDERS = 1_000
#: Where counting photos ends.
MOST_COUNTED = 1_000_000
#: All photos of a source, as one shard.
WHOLE = PhotoShard(1, 1)

_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.25, 8.0

Result = TypeVar("Result")
Notify = Callable[[str], None]


class RemoteError(SbtkError):
    """A database refuses a request, or lacks what sbtk needs."""


class RemoteUnavailable(RemoteError):
    """The database does not respond, but may do so later."""


@dataclass(frozen=True)
class CollectionInfo:
    """What the photos of a collection have in common.

    `itq` makes codes of embeddings where the collection is binary, with `bits` bits a code.
    `regions` is how many are kept of a photo; `None` if whole frames only.
    """

    model_id: str
    preprocessing: str
    precision: str
    dim: int
    bits: int | None = None
    itq: Itq | None = None
    regions: int | None = None

    @property
    def description(self) -> str:
        """The model, the preprocessing and what is kept of a photo, in words."""
        kept = f"{self.dim} numbers" if self.bits is None else f"{self.bits} bits"
        kept += " and no regions" if self.regions is None else f" and {self.regions} regions"
        return f"{self.model_id}, preprocessing {self.preprocessing}, {kept} a photo"


@dataclass(frozen=True)
class Part:
    """What the last push of a source, or of a shard of it, left in a collection.

    Attributes:
        source: the source's name.
        shard: `WHOLE` or a shard of it.
        photos: their number.
        folders: the photos directly in each folder, by its path below the source; the fullest
            `MOST_FOLDERS`.
        regions: the number of their regions.
        region_mean: the mean `(D,) float32` of the gallery's regions, if it keeps any.
        has_dates: whether the photos have the dates that their files had when they were indexed.
    """

    source: str
    shard: PhotoShard
    photos: int
    folders: dict[str, int]
    regions: int = 0
    region_mean: Embeddings | None = None
    has_dates: bool = False


@dataclass(frozen=True)
class RemoteState:
    """A collection as it is now; `generation` grows with each push that ended."""

    info: CollectionInfo
    generation: int
    parts: tuple[Part, ...]

    @property
    def count(self) -> int:
        """The number of photos."""
        return sum(part.photos for part in self.parts)

    @property
    def regions(self) -> int:
        """The number of regions."""
        return sum(part.regions for part in self.parts)

    def region_mean(self) -> Embeddings:
        """Return the mean `(D,) float32` of all regions."""
        total = np.zeros(self.info.dim)
        for part in self.parts:
            if part.region_mean is not None:
                total += part.regions * part.region_mean
        return np.asarray(total / max(self.regions, 1), dtype=np.float32)


@dataclass(frozen=True)
class RemotePhoto:
    """A photo of a collection.

    `path` is relative to the source and escaped by `escape_path`. `taken` is when the photo was
    taken, in ISO 8601 without a zone, if its file says so, and `lacks_regions` whether the gallery
    lacks some of its regions; only writers need these. The rest is as in `Photo`.
    """

    id: int
    source: str
    path: str
    size_bytes: int
    mtime_ns: int
    sha256: str
    partial: str | None = None
    taken: str | None = None
    lacks_regions: bool = False

    @property
    def stamp(self) -> int:
        """A number of 63 bits that differs if anything else differs."""
        values = (self.path, self.size_bytes, self.mtime_ns, self.sha256, self.partial)
        # Collections that are older than the dates have the same stamps of photos without one.
        stamp = path_hash(repr(values if self.taken is None else (*values, self.taken)).encode())
        return stamp ^ self.lacks_regions


@dataclass(frozen=True)
class RemoteRegions:
    """The regions of a photo.

    Attributes:
        boxes: `(R, 4) float32`: x, y, width and height, 0 to 1 of the upright photo.
        rows: `(R, D)` numbers, their embeddings.
    """

    boxes: Boxes
    rows: NDArray[np.generic]


@dataclass(frozen=True)
class Place:
    """A folder of a source; `folder` is a path relative to it, empty for all of it."""

    source: str
    folder: bytes = b""

    def interval(self) -> tuple[str, str] | None:
        """Return the lowest escaped path below the folder, and the first above; `None` for all."""
        if not self.folder:
            return None
        low, high = below(self.folder)
        return escape_path(low), escape_path(high)


@dataclass(frozen=True)
class RemoteFilter:
    """Which photos of a collection a query may find; by default all.

    Attributes:
        places: they are in one of these; none for all photos.
        period: as in `PhotoFilter`.
    """

    places: tuple[Place, ...] = ()
    period: Period = EVER

    def __bool__(self) -> bool:
        """Return whether it leaves out any photos."""
        return bool(self.places) or self.period != EVER


#: Accepts every photo.
EVERY_PHOTO = RemoteFilter()

#: An embedding `(D,) float32` of length 1, a code `(bits / 8,) uint8`, or the id of a photo.
RemoteQuery = Embeddings | Codes | int


class RemoteReader(Protocol):
    """What answers queries. Thread-safe."""

    def state(self) -> RemoteState:
        """Return the collection as it is now."""

    def search(
        self, query: RemoteQuery, count: int, among: RemoteFilter, *, exact: bool
    ) -> list[tuple[RemotePhoto, float]]:
        """Return the `count` photos nearest to a query with their scores, best first."""

    def search_regions(
        self, query: Embeddings, count: int, among: RemoteFilter, *, exact: bool
    ) -> list[tuple[RemotePhoto, float, Box]]:
        """Return the `count` photos with the best regions, best first, each with its best one.

        Scores are products with `query (D,) float32`, which need not have length 1. Without `exact`
        fewer may be returned than there are.
        """

    def regions(self, photo_id: int) -> RemoteRegions:
        """Return the regions of a photo of a collection that keeps them."""

    def photos(
        self,
        *,
        ids: Sequence[int] = (),
        sha256s: Sequence[str] = (),
        among: RemoteFilter = EVERY_PHOTO,
        limit: int | None = None,
        offset: int = 0,
    ) -> list[RemotePhoto]:
        """Return photos by id or content, in order of ids; without both, newest first."""

    def count(self, among: RemoteFilter, *, undated: bool = False) -> int:
        """Return the number of photos, or of those without a date, up to `MOST_COUNTED`."""

    def embeddings(self, ids: Sequence[int]) -> dict[int, Embeddings]:
        """Return the embeddings `(D,) float32` of photos that are there, by id."""

    def close(self) -> None:
        """Close all connections."""


class RemoteWriter(Protocol):
    """What a push of one source, or of a shard of it, changes; one at a time."""

    def stamps(self) -> Iterator[tuple[int, int]]:
        """Yield the id and the stamp of each photo of the source, or of the shard."""

    def put(
        self,
        photos: Sequence[RemotePhoto],
        rows: NDArray[np.generic],
        regions: Sequence[RemoteRegions] = (),
    ) -> int:
        """Insert or replace photos; return how many, without those whose id is another's.

        Args:
            photos: N photos.
            rows: `(N, D) float16` embeddings, or `(N, bits / 8) uint8` codes.
            regions: N, or none where the collection keeps whole frames only.
        """

    def delete(self, ids: Sequence[int]) -> None:
        """Delete photos; those that are not there are passed."""


class RemoteStore(Protocol):
    """A collection in a database."""

    @property
    def address(self) -> Address:
        """Where it is."""

    def reader(self) -> RemoteReader:
        """Return what answers queries.

        Raises:
            RemoteError: there is no such collection, or the database refuses.
        """

    def writing(
        self, info: CollectionInfo, source: str, shard: PhotoShard, notify: Notify
    ) -> AbstractContextManager[RemoteWriter]:
        """Make the collection if needed, and keep other pushes of the same photos out.

        Raises:
            ModelMismatch: the collection is of another model; nothing is changed.
            RemoteError: another push of these photos runs, or the database refuses.
        """

    def publish(self, part: Part, notify: Notify) -> None:
        """Record what a push has left, and build the index where one is due."""

    def forget(self, source: str, notify: Notify) -> None:
        """Record that nothing is left of a source; the caller has deleted its photos."""


def open_store(url: str, *, patience_s: float = 5.0) -> RemoteStore:
    """Return the collection at a URL; nothing is connected yet.

    Args:
        url: as `Address.parse` takes it.
        patience_s: for how long requests to a database that does not answer are repeated.

    Raises:
        BadConfig: the URL names no known kind of database.
        ModuleNotFoundError: the extra with its client library is not installed.
    """
    address = Address.parse(url)
    if address.kind == "milvus":
        from sbtk_runtime.gallery.remote_milvus import MilvusStore

        return MilvusStore(address, patience_s)
    from sbtk_runtime.gallery.remote_postgres import PostgresStore

    return PostgresStore(address, patience_s)


def require_same(there: CollectionInfo, ours: CollectionInfo, address: Address) -> None:
    """Make sure that a gallery's photos belong into a collection.

    Raises:
        ModelMismatch: the collection is of another model, preprocessing, size or codes.
    """
    if _key(there) != _key(ours):
        raise ModelMismatch(
            f"{address.shown} holds photos by {there.description}",
            f"{ours.description}, as the gallery has (they cannot be compared)",
            "push to another collection: --at '...?collection=NAME'",
        )


def of_another_program(address: Address, why: str) -> RemoteError:
    """Return the error of a collection whose name another program uses."""
    return RemoteError(
        f"another program uses the name of {address.shown}: {why}",
        "a collection that 'sbtk push' has made, or none",
        "push to another collection: --at '...?collection=NAME'",
    )


def _key(info: CollectionInfo) -> tuple[object, ...]:
    codes = None if info.itq is None else info.itq.to_bytes()
    return info.model_id, info.preprocessing, info.dim, info.bits, codes, info.regions


def photo_id(source: str, relative_path: bytes) -> int:
    """Return the id of a photo: 63 bits of a hash of its source and its path, at least 1."""
    digest = hashlib.sha256(source.encode() + b"\0" + relative_path).digest()
    return max(1, int.from_bytes(digest[:8], "big") >> 1)


def same_source(name: str) -> str:
    """Return a source's name in the one form of Unicode in which all machines write it (NFC)."""
    return unicodedata.normalize("NFC", name)


def escape_path(path: bytes) -> str:
    r"""Return a path as text that every database stores: bytes that are not UTF-8 as `\xe9`.

    A backslash is doubled. What begins with a folder's path does so when escaped.
    """
    text = path.replace(b"\\", b"\\\\").decode("utf-8", "surrogateescape")
    return "".join(
        f"\\x{ord(character) - 0xDC00:02x}" if 0xDC80 <= ord(character) <= 0xDCFF else character
        for character in text
    )


def unescape_path(text: str) -> bytes:
    """Return the path that `escape_path` was given."""

    def plain(found: re.Match[bytes]) -> bytes:
        return b"\\" if found[0] == b"\\\\" else bytes([int(found[1], 16)])

    return re.sub(rb"\\\\|\\x([0-9a-f]{2})", plain, text.encode())


def retrying(work: Callable[[], Result], patience_s: float, notify: Notify | None = None) -> Result:
    """Return what `work` returns; repeat it, with longer and longer pauses, while unavailable.

    Args:
        work: a request to a database.
        patience_s: for how long.
        notify: called before the first pause with a sentence for the user.

    Raises:
        RemoteUnavailable: the database is still unavailable after `patience_s` seconds.
        SbtkError: any other error, at once.
    """
    ends = time.monotonic() + patience_s
    pause_s = _FIRST_PAUSE_S
    while True:
        try:
            return work()
        except RemoteUnavailable as problem:
            # Not at the same moment as the other machines that wait.
            wait_s = pause_s * random.uniform(0.5, 1.0)  # noqa: S311
            if time.monotonic() + wait_s > ends:
                raise
            if notify is not None:
                notify(f"{problem.found}: trying again for {patience_s:.0f} s")
                notify = None
        time.sleep(wait_s)
        pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
