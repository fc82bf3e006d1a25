"""Both sides of a retrieval measurement: labelled images, and their embeddings by a protocol."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sbtk_runtime.embedding.embed import Embedder, Failed
from sbtk_runtime.errors import BadData
from sbtk_runtime.itq import Itq, check_bits
from sbtk_runtime.preprocess import Kind
from sbtk_runtime.retrieval.evaluation import Labelled, photo_queries
from sbtk_runtime.retrieval.metrics import Embeddings
from sbtk_runtime.retrieval.protocol import ZERO_SHOT, Protocol

#: Told how many of how many images are embedded.
Progress = Callable[[int, int | None], None]


@dataclass(frozen=True)
class LabelledImages:
    """Image files and, for each, the index of its class in `classes`."""

    paths: Sequence[Path]
    labels: Sequence[int]
    classes: Sequence[str]


@dataclass(frozen=True)
class LabelledSet:
    """What is measured on.

    Attributes:
        sketches: to ask with.
        photos: to search, and to ask with where photos are the queries.
        of: the classes in words, such as "21 unseen classes of SK-YE".
        learnt_on: training sketches and photos, for a protocol that fits ITQ on them.
        protocol: the rules that the images were chosen by, and that figures are to follow.
        notices: sentences about what was left out when the files were found.
    """

    sketches: LabelledImages
    photos: LabelledImages
    of: str
    learnt_on: tuple[LabelledImages, LabelledImages] | None = None
    protocol: Protocol = ZERO_SHOT
    notices: tuple[str, ...] = ()


@dataclass(frozen=True)
class Sides:
    """What retrieval is measured with.

    Attributes:
        queries: sketches, or photos.
        gallery: photos.
        learnt_on: embeddings to fit ITQ on, or the bundle's own; `None` where neither is asked.
        embedded: how many images were embedded for it.
        unreadable: `path: reason` of images left out.
    """

    queries: Labelled
    gallery: Labelled
    learnt_on: Embeddings | Itq | None
    embedded: int
    unreadable: tuple[str, ...]


def embed_sides(
    embedder: Embedder,
    sketches: LabelledImages,
    photos: LabelledImages,
    learnt_on: tuple[LabelledImages, LabelledImages] | None,
    protocol: Protocol,
    progress: Progress,
) -> Sides:
    """Returns the embeddings that a protocol needs.

    Args:
        embedder: the model and engine.
        sketches: the queries, unless the protocol says that photos ask.
        photos: the gallery.
        learnt_on: training sketches and photos, embedded where the protocol fits ITQ on them.
        protocol: what asks, and what ITQ is fitted on.
        progress: told how many of how many images are embedded.

    Raises:
        BadConfig: codes that embeddings of this width cannot have; found out before the work.
        BadData: no image of a kind can be read, or there are no training images.
        BadModel: the bundle has no ITQ of the length asked for.
    """
    codes = protocol.codes
    learnt: Embeddings | Itq | None = None
    if codes is not None:
        check_bits(codes.bits, embedder.dim)
        if codes.fitted_on == "bundle":
            learnt = embedder.bundle.itq(codes.bits)
    parts: list[tuple[LabelledImages, Kind]] = [(photos, "photo")]
    if protocol.queries == "sketch":
        parts.insert(0, (sketches, "sketch"))
    first_learnt = len(parts)
    if codes is not None and codes.fitted_on == "training":
        parts += _training_parts(learnt_on)
    found, unreadable = _embedded_parts(embedder, parts, progress)
    if found[first_learnt:]:
        learnt = np.concatenate([part.rows for part in found[first_learnt:]])
    is_asked_by_photo = protocol.queries == "photo"
    queries, gallery = photo_queries(found[0]) if is_asked_by_photo else (found[0], found[1])
    count = sum(len(part.rows) for part in found)
    return Sides(queries, gallery, learnt, count, tuple(unreadable))


def _training_parts(
    learnt_on: tuple[LabelledImages, LabelledImages] | None,
) -> list[tuple[LabelledImages, Kind]]:
    sketches, photos = learnt_on or (None, None)
    parts: list[tuple[LabelledImages, Kind]] = []
    if sketches is not None and sketches.paths:
        parts.append((sketches, "sketch"))
    if photos is not None and photos.paths:
        parts.append((photos, "photo"))
    if not parts:
        raise BadData(
            "no images of seen classes to fit ITQ on",
            "a data set that has what the model was trained on",
            "--itq-on gallery",
        )
    return parts


def _embedded_parts(
    embedder: Embedder, parts: Sequence[tuple[LabelledImages, Kind]], progress: Progress
) -> tuple[list[Labelled], list[str]]:
    """Returns the embeddings of each part, and what could not be read."""
    total = sum(len(images.paths) for images, _ in parts)
    found: list[Labelled] = []
    unreadable: list[str] = []
    done = 0
    for images, kind in parts:
        part, bad = _embedded(embedder, images, kind, done, total, progress)
        found.append(part)
        unreadable += bad
        done += len(images.paths)
    return found, unreadable


def _embedded(
    embedder: Embedder,
    images: LabelledImages,
    kind: Kind,
    done_before: int,
    total: int,
    progress: Progress,
) -> tuple[Labelled, list[str]]:
    """Returns the embeddings of the images that can be read, and what cannot."""
    # Filled in place: a list of rows and their stack would be twice as much.
    rows = np.empty((len(images.paths), embedder.dim), dtype=np.float32)
    labels = np.empty(len(images.paths), dtype=np.int64)
    unreadable: list[str] = []
    count = 0
    for done, item in enumerate(embedder.stream(images.paths, kind), start=done_before + 1):
        if isinstance(item, Failed):
            unreadable.append(f"{os.fsdecode(item.path)}: {item.reason}")
        else:
            rows[count] = item.row
            labels[count] = images.labels[item.index]
            count += 1
        progress(done, total)
    if not count:
        raise BadData(f"none of {len(images.paths)} {kind} files can be read", "image files")
    return Labelled(rows[:count], labels[:count]), unreadable
