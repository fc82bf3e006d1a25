"""Everything that decides a training run, as one frozen table written beside its results."""

from __future__ import annotations

import tomllib
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from sbtk_runtime.errors import BadConfig
from sbtk_runtime.files import write_atomically
from sbtk_train.recipes import RECIPES, Recipe

CONFIG_NAME = "config.resolved.toml"


@dataclass(frozen=True)
class TrainConfig:
    """The resolved configuration of a run.

    Attributes:
        data: folder with `sketch/` and `photo/`.
        split: name of a published split, or a file of unseen classes.
        recipe: how to train.
        classes: file with the seen classes to use, one a line; empty: all that are seen.
        backbone: one of `sbtk_train.backbone.BACKBONES`.
        weights: a weights file, or empty for training from scratch.
        teacher: a classifier's weights file for the soft labels; empty for `weights`.
        dim: length of the embedding.
        freeze_until: first trunk stage that learns (`layer3`); empty: all learn.
        seed: of initialisation, order and augmentation.
        division_seed: of validation classes and held-out sketches; 0 by the project's rule.
        validation_classes: number of seen classes kept for validation.
        held_out_share: share of each training class's sketches kept from training.
        precision: `fp32`, `bf16`, `fp16` or `auto`.
        device: `cpu`, `cuda`, `cuda:1` or `auto`.
        workers: decoding threads.
        threads: CPU threads of torch; 0: torch's own choice.
        checkpoint_minutes: how often a running epoch is saved.
    """

    data: str
    split: str
    recipe: Recipe
    classes: str = ""
    backbone: str = "resnet50-v1.5"
    weights: str = ""
    teacher: str = ""
    dim: int = 512
    freeze_until: str = ""
    seed: int = 0
    division_seed: int = 0
    validation_classes: int = 10
    held_out_share: float = 0.05
    precision: str = "auto"
    device: str = "auto"
    workers: int = 2
    threads: int = 0
    checkpoint_minutes: float = 5.0

    def __post_init__(self) -> None:
        if self.precision not in ("auto", "fp32", "bf16", "fp16"):
            raise BadConfig(f"precision {self.precision!r}", "auto, fp32, bf16 or fp16")
        if self.freeze_until not in ("", "layer1", "layer2", "layer3", "layer4"):
            raise BadConfig(f"--freeze-until {self.freeze_until!r}", "layer1 to layer4")
        if self.dim < 1 or self.workers < 1 or self.validation_classes < 1:
            raise BadConfig("dim, workers or validation classes below 1", "1 or more")
        if not 0 <= self.held_out_share < 1:
            raise BadConfig(f"a held-out share of {self.held_out_share}", "0 to below 1")

    def write(self, folder: Path) -> None:
        """Writes the configuration into `folder` as TOML."""
        values = asdict(self)
        recipe = values.pop("recipe")
        lines = [f"{key} = {_toml(value)}" for key, value in values.items()]
        lines += ["", "[recipe]"]
        lines += [f"{key} = {_toml(value)}" for key, value in recipe.items()]
        write_atomically(folder / CONFIG_NAME, ("\n".join(lines) + "\n").encode())


def read_config(folder: Path) -> TrainConfig:
    """Returns the configuration of the run in `folder`.

    Raises:
        BadConfig: missing, not TOML, or with keys that this version does not know.
    """
    path = folder / CONFIG_NAME
    try:
        values: dict[str, Any] = tomllib.loads(path.read_text("utf-8"))
    except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError) as problem:
        raise BadConfig(
            f"{path} cannot be read: {problem}", "a run folder made by sbtk train"
        ) from problem
    known = {item.name for item in fields(TrainConfig)}
    recipe_values = values.pop("recipe", {})
    knobs = {item.name for item in fields(Recipe)}
    unknown = sorted((set(values) - known) | (set(recipe_values) - knobs))
    if unknown:
        raise BadConfig(f"{path} has the unknown key {unknown[0]!r}", "a run of this sbtk version")
    try:
        return TrainConfig(recipe=Recipe(**recipe_values), **values)
    except TypeError as problem:
        raise BadConfig(f"{path} is incomplete: {problem}") from problem


def recipe_names() -> list[str]:
    """Returns the names of the recipes, for help texts."""
    return sorted(RECIPES)


def _toml(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        escaped = value.replace("\\", "\\\\").replace('"', '\\"')
        return '"' + "".join(c if c >= " " else f"\\u{ord(c):04x}" for c in escaped) + '"'
    return repr(value)
