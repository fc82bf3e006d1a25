"""Create and update galleries: only changes are embedded, and a kill loses at most one batch.

A commit writes vectors, then fsyncs, then writes the catalogue. A generation is published by sign
codes, the graph and, last of all, the manifest; until then readers see the previous generation.
"""

from __future__ import annotations

import os
import shlex
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from sbtk_runtime.binary_codes import Itq
from sbtk_runtime.embedding.embedder import Embedder
from sbtk_runtime.engines.base import EngineInfo, Notify, no_notify
from sbtk_runtime.errors import BadConfig, BadGallery
from sbtk_runtime.files import WriterLock, count_text, printable_name, remove_stale_temporaries
from sbtk_runtime.gallery.backfill import (
    add_checksums,
    add_dates,
    add_regions,
    share_rows,
    take_regions,
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
from sbtk_runtime.gallery.rows import CodeShards, Shards, Vectors
from sbtk_runtime.gallery.schema import CATALOGUE_NAME
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
            update = _Update(
                *(folder, absolute, embedder, progress, notify),
                *(commit_every, on_engine, publish_every_s),
            )
            return update.run(checksum, bits, rule_change, shard, regions)


class _Update:
    """One update, under the writer's lock."""

    def __init__(
        self,
        folder: Path,
        roots: list[str],
        embedder: Embedder,
        progress: Progress,
        notify: Notify,
        commit_every: int,
        on_engine: OnEngine,
        publish_every_s: float | None,
    ) -> None:
        self._folder = folder
        self._roots = roots
        self._embedder = embedder
        self._progress = progress
        self._commit_every = commit_every
        self._notices: list[str] = []
        self._notify = notify
        self._on_engine = on_engine
        self._publish_every_s = publish_every_s
        self._publish_from = time.monotonic()
        self._published: GalleryManifest | None = None
        self._itq: Itq | None = None
        self._grid: RegionGrid | None = None
        self._rules = WalkRules()
        self._known_roots: list[str] = []
        self._timings_before = asdict(embedder.timings)

    def run(
        self,
        checksum: bool,
        bits: int | None,
        rule_change: RuleChange,
        shard: PhotoShard | None,
        regions: int | None,
    ) -> IndexReport:
        started = time.perf_counter()
        folder = self._folder
        remove_stale_temporaries(folder)
        if (folder / MANIFEST_NAME).exists():
            self._published = published_manifest(folder)
        known = 0 if self._published is None else self._published.generation
        with Catalogue(folder, known + 1) as catalogue:
            self._take_rules(catalogue, rule_change)
            origin, self._itq = initialize_gallery(
                folder, catalogue, self._embedder, bits, self._roots, shard
            )
            self._grid = take_regions(folder, catalogue, origin, regions, self._embedder)
            catalogue.record_roots(map(os.fsencode, self._roots))
            vectors = open_rows(folder, origin.dim, origin.bits)
            self._leave_codes_of_other_rows(catalogue)
            vacuum(folder, catalogue, vectors, self._published)
            self._drop_lost(catalogue, vectors)
            add_checksums(catalogue, vectors)
            if shared := share_rows(catalogue, vectors):
                self._notices.append(
                    f"{shared:,} photos now share the embedding of an identical one"
                )
            if self._published is None and self._publish_every_s is not None:
                self._publish_between(catalogue, vectors, origin)
            own = os.path.abspath(folder)  # noqa: PTH100
            changes = Changes(
                *(catalogue, self._roots, walk(self._roots, self._rules, self._known_roots, own)),
                checksum=checksum,
                shard=origin.shard,
                progress=self._progress,
            )
            # Photos behind a link are below it, as if the link were a root.
            catalogue.record_roots(map(os.fsencode, changes.followed))
            self._note_walk(changes, rule_change)
            if merged := catalogue.shards_of_folders():  # of what is indexed it now has all photos
                roots = frozenset(map(os.fsencode, self._roots))
                divided = {path: merged[path] for path in merged if not roots_above(path, roots)}
                catalogue.record_shards(divided)
            changes.settle()
            walk_s = time.perf_counter() - started
            self._embed(catalogue, vectors, origin, changes)
            add_dates(catalogue, lambda count: self._progress(count, None, 0.0))
            left_out_now = changes.absent.lost_though_there()
            losses = changes.losses()
            missing = catalogue.lose(changes.absent.lost())
            # Afterwards, as those of lost photos cannot be embedded.
            without_regions = self._add_regions(catalogue, vectors, origin)
            changes.record_skipped()
            changes.check_accounts()
            write_failures(folder, catalogue)
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
                    f"the reasons are in {printable_name(folder / FAILURES_NAME)}",
                )
            graph_started = time.perf_counter()
            publish(folder, catalogue, vectors, origin, self._published, self._notify)
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
                warnings=tuple(loss.warning(folder) for loss in losses),
            )

    def _open_engine(self, origin: Origin) -> None:
        info = self._embedder.engine.info
        self._on_engine(info)
        if origin.precision != info.precision:
            self._notices.append(
                f"the gallery was made at {origin.precision}; new photos are embedded at "
                f"{info.precision}, which finds nearly the same"
            )

    def _take_rules(self, catalogue: Catalogue, rule_change: RuleChange) -> None:
        """Apply the change of rules, and check that they do not leave out everything."""
        self._rules = rule_change.applied_to(catalogue.rules())
        self._known_roots = [os.fsdecode(root) for root in catalogue.roots()]
        is_known = any(has_photos(catalogue.connection, os.fsencode(root)) for root in self._roots)
        refuse_nothing(self._roots, self._rules, self._known_roots, may_be_empty=is_known)
        catalogue.record_rules(self._rules)

    def _note_walk(self, changes: Changes, rule_change: RuleChange) -> None:
        for path in changes.repeated:
            self._notices.append(
                f"{printable_name(path)} was walked by another path: its photos are indexed once"
            )
        for text in rule_change.exclude:
            if not text.startswith("!") and text not in changes.left_out.patterns:
                self._notices.append(
                    f"--exclude {shlex.quote(text)} excluded nothing: a pattern is relative to "
                    "the folders that are indexed, as in a .gitignore file there"
                )

    def _leave_codes_of_other_rows(self, catalogue: Catalogue) -> None:
        """Rebuild codes, graph and neighbours if the catalogue is older, such as a backup.

        Rows that it does not list will be those of other photos. `vacuum` removes what is left, as
        this update may be killed.
        """
        published = self._published
        rows = catalogue.committed_rows()
        if published and published.codes and published.codes.rows > rows:
            self._notices.append(
                f"{CATALOGUE_NAME} has {rows:,} of {published.codes.rows:,} rows that were "
                "published, as if from a backup: what searches use is made again"
            )
            self._published = replace(published, codes=None, graph=None)
            (self._folder / NEIGHBOURS_NAME).unlink(missing_ok=True)

    def _drop_lost(self, catalogue: Catalogue, vectors: Shards) -> None:
        intervals = vectors.missing(catalogue.committed_rows())
        for low, high in intervals:
            catalogue.forget_regions_at(low, high)  # which are then embedded again
        lost = sum(catalogue.remove_at_rows(low, high) for low, high in intervals)
        if lost:
            self._notices.append(
                f"the embeddings of {count_text(lost, 'photo')} were lost: those in the given "
                "folders are embedded again"
            )

    def _timings(self) -> dict[str, float]:
        """Return the share of this update in the embedder's timings."""
        now = asdict(self._embedder.timings)
        return {name: now[name] - before for name, before in self._timings_before.items()}

    def _is_publication_due(self) -> bool:
        return self._publish_every_s is not None and time.monotonic() >= self._publish_from

    def _publish_between(
        self, catalogue: Catalogue, vectors: Vectors | CodeShards, origin: Origin
    ) -> None:
        """Publish what is committed, and prepare the next generation."""
        assert self._publish_every_s is not None
        started = time.monotonic()
        self._published = publish(
            self._folder, catalogue, vectors, origin, self._published, self._notify
        )
        catalogue.generation = self._published.generation + 1
        ended = time.monotonic()
        pause_s = max(self._publish_every_s, (ended - started) / _MOST_PUBLISHING)
        # The first photos are worth most.
        self._publish_from = ended + (pause_s if catalogue.live() else 0)

    def _embed(
        self,
        catalogue: Catalogue,
        vectors: Vectors | CodeShards,
        origin: Origin,
        changes: Changes,
    ) -> None:
        """Embed changed photos, and publish now and then if that was asked for."""
        if not changes.to_embed:
            return
        self._open_engine(origin)
        with self._embedder.open_stream(self._grid) as stream:
            changes.embed(
                *(stream, vectors, self._itq),
                commit_every=self._commit_every,
                is_publication_due=self._is_publication_due,
                publish=lambda: self._publish_between(catalogue, vectors, origin),
            )

    def _add_regions(
        self, catalogue: Catalogue, vectors: Vectors | CodeShards, origin: Origin
    ) -> int:
        """Embed the regions of photos that are in the gallery without them; return how many failed.

        These are found by their whole frames.
        """
        if self._grid is None or not isinstance(vectors, Vectors):
            return 0
        wanted = catalogue.photos_without_regions()
        if not wanted:
            return 0
        self._open_engine(origin)
        self._notify(f"embedding the regions of {count_text(len(wanted), 'photo')} of the gallery")
        with self._embedder.open_stream(self._grid) as stream:
            left = add_regions(
                *(catalogue, vectors, stream, wanted),
                commit_every=self._commit_every,
                progress=self._progress,
            )
        if left:
            self._notices.append(
                f"the regions of {count_text(left, 'photo')} could not be embedded: these are "
                "found by their whole frames, and the next 'sbtk index' tries again"
            )
        return left
