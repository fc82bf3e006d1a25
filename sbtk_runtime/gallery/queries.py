"""Queries that every open gallery answers, on disk or in a database."""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from sbtk_runtime.binary_codes import Codes
from sbtk_runtime.errors import BadImage
from sbtk_runtime.files import count_text
from sbtk_runtime.gallery.hits import Answer, Hit
from sbtk_runtime.gallery.photo_filter import Period, PhotoFilter
from sbtk_runtime.gallery.rows import Embeddings
from sbtk_runtime.manifest import MatchRule
from sbtk_runtime.preprocess import ImageInput, Kind
from sbtk_runtime.rerank import Rerank, RerankChoice

if TYPE_CHECKING:
    from sbtk_runtime.embedding.embedder import Embedder

Search = Literal["auto", "hnsw", "codes", "exact"]


class Queries(ABC):
    """Queries of a gallery by embeddings and by images.

    Attributes:
        notices: sentences for the user, which searches add to.
    """

    notices: list[str]

    @abstractmethod
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
        """Return the hits of `search` for `embedding (D,) float32`, and the notices about them."""

    def choose_rerank(self, choice: RerankChoice, kind: Kind) -> Rerank:
        """Return how to reorder the hits of a sketch or a photo.

        `auto` is diffusion for sketches, where `_diffuses_sketches`, and nothing else.
        """
        if choice != "auto":
            return choice
        return "diffusion" if kind == "sketch" and self._diffuses_sketches() else "none"

    def _diffuses_sketches(self) -> bool:
        """Return whether diffusion suits sketches in this gallery."""
        return False

    @abstractmethod
    def _require_model(self, embedder: Embedder) -> None:
        """Raise `ModelMismatch` unless the embedder's model made the gallery."""

    def _outdated_notices(self) -> set[str]:
        """Return notices of earlier searches, which the next search repeats if they still hold."""
        return set()

    def search(
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
    ) -> list[Hit]:
        """Return the `k` photos nearest to `embedding (D,) float32`, best first, by cosine.

        A binary gallery compares codes by Hamming distance, and orders equal distances by id. If
        there are fewer photos, a notice says so.

        Args:
            embedding: of a sketch or photo, by the gallery's model; a binary gallery also takes
                a code of its own, `(bits / 8,) uint8`.
            k: at least 1.
            search: by sign codes with exact scores of the candidates, by the HNSW graph, exactly,
                or whichever suits the gallery's size; a binary gallery has neither codes of
                embeddings nor a graph.
            under: only photos in this folder; `auto` searches small folders exactly.
            taken: first and last day, either of which may be `None`: only photos that were taken
                then. If a file does not say when, the time of its last change counts.
            fold: combine photos with the same bytes into one hit with `copies`.
            rerank: reorders the hits, see `sbtk_runtime.rerank`; scores remain cosines.
            offset: the number of best hits to leave out, so that `k` hits follow them.
            match_rule: of the bundle that embedded a sketch: hits carry `match`.
            regions: also find photos by their regions, if the gallery keeps them.

        Raises:
            BadConfig: `k` is below 1 or `offset` below 0, there is no such way of searching or
                re-ranking, or `rerank` was given for a binary gallery.
            BadData: the embedding has another width, or is not finite.
            BadGallery: the gallery is empty.
        """
        answer = self.answer(
            *(embedding, k, search),
            under=under,
            taken=taken,
            fold=fold,
            rerank=rerank,
            offset=offset,
            match_rule=match_rule,
            regions=regions,
        )
        # Earlier notices may state fewer unusable photos.
        outdated = self._outdated_notices()
        self.notices[:] = [text for text in self.notices if text not in outdated]
        for notice in answer.notices:
            note(self.notices, notice)
        return answer.hits

    def query(
        self,
        sketch: ImageInput,
        embedder: Embedder,
        k: int = 10,
        kind: Kind = "sketch",
        *,
        search: Search = "auto",
        under: Path | str | None = None,
        taken: Period | None = None,
        fold: bool = True,
        rerank: Rerank = "none",
        offset: int = 0,
        regions: bool = True,
    ) -> list[Hit]:
        """Return the `k` photos that look most like an image, best first.

        >>> from sbtk_runtime import Embedder
        >>> with Embedder() as embedder, Gallery.open("gallery.sbtk") as gallery:
        ...     hits = gallery.query("sketch.png", embedder, k=2)
        >>> [hit.rank for hit in hits]
        [1, 2]

        Args:
            sketch: the path of an image file, its bytes, a file opened with "rb", a Pillow image,
                or an array `(H, W, 3)`, `(H, W, 1)` or `(H, W) uint8` of RGB or grey.
            embedder: of the gallery's model.
            k: at least 1.
            kind: "sketch", or "photo" to find photos like a photo.
            search: see `search`, as for the options below.
            under: only photos in this folder.
            taken: only photos of these days.
            fold: combine photos with the same bytes into one hit.
            rerank: how to reorder the hits.
            offset: the number of best hits to leave out.
            regions: also find photos by their regions, if the gallery keeps them.

        Raises:
            ModelMismatch: the embedder's model is not the one that made the gallery.
            BadConfig: `kind` is neither "sketch" nor "photo", or as in `search`.
            BadImage: there is no readable image, or the sketch is empty.
        """
        self._require_model(embedder)
        embedding, notices = embedder.embed_one(sketch, kind)
        for notice in notices:
            note(self.notices, notice)
        return self.search(
            *(embedding, k, search),
            under=under,
            taken=taken,
            fold=fold,
            rerank=rerank,
            offset=offset,
            match_rule=_match_rule(embedder, kind),
            regions=regions,
        )

    def query_many(
        self,
        sketches: Iterable[ImageInput],
        embedder: Embedder,
        k: int = 10,
        kind: Kind = "sketch",
        *,
        search: Search = "auto",
        under: Path | str | None = None,
        taken: Period | None = None,
        fold: bool = True,
        rerank: Rerank = "none",
        regions: bool = True,
    ) -> list[list[Hit]]:
        """Return the hits of each image, as `query` does, in the order of `sketches`.

        Images are embedded in batches, which is faster than one by one on a GPU.

        >>> from sbtk_runtime import Embedder
        >>> with Embedder() as embedder, Gallery.open("gallery.sbtk") as gallery:
        ...     found = gallery.query_many(["sketch.png", "photos/0.jpg"], embedder, k=3)
        >>> [len(hits) for hits in found]
        [3, 3]

        Raises:
            BadImage: names the first image that is not readable, counted from 0, and why.
            SbtkError: otherwise as `query`.
        """
        self._require_model(embedder)
        images = enumerate(sketches)
        answers: list[list[Hit]] = []
        while batch := list(itertools.islice(images, embedder.batch)):
            pixels = []
            for number, image in batch:
                try:
                    prepared = embedder.bundle.preprocessing.prepare_input(image, kind)
                except BadImage as problem:
                    found = f"image {number}: {problem.found}"
                    raise type(problem)(found, problem.expected) from problem
                pixels.append(prepared.pixels)
                for notice in prepared.notices:
                    note(self.notices, f"image {number}: {notice}")
            for row in embedder.embed_images(np.stack(pixels), kind):
                hits = self.search(
                    *(row, k, search),
                    under=under,
                    taken=taken,
                    fold=fold,
                    rerank=rerank,
                    match_rule=_match_rule(embedder, kind),
                    regions=regions,
                )
                answers.append(hits)
        return answers


def _match_rule(embedder: Embedder, kind: Kind) -> MatchRule | None:
    """Return the rule that says which hits of a query are close, if its model has one."""
    return embedder.bundle.manifest.match_rule if kind == "sketch" else None


def few_notices(found: int, allowed: int, k: int, among: PhotoFilter) -> tuple[str, ...]:
    """Return the notice about `found` hits where `k` of `allowed` photos were asked for."""
    if found < k <= allowed:
        count, noun = found, "different photo"
    elif allowed < k:
        count, noun = allowed, "photo"
    else:
        return ()
    are = "is" if count == 1 else "are"
    return (
        f"only {count_text(count, noun)} {are} searchable{among.text}, so there are fewer hits",
    )


def undated_notice(undated: str, among: PhotoFilter) -> str:
    """Return the notice that the times of the files of `undated`, such as "1 photo", count."""
    return f"{undated}{among.text} without a date: the times of their files count"


def note(notices: list[str], notice: str) -> None:
    """Add a notice that is not there yet."""
    if notice not in notices:
        notices.append(notice)
