"""Which queries a ranked contact sheet shows, and what a model finds for them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sbtk_runtime.bench.map import LabelledImages
from sbtk_runtime.embedding.embed import Embedder, Failed
from sbtk_runtime.errors import BadConfig, BadData
from sbtk_runtime.names import printable_name
from sbtk_runtime.preprocess import Kind
from sbtk_runtime.report.ranked_sheet import Panel, RankedPhoto, RankedQuery
from sbtk_runtime.retrieval.metrics import evaluate

Rows = NDArray[np.float32]
Indices = NDArray[np.int64]


@dataclass(frozen=True)
class EmbeddedImages:
    """Images that could be read, with their embeddings.

    Attributes:
        paths: the files.
        classes: the name of each one's class.
        rows: `(N, D) float32` unit rows.
        unreadable: `path: reason` of those that could not be read.
    """

    paths: tuple[Path, ...]
    classes: tuple[str, ...]
    rows: Rows
    unreadable: tuple[str, ...] = ()

    def chosen(self, indices: Sequence[int]) -> EmbeddedImages:
        """Returns some of the images, in the order given."""
        paths = tuple(self.paths[index] for index in indices)
        classes = tuple(self.classes[index] for index in indices)
        return EmbeddedImages(paths, classes, self.rows[list(indices)], self.unreadable)


def embed_labelled(
    embedder: Embedder,
    images: LabelledImages,
    kind: Kind,
    advance: Callable[[int, int | None], None],
) -> EmbeddedImages:
    """Returns the embeddings of the images; `advance` is told how many of how many are done.

    Raises:
        BadData: none of them can be read.
    """
    paths: list[Path] = []
    classes: list[str] = []
    rows: list[Rows] = []
    unreadable: list[str] = []
    for item in embedder.stream(images.paths, kind):
        advance(item.index + 1, len(images.paths))
        if isinstance(item, Failed):
            unreadable.append(f"{printable_name(item.path)}: {item.reason}")
            continue
        paths.append(images.paths[item.index])
        classes.append(images.classes[images.labels[item.index]])
        rows.append(item.row)
    if not rows:
        raise BadData(f"none of {len(images.paths)} {kind} files can be read", "image files")
    return EmbeddedImages(tuple(paths), tuple(classes), np.stack(rows), tuple(unreadable))


def some_of(images: LabelledImages, indices: Sequence[int]) -> LabelledImages:
    """Returns some of the images, in the order given."""
    paths = [images.paths[index] for index in indices]
    return LabelledImages(paths, [images.labels[index] for index in indices], images.classes)


def named_queries(sketches: LabelledImages, files: Sequence[Path]) -> list[int]:
    """Returns where the named files stand among the sketches, in the order of the names.

    Raises:
        BadData: one is none of the sketches: its class would not be known.
    """
    places = {path.resolve(): index for index, path in enumerate(sketches.paths)}
    for file in files:
        if file.resolve() not in places:
            raise BadData(
                f"{printable_name(file)} is none of the {len(sketches.paths)} sketches that are "
                "measured",
                f"a sketch of {', '.join(sketches.classes[:5])}"
                + (", ..." if len(sketches.classes) > 5 else ""),
                "without its class nobody could say which hits are right",
            )
    return [places[file.resolve()] for file in files]


def random_queries(total: int, count: int, seed: int) -> list[int]:
    """Returns `count` of `total` places, each once, drawn by the seed.

    Raises:
        BadConfig: there are fewer.
    """
    if count > total:
        raise BadConfig(f"{count} queries of {total} sketches", f"at most {total}")
    drawn = np.random.default_rng(seed).choice(total, count, replace=False)
    return [int(place) for place in drawn]


def worst_queries(average_precisions: NDArray[np.float64], count: int) -> list[int]:
    """Returns the indices of the `count` lowest of `average_precisions (Q,) float64`, lowest first.

    Queries without a relevant photo, whose AP is NaN, are left out.

    Raises:
        BadConfig: fewer have one.
    """
    total = int(np.isfinite(average_precisions).sum())
    if count > total:
        raise BadConfig(f"{count} queries of {total} sketches", f"at most {total}")
    return [int(place) for place in np.argsort(average_precisions, kind="stable")[:count]]


def average_precisions(queries: EmbeddedImages, gallery: EmbeddedImages) -> NDArray[np.float64]:
    """Returns plain AP over the whole gallery `(Q,)`; NaN where it has no photo of the class."""
    names = {name: label for label, name in enumerate(dict.fromkeys(gallery.classes))}
    labels = np.array([names.get(name, -1) for name in queries.classes], dtype=np.int64)
    photo_labels = np.array([names[name] for name in gallery.classes], dtype=np.int64)
    values = np.full(len(labels), np.nan)
    if (is_answerable := labels >= 0).any():
        found = evaluate(queries.rows, labels, gallery.rows, photo_labels)
        values[is_answerable] = found.ap_all
    return values


def top_photos(queries: Rows, gallery: Rows, count: int) -> Indices:
    """Returns the places of the best photos `(Q, count)`, best first, ties by gallery order."""
    order = np.argsort(-(queries @ gallery.T), axis=1, kind="stable")
    return np.asarray(order[:, :count], dtype=np.int64)


def ranked_panel(title: str, queries: EmbeddedImages, gallery: EmbeddedImages, count: int) -> Panel:
    """Returns a panel of the queries with the best `count` photos of the gallery for each."""
    found = top_photos(queries.rows, gallery.rows, count)
    return Panel(
        title,
        tuple(
            RankedQuery(
                queries.paths[place],
                name,
                tuple(
                    RankedPhoto(
                        gallery.paths[hit], gallery.classes[hit], gallery.classes[hit] == name
                    )
                    for hit in found[place]
                ),
            )
            for place, name in enumerate(queries.classes)
        ),
    )
