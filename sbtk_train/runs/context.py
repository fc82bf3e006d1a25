"""The inputs of the training loop, from a configuration: data, student, objective and device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sbtk_runtime.errors import BadConfig, BadData, BadModel
from sbtk_runtime.files import printable_name
from sbtk_runtime.preprocess import CROPPED, SIZE_PX
from sbtk_train.batches.augment import normalise
from sbtk_train.batches.pixels import Unreadable, drop_unreadable, load_pixels
from sbtk_train.compute import Compute, choose_compute
from sbtk_train.config import SbtknetRecipe, TrainConfig
from sbtk_train.data.class_names import ClassNames, read_names
from sbtk_train.data.dataset import read_dataset
from sbtk_train.data.image_set import ImageSet, select_images
from sbtk_train.data.more_images import append_images, open_class_map, read_more
from sbtk_train.data.splits import (
    Division,
    Split,
    divide,
    find_export_problem,
    join_names,
    open_split,
    refuse_absent,
)
from sbtk_train.distributed import SINGLE_PROCESS, DistributedContext, synchronise_batch_norms
from sbtk_train.models.backbone import (
    build_trunk,
    choose_layout,
    is_student,
    load_trunk,
)
from sbtk_train.models.student import Student, build_student
from sbtk_train.models.teacher import make_soft_labels, require_classifier
from sbtk_train.models.weights_file import (
    read_training_classes,
    read_unseen_classes,
    read_weights,
)
from sbtk_train.objectives.objective import Objective
from sbtk_train.objectives.sbtknet import SbtknetObjective
from sbtk_train.progress import Notify
from sbtk_train.runs.evaluate import require_selectable

_LAYOUT_PHOTOS = 16


@dataclass(frozen=True)
class TrainingContext:
    """The inputs of the training loop.

    Attributes:
        division: training, held-out and validation images, without unseen classes.
        split: the unseen classes.
        student: initialised, on its device.
        objective: batches, views and losses of the method.
        knowledge_sha256: hash of the objective's soft labels or semantic matrix; empty without.
        unreadable: images that were left out.
        compute: device and precision.
        distributed: the processes of the run.
    """

    division: Division
    split: Split
    student: Student
    objective: Objective
    knowledge_sha256: str
    unreadable: tuple[Unreadable, ...]
    compute: Compute
    distributed: DistributedContext = SINGLE_PROCESS


def build_context(
    config: TrainConfig, notify: Notify, distributed: DistributedContext = SINGLE_PROCESS
) -> TrainingContext:
    """Build the context of a run. Rank 0 reads the data and fills caches for all processes.

    Args:
        config: the run's configuration.
        notify: called with findings and progress messages.
        distributed: the processes of the run.

    Raises:
        BadData: the data cannot be trained on.
        BadModel: the weights do not fit.
        BadConfig: options contradict each other.
    """
    compute = choose_compute(distributed.device(config.device), config.precision)
    if config.threads:
        torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)
    division, split, unreadable = distributed.broadcast_object(lambda: _load_data(config, notify))
    training = division.training
    student = build_student(config, len(training.classes))
    if config.weights:
        _load_into(student, config, training, split, notify)
    if config.freeze_until:
        student.freeze_until(config.freeze_until)
    student = student.to(compute.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    objective, key = distributed.rank_zero_first(
        lambda: _objective(config, training, student, compute, notify)
    )
    if distributed.world_size > 1:
        synchronise_batch_norms(student, compute.device)
    return TrainingContext(
        division, split, student, objective, key, unreadable, compute, distributed
    )


def _load_data(
    config: TrainConfig, notify: Notify
) -> tuple[Division, Split, tuple[Unreadable, ...]]:
    data = read_dataset(Path(config.data), keep_duplicates=config.keep_duplicates)
    split = open_split(config.split, data.classes)
    if split.is_file and not config.allow_missing:
        refuse_absent(split.unseen, data.classes, printable_name(split.name))
    division, unreadable = load_division(config, data, split, notify)
    require_selectable(division, config.recipe.selection, config.dim)
    if problem := find_export_problem(division):
        notify(f"WARNING: {problem}")
    return division, split, tuple(unreadable)


def load_division(
    config: TrainConfig, data: ImageSet, split: Split, notify: Notify
) -> tuple[Division, list[Unreadable]]:
    """Divide the data; return the division without unreadable images, and those images.

    Args:
        config: the run's configuration.
        data: the whole data set.
        split: the unseen classes.
        notify: called with what was left out.

    Raises:
        BadData: the data cannot be trained on.
    """
    unreadable: list[Unreadable] = []
    names, more = open_class_map(config.class_map), None
    if config.more_sketches or config.more_photos:
        more = read_more(
            [Path(each) for each in config.more_sketches],
            [Path(each) for each in config.more_photos],
        )
    seen = split.seen_among(data.classes)
    absent = len(data.classes) == len(seen)
    if absent:
        notify(f"WARNING: none of the unseen classes of {split.name} is in {config.data}")
    division = divide(
        data,
        split,
        seed=config.division_seed,
        validation_classes=config.validation_classes,
        held_out_share=config.held_out_share,
        only_classes=_read_class_list(config, data) if config.classes else None,
        is_holding_out_photos=getattr(config.recipe, "held_out_photos", False),
    )
    for notice in division.notices:
        notify(notice)
    parts: dict[str, ImageSet] = {}
    for name in ("training", "held_out", "validation", "held_out_photos"):
        given: ImageSet | None = getattr(division, name)
        if given is None:
            continue
        parts[name], faults = drop_unreadable(given, config.workers)
        unreadable += [fault for fault in faults if fault not in unreadable]
        if name in ("training", "validation"):
            _require_both_kinds(given, parts[name], faults)
    for fault in unreadable:
        notify(f"left out {fault.path}: {fault.reason}")
    divided = Division(**parts, notices=division.notices)
    if more is not None:
        own = divided
        divided = append_images(own, split, more, names)
        further = select_images(
            divided.training,
            sketches=range(len(own.training.sketches), len(divided.training.sketches)),
            photos=range(len(own.training.photos), len(divided.training.photos)),
        )
        _, faults = drop_unreadable(further, config.workers)
        if faults:
            # A class may have nothing left.
            unread = {fault.path for fault in faults}
            divided = append_images(own, split, more.without(unread), names)
        for notice in divided.notices[len(division.notices) :]:
            notify(notice)
        for fault in faults:
            notify(f"left out {fault.path}: {fault.reason}")
        unreadable += faults
    return divided, unreadable


def _require_both_kinds(given: ImageSet, readable: ImageSet, faults: Sequence[Unreadable]) -> None:
    """Check that at least one sketch and one photo of each class can be read."""
    reasons = {fault.path: fault.reason for fault in faults}
    for kind, paths, labels, left in (
        ("sketches", given.sketches, given.sketch_labels, readable.sketch_labels),
        ("photos", given.photos, given.photo_labels, readable.photo_labels),
    ):
        lost = np.flatnonzero(~np.isin(labels, left))
        if len(lost):
            path = paths[lost[0]]
            raise BadData(
                f"none of the {kind} of the class {given.classes[labels[lost[0]]]!r} to train or "
                f"validate on can be read: {path}: {reasons[path]}",
                "at least one of each class",
                "fix them, or remove the class",
            )


def _read_class_list(config: TrainConfig, data: ImageSet) -> list[str]:
    file = Path(config.classes)
    names = read_names(file, "the list of classes")
    if not config.allow_missing:
        refuse_absent(names, data.classes, printable_name(file.name))
    return names


def _load_into(
    student: Student, config: TrainConfig, training: ImageSet, split: Split, notify: Notify
) -> None:
    path = Path(config.weights)
    tensors, layout = read_weights(path)
    if layout is not None and layout != config.backbone:
        raise BadModel(
            f"{path} is for {layout}, but the backbone is {config.backbone}",
            "weights and backbone of one layout",
            f"--backbone {layout}",
        )
    if is_student(tensors):
        _load_student_weights(student, tensors, path, training, split, notify)
        return
    classifier = student.load_weights(tensors, path)
    if classifier is not None and not getattr(config.recipe, "new_heads", False):
        student.start_from(classifier)
    better, drifts = choose_layout(config.backbone, tensors, _sample_photos(training), path)
    if drifts:
        found = ", ".join(f"{name} {drift:.4f}" for name, drift in sorted(drifts.items()))
        notify(f"batch-norm drift of {path.name}: {found}")
    if better != config.backbone:
        notify(
            f"WARNING: {path.name} fits {better} better than {config.backbone}; "
            f"if it was trained with that layout, start again with --backbone {better}"
        )


def _load_student_weights(
    student: Student,
    tensors: dict[str, Tensor],
    path: Path,
    training: ImageSet,
    split: Split,
    notify: Notify,
) -> None:
    """Load a student trained by sbtk, including its embedding and heads."""
    learnt = read_training_classes(path)
    same_classes = learnt == training.classes
    student.load_student(tensors, path, same_classes=same_classes)
    head = "" if same_classes else "; the classification head is new, for these classes"
    notify(f"starting from the model in {path}{head}")
    known = [name for name in learnt if split.is_unseen(name)]
    if known:
        notify(
            f"WARNING: that model was trained on {len(known)} of the classes that {split.name} "
            f"keeps unseen ({join_names(known)}): figures on them are not zero-shot"
        )
    kept = ClassNames(read_unseen_classes(path))
    doubtful = [] if learnt else [name for name in split.unseen if name not in kept]
    if doubtful:
        notify(
            f"WARNING: {path} may have been trained on {len(doubtful)} of the classes that "
            f"{split.name} keeps unseen ({join_names(doubtful)}): figures on them are zero-shot "
            "only if it was not"
        )


def _sample_photos(training: ImageSet) -> Tensor:
    rows = np.linspace(0, len(training.photos) - 1, _LAYOUT_PHOTOS).astype(int)
    pixels = np.stack(
        [load_pixels(training.photos[row], "photo", SIZE_PX, CROPPED) for row in rows]
    )
    return normalise(torch.from_numpy(pixels).permute(0, 3, 1, 2))


def _objective(
    config: TrainConfig, training: ImageSet, student: Student, compute: Compute, notify: Notify
) -> tuple[Objective, str]:
    """Return the method's objective, and the hash of its soft labels or semantic matrix."""
    recipe = config.recipe
    if not isinstance(recipe, SbtknetRecipe):
        from sbtk_train.objectives.dsn import build_dsn_objective

        return build_dsn_objective(config, training, student, compute, notify)
    labels, key = None, ""
    if recipe.knowledge:
        labels, key = _soft_labels(config, training, compute, notify)
        labels = labels.to(compute.device)
    return SbtknetObjective(recipe, training, config.seed, labels), key


def _soft_labels(
    config: TrainConfig, training: ImageSet, compute: Compute, notify: Notify
) -> tuple[Tensor, str]:
    if not (config.weights or config.teacher):
        raise BadConfig(
            "the knowledge loss needs an ImageNet teacher, and no weights are given",
            "--weights FILE or --teacher FILE",
            "or --no-knowledge",
        )
    path = Path(config.teacher or config.weights)
    tensors, layout = read_weights(path)
    backbone = layout or config.backbone
    trunk, _ = build_trunk(backbone)
    classifier = require_classifier(
        load_trunk(trunk, tensors, path), path, "the knowledge loss needs", "--no-knowledge"
    )
    return make_soft_labels(
        training,
        trunk,
        classifier,
        path,
        backbone,
        compute,
        stand_ins=open_class_map(config.class_map).imagenet,
        workers=config.workers,
        notify=notify,
    )
