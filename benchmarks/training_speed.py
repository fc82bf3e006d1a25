"""Images/s of `sbtk train` and of a bare PyTorch loop, eager and compiled, on a CPU.

The bare loop trains the same student on one batch that is ready in memory: forward, cross-entropy,
backward, AdamW. Each is a process of its own, because the trainer changes how a process keeps its
memory. All take turns, so that other load affects all of them. The trainer's images are decoded
once, and prepared and augmented for each step as usual.

    python -m benchmarks.training_speed --threads 2
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Self

import torch
from torch import nn

from benchmarks.gpu_training import Setting, run_epoch
from benchmarks.gpu_training_data import sketches_per_step, write_training_data
from benchmarks.result import Result, print_result
from sbtk_train.compute import choose_compute
from sbtk_train.config import TrainConfig, make_recipe
from sbtk_train.models.student import domains_of
from sbtk_train.runs.context import TrainingContext, build_context

_QUADRUPLETS = 16
#: An epoch that uses each class once, to subtract what starting an epoch takes.
_SHORT_STEPS = 8
_TRAINER = "sbtk train"


@dataclass(frozen=True)
class Bare:
    """A way to run the bare loop: memory format, and whether it is compiled."""

    memory_format: torch.memory_format
    is_compiled: bool


_EAGER = "bare, channels_last"
_BARE = {
    "bare, NCHW": Bare(torch.contiguous_format, is_compiled=False),
    _EAGER: Bare(torch.channels_last, is_compiled=False),
    "bare, channels_last, torch.compile": Bare(torch.channels_last, is_compiled=True),
}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--size", type=int, default=160, metavar="PX")
    parser.add_argument("--steps", type=int, default=8, help="steps in each turn")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()

    with tempfile.TemporaryDirectory() as scratch:
        data = write_training_data(Path(scratch) / "data", is_small=False)
        config = _config(data, options.size, options.threads)
        with contextlib.ExitStack() as started:
            loops = {
                name: started.enter_context(_Loop(name, config, options.steps, Path(scratch)))
                for name in (*_BARE, _TRAINER)
            }
            first = {name: loop.images_per_s() for name, loop in loops.items()}
            speeds: dict[str, list[float]] = {name: [] for name in loops}
            for _ in range(options.rounds):
                for name, loop in loops.items():
                    speeds[name].append(loop.images_per_s())
        batch = _batch(build_context(config, lambda _: None))
    ratios = {
        name: statistics.median(
            mine / eager for mine, eager in zip(of_turns, speeds[_EAGER], strict=True)
        )
        for name, of_turns in speeds.items()
    }
    images_per_s = {name: statistics.median(of_turns) for name, of_turns in speeds.items()}
    result = Result(
        "Training on a CPU",
        ["loop", "images/s", "/ bare, channels_last", "images/s of the first turn"],
        [
            [name, f"{images_per_s[name]:.1f}", f"{ratios[name]:.2f}", f"{first[name]:.1f}"]
            for name in loops
        ],
        {"images_per_s": images_per_s, "ratios": ratios, "first_images_per_s": first},
        [
            f"{config.precision}, {options.size} px, {batch} images a step, threads: "
            f"{options.threads}",
            f"medians of {options.rounds} rounds of {options.steps} steps each, and of the ratios "
            "within a round; the first turn includes compiling",
        ],
    )
    print_result(result, "benchmarks.training_speed", as_json=options.json)


def _config(data: Path, size_px: int, threads: int) -> TrainConfig:
    recipe = make_recipe(
        "sbtk",
        # There is no teacher, whose loss costs next to nothing.
        knowledge=False,
        quadruplets=_QUADRUPLETS,
        train_size_px=size_px,
        final_epochs=0,
        epochs=1,
    )
    return TrainConfig(
        data=str(data),
        split="SK-YE",
        recipe=recipe,
        backbone="resnet50-v1",
        validation_classes=1,
        precision="bf16",
        device="cpu",
        threads=threads,
        workers=1,
        checkpoint_minutes=1e6,
    )


class _Loop:
    """A loop in a process of its own, which a `with` block ends."""

    def __init__(self, name: str, config: TrainConfig, steps: int, folder: Path) -> None:
        # A process that is forked would have this one's threads and memory.
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        arguments = (name, config, steps, folder, theirs)
        self._process = context.Process(target=_serve, args=arguments, daemon=True)

    def __enter__(self) -> Self:
        self._process.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._connection.send(False)
        self._process.join()

    def images_per_s(self) -> float:
        """Return the images per second of some steps."""
        self._connection.send(True)
        speed: float = self._connection.recv()
        return speed


def _serve(
    name: str, config: TrainConfig, steps: int, folder: Path, connection: Connection
) -> None:
    """Answer each true message with the images per second of a loop; false ends it."""
    torch.set_num_threads(config.threads)
    context = build_context(config, lambda _: None)
    turn = (
        _bare_loop(_BARE[name], context, config, steps)
        if name in _BARE
        else partial(_trainer, context, config, steps, folder)
    )
    while connection.recv():
        connection.send(turn())


def _batch(context: TrainingContext) -> int:
    return 2 * sketches_per_step(context.division.training, _QUADRUPLETS)


def _bare_loop(
    bare: Bare, context: TrainingContext, config: TrainConfig, steps: int
) -> Callable[[], float]:
    """Return a function that trains for some steps and returns the images per second."""
    size_px = config.recipe.train_size_px
    student = context.student.train()
    student.to(memory_format=bare.memory_format)  # type: ignore[call-overload]
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-5)
    compute, count = choose_compute("cpu", "bf16"), _batch(context)
    images = torch.randn(count, 3, size_px, size_px).to(memory_format=bare.memory_format)
    labels = torch.arange(count) % len(context.division.training.classes)
    domains = domains_of("photo", count, compute.device)
    forward = torch.compile(student) if bare.is_compiled else student

    def train() -> float:
        started = time.perf_counter()
        for _ in range(steps):
            with compute.autocast():
                logits = forward(images, domains).class_logits
            optimizer.zero_grad(set_to_none=True)
            loss = nn.functional.cross_entropy(logits.float(), labels)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        return steps * count / (time.perf_counter() - started)

    return train


def _trainer(context: TrainingContext, config: TrainConfig, steps: int, folder: Path) -> float:
    """Return the images per second of an epoch of `sbtk train`, without its start."""
    setting = Setting(_TRAINER, config.precision)
    short, long = (
        run_epoch(context, config, setting, count, folder)
        for count in (_SHORT_STEPS, _SHORT_STEPS + steps)
    )
    elapsed_s = [done.steps * _batch(context) / done.images_per_s for done in (short, long)]
    return (long.steps - short.steps) * _batch(context) / (elapsed_s[1] - elapsed_s[0])


if __name__ == "__main__":
    main()
