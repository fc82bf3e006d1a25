"""A gallery, open for reading: answers embeddings with hits, from one generation."""

from __future__ import annotations

import os
import shlex
import threading
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self, get_args

import numpy as np
from numpy.typing import NDArray

from sbtk_runtime.catalogue import CatalogueView
from sbtk_runtime.errors import BadConfig, BadData, BadGallery
from sbtk_runtime.exact import exact_search
from sbtk_runtime.gallery_folder import (
    VECTORS_NAME,
    check_model,
    path_fields,
    published_manifest,
)
from sbtk_runtime.hnsw import Graph, build_graph
from sbtk_runtime.images import read_image_bytes
from sbtk_runtime.manifest import MANIFEST_NAME, GalleryManifest, read_gallery_manifest
from sbtk_runtime.names import printable_name
from sbtk_runtime.preprocess import Kind
from sbtk_runtime.vectors import Vectors

if TYPE_CHECKING:
    from sbtk_runtime.embed import Embedder

__all__ = ["EXACT_BELOW", "VECTORS_NAME", "Gallery", "Hit", "Search"]

Embeddings = NDArray[np.float32]
Search = Literal["auto", "hnsw", "exact"]

#: Below this number of photos scoring all of them takes no longer than people notice.
EXACT_BELOW = 20_000

_ATTEMPTS = 5


@dataclass(frozen=True)
class Hit:
    """One answer. `path` is absolute; bytes that are not UTF-8 are in it as surrogates."""

    rank: int
    score: float
    id: int
    path: str

    def to_json(self) -> dict[str, Any]:
        """Returns the hit as a JSON object; a path that is not UTF-8 comes as `path_bytes`."""
        known: dict[str, Any] = {"rank": self.rank, "score": round(self.score, 6), "id": self.id}
        return known | path_fields(os.fsencode(self.path))


class Gallery:
    """A gallery as one generation of it is; what a writer does meanwhile does not show.

    Any number of threads may search. `notices` collects sentences for the user.
    """

    def __init__(self, folder: Path, manifest: GalleryManifest) -> None:
        """Opens the state that `manifest` describes; use `Gallery.open`."""
        self.folder = folder
        self.manifest = manifest
        self.notices: list[str] = []
        self._graph: Graph | None = None
        self._graph_lock = threading.Lock()
        self._graph_problem = "" if manifest.graph else "there is no graph"
        self._rows: NDArray[np.int64] | None = None
        self._view = CatalogueView(folder, manifest.generation)
        self._vectors = Vectors(folder / VECTORS_NAME, manifest.dim)
        try:
            self._check_dim()
            self._vectors.hold()
            if manifest.live >= EXACT_BELOW:
                self._load_graph()
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
        embedding: Embeddings,
        k: int = 10,
        search: Search = "auto",
        *,
        under: Path | str | None = None,
    ) -> list[Hit]:
        """Returns the `k` photos nearest to `embedding (D,) float32`, best first, by cosine.

        Fewer are returned, with a notice, when there are fewer.

        Args:
            embedding: of a sketch or photo, by the gallery's model.
            k: at least 1.
            search: by the HNSW graph, exactly, or whichever suits the gallery's size.
            under: only photos in this folder; they are searched exactly.

        Raises:
            BadConfig: `k` is below 1, or the way of searching is unknown.
            BadData: the embedding has another width, or is not finite.
            BadGallery: the gallery is empty.
        """
        query = self._checked(embedding, k, search)
        if under is not None:
            folder = os.path.abspath(under)  # noqa: PTH100 -- links are kept, as in the catalogue
            rows = self._view.rows(os.fsencode(folder))
        else:
            rows = None
        allowed = self.count if rows is None else len(rows)
        if allowed < k:
            where = "" if under is None else f" below {printable_name(under)}"
            self._note(f"only {allowed:,} photos are searchable{where}, so there are fewer hits")
        wanted = min(k, allowed)
        if rows is None and self._takes_graph(search, wanted):
            found = self._usable_graph().search(query, wanted)
            if len(found[0]) == wanted:
                return self._hits(*found)
        if rows is None:
            rows = self._live_rows()
        return self._hits(*exact_search(self._vectors, rows, query, wanted)) if wanted else []

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
        check_model(self.folder, self.manifest.model_id, self.manifest.preprocessing, embedder)
        data = sketch if isinstance(sketch, bytes) else read_image_bytes(sketch)
        embedding, notices = embedder.embed_one(data, kind)
        for notice in notices:
            self._note(notice)
        return self.search(embedding, k, search, under=under)

    def _checked(self, embedding: Embeddings, k: int, search: Search) -> Embeddings:
        """Returns the embedding as a row of length 1, after looking at all arguments."""
        if k < 1:
            raise BadConfig(f"{k} hits were asked for", "at least 1")
        if search not in get_args(Search):
            raise BadConfig(f"unknown way of searching {search!r}", " or ".join(get_args(Search)))
        if self.count == 0:
            raise BadGallery(f"{self.folder} has no photos", "at least one", "sbtk index PHOTOS")
        if embedding.shape != (self.manifest.dim,):
            raise BadData(
                f"an embedding of shape {embedding.shape}",
                f"({self.manifest.dim},), as {self.manifest.model_id} makes them",
            )
        length = float(np.linalg.norm(embedding.astype(np.float64)))
        if not np.isfinite(length) or length < 1e-6:
            raise BadData("the embedding is not finite or zero", "a row of length 1")
        return np.asarray(embedding / length, dtype=np.float32)

    def _takes_graph(self, search: Search, k: int) -> bool:
        if search != "auto":
            return search == "hnsw"
        if self._graph_problem:
            return False
        return self.count >= EXACT_BELOW and self._graph is not None and k <= self._graph.ef

    def _usable_graph(self) -> Graph:
        """Returns the graph, loaded or, when its file is no good, built anew in memory."""
        with self._graph_lock:
            if self._graph is None and not self._graph_problem:
                self._load_graph()
            if self._graph is None:
                rows = self._live_rows()
                self._graph = build_graph(self._vectors, rows, len(rows))
            return self._graph

    def _load_graph(self) -> None:
        record = self.manifest.graph
        if record is None:
            return
        try:
            self._graph = Graph.load(self.folder, record, self.manifest.dim)
        except BadGallery as problem:
            self._graph_problem = problem.found
            self._note(
                f"{problem.found}: searching the vectors instead; "
                "'sbtk index' on your photos builds the graph anew"
            )

    def _live_rows(self) -> NDArray[np.int64]:
        if self._rows is None:
            rows = self._view.rows()
            if len(rows) != self.count:
                self._note(
                    f"the catalogue has {len(rows):,} photos and the manifest {self.count:,}: "
                    "run 'sbtk index --verify'"
                )
            self._rows = rows
        return self._rows

    def _hits(self, rows: NDArray[np.int64], scores: NDArray[np.float32]) -> list[Hit]:
        hits: list[Hit] = []
        for row, score in zip(rows.tolist(), scores.tolist(), strict=True):
            name = self._view.name_of(row)
            if name is not None:
                hits.append(Hit(len(hits) + 1, score, name[0], os.fsdecode(name[1])))
        return hits

    def _check_dim(self) -> None:
        dim = self._view.dim()
        if dim != self.manifest.dim:
            raise BadGallery(
                f"{self.folder / MANIFEST_NAME} says {self.manifest.dim} numbers a photo",
                f"{dim}, as in the catalogue",
            )

    def _note(self, notice: str) -> None:
        if notice not in self.notices:
            self.notices.append(notice)
