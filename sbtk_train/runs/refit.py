"""The end of a run: the embedding is refitted, and kept if it is no worse on validation classes.

Without validation classes it is kept as the recipe says.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from sbtk_runtime.errors import BadConfig
from sbtk_runtime.files import read_json_object, sha256_of_file, write_json_atomically
from sbtk_train.config import TrainConfig
from sbtk_train.progress import Listener
from sbtk_train.runs.checkpoint import RECORD, STUDENT, load_student, save_student
from sbtk_train.runs.evaluate import by_pixels, score
from sbtk_train.runs.setup import Materials
from sbtk_train.students.head_refit import refit_embedding
from sbtk_train.students.sbtknet import SbtknetStudent


def refit(
    config: TrainConfig,
    folder: Path,
    materials: Materials,
    record: dict[str, Any],
    earlier: dict[str, Any],
    listener: Listener,
) -> None:
    """Fits the kept student's embedding anew, keeps it if it is no worse, and records both.

    The whole trunk is run on images of production's size, whatever the epochs were fed.

    Args:
        config: the run's.
        folder: the run folder, with its student.
        materials: the run's.
        record: the run's; changed, and written.
        earlier: what `recorded_refit` found before the run was resumed.
        listener: told what is done, and the two figures.
    """
    if earlier and earlier["student_sha256"] == sha256_of_file(folder / STUDENT):
        record |= earlier
    else:
        _refit(config, folder, materials, record, listener)
    write_json_atomically(folder / RECORD, record)


def recorded_refit(folder: Path) -> dict[str, Any]:
    """Returns what the record of an ended run says of its refit and its student; else nothing.

    Once the fitted embedding is kept, the trained one is gone: there is nothing to compare with.
    """
    if not (folder / RECORD).is_file():
        return {}
    record = read_json_object(folder / RECORD, BadConfig)
    names = ("refit", "best", "student_sha256")
    return {name: record.get(name) for name in names} if "refit" in record else {}


def _refit(
    config: TrainConfig,
    folder: Path,
    materials: Materials,
    record: dict[str, Any],
    listener: Listener,
) -> None:
    division, compute, best = materials.division, materials.compute, record["best"]
    student = load_student(folder, config, len(division.training.classes))
    assert isinstance(student, SbtknetStudent)
    student = student.to(compute.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    embed = by_pixels(compute, config.workers)
    if not division.validation.classes:
        listener("fitting the embedding again on the training images' features")
        refit_embedding(student, division, compute, config.workers)
        reason = "there are no validation classes to compare it with the trained one"
        record["refit"] = {"kept": True, "reason": reason}
        _keep(student, folder, config, record)
        return
    trained = {"mAP@all": best["validation_map"]}
    if config.feature_folder:
        # Kept feature maps are in half precision, and may be of smaller images.
        trained = score(student, division.validation, embed)
    listener("fitting the embedding anew on the training images' features")
    refit_embedding(student, division, compute, config.workers)
    refitted = score(student, division.validation, embed)
    is_kept = refitted["mAP@all"] >= trained["mAP@all"]
    listener(
        f"validation mAP@all {trained['mAP@all']:.4f} with the trained embedding, "
        f"{refitted['mAP@all']:.4f} refitted"
    )
    record["refit"] = {
        "trained_map": trained["mAP@all"],
        "refitted_map": refitted["mAP@all"],
        "kept": is_kept,
    }
    figures = refitted if is_kept else trained
    best["validation_map"] = figures["mAP@all"]
    if "P@10" in figures:
        best["validation_p10"] = figures["P@10"]
    if is_kept:
        _keep(student, folder, config, record)


def _keep(
    student: SbtknetStudent, folder: Path, config: TrainConfig, record: dict[str, Any]
) -> None:
    save_student(folder, student.state_dict(), config.backbone)
    record["student_sha256"] = sha256_of_file(folder / STUDENT)
