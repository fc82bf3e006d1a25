"""A collection in a database, searched like a gallery on disk."""

from __future__ import annotations

import itertools
import operator
import os
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

import numpy as np

from sbtk_runtime.binary_codes import Codes
from sbtk_runtime.errors import BadConfig, BadData, BadGallery, BadRegion, ModelMismatch, SbtkError
from sbtk_runtime.files import count_text, printable_name
from sbtk_runtime.gallery.catalogue import Photo
from sbtk_runtime.gallery.folder import FolderCount
from sbtk_runtime.gallery.photo_filter import EVER, Period, PhotoFilter
from sbtk_runtime.gallery.queries import (
    Answer,
    Box,
    Copy,
    Hit,
    PhotoCopies,
    Queries,
    Search,
    check_search,
    count_compared,
    few_notices,
    page_of,
    undated_notice,
)
from sbtk_runtime.gallery.region_search import (
    best_place,
    common_part,
    require_within,
)
from sbtk_runtime.gallery.remote import (
    EVERY_PHOTO,
    MOST_COUNTED,
    RemoteFilter,
    RemotePhoto,
    RemoteQuery,
    RemoteReader,
    RemoteState,
    open_store,
)
from sbtk_runtime.gallery.remote_sources import Mounts, shown_source
from sbtk_runtime.gallery.rows import Embeddings, unit_row
from sbtk_runtime.manifest import GalleryManifest, MatchRule, RegionsRecord
from sbtk_runtime.rerank import Rerank, refine, require_rerank

if TYPE_CHECKING:
    from sbtk_runtime.bundle import Bundle
    from sbtk_runtime.embedding.embedder import Embedder

#: How long the state of a collection is used before it is read again.
_FRESH_S = 5.0
#: Photos beyond those wanted, of which some are copies of others.
_SPARE = 10
_MOST_CANDIDATES = 10_000
_PAGE = 200

#: A photo, its score, and the region that was found.
_Found = tuple[RemotePhoto, float, Box | None]


class RemoteGallery(Queries):
    """A collection that `sbtk push` has filled; any number of threads may search it.

    Paths of hits are absolute where the photos of a source are mounted, else "source:", its name
    and the path below it.

    >>> with RemoteGallery.open("postgresql://me@db/photos") as gallery:  # doctest: +SKIP
    ...     hits = gallery.query("sketch.png", embedder, k=5)

    Attributes:
        name: the collection's address, without the password.
        collection: its name there.
        notices: sentences for the user, which searches add to.
        problem: why the collection's state could not be read; `None` if it could.
    """

    def __init__(
        self,
        name: str,
        collection: str,
        reader: RemoteReader,
        photos: Mapping[str, Path | str] | None = None,
    ) -> None:
        """Take over an open reader; use `RemoteGallery.open`."""
        self.name = name
        self.collection = collection
        self.notices: list[str] = []
        self.problem: SbtkError | None = None
        self._reader = reader
        self._lock = threading.Lock()
        self._state = reader.state()
        self._read_s = time.monotonic()
        self._mounts = Mounts.of(photos or {}, {part.source for part in self._state.parts}, name)

    @classmethod
    def open(
        cls,
        url: str,
        photos: Mapping[str, Path | str] | None = None,
        *,
        patience_s: float = 5.0,
    ) -> Self:
        """Return the collection at a URL such as `postgresql://user@host/database`.

        Args:
            url: with `?collection=NAME` for another collection than `sbtk`; the password may be in
                PGPASSWORD or ~/.pgpass instead.
            photos: the folders in which the photos of sources are mounted here, by source.
            patience_s: for how long requests to a database that does not answer are repeated.

        Raises:
            BadConfig: the URL cannot be used, or there is no such source.
            RemoteError: the database does not answer, refuses, or has no such collection.
        """
        store = open_store(url, patience_s=patience_s)
        reader = store.reader()
        try:
            return cls(store.address.shown, store.address.collection, reader, photos)
        except BaseException:
            reader.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __len__(self) -> int:
        return self.count

    def __bool__(self) -> bool:
        """Return true: an open gallery is one, also without photos."""
        return True

    @property
    def count(self) -> int:
        """The number of photos that can be found."""
        return self._current().count

    @property
    def unusable(self) -> int:
        """The number of photos that cannot be found: 0, as damaged ones are not pushed."""
        return 0

    @property
    def manifest(self) -> GalleryManifest:
        """The model, and the generation, which grows with each push, as they were last known."""
        state = self._state
        info = state.info
        return GalleryManifest(
            generation=state.generation,
            model_id=info.model_id,
            precision=info.precision,
            dim=info.dim,
            preprocessing=info.preprocessing,
            live=state.count,
            bits=info.bits,
            regions=None if info.regions is None else RegionsRecord(info.regions, state.regions),
        )

    def sources(self) -> dict[str, int]:
        """Return the number of photos of each source."""
        counts: dict[str, int] = {}
        for part in self._current().parts:
            counts[part.source] = counts.get(part.source, 0) + part.photos
        return counts

    def close(self) -> None:
        """Close all connections."""
        self._reader.close()

    def require_bundle(self, bundle: Bundle) -> None:
        """Make sure that a bundle's model made the collection.

        Raises:
            ModelMismatch: another one did; names both.
        """
        info = self._current().info
        ours, preprocessing = bundle.manifest.model_id, bundle.manifest.preprocessing
        if (info.model_id, info.preprocessing) != (ours, preprocessing):
            raise ModelMismatch(
                f"the model {ours}, preprocessing {preprocessing}, did not make {self.name}",
                f"{info.model_id}, preprocessing {info.preprocessing}, which made it",
                "name the model that made it (--model), or another collection",
            )

    def answer(
        self,
        embedding: Embeddings | Codes,
        k: int = 10,
        search: Search = "auto",
        *,
        under: Path | str | None = None,
        taken: Period | None = None,
        fold: bool = True,
        rerank: Rerank = "none",
        offset: int = 0,
        match_rule: MatchRule | None = None,
        regions: bool = True,
    ) -> Answer:
        """Return what `search` finds for `embedding (D,) float32`, and the notices about it."""
        self._check_query(k, search, offset, rerank)
        photos = PhotoFilter.of(under, taken)
        among = self._among(under, photos)
        query = self._query_of(embedding)
        answer = self._answer(
            query, k, search, among, photos, fold=fold, offset=offset, regions=regions
        )
        if match_rule is not None and answer.hits and self._state.info.bits is None:
            assert among is not None
            parts = self._state.regions if regions else 0
            compared = count_compared(self._count(among), parts, self.count)
            closest = None if offset else answer.hits[0].score
            return answer.judged(closest, match_rule, compared)
        return answer

    def similar(
        self,
        photo_id: int,
        k: int = 10,
        search: Search = "auto",
        *,
        under: Path | str | None = None,
        taken: Period | None = None,
        fold: bool = True,
        rerank: Rerank = "none",
        offset: int = 0,
        regions: bool = True,
        region: Box | None = None,
    ) -> Answer:
        """Return the photos most like one of the gallery, or like a part of it, without it.

        Raises:
            BadData: there is no such photo.
            BadRegion: it has no regions, or `region` is not within it.
        """
        self._check_query(k, search, offset, rerank)
        photos = PhotoFilter.of(under, taken)
        if region is not None:
            require_within(region)
        photo = self.photo(photo_id)
        if photo is None:
            raise BadData(f"the gallery has no photo {photo_id}", "the id of a hit")
        query: RemoteQuery = photo_id
        if region is not None:
            query = self._region(photo_id, region)
        elif regions and self._state.info.regions is not None:
            query = self._embeddings([photo_id])[0]
        return self._answer(
            *(query, k, search, self._among(under, photos), photos),
            fold=fold,
            offset=offset,
            left_out=photo,
            regions=regions,
        )

    def refined(
        self, query: Embeddings | None, liked: Sequence[int], disliked: Sequence[int]
    ) -> Embeddings:
        """Return a query `(D,) float32` that takes feedback into account; see `Gallery.refined`.

        Raises:
            BadConfig: it is a collection of codes, or there is neither a query nor anything liked.
            BadData: there is no such photo.
        """
        if self._current().info.bits is not None:
            raise BadConfig("feedback in a binary gallery", "a gallery of embeddings")
        return refine(query, self._embeddings(liked), self._embeddings(disliked))

    def _embeddings(self, ids: Sequence[int]) -> Embeddings:
        """Return the embeddings `(N, D) float32` of photos."""
        kept = self._reader.embeddings(ids) if ids else {}
        for number in ids:
            if number not in kept:
                raise BadData(f"the gallery has no photo {number}", "the id of a hit")
        rows = [unit_row(kept[number], self._state.info.dim) for number in ids]
        return np.array(rows, dtype=np.float32).reshape(len(ids), self._state.info.dim)

    def _region(self, photo_id: int, box: Box) -> Embeddings:
        """Return the embedding `(D,) float32` of the region of a photo that covers `box` best."""
        info = self._state.info
        if info.regions is None:
            raise BadRegion(
                f"{self.name} keeps whole frames only",
                "a collection with regions",
                "sbtk index PHOTOS --regions, then push to another collection",
            )
        kept = self._reader.regions(photo_id)
        if not len(kept.boxes):
            raise BadRegion(
                "a region of a photo that is kept as a whole frame only",
                "a photo of 224 x 224 pixels or more",
            )
        return unit_row(kept.rows[best_place(kept.boxes, box)], info.dim)

    def photo(self, photo_id: int) -> Photo | None:
        """Return what is known of the photo with that id; `None` if there is none."""
        if not 0 < operator.index(photo_id) < 1 << 63:
            return None
        found = self._reader.photos(ids=[int(photo_id)])
        return self._photo(found[0]) if found else None

    def recent(
        self,
        limit: int = 24,
        offset: int = 0,
        *,
        under: Path | str | None = None,
        taken: Period | None = None,
    ) -> list[PhotoCopies]:
        """Return photos by modification time, newest first; see `Gallery.recent`."""
        limit, offset = page_of(limit, offset)
        among = self._among(under, PhotoFilter.of(under, taken))
        if among is None:
            return []
        seen: dict[str, RemotePhoto] = {}
        start = 0
        while len(seen) < offset + limit:
            page = self._reader.photos(among=among, limit=_PAGE, offset=start)
            for photo in page:
                seen.setdefault(photo.sha256, photo)
            start += len(page)
            if len(page) < _PAGE:
                break
        chosen = list(seen.values())[offset : offset + limit]
        copies = self._copies([photo.sha256 for photo in chosen], among)
        return [
            PhotoCopies(
                self._photo(photo),
                tuple(self._copy(one) for one in copies[photo.sha256] if one.id != photo.id),
            )
            for photo in chosen
        ]

    def folders(self) -> dict[str, int]:
        """Return the number of photos directly in each folder, sorted by path.

        Of sources with many folders only the fullest ones are there.
        """
        counts: dict[str, int] = {}
        for part in self._current().parts:
            for folder, count in part.folders.items():
                path = self._mounts.path(part.source, folder).rstrip("/") or "/"
                counts[path] = counts.get(path, 0) + count
        return dict(sorted(counts.items()))

    def source_folders(self) -> list[FolderCount]:
        """Return each source as the folder in which its photos are mounted, by path.

        A source that is not mounted here is a folder of its name, which does not exist.
        """
        found = []
        for source, count in self.sources().items():
            mount = self._mounts.folders.get(source)
            exists = mount is not None and os.path.isdir(mount)  # noqa: PTH112
            path = os.fsencode(shown_source(source)) if mount is None else mount
            found.append(FolderCount(path, count, 0, exists))
        return sorted(found, key=lambda folder: folder.path)

    def roots(self) -> list[str]:
        """Return the folders in which photos are mounted here."""
        return [os.fsdecode(folder) for folder in self._mounts.folders.values()]

    def unmounted(self) -> list[str]:
        """Return the sources whose photos are not mounted here."""
        return sorted(set(self.sources()) - set(self._mounts.folders))

    def _require_model(self, embedder: Embedder) -> None:
        self.require_bundle(embedder.bundle)

    def _current(self) -> RemoteState:
        with self._lock:
            if time.monotonic() - self._read_s > _FRESH_S:
                try:
                    self._state = self._reader.state()
                except SbtkError as problem:
                    self.problem = problem
                    raise
                self.problem = None
                self._read_s = time.monotonic()
            return self._state

    def _check_query(self, k: int, search: Search, offset: int, rerank: Rerank) -> None:
        check_search(k, search, offset)
        if search == "codes":
            raise BadConfig(
                "a collection has no sign codes", "auto, exact or hnsw", "--search auto"
            )
        require_rerank(rerank)
        if rerank != "none":
            raise BadConfig(
                f"--rerank {rerank} of a collection", "a gallery on disk, or --rerank none"
            )
        if not self.count:
            raise BadGallery(f"{self.name} has no photos", "at least one", "sbtk push GALLERY")

    def _query_of(self, embedding: Embeddings | Codes) -> RemoteQuery:
        info = self._state.info
        if info.itq is None:
            return unit_row(embedding, info.dim)
        if embedding.dtype != np.uint8:
            return np.asarray(info.itq.codes(unit_row(embedding, info.dim)[None])[0])
        if embedding.shape != (info.itq.bits // 8,):
            raise BadData(
                f"a code of shape {embedding.shape}",
                f"({info.itq.bits // 8},) uint8: {info.itq.bits} bits, packed",
            )
        return embedding

    def _answer(
        self,
        query: RemoteQuery,
        k: int,
        search: Search,
        among: RemoteFilter | None,
        photos: PhotoFilter,
        *,
        fold: bool,
        offset: int,
        left_out: Photo | None = None,
        regions: bool = True,
    ) -> Answer:
        if among is None:
            return Answer([], few_notices(0, 0, k, photos))
        wanted = offset + k
        count = wanted + _SPARE
        exact = search == "exact"
        while True:
            whole = self._reader.search(query, count, among, exact=exact)
            found: list[_Found] = [(photo, score, None) for photo, score in whole]
            if regions and self._state.info.regions is not None:
                found = self._improved(found, query, count, among, exact=exact)
            ranked = _ranked(found, left_out, fold=fold)
            is_all = len(whole) < count
            if len(ranked) >= wanted or (is_all and exact) or count >= _MOST_CANDIDATES:
                break
            if is_all:
                exact = True  # an index may find fewer than there are
            else:
                count = min(4 * count, _MOST_CANDIDATES)
        chosen = ranked[offset:wanted]
        copies = self._copies([photo.sha256 for photo, *_ in chosen], among) if fold else {}
        hits = []
        for rank, (photo, score, region) in enumerate(chosen, start=offset + 1):
            first, *others = copies.get(photo.sha256) or [photo]
            others_ = tuple(map(self._copy, others))
            path = self._path_of(first)
            hits.append(Hit(rank, score, first.id, path, others_, region=region))
        few: tuple[str, ...] = ()
        if len(hits) < k:
            own = left_out is not None
            few = few_notices(offset + len(hits) + own, len(found), wanted + own, photos)
        return Answer(hits, (*few, *self._date_notices(among, photos)))

    def _improved(
        self,
        found: list[_Found],
        query: RemoteQuery,
        count: int,
        among: RemoteFilter,
        *,
        exact: bool,
    ) -> list[_Found]:
        """Return the `count` best photos by whole frame or region; see `region_search`."""
        assert not isinstance(query, int)
        common = common_part(self._state.region_mean())
        turned = unit_row(query, self._state.info.dim) - common
        parts = self._reader.search_regions(turned, count, among, exact=exact)
        if len(parts) < count and not exact:  # several regions are of one photo
            parts = self._reader.search_regions(turned, count, among, exact=True)
        best: dict[int, _Found] = {}
        for one in sorted([*found, *parts], key=lambda one: -one[1]):
            best.setdefault(one[0].id, one)
        return [(photo, min(score, 1.0), box) for photo, score, box in best.values()][:count]

    def _copies(self, sha256s: Sequence[str], among: RemoteFilter) -> dict[str, list[RemotePhoto]]:
        """Return the photos of each content, by id."""
        copies: dict[str, list[RemotePhoto]] = {sha256: [] for sha256 in sha256s}
        if sha256s:
            for photo in self._reader.photos(sha256s=list(copies), among=among):
                copies[photo.sha256].append(photo)
        return copies

    def _among(self, under: Path | str | None, photos: PhotoFilter) -> RemoteFilter | None:
        """Return the filter there of photos here; `None` if the folder is in no source.

        Raises:
            BadConfig: photos of a period of a collection that has not all of their dates.
        """
        place = EVERY_PHOTO if under is None else self._mounts.place(under, self.sources())
        if place is None or not photos.has_period:
            return place
        undated = {
            part.source
            for part in self._current().parts
            if not part.has_dates
            and (not place.places or part.source in {one.source for one in place.places})
        }
        if undated:
            names = ", ".join(map(printable_name, sorted(undated)[:10]))
            raise BadConfig(
                f"photos{photos.text}, and an older sbtk pushed {names} without dates",
                "photos whose dates were pushed",
                f"sbtk push GALLERY again, of each of these sources, to {self.name}",
            )
        return replace(place, period=photos.period)

    def _date_notices(self, among: RemoteFilter, photos: PhotoFilter) -> tuple[str, ...]:
        """Return how many photos of a period are there by the times of their files."""
        undated = self._reader.count(among, undated=True) if photos.has_period else 0
        if not undated:
            return ()
        is_most = undated == MOST_COUNTED
        shown = f"{undated:,} or more photos" if is_most else count_text(undated, "photo")
        return (undated_notice(shown, photos),)

    def _count(self, among: RemoteFilter) -> int:
        """Return the number of photos; fewer where not all folders are known."""
        state = self._current()
        if among.period != EVER:
            return self._reader.count(among)
        if not among.places:
            return state.count
        total = 0
        for place, part in itertools.product(among.places, state.parts):
            if part.source != place.source:
                continue
            interval = place.interval()
            total += (
                part.photos
                if interval is None
                else sum(
                    count
                    for folder, count in part.folders.items()
                    if interval[0] <= f"{folder}/" < interval[1]
                )
            )
        return total

    def _photo(self, photo: RemotePhoto) -> Photo:
        return Photo(
            photo.id,
            self._path_of(photo),
            photo.size_bytes,
            photo.mtime_ns,
            photo.sha256,
            row=0,
            partial=photo.partial,
        )

    def _copy(self, photo: RemotePhoto) -> Copy:
        return Copy(photo.id, self._path_of(photo))

    def _path_of(self, photo: RemotePhoto) -> str:
        return self._mounts.path(photo.source, photo.path)


def _ranked(found: Sequence[_Found], left_out: Photo | None, *, fold: bool) -> list[_Found]:
    """Return the photos that are hits, best first; folded, one of each content."""
    if left_out is not None:
        found = [
            (photo, score, region)
            for photo, score, region in found
            if photo.id != left_out.id and not (fold and photo.sha256 == left_out.sha256)
        ]
    if not fold:
        return list(found)
    first: dict[str, _Found] = {}
    for one in found:
        first.setdefault(one[0].sha256, one)
    return list(first.values())
