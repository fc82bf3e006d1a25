"""A training run, from configuration to run folder, with record, table and curves."""

from __future__ import annotations

import contextlib
import csv
import io
import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from datetime import date
from pathlib import Path
from typing import Any

import torch

from sbtk_runtime.errors import BadConfig, BadData, DiskFull
from sbtk_runtime.files import (
    atomic_path,
    disk_full_explained,
    read_json_object,
    remove_stale_temporaries,
    sha256_of_file,
    write_atomically,
    write_json_atomically,
)
from sbtk_runtime.machine import installed_versions
from sbtk_train.config import SbtknetRecipe, Selection, TrainConfig, read_config
from sbtk_train.data.more_images import is_bundled
from sbtk_train.distributed import SINGLE_PROCESS, DistributedContext
from sbtk_train.models.refit import refit_embedding
from sbtk_train.models.student import SbtknetStudent
from sbtk_train.progress import EpochDone, Listener, StepDone
from sbtk_train.runs.checkpoint import (
    LAST,
    RECORD,
    STUDENT,
    add_resume_command,
    hash_student,
    load_student,
    locked,
    require_space,
    resume_command,
    save_student,
)
from sbtk_train.runs.context import TrainingContext, build_context
from sbtk_train.runs.evaluate import SELECTION_METRICS, score
from sbtk_train.runs.loop import Trainer
from sbtk_train.runs.sources import make_pixel_embedder

METRICS = "metrics.csv"
_VERSIONS_OF = ("sbtk", "torch", "torchvision", "numpy", "pillow", "safetensors")


def new_run_folder(root: Path, name: str) -> Path:
    """Create and return the folder `root/<date>-<name>`, numbered if it exists."""
    stem = f"{date.today().isoformat()}-{name}"
    for number in range(1, 1000):
        folder = root / (stem if number == 1 else f"{stem}-{number}")
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            continue
        return folder
    raise BadConfig(f"{root} holds a thousand runs named {stem}", "another --name")


def train(
    config: TrainConfig,
    folder: Path,
    listener: Listener,
    *,
    resume: bool = False,
    on_trainer: Callable[[Trainer], None] | None = None,
    distributed: DistributedContext = SINGLE_PROCESS,
) -> dict[str, Any]:
    """Train into `folder` and return the run's record.

    Args:
        config: the configuration. When resuming, the run's own is used, changed as described for
            `TrainConfig.merge_free_fields`.
        folder: an existing folder.
        listener: receives steps, epochs and messages.
        resume: continue from the folder's last checkpoint.
        on_trainer: called with the trainer before it starts, so that a signal can stop it.
        distributed: the processes of the run, which must all call this. Rank 0 reports and writes.

    Raises:
        RunBusy: another process writes to the folder.
        DiskFull: the disk has no space for the run's files.
        BadConfig: the folder already has a run, and `resume` is false.
    """
    with contextlib.ExitStack() as held, _explain_failed_writes(folder):
        distributed.broadcast_object(lambda: _claim(folder, held, resume=resume))
        return _train(config, folder, listener, resume, on_trainer, distributed)


def _claim(folder: Path, held: contextlib.ExitStack, *, resume: bool) -> None:
    """Lock the folder while `held` is open."""
    if resume and not folder.is_dir():
        raise BadConfig(f"there is no run folder {folder}", "a folder made by sbtk train")
    held.enter_context(locked(folder))
    if resume:
        return
    if (folder / LAST).exists():
        raise BadConfig(f"{folder} already holds a run", "a new folder", resume_command(folder))
    # A mean of runs, or a run of a study, has a student and no checkpoint.
    if (folder / RECORD).exists() and "best" in read_json_object(folder / RECORD, BadConfig):
        raise BadConfig(
            f"{folder} already holds a finished student", "a new folder", "--out FOLDER"
        )


@contextlib.contextmanager
def _explain_failed_writes(folder: Path) -> Iterator[None]:
    """Add the command that resumes this run to the error of a failed write."""
    try:
        with disk_full_explained(folder / RECORD):
            yield
    except DiskFull as problem:
        raise add_resume_command(problem, folder) from problem


def _train(
    config: TrainConfig,
    folder: Path,
    listener: Listener,
    resume: bool,
    on_trainer: Callable[[Trainer], None] | None,
    distributed: DistributedContext,
) -> dict[str, Any]:
    own = config
    if resume:
        own = distributed.broadcast_object(lambda: read_config(folder))
        config = own.merge_free_fields(config)
        distributed.broadcast_object(lambda: _require_same_files(config, folder))
    is_longer = config.recipe.epochs > own.recipe.epochs
    if not distributed.is_rank_zero:
        return _train_along(config, folder, resume, is_longer, on_trainer, distributed)
    remove_stale_temporaries(folder)
    if not resume:
        config.write(folder)
    context = _build_context(config, own, folder, listener, distributed)
    recorded = _read_record(folder) if resume else {}
    earlier = read_recorded_refit(folder) if resume else {}
    record = _record(config, context)
    if earlier:
        # Until the refit of the best student, which may stay the same.
        record["earlier_refit"] = earlier
    recorder = _Recorder(folder, record, config.recipe.selection, listener)
    trainer = Trainer(context, config, folder, recorder)
    if resume:
        with _explain_moved_data(config, own):
            trainer.resume(
                is_longer=is_longer,
                refitted_sha256=earlier.get("student_sha256", ""),
                changed=_list_changed(config, recorded),
            )
        _require_same_knowledge(context, recorded)
        if trainer.history:
            # Otherwise its metrics would be reported for a student that cannot be read.
            load_student(folder, config, len(context.division.training.classes))
        listener(f"resuming {folder} after {len(trainer.history)} finished epochs")
        if len(trainer.history) >= config.recipe.epochs:
            listener(f"all of its epochs are done; --epochs above {config.recipe.epochs} adds some")
        # Moved files, more epochs and machine options are kept for the next time.
        config.write(folder)
    require_space(folder, trainer.state_bytes(), trainer.student_bytes())
    recorder.start(trainer.history)
    if on_trainer is not None:
        on_trainer(trainer)
    position = trainer.run()
    if isinstance(config.recipe, SbtknetRecipe) and config.recipe.refit:
        refit(config, folder, context, record, earlier, listener, trainer.raise_if_stopping)
    recorder.finish(position.history)
    return distributed.broadcast_object(lambda: record)


def _build_context(
    config: TrainConfig,
    own: TrainConfig,
    folder: Path,
    listener: Listener,
    distributed: DistributedContext,
) -> TrainingContext:
    """Return the context of a run, whose data may have moved since its start."""
    if config is own:
        return build_context(config, listener, distributed)
    if not Path(config.data).is_dir() and config.data == own.data:
        raise BadConfig(
            f"the data of {folder} are no longer in {config.data}",
            "the folder with the same data",
            f"sbtk train DATA --resume {folder}",
        )
    with _explain_moved_data(config, own):
        return build_context(config, listener, distributed)


@contextlib.contextmanager
def _explain_moved_data(config: TrainConfig, own: TrainConfig) -> Iterator[None]:
    """Name both folders if moved data differ from those at the start of the run."""
    try:
        yield
    except (BadData, BadConfig) as problem:
        if config.data == own.data:
            raise
        raise BadConfig(
            f"DATA {config.data}, but the run was started with {own.data}: {problem.found}",
            problem.expected or "the same data in another place",
            "name the folder with the same data, or start a new run without --resume",
        ) from problem


def _require_same_files(config: TrainConfig, folder: Path) -> None:
    """Check that weights, teacher and class map are the files that the run was started with."""
    recorded = _read_record(folder)
    for name, shown in (
        ("weights", "weights are"),
        ("teacher", "teacher is"),
        ("class_map", "class map is"),
    ):
        file, entry = getattr(config, name), recorded.get(name)
        option = name.replace("_", "-")
        if not file or not isinstance(entry, dict):
            continue
        if not Path(file).is_file():
            raise BadConfig(
                f"the run's {shown} no longer in {file}",
                f"the same file, with SHA-256 {str(entry.get('sha256'))[:12]}",
                f"sbtk train --resume {folder} --{option} FILE",
            )
        found = sha256_of_file(Path(file))
        if found != entry.get("sha256"):
            raise BadConfig(
                f"--{option} {file} is not the file that the run was started with: "
                f"SHA-256 {found[:12]}",
                str(entry.get("sha256"))[:12],
                "name that file, or start a new run without --resume",
            )


def _read_record(folder: Path) -> dict[str, Any]:
    """Return the record of a run that saved at least once; empty for others.

    Raises:
        BadConfig: it is missing or not JSON, so that nothing can be compared with it.
    """
    if not (folder / RECORD).is_file() and not (folder / LAST).is_file():
        return {}
    return read_json_object(folder / RECORD, BadConfig)


def _list_changed(config: TrainConfig, recorded: dict[str, Any]) -> list[str]:
    """Return the lists and stroke files that are not those that the run was started with."""
    before, now = recorded.get("source_files", {}), _source_files(config)
    return [
        path
        for name, files in now.items()
        for path, sha256 in files
        if sha256 not in [known for _, known in before.get(name, [(path, sha256)])]
    ]


def _source_files(config: TrainConfig) -> dict[str, list[tuple[str, str]]]:
    """Return the lists and stroke files of a run with their hashes, by option."""
    named = {
        "split": (config.split,),
        "classes": (config.classes,),
        "more_sketches": config.more_sketches,
        "more_photos": config.more_photos,
    }
    return {
        name: [(path, sha256_of_file(Path(path))) for path in paths if Path(path).is_file()]
        for name, paths in named.items()
    }


def _require_same_knowledge(context: TrainingContext, recorded: dict[str, Any]) -> None:
    """Check that soft labels or semantic matrix are made as at the start of the run."""
    before, now = recorded.get("knowledge_sha256"), context.knowledge_sha256
    if before and now and before != now:
        raise BadConfig(
            f"soft labels or semantic matrix are not those of the run's start: {now[:12]}",
            str(before)[:12],
            "resume with the sbtk version that started the run, or start a new run",
        )


def _train_along(
    config: TrainConfig,
    folder: Path,
    resume: bool,
    is_longer: bool,
    on_trainer: Callable[[Trainer], None] | None,
    distributed: DistributedContext,
) -> dict[str, Any]:
    """Train together with rank 0, and write nothing."""
    trainer = Trainer(
        build_context(config, _ignore_event, distributed), config, folder, _ignore_event
    )
    if resume:
        trainer.resume(is_longer=is_longer)
    if on_trainer is not None:
        on_trainer(trainer)
    trainer.run()
    return distributed.broadcast_object(dict[str, Any])


def _ignore_event(_: StepDone | EpochDone | str) -> None:
    """Ignore the events of a process that reports nothing."""


class _Recorder:
    """Writes the trainer's events into the run folder and passes them on."""

    def __init__(
        self, folder: Path, record: dict[str, Any], selection: Selection, listener: Listener
    ) -> None:
        self._folder = folder
        self._record = record
        self._listener = listener
        self._board = _summary_writer(folder)
        self._rows: list[dict[str, float]] = []
        self._selected_by = SELECTION_METRICS[selection]

    def start(self, history: list[dict[str, float]]) -> None:
        # Rows that a killed run wrote after its last checkpoint are written again.
        self._rows = list(history)
        write_atomically(self._folder / METRICS, _format_table(self._rows).encode())
        self._write_record()

    def __call__(self, event: StepDone | EpochDone | str) -> None:
        if isinstance(event, EpochDone):
            self._rows.append(event.row)
            lines = _format_table([event.row]).splitlines(keepends=True)
            with (
                disk_full_explained(self._folder / METRICS),
                (self._folder / METRICS).open("a", encoding="utf-8") as file,
            ):
                file.writelines(lines if len(self._rows) == 1 else lines[1:])
            self._write_record()
            if self._board is not None:
                for name, value in event.row.items():
                    self._board.add_scalar(name, value, int(event.row["epoch"]))
        self._listener(event)

    def finish(self, history: list[dict[str, float]]) -> None:
        if self._board is not None:
            self._board.close()
        curves = draw_curves(history, self._folder)
        self._listener(f"curves: {curves}" if curves else "no curves: matplotlib is not installed")

    def _write_record(self) -> None:
        if self._rows:
            self._record["best"] = _best(self._rows, self._selected_by)
            self._record["epochs_done"] = len(self._rows)
            self._record["student_sha256"] = sha256_of_file(self._folder / STUDENT)
        write_json_atomically(self._folder / RECORD, self._record)


def _record(config: TrainConfig, context: TrainingContext) -> dict[str, Any]:
    division = context.division
    return {
        "started": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "data": Path(config.data).name,
        "data_sha256": division.training.sha256,
        "further_data": [
            "/".join(Path(each).parts[-2:]) for each in (*config.more_sketches, *config.more_photos)
        ],
        "split": {"name": context.split.name, "sha256": context.split.sha256},
        "identity_classes": list(division.training.classes),
        "training_classes": list(division.training.classes),
        "validation_classes": list(division.validation.classes),
        "unseen_classes": list(context.split.unseen),
        "training_sketches": len(division.training.sketches),
        "training_photos": len(division.training.photos),
        "held_out_sketches": len(division.held_out.sketches),
        "held_out_photos": len(division.held_out_photos.photos) if division.held_out_photos else 0,
        "validation_px": config.validation_px,
        "unreadable": len(context.unreadable),
        "method": config.method,
        "backbone": config.backbone,
        "dim": config.dim,
        "weights": _file_record(config.weights),
        "teacher": _file_record(config.teacher),
        "class_map": _file_record("" if is_bundled(config.class_map) else config.class_map),
        "source_files": {
            name: [(Path(path).name, sha256) for path, sha256 in files]
            for name, files in _source_files(config).items()
        },
        "knowledge_sha256": context.knowledge_sha256 or None,
        "recipe": asdict(config.recipe),
        "config_file": {"file": Path(config.config_file).name, "sha256": config.config_sha256}
        if config.config_file
        else None,
        "settings": list(config.settings),
        "seed": config.seed,
        "division_seed": config.division_seed,
        "device": _device_name(context.compute.device),
        "processes": context.distributed.world_size,
        "precision": context.compute.precision,
        "versions": dict.fromkeys(_VERSIONS_OF, "source tree")
        | installed_versions(_VERSIONS_OF)
        | {"python": platform.python_version()},
    }


def _best(rows: list[dict[str, float]], metric: str | None) -> dict[str, float]:
    """Return a copy of the first row with the highest metric, or of the last without a metric."""
    return dict(rows[-1] if metric is None else max(rows, key=lambda row: row[metric]))


def _file_record(file: str) -> dict[str, str] | None:
    return {"file": Path(file).name, "sha256": sha256_of_file(Path(file))} if file else None


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} threads"


def _format_table(rows: list[dict[str, float]]) -> str:
    if not rows:
        return ""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({name: f"{value:.6g}" for name, value in row.items()})
    return text.getvalue()


def _summary_writer(folder: Path) -> Any:
    """Return a TensorBoard writer; `None` if TensorBoard is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(folder / "tensorboard"))


def draw_curves(history: list[dict[str, float]], folder: Path) -> Path | None:
    """Plot the available losses and metrics into `curves.png`; return its path.

    Returns `None` without matplotlib or epochs.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    if not history:
        return None
    epochs = [row["epoch"] for row in history]
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    losses, quality = figure.subplots(1, 2)
    for name in ("loss", "metric", "identity", "knowledge", "contrastive", "memory"):
        if name in history[0]:
            losses.plot(epochs, [row[name] for row in history], marker="o", ms=3, label=name)
    losses.set(xlabel="epoch", title="training loss", ylim=(0, None))
    for name, label in (
        ("validation_map", "validation classes"),
        ("held_out_map", "held-out sketches of training classes"),
    ):
        if name in history[0]:
            quality.plot(epochs, [row[name] for row in history], marker="o", ms=3, label=label)
    quality.set(xlabel="epoch", title="mAP@all, seen classes", ylim=(0, 1))
    for axes in (losses, quality):
        axes.grid(alpha=0.3)
        axes.legend(frameon=False, fontsize=8)
    path = folder / "curves.png"
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
    return path


def refit(
    config: TrainConfig,
    folder: Path,
    context: TrainingContext,
    record: dict[str, Any],
    earlier: dict[str, Any],
    listener: Listener,
    between_batches: Callable[[], None],
) -> None:
    """Refit the best student's embedding, keep the result if it is not worse, and record both.

    The whole trunk is run, on images of the runtime's size.

    Args:
        config: the run's configuration.
        folder: the run folder, with its student.
        context: the run's context.
        record: the run's record, which is changed and written.
        earlier: the result of `read_recorded_refit` before the run was resumed.
        listener: called with progress messages and both metrics.
        between_batches: called before each batch of images; ends the refit by an exception.
    """
    record.pop("earlier_refit", None)
    if earlier and earlier["student_sha256"] == sha256_of_file(folder / STUDENT):
        record |= earlier
    else:
        _refit(config, folder, context, record, listener, between_batches)
    write_json_atomically(folder / RECORD, record)


def read_recorded_refit(folder: Path) -> dict[str, Any]:
    """Return the refit, best metrics and student's hash of a finished run; empty for others.

    After the refit, the trained embedding no longer exists to compare with.
    """
    if not (folder / RECORD).is_file():
        return {}
    record = read_json_object(folder / RECORD, BadConfig)
    if "earlier_refit" in record:
        return dict(record["earlier_refit"])
    names = ("refit", "best", "student_sha256")
    return {name: record.get(name) for name in names} if "refit" in record else {}


def _refit(
    config: TrainConfig,
    folder: Path,
    context: TrainingContext,
    record: dict[str, Any],
    listener: Listener,
    between_batches: Callable[[], None],
) -> None:
    division, compute, best = context.division, context.compute, record["best"]
    student = load_student(folder, config, len(division.training.classes))
    assert isinstance(student, SbtknetStudent)
    student = student.to(compute.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    preprocessing = config.recipe.preprocessing
    embed = make_pixel_embedder(preprocessing, compute, config.workers)
    how = (preprocessing, compute, config.workers, between_batches)
    if not division.validation.classes:
        listener("refitting the embedding on the training images' features")
        refit_embedding(student, division, *how)
        reason = "no validation classes to compare it with the trained one"
        record["refit"] = {"kept": True, "reason": reason}
        _keep(student, folder, config, record)
        return
    trained = {"mAP@all": best["validation_map"]}
    if config.feature_folder:
        # Cached feature maps are in half precision, and may be of smaller images.
        trained = score(student, division.validation, embed)
    listener("refitting the embedding on the training images' features")
    refit_embedding(student, division, *how)
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
    record["student_sha256"] = hash_student(student.state_dict(), config.backbone)
    # Before the student, which a resumed run would not know without it.
    write_json_atomically(folder / RECORD, record)
    save_student(folder, student.state_dict(), config.backbone)
