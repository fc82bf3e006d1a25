"""The gain of "more like this" and "less like this", by the weights of liked and disliked photos.

    python -m benchmarks.feedback BUNDLE --data sketchy125 --distractors photos1000

Queries are sketches of a fold's validation classes, never unseen ones. A simulated user sees the
first 12 hits, likes up to two right ones and dislikes up to two wrong ones. Judged photos are
excluded from the ranking before and after, so the gain is that of the other photos.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks.drawings import (
    add_fold_options,
    average_precision,
    bundle_embedder,
    read_fold,
    require_held_out,
)
from benchmarks.result import Result, print_result
from sbtk_runtime.rerank import DISLIKED_WEIGHT, LIKED_WEIGHT, refine

#: Relative to the sketch, whose weight is 1; with infinity only liked photos count.
LIKED_WEIGHTS = (0.0, 0.5, 1.0, 2.0, 4.0, math.inf)
DISLIKED_WEIGHTS = (0.0, 0.25, 0.5, 1.0)
_LOOKED_AT = 12
_JUDGED = 2

Rows = NDArray[np.float32]


def main() -> None:
    """Print mAP before and after, for each pair of weights."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle", type=Path)
    add_fold_options(parser)
    parser.add_argument("--distractors", type=Path, required=True)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()

    images = read_fold(options)[1].validation
    require_held_out(options.bundle, images.classes)
    embed = bundle_embedder(options.bundle)
    others = sorted(options.distractors.rglob("*.jpg"))
    gallery = np.concatenate([embed(images.photos, "photo"), embed(others, "photo")])
    labels = np.concatenate([images.photo_labels, np.full(len(others), -1)])
    sketches = embed(images.sketches, "sketch")
    before = mean_precision(sketches, images.sketch_labels, gallery, labels, 0.0, 0.0)
    rows, figures = [], [(0.0, 0.0, *before)]
    for liked in LIKED_WEIGHTS:
        for disliked in DISLIKED_WEIGHTS:
            found = mean_precision(sketches, images.sketch_labels, gallery, labels, liked, disliked)
            figures.append((liked, disliked, *found))
            weight = "no sketch" if math.isinf(liked) else f"{liked:g}"
            rows.append([weight, f"{disliked:g}", *(f"{each:.3f}" for each in found)])
    columns = ["weight of liked", "weight of disliked", "mAP@all, others", "P@10, others"]
    notes = [
        "weights 0 and 0: without feedback",
        f"in use: {LIKED_WEIGHT:g} and {DISLIKED_WEIGHT:g}",
        f"fold {options.fold} of {options.split}: {', '.join(images.classes)}",
        f"{len(sketches)} sketches, {len(images.photos)} photos of their classes, "
        f"{len(others):,} distractors",
    ]
    title = "Relevance feedback by its weights"
    print_result(
        Result(title, columns, rows, {"rows": figures}, notes),
        "benchmarks.feedback",
        as_json=options.json,
    )


def mean_precision(
    sketches: Rows,
    sketch_labels: NDArray[np.int64],
    gallery: Rows,
    labels: NDArray[np.int64],
    liked_weight: float,
    disliked_weight: float,
) -> tuple[float, float]:
    """Return mAP@all and P@10 of the photos that were not judged, after one round of feedback."""
    precisions, firsts = [], []
    for sketch, label in zip(sketches, sketch_labels, strict=True):
        is_right = labels == label
        seen = np.argsort(-(gallery @ sketch), kind="stable")[:_LOOKED_AT]
        liked, disliked = seen[is_right[seen]][:_JUDGED], seen[~is_right[seen]][:_JUDGED]
        is_only_liked = math.isinf(liked_weight) and len(liked) > 0
        query = refine(
            *(None if is_only_liked else sketch, gallery[liked], gallery[disliked]),
            liked_weight=1.0 if math.isinf(liked_weight) else liked_weight,
            disliked_weight=disliked_weight,
        )
        order = np.argsort(-(gallery @ query), kind="stable")
        ranked = is_right[order[~np.isin(order, np.concatenate([liked, disliked]))]]
        precisions.append(average_precision(ranked))
        firsts.append(float(ranked[:10].mean()))
    return float(np.mean(precisions)), float(np.mean(firsts))


if __name__ == "__main__":
    main()
