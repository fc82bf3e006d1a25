"""Run folders: the checkpoint, the best student, and the record.

A run folder has `config.resolved.toml`, `last.safetensors` (the checkpoint), `student.safetensors`
(the best student by validation), `run.json`, `metrics.csv` and curves. Each file is replaced
atomically, so a run that was killed resumes from its last checkpoint.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import shlex
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save, save_file

from sbtk_runtime.errors import BadConfig, BadModel, DiskFull, GalleryBusy, SbtkError
from sbtk_runtime.files import WriterLock, atomic_path, read_json_object, sha256_of_file
from sbtk_train.config import (
    CONFIG_NAME,
    FREE_FIELDS,
    PATH_FIELDS,
    PROVENANCE_FIELDS,
    TrainConfig,
    read_config,
)
from sbtk_train.models.student import Student, build_student

LAST = "last.safetensors"
STUDENT = "student.safetensors"
RECORD = "run.json"
LOCK = ".lock"
#: Record, table, curves and what a file system keeps of them.
_OTHER_BYTES = 1 << 20
_OS_ERROR = re.compile(r"os error (\d+)")


class RunBusy(SbtkError):
    """Another process is writing to the run folder."""


@dataclass
class Position:
    """The progress of a run; together with the tensors of `last.safetensors`, its whole state.

    Attributes:
        epoch: the current epoch, from 0.
        step: number of finished batches of the epoch.
        updates: optimiser steps since the start.
        sums: sums of losses and accuracy over the epoch's batches so far, by name.
        history: a row of metrics for each finished epoch.
        best: the best value so far of the recipe's selection metric.
        since_best: number of epochs since then.
        scaler: state of the loss scaler (fp16 only).
        data_sha256: hash of the training images.
        split_sha256: hash of the unseen classes.
        validation_sha256: hash of the validation and held-out images.
        config_sha256: hash of the configuration, by `hash_config`.
        student_sha256: hash of the best student's file.
    """

    data_sha256: str
    split_sha256: str
    epoch: int = 0
    step: int = 0
    updates: int = 0
    sums: dict[str, float] = field(default_factory=dict)
    history: list[dict[str, float]] = field(default_factory=list)
    best: float = -1.0
    since_best: int = 0
    scaler: dict[str, Any] = field(default_factory=dict)
    # Empty in checkpoints of earlier versions.
    validation_sha256: str = ""
    config_sha256: str = ""
    student_sha256: str = ""


@dataclass(frozen=True)
class TrainedRun:
    """A finished or interrupted run.

    Attributes:
        folder: the run folder.
        student: the best student, in evaluation mode, on the CPU.
        config: its configuration.
        record: `run.json`: classes, hashes, counts, metrics, versions.
    """

    folder: Path
    student: Student
    config: TrainConfig
    record: dict[str, Any]


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the lock of a run folder for a writer; the kernel releases it if the process dies.

    Raises:
        RunBusy: on entry, if another process holds it; names its PID and start time.
        SbtkError: on entry, if the folder cannot be written.
    """
    with contextlib.ExitStack() as held:
        try:
            held.enter_context(WriterLock(folder / LOCK))
        except GalleryBusy as problem:
            raise RunBusy(
                problem.found, "one writer in a run folder", "wait for it to end, or --out FOLDER"
            ) from problem
        yield


def resume_command(folder: Path) -> str:
    """Return the command that resumes the run in `folder`."""
    if (folder / LAST).is_file():
        return f"sbtk train --resume {shlex.quote(str(folder))}"
    return "the same command again"


def add_resume_command(problem: DiskFull, folder: Path) -> DiskFull:
    """Return the error with the command that resumes this run when there is space."""
    if f"then: {resume_command(folder)}" in problem.next_step:
        return problem
    step = re.split(r",? (?:and|then) run the same command again", problem.next_step)[0]
    return DiskFull(problem.found, problem.expected, f"{step}, then: {resume_command(folder)}")


def require_space(folder: Path, state_bytes: int, student_bytes: int) -> None:
    """Check that the disk has space for a run's files, and for two versions while one is replaced.

    Args:
        folder: the run folder; existing files will be replaced.
        state_bytes: size of `last.safetensors`.
        student_bytes: size of `student.safetensors`.

    Raises:
        DiskFull: names the disk, and the needed and the free bytes.
    """
    held = sum(path.stat().st_size for path in (folder / LAST, folder / STUDENT) if path.is_file())
    needed = 2 * state_bytes + student_bytes + _OTHER_BYTES - held
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise DiskFull(
            f"{folder} needs {needed:,} bytes, but {_disk_of(folder)} has {free:,} free",
            "space for two versions of the run's state, and for the best student",
            f"free some space, or name a folder on another disk with --out; then: "
            f"{resume_command(folder)}",
        )


def _disk_of(path: Path) -> str:
    """Return a name of the disk with `path`: its mount point."""
    place = path.resolve()
    while not os.path.ismount(place) and place != place.parent:
        place = place.parent
    return f"the disk at {place}"


def save_state(folder: Path, tensors: dict[str, torch.Tensor], position: Position) -> None:
    """Write `last.safetensors`, atomically."""
    metadata = {"position": json.dumps(asdict(position))}
    _save(folder / LAST, tensors, metadata)


def load_state(folder: Path) -> tuple[dict[str, torch.Tensor], Position]:
    """Return the tensors and the position of the last checkpoint.

    Raises:
        BadConfig: the run has no readable checkpoint.
    """
    path = folder / LAST
    if not path.is_file():
        raise BadConfig(
            f"{folder} has no {LAST}", "a run that saved at least once", "start it without --resume"
        )
    tensors, metadata = _load(path)
    try:
        return tensors, Position(**json.loads(metadata["position"]))
    except (KeyError, TypeError, json.JSONDecodeError) as problem:
        raise BadConfig(f"{path} has no usable position: {problem}") from problem


def save_student(folder: Path, tensors: dict[str, torch.Tensor], backbone: str) -> None:
    """Write `student.safetensors`, atomically; its metadata name the backbone's layout."""
    _save(folder / STUDENT, tensors, {"backbone": backbone})


def hash_student(tensors: dict[str, torch.Tensor], backbone: str) -> str:
    """Return the SHA-256 of the file that `save_student` writes."""
    return hashlib.sha256(save(_plain(tensors), {"backbone": backbone})).hexdigest()


def hash_config(config: TrainConfig) -> str:
    """Return a hash of what determines a run's result, besides its files and number of epochs.

    Fields with their default values are left out, so that later versions can have further fields.
    """
    without = (*FREE_FIELDS, *PATH_FIELDS, *PROVENANCE_FIELDS, "recipe", "epochs")
    values = {
        f"{type(part).__name__}.{item.name}": getattr(part, item.name)
        for part in (config, config.recipe)
        for item in fields(part)
        if item.name not in without and getattr(part, item.name) != item.default
    }
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def newest_run(root: Path = Path("runs")) -> Path:
    """Return the run folder below `root` with the newest student.

    Raises:
        BadConfig: there is none.
    """
    students = list(root.glob(f"*/{STUDENT}"))
    if not students:
        raise BadConfig(
            f"no trained run below {root}", f"a folder with {STUDENT}", "sbtk train DATA"
        )
    return max(students, key=lambda path: path.stat().st_mtime_ns).parent


def load_run(folder: Path) -> TrainedRun:
    """Return the run in a folder, with its best student.

    Raises:
        BadConfig: the folder is not a run, or has no student yet.
        BadModel: the student's file does not fit the configuration or the record.
    """
    if not (folder / CONFIG_NAME).is_file() or not (folder / STUDENT).is_file():
        raise BadConfig(
            f"{folder} is not a trained run",
            f"{CONFIG_NAME} and {STUDENT} in it",
            "sbtk train DATA",
        )
    config = read_config(folder)
    record = read_json_object(folder / RECORD, BadConfig)
    classes = record.get("identity_classes")
    if not isinstance(classes, list):
        raise BadConfig(f"{folder / RECORD} lacks 'identity_classes'", "a run made by sbtk train")
    recorded = record.get("student_sha256", "")
    found = sha256_of_file(folder / STUDENT)
    if recorded and found != recorded:
        raise BadModel(
            f"{folder / STUDENT} is not the student whose metrics are in {RECORD}: "
            f"SHA-256 {found[:12]}",
            recorded[:12],
            f"if the run is being trained, try again; if it was killed: {resume_command(folder)}",
        )
    return TrainedRun(folder, load_student(folder, config, len(classes)), config, record)


def load_student(folder: Path, config: TrainConfig, classes: int) -> Student:
    """Return the best student of a run, in evaluation mode, on the CPU.

    Raises:
        BadModel: the student's file does not fit the configuration.
    """
    student = build_student(config, classes)
    tensors, _ = _load(folder / STUDENT)
    try:
        student.load_state_dict(tensors)
    except RuntimeError as problem:
        raise BadModel(f"{folder / STUDENT} does not fit {CONFIG_NAME}: {problem}") from problem
    return student.eval()


def _save(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    plain = _plain(tensors)
    try:
        with atomic_path(path) as temporary:
            temporary.touch()
            mode = temporary.stat().st_mode
            with _os_errors(path):
                save_file(plain, temporary, metadata)
            # safetensors creates private files; follow the user's umask instead.
            temporary.chmod(mode)
    except DiskFull as problem:
        size = sum(tensor.nbytes for tensor in plain.values())
        cause = problem.__cause__
        found = f"{problem.found}; {size:,} bytes needed"
        if isinstance(cause, OSError) and cause.errno == errno.ENOSPC:
            free = shutil.disk_usage(path.parent).free
            found = (
                f"no space left on {_disk_of(path.parent)} while writing {path}: "
                f"{size:,} bytes needed, {free:,} free"
            )
        full = DiskFull(found, problem.expected, problem.next_step)
        raise add_resume_command(full, path.parent) from problem
    except OSError as problem:
        size = sum(tensor.nbytes for tensor in plain.values())
        raise SbtkError(
            f"{path} ({size:,} bytes) cannot be written: {problem.strerror}",
            "the previous checkpoint is kept",
            f"fix that, then: {resume_command(path.parent)}",
        ) from problem


def _plain(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


@contextlib.contextmanager
def _os_errors(path: Path) -> Iterator[None]:
    """Raise the `OSError` that a `SafetensorError` contains."""
    try:
        yield
    except SafetensorError as problem:
        match = _OS_ERROR.search(str(problem))
        if match is None:
            raise
        number = int(match[1])
        raise OSError(number, os.strerror(number), str(path)) from problem


def _load(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            return {name: file.get_tensor(name) for name in file.keys()}, metadata  # noqa: SIM118
    except (SafetensorError, OSError) as problem:
        raise BadModel(
            f"{path} cannot be read: {problem}",
            "a whole run folder",
            "copy the run's files again, or start a new run",
        ) from problem
