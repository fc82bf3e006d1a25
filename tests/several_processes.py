"""What several processes do together in tests; torchrun starts it in each, `folder` is theirs.

`python -m torch.distributed.run --nproc-per-node N -m tests.several_processes DATA FOLDER` leaves
in FOLDER, from the first process, a run for each of `CONFIGS`, and what the others wrote beside.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torchvision.models import resnet18

from sbtk_train.batches.sampler import Batch
from sbtk_train.config import Method, TrainConfig, make_recipe
from sbtk_train.distributed import (
    SINGLE_PROCESS,
    DistributedContext,
    init_distributed,
    synchronise_batch_norms,
)
from sbtk_train.models.student import SbtknetStudent, StudentOutput
from sbtk_train.progress import StepDone
from sbtk_train.runs import loop
from sbtk_train.runs.checkpoint import LAST
from sbtk_train.runs.loop import Trainer
from sbtk_train.runs.run import train
from tests.narrow_resnet import NarrowResNet
from tests.tiny_data import quick_config

CONFIGS: dict[str, Callable[[Path], TrainConfig]] = {
    "quadruplet": lambda data: config(data, "sbtknet", "paper", quadruplets=3),
    "contrastive": lambda data: config(data, "sbtknet", "sbtk", quadruplets=2, refit=False),
    "dsn": lambda data: config(
        data,
        "dsn",
        "dsn-sketchy",
        batch_sketches=3,
        batch_photos=4,
        drop_last=False,
        kd_weight=0.0,
        selection="validation-map",
    ),
}
#: The one that is stopped after a step and resumed, and what it saved when it was stopped.
INTERRUPTED = "contrastive"
STOPPED = "when-stopped.safetensors"
#: Sketches and photos of batches that two processes cannot shard evenly.
UNEVEN = {"one-more": (4, 3), "none-in-one": (1, 0)}


def config(data: Path, method: Method, name: str, **knobs: Any) -> TrainConfig:
    """Return a run of some steps in one epoch.

    They are small steps: large ones from random weights grow the last bits of a float32 tenfold
    each, in one process too. Gradients are as large as ever, and the optimiser's state has them.
    """
    common: dict[str, Any] = {"epochs": 1, "train_size_px": 32, "learning_rate": 1e-6}
    if method == "sbtknet":
        common |= {"knowledge": False, "final_epochs": 0}
    recipe = make_recipe(name, method, **(common | knobs))
    return quick_config(data, recipe, method=method, workers=1, checkpoint_minutes=1000.0)


def run(
    config: TrainConfig,
    folder: Path,
    distributed: DistributedContext = SINGLE_PROCESS,
    **options: Any,
) -> list[Any]:
    """Train into `folder` and return the means that each step told."""
    folder.mkdir(parents=True, exist_ok=True)
    loop._REPORT_SECONDS = 0.0
    means: list[Any] = []

    def listen(event: object) -> None:
        if isinstance(event, StepDone):
            means.append(event.means)

    train(config, folder, listen, distributed=distributed, **options)
    return means


def small_student() -> SbtknetStudent:
    """Return the same student in each process; a narrow one would amplify rounding."""
    torch.manual_seed(0)
    with mock.patch("torchvision.models.resnet18", resnet18):
        return SbtknetStudent("resnet18", 8, 4)


def whole_batch(sketches: int, photos: int) -> tuple[Batch, Tensor]:
    """Return a batch and its images."""
    draw = torch.Generator().manual_seed(sketches)
    images = torch.randn(sketches + photos, 3, 64, 64, generator=draw)
    return Batch(torch.arange(sketches).numpy(), torch.arange(photos).numpy()), images


def loss_of(output: StudentOutput) -> Tensor:
    """Return a loss in which each row has a part of its own, and no soft label any."""
    weights = torch.arange(1.0, len(output.embedding) + 1)
    pairs = weights @ (output.embedding @ output.embedding.T).exp() @ weights
    ends = weights @ output.embedding @ torch.linspace(-1, 1, 8)
    return pairs / weights.sum() ** 2 + ends + (weights @ output.class_logits).square().mean()


def _step(distributed: DistributedContext, sketches: int, photos: int) -> dict[str, Tensor]:
    """Return loss, gradients and buffers of a student after one backward pass."""
    student = small_student()
    synchronise_batch_norms(student, torch.device("cpu"))
    network = distributed.wrap_model(student)
    batch, images = whole_batch(sketches, photos)
    shard = distributed.shard(batch)
    output = StudentOutput(*distributed.all_gather(network(images[shard.rows()]), shard, 1))
    loss = loss_of(output)
    loss.backward()  # type: ignore[no-untyped-call]
    return {"loss": loss.detach(), **state_after(student)}


def state_after(student: SbtknetStudent) -> dict[str, Tensor]:
    """Return the gradients of those weights that have one, and the buffers."""
    gradients = ((name, weight.grad) for name, weight in student.named_parameters())
    return {name: grad_output for name, grad_output in gradients if grad_output is not None} | dict(
        student.named_buffers()
    )


def _stopped_and_resumed(
    config: TrainConfig, folder: Path, distributed: DistributedContext
) -> list[Any]:
    """Train as `run` does, in two goes: the last process asks to stop after the first step."""

    def stop(trainer: Trainer) -> None:
        if distributed.rank == distributed.world_size - 1:
            trainer.stop_soon()

    with contextlib.suppress(KeyboardInterrupt):
        run(config, folder, distributed, on_trainer=stop)
    if distributed.is_rank_zero:
        (folder / STOPPED).write_bytes((folder / LAST).read_bytes())
    return run(config, folder, distributed, resume=True)


def main(data: Path, folder: Path) -> None:
    """Do everything once, in the group of processes."""
    with init_distributed() as distributed:
        own = folder if distributed.is_rank_zero else folder / f"process-{distributed.rank}"
        for name, of in CONFIGS.items():
            train_it = _stopped_and_resumed if name == INTERRUPTED else run
            means = train_it(of(data), own / name, distributed)
            if distributed.is_rank_zero:
                (own / f"{name}.json").write_text(json.dumps(means))
        for name, counts in UNEVEN.items():
            found = _step(distributed, *counts)
            if distributed.is_rank_zero:
                torch.save(found, own / f"{name}.pt")


if __name__ == "__main__":
    with mock.patch("torchvision.models.resnet18", NarrowResNet):
        main(Path(sys.argv[1]), Path(sys.argv[2]))
