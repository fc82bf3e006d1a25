"""Retrieval quality of clean drawings compared with sketches, on classes not trained on.

    python -m benchmarks.drawings MODEL ... --strokes quickdraw.npz --distractors photos1000

A MODEL is a bundle (its INT8 on ONNX Runtime) or a training run (torch). The classes are a fold's
validation classes, never unseen ones. Clean drawings are the stroke file's drawings of these
classes, as crisp lines of 256 px.
"""

from __future__ import annotations

import argparse
import io
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from benchmarks.result import Result, print_result
from sbtk_runtime.bundle import Bundle
from sbtk_runtime.errors import BadConfig
from sbtk_runtime.evaluation.metrics import evaluate
from sbtk_runtime.files import read_json_object
from sbtk_runtime.preprocess import Kind
from sbtk_train.data.class_names import ClassNames
from sbtk_train.data.dataset import read_dataset
from sbtk_train.data.image_set import ImageSet, ImageSource
from sbtk_train.data.more_images import open_class_map
from sbtk_train.data.splits import Division, divide, open_split
from sbtk_train.data.strokes import Drawing, read_stroke_file, render
from sbtk_train.runs.checkpoint import RECORD

_DRAWING_PX = 256
_PER_CLASS = 25

Rows = NDArray[np.float32]
Embed = Callable[[Sequence[ImageSource], Kind], Rows]


def main() -> None:
    """Print the table for the models on the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="+", type=Path, metavar="MODEL")
    add_fold_options(parser)
    parser.add_argument("--strokes", type=Path, required=True)
    parser.add_argument("--distractors", type=Path, required=True, help="a folder of photos")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()

    images = read_fold(options)[1].validation
    drawings, drawing_labels = read_drawings(options.strokes, images.classes)
    others = sorted(options.distractors.glob("*.jpg"))
    rows, figures = [], {}
    for model in options.models:
        require_held_out(model, images.classes)
        embed = _embedder(model)
        photos, distractors = embed(images.photos, "photo"), embed(others, "photo")
        gallery = np.concatenate([photos, distractors])
        labels = np.concatenate([images.photo_labels, np.full(len(others), -1)])
        sketches, drawn = embed(images.sketches, "sketch"), embed(drawings, "sketch")
        ranks = first_right(drawn, drawing_labels, gallery, labels)
        found = {
            "sketches": mean_average_precision(
                sketches, images.sketch_labels, photos, images.photo_labels
            ),
            "sketches_distracted": mean_average_precision(
                sketches, images.sketch_labels, gallery, labels
            ),
            "drawings": mean_average_precision(drawn, drawing_labels, photos, images.photo_labels),
            "drawings_distracted": mean_average_precision(drawn, drawing_labels, gallery, labels),
            "first_right_rank_median": float(np.median(ranks)),
            "drawings_in_first_ten": float((ranks <= 10).mean()),
            "photos": _without_self(photos, images.photo_labels),
        }
        figures[str(model)] = found
        rows.append([model.name, *(f"{value:.3f}" for value in found.values())])
    columns = [
        "model",
        "sketches",
        f"+ {len(others):,} distractors",
        "clean drawings",
        f"+ {len(others):,} distractors",
        "median rank of the first right photo",
        "share with one in the first ten",
        "photos by photo",
    ]
    notes = [
        f"mAP@all; fold {options.fold} of {options.split}: {', '.join(images.classes)}",
        f"{len(images.sketches)} sketches, {len(drawings)} clean drawings of "
        f"{len(set(drawing_labels.tolist()))} of the classes, {len(images.photos)} photos",
    ]
    title = "Sketches and clean drawings of validation classes"
    print_result(
        Result(title, columns, rows, figures, notes), "benchmarks.drawings", as_json=options.json
    )


def add_fold_options(parser: argparse.ArgumentParser) -> None:
    """Add `--data`, `--split` and `--fold`: whose validation classes to measure on."""
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--split", default="SK-YE")
    parser.add_argument("--fold", type=int, default=0, help="division seed of the training run")


def read_fold(options: argparse.Namespace) -> tuple[ImageSet, Division]:
    """Return the data set of `add_fold_options`, and its division."""
    data = read_dataset(options.data)
    return data, divide(data, open_split(options.split, data.classes), seed=options.fold)


def are_held_out(model: Path | None, classes: Sequence[str]) -> bool:
    """Return whether a bundle (by default the pretrained one) or run never trained on `classes`."""
    return set(classes) <= set(training_facts(model).get("validation_classes", []))


def require_held_out(model: Path | None, classes: Sequence[str]) -> None:
    """End the program if a model was trained on some of `classes`."""
    if not are_held_out(model, classes):
        sys.exit(f"{_name(model)} was trained on some of {', '.join(classes)}: give its own --fold")


def require_no_others(model: Path | None, classes: Sequence[str]) -> None:
    """End the program if a model was also trained on classes that are not among a data set's."""
    facts = training_facts(model)
    unseen = ClassNames(facts.get("unseen_classes", []))
    seen = sum(unseen.find(name) is None for name in classes)
    found = facts["training_classes"]  # in a bundle their number
    count = found if isinstance(found, int) else len(found)
    if count > seen - len(facts.get("validation_classes", [])):
        sys.exit(f"{_name(model)} was trained on {count} classes, some from elsewhere than --data")


def training_facts(model: Path | None) -> dict[str, Any]:
    """Return what a bundle's manifest, or a run's record, says of the training."""
    if model is not None and (model / RECORD).is_file():
        return read_json_object(model / RECORD, BadConfig)
    return Bundle.open(model).manifest.training


def _name(model: Path | None) -> str:
    return "the pretrained model" if model is None else str(model)


def read_drawings(path: Path, classes: Sequence[str]) -> tuple[list[Drawing], NDArray[np.int64]]:
    """Return up to 25 drawings of each class, and their labels `(N,) int64`."""
    names, own = open_class_map("quickdraw-caltech").classes, ClassNames(classes)
    found: list[Drawing] = []
    labels: list[int] = []
    strokes = read_stroke_file(path)
    for name, drawing in zip(strokes.name_of, strokes.drawings, strict=True):
        known = own.find(names.get(name, name) or name)
        if known is not None and labels.count(label := list(classes).index(known)) < _PER_CLASS:
            found.append(drawing)
            labels.append(label)
    return found, np.array(labels, dtype=np.int64)


def _embedder(model: Path) -> Embed:
    return bundle_embedder(model) if (model / "manifest.json").exists() else _torch_embedder(model)


def bundle_embedder(model: Path | None) -> Embed:
    """Return a function that embeds with a bundle's INT8 on ONNX Runtime."""
    from sbtk_runtime import Embedder

    embedder = Embedder(model, engine="onnxruntime", precision="int8")

    def embed(sources: Sequence[ImageSource], kind: Kind) -> Rows:
        if all(isinstance(source, Path) for source in sources):
            items = embedder.stream((Path(str(source)) for source in sources), kind)
            return np.stack([item.row for item in items])  # type: ignore[union-attr]
        return np.stack([embedder.embed_one(image_bytes(source), kind)[0] for source in sources])

    return embed


def _torch_embedder(folder: Path) -> Embed:
    from sbtk_train.compute import choose_compute
    from sbtk_train.runs.checkpoint import load_run
    from sbtk_train.runs.sources import make_pixel_embedder

    run = load_run(folder)
    by_torch = make_pixel_embedder(
        run.config.recipe.preprocessing, choose_compute("cpu", "auto"), workers=2
    )
    return lambda sources, kind: by_torch(run.student, sources, kind).rows


def image_bytes(source: ImageSource) -> bytes:
    """Return the bytes of a file, or of a PNG of an image."""
    if isinstance(source, Path):
        return source.read_bytes()
    file = io.BytesIO()
    Image.fromarray(render(source.strokes, _DRAWING_PX)[:, :, 0]).save(file, "PNG")
    return file.getvalue()


def mean_average_precision(
    queries: Rows, labels: NDArray[np.int64], gallery: Rows, gallery_labels: NDArray[np.int64]
) -> float:
    """Return mAP@all."""
    return evaluate(queries, labels, gallery, gallery_labels).summary()["mAP@all"]


def first_right(
    queries: Rows, labels: NDArray[np.int64], gallery: Rows, gallery_labels: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Return the rank, from 1, of each query's first photo of its class."""
    order = np.argsort(-(queries @ gallery.T), axis=1, kind="stable")
    ranks: NDArray[np.int64] = (gallery_labels[order] == labels[:, None]).argmax(axis=1) + 1
    return ranks


def average_precision(is_right: NDArray[np.bool_]) -> float:
    """Return the average precision of a ranking `(N,) bool`, best first, with a right photo."""
    places = np.flatnonzero(is_right)
    return float(np.mean(np.arange(1, len(places) + 1) / (places + 1)))


def _without_self(photos: Rows, labels: NDArray[np.int64]) -> float:
    """Return the mAP of each photo as a query among all others."""
    scores = photos @ photos.T
    precisions = []
    for row in range(len(photos)):
        order = np.argsort(-np.delete(scores[row], row), kind="stable")
        precisions.append(average_precision(np.delete(labels, row)[order] == labels[row]))
    return float(np.mean(precisions))


if __name__ == "__main__":
    main()
