"""The images of `sbtk bench map`: unseen classes of a split, or validation classes."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from sbtk_runtime.bundle import is_run_folder
from sbtk_runtime.errors import BadConfig, BadData
from sbtk_runtime.evaluation.bench.map import LabelledImages, LabelledSet
from sbtk_runtime.evaluation.protocol import PHOTO_QUERIES_PER_CLASS, ZERO_SHOT, Protocol, draw_seen
from sbtk_runtime.files import printable_name
from sbtk_runtime.manifest import BundleManifest
from sbtk_train.data.class_names import ClassNames
from sbtk_train.data.dataset import read_dataset
from sbtk_train.data.image_set import ImageSet, select_classes, select_images
from sbtk_train.data.splits import Split, find_listing, join_names, open_split, split_names

Classes = Literal["unseen", "validation"]

DEFAULT_SPLIT = "SK-YE"
#: Largest number of training sketches, and of photos, to fit ITQ on.
LEARNT_ON_AT_MOST = 5_000


def load_labelled_set(
    data: Path,
    manifest: BundleManifest,
    split_name: str | None,
    classes: Classes,
    protocol: Protocol = ZERO_SHOT,
) -> LabelledSet:
    """Return the images of the unseen or validation classes in a data set.

    Args:
        data: folder of the data set, in any layout that `sbtk data check` supports.
        manifest: manifest of the model, which must not have been trained on these classes.
        split_name: split that defines the unseen classes; by default the model's own.
        classes: `unseen`, or `validation`: seen classes held out from training.
        protocol: decides whether images of seen classes join, duplicates count, and ITQ is fitted
            on training images. Unseen classes of the model's own split never count as seen.

    Raises:
        BadData: the data set has none of the classes, or the model was trained on some of them.
        BadConfig: unknown split, or a split together with validation classes.
    """
    if is_run_folder(data):
        shown = shlex.quote(printable_name(data))
        raise BadConfig(
            f"{shown} is a training run, not a data set",
            "a folder of sketches and photos",
            f"export the run first: sbtk export {shown}, then sbtk bench map DATA --model "
            f"{shlex.quote(printable_name(Path('bundles') / data.absolute().name))}",
        )
    images = read_dataset(data, keep_duplicates=protocol.keeps_duplicates)
    training = manifest.training
    if classes == "validation" and split_name is not None:
        raise BadConfig(
            f"--split {split_name} with --classes validation",
            "the model's own split, which defines its validation classes",
            "omit one of the two",
        )
    split = open_split(split_name, images.classes) if split_name else _open_own_split(training)
    if classes == "validation":
        names = _find_validation_classes(images, training)
        of = f"{len(names)} validation classes (seen, held out)"
    else:
        names = _find_unseen_classes(images, data, split)
        _refuse_leaks(manifest, split, names)
        of_all = "" if len(names) == len(split.unseen) else f" of {len(split.unseen)}"
        of = f"{len(names)}{of_all} unseen classes of {split.name}"
    measured = select_classes(images, names)
    if not measured.sketches or not measured.photos:
        raise BadData(
            f"{len(measured.sketches)} sketches and {len(measured.photos)} photos of {of}",
            "at least one of each",
        )
    if protocol.queries == "photo":
        _require_gallery(measured, of)
    notices = (*images.notices, *_list_one_sided(measured, protocol))
    kept_unseen = _read_names(training, "unseen_classes")
    trained_on = _select_training(images, split, without=[*names, *kept_unseen])
    return _add_seen(
        measured,
        trained_on,
        LabelledSet(
            _make_labelled(measured.sketch_files, measured.sketch_labels, names),
            _make_labelled(measured.photos, measured.photo_labels, names),
            of,
            learnt_on=_sample_training(trained_on, training),
            protocol=replace(protocol, split=split.name, classes=classes),
            notices=notices,
        ),
    )


def _list_one_sided(measured: ImageSet, protocol: Protocol) -> list[str]:
    """Return messages about classes with sketches alone or photos alone."""
    if protocol.queries == "photo":
        return []
    labels = range(len(measured.classes))
    sketched, photographed = set(measured.sketch_labels), set(measured.photo_labels)
    no_sketch = [measured.classes[label] for label in labels if label not in sketched]
    no_photo = [measured.classes[label] for label in labels if label not in photographed]
    lines = []
    if no_sketch:
        lines.append(f"no sketches of {join_names(no_sketch)}: in the gallery, but not queried")
    if no_photo:
        lines.append(f"no photos of {join_names(no_photo)}: their sketches are left out")
    return lines


def _require_gallery(measured: ImageSet, of: str) -> None:
    """Reject photos as queries if the gallery would be empty."""
    most = int(np.bincount(measured.photo_labels).max())
    if most <= PHOTO_QUERIES_PER_CLASS:
        raise BadData(
            f"at most {most} photos in each of {of}",
            f"more than {PHOTO_QUERIES_PER_CLASS}, which are queries; the others form the gallery",
            "--queries sketch, or data with more photos",
        )


def _select_training(images: ImageSet, split: Split, without: Sequence[str]) -> ImageSet:
    """Return the training images: seen classes, without sketches that its lists exclude."""
    others = ClassNames(without)
    seen = [name for name in split.seen_among(images.classes) if name not in others]
    chosen = select_classes(images, seen)
    listing = find_listing(images, split)
    if listing is None or not listing.training_sketches:
        return chosen
    kept = [row for row, path in enumerate(chosen.sketches) if path in listing.training_sketches]
    return select_images(chosen, sketches=kept)


def _add_seen(measured: ImageSet, trained_on: ImageSet, zero_shot: LabelledSet) -> LabelledSet:
    """Return the zero-shot set with the seen images that its protocol adds.

    They come first, as in SEM-PCYC's code.
    """
    setting = zero_shot.protocol.setting
    if setting == "zero-shot":
        return zero_shot
    sketches: Sequence[int] = ()
    photos: Sequence[int] = range(len(trained_on.photos))
    if setting == "generalised-20":
        drawn = draw_seen(
            [_file_name(path) for path in trained_on.sketch_files],
            [_file_name(path) for path in trained_on.photos],
            unseen_sketches=len(measured.sketches),
            unseen_photos=len(measured.photos),
            split=zero_shot.protocol.split,
        )
        sketches, photos = drawn.sketches.tolist(), drawn.photos.tolist()
    classes = (*measured.classes, *trained_on.classes)
    first = len(measured.classes)

    def join(
        seen: tuple[Path, ...], labels: NDArray[np.int64], rows: Sequence[int], own: LabelledImages
    ) -> LabelledImages:
        return LabelledImages(
            [*(seen[row] for row in rows), *own.paths],
            [*(first + int(labels[row]) for row in rows), *own.labels],
            classes,
        )

    return replace(
        zero_shot,
        sketches=join(
            trained_on.sketch_files, trained_on.sketch_labels, sketches, zero_shot.sketches
        ),
        photos=join(trained_on.photos, trained_on.photo_labels, photos, zero_shot.photos),
    )


def _file_name(path: Path) -> str:
    """Return `class/file`, by which SEM-PCYC sorts and identifies files."""
    return f"{path.parent.name}/{path.name}"


def _sample_training(
    trained_on: ImageSet, training: dict[str, Any]
) -> tuple[LabelledImages, LabelledImages]:
    """Return at most `LEARNT_ON_AT_MOST` training sketches and photos, drawn with seed 0."""
    held_out = ClassNames(_read_names(training, "validation_classes"))
    names = [name for name in trained_on.classes if name not in held_out]
    chosen = select_classes(trained_on, names)
    generator = np.random.default_rng(0)

    def some(paths: tuple[Path, ...], labels: NDArray[np.int64]) -> LabelledImages:
        count = min(len(paths), LEARNT_ON_AT_MOST)
        rows = np.sort(generator.permutation(len(paths))[:count])
        return LabelledImages(
            [paths[row] for row in rows], [int(labels[row]) for row in rows], chosen.classes
        )

    return (
        some(chosen.sketch_files, chosen.sketch_labels),
        some(chosen.photos, chosen.photo_labels),
    )


def _make_labelled(
    paths: tuple[Path, ...], labels: NDArray[np.int64], names: list[str]
) -> LabelledImages:
    return LabelledImages(paths, labels.tolist(), tuple(names))


def _find_unseen_classes(images: ImageSet, data: Path, split: Split) -> list[str]:
    names = [name for name in images.classes if split.is_unseen(name)]
    if not names:
        raise BadData(
            f"{data} has none of the {len(split.unseen)} unseen classes of {split.name}",
            ", ".join(split.unseen[:5]) + ", ...",
            "choose another split: --split NAME",
        )
    return names


def _open_own_split(training: dict[str, Any]) -> Split:
    """Return the split that the model was trained with, or the default."""
    unseen = training.get("unseen_classes")
    if not isinstance(unseen, list) or not unseen:
        return open_split(DEFAULT_SPLIT)
    name = _split_name(training)
    unseen_names = tuple(sorted(str(each) for each in unseen))
    return Split(name, unseen_names, is_file=name not in split_names())


def _split_name(training: dict[str, Any]) -> str:
    split = training.get("split")
    name = split.get("name") if isinstance(split, dict) else split
    return name if isinstance(name, str) and name else "the model's own split"


def _find_validation_classes(images: ImageSet, training: dict[str, Any]) -> list[str]:
    held_out = _read_names(training, "validation_classes")
    if not held_out:
        raise BadData(
            "the model's manifest names no validation classes",
            "training.validation_classes, which sbtk export writes",
            "use unseen classes: --classes unseen",
        )
    wanted = ClassNames(held_out)
    names = [name for name in images.classes if name in wanted]
    if not names:
        raise BadData(
            f"the data set has none of the model's {len(held_out)} validation classes",
            ", ".join(sorted(held_out)),
        )
    return names


def _refuse_leaks(manifest: BundleManifest, split: Split, names: list[str]) -> None:
    """Reject unseen classes that the model was trained on."""
    kept = _read_names(manifest.training, "unseen_classes")
    known = ClassNames(kept)
    leaked = [name for name in names if name not in known]
    if kept and leaked:
        raise BadData(
            f"{manifest.model_id} may have been trained on {', '.join(leaked)}, unseen classes of "
            f"{split.name}",
            "the split that the model was trained with",
            f"--split {_split_name(manifest.training)}, or no --split",
        )


def _read_names(training: dict[str, Any], key: str) -> tuple[str, ...]:
    """Return the class names under a key of the manifest."""
    names = training.get(key)
    return tuple(str(name) for name in names) if isinstance(names, list) else ()
