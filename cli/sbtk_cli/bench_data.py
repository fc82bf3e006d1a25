"""Which images `sbtk bench map` measures on: unseen classes of a split, or validation classes."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from sbtk_runtime.bench_map import LabelledImages, LabelledSet
from sbtk_runtime.errors import BadData
from sbtk_runtime.manifest import BundleManifest
from sbtk_train.data import ImageSet, of_classes, read_dataset
from sbtk_train.splits import Split, class_key, open_split

Classes = Literal["unseen", "validation"]

DEFAULT_SPLIT = "SK-YE"


def measured_images(
    data: Path, manifest: BundleManifest, split_name: str | None, classes: Classes
) -> LabelledSet:
    """Returns the images of the unseen or of the validation classes in a data set.

    Args:
        data: the folder that holds `sketch/<class>/*` and `photo/<class>/*`.
        manifest: of the model; it must not have been trained on what it is measured on.
        split_name: of the split that names the unseen classes; by default the model's own.
        classes: `unseen`, or `validation`: the seen classes that were held out from training.

    Raises:
        BadData: the data have none of the classes, or the model was trained on some of them.
        BadConfig: there is no such split.
    """
    images = read_dataset(data)
    training = manifest.training
    if classes == "validation":
        names = _validation_classes(images, training)
        return _measured(images, names, f"{len(names)} validation classes (seen, held out)")
    split = open_split(split_name) if split_name else _own_split(training)
    names = [name for name in images.classes if split.is_unseen(name)]
    if not names:
        raise BadData(
            f"{data} has none of the {len(split.unseen)} unseen classes of {split.name}",
            ", ".join(split.unseen[:5]) + ", ...",
            "name another split: --split NAME",
        )
    _refuse_leaks(manifest, split, names)
    of_all = "" if len(names) == len(split.unseen) else f" of {len(split.unseen)}"
    return _measured(images, names, f"{len(names)}{of_all} unseen classes of {split.name}")


def _measured(images: ImageSet, names: list[str], of: str) -> LabelledSet:
    chosen = of_classes(images, names)
    if not chosen.sketches or not chosen.photos:
        raise BadData(
            f"{len(chosen.sketches)} sketches and {len(chosen.photos)} photos of {of}",
            "at least one of each",
        )
    return LabelledSet(
        LabelledImages(chosen.sketches, chosen.sketch_labels.tolist(), chosen.classes),
        LabelledImages(chosen.photos, chosen.photo_labels.tolist(), chosen.classes),
        of,
    )


def _own_split(training: dict[str, Any]) -> Split:
    """Returns the split that the model was trained with; the default one if it does not say."""
    unseen = training.get("unseen_classes")
    if not isinstance(unseen, list) or not unseen:
        return open_split(DEFAULT_SPLIT)
    return Split(_split_name(training), tuple(sorted(str(name) for name in unseen)))


def _split_name(training: dict[str, Any]) -> str:
    split = training.get("split")
    name = split.get("name") if isinstance(split, dict) else split
    return name if isinstance(name, str) and name else "the model's own split"


def _validation_classes(images: ImageSet, training: dict[str, Any]) -> list[str]:
    keys = _class_keys(training, "validation_classes")
    if not keys:
        raise BadData(
            "the model's manifest names no validation classes",
            "training.validation_classes, which sbtk export writes",
            "measure on unseen classes: --classes unseen",
        )
    names = [name for name in images.classes if class_key(name) in keys]
    if not names:
        raise BadData(
            f"the data have none of the model's {len(keys)} validation classes",
            ", ".join(sorted(keys)),
        )
    return names


def _refuse_leaks(manifest: BundleManifest, split: Split, names: list[str]) -> None:
    """Refuses to call classes unseen that the model's training did not set aside."""
    kept = _class_keys(manifest.training, "unseen_classes")
    leaked = [name for name in names if class_key(name) not in kept]
    if kept and leaked:
        raise BadData(
            f"{manifest.model_id} did not keep {', '.join(leaked)} from its training, "
            f"which {split.name} calls unseen",
            "the split that the model was trained with",
            f"--split {_split_name(manifest.training)}, or leave it out",
        )


def _class_keys(training: dict[str, Any], key: str) -> set[str]:
    names = training.get(key)
    return {class_key(str(name)) for name in names} if isinstance(names, list) else set()
