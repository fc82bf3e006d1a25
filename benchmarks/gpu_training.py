"""Images a second of `sbtk train`'s own loop, by autocast, memory layout, batch and size.

The trainer, its batches, its augmentation and its losses are the real ones; only the data are cut
to some steps, and an epoch ends before it is validated and saved.
"""

from __future__ import annotations

import contextlib
import copy
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.gpu_findings import Finding, Report, Task, attempt
from benchmarks.gpu_training_data import write_training_data
from sbtk_runtime.preprocess import SIZE_PX
from sbtk_train.config import TrainConfig
from sbtk_train.data import ImageSet
from sbtk_train.device import choose_compute
from sbtk_train.loop import Trainer, default_workers
from sbtk_train.pixels import PixelStore
from sbtk_train.progress import EpochDone, StepDone
from sbtk_train.recipes import recipe
from sbtk_train.sampler import PER_CLASS
from sbtk_train.setup import Materials, gather

STAGE = "training"


@dataclass(frozen=True)
class Setting:
    """One way to train.

    Attributes:
        name: as the table has it.
        precision: as `sbtk train --precision` takes it.
        is_channels_last: as the trainer has it; otherwise the trunk is brought back to NCHW.
        is_tuned: cuDNN measures its algorithms first, which `sbtk train` does not ask for.
        quadruplets: a batch holds four times as many images.
        size_px: side of the training images.
        steps: that are measured.
        is_photos: of pictures that have to be decoded, where the others hardly have to be.
    """

    name: str
    precision: str
    is_channels_last: bool = True
    is_tuned: bool = False
    quadruplets: int = 16
    size_px: int = SIZE_PX
    steps: int = 32
    is_photos: bool = False


_LAST, _FIRST = "channels_last", "NCHW"
_SETTINGS = (
    Setting(f"bf16, {_LAST}", "bf16"),
    Setting(f"fp16, {_LAST}", "fp16"),
    Setting(f"fp32 (TF32 convolutions), {_LAST}", "fp32"),
    Setting(f"bf16, {_FIRST}", "bf16", is_channels_last=False),
    Setting(f"fp16, {_FIRST}", "fp16", is_channels_last=False),
    Setting(f"fp32 (TF32 convolutions), {_FIRST}", "fp32", is_channels_last=False),
    Setting(f"bf16, {_LAST}, cuDNN tuned", "bf16", is_tuned=True),
    Setting(f"bf16, {_LAST}, batch of 256", "bf16", quadruplets=64, steps=20),
    Setting(f"bf16, {_LAST}, 160 px", "bf16", size_px=160),
    Setting(f"bf16, {_LAST}, pictures to decode", "bf16", is_photos=True),
)
_DRY_SETTINGS = tuple(
    replace(setting, quadruplets=2, size_px=32, steps=2)
    for setting in (_SETTINGS[0], _SETTINGS[1], _SETTINGS[5], _SETTINGS[9])
)
_WARM_STEPS = 8
_DECODE_S = 2.0
_DECODE_BATCH = 32
#: Before the first setting there is nothing to go by.
_FIRST_S = 20.0


def run(task: Task, report: Report) -> None:
    """Reports the training speed of each setting, and of decoding alone."""
    settings = _DRY_SETTINGS if task.is_dry_run else _SETTINGS
    decoding = {
        is_photos: Finding(STAGE, f"decoding alone, {named}")
        for is_photos, named in ((False, "pictures next to raw"), (True, "pictures to decode"))
    }
    for point in (*(Finding(STAGE, one.name) for one in settings), *decoding.values()):
        report(point)
    folders = {
        False: write_training_data(task.scratch / "raw", is_photos=False, is_small=task.is_dry_run),
        True: task.data
        or write_training_data(task.scratch / "photos", is_photos=True, is_small=task.is_dry_run),
    }
    gathered: dict[bool, Materials] = {}

    def materials(is_photos: bool) -> Materials:
        if is_photos not in gathered:
            config = _config(task, settings[0], folders[is_photos])
            gathered[is_photos] = gather(config, lambda _: None)
        return gathered[is_photos]

    for is_photos, point in decoding.items():
        attempt(report, point, _decoding(task, materials, is_photos))
    longest_s = 0.0 if task.is_dry_run else _FIRST_S
    for setting in settings:
        point = Finding(STAGE, setting.name)
        if task.left_s < longest_s:
            report(point.not_reached("the stage's time was over"))
            continue
        started = time.monotonic()
        config = _config(task, setting, folders[setting.is_photos])
        attempt(report, point, _training(task, setting, config, materials))
        longest_s = 1.5 * (time.monotonic() - started)


def _config(task: Task, setting: Setting, data: Path) -> TrainConfig:
    return TrainConfig(
        data=str(data),
        split="SK-YE",
        recipe=recipe(
            "sbtk",
            # There are no weights that could teach; the loss costs next to nothing.
            knowledge=False,
            quadruplets=setting.quadruplets,
            train_size_px=setting.size_px,
            final_epochs=0,
            epochs=1,
        ),
        backbone="resnet18" if task.is_dry_run else "resnet50-v1",
        validation_classes=1,
        precision=setting.precision,
        device=task.device,
        workers=default_workers(),
        checkpoint_minutes=1e6,
    )


def _training(
    task: Task,
    setting: Setting,
    config: TrainConfig,
    materials: Callable[[bool], Materials],
) -> Callable[[], dict[str, Any]]:
    def measure() -> dict[str, Any]:
        whole = materials(setting.is_photos)
        student = copy.deepcopy(whole.student)
        if not setting.is_channels_last:
            student.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
            student.trunk.register_forward_pre_hook(_brought_to_nchw)
        compute = choose_compute(task.device, setting.precision)
        mine = replace(whole, student=student, compute=compute)
        is_cuda = task.device == "cuda"
        torch.backends.cudnn.benchmark = setting.is_tuned
        try:
            _epoch(_cut(mine, min(_WARM_STEPS, setting.steps), setting), config, task.scratch)
            if is_cuda:
                torch.cuda.reset_peak_memory_stats()
            done = _epoch(_cut(mine, setting.steps, setting), config, task.scratch)
            peak_bytes = torch.cuda.max_memory_allocated() if is_cuda else 0
        finally:
            torch.backends.cudnn.benchmark = False
            if is_cuda:
                torch.cuda.empty_cache()
        batch = 2 * _sketches_per_step(mine.division.training, setting)
        return {
            "images_per_s": done.images_per_s,
            "ms_per_step": batch / done.images_per_s * 1e3,
            "batch": batch,
            "size_px": setting.size_px,
            "steps": done.steps,
            "workers": config.workers,
            "loss": done.means["loss"],
            "cudnn_conv_fp32": torch.backends.cudnn.conv.fp32_precision,  # type: ignore[attr-defined]
        } | ({"peak_bytes": peak_bytes} if is_cuda else {})

    return measure


class _EpochOver(Exception):
    """Ends a trainer's run after its last step, before validation and the save."""


class _Watch:
    """Keeps what the trainer reports with the last step of an epoch, and ends the run there."""

    done: StepDone | None = None

    def __call__(self, event: StepDone | EpochDone | str) -> None:
        if isinstance(event, StepDone) and event.step == event.steps:
            self.done = event
            raise _EpochOver


def _epoch(materials: Materials, config: TrainConfig, folder: Path) -> StepDone:
    """Returns what a new trainer reports at the end of one epoch's steps."""
    watch = _Watch()
    with contextlib.suppress(_EpochOver):
        Trainer(materials, config, folder, watch).run()
    assert watch.done is not None
    return watch.done


def _cut(materials: Materials, steps: int, setting: Setting) -> Materials:
    """Returns the materials with as many sketches, evenly taken, as an epoch of `steps` needs."""
    training = materials.division.training
    wanted = steps * _sketches_per_step(training, setting)
    rows = np.unique(np.linspace(0, len(training.sketches) - 1, wanted).astype(np.int64))
    fewer = replace(
        training,
        sketches=tuple(training.sketches[row] for row in rows),
        sketch_labels=training.sketch_labels[rows],
    )
    return replace(materials, division=replace(materials.division, training=fewer))


def _sketches_per_step(training: ImageSet, setting: Setting) -> int:
    return PER_CLASS * min(setting.quadruplets, len(training.classes))


def _brought_to_nchw(_: object, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(images.contiguous() for images in inputs)


def _decoding(
    task: Task, materials: Callable[[bool], Materials], is_photos: bool
) -> Callable[[], dict[str, Any]]:
    """Returns a measurement of the loader's own speed, half sketches and half photos."""

    def measure() -> dict[str, Any]:
        training = materials(is_photos).division.training
        workers, seconds = default_workers(), 0.0 if task.is_dry_run else _DECODE_S
        size_px = 32 if task.is_dry_run else SIZE_PX
        stores = [
            PixelStore(training.sketches, "sketch", size_px, workers=workers, keep=False),
            PixelStore(training.photos, "photo", size_px, workers=workers, keep=False),
        ]
        count, started = 0, time.perf_counter()
        try:
            while count == 0 or time.perf_counter() - started < seconds:
                for store, paths in zip(stores, (training.sketches, training.photos), strict=True):
                    rows = [(count + place) % len(paths) for place in range(_DECODE_BATCH)]
                    store.batch(rows)
                count += _DECODE_BATCH
        finally:
            for store in stores:
                store.close()
        elapsed = time.perf_counter() - started
        return {"images_per_s": 2 * count / elapsed, "workers": workers, "size_px": size_px}

    return measure
