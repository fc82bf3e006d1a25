"""What an ablation study found: every run's figures, their means and spreads, and a picture."""

from __future__ import annotations

import csv
import datetime
import io
import math
import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sbtk_runtime.errors import BadData
from sbtk_runtime.files import (
    atomic_path,
    read_json_object,
    sha256_of_file,
    write_atomically,
    write_json_atomically,
)
from sbtk_runtime.itq import fit_itq
from sbtk_runtime.retrieval.metrics import evaluate
from sbtk_runtime.retrieval.protocol import Distance
from sbtk_train.data import ImageSet, of_classes, read_dataset
from sbtk_train.data.splits import open_split
from sbtk_train.device import Compute, choose_compute
from sbtk_train.runs.ablation import Row, Study, finished
from sbtk_train.runs.checkpoint import STUDENT, load_run
from sbtk_train.runs.evaluate import Embed, by_feature_maps, by_pixels, few_photos
from sbtk_train.runs.feature_maps import FeatureMaps
from sbtk_train.runs.setup import readable_division
from sbtk_train.students.student import Student

Said = Callable[[str], None]
Rows = NDArray[np.float32] | NDArray[np.uint8]

BITS = 64
#: The figure that rows are compared by.
FIGURE = "mAP@all"
_FIGURES = (FIGURE, "mAP@200 (strict)", "P@10", "P@100", "P@200")
_BAR_HEIGHT = 0.38


def figure_of_bits(bits: int = BITS) -> str:
    """Returns the name of the figure of binary codes of so many bits."""
    return f"{FIGURE} ({bits} bits, ITQ of training features)"


@dataclass(frozen=True)
class Score:
    """One figure of one run.

    Attributes:
        row: the row's name.
        seed: of the run.
        epochs: that it was trained for.
        classes: `validation` (seen, held out) or `unseen`.
        figure: name, which carries the rule.
        value: 0 to 1.
    """

    row: str
    seed: int
    epochs: int
    classes: str
    figure: str
    value: float


@dataclass(frozen=True)
class Summary:
    """Mean and spread of a row over its seeds.

    `spread` is the standard deviation of a sample; NaN for a single run.
    """

    row: Row
    mean: float
    spread: float
    runs: int


def score_runs(study: Study, root: Path, classes: str, said: Said) -> list[Score]:
    """Returns the figures of every run that has ended, on `validation` or on `unseen` classes.

    They are kept in each run's folder, so each student is looked at once. For unseen classes a
    line for each student is appended to `unseen.log` in `root`; data without them have no figures.
    """
    scores: list[Score] = []
    division = None
    data = read_dataset(Path(study.base.data), keep_duplicates=study.base.keep_duplicates)
    split = open_split(study.base.split, data.classes)
    unseen = of_classes(data, [name for name in data.classes if split.is_unseen(name)])
    if classes == "unseen" and not unseen.classes:
        said(f"the data have none of the unseen classes of {split.name}: not measured on them")
        return []
    for row, seed, folder in finished(study, root):
        kept = folder / f"scores-{classes}.json"
        if not kept.is_file():
            if division is None:
                division, _ = readable_division(study.base, data, split, said)
                compute = choose_compute(study.base.device, study.base.precision)
            images = division.validation if classes == "validation" else unseen
            said(f"measuring {folder.name} on {len(images.classes)} {classes} classes")
            student = load_run(folder).student.to(compute.device)
            embed = _embed(study, student, compute, said)
            figures = _figures(student, images, few_photos(division.held_out), embed)
            # Logged first: stopped in between, a look at unseen classes is told twice, not hidden.
            if classes == "unseen":
                _log(root, folder, study, images, figures)
            write_json_atomically(kept, figures)
        epochs = study.epochs_of(row)
        scores += [
            Score(row.name, seed, epochs, classes, figure, float(value))
            for figure, value in read_json_object(kept, BadData).items()
        ]
    return scores


def summaries(study: Study, scores: Iterable[Score], classes: str, figure: str) -> list[Summary]:
    """Returns mean and spread of one figure for each row that has a run."""
    kept = [score for score in scores if score.classes == classes and score.figure == figure]
    result = []
    for row in study.rows:
        values = [score.value for score in kept if score.row == row.name]
        if values:
            spread = statistics.stdev(values) if len(values) > 1 else math.nan
            result.append(Summary(row, statistics.fmean(values), spread, len(values)))
    return result


def write_csv(path: Path, scores: Iterable[Score]) -> None:
    """Writes the scores as `row,seed,epochs,classes,figure,value`."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("row", "seed", "epochs", "classes", "figure", "value"))
    for score in scores:
        writer.writerow(
            (score.row, score.seed, score.epochs, score.classes, score.figure, f"{score.value:.6f}")
        )
    write_atomically(path, text.getvalue().encode())


def as_markdown(study: Study, scores: list[Score]) -> str:
    """Returns a table of means and spreads, a row for each row of the study."""
    columns = [
        (classes, figure)
        for classes in ("validation", "unseen")
        for figure in (FIGURE, "mAP@200 (strict)", "P@10", "P@100", figure_of_bits())
        if summaries(study, scores, classes, figure)
    ]
    lines = [
        "| row | runs | "
        + " | ".join(f"{classes}: {figure}" for classes, figure in columns)
        + " |",
        "| --- | --- | " + " | ".join("---" for _ in columns) + " |",
    ]
    for row in study.rows:
        cells, runs = [], 0
        for classes, figure in columns:
            found = [s for s in summaries(study, scores, classes, figure) if s.row == row]
            cells.append(_shown(found[0]) if found else "")
            runs = max([runs, *(s.runs for s in found)])
        if runs:
            lines.append(f"| {row.title} | {runs} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _shown(summary: Summary) -> str:
    """Returns mean and spread; one run has no spread."""
    if math.isnan(summary.spread):
        return f"{summary.mean:.4f}"
    return f"{summary.mean:.4f} ± {summary.spread:.4f}"


def draw(study: Study, scores: list[Score], path: Path) -> Path | None:
    """Writes bars of mAP@all with their spreads; `None` without matplotlib."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return None
    figure = Figure(figsize=(8, 0.45 * len(study.rows) + 1.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    labels = {row.name: place for place, row in enumerate(study.rows)}
    for shift, classes in ((-_BAR_HEIGHT / 2, "validation"), (_BAR_HEIGHT / 2, "unseen")):
        found = summaries(study, scores, classes, FIGURE)
        if found:
            axes.barh(
                [labels[summary.row.name] + shift for summary in found],
                [summary.mean for summary in found],
                height=_BAR_HEIGHT,
                xerr=[0.0 if math.isnan(s.spread) else s.spread for s in found],
                label=f"{classes} classes",
                capsize=2,
            )
    axes.set_yticks(range(len(study.rows)), [row.title for row in study.rows])
    axes.invert_yaxis()
    seeds = len(study.seeds)
    axes.set(xlabel=f"{FIGURE}, mean and standard deviation of {seeds} seeds", xlim=(0, None))
    axes.grid(axis="x", alpha=0.3)
    axes.legend(frameon=False, fontsize=8)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
    return path


def _figures(
    student: Student, images: ImageSet, training: ImageSet, embed: Embed
) -> dict[str, float]:
    """Returns the figures on `images`; `training` are training images to learn the codes from."""
    sketches = embed(student, images.sketches, "sketch").rows
    photos = embed(student, images.photos, "photo").rows

    def measured(queries: Rows, gallery: Rows, distance: Distance) -> dict[str, float]:
        found = evaluate(
            queries, images.sketch_labels, gallery, images.photo_labels, distance=distance
        )
        return found.summary()

    found = measured(sketches, photos, "cosine")
    figures = {name: found[name] for name in _FIGURES if name in found}
    learnt_on = np.concatenate(
        [
            embed(student, training.sketches, "sketch").rows,
            embed(student, training.photos, "photo").rows,
        ]
    )
    bits = min(BITS, learnt_on.shape[1] // 8 * 8, (len(learnt_on) - 1) // 8 * 8)
    if bits:
        itq = fit_itq(learnt_on, bits)
        found = measured(itq.codes(sketches), itq.codes(photos), "hamming")
        figures[figure_of_bits(bits)] = found[FIGURE]
    return figures


def _embed(study: Study, student: Student, compute: Compute, said: Said) -> Embed:
    base = study.base
    if not base.feature_folder:
        return by_pixels(compute, base.workers)
    size = study.common["train_size_px"]
    assert isinstance(size, int)
    maps = FeatureMaps(
        Path(base.feature_folder), student, base.freeze_until, size, compute, base.workers, said
    )
    return by_feature_maps(compute, maps)


def _log(
    root: Path, folder: Path, study: Study, images: ImageSet, figures: dict[str, float]
) -> None:
    date = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    protocol = (
        f"{len(images.classes)} unseen classes of {study.base.split}: {len(images.sketches):,} "
        f"sketches against {len(images.photos):,} photos; cosine of unit embeddings; equal scores "
        "in the order of the gallery; torch, ablation"
    )
    sha256 = sha256_of_file(folder / STUDENT)
    line = "\t".join((date, folder.name, sha256, protocol, f"{FIGURE} {figures[FIGURE]:.4f}"))
    with (root / "unseen.log").open("a", encoding="utf-8") as file:
        file.write(line + "\n")
