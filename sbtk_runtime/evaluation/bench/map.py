"""`sbtk bench map`: retrieval quality of a model on labelled images, by a protocol."""

from __future__ import annotations

import datetime
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sbtk_runtime.binary_codes import Itq, check_bits
from sbtk_runtime.bundle import onnx_name
from sbtk_runtime.embedding.embedder import Embedder
from sbtk_runtime.embedding.stream import Failed
from sbtk_runtime.errors import BadData
from sbtk_runtime.evaluation.metrics import (
    AP_CUTS,
    PRECISION_CUTS,
    Embeddings,
    evaluate_by,
    usual_measures,
)
from sbtk_runtime.evaluation.protocol import (
    ZERO_SHOT,
    Labelled,
    Labels,
    Measure,
    Protocol,
    photo_queries,
    require_contrast,
)
from sbtk_runtime.files import disk_full_explained
from sbtk_runtime.preprocess import Kind

__all__ = [
    "LabelledImages",
    "LabelledSet",
    "MapReport",
    "append_log",
    "find_earlier_runs",
    "measure_map",
]

_LOG_HEADER = (
    "# date\tbundle\tSHA-256 of the model file\tprotocol\tfigure\n"
    "# One line per evaluation of a bundle on unseen classes, written by `sbtk bench map`.\n"
)


@dataclass(frozen=True)
class MapReport:
    """Retrieval quality of one model file on one set of classes.

    Attributes:
        model_id: id of the bundle.
        model_sha256: hash of the ONNX file.
        engine, precision: engine and precision that embedded the images.
        dim: length of an embedding, before it becomes a code.
        protocol: classes, numbers of queries and photos, and ranking, in words.
        rules: the same rules as a structure.
        metrics: values in 0..1 by name, which states the rule.
        measures: the rule of each metric, in order.
        class_map: mean plain AP of the queries of each class.
        queries, photos: numbers of queries that the metrics are means of, and of searched photos.
        embedded: number of embedded images, including those that ITQ was fitted on.
        unanswerable: number of queries excluded because the gallery has no photo of their class.
        unreadable: `path: reason` of excluded images.
        embed_s, rank_s: seconds to embed all images, and to rank and compute metrics.
    """

    model_id: str
    model_sha256: str
    engine: str
    precision: str
    dim: int
    protocol: str
    rules: Protocol
    metrics: dict[str, float]
    measures: tuple[Measure, ...]
    class_map: dict[str, float]
    queries: int
    photos: int
    embedded: int
    unanswerable: int
    unreadable: tuple[str, ...]
    embed_s: float
    rank_s: float

    @property
    def images_per_s(self) -> float:
        """Images embedded per second, decoding included."""
        return self.embedded / self.embed_s

    @property
    def definitions(self) -> dict[str, str]:
        """The definition of each metric, in words."""
        return {measure.name: measure.definition for measure in self.measures}

    def to_json(self) -> dict[str, Any]:
        """Return the report as a JSON object, with the metrics as `figures`."""
        fields = asdict(self)
        del fields["measures"]
        return fields | {
            "figures": fields.pop("metrics"),
            "images_per_s": self.images_per_s,
            "ranking": self.rules.ranking,
            "figure_rules": {measure.name: measure.to_json() for measure in self.measures},
            "definitions": self.definitions,
        }

    def log_line(self) -> str:
        """Return a line of `unseen.log`: date, bundle, model hash, protocol, metric."""
        date = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        metric = f"mAP@all {self.metrics['mAP@all']:.4f}"
        protocol = f"{self.protocol}; {self.engine} {self.precision}"
        columns = (date, self.model_id, self.model_sha256, protocol, metric)
        return "\t".join(" ".join(column.split()) for column in columns)


def measure_map(
    embedder: Embedder,
    sketches: LabelledImages,
    photos: LabelledImages,
    *,
    of: str,
    protocol: Protocol = ZERO_SHOT,
    learnt_on: tuple[LabelledImages, LabelledImages] | None = None,
    ap_cuts: Sequence[int] = AP_CUTS,
    precision_cuts: Sequence[int] = PRECISION_CUTS,
    progress: Progress = lambda done, total: None,
) -> MapReport:
    """Measure the retrieval quality of the embedder's model on labelled images.

    Args:
        embedder: the model, engine and precision to measure.
        sketches: the queries, unless the protocol uses photos.
        photos: the gallery, with labels of the same classes.
        of: the classes in words, such as "21 unseen classes of SK-YE".
        protocol: how to rank, and by which rules the images were selected.
        learnt_on: training sketches and photos, if the protocol fits ITQ on them.
        ap_cuts: ranks k of mAP@k.
        precision_cuts: ranks k of P@k; ranks beyond the gallery are ignored.
        progress: called with the numbers of embedded images and of all images.

    Raises:
        BadData: no sketch or no photo can be read, or metrics would not depend on the ranking.
        BadConfig: the protocol requires codes that cannot be made.
    """
    # Before minutes of embedding, and again without unreadable images.
    require_contrast(*_split_labels(sketches, photos, protocol), photos.classes)
    started = time.perf_counter()
    sides = embed_sides(embedder, sketches, photos, learnt_on, protocol, progress)
    embed_s = time.perf_counter() - started
    require_contrast(sides.queries.labels, sides.gallery.labels, photos.classes)
    started = time.perf_counter()
    retrieval, rules = evaluate_by(
        protocol,
        sides.queries,
        sides.gallery,
        learnt_on=sides.learnt_on,
        ap_cuts=ap_cuts,
        precision_cuts=precision_cuts,
    )
    measures = usual_measures(ap_cuts, precision_cuts)
    metrics = retrieval.metrics(measures)
    info = embedder.engine.info
    return MapReport(
        model_id=embedder.bundle.manifest.model_id,
        model_sha256=_model_sha256(embedder),
        engine=info.name,
        precision=info.precision,
        dim=embedder.dim,
        protocol=_describe_protocol(of, rules, len(retrieval.labels), len(sides.gallery.rows)),
        rules=rules,
        metrics=metrics,
        measures=tuple(measure for measure in measures if measure.name in metrics),
        class_map={
            photos.classes[label]: float(retrieval.ap_all[retrieval.labels == label].mean())
            for label in np.unique(retrieval.labels)
        },
        queries=len(retrieval.labels),
        photos=len(sides.gallery.rows),
        embedded=sides.embedded,
        unanswerable=retrieval.unanswerable,
        unreadable=sides.unreadable,
        embed_s=embed_s,
        rank_s=time.perf_counter() - started,
    )


def _split_labels(
    sketches: LabelledImages, photos: LabelledImages, protocol: Protocol
) -> tuple[Labels, Labels]:
    """Return the labels of queries and gallery, if all images can be read."""
    searched = Labelled(np.empty((len(photos.labels), 0), np.float32), np.asarray(photos.labels))
    if protocol.queries == "sketch":
        return np.asarray(sketches.labels), searched.labels
    queries, gallery = photo_queries(searched)
    return queries.labels, gallery.labels


def append_log(path: Path, report: MapReport) -> None:
    """Append the report's line to a log and sync it; a new log gets a header."""
    with disk_full_explained(path):
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        with os.fdopen(descriptor, "ab") as file:
            header = "" if os.fstat(file.fileno()).st_size else _LOG_HEADER
            file.write(f"{header}{report.log_line()}\n".encode())
            file.flush()
            os.fsync(file.fileno())


def find_earlier_runs(path: Path, model_sha256: str) -> list[str]:
    """Return the lines of a log for the model file with this hash."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        return []
    return [line for line in lines if model_sha256 in line.split("\t")]


def _describe_protocol(of: str, rules: Protocol, queries: int, photos: int) -> str:
    setting = f" ({rules.setting_words})" if rules.setting_words else ""
    counted = f"{queries:,} {'sketches' if rules.queries == 'sketch' else 'photos'}"
    return f"{of}{setting}: {counted} against {photos:,} photos; {rules.ranking}"


def _model_sha256(embedder: Embedder) -> str:
    info = embedder.engine.info
    name = onnx_name(info.precision, info.form)
    return embedder.bundle.manifest.files[name].sha256


#: Called with the numbers of embedded images and of all images.
Progress = Callable[[int, int | None], None]


@dataclass(frozen=True)
class LabelledImages:
    """Image files, and the index of each one's class in `classes`."""

    paths: Sequence[Path]
    labels: Sequence[int]
    classes: Sequence[str]


@dataclass(frozen=True)
class LabelledSet:
    """Labelled images of an evaluation.

    Attributes:
        sketches: the query sketches.
        photos: the gallery, and the queries if the protocol uses photos.
        of: the classes in words, such as "21 unseen classes of SK-YE".
        learnt_on: training sketches and photos, for a protocol that fits ITQ on them.
        protocol: the rules by which the images were selected and metrics are computed.
        notices: messages about skipped files.
    """

    sketches: LabelledImages
    photos: LabelledImages
    of: str
    learnt_on: tuple[LabelledImages, LabelledImages] | None = None
    protocol: Protocol = ZERO_SHOT
    notices: tuple[str, ...] = ()


@dataclass(frozen=True)
class Sides:
    """The embeddings of an evaluation.

    Attributes:
        queries: sketches, or photos.
        gallery: photos.
        learnt_on: embeddings to fit ITQ on, or the bundle's own ITQ; `None` if not needed.
        embedded: number of embedded images.
        unreadable: `path: reason` of excluded images.
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
    """Embed the images that a protocol needs.

    Args:
        embedder: the model and engine.
        sketches: the queries, unless the protocol uses photos.
        photos: the gallery.
        learnt_on: training sketches and photos, embedded if the protocol fits ITQ on them.
        protocol: kind of queries, and what ITQ is fitted on.
        progress: called with the numbers of embedded images and of all images.

    Raises:
        BadConfig: embeddings of this width cannot have such codes (raised before embedding).
        BadData: no image of a kind can be read, or there are no training images.
        BadModel: the bundle has no ITQ of this length.
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
    found, unreadable = _embed_parts(embedder, parts, progress)
    if found[first_learnt:]:
        learnt = np.concatenate([part.rows for part in found[first_learnt:]])
    has_photo_queries = protocol.queries == "photo"
    queries, gallery = photo_queries(found[0]) if has_photo_queries else (found[0], found[1])
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
            "a data set with the training images",
            "--itq-on gallery",
        )
    return parts


def _embed_parts(
    embedder: Embedder, parts: Sequence[tuple[LabelledImages, Kind]], progress: Progress
) -> tuple[list[Labelled], list[str]]:
    """Return the embeddings of each part, and the unreadable images."""
    total = sum(len(images.paths) for images, _ in parts)
    found: list[Labelled] = []
    unreadable: list[str] = []
    done = 0
    for images, kind in parts:
        part, bad = _embed(embedder, images, kind, done, total, progress)
        found.append(part)
        unreadable += bad
        done += len(images.paths)
    return found, unreadable


def _embed(
    embedder: Embedder,
    images: LabelledImages,
    kind: Kind,
    done_before: int,
    total: int,
    progress: Progress,
) -> tuple[Labelled, list[str]]:
    """Return the embeddings of the readable images, and the unreadable images."""
    # Filled in place, since a list of rows and their stack would take twice the memory.
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
