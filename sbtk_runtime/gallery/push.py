"""Push a generation of a gallery to a database: new and changed photos, and deletions.

What is there already is compared by ids and stamps, so a push that was killed resumes, and pushing
again changes nothing. Only photos of the gallery's own sources and shard are deleted.
"""

from __future__ import annotations

import os
import shlex
import socket
import sqlite3
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sbtk_runtime.errors import BadConfig
from sbtk_runtime.files import printable_name
from sbtk_runtime.gallery.divisions import Holding, other_shards
from sbtk_runtime.gallery.folder import (
    Generation,
    open_generation,
    outermost,
    relative_path,
    roots_above,
)
from sbtk_runtime.gallery.photo_filter import ALL_PHOTOS
from sbtk_runtime.gallery.remote import (
    MOST_FOLDERS,
    WHOLE,
    CollectionInfo,
    Notify,
    Part,
    RemotePhoto,
    RemoteRegions,
    RemoteStore,
    RemoteWriter,
    escape_path,
    photo_id,
    same_source,
)
from sbtk_runtime.gallery.remote_sources import Source, list_sources
from sbtk_runtime.gallery.rows import Vectors
from sbtk_runtime.gallery.schema import catalogue_errors
from sbtk_runtime.manifest import PhotoShard

#: Called with the number of photos done and their total.
Progress = Callable[[int, int], None]

_LONGEST_SOURCE = 200
_TABLE = """CREATE TABLE wanted (
    id INTEGER PRIMARY KEY, stamp INTEGER, path TEXT, size_bytes INTEGER, mtime_ns INTEGER,
    sha256 TEXT, partial TEXT, taken TEXT, row INTEGER, is_there INTEGER NOT NULL DEFAULT 0
);
CREATE TABLE strays (id INTEGER PRIMARY KEY);
"""
_WANT = """INSERT OR IGNORE INTO wanted
    (id, stamp, path, size_bytes, mtime_ns, sha256, partial, taken, row)
    VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)"""
_TODO = """SELECT row, id, path, size_bytes, mtime_ns, sha256, partial, taken FROM wanted
    WHERE NOT is_there ORDER BY row, id"""


@dataclass(frozen=True)
class PushReport:
    """The result of a push.

    Attributes:
        pushed: photos that were inserted or replaced.
        unchanged: photos that were there already.
        deleted: photos that were there, but are no longer in the gallery.
        damaged: photos that were not pushed because their embeddings are damaged or missing.
        damaged_regions: photos that were pushed without some of their regions, which are damaged.
        collisions: photos that were not pushed because another photo has their id.
        other_shards: photos that were not pushed because they are of shards that the gallery was
            merged without, as `sbtk index` may have added since, or below none of its folders.
        live: photos of the gallery.
        sources: the names of the gallery's sources.
        seconds: the duration.
        notices: sentences for the user.
    """

    pushed: int
    unchanged: int
    deleted: int
    damaged: int
    collisions: int
    live: int
    sources: tuple[str, ...]
    seconds: float
    damaged_regions: int = 0
    other_shards: int = 0
    notices: tuple[str, ...] = ()


def push_gallery(
    folder: Path,
    store: RemoteStore,
    names: Mapping[str, str] | str | None = None,
    *,
    progress: Progress = lambda done, total: None,
    notify: Notify = lambda text: None,
    batch: int = 1000,
) -> PushReport:
    """Make a collection hold the photos of a gallery; other sources stay as they are.

    One generation is pushed, also if the gallery is updated at the same time.

    Args:
        folder: the gallery.
        store: the collection, which is made if it does not exist.
        names: the name of the gallery's source, or of each of its outermost folders by their
            absolute paths; by default the host's name and the folder.
        progress: called after each batch.
        notify: called with a sentence before a step that takes long.
        batch: photos of a transaction.

    Raises:
        BadConfig: the sources have no names that can be used.
        BadGallery: there is no gallery, or it is damaged and cannot be read.
        ModelMismatch: the collection is of another model; nothing was changed.
        RemoteError: the database refuses, or another push of these photos runs.
        DiskFull: there is no space for temporary files here.
    """
    started = time.perf_counter()
    notices: list[str] = []
    with open_generation(folder, notices.append) as generation:
        manifest, view = generation.manifest, generation.view
        info = CollectionInfo(
            *(manifest.model_id, manifest.preprocessing, manifest.precision, manifest.dim),
            bits=manifest.bits,
            itq=None if manifest.bits is None else view.itq(),
            regions=None if manifest.regions is None else manifest.regions.count,
        )
        sources = source_names(view.roots(), names)
        totals: Counter[str] = Counter()
        held = Holding.of(manifest, view)
        for root, source in sources.items():
            for shard in _shards_of(held, root):
                push = _Push(generation, store, root, source, shard, progress, notify, batch)
                totals.update(push.run(info, totals["done"], frozenset(sources)))
        undated = view.count_undated(ALL_PHOTOS)[1]
        if undated:
            text = f"the dates of {undated:,} photos were not read yet: run 'sbtk index', then push"
            notices.append(f"{text} again")
        notices += _source_notices(store, set(sources.values()))
        counted = ("pushed", "unchanged", "damaged", "collisions")
        other_shards = manifest.live - sum(totals[name] for name in counted)
        if other_shards:
            notices.append(
                "photos of shards that the gallery was merged without are left out: merge all "
                "shards, or index the whole folder"
                if held.divided
                else "photos below none of the gallery's folders are left out: index theirs"
            )
        return PushReport(
            pushed=totals["pushed"],
            unchanged=totals["unchanged"],
            deleted=totals["deleted"],
            damaged=totals["damaged"],
            collisions=totals["collisions"],
            live=manifest.live,
            sources=tuple(sources.values()),
            seconds=time.perf_counter() - started,
            damaged_regions=totals["damaged_regions"],
            other_shards=other_shards,
            notices=tuple(dict.fromkeys(notices)),
        )


def _shards_of(held: Holding, root: bytes) -> list[PhotoShard]:
    """Return the shards of a folder to push, or `WHOLE`.

    What a gallery that was merged without some shards lacks is not deleted there.
    """
    shards = held.divided.get(root, frozenset())
    if held.shard is None and not other_shards(shards):
        return [WHOLE]
    return sorted(shards, key=lambda shard: (shard.count, shard.index))


def _source_notices(store: RemoteStore, pushed: set[str]) -> list[str]:
    """Return the notices of other sources, which are still found, and of shards that are absent."""
    own: list[Source] = []
    others: list[Source] = []
    for source in list_sources(store):
        (own if source.name in pushed else others).append(source)
    notices = []
    for source in own:
        if source.absent_shards:
            shown = ", ".join(source.absent_shards[:10])
            more = f" and {len(source.absent_shards) - 10:,} more"
            notices.append(
                f"of {printable_name(source.name)}, shards that were not pushed yet: {shown}"
                f"{more if len(source.absent_shards) > 10 else ''}"
            )
    others = sorted((one for one in others if one.photos), key=lambda one: -one.photos)
    if others:
        shown = ", ".join(f"{one.photos:,} of {printable_name(one.name)}" for one in others[:5])
        more = f" and {len(others) - 5:,} more" if len(others) > 5 else ""
        notices.append(f"photos of other sources stay there: {shown}{more}")
    for one in others:
        if same_source(one.name) in pushed:
            notices.append(
                f"an older sbtk pushed {printable_name(one.name)} in another form of Unicode: "
                f"sbtk push --remove-source {shlex.quote(one.name)} --at URL removes it"
            )
    return notices


def source_names(
    roots: list[bytes], names: Mapping[str, str] | str | None = None
) -> dict[bytes, str]:
    """Return the name of the source below each outermost of the absolute `roots`.

    Raises:
        BadConfig: one name for several roots, a name for none of them, one name twice, or one that
            is too long or has characters that cannot be printed.
    """
    folders = outermost(roots)
    if isinstance(names, str):
        if len(folders) > 1:
            shown = _listed(folders)
            raise BadConfig(
                f"the gallery has {len(folders)} folders ({shown}), and one name was given",
                "a name for each",
                "--source NAME=FOLDER, once for each folder; or index the folder above all of "
                "them, or drop one that has moved with 'sbtk index --forget FOLDER'",
            )
        names = {os.fsdecode(folders[0]): names}
    names = names or {}
    for folder in names:
        if os.fsencode(folder) not in folders:
            raise BadConfig(
                f"the gallery has no folder {printable_name(folder)}",
                f"one of: {_listed(folders)}",
            )
    host = socket.gethostname()
    found = {
        root: same_source(names.get(os.fsdecode(root), f"{host}:{escape_path(root)}"))
        for root in folders
    }
    for name in found.values():
        if not 0 < len(name) <= _LONGEST_SOURCE or not name.isprintable() or "=" in name:
            raise BadConfig(
                f"a source cannot be called {name[:60]!r}",
                f"1 to {_LONGEST_SOURCE} printable characters without =",
                "--source NAME",
            )
    if len(set(found.values())) < len(found):
        raise BadConfig("two folders have one name", "a name for each", "--source NAME=FOLDER")
    return found


def _listed(folders: list[bytes]) -> str:
    shown = ", ".join(map(printable_name, folders[:5]))
    return f"{shown}, and {len(folders) - 5:,} more" if len(folders) > 5 else shown


class _Push:
    """The push of one source of a generation."""

    def __init__(
        self,
        generation: Generation,
        store: RemoteStore,
        root: bytes,
        source: str,
        shard: PhotoShard,
        progress: Progress,
        notify: Notify,
        batch: int,
    ) -> None:
        self._generation = generation
        self._store = store
        self._root = root
        self._source = source
        self._shard = shard
        self._progress = progress
        self._notify = notify
        self._batch = batch
        self._counts: Counter[str] = Counter()
        self._folders: Counter[str] = Counter()

    def run(self, info: CollectionInfo, done: int, roots: frozenset[bytes]) -> Counter[str]:
        """Push the photos, and return the counts; `done` is the number of earlier photos."""
        shard = self._shard
        total = self._generation.manifest.live
        with (
            tempfile.TemporaryDirectory(prefix="sbtk-") as place,
            catalogue_errors(file := Path(place) / "push.sqlite"),
            closing(sqlite3.connect(file, isolation_level=None)) as local,
            self._store.writing(info, self._source, shard, self._notify) as writer,
        ):
            local.executescript("PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF;" + _TABLE)
            self._list(local, roots)
            self._compare(local, writer)
            done += self._counts["unchanged"] + self._counts["collisions"]
            self._progress(done, total)
            for part in _parts(local.execute(_TODO), self._batch):
                self._put(writer, part)
                done += len(part)
                self._progress(done, total)
            for part in _parts(local.execute("SELECT id FROM strays"), self._batch):
                writer.delete([number for (number,) in part])
                self._counts["deleted"] += len(part)
            photos = self._counts["unchanged"] + self._counts["pushed"]
            folders = dict(self._folders.most_common(MOST_FOLDERS))
            left = Part(self._source, shard, photos, folders, has_dates=True)
            if info.regions is not None:
                mean = self._generation.view.region_mean(info.dim)
                left = replace(left, regions=self._count_regions(local), region_mean=mean)
            self._store.publish(left, self._notify)
        return self._counts + Counter(done=done)

    def _list(self, local: sqlite3.Connection, roots: frozenset[bytes]) -> None:
        """Write the photos below the root into the local table."""
        local.execute("BEGIN")
        for photo in self._generation.view.photos():
            path = os.fsencode(photo.path)
            above = roots_above(path, roots)
            if (above[-1] if above else b"/") != self._root:
                continue
            relative = relative_path(path, self._root)
            if self._generation.manifest.shard is None and not self._shard.has(relative):
                continue  # of another shard of a merged gallery
            number = photo_id(self._source, relative)
            one = RemotePhoto(
                *(number, self._source, escape_path(relative), photo.size_bytes, photo.mtime_ns),
                *(photo.sha256, photo.partial, self._generation.view.taken(photo.row)),
            )
            values = (one.path, one.size_bytes, one.mtime_ns, one.sha256, one.partial, one.taken)
            is_new = local.execute(_WANT, (number, one.stamp, *values, photo.row)).rowcount
            self._counts["collisions"] += not is_new
            self._folders[one.path.rpartition("/")[0]] += is_new
        local.execute("COMMIT")

    def _compare(self, local: sqlite3.Connection, writer: RemoteWriter) -> None:
        """Note which photos are up to date there, and which must be deleted."""
        local.execute("BEGIN")
        for number, stamp in writer.stamps():
            query = "UPDATE wanted SET is_there = (stamp = ?) WHERE id = ?"
            if not local.execute(query, (stamp, number)).rowcount:
                local.execute("INSERT OR IGNORE INTO strays VALUES (?)", (number,))
        local.execute("COMMIT")
        there = local.execute("SELECT count(*) FROM wanted WHERE is_there").fetchone()
        self._counts["unchanged"] = there[0]

    def _put(self, writer: RemoteWriter, part: list[tuple[Any, ...]]) -> None:
        numbers = np.array([columns[0] for columns in part], dtype=np.int64)
        source_rows, places = np.unique(numbers, return_inverse=True)
        content, is_intact = self._generation.check.read_checked(source_rows)
        rows: NDArray[np.generic] = content
        if isinstance(self._generation.rows, Vectors):
            is_intact &= self._generation.rows.decode(content)[1]
            rows = content.view("<f2")
        kept = np.flatnonzero(is_intact[places])
        self._counts["damaged"] += len(part) - len(kept)
        photos = []
        for index in kept.tolist():
            _, number, *rest = part[index]
            photos.append(RemotePhoto(number, self._source, *rest))
        if photos:
            regions = []
            if self._generation.manifest.regions is not None:
                found = [self._regions(row) for row in numbers[kept].tolist()]
                regions = [one for one, _ in found]
                # With another stamp they are pushed again.
                photos = [
                    replace(photo, lacks_regions=not is_complete)
                    for photo, (_, is_complete) in zip(photos, found, strict=True)
                ]
            count = writer.put(photos, rows[places[kept]], regions)
            self._counts["pushed"] += count
            self._counts["collisions"] += len(photos) - count

    def _regions(self, photo_row: int) -> tuple[RemoteRegions, bool]:
        """Return the regions of the photo at `photo_row`, and whether these are all.

        Damaged ones are left out: the photo is found by the others.
        """
        generation = self._generation
        assert isinstance(generation.rows, Vectors)
        kept = generation.view.regions_of(photo_row)
        if kept is None or not len(kept.boxes):
            empty = np.empty((0, generation.manifest.dim), dtype="<f2")
            none = RemoteRegions(np.empty((0, 4), dtype=np.float32), empty)
            return none, kept is not None
        numbers = np.arange(kept.first_row, kept.first_row + len(kept.boxes), dtype=np.int64)
        content, is_intact = generation.check.read_checked(numbers)
        is_intact &= generation.rows.decode(content)[1]
        self._counts["damaged_regions"] += not is_intact.all()
        self._counts["damaged_rows"] += int((~is_intact).sum())
        rows = content.view("<f2")[is_intact]
        return RemoteRegions(kept.boxes[is_intact], rows), bool(is_intact.all())

    def _count_regions(self, local: sqlite3.Connection) -> int:
        """Return the number of regions of the photos of the source."""
        spans = self._generation.view.region_spans()
        found = local.execute("SELECT row FROM wanted")
        rows, photos = np.unique([row for (row,) in found], return_counts=True)
        order = np.argsort(spans.photo_rows)
        counts = np.zeros(len(rows), dtype=np.int64)
        if len(order) and len(rows):
            places = np.searchsorted(spans.photo_rows[order], rows).clip(max=len(order) - 1)
            is_there = spans.photo_rows[order][places] == rows
            counts = np.where(is_there, spans.counts[order][places], 0)
        return int((counts * photos).sum()) - self._counts["damaged_rows"]


def _parts(found: sqlite3.Cursor, size: int) -> Iterator[list[tuple[Any, ...]]]:
    while part := found.fetchmany(size):
        yield part
