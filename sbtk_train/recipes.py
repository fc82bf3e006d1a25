"""Recipes: how a student is trained, as frozen tables with every knob named."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Literal, get_args

from sbtk_runtime.errors import BadConfig

Method = Literal["sbtknet", "dsn", "sake"]
METHODS: tuple[Method, ...] = get_args(Method)

Metric = Literal["quadruplet", "triplet", "contrastive"]
Batches = Literal["quadruplets", "class-balanced"]
Optimizer = Literal["sgd", "adam", "adamw"]
Schedule = Literal["step", "cosine", "exponential"]
Selection = Literal["validation-map", "held-out-bits", "held-out-accuracy", "last"]
Memory = Literal["none", "released", "paper"]
Semantic = Literal["wordnet", "none"]


@dataclass(frozen=True)
class Recipe:
    """The knobs that every method has; a comment says what "off" is.

    `selection` is what the kept student is best at: mAP on whole validation classes, mAP of
    64-bit codes of held-out sketches among training photos (DSN on Sketchy), top-1 accuracy of
    held-out sketches (SAKE), or nothing: the last epoch is kept (DSN on TU-Berlin).
    """

    name: str
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
    selection: Selection = "validation-map"


@dataclass(frozen=True)
class SbtknetRecipe(Recipe):
    """SBTKNet's knobs.

    One batch holds `4 * quadruplets` images. Batches of `quadruplets` are that many drawn
    quadruplets, one for each training sketch in an epoch. `class-balanced` ones are `quadruplets`
    classes with two sketches and two photos each, every training sketch once in an epoch on
    average; quadruplet and triplet then take the hardest positives and negatives of the batch.
    """

    metric: Metric = "quadruplet"
    identity: bool = True  # False: no classification loss
    knowledge: bool = True  # False: no knowledge preservation loss
    attention: bool = False  # True: spatial attention before pooling
    batches: Batches = "quadruplets"
    quadruplets: int = 16
    margin: float = 0.2  # of squared distances; not for contrastive
    temperature: float = 0.1  # contrastive only
    refit: bool = False  # True: the embedding is fitted anew at the end (`head_refit`)
    further: int = 6  # classes of further sources beside each class-balanced batch's own
    redrawn: float = 0.0  # share of bitmap sketches that are shown as clean strokes


@dataclass(frozen=True)
class DsnRecipe(Recipe):
    """The knobs of DSN, and of SAKE, which is DSN without contrastive term and memory.

    The loss is classification + `kd_weight` * distillation + `contrastive_weight` * contrastive +
    `memory_weight` * memory. Distillation's target is the softmax of `kd` times the teacher's
    logits plus `kdneg` times the class's row of the semantic matrix.
    """

    batch_sketches: int = 32
    batch_photos: int = 64
    drop_last: bool = True  # the last partial batch of an epoch
    kd: float = 1.0
    kdneg: float = 0.3
    kd_weight: float = 1.0  # 0: no distillation
    semantic: Semantic = "wordnet"
    contrastive_weight: float = 0.1  # 0: no contrastive term, one view of each image
    temperature: float = 0.07
    memory: Memory = "paper"  # released: without a gradient, as in the authors' code
    memory_size: int = 10
    memory_weight: float = 1.0


_DSN = DsnRecipe(
    "dsn-sketchy",
    augment=True,
    optimizer="adam",
    schedule="exponential",
    epochs=20,
    patience=0,
    selection="held-out-bits",
)
_DSN_TUBERLIN = replace(
    _DSN,
    name="dsn-tuberlin",
    epochs=16,
    batch_sketches=9,
    batch_photos=81,
    drop_last=False,
    selection="last",
)
_SAKE = replace(
    _DSN,
    name="sake-sketchy",
    batch_sketches=13,
    batch_photos=26,
    drop_last=False,
    contrastive_weight=0.0,
    memory="none",
    selection="held-out-accuracy",
)
_SAKE_TUBERLIN = replace(_SAKE, name="sake-tuberlin", batch_sketches=4, batch_photos=36)

RECIPES: dict[Method, dict[str, Recipe]] = {
    "sbtknet": {
        "sbtk": SbtknetRecipe(
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
            refit=True,
        ),
        "paper": SbtknetRecipe("paper"),
    },
    "dsn": {recipe.name: recipe for recipe in (_DSN, _DSN_TUBERLIN)},
    "sake": {recipe.name: recipe for recipe in (_SAKE, _SAKE_TUBERLIN)},
}
_RECIPE_TYPES: dict[Method, type[Recipe]] = {
    "sbtknet": SbtknetRecipe,
    "dsn": DsnRecipe,
    "sake": DsnRecipe,
}
_POSITIVE = (
    "quadruplets",
    "batch_sketches",
    "batch_photos",
    "memory_size",
    "epochs",
    "learning_rate",
    "train_size_px",
    "temperature",
)


def default_recipe(method: Method, split: str = "") -> str:
    """Returns the name of a method's recipe; DSN's and SAKE's depend on the data set."""
    names = list(RECIPES[method])
    of_tuberlin = [name for name in names if name.endswith("-tuberlin")]
    return of_tuberlin[0] if split.casefold().startswith("tub") and of_tuberlin else names[0]


def recipe(name: str, method: Method = "sbtknet", **changes: object) -> Recipe:
    """Returns the named recipe of a method with the given knobs changed.

    Raises:
        BadConfig: unknown recipe, a knob that the method does not have, or one out of range.
    """
    recipes = RECIPES[method]
    if name not in recipes:
        raise BadConfig(f"{method} has no recipe {name!r}", ", ".join(sorted(recipes)))
    known = {field.name for field in fields(recipes[name])}
    foreign = sorted(set(changes) - known)
    if foreign:
        option = "--" + foreign[0].replace("_", "-")
        raise BadConfig(f"{option} is no knob of {method}", "an option of this method")
    result = replace(recipes[name], **changes)  # type: ignore[arg-type]
    for knob in _POSITIVE:
        if getattr(result, knob, 1) <= 0:
            raise BadConfig(f"{knob} is {getattr(result, knob)}", "more than 0")
    if isinstance(result, SbtknetRecipe) and result.quadruplets < 2:
        raise BadConfig("a batch of one quadruplet", "at least 2 quadruplets")
    return result


def recipe_type(method: Method) -> type[Recipe]:
    """Returns the table of knobs that a method's recipes are made of."""
    return _RECIPE_TYPES[method]
