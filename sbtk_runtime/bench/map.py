"""Retrieval quality of a model on labelled images, by a protocol that every figure carries."""

from __future__ import annotations

import datetime
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sbtk_runtime.bench.embed_sides import LabelledImages, LabelledSet, Progress, embed_sides
from sbtk_runtime.bundle import onnx_name
from sbtk_runtime.embedding.embed import Embedder
from sbtk_runtime.files import disk_full_explained
from sbtk_runtime.retrieval.evaluation import evaluate_by
from sbtk_runtime.retrieval.metrics import AP_CUTS, PRECISION_CUTS, usual_measures
from sbtk_runtime.retrieval.protocol import ZERO_SHOT, Measure, Protocol

__all__ = [
    "LabelledImages",
    "LabelledSet",
    "MapReport",
    "append_log",
    "earlier_runs",
    "measure_map",
]

_LOG_HEADER = (
    "# date\tbundle\tSHA-256 of the model file\tprotocol\tfigure\n"
    "# One line for each run of a bundle on unseen classes; written by `sbtk bench map`.\n"
)


@dataclass(frozen=True)
class MapReport:
    """Retrieval quality of one model file on one set of classes.

    Attributes:
        model_id: of the bundle.
        model_sha256: of the ONNX file.
        engine, precision: what embedded the images.
        dim: length of an embedding, before it becomes a code.
        protocol: which classes, how many queries and photos, and how they were ranked, in words.
        rules: the same rules, each by its name.
        figures: name, which carries the rule, to value in 0..1.
        measures: the rule of each figure, in their order.
        class_map: plain AP by class, mean over its queries.
        queries, photos: how many asked, and how many were searched.
        embedded: how many images were embedded, those that ITQ learnt on, too.
        unanswerable: queries left out because no photo of their class could be read.
        unreadable: `path: reason` of images left out.
        embed_s, rank_s: seconds for embedding all images, and for ranking and measuring.
    """

    model_id: str
    model_sha256: str
    engine: str
    precision: str
    dim: int
    protocol: str
    rules: Protocol
    figures: dict[str, float]
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
        """What each figure means, in words."""
        return {measure.name: measure.definition for measure in self.measures}

    def to_json(self) -> dict[str, Any]:
        """Returns the report as a JSON object: `rules` of all figures, `figure_rules` of each."""
        fields = asdict(self)
        del fields["measures"]
        return fields | {
            "images_per_s": self.images_per_s,
            "ranking": self.rules.ranking,
            "figure_rules": {measure.name: measure.to_json() for measure in self.measures},
            "definitions": self.definitions,
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
    protocol: Protocol = ZERO_SHOT,
    learnt_on: tuple[LabelledImages, LabelledImages] | None = None,
    ap_cuts: Sequence[int] = AP_CUTS,
    precision_cuts: Sequence[int] = PRECISION_CUTS,
    progress: Progress = lambda done, total: None,
) -> MapReport:
    """Returns the retrieval quality of the embedder's model on labelled images.

    Args:
        embedder: the model, engine and precision to measure.
        sketches: the queries, unless the protocol says that photos ask.
        photos: the gallery; labels are about the same classes as the sketches'.
        of: the classes in words, such as "21 unseen classes of SK-YE".
        protocol: how to rank, and by which rules the images were chosen.
        learnt_on: training sketches and photos, where the protocol fits ITQ on them.
        ap_cuts: ranks k of mAP@k.
        precision_cuts: ranks k of P@k; those beyond the gallery are left out.
        progress: told how many of how many images are embedded.

    Raises:
        BadData: no sketch or no photo can be read, or no query has a photo of its class.
        BadConfig: the protocol asks for codes that cannot be had.
    """
    started = time.perf_counter()
    sides = embed_sides(embedder, sketches, photos, learnt_on, protocol, progress)
    embed_s = time.perf_counter() - started
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
    figures = retrieval.figures(measures)
    info = embedder.engine.info
    return MapReport(
        model_id=embedder.bundle.manifest.model_id,
        model_sha256=_model_sha256(embedder),
        engine=info.name,
        precision=info.precision,
        dim=embedder.dim,
        protocol=_in_words(of, rules, len(sides.queries.rows), len(sides.gallery.rows)),
        rules=rules,
        figures=figures,
        measures=tuple(measure for measure in measures if measure.name in figures),
        class_map={
            photos.classes[label]: float(retrieval.ap_all[retrieval.labels == label].mean())
            for label in np.unique(retrieval.labels)
        },
        queries=len(sides.queries.rows),
        photos=len(sides.gallery.rows),
        embedded=sides.embedded,
        unanswerable=retrieval.unanswerable,
        unreadable=sides.unreadable,
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


def _in_words(of: str, rules: Protocol, queries: int, photos: int) -> str:
    setting = f" ({rules.setting_words})" if rules.setting_words else ""
    asked = f"{queries:,} {'sketches' if rules.queries == 'sketch' else 'photos'}"
    return f"{of}{setting}: {asked} against {photos:,} photos; {rules.ranking}"


def _model_sha256(embedder: Embedder) -> str:
    info = embedder.engine.info
    name = onnx_name(info.precision, info.form)
    return embedder.bundle.manifest.files[name].sha256
