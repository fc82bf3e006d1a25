"""Create and update galleries: only changes are embedded, and a kill loses at most one batch.

A commit writes vectors, then fsyncs, then writes the catalogue. A generation is published by sign
codes, the graph and, last of all, the manifest; until then readers see the previous generation.

Galleries of older versions get what they lack, such as dates, without embedding photos again. Dates
are kept with the rows of embeddings, since photos with the same bytes share both.
"""

from __future__ import annotations

import os
import shlex
import time
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np

from sbtk_runtime.binary_codes import Itq
from sbtk_runtime.embedding.embedder import Embedder
from sbtk_runtime.embedding.stream import Embedded
from sbtk_runtime.engines.base import EngineInfo, Notify, no_notify
from sbtk_runtime.errors import BadConfig, BadGallery
from sbtk_runtime.exif import read_taken
from sbtk_runtime.files import (
    WriterLock,
    count_text,
    open_regular,
    printable_name,
    remove_stale_temporaries,
)
from sbtk_runtime.gallery.catalogue import Origin, has_photos
from sbtk_runtime.gallery.changes import Changes, Progress
from sbtk_runtime.gallery.folder import (
    FAILURES_NAME,
    LOCK_NAME,
    initialize_gallery,
    make_folder,
    open_rows,
    published_manifest,
    require_codes,
    roots_above,
    roots_to_walk,
    translate_os_errors,
    vacuum,
    write_failures,
)
from sbtk_runtime.gallery.neighbours import NEIGHBOURS_NAME
from sbtk_runtime.gallery.publish import publish
from sbtk_runtime.gallery.region_rows import place_regions, sum_regions
from sbtk_runtime.gallery.rows import Batch, CodeShards, Vectors
from sbtk_runtime.gallery.schema import (
    CATALOGUE_NAME,
    blob,
    catalogue_errors,
    integer,
    values_checked,
)
from sbtk_runtime.gallery.walk import (
    DEFAULT_RULES,
    LeftOutCount,
    refuse_nothing,
    walk,
)
from sbtk_runtime.gallery.walk_rules import RuleChange, WalkRules
from sbtk_runtime.gallery.writer import Catalogue
from sbtk_runtime.manifest import MANIFEST_NAME, GalleryManifest, PhotoShard
from sbtk_runtime.regions import RegionGrid, grid_of

OnEngine = Callable[[EngineInfo], None]

#: The most time for publishing between, as a share of all.
_MOST_PUBLISHING = 0.1
_NO_CHANGE = RuleChange()
_DATES_PAGE = 1000
_DATE_THREADS = 4
# Of photos with the same bytes one is enough. Those that are missing get no date.
_UNDATED = """SELECT row, path, size_bytes, mtime_ns FROM photos
    WHERE removed_in IS NULL AND missing_in IS NULL AND row > ?
    AND NOT EXISTS (SELECT 1 FROM dates WHERE dates.row = photos.row)
    GROUP BY row ORDER BY row LIMIT ?"""
_WITHOUT_CHECKSUMS = """SELECT first_row, count, sha256 FROM batches AS b WHERE NOT EXISTS
    (SELECT 1 FROM row_checksums AS r
     WHERE r.row >= b.first_row AND r.row < b.first_row + b.count)"""


@dataclass(frozen=True)
class IndexReport:
    """The result of an update.

    Attributes:
        new, changed: photos that were embedded, at a new or a known path.
        moved: photos found at another path, by their content.
        revived: missing photos that are back at their paths.
        missing: photos that were no longer found by this update. They are kept, but not among the
            hits.
        missing_in_all: all missing photos of the gallery.
        removed: photos that were removed permanently.
        unreadable: files below the given roots that could not be read, listed in
            `failures.jsonl`.
        partly_readable: searchable photos of which the end of the file is cut off or damaged.
        unchanged: photos that needed no work.
        live: searchable photos.
        regions: rows of regions of the searchable photos, in a gallery that keeps them.
        without_regions: photos of the gallery whose regions could not be embedded, because their
            files cannot be read or have changed.
        seconds: the duration of the update.
        left_out: files and folders that the rules left out, not counted in any of the above.
        left_out_now: those of `missing` that exist, but are left out since this update.
        rules: the rules of the walk.
        other_shards: photos below the roots that belong to other shards; 0 without shards.
        timings: seconds of each part: the embedder's timings, `walk_s` and `graph_s`.
        notices: sentences for the user.
        warnings: sentences about roots and folders whose photos are not found; see
            `absent.AbsentPhotos.losses`.
    """

    new: int
    changed: int
    moved: int
    revived: int
    missing: int
    missing_in_all: int
    removed: int
    unreadable: int
    unchanged: int
    live: int
    seconds: float
    partly_readable: int = 0
    regions: int = 0
    without_regions: int = 0
    left_out: tuple[LeftOutCount, ...] = ()
    left_out_now: int = 0
    rules: WalkRules = DEFAULT_RULES
    other_shards: int = 0
    timings: dict[str, float] = field(default_factory=dict)
    notices: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


def update_gallery(
    folder: Path,
    roots: Sequence[Path],
    embedder: Embedder,
    *,
    progress: Progress = lambda done, total, rate: None,
    notify: Notify = no_notify,
    commit_every: int = 256,
    checksum: bool = False,
    bits: int | None = None,
    rule_change: RuleChange = _NO_CHANGE,
    on_engine: OnEngine = lambda info: None,
    shard: PhotoShard | None = None,
    publish_every_s: float | None = None,
    regions: int | None = None,
) -> IndexReport:
    """Create or update a gallery with the photos below `roots`; its other photos are kept.

    Args:
        folder: the gallery; created if it does not exist.
        roots: folders and files. Those that do not exist must be known to the gallery.
        embedder: of the gallery's model.
        progress: called after every photo.
        notify: called with a sentence before a step that takes long.
        commit_every: photos between two commits.
        checksum: detect changes by content, not by size and times.
        bits: create a binary gallery with codes of so many bits, instead of embeddings. `None`
            accepts whatever an existing gallery has.
        rule_change: changes of the rules of what to leave out, stored in the gallery.
        on_engine: called with the engine in use before the first photo is embedded; not called
            when there is nothing to embed.
        shard: create a gallery of this part of the photos only. `None` accepts whatever an
            existing gallery holds. Paths are relative to the outermost root, current or earlier.
        publish_every_s: also publish generations while photos are embedded, so many seconds apart
            or more, so that publishing takes at most a tenth of the time. A new gallery is
            published empty at once. By default, one generation is published at the end.
        regions: keep so many regions of each photo as well, see `regions.grid_of`; those of photos
            that are in the gallery are embedded too. `None` accepts what the gallery keeps.

    Raises:
        BadConfig: a pattern of `rule_change` is malformed, there is no grid of so many regions, or
            regions were asked for in a binary gallery.
        BadData: there is no photo below the roots.
        BadModel: the embedder's bundle has no codes of so many bits, or embeds no regions.
        BadGallery: the folder is not a gallery or cannot be written, no photo could be read, or
            `bits`, `shard` or `regions` does not match the gallery.
        GalleryBusy: another process is writing to it.
        ModelMismatch: another model made it.
        DiskFull: there is no space left; what was committed is kept.
        InternalError: the counts are inconsistent; nothing was published.
    """
    absolute = roots_to_walk(folder, roots)
    grid = None if regions is None else grid_of(regions)
    if grid is not None and bits is not None:
        raise BadConfig(
            f"{len(grid)} regions a photo in a gallery of {bits}-bit codes",
            "regions in a gallery of embeddings",
            "leave out --bits or --regions",
        )
    if not (folder / CATALOGUE_NAME).exists():  # an existing gallery has rules of its own
        refuse_nothing(absolute, rule_change.applied_to(WalkRules()))
        require_codes(folder, embedder.bundle, bits)
        _ = embedder.engine  # no folder is made if the engine cannot be opened
        if grid is not None:
            embedder.open_regions(grid)
    with translate_os_errors(folder):
        make_folder(folder)
        with WriterLock(folder / LOCK_NAME):
            return _Update(
                *(folder, absolute, embedder, progress, notify, commit_every, checksum, bits),
                *(rule_change, on_engine, shard, publish_every_s, regions),
            ).run()


@dataclass
class _Update:
    """One update, under the writer's lock, with the arguments of `update_gallery`."""

    folder: Path
    roots: list[str]
    embedder: Embedder
    progress: Progress
    notify: Notify
    commit_every: int
    checksum: bool
    bits: int | None
    rule_change: RuleChange
    on_engine: OnEngine
    shard: PhotoShard | None
    publish_every_s: float | None
    regions: int | None

    def __post_init__(self) -> None:
        self._catalogue: Catalogue
        self._origin: Origin
        self._itq: Itq | None
        self._vectors: Vectors | CodeShards
        self._grid: RegionGrid | None
        self._rules: WalkRules
        self._known_roots: list[str]
        self._published: GalleryManifest | None = None
        self._publish_from = time.monotonic()
        self._notices: list[str] = []
        self._timings_before = asdict(self.embedder.timings)

    def run(self) -> IndexReport:
        started = time.perf_counter()
        remove_stale_temporaries(self.folder)
        if (self.folder / MANIFEST_NAME).exists():
            self._published = published_manifest(self.folder)
        known = 0 if self._published is None else self._published.generation
        with Catalogue(self.folder, known + 1) as catalogue:
            self._catalogue = catalogue
            self._take_rules()
            self._origin, self._itq = initialize_gallery(
                self.folder, catalogue, self.embedder, self.bits, self.roots, self.shard
            )
            self._grid = self._take_regions()
            catalogue.record_roots(map(os.fsencode, self.roots))
            self._vectors = open_rows(self.folder, self._origin.dim, self._origin.bits)
            self._leave_codes_of_other_rows()
            vacuum(self.folder, catalogue, self._vectors, self._published)
            self._drop_lost()
            self._add_checksums()
            self._share_rows()
            if self._published is None and self.publish_every_s is not None:
                self._publish_between()
            own = os.path.abspath(self.folder)  # noqa: PTH100
            changes = Changes(
                *(catalogue, self.roots, walk(self.roots, self._rules, self._known_roots, own)),
                checksum=self.checksum,
                shard=self._origin.shard,
                progress=self.progress,
            )
            # Photos behind a link are below it, as if the link were a root.
            catalogue.record_roots(map(os.fsencode, changes.followed))
            self._note_walk(changes)
            if merged := catalogue.shards_of_folders():  # of what is indexed it now has all photos
                roots = frozenset(map(os.fsencode, self.roots))
                divided = {path: merged[path] for path in merged if not roots_above(path, roots)}
                catalogue.record_shards(divided)
            changes.settle()
            walk_s = time.perf_counter() - started
            self._embed(changes)
            add_dates(catalogue, lambda count: self.progress(count, None, 0.0))
            left_out_now = changes.absent.lost_though_there()
            losses = changes.losses()
            missing = catalogue.lose(changes.absent.lost())
            # Afterwards, as those of lost photos cannot be embedded.
            without_regions = self._add_regions()
            changes.record_skipped()
            changes.check_accounts()
            write_failures(self.folder, catalogue)
            is_empty_shard = changes.other_shards and not changes.walked
            if (
                not catalogue.live()
                and not is_empty_shard
                and (changes.walked or not catalogue.missing())
                # Otherwise a disk is missing, and a warning says so.
                and not any(loss.lost for loss in losses)
            ):
                raise BadGallery(
                    f"0 of {changes.walked + changes.skipped:,} files could be read",
                    "at least one photo; no gallery was published",
                    f"the reasons are in {printable_name(self.folder / FAILURES_NAME)}",
                )
            graph_started = time.perf_counter()
            self._publish()
            ended = time.perf_counter()
            return IndexReport(
                new=changes.new,
                changed=changes.changed,
                moved=changes.absent.moved,
                revived=changes.revived,
                missing=missing,
                missing_in_all=catalogue.missing(),
                removed=changes.absent.replaced,
                unreadable=changes.unreadable,
                unchanged=changes.unchanged,
                live=catalogue.live(),
                seconds=ended - started,
                partly_readable=catalogue.partly_readable(),
                regions=0 if self._grid is None else catalogue.live_region_rows(),
                without_regions=without_regions,
                left_out=changes.left_out.counts(),
                left_out_now=left_out_now,
                rules=self._rules,
                other_shards=changes.other_shards,
                timings=self._timings() | {"walk_s": walk_s, "graph_s": ended - graph_started},
                notices=tuple(self._notices),
                warnings=tuple(loss.warning(self.folder) for loss in losses),
            )

    def _open_engine(self) -> None:
        info = self.embedder.engine.info
        self.on_engine(info)
        if self._origin.precision != info.precision:
            self._notices.append(
                f"the gallery was made at {self._origin.precision}; new photos are embedded at "
                f"{info.precision}, which finds nearly the same"
            )

    def _take_rules(self) -> None:
        """Apply the change of rules, and check that they do not leave out everything."""
        self._rules = self.rule_change.applied_to(self._catalogue.rules())
        self._known_roots = [os.fsdecode(root) for root in self._catalogue.roots()]
        is_known = any(
            has_photos(self._catalogue.connection, os.fsencode(root)) for root in self.roots
        )
        refuse_nothing(self.roots, self._rules, self._known_roots, may_be_empty=is_known)
        self._catalogue.record_rules(self._rules)

    def _note_walk(self, changes: Changes) -> None:
        for path in changes.repeated:
            self._notices.append(
                f"{printable_name(path)} was walked by another path: its photos are indexed once"
            )
        for text in self.rule_change.exclude:
            if not text.startswith("!") and text not in changes.left_out.patterns:
                self._notices.append(
                    f"--exclude {shlex.quote(text)} excluded nothing: a pattern is relative to "
                    "the folders that are indexed, as in a .gitignore file there"
                )

    def _leave_codes_of_other_rows(self) -> None:
        """Rebuild codes, graph and neighbours if the catalogue is older, such as a backup.

        Rows that it does not list will be those of other photos. `vacuum` removes what is left, as
        this update may be killed.
        """
        published = self._published
        rows = self._catalogue.committed_rows()
        if published and published.codes and published.codes.rows > rows:
            self._notices.append(
                f"{CATALOGUE_NAME} has {rows:,} of {published.codes.rows:,} rows that were "
                "published, as if from a backup: what searches use is made again"
            )
            self._published = replace(published, codes=None, graph=None)
            (self.folder / NEIGHBOURS_NAME).unlink(missing_ok=True)

    def _drop_lost(self) -> None:
        intervals = self._vectors.missing(self._catalogue.committed_rows())
        for low, high in intervals:
            self._catalogue.forget_regions_at(low, high)  # which are then embedded again
        lost = sum(self._catalogue.remove_at_rows(low, high) for low, high in intervals)
        if lost:
            self._notices.append(
                f"the embeddings of {count_text(lost, 'photo')} were lost: those in the given "
                "folders are embedded again"
            )

    def _add_checksums(self) -> None:
        """Store the checksums of intact rows that older versions wrote."""
        with values_checked(self._catalogue.path):
            found = self._catalogue.connection.execute(_WITHOUT_CHECKSUMS).fetchall()
            batches = [
                Batch(integer(first), integer(n), blob(sha).hex()) for first, n, sha in found
            ]
        for batch in batches:
            if self._vectors.is_intact(batch):
                rows = np.arange(batch.first_row, batch.first_row + batch.count)
                content, _ = self._vectors.read_bytes(rows)
                crc32s = [zlib.crc32(row) for row in content]
                self._catalogue.store_checksums(batch.first_row, crc32s)

    def _share_rows(self) -> None:
        """Let identical photos share an embedding; older versions stored one for each."""
        if shared := self._catalogue.share_rows(self._first_intact):
            self._notices.append(f"{shared:,} photos now share the embedding of an identical one")

    def _first_intact(self, rows: list[int]) -> int | None:
        """Return the first row that matches its checksum; `None` if there is none."""
        known = self._catalogue.checksums(rows)
        content, is_whole = self._vectors.read_bytes(np.array(rows, dtype=np.int64))
        for row, data, whole in zip(rows, content, is_whole, strict=True):
            if whole and known.get(row) == zlib.crc32(data):
                return row
        return None

    def _timings(self) -> dict[str, float]:
        """Return the share of this update in the embedder's timings."""
        now = asdict(self.embedder.timings)
        return {name: now[name] - before for name, before in self._timings_before.items()}

    def _is_publication_due(self) -> bool:
        return self.publish_every_s is not None and time.monotonic() >= self._publish_from

    def _publish(self) -> GalleryManifest:
        return publish(
            *(self.folder, self._catalogue, self._vectors, self._origin, self._published),
            self.notify,
        )

    def _publish_between(self) -> None:
        """Publish what is committed, and prepare the next generation."""
        assert self.publish_every_s is not None
        started = time.monotonic()
        self._published = self._publish()
        self._catalogue.generation = self._published.generation + 1
        ended = time.monotonic()
        pause_s = max(self.publish_every_s, (ended - started) / _MOST_PUBLISHING)
        # The first photos are worth most.
        self._publish_from = ended + (pause_s if self._catalogue.live() else 0)

    def _embed(self, changes: Changes) -> None:
        """Embed changed photos, and publish now and then if that was asked for."""
        if not changes.to_embed:
            return
        self._open_engine()
        with self.embedder.open_stream(self._grid) as stream:
            changes.embed(
                *(stream, self._vectors, self._itq),
                commit_every=self.commit_every,
                is_publication_due=self._is_publication_due,
                publish=self._publish_between,
            )

    def _take_regions(self) -> RegionGrid | None:
        """Return the grid of the gallery's regions, and make the gallery keep regions if asked to.

        Returns `None` if it keeps none.

        Raises:
            BadConfig: the gallery is binary.
            BadGallery: the gallery keeps another number of regions.
            BadModel: the model embeds no regions.
        """
        kept = self._catalogue.region_count()
        asked = self.regions
        if asked is None and kept is None:
            return None
        name = shlex.quote(printable_name(self.folder))
        if self._origin.bits is not None:
            raise BadConfig(
                f"{name} keeps {self._origin.bits}-bit codes",
                "regions in a gallery of embeddings",
                "make another: sbtk index PHOTOS --regions --gallery regions.sbtk",
            )
        if kept is not None and asked not in (None, kept):
            raise BadGallery(
                f"{name} keeps {kept} regions of each photo, not {asked}",
                "the same for all photos of a gallery, as it was made",
                f"sbtk index PHOTOS --regions {asked} --gallery regions-{asked}.sbtk",
            )
        grid = grid_of(kept or asked or 0)
        if kept is None:
            self.embedder.open_regions(grid)
            self._catalogue.keep_regions(len(grid))
        return grid

    def _add_regions(self) -> int:
        """Embed the regions of photos that are in the gallery without them; return how many failed.

        These are found by their whole frames. Photos that have changed since they were embedded
        fail, too.
        """
        if self._grid is None:
            return 0
        wanted = self._catalogue.photos_without_regions()
        if not wanted:
            return 0
        self._open_engine()
        self.notify(f"embedding the regions of {count_text(len(wanted), 'photo')} of the gallery")
        done: list[Embedded] = []
        rows: list[int] = []
        left = 0
        paths = (Path(os.fsdecode(path)) for path, _, _ in wanted)
        started = time.perf_counter()
        with (
            self.embedder.open_stream(self._grid) as stream,
            closing(stream.embed(paths, "photo")) as items,
        ):
            try:
                for count, item in enumerate(items, start=1):
                    _, sha256, row = wanted[count - 1]
                    if isinstance(item, Embedded) and item.source.sha256 == sha256:
                        done.append(item)
                        rows.append(row)
                    else:
                        left += 1
                    if len(done) >= self.commit_every:
                        self._commit_regions(done, rows)
                    self.progress(count, len(wanted), count / (time.perf_counter() - started))
            except KeyboardInterrupt:
                self._commit_regions(done, rows)
                raise
        self._commit_regions(done, rows)
        if left:
            self._notices.append(
                f"the regions of {count_text(left, 'photo')} could not be embedded: these are "
                "found by their whole frames, and the next 'sbtk index' tries again"
            )
        return left

    def _commit_regions(self, done: list[Embedded], rows: list[int]) -> None:
        """Write the regions of the photos at `rows`, and empty both lists."""
        if not done:
            return
        assert isinstance(self._vectors, Vectors)
        first_row = self._catalogue.committed_rows()
        embeddings = np.concatenate([item.regions for item in done if item.regions is not None])
        batches = self._vectors.append(first_row, embeddings) if len(embeddings) else []
        regions = place_regions(done, rows, first_row)
        self._catalogue.commit((), (), batches, regions, sum_regions(done))
        done.clear()
        rows.clear()


def add_dates(catalogue: Catalogue, progress: Callable[[int], None]) -> None:
    """Read the dates of photos whose dates are not known, and commit them in batches.

    Photos that have changed since they were embedded are left out; the next update has their dates.

    Args:
        catalogue: the gallery's.
        progress: called with the number of photos after each full batch; what it raises ends the
            work.
    """
    last = -1
    count = 0
    with ThreadPoolExecutor(_DATE_THREADS, thread_name_prefix="sbtk-dates") as threads:
        while True:
            with catalogue_errors(catalogue.path):
                found = catalogue.connection.execute(_UNDATED, (last, _DATES_PAGE)).fetchall()
            if not found:
                return
            last = integer(found[-1][0])
            dates = [date for date in threads.map(_read_date, found) if date is not None]
            catalogue.store_dates(dates)
            count += len(found)
            if len(found) < _DATES_PAGE:
                return
            progress(count)


def _read_date(found: tuple[object, ...]) -> tuple[int, str | None] | None:
    """Return row and date of a photo; `None` if its file is not the one that was embedded."""
    row, path, size_bytes, mtime_ns = found
    try:
        with os.fdopen(open_regular(Path(os.fsdecode(blob(path)))), "rb") as file:
            status = os.fstat(file.fileno())
            if (status.st_size, status.st_mtime_ns) != (size_bytes, mtime_ns):
                return None
            taken = read_taken(file)
    except OSError:
        return None
    return integer(row), None if taken is None else taken.isoformat()
