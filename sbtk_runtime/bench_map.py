"""Retrieval quality of a model: sketches as queries, photos as the gallery, labels as the truth."""

from __future__ import annotations

import datetime
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sbtk_runtime.bundle import onnx_name
from sbtk_runtime.embed import Embedder, Failed
from sbtk_runtime.errors import BadData
from sbtk_runtime.files import disk_full_explained
from sbtk_runtime.metrics import Embeddings, Labels, evaluate
from sbtk_runtime.preprocess import Kind

Progress = Callable[[int, int | None], None]

#: What each figure of `Retrieval.summary` means; printed beside them.
DEFINITIONS = {
    "mAP@all": "plain AP over the whole gallery, sum_i P@i rel_i / R; mean over queries",
    "mAP@all (VOC)": "the same with the precision envelope (SAKE, DSN); mean over queries",
    "mAP@all (class mean)": "plain AP; mean over classes of each class's mean (DSN)",
    "mAP@200 (strict)": "cut after rank 200, divided by min(200, R); mean over queries",
    "mAP@200 (lenient)": "cut after rank 200, divided by the hits within it; mean over queries",
    "mAP@200 (literal)": "cut after rank 200, divided by R (the SBTKNet paper's Eq. 7)",
    "P@10": "share of relevant photos among the first 10; mean over queries",
    "P@100": "share of relevant photos among the first 100; mean over queries",
    "P@200": "share of relevant photos among the first 200; mean over queries",
}
RANKING = "cosine of unit embeddings; equal scores in the order of the gallery"

_LOG_HEADER = (
    "# date\tbundle\tSHA-256 of the model file\tprotocol\tfigure\n"
    "# One line for each run of a bundle on unseen classes; written by `sbtk bench map`.\n"
)


@dataclass(frozen=True)
class LabelledImages:
    """Image files and, for each, the index of its class in `classes`."""

    paths: Sequence[Path]
    labels: Sequence[int]
    classes: Sequence[str]


@dataclass(frozen=True)
class LabelledSet:
    """Sketches to ask with, photos to search, and the classes that they are of, in words."""

    sketches: LabelledImages
    photos: LabelledImages
    of: str


@dataclass(frozen=True)
class MapReport:
    """Retrieval quality of one model file on one set of classes.

    Attributes:
        model_id: of the bundle.
        model_sha256: of the ONNX file.
        engine, precision: what embedded the images.
        protocol: which classes, how many queries and photos, and how they were ranked.
        figures: name, which carries the rule, to value in 0..1.
        class_map: plain AP by class, mean over its queries.
        queries, photos: how many were embedded.
        unanswerable: queries left out because no photo of their class could be read.
        unreadable: `path: reason` of images left out.
        embed_s, rank_s: seconds for embedding all images, and for ranking and measuring.
    """

    model_id: str
    model_sha256: str
    engine: str
    precision: str
    protocol: str
    figures: dict[str, float]
    class_map: dict[str, float]
    queries: int
    photos: int
    unanswerable: int
    unreadable: tuple[str, ...]
    embed_s: float
    rank_s: float

    @property
    def images_per_s(self) -> float:
        """Images embedded per second, decoding included."""
        return (self.queries + self.photos) / self.embed_s

    def to_json(self) -> dict[str, Any]:
        """Returns the report as a JSON object, with the definitions of its figures."""
        definitions = {name: DEFINITIONS[name] for name in self.figures}
        return asdict(self) | {
            "images_per_s": self.images_per_s,
            "ranking": RANKING,
            "definitions": definitions,
        }

    def log_line(self) -> str:
        """Returns the run as a line of `unseen.log`: date, bundle, model hash, protocol, figure."""
        date = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        figure = f"mAP@all {self.figures['mAP@all']:.4f}"
        protocol = f"{self.protocol}; {self.engine} {self.precision}"
        columns = (date, self.model_id, self.model_sha256, protocol, figure)
        return "\t".join(" ".join(column.split()) for column in columns)


def measure_map(
    embedder: Embedder,
    sketches: LabelledImages,
    photos: LabelledImages,
    *,
    of: str,
    progress: Progress = lambda done, total: None,
) -> MapReport:
    """Returns the retrieval quality of the embedder's model on labelled images.

    Args:
        embedder: the model, engine and precision to measure.
        sketches: the queries.
        photos: the gallery; labels are about the same classes as the sketches'.
        of: the classes in words, such as "21 unseen classes of SK-YE".
        progress: told how many of how many images are embedded.

    Raises:
        BadData: no sketch or no photo can be read, or no query has a photo of its class.
    """
    started = time.perf_counter()
    total = len(sketches.paths) + len(photos.paths)
    queries, query_labels, bad_sketches = _embedded(
        embedder, sketches, "sketch", 0, total, progress
    )
    gallery, gallery_labels, bad_photos = _embedded(
        embedder, photos, "photo", len(sketches.paths), total, progress
    )
    embed_s = time.perf_counter() - started
    started = time.perf_counter()
    retrieval = evaluate(queries, query_labels, gallery, gallery_labels)
    info = embedder.engine.info
    return MapReport(
        model_id=embedder.bundle.manifest.model_id,
        model_sha256=_model_sha256(embedder),
        engine=info.name,
        precision=info.precision,
        protocol=f"{of}: {len(queries):,} sketches against {len(gallery):,} photos; {RANKING}",
        figures=retrieval.summary(),
        class_map={
            sketches.classes[label]: float(retrieval.ap_all[retrieval.labels == label].mean())
            for label in np.unique(retrieval.labels)
        },
        queries=len(queries),
        photos=len(gallery),
        unanswerable=retrieval.unanswerable,
        unreadable=(*bad_sketches, *bad_photos),
        embed_s=embed_s,
        rank_s=time.perf_counter() - started,
    )


def append_log(path: Path, report: MapReport) -> None:
    """Appends the report's line to a log, durably; a new log gets a header."""
    with disk_full_explained(path):
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        with os.fdopen(descriptor, "ab") as file:
            header = "" if os.fstat(file.fileno()).st_size else _LOG_HEADER
            file.write(f"{header}{report.log_line()}\n".encode())
            file.flush()
            os.fsync(file.fileno())


def earlier_runs(path: Path, model_sha256: str) -> list[str]:
    """Returns the lines of a log that are about the model file with this hash."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        return []
    return [line for line in lines if model_sha256 in line.split("\t")]


def _embedded(
    embedder: Embedder,
    images: LabelledImages,
    kind: Kind,
    done_before: int,
    total: int,
    progress: Progress,
) -> tuple[Embeddings, Labels, list[str]]:
    """Returns `(N, D) float32` rows, their labels, and what could not be read."""
    rows: list[NDArray[np.float32]] = []
    labels: list[int] = []
    unreadable: list[str] = []
    for done, item in enumerate(embedder.stream(images.paths, kind), start=done_before + 1):
        if isinstance(item, Failed):
            unreadable.append(f"{os.fsdecode(item.path)}: {item.reason}")
        else:
            rows.append(item.row)
            labels.append(images.labels[item.index])
        progress(done, total)
    if not rows:
        raise BadData(f"none of {len(images.paths)} {kind} files can be read", "image files")
    return np.stack(rows), np.asarray(labels, dtype=np.int64), unreadable


def _model_sha256(embedder: Embedder) -> str:
    info = embedder.engine.info
    name = onnx_name(info.precision, info.form)
    return embedder.bundle.manifest.files[name].sha256
