"""The options of `sbtk train`, and the configuration that they make."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sbtk_cli import options
from sbtk_runtime.errors import BadConfig, BadData

if TYPE_CHECKING:
    from sbtk_train.config import Settings, TrainConfig
    from sbtk_train.progress import Notify


#: Options that change a knob of the recipe; the name is the knob's.
KNOBS = (
    "metric",
    "identity",
    "knowledge",
    "attention",
    "refit",
    "augment",
    "epochs",
    "learning_rate",
    "margin",
    "temperature",
    "quadruplets",
    "batch_sketches",
    "batch_photos",
    "kd",
    "kdneg",
    "kd_weight",
    "contrastive_weight",
    "memory",
    "memory_size",
    "memory_weight",
    "semantic",
    "selection",
    "train_size_px",
    "final_epochs",
    "further",
    "redrawn",
)
#: Options that are a field of the configuration under the same name.
_FIELDS = (
    "split",
    "seed",
    "validation_classes",
    "precision",
    "device",
    "checkpoint_minutes",
    "feature_variants",
    "keep_duplicates",
    "allow_missing",
)
_DEFAULT_DIM = {"sbtknet": 512, "dsn": 64, "sake": 512}

_weight = options.FloatRange(min=0)
_count = options.IntRange(min=1)


def _show_all_options(context: click.Context, _: click.Parameter, is_requested: bool) -> None:
    if not is_requested or context.resilient_parsing:
        return
    for parameter in context.command.params:
        if isinstance(parameter, click.Option):
            parameter.hidden = False
    click.echo(context.get_help())
    context.exit()


def _rare(*names: str, **attributes: Any) -> Callable[..., Any]:
    """Return an option that only `--help-all` lists."""
    return click.option(*names, hidden=True, **attributes)


_OPTIONS = (
    click.option(
        "--config",
        "config_file",
        type=options.PATH,
        metavar="FILE",
        help="TOML file with the keys of a run's config.resolved.toml.",
    ),
    click.option(
        "--set",
        "set_texts",
        multiple=True,
        metavar="KEY=VALUE",
        help="Set one key of the configuration, such as recipe.weight_decay=0.1; repeatable. "
        "Options win over --set, --set over --config, and --config over the recipe.",
    ),
    click.option(
        "--help-all",
        is_flag=True,
        is_eager=True,
        expose_value=False,
        callback=_show_all_options,
        help="Show all options, also the rare ones, and exit.",
    ),
    click.option(
        "--method",
        type=click.Choice(["sbtknet", "dsn", "sake"]),
        default="sbtknet",
        show_default=True,
        help="SBTKNet, DSN (Wang et al. 2021) or SAKE (Liu et al. 2019).",
    ),
    click.option(
        "--split",
        default="SK-YE",
        show_default=True,
        metavar="NAME|FILE",
        help="Unseen classes: a published split, random:25:SEED, or a file with one class a line.",
    ),
    click.option(
        "--recipe",
        metavar="NAME",
        help="Training recipe: sbtk or paper for SBTKNet, dsn-sketchy or dsn-tuberlin, "
        "sake-sketchy or sake-tuberlin.  [default: sbtk, or by the split]",
    ),
    click.option(
        "--weights",
        default="imagenet",
        show_default=True,
        metavar="FILE|RUN|BUNDLE",
        help="Initial weights: a .safetensors or .pth file, a model of your own (run folder or "
        "bundle), imagenet (a local copy), or none.",
    ),
    click.option(
        "--dim", type=_count, metavar="N", help="Embedding size.  [default: 512; 64 for DSN]"
    ),
    click.option("--epochs", type=_count, help="Number of epochs.  [default: the recipe's]"),
    click.option(
        "--learning-rate",
        type=options.FloatRange(min=0, min_open=True),
        help="Initial learning rate.  [default: the recipe's]",
    ),
    click.option(
        "--size",
        "train_size_px",
        type=options.IntRange(min=32, max=1024),
        metavar="PX",
        help="Size of the training images.  [default: the recipe's]",
    ),
    click.option(
        "--more-sketches",
        multiple=True,
        type=options.PATH,
        metavar="PATH",
        help="Further training sketches: a folder of class folders, a list of images (.txt), or a "
        "stroke file (.npz). Repeatable.",
    ),
    click.option(
        "--more-photos",
        multiple=True,
        type=options.PATH,
        metavar="PATH",
        help="Further training photos: a folder of class folders, or a list of images (.txt). "
        "Repeatable.",
    ),
    click.option(
        "--validation-classes",
        type=options.IntRange(min=0),
        help="Number of seen classes held out from training for validation.  [default: 10; 0 "
        "with --recipe paper]",
    ),
    click.option(
        "--seed",
        type=int,
        default=0,
        show_default=True,
        help="Random seed of initialisation, order and augmentation.",
    ),
    click.option(
        "--precision",
        type=click.Choice(["auto", "fp32", "bf16", "fp16"]),
        default="auto",
        show_default=True,
        help="Number format of the network's arithmetic.",
    ),
    click.option("--device", default="auto", show_default=True, help="cpu, cuda or cuda:N."),
    _rare(
        "--classes",
        type=options.PATH,
        metavar="FILE",
        help="Use only the seen classes that FILE lists, one a line.",
    ),
    _rare(
        "--allow-missing",
        is_flag=True,
        help="Accept a file for --split or --classes that names classes the data lack.",
    ),
    _rare(
        "--keep-duplicates",
        is_flag=True,
        help="Keep photos that the data set's lists name twice.",
    ),
    _rare(
        "--class-map",
        metavar="NAME|FILE",
        help="Class names of further sources: quickdraw-caltech, or a TOML file.",
    ),
    _rare(
        "--further",
        type=options.IntRange(min=0),
        metavar="N",
        help="Classes of further sources in each batch, in addition to the data set's own.",
    ),
    _rare(
        "--redrawn",
        type=options.FloatRange(min=0, max=1),
        metavar="SHARE",
        help="Share of bitmap sketches that are traced and shown as clean strokes.",
    ),
    _rare(
        "--backbone",
        type=click.Choice(["resnet50-v1.5", "resnet50-v1", "resnet18", "se-resnet50"]),
        help="Network layout; se-resnet50 for DSN and SAKE only.  [default: as the weights file "
        "says]",
    ),
    _rare(
        "--teacher",
        type=options.PATH,
        metavar="FILE",
        help="Classifier that makes the soft labels.  [default: the weights]",
    ),
    _rare(
        "--metric",
        type=click.Choice(["quadruplet", "triplet", "contrastive"]),
        help="SBTKNet: metric loss.  [default: the recipe's]",
    ),
    _rare("--identity/--no-identity", default=None, help="SBTKNet: classification loss."),
    _rare("--knowledge/--no-knowledge", default=None, help="SBTKNet: knowledge loss."),
    _rare("--attention/--no-attention", default=None, help="SBTKNet: attention before pooling."),
    _rare("--refit/--no-refit", default=None, help="SBTKNet: refit the embedding at the end."),
    _rare("--margin", type=options.FloatRange(min=0, max=4), help="SBTKNet: margin."),
    _rare(
        "--quadruplets",
        type=options.IntRange(min=2),
        help="SBTKNet: quadruplets in a batch, of four images each.",
    ),
    _rare("--batch-sketches", type=_count, help="DSN, SAKE: sketches in a batch."),
    _rare("--batch-photos", type=_count, help="DSN, SAKE: photos in a batch."),
    _rare("--kd", type=_weight, help="DSN, SAKE: factor of the teacher's logits."),
    _rare("--kdneg", type=_weight, help="DSN, SAKE: factor of the semantic matrix."),
    _rare("--kd-weight", type=_weight, help="DSN, SAKE: weight of the distillation loss."),
    _rare(
        "--semantic",
        type=click.Choice(["wordnet", "none"]),
        help="DSN, SAKE: source of the semantic matrix.",
    ),
    _rare("--contrastive-weight", type=_weight, help="DSN: weight of the contrastive loss."),
    _rare(
        "--temperature",
        type=options.FloatRange(min=0, min_open=True),
        help="Temperature of the contrastive losses.",
    ),
    _rare(
        "--memory",
        type=click.Choice(["none", "released", "paper"]),
        help="DSN: memory loss; released has no gradient, as in the authors' code.",
    ),
    _rare("--memory-size", type=_count, help="DSN: sketches of each class in the memory."),
    _rare("--memory-weight", type=_weight, help="DSN: weight of the memory loss."),
    _rare("--augment/--no-augment", default=None, help="Augment the training images."),
    _rare(
        "--final-epochs",
        type=options.IntRange(min=0),
        help="Number of last epochs at 224 px.  [default: the recipe's]",
    ),
    _rare(
        "--selection",
        type=click.Choice(["validation-map", "held-out-bits", "held-out-accuracy", "last"]),
        help="Metric that selects the epoch.  [default: the recipe's]",
    ),
    _rare(
        "--freeze-until",
        type=click.Choice(["none", "layer1", "layer2", "layer3", "layer4"]),
        help="Freeze the stages before this one (for small machines).",
    ),
    _rare(
        "--feature-maps",
        "feature_folder",
        type=options.PATH,
        metavar="FOLDER",
        help="Compute frozen stages once and keep their feature maps in FOLDER (some GB).",
    ),
    _rare(
        "--feature-variants",
        type=_count,
        default=4,
        show_default=True,
        help="With --feature-maps: augmented copies of each image.",
    ),
    _rare("--threads", type=_count, help="CPU threads of torch."),
    _rare("--workers", type=_count, help="Image decoding threads."),
    _rare(
        "--checkpoint-minutes",
        type=options.FloatRange(min=0),
        default=5,
        show_default=True,
        help="Minutes between checkpoints within an epoch.",
    ),
)


def add_training_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options to a command, in the order of this file."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def read_settings(config_file: Path | None, set_texts: Sequence[str]) -> Settings:
    """Return what `--config` and `--set` say; `--set` wins.

    Raises:
        BadConfig: the file cannot be read, or a key or value is not accepted.
    """
    from sbtk_train import config

    settings = config.Settings({}, {})
    if config_file is not None:
        settings = config.read_settings(config_file)
        for name in config.PROVENANCE_FIELDS:
            settings.fields.pop(name, None)
    from_file = settings.recipe.get("name")
    for text in set_texts:
        settings |= config.parse_setting(text)
    _refuse_other_recipe(settings.recipe.get("name"), from_file)
    return settings


def _refuse_other_recipe(name: str | None, from_file: str | None) -> None:
    """Refuse to call one recipe's knobs by the name of another."""
    if from_file is not None and name != from_file:
        raise BadConfig(
            f"recipe {name} with a --config file of recipe {from_file}",
            "one recipe",
            "leave out the recipe, or change [recipe] in the file",
        )


def apply_settings(
    values: dict[str, Any], given: Collection[str], settings: Settings
) -> dict[str, Any]:
    """Return the options' values, and those of the settings for options that were not given.

    Args:
        values: the options' values by name.
        given: names of the options on the command line.
        settings: of `--config` and `--set`.

    Raises:
        BadConfig: `--recipe` names another recipe than the settings.
    """
    if "recipe" in given:
        _refuse_other_recipe(values["recipe"], settings.recipe.get("name"))
    own = settings.fields | settings.recipe
    if "name" in own:
        own["recipe"] = own.pop("name")
    # A resolved configuration writes an empty text or 0 where an option is left out or "none".
    for name in ("weights", "freeze_until"):
        if own.get(name) == "":
            own[name] = "none"
    for name in ("classes", "teacher", "class_map", "feature_folder", "threads"):
        if name in own:
            own[name] = own[name] or None
    return values | {name: own[name] for name in own if name in values and name not in given}


def build_config(
    data: Path,
    values: dict[str, Any],
    notify: Notify,
    *,
    settings: Settings | None = None,
    processes: int = 1,
) -> TrainConfig:
    """Return the configuration that the options describe.

    Args:
        data: the data set's folder.
        values: the options' values by name, the settings applied.
        notify: called with the decisions made.
        settings: of `--config` and `--set`, for values without an option.
        processes: how many processes of the run share this machine's CPUs.

    Raises:
        BadConfig: options contradict each other, or there are no weights.
        BadData: there is no such folder.
    """
    from sbtk_runtime.machine import cpu_threads
    from sbtk_train.config import (
        TrainConfig,
        default_recipe,
        default_validation_classes,
        make_recipe,
    )
    from sbtk_train.models.weights_file import choose_backbone, find_weights, read_student_dim

    if not data.is_dir():
        raise BadData(f"there is no folder {data}", "a folder of sketches and photos")
    method, weights = values["method"], None
    if values["weights"] != "none":
        weights = find_weights(values["weights"], values["backbone"])
    without_option = {} if settings is None else settings.recipe
    requested = {
        knob: value for knob, value in without_option.items() if knob not in (*KNOBS, "name")
    }
    requested |= {knob: values[knob] for knob in KNOBS if values[knob] is not None}
    knobs = requested
    if weights is None and values["teacher"] is None:
        knobs = requested | _without_teacher(method, requested, notify)
    recipe = make_recipe(
        values["recipe"] or default_recipe(method, values["split"]), method, **knobs
    )
    freeze_until = values["freeze_until"] or ""
    own_dim = None if weights is None else read_student_dim(weights)
    fields = {field: values[field] for field in _FIELDS}
    if settings is not None:
        fields |= {
            name: value
            for name, value in settings.fields.items()
            if name not in values and name != "data"
        }
    if _is_split_file(values["split"]):
        fields["split"] = absolute(values["split"])
    if fields["validation_classes"] is None:
        fields["validation_classes"] = default_validation_classes(recipe)
    return TrainConfig(
        data=absolute(data),
        method=method,
        recipe=recipe,
        classes=absolute(values["classes"]),
        more_sketches=tuple(str(Path(path).resolve()) for path in values["more_sketches"]),
        more_photos=tuple(str(Path(path).resolve()) for path in values["more_photos"]),
        class_map=_class_map(values["class_map"] or ""),
        backbone=choose_backbone(weights, values["backbone"], notify),
        weights=absolute(weights),
        teacher=absolute(values["teacher"]),
        dim=values["dim"] or own_dim or _DEFAULT_DIM[method],
        freeze_until="" if freeze_until == "none" else freeze_until,
        feature_folder=absolute(values["feature_folder"]),
        workers=values["workers"] or max(1, cpu_threads() // processes),
        threads=values["threads"] or 0,
        **fields,
    )


def absolute(path: Path | str | None) -> str:
    """Return a path as a run's configuration keeps it; empty for none."""
    return "" if path is None else str(Path(path).absolute())


def _class_map(name_or_file: str) -> str:
    from sbtk_train.data.more_images import is_bundled

    is_file = name_or_file and not is_bundled(name_or_file)
    return absolute(name_or_file) if is_file else name_or_file


def _is_split_file(split: str) -> bool:
    from sbtk_train.data.splits import split_names

    is_published = split.casefold() in {name.casefold() for name in split_names()}
    return not is_published and Path(split).exists()


def _without_teacher(method: str, requested: dict[str, Any], notify: Notify) -> dict[str, object]:
    """Return the settings that switch off the losses that need an ImageNet classifier."""
    knob = "knowledge" if method == "sbtknet" else "kd_weight"
    if knob in requested:
        return {}
    what = "the knowledge loss" if method == "sbtknet" else "distillation"
    notify(f"no weights and no --teacher: training without {what}")
    return {knob: False if method == "sbtknet" else 0.0}
