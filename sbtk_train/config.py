"""The configuration of a training run, as a frozen dataclass that is saved with the run."""

from __future__ import annotations

import json
import math
import tomllib
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from sbtk_runtime.errors import BadConfig
from sbtk_runtime.files import write_atomically
from sbtk_runtime.preprocess import SIZE_PX, Preprocessing
from sbtk_train.data.splits import VALIDATION_CLASSES

CONFIG_NAME = "config.resolved.toml"
#: Fields that may change on resuming, because they do not change the result.
FREE_FIELDS = ("workers", "threads", "device", "checkpoint_minutes", "feature_folder")
#: Fields that name files, which may have moved when a run is resumed; hashes identify them.
PATH_FIELDS = (
    *("data", "split", "classes", "weights", "teacher"),
    *("class_map", "more_sketches", "more_photos"),
)
#: Fields that record where the values came from, and have no effect.
PROVENANCE_FIELDS = ("config_file", "config_sha256", "settings")
#: The refitted embedding is a linear map of the ImageNet logits.
MAX_REFIT_DIM = 1000


@dataclass(frozen=True)
class TrainConfig:
    """The resolved configuration of a run.

    Attributes:
        data: the data set's folder, in any layout that `sbtk_train.data.layouts` reads.
        split: name of a published split, `random:N:SEED`, or a file of unseen classes.
        recipe: the method's hyperparameters.
        method: `sbtknet`, `dsn` or `sake`.
        classes: file with the seen classes to use, one per line; empty for all.
        backbone: one of `sbtk_train.models.backbone.BACKBONES`, or `se-resnet50` for DSN and SAKE.
        weights: a weights file; empty to train from scratch.
        teacher: a classifier's weights file for the soft labels; empty for `weights`.
        dim: length of the embedding.
        freeze_until: first trunk stage to train (`layer3`); empty to train all.
        seed: of initialisation, order and augmentation.
        division_seed: of validation classes and held-out sketches; 0 by the project's rule.
        validation_classes: number of seen classes held out for validation.
        held_out_share: share of each training class's sketches to hold out.
        precision: `fp32`, `bf16`, `fp16` or `auto`.
        device: `cpu`, `cuda`, `cuda:1` or `auto`.
        workers: number of decoding threads.
        threads: torch's CPU threads; 0 for torch's default.
        checkpoint_minutes: interval of checkpoints within an epoch.
        feature_folder: cache of the frozen stages' feature maps, which are computed once for some
            augmented copies of each image instead of in each step; empty to disable it.
        feature_variants: number of copies.
        keep_duplicates: use photos as often as the data set lists them.
        allow_missing: the split file and the list of classes may name classes that are not in the
            data.
        more_sketches: further sources of training sketches: class folders and stroke files.
        more_photos: further folders of training photos.
        class_map: maps their class names: the name of an included map, or a TOML file.
        config_file: the file named by `--config`, if any.
        config_sha256: its hash.
        settings: the values of `--set`, as typed.
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
    config_file: str = ""
    config_sha256: str = ""
    settings: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise BadConfig(f"--method {self.method!r}", ", ".join(METHODS))
        if not isinstance(self.recipe, recipe_type(self.method)):
            raise BadConfig(f"recipe {self.recipe.name} for {self.method}", "one of its recipes")
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
                f"--dim {self.dim} with the refit, whose embedding is made from the teacher's "
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
                "--feature-maps caches frozen stages, and none is frozen", "--freeze-until STAGE"
            )
        if (self.more_sketches or self.more_photos) and (
            self.method != "sbtknet" or self.feature_folder
        ):
            raise BadConfig(
                "further sketches or photos with "
                + ("cached feature maps" if self.feature_folder else self.method),
                "--method sbtknet, without --feature-maps",
            )
        if self.class_map and not (self.more_sketches or self.more_photos):
            raise BadConfig(
                "a class map without further images", "--more-sketches or --more-photos"
            )
        if not 0 <= self.held_out_share < 1:
            raise BadConfig(f"a held-out share of {self.held_out_share}", "0 to below 1")
        for name in ("seed", "division_seed"):
            # NumPy's generators take no negative seeds, and torch's none of more than 64 bits.
            if not 0 <= (seed := getattr(self, name)) < 2**63:
                raise BadConfig(f"{name.replace('_', ' ')} {seed}", "0 to 2^63 - 1")
        for name in ("threads", "checkpoint_minutes"):
            if not (value := getattr(self, name)) >= 0:
                raise BadConfig(f"{name} is {value}", "0 or more")

    @property
    def validation_px(self) -> int:
        """Side of the validation images, in pixels.

        It is the runtime's, except with cached feature maps: then it is the size of the last epoch,
        so that no maps of another size are needed.
        """
        recipe = self.recipe
        is_whole = not self.feature_folder or recipe.final_epochs
        return SIZE_PX if is_whole else recipe.train_size_px

    def merge_free_fields(self, other: TrainConfig) -> TrainConfig:
        """Return this configuration with the other's `FREE_FIELDS`, `PATH_FIELDS` and epochs.

        `train` checks that the files are the same as at the start of the run.

        Raises:
            BadConfig: only one of them uses cached feature maps.
        """
        if bool(self.feature_folder) != bool(other.feature_folder):
            first, then = ("with", "without") if self.feature_folder else ("without", "with")
            raise BadConfig(
                f"resuming {then} --feature-maps a run that was started {first}",
                f"{first} --feature-maps",
                "or start a new run",
            )
        taken = {name: getattr(other, name) for name in (*FREE_FIELDS, *PATH_FIELDS)}
        recipe = replace(self.recipe, epochs=other.recipe.epochs)
        return replace(self, recipe=recipe, **taken)

    def write(self, folder: Path) -> None:
        """Write the configuration into `folder` as TOML."""
        values = asdict(self)
        recipe = values.pop("recipe")
        lines = [f"{key} = {_toml(value)}\n" for key, value in values.items()]
        lines += ["\n[recipe]\n", *(f"{key} = {_toml(value)}\n" for key, value in recipe.items())]
        write_atomically(folder / CONFIG_NAME, "".join(lines).encode())


@dataclass(frozen=True)
class Settings:
    """Values of some fields of a `TrainConfig` and of its recipe.

    Attributes:
        fields: values by the names of `TrainConfig`'s fields, except `recipe`.
        recipe: values by the names of the recipe's fields; `name` names the recipe.
    """

    fields: dict[str, Any]
    recipe: dict[str, Any]

    def __or__(self, other: Settings) -> Settings:
        """Return the settings of both; the other's take precedence."""
        return Settings(self.fields | other.fields, self.recipe | other.recipe)


def read_config(folder: Path) -> TrainConfig:
    """Return the configuration of the run in `folder`.

    Raises:
        BadConfig: the file is missing or not TOML, or has keys or values that this version does not
            accept.
    """
    path = folder / CONFIG_NAME
    if not path.is_file():
        raise BadConfig(
            f"{folder} is not a run: it has no {CONFIG_NAME}", "a folder made by sbtk train"
        )
    settings = read_settings(path)
    kind = recipe_type(settings.fields.get("method", METHODS[0]))
    foreign = sorted(set(settings.recipe) - {item.name for item in fields(kind)})
    if foreign:
        raise BadConfig(f"{path} has the unknown key {foreign[0]!r}", "a run of this sbtk version")
    try:
        return TrainConfig(recipe=kind(**settings.recipe), **settings.fields)
    except TypeError as problem:
        raise BadConfig(f"{path} is incomplete: {problem}") from problem


def read_settings(path: Path) -> Settings:
    """Return the settings in a TOML file with the keys of `config.resolved.toml`.

    Raises:
        BadConfig: the file cannot be read, is not TOML, or has an unknown key (the nearest known
            one is suggested) or a value of the wrong type.
    """
    try:
        values: dict[str, Any] = tomllib.loads(path.read_text("utf-8-sig"))
    except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError) as problem:
        raise BadConfig(
            f"{path} cannot be read: {problem}",
            f"a TOML file with the keys of a run's {CONFIG_NAME}",
        ) from problem
    recipe = values.pop("recipe", {})
    settings = Settings({}, {})
    for key, value in values.items():
        settings |= _setting(key, value, str(path))
    # `recipe = "paper"` is short for a table with only the name.
    for key, value in (recipe if isinstance(recipe, dict) else {"name": recipe}).items():
        settings |= _setting(f"recipe.{key}", value, str(path))
    return settings


def parse_setting(text: str) -> Settings:
    """Return the setting of `KEY=VALUE`; the value is TOML or plain text.

    The key is a field of `TrainConfig`, or of a recipe, optionally written as `recipe.KEY`.

    Raises:
        BadConfig: no `=`, an unknown key (the nearest known one is suggested) or a value of the
            wrong type.
    """
    key, equals, value = (part.strip() for part in text.partition("="))
    if not equals or key in PROVENANCE_FIELDS:
        raise BadConfig(f"--set {text}", "KEY=VALUE", "for example --set epochs=10")
    found: object = value
    with suppress(tomllib.TOMLDecodeError):
        found = tomllib.loads(f"value = {value}")["value"]
    key = "recipe.name" if key == "recipe" else key
    if not isinstance(found, str) and _type_of(key) is str:
        found = value
    return _setting(key, found, f"--set {text}")


def _setting(key: str, value: object, where: str) -> Settings:
    name = key.removeprefix("recipe.")
    kind = _type_of(key)
    if kind is None:
        from difflib import get_close_matches

        known = [*_FIELD_TYPES, *(f"recipe.{field}" for field in _RECIPE_FIELD_TYPES)]
        near = get_close_matches(key, [*known, *_RECIPE_FIELD_TYPES], n=1)
        raise BadConfig(
            f"{where}: unknown key {key!r}",
            repr(near[0]) if near else f"one of {', '.join(sorted(known))}",
        )
    converted = _convert(value, kind)
    if converted is None:
        options = get_args(kind) if get_origin(kind) is Literal else ()
        shown = ", ".join(options) if options else _TYPE_NAMES.get(kind, "a list of texts")
        raise BadConfig(f"{where}: {key} is {value!r}", shown)
    is_of_recipe = name != key or name not in _FIELD_TYPES
    return Settings({}, {name: converted}) if is_of_recipe else Settings({name: converted}, {})


def _type_of(key: str) -> Any:
    """Return the type of a key's values; `None` for an unknown key."""
    if key.startswith("recipe."):
        return _RECIPE_FIELD_TYPES.get(key.removeprefix("recipe."))
    return _FIELD_TYPES.get(key, _RECIPE_FIELD_TYPES.get(key))


def _convert(value: object, kind: Any) -> object | None:
    """Return a TOML value converted to a field's type; `None` if it has another type."""
    if get_origin(kind) is Literal:
        return value if value in get_args(kind) else None
    if get_origin(kind) is tuple:
        is_list = isinstance(value, list) and all(isinstance(item, str) for item in value)
        return tuple(value) if isinstance(value, list) and is_list else None
    if kind is float and type(value) is int:
        return float(value)
    return value if type(value) is kind else None


def _toml(value: object) -> str:
    """Return a value as TOML, which is JSON for these types, except for infinity and NaN."""
    return repr(value) if isinstance(value, float) else json.dumps(value, ensure_ascii=False)


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
    """Hyperparameters of every method; comments say how to switch one off.

    `selection` is the metric that selects the checkpoint: mAP on whole validation classes, mAP of
    64-bit codes of held-out sketches among training photos (DSN on Sketchy), top-1 accuracy of
    held-out sketches (SAKE), or `last`, which keeps the last epoch (DSN on TU-Berlin).
    """

    name: str
    augment: bool = False
    optimizer: Optimizer = "sgd"
    learning_rate: float = 1e-4
    head_rate_factor: float = 1.0  # learning rate of the heads relative to the trunk
    momentum: float = 0.9  # sgd only
    weight_decay: float = 5e-4
    schedule: Schedule = "step"
    step_epochs: int = 10  # step only: divide the rate by ten every so many epochs
    warmup_steps: int = 0
    epochs: int = 25
    epoch_images: int = 0  # images in an epoch, every view of them counted; 0: the method's epochs
    patience: int = 5  # epochs without improvement before stopping; 0: never stop early
    average_decay: float = 0.0  # of the averaged student that is validated and saved; 0: none
    train_size_px: int = 224
    final_epochs: int = 0  # number of last epochs at 224 px if train_size_px is smaller
    selection: Selection = "validation-map"
    ink_crop: bool = True  # False: show sketches whole, in training as in search

    @property
    def preprocessing(self) -> Preprocessing:
        """How images become the student's input, and later the exported model's."""
        return Preprocessing(self.ink_crop)


@dataclass(frozen=True)
class SbtknetRecipe(Recipe):
    """SBTKNet's hyperparameters.

    A batch has `4 * quadruplets` images. With `quadruplets`, it is that many sampled quadruplets,
    one for each training sketch in an epoch. With `class-balanced`, it is `quadruplets` classes
    with two sketches and two photos each, every training sketch once per epoch on average; then
    quadruplet and triplet loss use the hardest positives and negatives of the batch.
    """

    metric: Metric = "quadruplet"
    identity: bool = True  # False: no classification loss
    knowledge: bool = True  # False: no knowledge preservation loss
    attention: bool = False  # True: spatial attention before pooling
    batches: Batches = "quadruplets"
    quadruplets: int = 16
    margin: float = 0.2  # of squared distances; not for contrastive
    temperature: float = 0.1  # contrastive only
    refit: bool = False  # True: refit the embedding at the end (`models.refit`)
    further: int = 6  # classes of further sources added to each class-balanced batch
    redrawn: float = 0.0  # share of bitmap sketches shown as clean strokes
    new_heads: bool = False  # True: random heads instead of the ImageNet classifier's
    held_out_photos: bool = False  # True: hold out photos, too, and include them in the accuracy


@dataclass(frozen=True)
class DsnRecipe(Recipe):
    """Hyperparameters of DSN, and of SAKE, which is DSN without contrastive term and memory.

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
        "paper": SbtknetRecipe(
            "paper",
            selection="held-out-accuracy",
            ink_crop=False,
            new_heads=True,
            held_out_photos=True,
        ),
    },
    "dsn": {recipe.name: recipe for recipe in (_DSN, _DSN_TUBERLIN)},
    "sake": {recipe.name: recipe for recipe in (_SAKE, _SAKE_TUBERLIN)},
}
_TYPE_NAMES = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}
_RECIPE_FIELD_TYPES = {
    name: kind
    for table in (SbtknetRecipe, DsnRecipe)
    for name, kind in get_type_hints(table).items()
}
_FIELD_TYPES = {
    name: kind for name, kind in get_type_hints(TrainConfig).items() if name != "recipe"
}
#: Hyperparameters that must be positive.
_POSITIVE = ("learning_rate", "temperature")
#: Smallest and largest values of hyperparameters.
_RANGES = {
    **dict.fromkeys(("warmup_steps", "patience", "final_epochs", "further"), (0, math.inf)),
    "epoch_images": (0, math.inf),
    **dict.fromkeys(("head_rate_factor", "weight_decay", "kd", "kdneg"), (0, math.inf)),
    **dict.fromkeys(("kd_weight", "contrastive_weight", "memory_weight"), (0, math.inf)),
    **dict.fromkeys(("epochs", "step_epochs"), (1, math.inf)),
    **dict.fromkeys(("batch_sketches", "batch_photos", "memory_size"), (1, math.inf)),
    **dict.fromkeys(("momentum", "average_decay", "redrawn"), (0, 1)),
    "quadruplets": (2, math.inf),
    "train_size_px": (32, 1024),
    "margin": (0, 4),
}


def default_recipe(method: Method, split: str = "") -> str:
    """Return the name of a method's default recipe; DSN's and SAKE's depend on the data set."""
    names = list(RECIPES[method])
    of_tuberlin = [name for name in names if name.endswith("-tuberlin")]
    return of_tuberlin[0] if split.casefold().startswith("tub") and of_tuberlin else names[0]


def default_validation_classes(recipe: Recipe) -> int:
    """Return the default number of validation classes of a recipe.

    The paper trains on all seen classes; a student that is selected by mAP of validation classes
    needs some.
    """
    is_paper = recipe.name == "paper" and recipe.selection != "validation-map"
    return 0 if is_paper else VALIDATION_CLASSES


def make_recipe(name: str, method: Method = "sbtknet", **changes: object) -> Recipe:
    """Return the named recipe of a method with some hyperparameters changed.

    Raises:
        BadConfig: unknown recipe or hyperparameter, or a value out of range.
    """
    recipes = RECIPES[method]
    if name not in recipes:
        raise BadConfig(f"{method} has no recipe {name!r}", ", ".join(sorted(recipes)))
    known = {field.name for field in fields(recipes[name])}
    foreign = sorted(set(changes) - known)
    if foreign:
        raise BadConfig(
            f"{method} has no setting {foreign[0]!r}", f"one of {', '.join(sorted(known))}"
        )
    result = replace(recipes[name], **changes)  # type: ignore[arg-type]
    for field in _POSITIVE:
        if not getattr(result, field, 1) > 0:
            raise BadConfig(f"{field} is {getattr(result, field)}", "more than 0")
    for field, (least, greatest) in _RANGES.items():
        if not least <= (value := getattr(result, field, least)) <= greatest:
            limit = f"{least} or more" if greatest == math.inf else f"{least} to {greatest}"
            raise BadConfig(f"{field} is {value}", limit)
    return result


def recipe_type(method: Method) -> type[Recipe]:
    """Return the class of a method's recipes."""
    return SbtknetRecipe if method == "sbtknet" else DsnRecipe
