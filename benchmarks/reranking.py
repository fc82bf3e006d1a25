"""Retrieval quality with re-ranking, on galleries with few and with many photos per class.

    python -m benchmarks.reranking --data sketchy125 --distractors photos1000

Classes are a fold's validation classes and held-out sketches of training classes, never unseen
ones; of a model without validation classes, only the latter. Also reports the rank of the very
photo that a sketch was drawn from. With --strokes and --photos, such as Quick, Draw! and
Caltech-101, also clean drawings of classes that the data do not have.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks.drawings import (
    add_fold_options,
    bundle_embedder,
    require_no_others,
    training_facts,
)
from benchmarks.result import Result, print_result
from sbtk_runtime.evaluation.metrics import evaluate
from sbtk_runtime.rerank import RERANKS, Rerank, Reranker
from sbtk_train.data.class_names import ClassNames
from sbtk_train.data.dataset import read_dataset
from sbtk_train.data.image_set import ImageSet
from sbtk_train.data.more_images import open_class_map
from sbtk_train.data.splits import Division, divide, open_split
from sbtk_train.data.strokes import Drawing, read_stroke_file

_PHOTOS_PER_CLASS = (1, 5, 10, 25)
_DRAWINGS_PER_CLASS = 25
_OWN_RANKS = (1, 10)

Rows = NDArray[np.float32]
Labels = NDArray[np.int64]


def main() -> None:
    """Print a row for each kind of classes and number of photos per class."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, help="a bundle; by default the pretrained one")
    add_fold_options(parser)
    parser.add_argument("--distractors", type=Path, required=True, help="a folder of photos")
    parser.add_argument("--strokes", type=Path, help="stroke file of clean drawings")
    parser.add_argument("--photos", type=Path, help="class folders with photos of the same things")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()

    data = read_dataset(options.data)
    division = own_division(data, options.model, options.split, options.fold)
    embed = bundle_embedder(options.model)
    distractors = embed(sorted(options.distractors.glob("*.jpg")), "photo")
    rows, figures = [], {}
    sets, of_fold = [], ""
    if division is not None:
        sets = [("training", division.held_out, division.training)]
        if division.validation.classes:
            sets.insert(0, ("validation", division.validation, division.validation))
        of_fold = f"; fold {options.fold} of {options.split}"
    if options.strokes is not None and options.photos is not None:
        require_no_others(options.model, data.classes)
        drawn = clean_drawings(options.strokes, options.photos, data.classes)
        sets.append((f"{len(drawn.classes)} others, clean drawings", drawn, drawn))
    for name, asked, searched in sets:
        sketches = embed(asked.sketches, "sketch")
        photos = embed(searched.photos, "photo")
        for count in _PHOTOS_PER_CLASS:
            kept = _first_of_each(searched.photo_labels, count)
            gallery = np.concatenate([photos[kept], distractors])
            labels = np.concatenate([searched.photo_labels[kept], np.full(len(distractors), -1)])
            own = own_photos(asked, [searched.photos[row] for row in kept])
            found = {
                how: _figures(sketches, asked.sketch_labels, gallery, labels, own, how)
                for how in RERANKS
            }
            figures[f"{name}-{count}"] = found
            cells = [_cell(value) for how in RERANKS for value in found[how].values()]
            rows.append([name, str(count), *cells])
    columns = ["classes", "photos per class"]
    names = ("mAP@all", "P@10", *(f"own R@{count}" for count in _OWN_RANKS))
    columns += [f"{how}: {key}" for how in RERANKS for key in names]
    notes = [
        f"{len(distractors):,} distractors{of_fold}",
        "own R@k: share of sketches whose own photo, if in the gallery, is among the first k",
    ]
    print_result(
        Result("Re-ranking by photos of a class", columns, rows, figures, notes),
        "benchmarks.reranking",
        as_json=options.json,
    )


def own_division(data: ImageSet, model: Path | None, split: str, fold: int) -> Division | None:
    """Return the division that a bundle or run was trained by; `None` if it was another one."""
    facts = training_facts(model)
    validation = facts.get("validation_classes", [])
    division = divide(
        data, open_split(split, data.classes), seed=fold, validation_classes=len(validation)
    )
    is_own = (
        list(division.validation.classes) == sorted(validation)
        and facts.get("division_seed", 0) == fold
        and facts["split"]["name"] == split
    )
    return division if is_own else None


def clean_drawings(strokes: Path, photos: Path, known: Sequence[str]) -> ImageSet:
    """Return drawings and photos of the classes in both that are not in `known`."""
    names, own = open_class_map("quickdraw-caltech").classes, ClassNames(known)
    drawings: dict[str, list[Drawing]] = {}
    file = read_stroke_file(strokes)
    for name, drawing in zip(file.name_of, file.drawings, strict=True):
        drawings.setdefault(names.get(name, name), []).append(drawing)
    folders = {names.get(folder.name, folder.name): folder for folder in sorted(photos.iterdir())}
    classes = tuple(
        sorted(name for name in folders.keys() & drawings.keys() if name and own.find(name) is None)
    )
    found = [
        (drawings[name][:_DRAWINGS_PER_CLASS], sorted(folders[name].iterdir())) for name in classes
    ]
    return ImageSet(
        classes,
        tuple(drawing for drawn, _ in found for drawing in drawn),
        np.repeat(np.arange(len(found)), [len(drawn) for drawn, _ in found]),
        tuple(photo for _, shown in found for photo in shown),
        np.repeat(np.arange(len(found)), [len(shown) for _, shown in found]),
    )


def _figures(
    sketches: Rows, labels: Labels, gallery: Rows, gallery_labels: Labels, own: Labels, how: Rerank
) -> dict[str, float]:
    found = evaluate(sketches, labels, gallery, gallery_labels, rerank=how).summary()
    asked = np.flatnonzero(own >= 0)
    shares = {f"own_r{count}": math.nan for count in _OWN_RANKS}
    if len(asked):
        ranks = own_ranks(Reranker(gallery, how).scores(sketches[asked]), own[asked])
        shares = {f"own_r{count}": float((ranks <= count).mean()) for count in _OWN_RANKS}
    return {"map": found["mAP@all"], "p10": found["P@10"]} | shares


def own_ranks(scores: Rows, own: Labels) -> Labels:
    """Return the rank `(N,)`, from 1, of photo `own (N,)` in each row of `scores (N, P)`."""
    own_scores = scores[np.arange(len(own)), own]
    ranks: Labels = (scores > own_scores[:, None]).sum(axis=1) + 1
    return ranks


def _cell(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.3f}"


def _first_of_each(labels: Labels, count: int) -> Labels:
    rows = [np.flatnonzero(labels == label)[:count] for label in np.unique(labels)]
    return np.concatenate(rows)


def own_photos(asked: ImageSet, photos: Sequence[Path]) -> Labels:
    """Return the index in `photos` of the photo that each sketch was drawn from; -1 if missing.

    In Sketchy, `<id>-<k>.png` is the k-th sketch of `<id>.jpg` of the same class.
    """
    place = {(photo.parent.name, photo.stem): number for number, photo in enumerate(photos)}
    return np.array(
        [
            place.get((sketch.parent.name, sketch.stem.rpartition("-")[0]), -1)
            for sketch in asked.sketch_files
        ]
    )


if __name__ == "__main__":
    main()
