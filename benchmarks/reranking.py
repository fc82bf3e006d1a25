"""Retrieval quality with re-ranking, on galleries with few and with many photos per class.

    python -m benchmarks.reranking --data sketchy125 --distractors photos1000

Classes are a fold's validation classes and held-out sketches of training classes, never unseen
ones, unless the model was trained on them. Also reports the rank of the photo that a sketch was
drawn from. With --strokes and --photos, such as Quick, Draw! and Caltech-101, also clean drawings
of classes that the data do not have.
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
    are_held_out,
    bundle_embedder,
    read_fold,
    require_no_others,
)
from benchmarks.result import Result, print_result
from sbtk_runtime.evaluation.metrics import evaluate
from sbtk_runtime.rerank import RERANKS, Rerank, Reranker
from sbtk_train.data import ImageSet
from sbtk_train.data.class_names import ClassNames
from sbtk_train.data.more_images import open_class_map
from sbtk_train.data.stroke_files import Drawing, read_stroke_file

_PHOTOS_PER_CLASS = (1, 5, 10, 25)
_DRAWINGS_PER_CLASS = 25

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

    data, division = read_fold(options)
    embed = bundle_embedder(options.model)
    distractors = embed(sorted(options.distractors.glob("*.jpg")), "photo")
    rows, figures = [], {}
    sets, of_fold = [], ""
    if are_held_out(options.model, division.validation.classes):
        sets = [
            ("validation", division.validation, division.validation),
            ("training", division.held_out, division.training),
        ]
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
            own = _own_photo(asked, [searched.photos[row] for row in kept])
            found = {
                how: _figures(sketches, asked.sketch_labels, gallery, labels, own, how)
                for how in RERANKS
            }
            figures[f"{name}-{count}"] = found
            cells = [_cell(value) for how in RERANKS for value in found[how].values()]
            rows.append([name, str(count), *cells])
    columns = ["classes", "photos per class"]
    columns += [f"{how}: {key}" for how in RERANKS for key in ("mAP@all", "P@10", "own R@10")]
    notes = [
        f"{len(distractors):,} distractors{of_fold}",
        "own R@10: share of sketches whose own photo, if in the gallery, is among the first ten",
    ]
    print_result(
        Result("Re-ranking by photos of a class", columns, rows, figures, notes),
        "benchmarks.reranking",
        as_json=options.json,
    )


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
    if not len(asked):
        return {"map": found["mAP@all"], "p10": found["P@10"], "own": math.nan}
    scores = Reranker(gallery, how).scores(sketches[asked])
    own_score = scores[np.arange(len(asked)), own[asked]]
    ranks = (scores > own_score[:, None]).sum(axis=1) + 1
    return {"map": found["mAP@all"], "p10": found["P@10"], "own": float((ranks <= 10).mean())}


def _cell(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.3f}"


def _first_of_each(labels: Labels, count: int) -> Labels:
    rows = [np.flatnonzero(labels == label)[:count] for label in np.unique(labels)]
    return np.concatenate(rows)


def _own_photo(asked: ImageSet, photos: list[Path]) -> Labels:
    """Return the index of each sketch's photo, `<id>.jpg` of `<id>-<k>.png`; -1 if missing."""
    place = {(photo.parent.name, photo.stem): number for number, photo in enumerate(photos)}
    return np.array(
        [
            place.get((sketch.parent.name, sketch.stem.rpartition("-")[0]), -1)
            for sketch in asked.sketch_files
        ]
    )


if __name__ == "__main__":
    main()
