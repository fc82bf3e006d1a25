"""Validation on seen classes during training, with the runtime's metrics."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from sbtk_runtime.binary_codes import fit_itq
from sbtk_runtime.errors import BadConfig, BadData
from sbtk_runtime.evaluation.metrics import evaluate
from sbtk_runtime.evaluation.protocol import Measure
from sbtk_train.config import Selection
from sbtk_train.data.image_set import ImageSet, Rows, select_images
from sbtk_train.data.splits import Division
from sbtk_train.models.student import Student
from sbtk_train.runs.sources import Embed

#: Photos of each training class in the gallery for held-out sketches.
HELD_OUT_PHOTOS_PER_CLASS = 5
#: DSN validates on 300 batches of 48 training photos.
_DSN_PHOTOS = 14_400
_DSN_BITS = 64
_MIN_BITS = 8

#: The metric of each selection rule; `None`: the last epoch is kept.
SELECTION_METRICS: dict[Selection, str | None] = {
    "validation-map": "validation_map",
    "held-out-bits": "held_out_bits_map",
    "held-out-accuracy": "held_out_accuracy",
    "last": None,
}


def score(student: Student, data: ImageSet, embed: Embed) -> dict[str, float]:
    """Return the retrieval metrics of `data`'s sketches against its photos."""
    sketches = embed(student, data.sketches, "sketch").rows
    photos = embed(student, data.photos, "photo").rows
    return evaluate(sketches, data.sketch_labels, photos, data.photo_labels).summary()


def require_selectable(division: Division, selection: Selection, dim: int) -> None:
    """Check that the selection metric is defined for the data and the embedding size.

    Raises:
        BadConfig: the embedding is too short for binary codes.
        BadData: there are too few held-out sketches to fit binary codes on.
    """
    if selection != "held-out-bits":
        return
    if dim < _MIN_BITS:
        raise BadConfig(
            f"--dim {dim} with selection by binary codes of the embeddings",
            f"at least {_MIN_BITS}",
            f"--dim {_MIN_BITS}, or --selection validation-map or last",
        )
    count = len(division.held_out.sketches)
    if count <= _MIN_BITS:
        raise BadData(
            f"{count} held-out sketches with selection by their binary codes",
            f"more than {_MIN_BITS}",
            "--selection validation-map or last, or data with more sketches",
        )


def validate(
    student: Student, division: Division, selection: Selection, embed: Embed
) -> dict[str, float]:
    """Return the metrics of a student on validation classes and held-out images.

    `validation_map` (mAP@all) and `validation_p10` are on whole classes held out from training, if
    there are any. `held_out_map` is mAP@all of held-out sketches of training classes among five
    training photos of each class. The selection metrics `held_out_accuracy` (SAKE) and
    `held_out_bits_map` (DSN: 64-bit codes of held-out sketches among training photos, ITQ fitted on
    the sketches, mean over classes) are computed if they select.
    """
    figures: dict[str, float] = {}
    if division.validation.classes:
        unlike = score(student, division.validation, embed)
        figures["validation_map"] = unlike["mAP@all"]
        figures["validation_p10"] = unlike.get("P@10", float("nan"))
    held_out = division.held_out
    sketches = embed(student, held_out.sketches, "sketch")
    few = limit_photos(held_out)
    photos = embed(student, few.photos, "photo")
    alike = evaluate(sketches.rows, few.sketch_labels, photos.rows, few.photo_labels).summary()
    figures["held_out_map"] = alike["mAP@all"]
    if selection == "held-out-accuracy":
        correct = sketches.predicted == held_out.sketch_labels
        if (apart := division.held_out_photos) is not None:
            predicted = embed(student, apart.photos, "photo").predicted
            correct = np.concatenate([correct, predicted == apart.photo_labels])
        figures["held_out_accuracy"] = float(correct.mean())
    if selection == "held-out-bits":
        figures["held_out_bits_map"] = _bits_map(student, held_out, sketches.rows, embed)
    return figures


def _bits_map(
    student: Student, held_out: ImageSet, sketches: NDArray[np.float32], embed: Embed
) -> float:
    """Return DSN's validation metric: mAP (VOC, class mean) of binary codes."""
    rng = np.random.default_rng(0)
    order = rng.permutation(len(held_out.photos))[:_DSN_PHOTOS]
    paths = [held_out.photos[row] for row in order]
    photos = embed(student, paths, "photo").rows
    bits = max(_MIN_BITS, min(_DSN_BITS, sketches.shape[1] // 8 * 8, (len(sketches) - 1) // 8 * 8))
    itq = fit_itq(sketches, bits)
    found = evaluate(
        itq.codes(sketches),
        held_out.sketch_labels,
        itq.centred_on(photos).codes(photos),
        held_out.photo_labels[order],
        distance="hamming",
    )
    measure = Measure("AP", is_voc=True, mean="class")
    return found.metrics([measure])[measure.name]


def limit_photos(data: ImageSet) -> ImageSet:
    """Return the set with the first five photos of each class."""
    rows: Rows = np.concatenate(
        [
            np.flatnonzero(data.photo_labels == label)[:HELD_OUT_PHOTOS_PER_CLASS]
            for label in range(len(data.classes))
        ]
    )
    return select_images(data, photos=rows)
