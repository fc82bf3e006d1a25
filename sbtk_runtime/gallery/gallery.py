"""A gallery, open for reading: answers embeddings with hits, from one generation."""

from __future__ import annotations

import contextlib
import operator
import os
import shlex
from collections.abc import Callable, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Self

import numpy as np
from numpy.typing import NDArray

from sbtk_runtime.binary_codes import Codes
from sbtk_runtime.errors import BadConfig, BadData, BadGallery, BadRegion
from sbtk_runtime.files import count_text, printable_name
from sbtk_runtime.gallery.catalogue import Photo
from sbtk_runtime.gallery.folder import (
    check_model,
    kept_text,
    open_rows,
    open_view,
    published_manifest,
)
from sbtk_runtime.gallery.photo_filter import Period, PhotoFilter
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
    note,
    page_of,
    undated_notice,
)
from sbtk_runtime.gallery.region_search import RERANKED, RegionSearch, require_within
from sbtk_runtime.gallery.row_check import REPAIR, RowCheck, UsableRows
from sbtk_runtime.gallery.rows import CodeShards, Embeddings, Rows, Vectors
from sbtk_runtime.gallery.search import CodeSearch, EmbeddingSearch, Scores, best_score
from sbtk_runtime.manifest import (
    MANIFEST_NAME,
    GalleryManifest,
    MatchRule,
    read_gallery_manifest,
)
from sbtk_runtime.rerank import AUTO_BELOW, AUTO_FROM, Rerank, refine, require_rerank

if TYPE_CHECKING:
    from sbtk_runtime.embedding.embedder import Embedder

__all__ = ["EXACT_BELOW", "Answer", "Copy", "Gallery", "Hit", "Photo", "Search"]

#: Below this number of photos scoring all of them takes no longer than people notice.
EXACT_BELOW = 20_000

_ATTEMPTS = 5


class Gallery(Queries):
    """A read-only snapshot of one generation of a gallery; any number of threads may search it.

    Open the gallery again to see what was indexed since.

    >>> with Gallery.open("gallery.sbtk") as gallery:
    ...     print(len(gallery), "photos by", gallery.manifest.model_id.partition("@")[0])
    6 photos by sbtknet-sketchy

    Attributes:
        folder: the gallery's.
        manifest: what the gallery holds, and the model that made it.
        notices: sentences for the user, which searches add to.
    """

    def __init__(self, folder: Path, manifest: GalleryManifest) -> None:
        """Open the state that `manifest` describes; use `Gallery.open`."""
        self.folder = folder
        self.manifest = manifest
        self.notices: list[str] = []
        self._faults: list[str] = []
        # Not a method, which would hold the gallery: see `UsableRows`.
        self._note_fault = partial(_note_both, self._faults, self.notices)
        with contextlib.ExitStack() as opened:
            self._view = opened.enter_context(
                closing(open_view(folder, manifest, self._note_fault))
            )
            self._check_catalogue()
            self._vectors = open_rows(folder, manifest.dim, manifest.bits)
            opened.enter_context(closing(self._vectors)).hold()
            self._check = RowCheck(self._view, self._vectors)
            self._usable = UsableRows(
                self._view, self._check, self.count, self._vectors, self._faults
            )
            self.notices += self._usable.notices()
            self._searched = self._searchable(self._vectors)
            self._regions = self._region_search()
            opened.pop_all()

    @classmethod
    def open(cls, folder: Path | str) -> Self:
        """Return the newest published generation of the gallery in `folder`.

        >>> Gallery.open("gallery.sbtk").manifest.generation
        1

        Raises:
            BadGallery: there is none, or it is damaged and cannot be read.
        """
        folder = Path(folder)
        for _ in range(_ATTEMPTS):
            manifest = published_manifest(folder)
            try:
                gallery = cls(folder, manifest)
            except (BadGallery, FileNotFoundError):
                # A writer may have published and removed old files in between.
                if read_gallery_manifest(folder) == manifest:
                    raise
                continue
            if read_gallery_manifest(folder) == manifest:
                return gallery
            gallery.close()
        raise BadGallery(f"{folder} changes faster than it can be read", "", "try again")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __len__(self) -> int:
        return self.manifest.live

    def __bool__(self) -> bool:
        """Return true, also for a gallery without photos."""
        return True

    @property
    def count(self) -> int:
        """The number of photos that can be found, as `len` returns it."""
        return len(self)

    @property
    def unusable(self) -> int:
        """The number of photos that cannot be found, because their embeddings are damaged."""
        return self._usable.unusable

    def close(self) -> None:
        """Close all files."""
        self._vectors.close()
        self._view.close()

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
        among = PhotoFilter.of(under, taken)
        hits, allowed, closest = self._intact_hits(
            embedding, k, search, among, fold=fold, rerank=rerank, offset=offset, regions=regions
        )
        few = few_notices(offset + len(hits), allowed, offset + k, among)
        answer = Answer(hits, (*self._all_faults(), *few, *self._date_notices(among)))
        if match_rule is not None and allowed and self.manifest.bits is None:
            compared = self._compared_regions(search, rerank) if regions else None
            parts = len(compared) if compared else 0
            photos = count_compared(allowed, parts, self.count)
            return answer.judged(closest, match_rule, photos)
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
        """Return the photos most like one of the gallery, without that photo.

        The query is the stored embedding or code of its whole frame, or of the region of the photo
        that covers `region` best. The other arguments are those of `answer`.

        >>> with Gallery.open("gallery.sbtk") as gallery:
        ...     print(len(gallery.similar(1, k=3).hits), "photos like", gallery.photo(1).path)
        3 photos like ...photos/0.jpg

        Raises:
            BadData: there is no such photo.
            BadRegion: it has no regions, or `region` is not within it.
            BadGallery: its embedding or code is damaged.
        """
        self._check_question(k, search, offset)
        photo, embedding = self._read(photo_id, region)
        among = PhotoFilter.of(under, taken)
        hits, allowed, _ = self._intact_hits(
            *(embedding, k, search, among),
            fold=fold,
            rerank=rerank,
            offset=offset,
            left_out=photo,
            regions=regions,
        )
        few: tuple[str, ...] = ()
        if len(hits) < k:
            few = few_notices(offset + len(hits) + 1, allowed, offset + k + 1, among)
        return Answer(hits, (*self._all_faults(), *few, *self._date_notices(among)))

    def refined(
        self, query: Embeddings | None, liked: Sequence[int], disliked: Sequence[int]
    ) -> Embeddings:
        """Return a query `(D,) float32` that takes feedback into account; see `rerank.refine`.

        >>> with Gallery.open("gallery.sbtk") as gallery:
        ...     query = gallery.refined(None, liked=[1, 2], disliked=[3])
        ...     hits = gallery.search(query, k=2)
        >>> query.shape
        (512,)

        Args:
            query: `(D,) float32`; `None` to start from what is liked.
            liked: ids of photos.
            disliked: ids of photos.

        Raises:
            BadConfig: it is a binary gallery, or there is neither a query nor anything liked.
            BadData: there is no such photo.
            BadGallery: its embedding is damaged.
        """
        if self.manifest.bits is not None:
            raise BadConfig("feedback in a binary gallery", "a gallery of embeddings")
        return refine(query, self._embeddings(liked), self._embeddings(disliked))

    def _embeddings(self, ids: Sequence[int]) -> Embeddings:
        """Return the embeddings `(N, D) float32` of photos."""
        found = np.empty((len(ids), self.manifest.dim), dtype=np.float32)
        for number, photo_id in enumerate(ids):
            found[number] = self._read(photo_id)[1]
        return found

    def _read(self, photo_id: int, region: Box | None = None) -> tuple[Photo, Embeddings | Codes]:
        """Return a photo, and its embedding or code, or that of a region."""
        photo = self.photo(photo_id)
        if photo is None:
            raise BadData(f"the gallery has no photo {photo_id}", "the id of a hit")
        row = np.array([photo.row if region is None else self._region_row(photo, region)])
        rows, is_whole = self._vectors.read(row)
        if not (is_whole[0] and self._check.is_hit_intact(row)[0]):
            raise BadGallery(
                f"the embedding of photo {photo_id} "
                f"{'cannot be read' if self._vectors.remedy else 'is damaged'}",
                "",
                self._vectors.remedy or REPAIR,
            )
        return photo, rows[0]

    def photo(self, photo_id: int) -> Photo | None:
        """Return the photo with that id; `None` if there is none.

        >>> with Gallery.open("gallery.sbtk") as gallery:
        ...     print(gallery.photo(7))
        None
        """
        return self._view.photo(operator.index(photo_id))

    def recent(
        self,
        limit: int = 24,
        offset: int = 0,
        *,
        under: Path | str | None = None,
        taken: Period | None = None,
    ) -> list[PhotoCopies]:
        """Return photos by modification time, newest first.

        >>> with Gallery.open("gallery.sbtk") as gallery:
        ...     print([Path(each.photo.path).name for each in gallery.recent(limit=2)])
        ['5.jpg', '4.jpg']

        Args:
            limit: at most this many, at least 1.
            offset: the number of newest photos to leave out.
            under: only photos in this folder.
            taken: only photos of these days, see `search`.

        Raises:
            BadConfig: `limit` is below 1 or `offset` below 0, or a period ends before it begins.
        """
        limit, offset = page_of(limit, offset)
        among = PhotoFilter.of(under, taken)
        listed = []
        for photo in self._view.recent(limit, offset, among):
            same = self._view.names_at(photo.row, among)
            others = [Copy(i, os.fsdecode(path)) for i, path in same if i != photo.id]
            listed.append(PhotoCopies(photo, tuple(others)))
        return listed

    def folders(self) -> dict[str, int]:
        """Return the number of photos directly in each folder, by its absolute path, sorted.

        >>> with Gallery.open("gallery.sbtk") as gallery:
        ...     print(gallery.folders())
        {'...photos': 6}
        """
        counts = sorted(self._view.folders().items())
        return {os.fsdecode(folder): count for folder, count in counts}

    def roots(self) -> list[str]:
        """Return the absolute paths that were indexed; none if an older sbtk made the gallery.

        >>> with Gallery.open("gallery.sbtk") as gallery:
        ...     print(gallery.roots())
        ['...photos']
        """
        return [os.fsdecode(root) for root in self._view.roots()]

    def _require_model(self, embedder: Embedder) -> None:
        manifest = self.manifest
        check_model(self.folder, manifest.model_id, manifest.preprocessing, embedder.bundle)

    def _intact_hits(
        self,
        embedding: Embeddings | Codes,
        k: int,
        search: Search,
        accepted: PhotoFilter,
        *,
        fold: bool,
        rerank: Rerank,
        offset: int,
        left_out: Photo | None = None,
        regions: bool = True,
    ) -> tuple[list[Hit], int, float]:
        """Return hits whose rows hold what was committed, and how many photos might be hits.

        The third is the best score of all these photos. `left_out` is a photo that is not among the
        hits.

        Raises:
            BadGallery: all embeddings are damaged.
        """
        self._check_question(k, search, offset)
        require_rerank(rerank)
        best = offset + k + (left_out is not None)
        parts = self._compared_regions(search, rerank) if regions else None
        is_diffused = parts is not None and rerank == "diffusion"
        wanted = max(best, RERANKED) if is_diffused else best
        among: Rows | None = None
        if accepted:
            among = self._view.rows(accepted)
        while True:
            usable = None if among is None else self._usable.among(among)
            allowed = self.count - self.unusable if usable is None else len(usable)
            whole_rerank: Rerank = rerank if parts is None else "none"
            rows, scores, closest = self._nearest(
                embedding, min(wanted, allowed), usable, search, whole_rerank
            )
            # A row may have been damaged since it was checked, but is still in the graph and the
            # sign codes.
            is_intact = self._check.is_hit_intact(rows)
            if is_intact.all():
                break
            self._usable.leave_out(rows[~is_intact])
            search = "exact"
        if usable is None:
            allowed = self.count - self.unusable
        by_row: dict[int, int] = {}
        if parts is not None:
            # A photo whose whole frame is damaged is not found by its regions either.
            others = self._usable() if usable is None and self.unusable else usable
            wanted = min(wanted, allowed)
            found = parts.improve(rows, scores, embedding, wanted, others, search)
            closest = best_score(found.scores)
            found = parts.diffuse(found) if is_diffused else found
            rows, scores = found.rows[:best], found.scores[:best]
            by_row = dict(zip(found.rows.tolist(), found.regions.tolist(), strict=True))

        def box(row: int) -> Box | None:
            return None if parts is None else parts.box(by_row[row])

        if not allowed and self.unusable >= self.count:
            raise BadGallery(
                self._usable.notice, "at least one that can be used", self._usable.remedy
            )
        hits = self._hits(
            rows, scores, box, accepted, k, fold=fold, offset=offset, left_out=left_out
        )
        return hits, allowed, closest

    def _compared_regions(self, search: Search, rerank: Rerank) -> RegionSearch | None:
        """Return the regions, unless photos are found by whole frames alone."""
        return None if search == "hnsw" or rerank == "expand" else self._regions

    def _date_notices(self, among: PhotoFilter) -> tuple[str, ...]:
        """Return notices about photos of a period that are included by the times of their files."""
        if not among.has_period:
            return ()
        undated, unread = self._view.count_undated(among)
        name = shlex.quote(printable_name(self.folder))
        notices = []
        if undated:
            notices.append(undated_notice(count_text(undated, "photo"), among))
        if unread:
            text = f"the dates of {unread:,} of these were not read yet"
            notices.append(f"{text}: run 'sbtk index PHOTOS --gallery {name}'")
        return tuple(notices)

    def _region_row(self, photo: Photo, region: Box) -> int:
        """Return the row of the photo's region that covers a box best.

        Raises:
            BadRegion: the box is not within the photo, or the photo has no regions.
        """
        require_within(region)
        if self._regions is None:
            raise BadRegion(
                f"{printable_name(self.folder)} keeps whole frames only",
                "a gallery with regions",
                f"sbtk index PHOTOS --regions --gallery {shlex.quote(str(self.folder))}",
            )
        return self._regions.row_of(photo.row, region)

    def _nearest(
        self,
        embedding: Embeddings | Codes,
        k: int,
        among: Rows | None,
        search: Search,
        rerank: Rerank,
    ) -> tuple[Rows, Scores, float]:
        if rerank == "none" or not k:
            rows, scores = self._searched.nearest(embedding, k, among, search)
            return rows, scores, best_score(scores)
        if not isinstance(self._searched, EmbeddingSearch):
            raise BadConfig(
                f"--rerank {rerank} of a binary gallery", "embeddings, or --rerank none"
            )
        return self._searched.rerank(embedding, k, among, search, rerank)

    def _diffuses_sketches(self) -> bool:
        return (
            AUTO_FROM <= self.count < AUTO_BELOW
            and isinstance(self._searched, EmbeddingSearch)
            and self._searched.has_neighbours()
        )

    def _outdated_notices(self) -> set[str]:
        return self._usable.issued

    def _all_faults(self) -> tuple[str, ...]:
        """Return what is known to be wrong with the gallery, in sentences."""
        for fault in self._faults:
            note(self.notices, fault)
        return (*self._faults, *self._usable.notices())

    def _searchable(self, vectors: Vectors | CodeShards) -> EmbeddingSearch | CodeSearch:
        if isinstance(vectors, CodeShards):
            return CodeSearch(self._view, vectors, self._usable)
        return EmbeddingSearch(
            *(self.folder, self.manifest, self._view, vectors, self._check, self._usable),
            exact_below=EXACT_BELOW,
            note=self._note_fault,
        )

    def _region_search(self) -> RegionSearch | None:
        if self.manifest.regions is None or not isinstance(self._searched, EmbeddingSearch):
            return None
        assert isinstance(self._vectors, Vectors)
        return RegionSearch(
            *(self._view, self._vectors, self._check),
            *(self._usable.leave_out_regions, self._searched.loaded_codes),
            exact_below=EXACT_BELOW,
        )

    def _check_question(self, k: int, search: Search, offset: int) -> None:
        check_search(k, search, offset)
        if self.count == 0:
            raise BadGallery(f"{self.folder} has no photos", "at least one", "sbtk index PHOTOS")

    def _hits(
        self,
        rows: NDArray[np.int64],
        scores: NDArray[np.float32],
        box: Callable[[int], Box | None],
        among: PhotoFilter,
        k: int,
        *,
        fold: bool,
        offset: int,
        left_out: Photo | None,
    ) -> list[Hit]:
        """Return the hits `offset + 1` to `offset + k` of `rows (N,)`, best first.

        `box` returns the region by which the photos at a row were found.
        """
        if fold and left_out is not None:
            own = [photo_id for photo_id, _ in self._view.names_at(left_out.row, among)]
            if left_out.id in own:
                rows, scores = rows[rows != left_out.row], scores[rows != left_out.row]
        # If identical photos are folded, each row is one hit, so earlier rows need no names.
        rank = first = offset if fold else 0
        hits: list[Hit] = []
        found = rows[first:].tolist()
        names = self._view.names(found, among)
        for row, score in zip(found, scores[first:].tolist(), strict=True):
            same = [Copy(i, os.fsdecode(path)) for i, path in names[row]]
            for one, *copies in [same] if fold and same else [[copy] for copy in same]:
                if left_out is not None and one.id == left_out.id:
                    continue
                rank += 1
                if offset < rank <= offset + k:
                    hits.append(Hit(rank, score, one.id, one.path, tuple(copies), region=box(row)))
        return hits

    def _check_catalogue(self) -> None:
        held = kept_text(self._view.dim(), self._view.bits())
        if held != (said := kept_text(self.manifest.dim, self.manifest.bits)):
            raise BadGallery(
                f"{self.folder / MANIFEST_NAME} says {said}", f"{held}, as in the catalogue"
            )


def _note_both(faults: list[str], notices: list[str], text: str) -> None:
    note(faults, text)
    note(notices, text)
