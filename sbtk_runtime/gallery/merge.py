"""Merge galleries of one model: rows are copied, nothing is embedded, the graph is built once.

The merged gallery holds the photos that the named galleries hold, and no others. What was copied is
committed page by page, so that a killed merge resumes; running it again copies only what is new.
"""

from __future__ import annotations

import os
import shlex
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import astuple, dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sbtk_runtime.binary_codes import Itq
from sbtk_runtime.engines.base import Notify, no_notify
from sbtk_runtime.errors import BadConfig, BadGallery, ModelMismatch
from sbtk_runtime.files import WriterLock, printable_name, remove_stale_temporaries
from sbtk_runtime.gallery.catalogue import Embedding, Failure, Origin
from sbtk_runtime.gallery.divisions import (
    Holding,
    absent_shards,
    require_one_division,
    united,
)
from sbtk_runtime.gallery.folder import (
    LOCK_NAME,
    Generation,
    make_folder,
    open_generation,
    open_published,
    open_rows,
    published_manifest,
    translate_os_errors,
    vacuum,
    write_failures,
)
from sbtk_runtime.gallery.publish import publish
from sbtk_runtime.gallery.region_rows import RegionRows
from sbtk_runtime.gallery.rows import CodeShards, RowBytes, Vectors
from sbtk_runtime.gallery.schema import catalogue_errors, transaction
from sbtk_runtime.gallery.walk_rules import WalkRules
from sbtk_runtime.gallery.writer import Catalogue
from sbtk_runtime.manifest import MANIFEST_NAME, GalleryManifest

#: Called with the number of photos done and their total.
Progress = Callable[[int, int], None]

_TABLES = """
CREATE TEMP TABLE wanted (
    path BLOB PRIMARY KEY, size_bytes INTEGER, mtime_ns INTEGER, sha256 BLOB, row INTEGER,
    ctime_ns INTEGER, inode INTEGER, partial TEXT, source INTEGER
) WITHOUT ROWID;
CREATE TEMP TABLE todo (
    number INTEGER PRIMARY KEY, path BLOB, size_bytes INTEGER, mtime_ns INTEGER, sha256 BLOB,
    row INTEGER, ctime_ns INTEGER, inode INTEGER, partial TEXT
);
CREATE TEMP TABLE failed (
    path BLOB PRIMARY KEY, reason TEXT, size_bytes INTEGER, mtime_ns INTEGER, ctime_ns INTEGER,
    inode INTEGER
) WITHOUT ROWID;
"""
# Of photos at one path the one that was modified last is taken, whatever the order of galleries.
_WANT = """INSERT INTO wanted VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)
ON CONFLICT (path) DO UPDATE SET size_bytes = excluded.size_bytes, mtime_ns = excluded.mtime_ns,
    sha256 = excluded.sha256, row = excluded.row, ctime_ns = excluded.ctime_ns,
    inode = excluded.inode, partial = excluded.partial, source = excluded.source
WHERE (excluded.mtime_ns, excluded.sha256) > (wanted.mtime_ns, wanted.sha256)"""
_DIFFERS = "SELECT 1 FROM wanted WHERE path = ? AND sha256 != ?"
_FILL_TODO = """INSERT INTO todo (path, size_bytes, mtime_ns, sha256, row, ctime_ns, inode, partial)
SELECT w.path, w.size_bytes, w.mtime_ns, w.sha256, w.row, w.ctime_ns, w.inode, w.partial
FROM wanted AS w WHERE w.source = ? AND NOT EXISTS (
    SELECT 1 FROM photos AS p WHERE p.path = w.path AND p.removed_in IS NULL
    AND p.missing_in IS NULL AND p.sha256 = w.sha256)
ORDER BY w.row, w.path"""
_PAGE = """SELECT number, path, size_bytes, mtime_ns, sha256, row, ctime_ns, inode, partial
FROM todo WHERE number > ? ORDER BY number LIMIT ?"""
# Photos without regions: just copied, or earlier, when these were damaged or not there yet.
_BARE = """SELECT w.row, min(p.row) FROM wanted AS w JOIN photos AS p
    ON p.path = w.path AND p.sha256 = w.sha256 AND p.removed_in IS NULL
WHERE w.source = ? AND p.row NOT IN (SELECT photo_row FROM regions) GROUP BY w.row ORDER BY w.row"""
# The same of dates, which a gallery of an older version gets when it is indexed again.
_UNDATED = _BARE.replace("SELECT photo_row FROM regions", "SELECT row FROM dates")
_STRAY = """SELECT p.id FROM photos AS p WHERE p.removed_in IS NULL
AND NOT EXISTS (SELECT 1 FROM wanted AS w WHERE w.path = p.path)"""
_STAMP = """UPDATE photos AS p SET (mtime_ns, ctime_ns, inode) =
    (SELECT w.mtime_ns, w.ctime_ns, w.inode FROM wanted AS w WHERE w.path = p.path)
WHERE p.removed_in IS NULL AND EXISTS (SELECT 1 FROM wanted AS w WHERE w.path = p.path
    AND w.sha256 = p.sha256 AND (w.mtime_ns, w.ctime_ns, w.inode)
        IS NOT (p.mtime_ns, p.ctime_ns, p.inode))"""
_FAILED = """SELECT path, reason, size_bytes, mtime_ns, ctime_ns, inode FROM failed AS f
WHERE NOT EXISTS (SELECT 1 FROM wanted AS w WHERE w.path = f.path)"""
_MERGED = "merged"


@dataclass(frozen=True)
class MergeReport:
    """The result of a merge.

    Attributes:
        copied: photos that this run copied.
        unchanged: photos that were there already.
        removed: photos that were there, but are in none of the merged galleries.
        conflicts: paths that galleries have with different content; the newest was taken.
        damaged: photos that were not copied because their embeddings are damaged or missing.
        missing: missing photos of the galleries, which are not copied.
        unreadable: files that could not be read when they were indexed.
        live: searchable photos of the merged gallery.
        damaged_regions: photos that are there without regions because one of these is damaged.
        absent_shards: shards of folders that none of the galleries holds, such as
            "2/4 of /photos".
        seconds: the duration.
        notices: sentences for the user.
    """

    copied: int
    unchanged: int
    removed: int
    conflicts: int
    damaged: int
    missing: int
    unreadable: int
    live: int
    absent_shards: tuple[str, ...]
    seconds: float
    damaged_regions: int = 0
    notices: tuple[str, ...] = ()


def merge_galleries(
    sources: Sequence[Path],
    folder: Path,
    *,
    progress: Progress = lambda done, total: None,
    notify: Notify = no_notify,
    commit_every: int = 4096,
) -> MergeReport:
    """Make the gallery in `folder` hold the photos of the galleries `sources`.

    Args:
        sources: galleries of one model; they are only read.
        folder: the merged gallery; created if it does not exist, else made by an earlier merge.
        progress: called after each page of photos.
        notify: called with a sentence before a step that takes long.
        commit_every: photos of a page.

    Raises:
        BadConfig: no gallery was named, one twice, or the merged one itself.
        BadGallery: one is missing or damaged, they keep different things or are shards of
            different divisions, or `folder` holds something that no merge has made.
        ModelMismatch: they were made by different models or preprocessing.
        GalleryBusy: another process is writing to the merged gallery.
        DiskFull: there is no space; what was copied is kept.
    """
    started = time.perf_counter()
    _require_distinct(sources, folder)
    manifests = [published_manifest(source) for source in sources]
    origin, itq = _common_origin(sources, manifests)
    region_count = _region_count(manifests[0])
    with translate_os_errors(folder):
        make_folder(folder)
        with WriterLock(folder / LOCK_NAME):
            remove_stale_temporaries(folder)
            is_published = (folder / MANIFEST_NAME).exists()
            published = published_manifest(folder) if is_published else None
            generation = 1 if published is None else published.generation + 1
            with Catalogue(folder, generation) as catalogue:
                _claim(folder, catalogue, origin, itq, region_count)
                rows = open_rows(folder, origin.dim, origin.bits)
                vacuum(folder, catalogue, rows, published)
                merge = _Merge(catalogue, rows, progress, commit_every)
                merge.total = sum(manifest.live for manifest in manifests)
                for number, source in enumerate(sources):
                    merge.add(number, source, manifests[number])
                removed = merge.finish()
                write_failures(folder, catalogue)
                publish(folder, catalogue, rows, origin, published, notify)
                return MergeReport(
                    copied=merge.copied,
                    unchanged=merge.wanted() - merge.copied - merge.damaged,
                    removed=removed,
                    conflicts=merge.conflicts,
                    damaged=merge.damaged,
                    missing=merge.missing,
                    unreadable=sum(1 for _ in catalogue.failures()),
                    live=catalogue.live(),
                    absent_shards=merge.absent_shards(),
                    seconds=time.perf_counter() - started,
                    damaged_regions=merge.damaged_regions,
                    notices=tuple(dict.fromkeys(merge.notices)),
                )


class _Merge:
    """One merge, under the writer's lock of the merged gallery."""

    def __init__(
        self,
        catalogue: Catalogue,
        rows: Vectors | CodeShards,
        progress: Progress,
        commit_every: int,
    ) -> None:
        self._catalogue = catalogue
        self._connection = catalogue.connection
        self._rows = rows
        self._progress = progress
        self._commit_every = commit_every
        # So many rows, too.
        self._regions_every = max(1, commit_every // (catalogue.region_count() or 1))
        self._rules: list[WalkRules] = []
        self._holdings: list[Holding] = []
        self._done = 0
        self.total = self.copied = self.damaged = self.conflicts = self.missing = 0
        self.damaged_regions = 0
        self.notices: list[str] = []
        self._connection.executescript(_TABLES)

    def add(self, number: int, source: Path, manifest: GalleryManifest) -> None:
        """Copy the photos of a gallery that are not there yet."""
        with open_generation(source, self.notices.append) as generation:
            _require_same(source, manifest, generation.manifest)
            view = generation.view
            self._catalogue.record_roots(view.roots())
            self._rules.append(view.rules())
            self._holdings.append(Holding.of(generation.manifest, view))
            self.missing += sum(1 for _ in view.paths(missing=True))
            with catalogue_errors(self._catalogue.path), transaction(self._connection):
                for entry in view.entries():
                    self._want(number, entry)
                self._connection.executemany(
                    "INSERT OR REPLACE INTO failed VALUES (?, ?, ?, ?, ?, ?)",
                    map(astuple, view.failures()),
                )
                self._connection.execute("DELETE FROM todo")
                todo = self._connection.execute(_FILL_TODO, (number,)).rowcount
            self._advance(generation.manifest.live - todo)
            for page in self._pages():
                self._copy(generation, page)
                self._advance(len(page))
            self._add_dates(number, generation)
            if manifest.regions is not None:
                self._add_regions(number, generation)

    def finish(self) -> int:
        """Adopt failures and rules, remove photos that no gallery holds, and return how many."""
        stray = [photo_id for (photo_id,) in self._connection.execute(_STRAY)]
        removed = self._catalogue.remove(stray)
        with catalogue_errors(self._catalogue.path), transaction(self._connection):
            self._connection.execute(_STAMP)
            self._connection.execute("DELETE FROM failures")
        failures = [Failure(*columns) for columns in self._connection.execute(_FAILED)]
        self._catalogue.commit([], failures, [])
        rules = self._rules[0]
        if any(other != rules for other in self._rules):
            rules = WalkRules()
            self.notices.append(
                "the galleries leave out different files, so none of their --exclude patterns were "
                "taken over"
            )
        self._catalogue.record_rules(rules)
        self._catalogue.record_shards(united(self._holdings).divided)
        return removed

    def absent_shards(self) -> tuple[str, ...]:
        """Return the shards of folders that none of the galleries holds."""
        return absent_shards(united(self._holdings))

    def wanted(self) -> int:
        """Return the number of photos that the galleries hold, each path once."""
        return int(self._connection.execute("SELECT count(*) FROM wanted").fetchone()[0])

    def _want(self, number: int, entry: Embedding) -> None:
        sha256 = bytes.fromhex(entry.sha256)
        if self._connection.execute(_DIFFERS, (entry.path, sha256)).fetchone() is not None:
            self.conflicts += 1
        stamps = (entry.ctime_ns, entry.inode, entry.partial, number)
        values = (entry.path, entry.size_bytes, entry.mtime_ns, sha256, entry.row, *stamps)
        self._connection.execute(_WANT, values)

    def _pages(self) -> Iterator[list[Embedding]]:
        last = 0
        while True:
            found = self._connection.execute(_PAGE, (last, self._commit_every)).fetchall()
            if not found:
                return
            last = found[-1][0]
            yield [
                Embedding(path, size_bytes, mtime_ns, sha256.hex(), row, *rest)
                for _, path, size_bytes, mtime_ns, sha256, row, *rest in found
            ]

    def _copy(self, generation: Generation, page: list[Embedding]) -> None:
        """Copy the rows of a page that are intact, and commit them with their photos."""
        source_rows = np.unique(np.array([entry.row for entry in page], dtype=np.int64))
        content, is_intact = generation.check.read_checked(source_rows)
        if isinstance(generation.rows, Vectors):
            is_intact &= generation.rows.decode(content)[1]
        place = {row: index for index, row in enumerate(source_rows.tolist())}
        first_row = self._catalogue.committed_rows()
        new_rows: dict[str, int] = {}
        copied: list[int] = []
        photos = []
        for entry in page:
            known = self._catalogue.embedding_of(entry.sha256)
            if known is not None:
                photos.append(replace(entry, row=known.row))
                continue
            if not is_intact[place[entry.row]]:
                self.damaged += 1
                continue
            if entry.sha256 not in new_rows:
                new_rows[entry.sha256] = first_row + len(copied)
                copied.append(place[entry.row])
            photos.append(replace(entry, row=new_rows[entry.sha256]))
        batches = self._rows.append_bytes(first_row, content[copied]) if copied else []
        self._catalogue.commit(photos, [], batches)
        self.copied += len(photos)

    def _add_dates(self, number: int, generation: Generation) -> None:
        """Copy the dates of the photos of a gallery that are there without one."""
        with catalogue_errors(self._catalogue.path):
            undated = self._connection.execute(_UNDATED, (number,)).fetchall()
        for start in range(0, len(undated), self._commit_every):
            rows = dict(undated[start : start + self._commit_every])
            dates = generation.view.dates(rows)
            self._catalogue.store_dates([(rows[row], taken) for row, taken in dates])

    def _add_regions(self, number: int, generation: Generation) -> None:
        """Copy the regions of the photos of a gallery that are there without them."""
        with catalogue_errors(self._catalogue.path):
            bare = self._connection.execute(_BARE, (number,)).fetchall()
        for start in range(0, len(bare), self._regions_every):
            rows = dict(bare[start : start + self._regions_every])
            first_row = self._catalogue.committed_rows()
            found = copy_regions(generation, rows, first_row)
            content = found.content
            batches = self._rows.append_bytes(first_row, content) if len(content) else []
            self._catalogue.commit([], [], batches, found.regions, found.total)
            self.damaged_regions += found.damaged

    def _advance(self, count: int) -> None:
        self._done += count
        self._progress(self._done, self.total)


def _require_distinct(sources: Sequence[Path], folder: Path) -> None:
    if not sources:
        raise BadConfig("no gallery was named", "two or more galleries")
    places = [os.path.realpath(source) for source in sources]
    for source, place in zip(sources, places, strict=True):
        if place == os.path.realpath(folder):
            raise BadConfig(
                f"{printable_name(source)} cannot be merged into itself",
                "another gallery for the result",
                "--gallery all.sbtk",
            )
        if places.count(place) > 1:
            raise BadConfig(f"{printable_name(source)} was named twice", "each gallery once")


def _common_origin(
    sources: Sequence[Path], manifests: Sequence[GalleryManifest]
) -> tuple[Origin, Itq | None]:
    """Return the origin that all galleries share.

    Raises:
        ModelMismatch, BadGallery: they differ; names two of them and what each is.
    """
    first = manifests[0]
    for source, manifest in zip(sources, manifests, strict=True):
        for kind, a, b in (
            ("made by", first.model_id, manifest.model_id),
            ("of preprocessing", first.preprocessing, manifest.preprocessing),
        ):
            if a != b:
                raise ModelMismatch(
                    f"{printable_name(sources[0])} is {kind} {a}, {printable_name(source)} {kind} "
                    f"{b}",
                    "galleries of one model (embeddings of two cannot be compared)",
                    f"sbtk index PHOTOS --model NAME --gallery {_quote(source)} of a new name",
                )
        if (first.bits, first.dim) != (manifest.bits, manifest.dim):
            raise BadGallery(
                f"{printable_name(sources[0])} keeps {_describe(first)}, {printable_name(source)} "
                f"{_describe(manifest)}",
                "galleries of the same kind",
            )
        counts = _region_count(first), _region_count(manifest)
        if counts[0] != counts[1]:
            count, other = (counts[0], source) if counts[0] else (counts[1], sources[0])
            raise BadGallery(
                f"{printable_name(sources[0])} keeps {_regions_text(counts[0])}, "
                f"{printable_name(source)} {_regions_text(counts[1])}",
                "galleries of the same kind",
                f"sbtk index PHOTOS --regions {count} --gallery {_quote(other)}"
                f"{'' if None in counts else ' of a new name'}",
            )
    itq = _examined(sources, are_codes=first.bits is not None)
    return Origin(first.model_id, first.precision, first.dim, first.preprocessing, first.bits), itq


def _require_same(source: Path, before: GalleryManifest, now: GalleryManifest) -> None:
    """Check that a gallery was at most updated since its manifest was first read."""
    if (
        *(before.model_id, before.preprocessing, before.dim, before.bits, before.shard),
        _region_count(before),
    ) != (
        *(now.model_id, now.preprocessing, now.dim, now.bits, now.shard),
        _region_count(now),
    ):
        raise BadGallery(
            f"{printable_name(source)} was replaced by another gallery during the merge",
            "",
            "run the same command again",
        )


def _examined(sources: Sequence[Path], *, are_codes: bool) -> Itq | None:
    """Check that the galleries hold shards of one division, and codes of one projection."""
    holdings: list[Holding] = []
    itqs: list[Itq] = []
    for source in sources:
        manifest, opened = open_published(source, no_notify)
        with closing(opened) as view:
            holdings.append(Holding.of(manifest, view))
            if are_codes:
                itqs.append(view.itq())
    require_one_division(sources, holdings)
    for source, itq in zip(sources, itqs, strict=False):
        if itq.to_bytes() != itqs[0].to_bytes():
            raise BadGallery(
                f"the codes of {printable_name(sources[0])} and {printable_name(source)} were made "
                "by different projections",
                "codes of one model bundle",
            )
    return itqs[0] if itqs else None


def _claim(
    folder: Path,
    catalogue: Catalogue,
    origin: Origin,
    itq: Itq | None,
    region_count: int | None,
) -> None:
    """Mark a new catalogue as that of a merged gallery, or check that it is one.

    Raises:
        BadGallery: it was made by `sbtk index`, or keeps something else.
        ModelMismatch: it is of another model.
    """
    known = catalogue.origin()
    if known is None:
        catalogue.mark(_MERGED)
        catalogue.claim(origin, itq)
        if region_count is not None:
            catalogue.keep_regions(region_count)
        return
    if not catalogue.is_marked(_MERGED):
        raise BadGallery(
            f"{printable_name(folder)} was made by 'sbtk index'",
            "a gallery that does not exist, or that 'sbtk merge' has made",
            "name another gallery: --gallery all.sbtk; to keep its photos, merge it too",
        )
    if replace(known, precision=origin.precision) != origin:
        raise ModelMismatch(
            f"{printable_name(folder)} was merged from galleries of {known.model_id}, "
            f"{known.preprocessing}, {_describe(known)}",
            f"{origin.model_id}, {origin.preprocessing}, {_describe(origin)}, as they are now",
            "name another gallery: --gallery all-2.sbtk",
        )

    if region_count is not None and not catalogue.committed_rows():
        catalogue.keep_regions(region_count)  # the merge that claimed it was killed before that
    if catalogue.region_count() != region_count:
        raise BadGallery(
            f"{printable_name(folder)} was merged from galleries that kept "
            f"{_regions_text(catalogue.region_count())}",
            f"{_regions_text(region_count)}, as they do now",
            "name another gallery: --gallery all-2.sbtk",
        )


def _region_count(manifest: GalleryManifest) -> int | None:
    return None if manifest.regions is None else manifest.regions.count


def _regions_text(count: int | None) -> str:
    return "whole frames only" if count is None else f"{count} regions of each photo"


def _describe(kept: GalleryManifest | Origin) -> str:
    return f"{kept.dim} numbers a photo" if kept.bits is None else f"{kept.bits}-bit codes"


def _quote(path: Path) -> str:
    return shlex.quote(printable_name(path))


@dataclass(frozen=True)
class CopiedRegions:
    """Regions of photos, to be written to consecutive rows.

    Attributes:
        content: `(N, row_bytes) uint8`.
        regions: the future rows of each photo's regions; small photos have none.
        total: `(D,)`, the sum of the embeddings.
        damaged: the number of photos whose regions were left out because one is damaged.
    """

    content: RowBytes
    regions: list[RegionRows]
    total: NDArray[np.float64]
    damaged: int


def copy_regions(
    generation: Generation, photo_rows: Mapping[int, int], first_row: int
) -> CopiedRegions:
    """Read the regions of photos whose regions were embedded.

    Args:
        generation: the source, a gallery of embeddings with regions.
        photo_rows: rows of whole frames in the merged gallery, by their rows in the source.
        first_row: row of the first region in the merged gallery.
    """
    assert isinstance(generation.rows, Vectors)
    found = [
        (target, regions)
        for source, target in photo_rows.items()
        if (regions := generation.view.regions_of(source)) is not None
    ]
    numbers = [regions.first_row + np.arange(len(regions.boxes)) for _, regions in found]
    rows = np.unique(np.concatenate([np.empty(0, dtype=np.int64), *numbers]))
    content, is_intact = generation.check.read_checked(rows)
    embeddings, is_whole = generation.rows.decode(content)
    is_intact &= is_whole
    kept: list[RegionRows] = []
    places = [np.empty(0, dtype=np.int64)]
    for (target, regions), own in zip(found, numbers, strict=True):
        place = np.searchsorted(rows, own)
        if is_intact[place].all():
            kept.append(RegionRows(target, first_row, regions.boxes))
            places.append(place)
            first_row += len(own)
    chosen = np.concatenate(places)
    return CopiedRegions(
        content[chosen],
        kept,
        embeddings[chosen].sum(axis=0, dtype=np.float64),
        len(found) - len(kept),
    )
