"""The options of `sbtk train`, and the configuration that they make."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sbtk_cli import options
from sbtk_runtime.errors import BadData

if TYPE_CHECKING:
    from sbtk_train.config import TrainConfig
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

_weight = click.FloatRange(min=0)
_count = click.IntRange(min=1)

_OPTIONS = (
    click.option(
        "--method",
        type=click.Choice(["sbtknet", "dsn", "sake"]),
        default="sbtknet",
        show_default=True,
        help="The paper's method, or DSN (Wang et al. 2021), or SAKE (Liu et al. 2019).",
    ),
    click.option(
        "--split",
        default="SK-YE",
        show_default=True,
        metavar="NAME|FILE",
        help="Classes kept unseen: a published split, random:25:SEED, or a file with one class "
        "a line.",
    ),
    click.option(
        "--classes",
        type=options.PATH,
        metavar="FILE",
        help="Use only the seen classes that FILE lists, one a line.",
    ),
    click.option(
        "--allow-missing",
        is_flag=True,
        help="Accept a file of --split or --classes that names classes the data lack.",
    ),
    click.option(
        "--keep-duplicates",
        is_flag=True,
        help="Keep photos that the data set's lists name twice.",
    ),
    click.option(
        "--more-sketches",
        multiple=True,
        type=options.PATH,
        metavar="PATH",
        help="Train on these sketches too: a folder of class folders, or a stroke file (.npz). "
        "Repeatable.",
    ),
    click.option(
        "--more-photos",
        multiple=True,
        type=options.PATH,
        metavar="FOLDER",
        help="Train on the photos in these class folders too. Repeatable.",
    ),
    click.option(
        "--class-map",
        metavar="NAME|FILE",
        help="Class names of further sources: quickdraw-caltech, or a TOML file.",
    ),
    click.option(
        "--further",
        type=click.IntRange(min=0),
        metavar="N",
        help="Classes of further sources in each batch, beside the data set's own.",
    ),
    click.option(
        "--redrawn",
        type=click.FloatRange(min=0, max=1),
        metavar="SHARE",
        help="Share of bitmap sketches shown as clean strokes along their lines.",
    ),
    click.option(
        "--recipe",
        metavar="NAME",
        help="How to train: sbtk or paper (SBTKNet), dsn-sketchy or dsn-tuberlin, sake-sketchy or "
        "sake-tuberlin.  [default: sbtk, or by the split]",
    ),
    click.option(
        "--backbone",
        type=click.Choice(["resnet50-v1.5", "resnet50-v1", "resnet18", "se-resnet50"]),
        help="Layout of the network; se-resnet50 for DSN and SAKE only.  [default: what the "
        "weights file says]",
    ),
    click.option(
        "--weights",
        default="imagenet",
        show_default=True,
        metavar="FILE|RUN|BUNDLE",
        help="Start from a .safetensors or .pth file, a model of your own (run folder or bundle), "
        "imagenet (a local copy), or none.",
    ),
    click.option(
        "--teacher",
        type=options.PATH,
        metavar="FILE",
        help="Classifier whose knowledge is kept.  [default: the weights]",
    ),
    click.option(
        "--dim",
        type=_count,
        metavar="N",
        help="Length of an embedding.  [default: 512; 64 for DSN]",
    ),
    click.option(
        "--metric",
        type=click.Choice(["quadruplet", "triplet", "contrastive"]),
        help="SBTKNet's metric loss.  [default: the recipe's]",
    ),
    click.option("--identity/--no-identity", default=None, help="SBTKNet's classification loss."),
    click.option("--knowledge/--no-knowledge", default=None, help="SBTKNet's knowledge loss."),
    click.option(
        "--attention/--no-attention", default=None, help="SBTKNet's attention before pooling."
    ),
    click.option(
        "--refit/--no-refit", default=None, help="SBTKNet: fit the embedding anew at the end."
    ),
    click.option("--margin", type=click.FloatRange(min=0, max=4), help="SBTKNet's margin."),
    click.option(
        "--quadruplets",
        type=click.IntRange(min=2),
        help="SBTKNet's batch: four images for each.",
    ),
    click.option("--batch-sketches", type=_count, help="Sketches in a batch of DSN or SAKE."),
    click.option("--batch-photos", type=_count, help="Photos in a batch of DSN or SAKE."),
    click.option("--kd", type=_weight, help="DSN, SAKE: factor of the teacher's logits."),
    click.option("--kdneg", type=_weight, help="DSN, SAKE: factor of the semantic matrix."),
    click.option("--kd-weight", type=_weight, help="DSN, SAKE: weight of the distillation."),
    click.option(
        "--semantic",
        type=click.Choice(["wordnet", "none"]),
        help="DSN, SAKE: where the semantic matrix comes from.",
    ),
    click.option("--contrastive-weight", type=_weight, help="DSN: weight of the contrastive term."),
    click.option(
        "--temperature",
        type=click.FloatRange(min=0, min_open=True),
        help="Of the contrastive terms.",
    ),
    click.option(
        "--memory",
        type=click.Choice(["none", "released", "paper"]),
        help="DSN's memory of sketches: released has no gradient, as the authors' code.",
    ),
    click.option("--memory-size", type=_count, help="DSN: sketches kept of each class."),
    click.option("--memory-weight", type=_weight, help="DSN: weight of the memory loss."),
    click.option("--augment/--no-augment", default=None, help="Augmentation."),
    click.option("--epochs", type=_count, help="Override the recipe's epochs."),
    click.option(
        "--learning-rate",
        type=click.FloatRange(min=0, min_open=True),
        help="Override the recipe's learning rate.",
    ),
    click.option(
        "--size",
        "train_size_px",
        type=click.IntRange(min=32, max=1024),
        metavar="PX",
        help="Override the side of the training images.",
    ),
    click.option(
        "--final-epochs",
        type=click.IntRange(min=0),
        help="Override how many last epochs run at 224 px.",
    ),
    click.option(
        "--selection",
        type=click.Choice(["validation-map", "held-out-bits", "held-out-accuracy", "last"]),
        help="Override what the kept student is best at.",
    ),
    click.option(
        "--freeze-until",
        type=click.Choice(["none", "layer1", "layer2", "layer3", "layer4"]),
        help="Keep the stages before this one as they are (for small machines).",
    ),
    click.option(
        "--feature-maps",
        "feature_folder",
        type=options.PATH,
        metavar="FOLDER",
        help="Run frozen stages once and keep their feature maps in FOLDER (some GB).",
    ),
    click.option(
        "--feature-variants",
        type=_count,
        default=4,
        show_default=True,
        help="With --feature-maps: augmented copies of each image.",
    ),
    click.option(
        "--validation-classes",
        type=click.IntRange(min=0),
        default=10,
        show_default=True,
        help="Seen classes kept from training, for selection.",
    ),
    click.option(
        "--seed",
        type=int,
        default=0,
        show_default=True,
        help="Of initialisation, order and augmentation.",
    ),
    click.option(
        "--precision",
        type=click.Choice(["auto", "fp32", "bf16", "fp16"]),
        default="auto",
        show_default=True,
        help="Number format of the network's arithmetic.",
    ),
    click.option("--device", default="auto", show_default=True, help="cpu, cuda, cuda:1."),
    click.option("--threads", type=_count, help="CPU threads of torch."),
    click.option("--workers", type=_count, help="Image decoding threads."),
    click.option(
        "--checkpoint-minutes",
        type=click.FloatRange(min=0),
        default=5,
        show_default=True,
        help="Save a running epoch this often.",
    ),
)


def training(command: Callable[..., Any]) -> Callable[..., Any]:
    """Adds the options to a command, in the order of this file."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def build_config(
    data: Path,
    values: dict[str, Any],
    notify: Notify,
    *,
    processes: int = 1,
) -> TrainConfig:
    """Returns the configuration that the options describe.

    Args:
        data: the data set's folder.
        values: the options' values by name.
        notify: called with what was decided.
        processes: how many share this machine's CPUs in the run.

    Raises:
        BadConfig: options contradict each other, or there are no weights.
        BadData: there is no such folder.
    """
    from sbtk_train.config import TrainConfig, default_recipe, default_workers, make_recipe
    from sbtk_train.models.weights_file import choose_backbone, find_weights, read_student_dim

    if not data.is_dir():
        raise BadData(f"there is no folder {data}", "a folder of sketches and photos")
    method, weights = values["method"], None
    if values["weights"] != "none":
        weights = find_weights(values["weights"], values["backbone"])
    asked = {knob: values[knob] for knob in KNOBS if values[knob] is not None}
    knobs = asked
    if weights is None and values["teacher"] is None:
        knobs = asked | _without_teacher(method, asked, notify)
    freeze_until = values["freeze_until"] or ""
    own_dim = None if weights is None else read_student_dim(weights)
    fields = {field: values[field] for field in _FIELDS}
    if _is_split_file(values["split"]):
        fields["split"] = absolute(values["split"])
    return TrainConfig(
        data=absolute(data),
        method=method,
        recipe=make_recipe(
            values["recipe"] or default_recipe(method, values["split"]), method, **knobs
        ),
        classes=absolute(values["classes"]),
        more_sketches=tuple(str(path.resolve()) for path in values["more_sketches"]),
        more_photos=tuple(str(path.resolve()) for path in values["more_photos"]),
        class_map=_class_map(values["class_map"] or ""),
        backbone=choose_backbone(weights, values["backbone"], notify),
        weights=absolute(weights),
        teacher=absolute(values["teacher"]),
        dim=values["dim"] or own_dim or _DEFAULT_DIM[method],
        freeze_until="" if freeze_until == "none" else freeze_until,
        feature_folder=absolute(values["feature_folder"]),
        workers=values["workers"] or max(1, default_workers() // processes),
        threads=values["threads"] or 0,
        **fields,
    )


def absolute(path: Path | str | None) -> str:
    """Returns a path as a run's configuration keeps it; empty for none."""
    return "" if path is None else str(Path(path).absolute())


def _class_map(name_or_file: str) -> str:
    from sbtk_train.data.more_images import is_bundled

    is_file = name_or_file and not is_bundled(name_or_file)
    return absolute(name_or_file) if is_file else name_or_file


def _is_split_file(split: str) -> bool:
    from sbtk_train.data.splits import split_names

    is_published = split.casefold() in {name.casefold() for name in split_names()}
    return not is_published and Path(split).exists()


def _without_teacher(method: str, asked: dict[str, Any], notify: Notify) -> dict[str, object]:
    """Returns the knobs that switch off what cannot be had without an ImageNet classifier."""
    knob = "knowledge" if method == "sbtknet" else "kd_weight"
    if knob in asked:
        return {}
    what = "the knowledge loss" if method == "sbtknet" else "distillation"
    notify(f"no weights and no --teacher: training without {what}")
    return {knob: False if method == "sbtknet" else 0.0}
