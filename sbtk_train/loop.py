"""The training loop: batches, losses, steps, validation, and saves that a kill cannot hurt."""

from __future__ import annotations

import copy
import math
import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from sbtk_runtime.errors import BadConfig, SbtkError
from sbtk_runtime.preprocess import SIZE_PX
from sbtk_train.augment import augmented_photos, augmented_sketches, batch_generator, normalised
from sbtk_train.checkpoint import Position, load_state, save_state, save_student
from sbtk_train.config import TrainConfig
from sbtk_train.data import ImageSet
from sbtk_train.evaluate import validate
from sbtk_train.losses import classification_loss, knowledge_loss
from sbtk_train.metric_loss import metric_loss
from sbtk_train.optimise import (
    build_optimizer,
    optimizer_tensors,
    restore_optimizer,
    set_rates,
    update_average,
)
from sbtk_train.pixels import PixelStore, fits_in_memory
from sbtk_train.progress import EpochDone, Listener, StepDone
from sbtk_train.recipes import Recipe
from sbtk_train.sampler import Batch, class_balanced_batches, quadruplet_batches
from sbtk_train.setup import Materials

_REPORT_SECONDS = 10.0


class TrainingDiverged(SbtkError):
    """The loss or a gradient is no finite number; the last good save is kept."""


class Trainer:
    """Trains one student in one run folder.

    Args:
        materials: data, student, soft labels and device.
        config: the run's configuration.
        folder: the run folder, which exists.
        listener: told about steps and epochs.
    """

    def __init__(
        self, materials: Materials, config: TrainConfig, folder: Path, listener: Listener
    ) -> None:
        self._materials = materials
        self._config = config
        self._recipe = config.recipe
        self._folder = folder
        self._listener = listener
        self._data = materials.division.training
        self._student = materials.student
        self._average = copy.deepcopy(self._student) if config.recipe.average_decay else None
        self._optimizer = build_optimizer(self._student, config.recipe)
        self._scaler = torch.GradScaler(
            materials.compute.device.type, enabled=materials.compute.needs_loss_scaling
        )
        self._labels = torch.from_numpy(self._data.sketch_labels)
        self._photo_labels = torch.from_numpy(self._data.photo_labels)
        soft = materials.soft_labels
        self._soft = None if soft is None else soft.to(materials.compute.device)
        self._position = Position(self._data.sha256, materials.split.sha256)
        self._epoch_steps = sum(1 for _ in _batches(self._data, self._recipe, config.seed, 0))
        self._saved_at = time.monotonic()
        self._is_stopping = False

    def stop_soon(self) -> None:
        """Makes `run` save and raise `KeyboardInterrupt` after the step under way."""
        self._is_stopping = True

    @property
    def history(self) -> list[dict[str, float]]:
        """The figures of each finished epoch."""
        return self._position.history

    def resume(self) -> None:
        """Takes up the saved state of the run folder.

        Raises:
            BadConfig: there is none, or it was made from other data or another split.
        """
        tensors, position = load_state(self._folder)
        for name, found, expected in (
            ("training data", self._position.data_sha256, position.data_sha256),
            ("class split", self._position.split_sha256, position.split_sha256),
        ):
            if found != expected:
                raise BadConfig(
                    f"the {name} changed since the run started: {found[:12]} now",
                    f"{expected[:12]}",
                    "put it back, or start a new run",
                )
        self._position = position
        self._student.load_state_dict(_part(tensors, "student."))
        if self._average is not None:
            self._average.load_state_dict(_part(tensors, "average."))
        restore_optimizer(self._optimizer, _part(tensors, "optimizer."))
        if position.scaler:
            self._scaler.load_state_dict(position.scaler)

    def run(self) -> Position:
        """Trains to the end or to early stopping; returns the final position.

        Raises:
            TrainingDiverged: at the first loss or gradient that is not finite.
        """
        position, recipe = self._position, self._recipe
        while position.epoch < recipe.epochs and not self._is_patience_over():
            self._run_epoch()
            self._finish_epoch()
        return position

    def _is_patience_over(self) -> bool:
        return 0 < self._recipe.patience <= self._position.since_best

    def _run_epoch(self) -> None:
        position = self._position
        size_px = self._size_px(position.epoch)
        keep = fits_in_memory(self._data, size_px)
        workers = self._config.workers
        sketches = PixelStore(self._data.sketches, "sketch", size_px, workers=workers, keep=keep)
        photos = PixelStore(self._data.photos, "photo", size_px, workers=workers, keep=keep)
        batches = _batches(self._data, self._recipe, self._config.seed, position.epoch)
        started, done, reported = time.monotonic(), 0, 0.0
        try:
            for number, batch, pixels in _prefetched(batches, position.step, sketches, photos):
                figures = self._step(batch, *pixels, number)
                for name, value in figures.items():
                    position.sums[name] = position.sums.get(name, 0.0) + value
                position.step = number + 1
                done += len(batch.sketches) + len(batch.photos)
                elapsed = time.monotonic() - started
                if elapsed - reported >= _REPORT_SECONDS or position.step == self._epoch_steps:
                    reported = elapsed
                    self._listener(self._step_done(done / elapsed, elapsed))
                is_due = time.monotonic() - self._saved_at > 60 * self._config.checkpoint_minutes
                if is_due or self._is_stopping:
                    self._check_weights()
                    self._save()
                if self._is_stopping:
                    raise KeyboardInterrupt
        finally:
            sketches.close()
            photos.close()

    def _step(
        self, batch: Batch, sketches: Tensor, photos: Tensor, number: int
    ) -> dict[str, float]:
        compute, recipe, position = self._materials.compute, self._recipe, self._position
        self._student.train()
        set_rates(
            self._optimizer,
            recipe,
            epoch=position.epoch,
            updates=position.updates,
            epoch_steps=self._epoch_steps,
        )
        draw = batch_generator(self._config.seed, position.epoch, number)
        sketches, photos = sketches.to(compute.device), photos.to(compute.device)
        if recipe.augment:
            images = torch.cat([augmented_sketches(sketches, draw), augmented_photos(photos, draw)])
        else:
            images = torch.cat([normalised(sketches), normalised(photos)])
        labels = torch.cat([self._labels[batch.sketches], self._photo_labels[batch.photos]])
        labels = labels.to(compute.device)
        with compute.autocast():
            output = self._student(images)
        count = len(batch.sketches)
        terms = {
            "metric": metric_loss(
                output.embedding[:count],
                output.embedding[count:],
                labels[:count],
                labels[count:],
                recipe,
            )
        }
        if recipe.identity:
            terms["identity"] = classification_loss(output.class_logits, labels)
        if self._soft is not None:
            terms["knowledge"] = knowledge_loss(output.soft_logits, self._soft[labels])
        loss = torch.stack(list(terms.values())).sum()
        self._optimise(loss, number)
        figures = {name: float(term.detach()) for name, term in terms.items()}
        correct = (output.class_logits.detach().argmax(1) == labels).float().mean()
        return {**figures, "loss": float(loss.detach()), "accuracy": float(correct)}

    def _optimise(self, loss: Tensor, number: int) -> None:
        self._optimizer.zero_grad(set_to_none=True)
        self._check_finite(float(loss.detach()), "loss", number)
        self._scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
        if not self._materials.compute.needs_loss_scaling:
            gradients = [p.grad for p in self._student.parameters() if p.grad is not None]
            norm = torch.nn.utils.get_total_norm(gradients)
            self._check_finite(float(norm), "gradient", number)
        self._scaler.step(self._optimizer)
        self._scaler.update()
        self._position.updates += 1
        if self._average is not None:
            update_average(
                self._average, self._student, self._recipe.average_decay, self._position.updates
            )

    def _check_finite(self, value: float, what: str, number: int) -> None:
        if math.isfinite(value):
            return
        position = self._position
        raise TrainingDiverged(
            f"the {what} is {value} in epoch {position.epoch + 1}, step {number + 1}",
            "a finite number; the last good save is kept",
            f"start again with --learning-rate below {self._recipe.learning_rate}",
        )

    def _check_weights(self) -> None:
        """Raises if a step of finite gradients still broke the student, before that is saved."""
        position = self._position
        sums = [value.float().sum() for value in self._student.state_dict().values()]
        self._check_finite(float(torch.stack(sums).sum()), "weights' sum", position.step - 1)

    def _finish_epoch(self) -> None:
        position = self._position
        self._check_weights()
        kept = self._average if self._average is not None else self._student
        figures = validate(
            kept, self._materials.division, self._materials.compute, workers=self._config.workers
        )
        means = {name: value / self._epoch_steps for name, value in position.sums.items()}
        row = {"epoch": float(position.epoch + 1), **means, **figures}
        improved = figures["validation_map"] > position.best_map
        position.history.append(row)
        position.best_map = max(position.best_map, figures["validation_map"])
        position.since_best = 0 if improved else position.since_best + 1
        position.epoch, position.step, position.sums = position.epoch + 1, 0, {}
        # The best student is written first: killed in between, the epoch is run again, to the
        # same result.
        if improved:
            save_student(self._folder, kept.state_dict(), self._config.backbone)
        self._save()
        self._listener(EpochDone(row, improved, position.since_best))

    def _save(self) -> None:
        tensors = {f"student.{k}": v for k, v in self._student.state_dict().items()}
        if self._average is not None:
            tensors |= {f"average.{k}": v for k, v in self._average.state_dict().items()}
        state = optimizer_tensors(self._optimizer)
        tensors |= {f"optimizer.{name}": value for name, value in state.items()}
        if self._scaler.is_enabled():
            self._position.scaler = self._scaler.state_dict()
        save_state(self._folder, tensors, self._position)
        self._saved_at = time.monotonic()

    def _size_px(self, epoch: int) -> int:
        recipe = self._recipe
        is_final = epoch >= recipe.epochs - recipe.final_epochs
        return SIZE_PX if is_final and recipe.final_epochs else recipe.train_size_px

    def _step_done(self, images_per_s: float, elapsed_s: float) -> StepDone:
        position, recipe = self._position, self._recipe
        means = {name: value / position.step for name, value in position.sums.items()}
        left = self._epoch_steps - position.step
        left += self._epoch_steps * (recipe.epochs - position.epoch - 1)
        per_step = 4 * recipe.quadruplets / images_per_s
        return StepDone(
            position.epoch + 1,
            recipe.epochs,
            position.step,
            self._epoch_steps,
            means,
            images_per_s,
            left * per_step,
        )


def _batches(data: ImageSet, recipe: Recipe, seed: int, epoch: int) -> Iterator[Batch]:
    if recipe.batches == "class-balanced":
        return class_balanced_batches(data, recipe.quadruplets, seed, epoch)
    return quadruplet_batches(data, recipe.quadruplets, seed, epoch)


def _prefetched(
    batches: Iterator[Batch], skip: int, sketches: PixelStore, photos: PixelStore
) -> Iterator[tuple[int, Batch, tuple[Tensor, Tensor]]]:
    """Yields number, batch and pixels from batch `skip` on, decoding one batch ahead."""

    def load(batch: Batch) -> tuple[Tensor, Tensor]:
        return sketches.batch(batch.sketches), photos.batch(batch.photos)

    wanted = [(number, batch) for number, batch in enumerate(batches) if number >= skip]
    with ThreadPoolExecutor(1) as ahead:
        following = ahead.submit(load, wanted[0][1]) if wanted else None
        for place, (number, batch) in enumerate(wanted):
            assert following is not None
            pixels = following.result()
            if place + 1 < len(wanted):
                following = ahead.submit(load, wanted[place + 1][1])
            yield number, batch, pixels


def _part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def default_workers() -> int:
    """Returns the number of CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
