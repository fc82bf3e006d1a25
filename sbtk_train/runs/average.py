"""The mean of several runs' weights as one student, a "model soup".

Students that were fine-tuned from the same weights lie in one basin, so that the mean of their
weights is better than each (Wortsman et al. 2022, the uniform soup). Its batch norms are measured
again, as for any mean of weights (Izmailov et al. 2018), and the embedding is refitted.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, update_bn

from sbtk_runtime.errors import BadConfig, BadData
from sbtk_runtime.files import sha256_of_file, write_json_atomically
from sbtk_runtime.preprocess import SIZE_PX, Kind, Preprocessing
from sbtk_train.batches.augment import normalise
from sbtk_train.batches.pixels import PixelStore
from sbtk_train.compute import Compute, choose_compute
from sbtk_train.config import TrainConfig
from sbtk_train.data.dataset import read_dataset
from sbtk_train.data.image_set import ImageSet, ImageSource
from sbtk_train.data.splits import Division, open_split
from sbtk_train.models.refit import refit_embedding
from sbtk_train.models.student import SbtknetStudent, Student, batch_domains
from sbtk_train.progress import Notify
from sbtk_train.runs.checkpoint import RECORD, STUDENT, TrainedRun, load_run, save_student
from sbtk_train.runs.context import load_division
from sbtk_train.runs.evaluate import SELECTION_METRICS, validate
from sbtk_train.runs.sources import make_pixel_embedder

#: What students must share for the mean of their weights to mean anything.
_OF_CONFIG = ("method", "backbone", "dim", "division_seed")
_OF_RECORD = ("weights", "split", "identity_classes", "validation_classes")
_METRIC_TITLES = {
    "validation_map": "validation mAP@all",
    "held_out_map": "mAP@all of held-out sketches",
    "held_out_bits_map": "mAP@all of held-out sketches' binary codes",
    "held_out_accuracy": "accuracy on held-out images",
}
_NORM_BATCHES = 16
_NORM_IMAGES = 32


def average_runs(
    folders: Sequence[Path], target: Path, notify: Notify, *, threads: int = 0
) -> dict[str, Any]:
    """Write a run folder whose student is the mean of several runs', and return its record.

    The configuration is that of the run with the most training images, of several the one with the
    best metric. The embedding is refitted if that run's recipe says so.

    Args:
        folders: two or more runs, from the same weights and on the same data set; further sketches
            and photos of its classes may differ.
        target: an existing, empty folder.
        notify: called with what is done, and how the mean compares with its parts.
        threads: CPU threads of torch; 0: its own choice.

    Raises:
        BadConfig: fewer than two runs, or runs that differ in more than recipe, seed and further
            images.
        BadData: the data are no longer what the runs were trained on.
    """
    runs = [load_run(folder) for folder in folders]
    _require_alike(runs)
    metric = _choose_metric(runs)
    best = max(runs, key=lambda run: (_training_images(run), _value(run, metric)))
    config = replace(best.config, threads=threads)
    if threads:
        torch.set_num_threads(threads)
    compute = choose_compute(config.device, config.precision)
    division = _division(config, best.record, notify)
    _require_same_data_set(runs, notify)
    average = AveragedModel(best.student)
    for run in runs:
        average.update_parameters(run.student)
    student = average.module
    assert isinstance(student, Student)
    student = student.to(compute.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    notify("measuring the batch norms of the averaged student")
    how = (config.recipe.preprocessing, compute, config.workers)
    measure_batch_norms(student, division.training, *how)
    if getattr(config.recipe, "refit", False) and isinstance(student, SbtknetStudent):
        notify("refitting the embedding on the training images' features")
        refit_embedding(student, division, *how)
    embed = make_pixel_embedder(*how)
    figures = validate(student.eval(), division, config.recipe.selection, embed)
    notify(_comparison(figures[metric], runs, metric))
    config.write(target)
    save_student(target, student.state_dict(), config.backbone)
    record = _record(best, runs, metric, figures, sha256_of_file(target / STUDENT))
    write_json_atomically(target / RECORD, record)
    return record


def measure_batch_norms(
    student: Student,
    training: ImageSet,
    preprocessing: Preprocessing,
    compute: Compute,
    workers: int,
) -> None:
    """Measure batch-norm statistics again, in place, over mixed batches of training images.

    They are plain means over batches of 32 sketches and 32 photos (16, or as many as show the
    larger side once), without augmentation.
    """
    rng = np.random.default_rng(0)
    sides: tuple[tuple[Kind, Sequence[ImageSource]], ...] = (
        ("sketch", training.sketches),
        ("photo", training.photos),
    )
    counts = [min(_NORM_IMAGES, len(paths)) for _, paths in sides]
    batches = min(_NORM_BATCHES, math.ceil(max(len(paths) for _, paths in sides) / _NORM_IMAGES))
    with contextlib.ExitStack() as opened, compute.autocast():
        stores = [
            opened.enter_context(
                contextlib.closing(
                    PixelStore(paths, kind, SIZE_PX, preprocessing, workers=workers, keep=False)
                )
            )
            for kind, paths in sides
        ]
        mixed = (
            torch.cat(
                [
                    normalise(
                        store.batch(rng.choice(len(paths), count, replace=False)).to(compute.device)
                    )
                    for store, (_, paths), count in zip(stores, sides, counts, strict=True)
                ]
            )
            for _ in range(batches)
        )
        update_bn(
            mixed, _MixedFeature(student, batch_domains(counts[0], counts[1], compute.device))
        )
    student.eval()


class _MixedFeature(nn.Module):
    """A student's pooled feature of batches that always have the same domains `(N,)`."""

    def __init__(self, student: Student, domains: Tensor) -> None:
        super().__init__()
        self.student = student
        self.domains = domains

    def forward(self, images: Tensor) -> Tensor:
        """Return `(N, F)` for images `(N, 3, H, W)`."""
        return self.student.feature(images, self.domains)


def _require_alike(runs: Sequence[TrainedRun]) -> None:
    if len(runs) < 2:
        raise BadConfig("one run to average", "two or more", "sbtk average RUN RUN")
    first = runs[0]
    by_student: dict[str, Path] = {}
    for run in runs:
        student = sha256_of_file(run.folder / STUDENT)
        if student in by_student:
            raise BadConfig(
                f"{run.folder} and {by_student[student]} have the same student",
                "runs that differ, for example in --seed",
            )
        by_student[student] = run.folder
    for run in runs[1:]:
        differing = [
            *(n for n in _OF_CONFIG if getattr(run.config, n) != getattr(first.config, n)),
            *(n for n in _OF_RECORD if run.record.get(n) != first.record.get(n)),
            *["ink crop"] * (run.config.recipe.ink_crop != first.config.recipe.ink_crop),
        ]
        if differing:
            raise BadConfig(
                f"{run.folder} and {first.folder} differ in {differing[0].replace('_', ' ')}",
                "runs that see images alike and differ in recipe, seed and further images alone",
            )


def _require_same_data_set(runs: Sequence[TrainedRun], notify: Notify) -> None:
    """Raise `BadConfig` if the runs' own images differ, without further ones."""
    by_images = {run.record.get("data_sha256"): run for run in runs}
    if len(by_images) == 1:
        return
    own = {}
    for run in by_images.values():
        config = replace(run.config, more_sketches=(), more_photos=(), class_map="")
        own[_load_division(config, notify).training.sha256] = run.folder
    if len(own) > 1:
        one, other, *_ = own.values()
        raise BadConfig(
            f"{one} and {other} were trained on different data sets",
            "runs on one data set; only their further images may differ",
        )


def _division(config: TrainConfig, record: dict[str, Any], notify: Notify) -> Division:
    division = _load_division(config, notify)
    if division.training.sha256 != record.get("data_sha256"):
        raise BadData(
            f"{config.data} is not what the runs were trained on: its training images have "
            f"SHA-256 {division.training.sha256[:12]}",
            str(record.get("data_sha256"))[:12],
        )
    return division


def _load_division(config: TrainConfig, notify: Notify) -> Division:
    data = read_dataset(Path(config.data), keep_duplicates=config.keep_duplicates)
    return load_division(config, data, open_split(config.split, data.classes), notify)[0]


def _training_images(run: TrainedRun) -> int:
    return sum(int(run.record.get(f"training_{kind}", 0)) for kind in ("sketches", "photos"))


def _choose_metric(runs: Sequence[TrainedRun]) -> str:
    """Return what the runs are compared by: validation mAP, or else what selected their epochs.

    Only mAP of held-out sketches is measured in runs of all recipes.
    """
    if runs[0].record.get("validation_classes"):
        return "validation_map"
    chosen = {SELECTION_METRICS[run.config.recipe.selection] for run in runs}
    return (chosen.pop() if len(chosen) == 1 else None) or "held_out_map"


def _value(run: TrainedRun, metric: str) -> float:
    return float(run.record.get("best", {}).get(metric, 0.0))


def _comparison(mean: float, runs: Sequence[TrainedRun], metric: str) -> str:
    values = [_value(run, metric) for run in runs]
    parts = ", ".join(f"{value:.4f}" for value in values)
    text = f"{_METRIC_TITLES[metric]} {mean:.4f}; its parts {parts}"
    best = runs[values.index(max(values))]
    return text if mean >= max(values) else f"{text}: {best.folder} alone is better"


def _record(
    best: TrainedRun,
    runs: Sequence[TrainedRun],
    metric: str,
    figures: dict[str, float],
    sha256: str,
) -> dict[str, Any]:
    parts = [_part(run, metric) for run in runs]
    changed = {
        "started": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "seed": [part["seed"] for part in parts],
        "averaged": parts,
        "best": {name: value for name, value in figures.items() if not math.isnan(value)},
        "student_sha256": sha256,
    }
    of_the_part = ("refit", "epochs_done", "validation_px")
    return {n: value for n, value in best.record.items() if n not in of_the_part} | changed


def _part(run: TrainedRun, metric: str) -> dict[str, Any]:
    """Return what the record of the mean says of one run; one that is a mean has no epoch."""
    record = run.record
    own = len(record.get("averaged", []))
    return ({"mean_of": own} if own else {}) | {
        "run": run.folder.resolve().name,
        "seed": record.get("seed"),
        "recipe": record.get("recipe"),
        "epochs_done": record.get("epochs_done"),
        "epoch": record.get("best", {}).get("epoch"),
        "student_sha256": record.get("student_sha256"),
        metric: _value(run, metric),
        "refit": record.get("refit"),
    }
