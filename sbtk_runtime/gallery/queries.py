"""Queries that every open gallery answers, on disk or in a database, and their answers."""

from __future__ import annotations

import itertools
import operator
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypedDict, Unpack, get_args

import numpy as np

from sbtk_runtime.binary_codes import Codes
from sbtk_runtime.errors import BadConfig, BadImage
from sbtk_runtime.files import count_text
from sbtk_runtime.gallery.catalogue import Photo
from sbtk_runtime.gallery.folder import path_fields
from sbtk_runtime.gallery.photo_filter import Period, PhotoFilter
from sbtk_runtime.gallery.rows import Embeddings
from sbtk_runtime.manifest import MatchRule
from sbtk_runtime.preprocess import ImageInput, Kind, require_several
from sbtk_runtime.rerank import Rerank, RerankChoice

if TYPE_CHECKING:
    from sbtk_runtime.embedding.embedder import Embedder

Search = Literal["auto", "hnsw", "codes", "exact"]

# The largest number of SQLite.
_MOST = (1 << 63) - 1

#: x, y, width and height of a part of a photo, each 0 to 1 of the upright photo.
Box = tuple[float, float, float, float]

#: Whether a hit is close enough to show the same thing, by the model's `MatchRule`.
Match = Literal["good", "weak"]


@dataclass(frozen=True)
class Copy:
    """A photo with the same content as a hit."""

    id: int
    path: str


@dataclass(frozen=True)
class Hit:
    """One photo that was found.

    Attributes:
        rank: place among the hits, from 1.
        score: at most 1: the cosine; for binary codes, the cosine of codes as rows of 1 and -1.
        id: the photo's id in the gallery.
        path: absolute, with surrogates for bytes that are not UTF-8.
        copies: other photos with the same content, by id, if they are folded.
        match: `None` if the model has no rule, for photo queries and in binary galleries.
        region: the part of the photo that matches; `None` for the whole frame. Its score is the
            cosine less what all regions have in common, see `region_search`.
    """

    rank: int
    score: float
    id: int
    path: str
    copies: tuple[Copy, ...] = ()
    match: Match | None = None
    region: Box | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the hit as a JSON object; a path that is not UTF-8 comes as `path_bytes`."""
        known: dict[str, Any] = {"rank": self.rank, "score": round(self.score, 6), "id": self.id}
        known |= path_fields(os.fsencode(self.path))
        if self.match:
            known["match"] = self.match
        if self.region:
            known["region"] = [round(part, 4) for part in self.region]
        if self.copies:
            known["copies"] = [
                {"id": copy.id, **path_fields(os.fsencode(copy.path))} for copy in self.copies
            ]
        return known


@dataclass(frozen=True)
class PhotoCopies:
    """A photo, and other photos with the same content, by id."""

    photo: Photo
    copies: tuple[Copy, ...]


@dataclass(frozen=True)
class Answer:
    """The answer to one query.

    Attributes:
        hits: best first.
        notices: sentences about them for the user.
        no_close_match: whether no photo is a close match, so that the gallery may lack what was
            drawn; `None` if that is unknown.
    """

    hits: list[Hit]
    notices: tuple[str, ...] = ()
    no_close_match: bool | None = None

    def judged(self, closest: float | None, rule: MatchRule, photos: int) -> Answer:
        """Return the answer to a sketch with its `no_close_match`, and the hits' `match`.

        Args:
            closest: the best score of all photos, which re-ranking may leave out of the hits;
                `None` if it is unknown.
            rule: of the model that embedded the sketch.
            photos: the number of photos that were compared, at least 1.
        """
        lowest = rule.lowest_close(photos)
        hits = [replace(hit, match="good" if hit.score >= lowest else "weak") for hit in self.hits]
        is_doubtful = None if closest is None else closest < lowest
        return replace(self, hits=hits, no_close_match=is_doubtful)


class SearchOptions(TypedDict, total=False):
    """Options of every search, which `Queries.search` explains."""

    under: Path | str | None
    taken: Period | None
    fold: bool
    rerank: Rerank
    offset: int
    regions: bool


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
        match_rule: MatchRule | None = None,
        **options: Unpack[SearchOptions],
    ) -> Answer:
        """Return what `search` finds for `embedding (D,) float32`, and the notices about it."""

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
        match_rule: MatchRule | None = None,
        **options: Unpack[SearchOptions],
    ) -> list[Hit]:
        """Return the `k` photos nearest to `embedding (D,) float32`, best first, by cosine.

        A binary gallery compares codes by Hamming distance, and orders equal distances by id. If
        there are fewer photos, a notice says so.

        >>> from sbtk_runtime import Embedder
        >>> with Embedder() as embedder, Gallery.open("gallery.sbtk") as gallery:
        ...     embedding, notices = embedder.embed_one("sketch.png", "sketch")
        ...     hits = gallery.search(embedding, k=2, rerank="diffusion")
        >>> [hit.rank for hit in hits]
        [1, 2]

        Args:
            embedding: of a sketch or photo, by the gallery's model; a binary gallery also takes
                a code of its own, `(bits / 8,) uint8`.
            k: at least 1.
            search: by sign codes with exact scores of the candidates, by the HNSW graph, exactly,
                or whichever suits the gallery's size; a binary gallery has neither codes of
                embeddings nor a graph.
            match_rule: of the bundle that embedded a sketch: hits carry `match`.
            under: only photos in this folder; `auto` searches small folders exactly.
            taken: first and last day, either of which may be `None`: only photos that were taken
                then. If a file does not say when, the time of its last change counts.
            fold: combine photos with the same bytes into one hit with `copies`.
            rerank: reorders the hits, see `sbtk_runtime.rerank`; scores remain cosines.
            offset: the number of best hits to leave out, so that `k` hits follow them.
            regions: also find photos by their regions, if the gallery keeps them.

        Raises:
            BadConfig: `k` is below 1 or `offset` below 0, there is no such way of searching or
                re-ranking, or `rerank` was given for a binary gallery.
            BadData: the embedding has another width, or is not finite.
            BadGallery: the gallery is empty.
        """
        return self._noted(self.answer(embedding, k, search, match_rule=match_rule, **options)).hits

    def _noted(self, answer: Answer) -> Answer:
        """Add an answer's notices to those of the gallery."""
        # Earlier notices may state fewer unusable photos.
        outdated = self._outdated_notices()
        self.notices[:] = [text for text in self.notices if text not in outdated]
        for notice in answer.notices:
            note(self.notices, notice)
        return answer

    def query(
        self,
        sketch: ImageInput,
        embedder: Embedder,
        k: int = 10,
        kind: Kind = "sketch",
        *,
        search: Search = "auto",
        **options: Unpack[SearchOptions],
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
            search: how to search, see `search`.
            options: see `search`.

        Raises:
            ModelMismatch: the embedder's model is not the one that made the gallery.
            BadConfig: `kind` is neither "sketch" nor "photo", or as in `search`.
            BadImage: there is no readable image, or the sketch is empty.
        """
        return self.ask(sketch, embedder, k, kind, search=search, **options).hits

    def ask(
        self,
        sketch: ImageInput,
        embedder: Embedder,
        k: int = 10,
        kind: Kind = "sketch",
        *,
        search: Search = "auto",
        **options: Unpack[SearchOptions],
    ) -> Answer:
        """Return the hits of `query`, with whether any photo is a close match, and notices.

        >>> from sbtk_runtime import Embedder
        >>> with Embedder() as embedder, Gallery.open("gallery.sbtk") as gallery:
        ...     print(gallery.ask("sketch.png", embedder, k=9).notices)
        ('only 6 photos are searchable, so there are fewer hits',)

        Raises:
            SbtkError: as `query`.
        """
        self._require_model(embedder)
        embedding, notices = embedder.embed_one(sketch, kind)
        for notice in notices:
            note(self.notices, notice)
        rule = _match_rule(embedder, kind)
        return self._noted(self.answer(embedding, k, search, match_rule=rule, **options))

    def query_many(
        self,
        sketches: Iterable[ImageInput],
        embedder: Embedder,
        k: int = 10,
        kind: Kind = "sketch",
        *,
        search: Search = "auto",
        **options: Unpack[SearchOptions],
    ) -> list[list[Hit]]:
        """Return the hits of each image, as `query` does, in the order of `sketches`.

        Images are embedded in batches, which is faster than one by one on a GPU.

        >>> from sbtk_runtime import Embedder
        >>> with Embedder() as embedder, Gallery.open("gallery.sbtk") as gallery:
        ...     found = gallery.query_many(["sketch.png", "photos/0.jpg"], embedder, k=3)
        >>> [len(hits) for hits in found]
        [3, 3]

        Raises:
            BadConfig: `sketches` is a single image; otherwise as in `query`.
            BadImage: names the first image that is not readable, counted from 0, and why.
            SbtkError: otherwise as `query`.
        """
        self._require_model(embedder)
        images = enumerate(require_several(sketches))
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
                rule = _match_rule(embedder, kind)
                hits = self.search(row, k, search, match_rule=rule, **options)
                answers.append(hits)
        return answers


def _match_rule(embedder: Embedder, kind: Kind) -> MatchRule | None:
    """Return the rule that says which hits of a query are close, if its model has one."""
    return embedder.bundle.manifest.match_rule if kind == "sketch" else None


def check_search(k: int, search: Search, offset: int) -> None:
    """Check arguments of every search.

    Raises:
        BadConfig: a number is too small, or there is no such way of searching.
        TypeError: one is not a whole number.
    """
    if operator.index(k) < 1:
        raise BadConfig(f"{k} hits were asked for", "at least 1")
    if operator.index(offset) < 0:
        raise BadConfig(f"an offset of {offset}", "at least 0")
    if search not in get_args(Search):
        raise BadConfig(f"unknown way of searching {search!r}", " or ".join(get_args(Search)))


def page_of(limit: int, offset: int) -> tuple[int, int]:
    """Return limit and offset of a listing as numbers that databases take.

    Raises:
        BadConfig: one of them is too small.
        TypeError: one of them is not a whole number.
    """
    if operator.index(limit) < 1 or operator.index(offset) < 0:
        raise BadConfig(
            f"a limit of {limit} and an offset of {offset}", "a limit from 1, an offset from 0"
        )
    return min(operator.index(limit), _MOST), min(operator.index(offset), _MOST)


def count_compared(photos: int, regions: int, of_photos: int) -> int:
    """Return how many photos a `MatchRule` counts, at least 1, where regions are compared too.

    The best of many regions is as good by chance as the best of as many photos.

    Args:
        photos: the number of photos that a query was compared with.
        regions: the number of regions of all photos; 0 if whole frames are compared.
        of_photos: the number of all photos.
    """
    return max(1, photos + round(regions * photos / max(1, of_photos)))


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
