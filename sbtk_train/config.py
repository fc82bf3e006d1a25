"""Everything that decides a training run, as one frozen table written beside its results."""

from __future__ import annotations

import tomllib
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from sbtk_runtime.errors import BadConfig
from sbtk_runtime.files import write_atomically
from sbtk_runtime.preprocess import SIZE_PX
from sbtk_train.data.division import VALIDATION_CLASSES
from sbtk_train.recipes import METHODS, Method, Recipe, recipe_type

CONFIG_NAME = "config.resolved.toml"
#: Fields that say how a run is made and do not change what is asked for.
FREE_FIELDS = ("workers", "threads", "device", "checkpoint_minutes", "feature_folder")
#: Fields that name files, which may have moved when a run is resumed; hashes say they are the same.
PLACES = (
    *("data", "split", "classes", "weights", "teacher"),
    *("class_map", "more_sketches", "more_photos"),
)
#: The refitted embedding is a linear map of the ImageNet logits.
MAX_REFIT_DIM = 1000


@dataclass(frozen=True)
class TrainConfig:
    """The resolved configuration of a run.

    Attributes:
        data: the data set's folder, of any layout that `sbtk_train.data.layouts` knows.
        split: name of a published split, `random:N:SEED`, or a file of unseen classes.
        recipe: how to train; of the type that the method has.
        method: `sbtknet`, `dsn` or `sake`.
        classes: file with the seen classes to use, one a line; empty: all that are seen.
        backbone: one of `sbtk_train.students.backbone.BACKBONES`; for DSN and SAKE
            `se-resnet50` too.
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
        feature_folder: where feature maps of the frozen stages are kept, which are then made once
            for some changed copies of each image instead of in each step; empty: they are not.
        feature_variants: how many copies.
        keep_duplicates: use photos that a data set lists twice as often as it lists them.
        allow_missing: the split file and the list of classes may name classes that are not in the
            data.
        more_sketches: further sources of training sketches: class folders and stroke files.
        more_photos: further folders of training photos.
        class_map: what their classes are called here: a map that sbtk brings, or a TOML file.
    """

    data: str
    split: str
    recipe: Recipe
    method: Method = "sbtknet"
    classes: str = ""
    backbone: str = "resnet50-v1.5"
    weights: str = ""
    teacher: str = ""
    dim: int = 512
    freeze_until: str = ""
    seed: int = 0
    division_seed: int = 0
    validation_classes: int = VALIDATION_CLASSES
    held_out_share: float = 0.05
    precision: str = "auto"
    device: str = "auto"
    workers: int = 2
    threads: int = 0
    checkpoint_minutes: float = 5.0
    feature_folder: str = ""
    feature_variants: int = 4
    keep_duplicates: bool = False
    allow_missing: bool = False
    more_sketches: tuple[str, ...] = ()
    more_photos: tuple[str, ...] = ()
    class_map: str = ""

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise BadConfig(f"--method {self.method!r}", ", ".join(METHODS))
        if not isinstance(self.recipe, recipe_type(self.method)):
            raise BadConfig(f"recipe {self.recipe.name} for {self.method}", "a recipe of it")
        if self.backbone == "se-resnet50" and self.method == "sbtknet":
            raise BadConfig(
                "backbone se-resnet50 for sbtknet", "a plain ResNet", "or --method dsn, or sake"
            )
        if self.precision not in ("auto", "fp32", "bf16", "fp16"):
            raise BadConfig(f"precision {self.precision!r}", "auto, fp32, bf16 or fp16")
        if self.freeze_until not in ("", "layer1", "layer2", "layer3", "layer4"):
            raise BadConfig(f"--freeze-until {self.freeze_until!r}", "layer1 to layer4")
        if self.dim < 1 or self.workers < 1 or self.feature_variants < 1:
            raise BadConfig("dim, workers or feature variants below 1", "1 or more")
        if getattr(self.recipe, "refit", False) and self.dim > MAX_REFIT_DIM:
            raise BadConfig(
                f"--dim {self.dim} with the refit, which makes the embedding of the teacher's "
                f"{MAX_REFIT_DIM} logits",
                f"at most {MAX_REFIT_DIM}",
                f"--no-refit, or --dim {MAX_REFIT_DIM}",
            )
        needed = 1 if self.recipe.selection == "validation-map" else 0
        if self.validation_classes < needed:
            raise BadConfig(
                f"{self.validation_classes} validation classes to choose the student by",
                "1 or more",
                "or --selection last, which needs none",
            )
        if self.feature_folder and not self.freeze_until:
            raise BadConfig(
                "feature maps can be kept of frozen stages only, and none is frozen",
                "--freeze-until STAGE",
            )
        if (self.more_sketches or self.more_photos) and (
            self.method != "sbtknet" or self.feature_folder
        ):
            raise BadConfig(
                "further sketches or photos with "
                + ("kept feature maps" if self.feature_folder else self.method),
                "--method sbtknet, without --feature-maps",
            )
        if self.class_map and not (self.more_sketches or self.more_photos):
            raise BadConfig(
                "a class map without further images", "--more-sketches or --more-photos"
            )
        if not 0 <= self.held_out_share < 1:
            raise BadConfig(f"a held-out share of {self.held_out_share}", "0 to below 1")

    @property
    def validation_px(self) -> int:
        """Side of the images that students are validated with.

        It is production's, but where feature maps are kept: then it is that of the last epoch,
        so that a student is not chosen by maps of a size that nothing else needs.
        """
        recipe = self.recipe
        is_whole = not self.feature_folder or recipe.final_epochs
        return SIZE_PX if is_whole else recipe.train_size_px

    def made_as(self, other: TrainConfig) -> TrainConfig:
        """Returns this configuration with the other's `FREE_FIELDS`, `PLACES` and epochs.

        Whether the places hold what the run was started with is for `train` to check.

        Raises:
            BadConfig: one trains on kept feature maps and the other does not.
        """
        if bool(self.feature_folder) != bool(other.feature_folder):
            first, then = ("with", "without") if self.feature_folder else ("without", "with")
            raise BadConfig(
                f"a run {then} feature maps",
                f"one {first} them, as it was started",
                "a new run, or the same way as before",
            )
        taken = {name: getattr(other, name) for name in (*FREE_FIELDS, *PLACES)}
        recipe = replace(self.recipe, epochs=other.recipe.epochs)
        return replace(self, recipe=recipe, **taken)

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
    method = values.get("method", "sbtknet")
    if method not in METHODS:
        raise BadConfig(f"{path} names the method {method!r}", ", ".join(METHODS))
    kind = recipe_type(method)
    knobs = {item.name for item in fields(kind)}
    unknown = sorted((set(values) - known) | (set(recipe_values) - knobs))
    if unknown:
        raise BadConfig(f"{path} has the unknown key {unknown[0]!r}", "a run of this sbtk version")
    try:
        lists = {key: tuple(value) for key, value in values.items() if isinstance(value, list)}
        return TrainConfig(recipe=kind(**recipe_values), **values | lists)
    except TypeError as problem:
        raise BadConfig(f"{path} is incomplete: {problem}") from problem


def _toml(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, tuple):
        return "[" + ", ".join(_toml(item) for item in value) + "]"
    if isinstance(value, str):
        escaped = value.replace("\\", "\\\\").replace('"', '\\"')
        return '"' + "".join(c if c >= " " else f"\\u{ord(c):04x}" for c in escaped) + '"'
    return repr(value)
