"""A gallery, open for reading: answers embeddings with hits, from one generation."""

from __future__ import annotations

import os
import shlex
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Literal, Self, get_args

import numpy as np
from numpy.typing import NDArray

from sbtk_runtime.errors import BadConfig, BadData, BadGallery
from sbtk_runtime.gallery.catalogue import CatalogueView, Photo
from sbtk_runtime.gallery.code_search import CodeSearch
from sbtk_runtime.gallery.codes import CodeShards
from sbtk_runtime.gallery.embedding_search import EmbeddingSearch
from sbtk_runtime.gallery.folder import (
    check_model,
    kept_text,
    open_rows,
    published_manifest,
)
from sbtk_runtime.gallery.hit import Answer, Hit
from sbtk_runtime.gallery.shards import Rows
from sbtk_runtime.gallery.vectors import Embeddings, Vectors
from sbtk_runtime.hamming import Codes
from sbtk_runtime.images import read_image_bytes
from sbtk_runtime.manifest import MANIFEST_NAME, GalleryManifest, read_gallery_manifest
from sbtk_runtime.names import printable_name
from sbtk_runtime.preprocess import Kind

if TYPE_CHECKING:
    from sbtk_runtime.embedding.embed import Embedder

__all__ = ["EXACT_BELOW", "Answer", "Gallery", "Hit", "Photo", "Search"]

Search = Literal["auto", "hnsw", "exact"]

#: Below this number of photos scoring all of them takes no longer than people notice.
EXACT_BELOW = 20_000

_ATTEMPTS = 5


class Gallery:
    """A gallery as one generation of it is; what a writer does meanwhile does not show.

    Any number of threads may search. `notices` collects sentences for the user.
    """

    def __init__(self, folder: Path, manifest: GalleryManifest) -> None:
        """Opens the state that `manifest` describes; use `Gallery.open`."""
        self.folder = folder
        self.manifest = manifest
        self.notices: list[str] = []
        self._view = CatalogueView(folder, manifest.generation)
        self._live_rows = _LiveRows(self._view, self.count, self.notices)
        self._vectors = open_rows(folder, manifest.dim, manifest.bits)
        try:
            self._check_catalogue()
            self._vectors.hold()
            self._searched = self._searchable(self._vectors)
        except BaseException:
            self.close()
            raise

    @classmethod
    def open(cls, folder: Path | str) -> Self:
        """Returns the newest published generation of the gallery in `folder`.

        Raises:
            BadGallery: there is none, or it is damaged beyond reading.
        """
        folder = Path(folder)
        if not (folder / MANIFEST_NAME).exists():
            option = f" --gallery {shlex.quote(str(folder))}"
            raise BadGallery(
                f"there is no gallery in {printable_name(folder)}",
                "one that 'sbtk index' has made",
                f"sbtk index PHOTOS{option}",
            )
        for _ in range(_ATTEMPTS):
            manifest = published_manifest(folder)
            try:
                gallery = cls(folder, manifest)
            except (BadGallery, FileNotFoundError):
                # A writer may have published and tidied up in between.
                if read_gallery_manifest(folder) == manifest:
                    raise
                continue
            if read_gallery_manifest(folder) == manifest:
                return gallery
            gallery.close()
        raise BadGallery(f"{folder} changes faster than it can be read", "", "try again")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def count(self) -> int:
        """The number of photos that can be found."""
        return self.manifest.live

    def close(self) -> None:
        """Lets the files go."""
        self._vectors.close()
        self._view.close()

    def search(
        self,
        embedding: Embeddings | Codes,
        k: int = 10,
        search: Search = "auto",
        *,
        under: Path | str | None = None,
    ) -> list[Hit]:
        """Returns the `k` photos nearest to `embedding (D,) float32`, best first, by cosine.

        A binary gallery makes a code of it and goes by Hamming distance, equal ones by id. Fewer
        are returned, with a notice, when there are fewer.

        Args:
            embedding: of a sketch or photo, by the gallery's model; a binary gallery also takes
                a code of its own, `(bits / 8,) uint8`.
            k: at least 1.
            search: by the HNSW graph, exactly, or whichever suits the gallery's size; a binary
                gallery has no graph.
            under: only photos in this folder; they are searched exactly.

        Raises:
            BadConfig: `k` is below 1, or there is no such way of searching the gallery.
            BadData: the embedding has another width, or is not finite.
            BadGallery: the gallery is empty.
        """
        answer = self.answer(embedding, k, search, under=under)
        for notice in answer.notices:
            _note(self.notices, notice)
        return answer.hits

    def answer(
        self,
        embedding: Embeddings | Codes,
        k: int = 10,
        search: Search = "auto",
        *,
        under: Path | str | None = None,
    ) -> Answer:
        """Returns the hits of `search`, and the notices about them, which nothing else gets."""
        self._check_question(k, search)
        if under is not None:
            folder = os.path.abspath(under)  # noqa: PTH100 -- links are kept, as in the catalogue
            rows = self._view.rows(os.fsencode(folder))
        else:
            rows = None
        allowed = self.count if rows is None else len(rows)
        hits = self._hits(*self._searched.nearest(embedding, min(k, allowed), rows, search))
        if allowed >= k:
            return Answer(hits)
        where = "" if under is None else f" below {printable_name(under)}"
        return Answer(
            hits, (f"only {allowed:,} photos are searchable{where}, so there are fewer hits",)
        )

    def similar(
        self,
        photo_id: int,
        k: int = 10,
        search: Search = "auto",
        *,
        under: Path | str | None = None,
    ) -> Answer:
        """Returns the photos most like one of the gallery, which is not among them.

        It goes by the embedding, or the code, that the gallery keeps. Else as `answer`.

        Raises:
            BadData: there is no such photo.
            BadGallery: what the gallery keeps of it is damaged.
        """
        self._check_question(k, search)
        photo = self.photo(photo_id)
        if photo is None:
            raise BadData(f"the gallery has no photo {photo_id}", "the id of a hit")
        rows, is_whole = self._vectors.read(np.array([photo.row]))
        if not is_whole[0]:
            raise BadGallery(
                f"the embedding of photo {photo_id} is damaged", "", "sbtk index --verify --repair"
            )
        answer = self.answer(rows[0], k + 1, search, under=under)
        others = [hit for hit in answer.hits if hit.id != photo_id][:k]
        ranked = [replace(hit, rank=rank) for rank, hit in enumerate(others, start=1)]
        return Answer(ranked, answer.notices if len(ranked) < k else ())

    def photo(self, photo_id: int) -> Photo | None:
        """Returns what is known of the photo with that id; `None` if there is none."""
        return self._view.photo(photo_id)

    def folders(self) -> dict[bytes, int]:
        """Returns the absolute paths of the folders that photos lie in, and how many, sorted."""
        return dict(sorted(self._view.folders().items()))

    def roots(self) -> list[bytes]:
        """Returns the absolute paths that were indexed; none if an older sbtk made the gallery."""
        return self._view.roots()

    def query(
        self,
        sketch: Path | str | bytes,
        embedder: Embedder,
        k: int = 10,
        kind: Kind = "sketch",
        *,
        search: Search = "auto",
        under: Path | str | None = None,
    ) -> list[Hit]:
        """Returns the photos that look like an image file, or like the bytes of one.

        Raises:
            ModelMismatch: the embedder has another model than the gallery.
            BadImage: the file is no readable image, or an empty sketch.
        """
        manifest = self.manifest
        check_model(self.folder, manifest.model_id, manifest.preprocessing, embedder.bundle)
        data = sketch if isinstance(sketch, bytes) else read_image_bytes(sketch)
        embedding, notices = embedder.embed_one(data, kind)
        for notice in notices:
            _note(self.notices, notice)
        return self.search(embedding, k, search, under=under)

    def _searchable(self, vectors: Vectors | CodeShards) -> EmbeddingSearch | CodeSearch:
        if isinstance(vectors, CodeShards):
            return CodeSearch(self._view, vectors, self._live_rows)
        is_large = self.manifest.live >= EXACT_BELOW
        return EmbeddingSearch(
            *(self.folder, self.manifest, vectors, self._live_rows),
            is_large=is_large,
            note=partial(_note, self.notices),
        )

    def _check_question(self, k: int, search: Search) -> None:
        if k < 1:
            raise BadConfig(f"{k} hits were asked for", "at least 1")
        if search not in get_args(Search):
            raise BadConfig(f"unknown way of searching {search!r}", " or ".join(get_args(Search)))
        if self.count == 0:
            raise BadGallery(f"{self.folder} has no photos", "at least one", "sbtk index PHOTOS")

    def _hits(self, rows: NDArray[np.int64], scores: NDArray[np.float32]) -> list[Hit]:
        hits: list[Hit] = []
        for row, score in zip(rows.tolist(), scores.tolist(), strict=True):
            name = self._view.name_of(row)
            if name is not None:
                hits.append(Hit(len(hits) + 1, score, name[0], os.fsdecode(name[1])))
        return hits

    def _check_catalogue(self) -> None:
        held = kept_text(self._view.dim(), self._view.bits())
        if held != (said := kept_text(self.manifest.dim, self.manifest.bits)):
            raise BadGallery(
                f"{self.folder / MANIFEST_NAME} says {said}", f"{held}, as in the catalogue"
            )


class _LiveRows:
    """The rows of all photos, looked up once.

    What searches a gallery holds this and not the gallery, which holds it: in a circle the graph
    of a gallery that is no longer used would stay until the garbage collector comes.
    """

    def __init__(self, view: CatalogueView, count: int, notices: list[str]) -> None:
        self._view = view
        self._count = count
        self._notices = notices
        self._rows: Rows | None = None

    def __call__(self) -> Rows:
        if self._rows is None:
            rows = self._view.rows()
            if len(rows) != self._count:
                _note(
                    self._notices,
                    f"the catalogue has {len(rows):,} photos and the manifest {self._count:,}: "
                    "run 'sbtk index --verify'",
                )
            self._rows = rows
        return self._rows


def _note(notices: list[str], notice: str) -> None:
    if notice not in notices:
        notices.append(notice)
