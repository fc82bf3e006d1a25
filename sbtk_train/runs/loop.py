"""The training loop: batches, losses, steps, validation and atomic checkpoints."""

from __future__ import annotations

import contextlib
import hashlib
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel

from sbtk_runtime.errors import BadConfig, BadModel, SbtkError
from sbtk_runtime.files import sha256_of_file
from sbtk_runtime.machine import keep_freed_memory
from sbtk_runtime.preprocess import SIZE_PX
from sbtk_train.batches.sampler import BatchShard, make_generator
from sbtk_train.config import CONFIG_NAME, Recipe, TrainConfig
from sbtk_train.data.splits import Division
from sbtk_train.models.student import Student, StudentOutput, batch_domains
from sbtk_train.objectives.objective import Examples
from sbtk_train.progress import EpochDone, Listener, StepDone
from sbtk_train.runs.checkpoint import (
    LAST,
    STUDENT,
    Position,
    hash_config,
    hash_student,
    load_state,
    save_state,
    save_student,
)
from sbtk_train.runs.context import TrainingContext
from sbtk_train.runs.evaluate import SELECTION_METRICS, validate
from sbtk_train.runs.sources import Source, SourceFactory, prefetch

_REPORT_SECONDS = 10.0


class TrainingDiverged(SbtkError):
    """The loss or a gradient is not finite; the last good checkpoint is kept."""


class Trainer:
    """Trains one student in one run folder.

    In distributed training each process has a trainer; rank 0 validates and writes.

    Args:
        context: data, student, objective and device.
        config: the run's configuration.
        folder: the existing run folder.
        listener: receives steps and epochs.
    """

    def __init__(
        self, context: TrainingContext, config: TrainConfig, folder: Path, listener: Listener
    ) -> None:
        self._context = context
        self._distributed = context.distributed
        self._config = config
        self._recipe = config.recipe
        self._folder = folder
        self._listener = listener
        self._data = context.division.training
        self._student = context.student
        self._average = _make_average(self._student, config.recipe.average_decay)
        self._network = self._distributed.wrap_model(self._student)
        self._optimizer = build_optimizer(self._student, config.recipe)
        self._scaler = torch.GradScaler(
            context.compute.device.type, enabled=context.compute.needs_loss_scaling
        )
        self._labels = torch.from_numpy(self._data.sketch_labels)
        self._photo_labels = torch.from_numpy(self._data.photo_labels)
        self._objective = context.objective
        self._inputs = SourceFactory(
            config,
            self._student,
            self._data,
            self._objective,
            context.compute,
            self._distributed.local_world_size,
            listener,
        )
        self._position = Position(
            self._data.sha256,
            context.split.sha256,
            validation_sha256=_hash_validation(context.division),
            config_sha256=hash_config(config),
        )
        batches = list(self._objective.batches(0))
        self._epoch_steps = len(batches)
        self._epoch_images = sum(len(batch.sketches) + len(batch.photos) for batch in batches)
        self._saved_at = time.monotonic()
        self._is_stopping = False

    def stop_soon(self) -> None:
        """Make `run` save and raise `KeyboardInterrupt` after the current step."""
        self._is_stopping = True

    def raise_if_stopping(self) -> None:
        """Raise `KeyboardInterrupt` after `stop_soon`: every finished epoch is saved."""
        if self._is_stopping:
            raise KeyboardInterrupt

    @property
    def history(self) -> list[dict[str, float]]:
        """The metrics of each finished epoch."""
        return self._position.history

    def student_bytes(self) -> int:
        """Return the size of a saved student."""
        return sum(value.nbytes for value in self._student.state_dict().values())

    def state_bytes(self) -> int:
        """Return the size of the checkpoint."""
        copies = 2 if self._average is not None else 1
        trained = sum(value.nbytes for value in self._student.parameters() if value.requires_grad)
        moments = {"sgd": 1 if self._recipe.momentum else 0, "adam": 2, "adamw": 2}
        objective = sum(value.nbytes for value in self._objective.state().values())
        return copies * self.student_bytes() + moments[self._recipe.optimizer] * trained + objective

    def resume(
        self, *, is_longer: bool = False, refitted_sha256: str = "", changed: Sequence[str] = ()
    ) -> None:
        """Restore the checkpoint of the run folder.

        Args:
            is_longer: whether more epochs are requested than at the start, which resets patience.
            refitted_sha256: hash of the refitted student, if the run was finished.
            changed: names of changed files, to explain changed data.

        Raises:
            BadConfig: there is no checkpoint, or it is from other data, another split or another
                configuration.
            BadModel: the checkpoint is of a run that diverged, or the student is of another run.
        """
        tensors, position = self._distributed.broadcast_object(lambda: load_state(self._folder))
        now = self._position
        if position.config_sha256 not in ("", now.config_sha256):
            raise BadConfig(
                f"{LAST} in {self._folder} is not a checkpoint of the run in {CONFIG_NAME}",
                "both files as the run left them",
                "copy the run's files again, or start a new run",
            )
        for name, found, expected in (
            ("training data", now.data_sha256, position.data_sha256),
            ("class split", now.split_sha256, position.split_sha256),
            ("validation or held-out data", now.validation_sha256, position.validation_sha256),
        ):
            if expected and found != expected:
                files = f" ({', '.join(changed)})" if changed else ""
                raise BadConfig(
                    f"the {name} changed since the run started{files}: {found[:12]} now",
                    f"{expected[:12]}",
                    "restore it, or start a new run",
                )
        self._require_finite(tensors)
        if position.epoch > self._recipe.epochs:
            raise BadConfig(
                f"--epochs {self._recipe.epochs}, but the run has finished {position.epoch}",
                f"{position.epoch} or more",
            )
        has_best = position.step == 0 and position.since_best == 0
        position.validation_sha256 = now.validation_sha256
        position.config_sha256 = now.config_sha256
        self._position = position
        if is_longer:
            position.since_best = 0
        self._student.load_state_dict(_part(tensors, "student."))
        if self._average is not None:
            self._average.module.load_state_dict(_part(tensors, "average."))
            self._average.n_averaged.fill_(position.updates + 1)
        restore_optimizer(self._optimizer, _part(tensors, "optimizer."))
        self._objective.load_state(_part(tensors, "objective."))
        if position.scaler:
            self._scaler.load_state_dict(position.scaler)
        if position.student_sha256 and self._distributed.is_rank_zero:
            self._require_student((position.student_sha256, refitted_sha256), has_best=has_best)

    def _require_finite(self, tensors: dict[str, Tensor]) -> None:
        """Refuse a checkpoint from which every step would diverge."""
        strange = [name for name, value in tensors.items() if not torch.isfinite(value).all()]
        if strange:
            raise BadModel(
                f"{self._folder / LAST} has numbers that are not finite, in {strange[0]}: the run "
                "diverged before it was saved",
                "a checkpoint of finite numbers",
                self._restart(),
            )

    def _require_student(self, known: Sequence[str], *, has_best: bool) -> None:
        """Check that the best student's file is this run's, or write it again.

        Args:
            known: hashes of the files that this run saved.
            has_best: whether the checkpoint is of the best student, as after a kill while it was
                being saved.
        """
        path = self._folder / STUDENT
        found = sha256_of_file(path) if path.is_file() else ""
        if found and found in known:
            return
        if not has_best:
            raise BadModel(
                f"{path} is not the student that this run saved: SHA-256 {found[:12] or 'missing'}",
                known[0][:12],
                "copy the run's files again, or start a new run",
            )
        self._listener(f"{path} is not the student that this run saved: written from {LAST}")
        save_student(self._folder, self._kept().state_dict(), self._config.backbone)

    def _restart(self) -> str:
        """Return the advice for a run that diverged: a resumed one does so again."""
        rate = self._recipe.learning_rate
        return f"start a new run with --learning-rate below {rate} and another --out"

    def _kept(self) -> Student:
        """Return the student that is validated and saved."""
        kept = self._student if self._average is None else self._average.module
        assert isinstance(kept, Student)
        return kept

    def run(self) -> Position:
        """Train to the end or to early stopping; return the final position.

        Raises:
            TrainingDiverged: at the first loss or gradient that is not finite.
        """
        position, recipe = self._position, self._recipe
        is_on_cpu = self._context.compute.device.type == "cpu"
        with keep_freed_memory() if is_on_cpu else contextlib.nullcontext():
            while position.epoch < recipe.epochs and not self._is_patience_over():
                self._run_epoch()
                self._finish_epoch()
        return position

    def _is_patience_over(self) -> bool:
        return 0 < self._recipe.patience <= self._position.since_best

    def _run_epoch(self) -> None:
        position = self._position
        if position.step == 0:
            self._objective.start_epoch()
        source = self._distributed.rank_zero_first(
            lambda: self._inputs.source(self._size_px(position.epoch), position.epoch)
        )
        shards = (
            self._distributed.shard(batch) for batch in self._objective.batches(position.epoch)
        )
        started, done, reported = time.monotonic(), 0, 0.0
        try:
            for number, shard, loaded in prefetch(shards, position.step, source):
                figures = self._step(shard, source, loaded, number)
                for name, value in figures.items():
                    position.sums[name] = position.sums.get(name, 0.0) + value
                position.step = number + 1
                done += len(shard.batch.sketches) + len(shard.batch.photos)
                elapsed = time.monotonic() - started
                if elapsed - reported >= _REPORT_SECONDS or position.step == self._epoch_steps:
                    reported = elapsed
                    self._listener(self._step_done(done / elapsed))
                is_due = time.monotonic() - self._saved_at > 60 * self._config.checkpoint_minutes
                is_due, is_stopping = self._distributed.all_reduce_any(
                    is_due and self._distributed.is_rank_zero, self._is_stopping
                )
                if is_due or is_stopping:
                    self._check_weights()
                    self._save()
                if is_stopping:
                    self._distributed.barrier()  # torchrun kills the others when the first ends
                    raise KeyboardInterrupt
        finally:
            source.close()

    def _step(
        self, shard: BatchShard, source: Source, loaded: Any, number: int
    ) -> dict[str, float]:
        compute, position = self._context.compute, self._position
        batch, views = shard.batch, self._objective.views
        self._student.train()
        set_learning_rates(
            self._optimizer,
            self._recipe,
            epoch=position.epoch,
            updates=position.updates,
            epoch_steps=self._epoch_steps,
        )
        generator = make_generator(self._config.seed, position.epoch, number)
        inputs = source.inputs(loaded, shard.make_rngs(generator))
        labels = torch.cat([self._labels[batch.sketches], self._photo_labels[batch.photos]])
        labels = labels.to(compute.device)
        domains = batch_domains(len(batch.sketches), len(batch.photos), compute.device)
        with compute.autocast():
            own = self._network(inputs, domains[shard.rows()].repeat(views), source.begin)
        output = StudentOutput(*self._distributed.all_gather(own, shard, views))
        count = len(batch.sketches)
        examples = Examples(inputs, source.begin, labels, domains, count, shard, self._distributed)
        terms = self._objective.terms(output, examples)
        loss = torch.stack(list(terms.values())).sum()
        self._optimise(loss, number)
        figures = {name: float(term.detach()) for name, term in terms.items()}
        predicted = output.class_logits[: len(labels)].detach().argmax(1)
        correct = (predicted == labels).float().mean()
        return {**figures, "loss": float(loss.detach()), "accuracy": float(correct)}

    def _optimise(self, loss: Tensor, number: int) -> None:
        self._optimizer.zero_grad(set_to_none=True)
        self._check_finite(float(loss.detach()), "loss", number)
        self._scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
        if not self._context.compute.needs_loss_scaling:
            gradients = [p.grad for p in self._student.parameters() if p.grad is not None]
            norm = torch.nn.utils.get_total_norm(gradients)
            self._check_finite(float(norm), "gradient", number)
        self._scaler.step(self._optimizer)
        self._scaler.update()
        self._position.updates += 1
        if self._average is not None:
            self._average.update_parameters(self._student)

    def _check_finite(self, value: float, what: str, number: int) -> None:
        if math.isfinite(value):
            return
        position = self._position
        raise TrainingDiverged(
            f"the {what} is {value} in epoch {position.epoch + 1}, step {number + 1}",
            "a finite number; the last good checkpoint is kept, but --resume would end here again",
            self._restart(),
        )

    def _check_weights(self) -> None:
        """Raise `TrainingDiverged` if a weight is not finite, before it is saved."""
        position = self._position
        sums = [value.float().sum() for value in self._student.state_dict().values()]
        self._check_finite(float(torch.stack(sums).sum()), "weights' sum", position.step - 1)

    def _finish_epoch(self) -> None:
        position = self._position
        self._check_weights()
        kept = self._kept()
        division, selection = self._context.division, self._recipe.selection
        figures = self._distributed.broadcast_object(
            lambda: validate(kept, division, selection, self._inputs.embed())
        )
        means = {name: value / self._epoch_steps for name, value in position.sums.items()}
        row = {"epoch": float(position.epoch + 1), **means, **figures}
        selected_by = SELECTION_METRICS[self._recipe.selection]
        improved = selected_by is None or figures[selected_by] > position.best
        position.history.append(row)
        if improved and selected_by is not None:
            position.best = figures[selected_by]
        position.since_best = 0 if improved else position.since_best + 1
        position.epoch, position.step, position.sums = position.epoch + 1, 0, {}
        is_saving = improved and self._distributed.is_rank_zero
        if is_saving:
            position.student_sha256 = hash_student(kept.state_dict(), self._config.backbone)
        self._save()
        # After a kill in between, `resume` writes the student from the checkpoint.
        if is_saving:
            save_student(self._folder, kept.state_dict(), self._config.backbone)
        self._listener(EpochDone(row, improved, position.since_best))

    def _save(self) -> None:
        if not self._distributed.is_rank_zero:
            return
        tensors = {f"student.{k}": v for k, v in self._student.state_dict().items()}
        if self._average is not None:
            state = self._average.module.state_dict()
            tensors |= {f"average.{name}": value for name, value in state.items()}
        state = optimizer_tensors(self._optimizer)
        tensors |= {f"optimizer.{name}": value for name, value in state.items()}
        tensors |= {f"objective.{k}": v for k, v in self._objective.state().items()}
        if self._scaler.is_enabled():
            self._position.scaler = self._scaler.state_dict()
        save_state(self._folder, tensors, self._position)
        self._saved_at = time.monotonic()

    def _size_px(self, epoch: int) -> int:
        recipe = self._recipe
        is_final = epoch >= recipe.epochs - recipe.final_epochs
        return SIZE_PX if is_final and recipe.final_epochs else recipe.train_size_px

    def _step_done(self, images_per_s: float) -> StepDone:
        position, recipe = self._position, self._recipe
        means = {name: value / position.step for name, value in position.sums.items()}
        left = self._epoch_steps - position.step
        left += self._epoch_steps * (recipe.epochs - position.epoch - 1)
        per_step = self._epoch_images / self._epoch_steps / images_per_s
        return StepDone(
            position.epoch + 1,
            recipe.epochs,
            position.step,
            self._epoch_steps,
            means,
            images_per_s,
            left * per_step,
        )


def _hash_validation(division: Division) -> str:
    parts = (division.validation, division.held_out, division.held_out_photos)
    return hashlib.sha256("\n".join(part.sha256 for part in parts if part).encode()).hexdigest()


def _part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def build_optimizer(student: Student, recipe: Recipe) -> torch.optim.Optimizer:
    """Return the recipe's optimiser; each group has the `factor` of its learning rate.

    AdamW does not decay the trunk's biases and batch norms.
    """
    trunk = [p for p in student.trunk.parameters() if p.requires_grad]
    heads = [
        parameter
        for name, parameter in student.named_parameters()
        if not name.startswith("trunk.") and parameter.requires_grad
    ]
    is_adamw = recipe.optimizer == "adamw"
    groups: list[dict[str, Any]] = [
        {"params": [p for p in trunk if p.dim() > 1 or not is_adamw], "factor": 1.0},
        {"params": heads, "factor": recipe.head_rate_factor},
    ]
    if is_adamw:
        norms = [p for p in trunk if p.dim() == 1]
        groups.append({"params": norms, "factor": 1.0, "weight_decay": 0.0})
    groups = [group for group in groups if group["params"]]
    rate, decay = recipe.learning_rate, recipe.weight_decay
    if recipe.optimizer == "sgd":
        return torch.optim.SGD(groups, rate, momentum=recipe.momentum, weight_decay=decay)
    optimizer = torch.optim.AdamW if is_adamw else torch.optim.Adam
    return optimizer(groups, rate, weight_decay=decay)


def set_learning_rates(
    optimizer: torch.optim.Optimizer, recipe: Recipe, *, epoch: int, updates: int, epoch_steps: int
) -> None:
    """Set the learning rates of the next update, after `updates` others, in `epoch` (from 0)."""
    if recipe.schedule == "step":
        rate = recipe.learning_rate * 0.1 ** (epoch // recipe.step_epochs)
    elif recipe.schedule == "exponential":
        rate = recipe.learning_rate * 0.001 ** (epoch / recipe.epochs)
    else:
        progress = updates / (epoch_steps * recipe.epochs)
        rate = recipe.learning_rate * (0.02 + 0.49 * (1 + math.cos(math.pi * min(1.0, progress))))
    if updates < recipe.warmup_steps:
        rate *= (updates + 1) / recipe.warmup_steps
    for group in optimizer.param_groups:
        group["lr"] = rate * group["factor"]


def _make_average(student: Student, decay: float) -> AveragedModel | None:
    """Return an exponential moving average, initialised as the student; `None` for decay 0."""
    if not decay:
        return None

    def update(averaged: Any, current: Any, count: Tensor | int) -> None:
        # The decay grows at first, so that the initialisation has little weight.
        share = 1 - min(decay, (1 + int(count)) / (10 + int(count)))
        if averaged[0].is_floating_point():
            torch._foreach_lerp_(averaged, current, share)
        else:
            torch._foreach_copy_(averaged, current)

    average = AveragedModel(student, multi_avg_fn=update, use_buffers=True)
    average.n_averaged.fill_(1)  # the initial student counts; otherwise the first update copies
    return average


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return the optimiser's state tensors by `<parameter>.<name>`."""
    return {
        f"{index}.{name}": torch.as_tensor(value)
        for index, state in optimizer.state_dict()["state"].items()
        for name, value in state.items()
        if value is not None
    }


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Restore what `optimizer_tensors` returned."""
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        index, name = key.split(".", 1)
        state.setdefault(int(index), {})[name] = value
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": groups})
