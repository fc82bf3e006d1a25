"""Images/s of `sbtk train`'s own loop, by autocast, memory format, batch and image size.

Trainer, batches, augmentation and losses are the real ones; only the data are limited to some
steps, and an epoch ends before validation and saving. The speed is computed from the difference
between a long and a short epoch, which excludes the cost of starting an epoch.
"""

from __future__ import annotations

import contextlib
import copy
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu_findings import Finding, Report, Task, attempt
from benchmarks.gpu_training_data import (
    cut_evenly,
    repeat_images,
    sketches_per_step,
    write_training_data,
)
from sbtk_runtime.machine import cpu_threads
from sbtk_runtime.preprocess import CROPPED, SIZE_PX
from sbtk_train.batches.pixels import PixelStore
from sbtk_train.compute import choose_compute
from sbtk_train.config import SbtknetRecipe, TrainConfig, make_recipe
from sbtk_train.models.student import Student
from sbtk_train.objectives.sbtknet import SbtknetObjective
from sbtk_train.progress import EpochDone, StepDone
from sbtk_train.runs.context import TrainingContext, build_context
from sbtk_train.runs.loop import Trainer

STAGE = "training"


@dataclass(frozen=True)
class Setting:
    """One way to train.

    Attributes:
        name: name in the table.
        precision: as for `sbtk train --precision`.
        is_channels_last: the trainer's default; otherwise the trunk uses NCHW.
        is_tuned: whether cuDNN benchmarks its algorithms, which `sbtk train` does not enable.
        is_decoding: whether every image is decoded, as in a real epoch, or hardly any.
        quadruplets: quadruplets per batch, each of four images.
        size_px: height and width of the training images.
        steps: difference in steps between the long and the short epoch.
        short_steps: steps of the short epoch, which also runs once for warm-up.
    """

    name: str
    precision: str
    is_channels_last: bool = True
    is_tuned: bool = False
    is_decoding: bool = False
    quadruplets: int = 16
    size_px: int = SIZE_PX
    steps: int = 32
    short_steps: int = 8


_LAST, _FIRST, _FP32 = "channels_last", "NCHW", "fp32 (TF32 convolutions)"
_SETTINGS = (
    Setting(f"bf16, {_LAST}", "bf16"),
    Setting(f"fp16, {_LAST}", "fp16"),
    Setting(f"{_FP32}, {_LAST}", "fp32"),
    Setting(f"bf16, {_FIRST}", "bf16", is_channels_last=False),
    Setting(f"fp16, {_FIRST}", "fp16", is_channels_last=False),
    Setting(f"{_FP32}, {_FIRST}", "fp32", is_channels_last=False),
    Setting(f"bf16, {_LAST}, every image decoded", "bf16", is_decoding=True),
    Setting(f"bf16, {_LAST}, batch of 256", "bf16", quadruplets=64, steps=20),
    Setting(f"bf16, {_LAST}, 160 px", "bf16", size_px=160),
    Setting(f"bf16, {_LAST}, cuDNN tuned", "bf16", is_tuned=True),
)
_DRY_SETTINGS = tuple(
    replace(_SETTINGS[number], quadruplets=2, size_px=32, steps=2, short_steps=2)
    for number in (0, 1, 5, 6)
)
_DECODE_S = 2.0
_DECODE_BATCH = 32
#: Estimate for the first setting.
_FIRST_S = 20.0


def run(task: Task, report: Report) -> None:
    """Report the training speed of each setting, and the speed of decoding alone."""
    settings = _DRY_SETTINGS if task.is_dry_run else _SETTINGS
    decoding = Finding(STAGE, "decoding alone")
    for point in (*(Finding(STAGE, setting.name) for setting in settings), decoding):
        report(point)
    data = task.data or write_training_data(task.scratch / "data", is_small=task.is_dry_run)
    context = build_context(_config(task, settings[0], data), lambda _: None)
    longest_s = 0.0 if task.is_dry_run else _FIRST_S
    for setting in settings:
        point = Finding(STAGE, setting.name)
        if task.left_s < longest_s:
            report(point.not_reached("the stage ran out of time"))
            continue
        started = time.monotonic()
        attempt(report, point, _measuring(task, setting, data, context))
        longest_s = 1.5 * (time.monotonic() - started)
    attempt(report, decoding, lambda: _decoding(task, context))


def _config(task: Task, setting: Setting, data: Path) -> TrainConfig:
    return TrainConfig(
        data=str(data),
        split="SK-YE",
        recipe=make_recipe(
            "sbtk",
            # There is no teacher, whose loss costs next to nothing.
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
        workers=cpu_threads(),
        checkpoint_minutes=1e6,
    )


def _measuring(
    task: Task, setting: Setting, data: Path, context: TrainingContext
) -> Callable[[], dict[str, Any]]:
    """Measure one setting; each epoch is the first of a new trainer."""

    def measure() -> dict[str, Any]:
        config = _config(task, setting, data)
        mine = replace(
            context,
            student=_student(context, setting),
            compute=choose_compute(task.device, setting.precision),
        )
        torch.backends.cudnn.benchmark = setting.is_tuned
        try:
            run_epoch(mine, config, setting, setting.short_steps, task.scratch)
            if task.device == "cuda":
                torch.cuda.reset_peak_memory_stats()
            short = run_epoch(mine, config, setting, setting.short_steps, task.scratch)
            long = run_epoch(
                mine, config, setting, setting.short_steps + setting.steps, task.scratch
            )
            return _figures(task, setting, config, mine, short, long)
        finally:
            torch.backends.cudnn.benchmark = False
            if task.device == "cuda":
                torch.cuda.empty_cache()

    return measure


def _student(context: TrainingContext, setting: Setting) -> Student:
    student = copy.deepcopy(context.student)
    if not setting.is_channels_last:
        student.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
        # Input in channels_last would make every convolution use it.
        next(student.trunk.children()).register_forward_pre_hook(_brought_to_nchw)
    return student


def _figures(
    task: Task,
    setting: Setting,
    config: TrainConfig,
    context: TrainingContext,
    short: StepDone,
    long: StepDone,
) -> dict[str, Any]:
    batch = 2 * sketches_per_step(context.division.training, setting.quadruplets)
    elapsed_s = [done.steps * batch / done.images_per_s for done in (short, long)]
    steps = long.steps - short.steps
    seconds = elapsed_s[1] - elapsed_s[0]
    if steps <= 0 or seconds <= 0:
        raise ValueError(f"{steps} more steps took {seconds:.3f} s more, which is within noise")
    convolutions = torch.backends.cudnn.conv  # type: ignore[attr-defined]
    figures = {
        "images_per_s": steps * batch / seconds,
        "ms_per_step": seconds / steps * 1e3,
        "batch": batch,
        "size_px": setting.size_px,
        "steps": steps,
        "workers": config.workers,
        "last_loss": long.means["loss"],
        "fp32_convolutions": convolutions.fp32_precision,
    }
    if task.device == "cuda":
        figures["peak_bytes"] = torch.cuda.max_memory_allocated()
    return figures


class _EpochOver(Exception):
    """Raised after the last step, to end a run before validation and saving."""


class _Watch:
    """Keeps the trainer's report at the last step of an epoch, and ends the run."""

    done: StepDone | None = None

    def __call__(self, event: StepDone | EpochDone | str) -> None:
        if isinstance(event, StepDone) and event.step == event.steps:
            self.done = event
            raise _EpochOver


def run_epoch(
    context: TrainingContext, config: TrainConfig, setting: Setting, steps: int, folder: Path
) -> StepDone:
    """Return the report of a new trainer at the end of an epoch of `steps`."""
    division = context.division
    cut = cut_evenly if setting.is_decoding else repeat_images
    training = cut(division.training, steps, setting.quadruplets)
    watch = _Watch()
    with contextlib.suppress(_EpochOver):
        assert isinstance(config.recipe, SbtknetRecipe)
        objective = SbtknetObjective(config.recipe, training, config.seed, soft_labels=None)
        cut_division = replace(division, training=training)
        mine = replace(context, division=cut_division, objective=objective)
        Trainer(mine, config, folder, watch).run()
    assert watch.done is not None
    return watch.done


def _brought_to_nchw(_: object, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(images.contiguous() for images in inputs)


def _decoding(task: Task, context: TrainingContext) -> dict[str, Any]:
    """Measure the trainer's own loader, on half sketches and half photos."""
    training, workers = context.division.training, cpu_threads()
    size_px, seconds = (32, 0.0) if task.is_dry_run else (SIZE_PX, _DECODE_S)
    sketches = PixelStore(
        training.sketches, "sketch", size_px, CROPPED, workers=workers, keep=False
    )
    photos = PixelStore(training.photos, "photo", size_px, CROPPED, workers=workers, keep=False)
    stores = {sketches: len(training.sketches), photos: len(training.photos)}
    count, started = 0, time.perf_counter()
    try:
        while count == 0 or time.perf_counter() - started < seconds:
            for store, length in stores.items():
                store.batch([(count + place) % length for place in range(_DECODE_BATCH)])
            count += _DECODE_BATCH
    finally:
        for store in stores:
            store.close()
    elapsed = time.perf_counter() - started
    return {"images_per_s": 2 * count / elapsed, "workers": workers, "size_px": size_px}
