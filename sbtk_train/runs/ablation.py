"""The ablation study: contributions of a method's parts, with the spread over seeds.

The rows are those of the SBTKNet paper's Table 5, then SBTKNet, DSN and SAKE at two embedding
lengths. Each row is trained with each seed in its own run folder, so that an interrupted study
resumes. Unseen classes are evaluated once, after every run has ended; nothing is selected by them.
"""

from __future__ import annotations

import csv
import datetime
import io
import json
import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sbtk_runtime.binary_codes import fit_itq
from sbtk_runtime.errors import BadConfig, BadData, DiskFull
from sbtk_runtime.evaluation.metrics import evaluate
from sbtk_runtime.evaluation.protocol import Distance
from sbtk_runtime.files import (
    atomic_path,
    read_json_object,
    sha256_of_file,
    write_atomically,
    write_json_atomically,
)
from sbtk_runtime.preprocess import Preprocessing
from sbtk_train.compute import Compute, choose_compute
from sbtk_train.config import (
    FREE_FIELDS,
    PATH_FIELDS,
    PROVENANCE_FIELDS,
    Method,
    Recipe,
    TrainConfig,
    default_recipe,
    make_recipe,
    read_config,
    recipe_type,
)
from sbtk_train.data.dataset import read_dataset
from sbtk_train.data.image_set import ImageSet, select_classes
from sbtk_train.data.splits import open_split
from sbtk_train.models.student import Student
from sbtk_train.progress import Listener, Notify
from sbtk_train.runs.checkpoint import LAST, RECORD, STUDENT, load_run
from sbtk_train.runs.context import load_division
from sbtk_train.runs.evaluate import limit_photos
from sbtk_train.runs.run import train
from sbtk_train.runs.sources import (
    Embed,
    FeatureMaps,
    make_pixel_embedder,
)

#: Marks a finished run; others are resumed.
DONE = "done.json"
#: Key of the hash of the measured images, next to the metrics.
_IMAGES = "images_sha256"


@dataclass(frozen=True)
class Row:
    """One row of the study.

    Attributes:
        name: its name in folders and results.
        title: its title in tables.
        method: `sbtknet`, `dsn` or `sake`.
        dim: length of the embedding.
        changes: changed hyperparameters.
        rounds: factor of the method's epochs, for rows whose epochs have fewer images.
        own_optimizer: whether it keeps its own recipe's optimiser, schedule and averaging instead
            of the study's.
        recipe: SBTKNet's recipe before the changes; empty for the study's.
    """

    name: str
    title: str
    method: Method = "sbtknet"
    dim: int = 512
    changes: dict[str, object] = field(default_factory=dict)
    rounds: int = 1
    own_optimizer: bool = False
    recipe: str = ""


_ALONE: dict[str, object] = {
    "batches": "quadruplets",
    "identity": False,
    "knowledge": False,
    "attention": False,
    "refit": False,
}
_ALL = _ALONE | {"metric": "quadruplet", "identity": True, "knowledge": True}

TABLE_5: tuple[Row, ...] = (
    Row("triplet", "triplet", changes=_ALONE | {"metric": "triplet"}),
    Row("quadruplet", "quadruplet", changes=_ALONE | {"metric": "quadruplet"}),
    Row(
        "quadruplet-identity",
        "quadruplet + identity",
        changes=_ALONE | {"metric": "quadruplet", "identity": True},
    ),
    Row(
        "quadruplet-knowledge",
        "quadruplet + knowledge",
        changes=_ALONE | {"metric": "quadruplet", "knowledge": True},
    ),
    Row("all", "all three losses", changes=_ALL),
    Row("all-attention", "all three + attention", changes=_ALL | {"attention": True}),
)
#: The default recipe's metric term, which is not the paper's.
CONTRASTIVE = Row(
    "contrastive",
    "contrastive, all in the batch, + identity + knowledge",
    changes=_ALL | {"metric": "contrastive", "batches": "class-balanced"},
    rounds=2,
)
METHODS_COMPARED: tuple[Row, ...] = (
    Row("sbtknet-64", "SBTKNet, 64-d", dim=64, changes=_ALL),
    Row("sake-512", "SAKE, 512-d", "sake", 512),
    Row("sake-64", "SAKE, 64-d", "sake", 64),
    Row("dsn-512", "DSN, 512-d", "dsn", 512),
    Row("dsn-64", "DSN, 64-d", "dsn", 64),
)
ROWS: tuple[Row, ...] = (*TABLE_5, CONTRASTIVE, *METHODS_COMPARED)
#: Rows that are only trained on request: each method with the optimiser that its paper states.
OWN_OPTIMIZERS: tuple[Row, ...] = (
    Row(
        "sbtknet-own",
        "SBTKNet, own optimiser",
        changes={"refit": False, "new_heads": False, "held_out_photos": False},
        own_optimizer=True,
        recipe="paper",
    ),
    Row("sake-own", "SAKE, own optimiser", "sake", own_optimizer=True),
    Row("dsn-own", "DSN, own optimiser", "dsn", own_optimizer=True),
)
_OPTIMIZER_FIELDS = (
    *("optimizer", "learning_rate", "head_rate_factor", "momentum", "weight_decay"),
    *("schedule", "step_epochs", "warmup_steps", "average_decay"),
)


@dataclass(frozen=True)
class Study:
    """The runs of an ablation study.

    Attributes:
        base: the configuration that each row changes: data, split, weights, frozen stages.
        sbtknet_recipe: SBTKNet's recipe before a row's changes.
        common: hyperparameters, such as the image size, for all recipes that have them.
        epochs: number of epochs by method.
        seeds: seeds of initialisation, order and augmentation; validation classes stay the same.
        rows: the rows.
    """

    base: TrainConfig
    sbtknet_recipe: str
    common: dict[str, object]
    epochs: dict[Method, int]
    seeds: tuple[int, ...]
    rows: tuple[Row, ...] = ROWS

    def config(self, row: Row, seed: int) -> TrainConfig:
        """Return the configuration of one run."""
        return replace(
            self.base,
            method=row.method,
            recipe=self._recipe(row),
            dim=row.dim,
            seed=seed,
        )

    def epochs_of(self, row: Row) -> int:
        """Return the number of epochs of a row."""
        return row.rounds * self.epochs[row.method]

    def _recipe(self, row: Row) -> Recipe:
        own = {field.name for field in fields(recipe_type(row.method))}
        if row.own_optimizer:
            own.difference_update(_OPTIMIZER_FIELDS)
        shared = {name: value for name, value in self.common.items() if name in own}
        # All methods see the same images, whatever their own recipes say.
        changes = {"ink_crop": True} | shared | row.changes | {"epochs": self.epochs_of(row)}
        name = row.recipe or self.sbtknet_recipe
        if row.method != "sbtknet":
            name = default_recipe(row.method, self.base.split)
        return make_recipe(name, row.method, **changes)

    def runs(self) -> Iterator[tuple[Row, int]]:
        """Yield every row with every seed, seed by seed."""
        for seed in self.seeds:
            for row in self.rows:
                yield row, seed


def run_folder(root: Path, row: Row, seed: int) -> Path:
    """Return the folder of one run of a study."""
    return root / f"{row.name}-seed{seed}"


def is_done(folder: Path) -> bool:
    """Return whether the run in `folder` has ended."""
    return (folder / DONE).is_file()


def run_study(
    study: Study,
    root: Path,
    listener: Listener,
    *,
    should_stop: Callable[[], bool] = lambda: False,
    on_trainer: Callable[[Any], None] | None = None,
) -> None:
    """Train the unfinished runs of a study.

    Args:
        study: the study.
        root: the folder of the run folders.
        listener: receives the events of each run.
        should_stop: called before each run.
        on_trainer: called with each trainer before it starts, so that a signal can stop it.

    Raises:
        BadConfig: a folder has a run of another configuration.
        BadData: the training images changed since the study's first run.
        KeyboardInterrupt: when stopped; finished runs are kept.
    """
    runs = list(study.runs())
    done = [
        run_folder(root, row, seed) for row, seed in runs if is_done(run_folder(root, row, seed))
    ]
    for number, (row, seed) in enumerate(runs, start=1):
        if should_stop():
            raise KeyboardInterrupt
        folder = run_folder(root, row, seed)
        config = study.config(row, seed)
        if is_done(folder):
            _require_same(folder, config)
            continue
        listener(f"run {number} of {len(runs)}: {row.title}, seed {seed}")
        folder.mkdir(parents=True, exist_ok=True)
        resume = (folder / LAST).is_file()
        if resume:
            _require_same(folder, config)
        try:
            record = train(config, folder, listener, resume=resume, on_trainer=on_trainer)
        except DiskFull as problem:
            step = "free some space, then: the same command again, which resumes the study"
            raise DiskFull(problem.found, problem.expected, step) from problem
        for other in done[:1]:
            _require_same_images(folder, other)
        done.append(folder)
        write_json_atomically(folder / DONE, {"best": record.get("best", {})})
        # The checkpoint is four times the size of the student, and no longer needed.
        (folder / LAST).unlink(missing_ok=True)


def find_others(study: Study, root: Path) -> list[str]:
    """Return the names of the folders of finished runs that are not of the study."""
    own = {run_folder(root, row, seed).name for row, seed in study.runs()}
    return sorted({path.parent.name for path in root.glob(f"*/{DONE}")} - own)


def find_missing(study: Study, root: Path) -> list[str]:
    """Return the names of the folders of unfinished runs."""
    folders = [run_folder(root, row, seed) for row, seed in study.runs()]
    return [folder.name for folder in folders if not is_done(folder)]


def select_rows(names: Sequence[str]) -> tuple[Row, ...]:
    """Return the rows with these names, in the study's order; `ROWS` without names.

    Raises:
        BadConfig: there is no such row.
    """
    known = {row.name: row for row in (*ROWS, *OWN_OPTIMIZERS)}
    unknown = [name for name in names if name not in known]
    if unknown:
        raise BadConfig(f"no row {unknown[0]!r} in the ablation", ", ".join(known))
    return tuple(row for name, row in known.items() if name in names) if names else ROWS


def _require_same(folder: Path, config: TrainConfig) -> None:
    """Raise `BadConfig` with the first difference if a run has another configuration."""
    there, here = asdict(read_config(folder)), asdict(config)
    for free in (*FREE_FIELDS, *PROVENANCE_FIELDS):
        there.pop(free), here.pop(free)
    for place in PATH_FIELDS:  # older studies hold paths as they were typed
        for values in (there, here):
            values[place] = values[place] and str(Path(values[place]).absolute())
    there_flat, here_flat = _flat(there), _flat(here)
    for key in sorted(set(there_flat) | set(here_flat)):
        if there_flat.get(key) != here_flat.get(key):
            raise BadConfig(
                f"{folder} was trained with {key} = {json.dumps(there_flat.get(key))}",
                f"{json.dumps(here_flat.get(key))}, as requested now",
                "the options of the first run, or another folder: --out FOLDER",
            )


def _require_same_images(folder: Path, other: Path) -> None:
    """Raise `BadData` if two runs were trained on different images."""
    here, there = (
        str(read_json_object(run / RECORD, BadConfig).get("data_sha256")) for run in (folder, other)
    )
    if here != there:
        raise BadData(
            f"{folder} was trained on other images than {other}: SHA-256 {here[:12]}",
            f"{there[:12]}; the data changed since the study began",
            "restore the data and remove that folder, or start again in another: --out FOLDER",
        )


def _flat(values: dict[str, Any]) -> dict[str, Any]:
    recipe_values = {f"recipe.{key}": value for key, value in values["recipe"].items()}
    return {key: value for key, value in values.items() if key != "recipe"} | recipe_values


Rows = NDArray[np.float32] | NDArray[np.uint8]

BITS = 64
#: The metric to compare rows by.
METRIC = "mAP@all"
_METRICS = (METRIC, "mAP@200 (strict)", "P@10", "P@100", "P@200")
_BAR_HEIGHT = 0.38


def bits_metric_name(bits: int = BITS) -> str:
    """Return the name of the metric of binary codes of that length."""
    return f"{METRIC} ({bits} bits, ITQ of training features)"


@dataclass(frozen=True)
class Score:
    """One metric of one run.

    Attributes:
        row: the row's name.
        seed: the run's seed.
        epochs: the run's number of epochs.
        classes: `validation` (seen, held out) or `unseen`.
        figure: the metric's name, which states its rule.
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

    `spread` is the sample standard deviation; NaN for a single run.
    """

    row: Row
    mean: float
    spread: float
    runs: int


def score_runs(study: Study, root: Path, classes: str, notify: Notify) -> list[Score]:
    """Return the metrics of every finished run on `validation` or on `unseen` classes.

    They are saved in each run's folder, so each student is evaluated once. For unseen classes a
    line for each student is appended to `unseen.log` in `root`.

    Args:
        study: the study.
        root: the folder of the run folders.
        classes: `validation` or `unseen`; nothing is returned if the data have no unseen classes.
        notify: called with progress messages.

    Raises:
        BadData: a run was measured on other images than the data have now.
    """
    scores: list[Score] = []
    data = read_dataset(Path(study.base.data), keep_duplicates=study.base.keep_duplicates)
    split = open_split(study.base.split, data.classes)
    unseen = select_classes(data, [name for name in data.classes if split.is_unseen(name)])
    if classes == "unseen" and not unseen.classes:
        notify(f"the data have none of the unseen classes of {split.name}: not measured on them")
        return []
    division, _ = load_division(study.base, data, split, lambda text: None)  # said in training
    images = division.validation if classes == "validation" else unseen
    compute = choose_compute(study.base.device, study.base.precision)
    for row, seed in study.runs():
        folder = run_folder(root, row, seed)
        if not is_done(folder):
            continue
        kept = folder / f"scores-{classes}.json"
        if not kept.is_file():
            notify(f"measuring {folder.name} on {len(images.classes)} {classes} classes")
            run = load_run(folder)
            student = run.student.to(compute.device)
            embed = _embed(study, student, run.config.recipe.preprocessing, compute, notify)
            figures = _figures(student, images, limit_photos(division.held_out), embed)
            # Logged first: if interrupted, an evaluation is logged twice rather than never.
            if classes == "unseen":
                _log(root, folder, study, images, figures)
            write_json_atomically(kept, {_IMAGES: images.sha256} | figures)
        values = read_json_object(kept, BadData)
        measured_on = values.pop(_IMAGES, images.sha256)  # older studies do not say
        if measured_on != images.sha256:
            raise BadData(
                f"{kept} is of other images than the {classes} classes have now: "
                f"SHA-256 {images.sha256[:12]}",
                f"{measured_on[:12]}; the data changed since the study began",
                "restore the data, or start again in another folder: --out FOLDER",
            )
        epochs = study.epochs_of(row)
        scores += [
            Score(row.name, seed, epochs, classes, figure, float(value))
            for figure, value in values.items()
        ]
    return scores


def summarise(study: Study, scores: Iterable[Score], classes: str, figure: str) -> list[Summary]:
    """Return mean and spread of one metric for each row with a finished run."""
    kept = [score for score in scores if score.classes == classes and score.figure == figure]
    result = []
    for row in study.rows:
        values = [score.value for score in kept if score.row == row.name]
        if values:
            spread = statistics.stdev(values) if len(values) > 1 else math.nan
            result.append(Summary(row, statistics.fmean(values), spread, len(values)))
    return result


def write_csv(path: Path, scores: Iterable[Score]) -> None:
    """Write the scores as `row,seed,epochs,classes,figure,value`."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("row", "seed", "epochs", "classes", "figure", "value"))
    for score in scores:
        writer.writerow(
            (score.row, score.seed, score.epochs, score.classes, score.figure, f"{score.value:.6f}")
        )
    write_atomically(path, text.getvalue().encode())


def format_markdown(study: Study, scores: list[Score]) -> str:
    """Return a Markdown table of means and spreads by row."""
    columns = [
        (classes, figure)
        for classes in ("validation", "unseen")
        for figure in (METRIC, "mAP@200 (strict)", "P@10", "P@100", bits_metric_name())
        if summarise(study, scores, classes, figure)
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
            found = [s for s in summarise(study, scores, classes, figure) if s.row == row]
            cells.append(_format_summary(found[0]) if found else "")
            runs = max([runs, *(s.runs for s in found)])
        if runs:
            lines.append(f"| {row.title} | {runs} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _format_summary(summary: Summary) -> str:
    """Return mean and spread as text; a single run has no spread."""
    if math.isnan(summary.spread):
        return f"{summary.mean:.4f}"
    return f"{summary.mean:.4f} ± {summary.spread:.4f}"


def draw(study: Study, scores: list[Score], path: Path) -> Path | None:
    """Plot mAP@all with its spread into `path`, and return the path; `None` without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    figure = Figure(figsize=(8, 0.45 * len(study.rows) + 1.4), layout="constrained")
    axes = figure.subplots()
    labels = {row.name: place for place, row in enumerate(study.rows)}
    for shift, classes in ((-_BAR_HEIGHT / 2, "validation"), (_BAR_HEIGHT / 2, "unseen")):
        found = summarise(study, scores, classes, METRIC)
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
    axes.set(xlabel=f"{METRIC}, mean and standard deviation of {seeds} seeds", xlim=(0, None))
    axes.grid(axis="x", alpha=0.3)
    axes.legend(frameon=False, fontsize=8)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
    return path


def _figures(
    student: Student, images: ImageSet, training: ImageSet, embed: Embed
) -> dict[str, float]:
    """Return the metrics on `images`; binary codes are fitted on the images in `training`."""
    sketches = embed(student, images.sketches, "sketch").rows
    photos = embed(student, images.photos, "photo").rows

    def measured(queries: Rows, gallery: Rows, distance: Distance) -> dict[str, float]:
        found = evaluate(
            queries, images.sketch_labels, gallery, images.photo_labels, distance=distance
        )
        return found.summary()

    found = measured(sketches, photos, "cosine")
    figures = {name: found[name] for name in _METRICS if name in found}
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
        figures[bits_metric_name(bits)] = found[METRIC]
    return figures


def _embed(
    study: Study,
    student: Student,
    preprocessing: Preprocessing,
    compute: Compute,
    notify: Notify,
) -> Embed:
    base = study.base
    if not base.feature_folder:
        return make_pixel_embedder(preprocessing, compute, base.workers)
    size = study.common["train_size_px"]
    assert isinstance(size, int)
    maps = FeatureMaps(
        *(Path(base.feature_folder), student, base.freeze_until, size, preprocessing),
        *(compute, base.workers, notify),
    )
    return maps.embed


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
    line = "\t".join((date, folder.name, sha256, protocol, f"{METRIC} {figures[METRIC]:.4f}"))
    with (root / "unseen.log").open("a", encoding="utf-8") as file:
        file.write(line + "\n")
