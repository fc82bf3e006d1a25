"""Recipes: how a student is trained, as one frozen table with every knob named."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from sbtk_runtime.errors import BadConfig

Metric = Literal["quadruplet", "triplet", "contrastive"]
Batches = Literal["quadruplets", "class-balanced"]
Optimizer = Literal["sgd", "adamw"]
Schedule = Literal["step", "cosine"]


@dataclass(frozen=True)
class Recipe:
    """The knobs of a training run; a comment says what "off" is.

    One batch holds `4 * quadruplets` images. Batches of `quadruplets` are that many drawn
    quadruplets, one for each training sketch in an epoch. `class-balanced` ones are `quadruplets`
    classes with two sketches and two photos each, every training sketch once in an epoch on
    average; quadruplet and triplet then take the hardest positives and negatives of the batch.
    """

    name: str
    metric: Metric = "quadruplet"
    identity: bool = True  # False: no classification loss
    knowledge: bool = True  # False: no knowledge preservation loss
    attention: bool = False  # True: spatial attention before pooling
    batches: Batches = "quadruplets"
    quadruplets: int = 16
    margin: float = 0.2  # of squared distances; not for contrastive
    temperature: float = 0.1  # contrastive only
    augment: bool = False
    optimizer: Optimizer = "sgd"
    learning_rate: float = 1e-4
    head_rate_factor: float = 1.0  # heads learn this many times faster
    momentum: float = 0.9  # sgd only
    weight_decay: float = 5e-4
    schedule: Schedule = "step"
    step_epochs: int = 10  # step only: a tenth after each of these
    warmup_steps: int = 0
    epochs: int = 25
    patience: int = 5  # epochs without improvement before stopping; 0: never stop early
    average_decay: float = 0.0  # of the averaged student that is validated and kept; 0: none
    train_size_px: int = 224
    final_epochs: int = 0  # last epochs at 224 px where train_size_px is smaller


RECIPES: dict[str, Recipe] = {
    "paper": Recipe("paper"),
    "sbtk": Recipe(
        "sbtk",
        metric="contrastive",
        batches="class-balanced",
        augment=True,
        optimizer="adamw",
        learning_rate=1e-4,
        head_rate_factor=5.0,
        weight_decay=0.05,
        schedule="cosine",
        warmup_steps=40,
        epochs=5,
        patience=0,
        average_decay=0.99,
        train_size_px=160,
        final_epochs=3,
    ),
}
DEFAULT_RECIPE = "sbtk"


def recipe(name: str, **changes: object) -> Recipe:
    """Returns the named recipe with the given knobs changed.

    Raises:
        BadConfig: unknown recipe, or a knob out of range.
    """
    if name not in RECIPES:
        raise BadConfig(f"no recipe {name!r}", ", ".join(sorted(RECIPES)))
    result = replace(RECIPES[name], **changes)  # type: ignore[arg-type]
    for knob in ("quadruplets", "epochs", "learning_rate", "train_size_px"):
        if getattr(result, knob) <= 0:
            raise BadConfig(f"{knob} is {getattr(result, knob)}", "more than 0")
    if result.quadruplets < 2:
        raise BadConfig("a batch of one quadruplet", "at least 2 quadruplets")
    return result
