"""Several runs become one student: the mean of their weights, a "model soup".

Students that were fine-tuned from the same weights lie in one basin, so that the mean of their
weights is better than each (Wortsman et al. 2022, the uniform soup). Its batch norms are measured
anew, as for any mean of weights (Izmailov et al. 2018), and so is a refitted embedding.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sbtk_runtime.errors import BadConfig, BadData
from sbtk_runtime.files import sha256_of_file, write_json_atomically
from sbtk_runtime.preprocess import SIZE_PX, Kind
from sbtk_train.batches.augment import normalise
from sbtk_train.batches.pixels import PixelStore
from sbtk_train.config import Compute, TrainConfig, choose_compute
from sbtk_train.data import Division, ImageSet, ImageSource, read_dataset
from sbtk_train.data.splits import open_split
from sbtk_train.models.refit import refit_embedding
from sbtk_train.models.sbtknet import SbtknetStudent
from sbtk_train.models.student import Student, batch_domains
from sbtk_train.progress import Notify
from sbtk_train.runs.checkpoint import RECORD, STUDENT, TrainedRun, load_run, save_student
from sbtk_train.runs.context import load_division
from sbtk_train.runs.evaluate import make_pixel_embedder, score

#: What students must share for the mean of their weights to mean anything.
_OF_CONFIG = ("method", "backbone", "dim", "division_seed")
_OF_RECORD = ("weights", "data_sha256", "split", "identity_classes", "validation_classes")
_NORM_BATCHES = 16
_NORM_IMAGES = 32


def average_runs(
    folders: Sequence[Path], target: Path, notify: Notify, *, threads: int = 0
) -> dict[str, Any]:
    """Writes a run folder whose student is the mean of several runs', and returns its record.

    The configuration is that of the run with the best validation figure. The embedding is fitted
    anew where that run's recipe says so.

    Args:
        folders: two or more runs, from the same weights and on the same data.
        target: an existing, empty folder.
        notify: called with what is done, and how the mean compares with its parts.
        threads: CPU threads of torch; 0: its own choice.

    Raises:
        BadConfig: fewer than two runs, or runs that differ in more than recipe and seed.
        BadData: the data are no longer what the runs were trained on.
    """
    runs = [load_run(folder) for folder in folders]
    _require_alike(runs)
    best = max(runs, key=_validation_map)
    config = replace(best.config, threads=threads)
    if threads:
        torch.set_num_threads(threads)
    compute = choose_compute(config.device, config.precision)
    division = _division(config, best.record, notify)
    student = best.student
    student.load_state_dict(average_states([run.student.state_dict() for run in runs]))
    student = student.to(compute.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    notify("measuring the batch norms of the averaged student")
    measure_batch_norms(student, division.training, compute, config.workers)
    if getattr(config.recipe, "refit", False) and isinstance(student, SbtknetStudent):
        notify("fitting its embedding on the training images' features")
        refit_embedding(student, division, compute, config.workers)
    figures = score(
        student.eval(), division.validation, make_pixel_embedder(compute, config.workers)
    )
    notify(_comparison(figures["mAP@all"], runs))
    config.write(target)
    save_student(target, student.state_dict(), config.backbone)
    record = _record(best, runs, figures, sha256_of_file(target / STUDENT))
    write_json_atomically(target / RECORD, record)
    return record


def average_states(states: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Returns the mean of state dictionaries, in their types; of counters, the first's."""
    return {
        name: torch.stack([state[name].float() for state in states]).mean(0).to(value.dtype)
        if value.is_floating_point()
        else value.clone()
        for name, value in states[0].items()
    }


def measure_batch_norms(
    student: Student, training: ImageSet, compute: Compute, workers: int
) -> None:
    """Measures batch-norm statistics anew, in place, over mixed batches of training images.

    They are plain means over batches of 32 sketches and 32 photos (16, or as many as show the
    larger side once), without augmentation.
    """
    norms = [module for module in student.modules() if isinstance(module, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    student.eval()
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a cumulative mean
        norm.train()
    rng = np.random.default_rng(0)
    sides: tuple[tuple[Kind, Sequence[ImageSource]], ...] = (
        ("sketch", training.sketches),
        ("photo", training.photos),
    )
    stores = [
        PixelStore(paths, kind, SIZE_PX, workers=workers, keep=False) for kind, paths in sides
    ]
    counts = [min(_NORM_IMAGES, len(paths)) for _, paths in sides]
    domains = batch_domains(counts[0], counts[1], compute.device)
    batches = min(_NORM_BATCHES, math.ceil(max(len(paths) for _, paths in sides) / _NORM_IMAGES))
    try:
        with torch.inference_mode(), compute.autocast():
            for _ in range(batches):
                drawn = [
                    store.batch(rng.choice(len(paths), count, replace=False))
                    for store, (_, paths), count in zip(stores, sides, counts, strict=True)
                ]
                images = torch.cat([normalise(pixels.to(compute.device)) for pixels in drawn])
                student.feature(images, domains)
    finally:
        for store in stores:
            store.close()
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
    student.eval()


def _require_alike(runs: Sequence[TrainedRun]) -> None:
    if len(runs) < 2:
        raise BadConfig("one run to average", "two or more", "sbtk average RUN RUN")
    first = runs[0]
    for run in runs[1:]:
        differing = [
            *(n for n in _OF_CONFIG if getattr(run.config, n) != getattr(first.config, n)),
            *(n for n in _OF_RECORD if run.record.get(n) != first.record.get(n)),
        ]
        if differing:
            raise BadConfig(
                f"{run.folder} and {first.folder} differ in {differing[0].replace('_', ' ')}",
                "runs that differ in recipe and seed alone",
            )
    if not first.record.get("validation_classes"):
        raise BadConfig(
            f"{first.folder} kept no validation classes",
            "runs that can be compared with their mean",
        )


def _division(config: TrainConfig, record: dict[str, Any], notify: Notify) -> Division:
    data = read_dataset(Path(config.data), keep_duplicates=config.keep_duplicates)
    division, _ = load_division(config, data, open_split(config.split, data.classes), notify)
    if division.training.sha256 != record.get("data_sha256"):
        raise BadData(
            f"{config.data} is not what the runs were trained on: its training images have "
            f"SHA-256 {division.training.sha256[:12]}",
            str(record.get("data_sha256"))[:12],
        )
    return division


def _validation_map(run: TrainedRun) -> float:
    return float(run.record.get("best", {}).get("validation_map", 0.0))


def _comparison(mean_map: float, runs: Sequence[TrainedRun]) -> str:
    parts = ", ".join(f"{_validation_map(run):.4f}" for run in runs)
    best = max(runs, key=_validation_map)
    text = f"validation mAP@all {mean_map:.4f}; its parts {parts}"
    return text if mean_map >= _validation_map(best) else f"{text}: {best.folder} alone is better"


def _record(
    best: TrainedRun, runs: Sequence[TrainedRun], figures: dict[str, float], sha256: str
) -> dict[str, Any]:
    parts = [_part(run) for run in runs]
    kept = {"validation_map": figures["mAP@all"]}
    if "P@10" in figures:
        kept["validation_p10"] = figures["P@10"]
    changed = {
        "started": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "seed": [part["seed"] for part in parts],
        "averaged": parts,
        "best": kept,
        "student_sha256": sha256,
    }
    of_the_part = ("refit", "epochs_done", "validation_px")
    return {n: value for n, value in best.record.items() if n not in of_the_part} | changed


def _part(run: TrainedRun) -> dict[str, Any]:
    """Returns what the record of the mean says of one run; one that is a mean has no epoch."""
    record = run.record
    own = len(record.get("averaged", []))
    return ({"mean_of": own} if own else {}) | {
        "run": run.folder.resolve().name,
        "seed": record.get("seed"),
        "recipe": record.get("recipe"),
        "epochs_done": record.get("epochs_done"),
        "epoch": record.get("best", {}).get("epoch"),
        "student_sha256": record.get("student_sha256"),
        "validation_map": _validation_map(run),
    }
