"""Images/s of `sbtk train` on a CPU beside a bare PyTorch loop, eager and compiled.

The bare loop trains the same student on one batch that is ready in memory: forward, cross-entropy,
backward, AdamW. All take turns, so that other load affects all of them. The trainer's images are
decoded once, and prepared and augmented for each step as usual.

    python -m benchmarks.training_speed --threads 2
"""

from __future__ import annotations

import argparse
import copy
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from benchmarks.gpu_training import Setting, run_epoch
from benchmarks.gpu_training_data import sketches_per_step, write_training_data
from benchmarks.result import Result, print_result
from sbtk_train.config import TrainConfig, choose_compute, make_recipe
from sbtk_train.models.student import domains_of
from sbtk_train.runs.context import TrainingContext, build_context

_QUADRUPLETS = 16
#: An epoch that uses each class once, to subtract what starting an epoch takes.
_SHORT_STEPS = 8
_TRAINER = "sbtk train"


@dataclass(frozen=True)
class Bare:
    """A way to run the bare loop: name, memory format, and whether it is compiled."""

    name: str
    memory_format: torch.memory_format
    is_compiled: bool


_EAGER = Bare("bare, channels_last", torch.channels_last, is_compiled=False)
_BARE = (
    Bare("bare, NCHW", torch.contiguous_format, is_compiled=False),
    _EAGER,
    Bare("bare, channels_last, torch.compile", torch.channels_last, is_compiled=True),
)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--size", type=int, default=160, metavar="PX")
    parser.add_argument("--steps", type=int, default=8, help="steps in each turn")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()

    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as scratch:
        data = write_training_data(Path(scratch) / "data", is_small=False)
        config = _config(data, options.size, options.threads)
        context = build_context(config, lambda _: None)
        turns: dict[str, Callable[[], float]] = {
            bare.name: _bare_loop(bare, context, options.size, options.steps) for bare in _BARE
        }
        turns[_TRAINER] = lambda: _trainer(context, config, options.steps, Path(scratch))
        first = {name: turn() for name, turn in turns.items()}
        speeds: dict[str, list[float]] = {name: [] for name in turns}
        for _ in range(options.rounds):
            for name, turn in turns.items():
                speeds[name].append(turn())
    ratios = {
        name: statistics.median(
            mine / eager for mine, eager in zip(of_turns, speeds[_EAGER.name], strict=True)
        )
        for name, of_turns in speeds.items()
    }
    images_per_s = {name: statistics.median(of_turns) for name, of_turns in speeds.items()}
    result = Result(
        "Training on a CPU",
        ["loop", "images/s", "/ bare, channels_last", "images/s of the first turn"],
        [
            [name, f"{images_per_s[name]:.1f}", f"{ratios[name]:.2f}", f"{first[name]:.1f}"]
            for name in turns
        ],
        {"images_per_s": images_per_s, "ratios": ratios, "first_images_per_s": first},
        [
            f"{config.precision}, {options.size} px, {_batch(context)} images a step, threads: "
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


def _batch(context: TrainingContext) -> int:
    return 2 * sketches_per_step(context.division.training, _QUADRUPLETS)


def _bare_loop(
    bare: Bare, context: TrainingContext, size_px: int, steps: int
) -> Callable[[], float]:
    """Return a function that trains for some steps and returns the images per second."""
    student = copy.deepcopy(context.student).train()
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
