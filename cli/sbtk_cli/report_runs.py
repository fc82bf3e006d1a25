"""Data of the figures of `sbtk report`: embedded and ranked images of a data set."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sbtk_cli.bench_data import Classes, load_labelled_set
from sbtk_cli.output import notice, progress
from sbtk_runtime.embedding.embedder import Embedder
from sbtk_runtime.errors import BadData
from sbtk_runtime.evaluation.bench.map import LabelledImages, LabelledSet
from sbtk_runtime.evaluation.protocol import Protocol, require_contrast
from sbtk_runtime.evaluation.report.embedding_map import MapPoint, Rows
from sbtk_runtime.evaluation.report.ranked_sheet import (
    EmbeddedImages,
    Panel,
    compute_average_precisions,
    draw_queries,
    embed_labelled,
    find_queries,
    find_worst_queries,
    make_panel,
    select_images,
)
from sbtk_runtime.preprocess import Kind

_GENERALISED = Protocol(setting="generalised-all")


@dataclass(frozen=True)
class WantedQueries:
    """The query sketches: named ones, or else the `worst`, or else `random` ones."""

    named: tuple[Path, ...] = ()
    worst: int | None = None
    random: int = 4
    seed: int = 0


@dataclass(frozen=True)
class RankedPanels:
    """The panels of a figure, and the unreadable images."""

    panels: tuple[Panel, ...]
    unreadable: tuple[str, ...]


@dataclass(frozen=True)
class EmbeddedPoints:
    """Embeddings `(N, D) float32` with their images, and the unreadable images."""

    rows: Rows
    points: tuple[MapPoint, ...]
    title: str
    unreadable: tuple[str, ...]


def rank_panels(
    embedder: Embedder,
    data: Path,
    split: str | None,
    classes: Classes,
    wanted: WantedQueries,
    *,
    hits: int,
    with_generalised: bool,
    quiet: bool,
) -> RankedPanels:
    """Search for sketches of a data set, and return the panels of a figure.

    Args:
        embedder: of the model.
        data: folder of the data set.
        split: split that defines the unseen classes; by default the model's own.
        classes: `unseen` or `validation`.
        wanted: the query sketches.
        hits: number of photos for each sketch.
        with_generalised: whether to add a panel with the photos of seen classes in the gallery.
        quiet: print no progress and no notices.

    Raises:
        BadData: no images of the classes, photos of a single class, or no photos of seen classes
            for the second panel.
    """
    manifest = embedder.bundle.manifest
    images = _print_notices(load_labelled_set(data, manifest, split, classes), quiet)
    gallery = images.photos
    if with_generalised:
        gallery = load_labelled_set(data, manifest, split, classes, _GENERALISED).photos
        if len(gallery.paths) == len(images.photos.paths):
            raise BadData(
                "the data set has no photos of seen classes",
                "photos of seen classes for the second panel",
                "omit that panel: --no-generalised",
            )
    require_contrast(images.sketches.labels, images.photos.labels, images.photos.classes)
    chosen = _queries(images, wanted)
    sketches = images.sketches if chosen is None else select_images(images.sketches, chosen)
    queries = _embed(embedder, sketches, "sketch", quiet)
    every = _embed(embedder, gallery, "photo", quiet)
    measured = set(images.photos.classes)
    own = every.select([row for row, name in enumerate(every.classes) if name in measured])
    if chosen is None:
        queries = queries.select(
            find_worst_queries(compute_average_precisions(queries, own), wanted.worst or 1)
        )
    galleries = {f"Zero-shot: {len(own.paths):,} photos of {images.of}": own}
    if with_generalised:
        names = len(set(every.classes))
        galleries[f"Generalised: {len(every.paths):,} photos of {names} classes"] = every
    return RankedPanels(
        tuple(make_panel(title, queries, part, hits) for title, part in galleries.items()),
        (*queries.unreadable, *every.unreadable),
    )


def embed_points(
    embedder: Embedder,
    data: Path,
    split: str | None,
    classes: Classes,
    *,
    per_class: int,
    seed: int,
    quiet: bool,
) -> EmbeddedPoints:
    """Embed at most `per_class` sketches and photos of each class."""
    rows: list[Rows] = []
    points: list[MapPoint] = []
    unreadable: list[str] = []
    manifest = embedder.bundle.manifest
    images = _print_notices(load_labelled_set(data, manifest, split, classes), quiet)
    sides: tuple[tuple[Kind, LabelledImages], ...] = (
        ("sketch", images.sketches),
        ("photo", images.photos),
    )
    for kind, part in sides:
        found = _embed(embedder, _sample(part, per_class, seed), kind, quiet)
        rows.append(found.rows)
        unreadable += found.unreadable
        points += [
            MapPoint(path, kind, name)
            for path, name in zip(found.paths, found.classes, strict=True)
        ]
    title = f"{embedder.model_id}: {images.of}"
    return EmbeddedPoints(np.concatenate(rows), tuple(points), title, tuple(unreadable))


def _print_notices(images: LabelledSet, quiet: bool) -> LabelledSet:
    """Print the notices of the images, and return them."""
    for text in images.notices:
        notice(text, quiet=quiet)
    return images


def _queries(images: LabelledSet, wanted: WantedQueries) -> list[int] | None:
    """Return the indices of the query sketches; `None` if all have to be tried."""
    if wanted.named:
        return find_queries(images.sketches, wanted.named)
    if wanted.worst is not None:
        return None
    return draw_queries(len(images.sketches.paths), wanted.random, wanted.seed)


def _embed(embedder: Embedder, images: LabelledImages, kind: Kind, quiet: bool) -> EmbeddedImages:
    with progress(f"{kind}s", quiet=quiet) as advance:
        found = embed_labelled(embedder, images, kind, advance)
    for line in found.unreadable:
        notice(f"skipped {line}", quiet=quiet)
    return found


def _sample(images: LabelledImages, per_class: int, seed: int) -> LabelledImages:
    """Return at most `per_class` images of each class, in order."""
    random = np.random.default_rng(seed)
    labels = np.asarray(images.labels, dtype=np.int64)
    kept: list[Sequence[int]] = []
    for label in np.unique(labels):
        places = np.flatnonzero(labels == label)
        count = min(per_class, len(places))
        kept.append(sorted(random.choice(places, count, replace=False).tolist()))
    return select_images(images, [place for places in kept for place in places])
