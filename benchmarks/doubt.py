"""Calibration of the rule for close matches, and its error rates.

    python -m benchmarks.doubt BUNDLE --data sketchy125 --distractors photos1000 caltech101/photo

Queries are sketches of a fold's validation classes, never unseen ones; with --strokes and --photos,
clean drawings of classes that the data do not have, for a model that was trained on all seen
classes. Each query runs twice on
galleries of distractors and 1, 5 or 25 photos per class: with its class and without. The rule is a
line fitted to the tenth percentile of the best cosine, by the logarithm of the gallery's size,
among queries with a relevant photo in the first ten hits. `--write` stores it in the bundle.
"""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from benchmarks.drawings import bundle_embedder, require_held_out, require_no_others
from benchmarks.reranking import clean_drawings
from benchmarks.result import Result, print_result
from sbtk_export.card import CARD_NAME, render_model_card
from sbtk_runtime.files import write_atomically
from sbtk_runtime.manifest import FileRecord, MatchRule, read_bundle_manifest
from sbtk_train.data.dataset import read_dataset
from sbtk_train.data.splits import divide, open_split

SIZES = (50, 100, 300, 1000, 3000, 6000)
_PER_CLASS = (1, 5, 25)
_ROUNDS = 3
_FIRST = 10
_FALSE_ALARMS = 0.1

Rows = NDArray[np.float32]


class Outcome(NamedTuple):
    """The result of one query on one gallery."""

    photos: int
    per_class: int
    is_there: bool
    is_found: bool
    best: float


def main() -> None:
    """Print the rule and its error rates."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--split", default="SK-YE")
    parser.add_argument("--fold", type=int, default=0, help="division seed of the training run")
    parser.add_argument("--distractors", type=Path, nargs="+", required=True)
    parser.add_argument("--strokes", type=Path, help="stroke file of clean drawings")
    parser.add_argument("--photos", type=Path, help="class folders with photos of the same things")
    parser.add_argument("--write", action="store_true", help="store the rule in the bundle")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()

    data = read_dataset(options.data)
    if options.strokes is not None and options.photos is not None:
        require_no_others(options.bundle, data.classes)
        images = clean_drawings(options.strokes, options.photos, data.classes)
        asked = "clean drawings of classes of other data"
    else:
        split = open_split(options.split, data.classes)
        images = divide(data, split, seed=options.fold).validation
        require_held_out(options.bundle, images.classes)
        asked = f"sketches of validation classes, fold {options.fold} of {options.split}"
    embed = bundle_embedder(options.bundle)
    found = {path for root in options.distractors for path in root.rglob("*.jpg")}
    others = sorted(found - set(images.photos))
    outcomes = list(
        run_queries(
            *(embed(images.sketches, "sketch"), images.sketch_labels),
            *(embed(images.photos, "photo"), images.photo_labels),
            embed(others, "photo"),
        )
    )
    rule = fit_rule(outcomes)
    rows, figures = [], []
    for photos in sorted({each.photos for each in outcomes}):
        for per_class in _PER_CLASS:
            false, caught = error_rates(outcomes, rule, photos, per_class)
            rows.append([f"{photos:,}", str(per_class), f"{false:.2f}", f"{caught:.2f}"])
            figures.append((photos, per_class, false, caught))
    if options.write:
        write_rule(options.bundle, rule, figures, asked)
    columns = [
        "photos",
        "per class",
        "found, but no close match reported",
        "absent, and no close match reported",
    ]
    notes = [
        f"close from {rule.intercept:.4f} + {rule.per_decade:.4f} log10(photos)",
        f"{asked}: {', '.join(images.classes)}",
        f"{len(images.sketches)} sketches, {len(others):,} distractors, {_ROUNDS} draws of each",
    ]
    title = "Error rates of 'no close match'"
    result = {"rule": [rule.intercept, rule.per_decade], "rates": figures}
    print_result(
        Result(title, columns, rows, result, notes), "benchmarks.doubt", as_json=options.json
    )


def run_queries(
    sketches: Rows,
    sketch_labels: NDArray[np.int64],
    photos: Rows,
    photo_labels: NDArray[np.int64],
    distractors: Rows,
) -> Iterator[Outcome]:
    """Search for every sketch in galleries with and without its class."""
    rng = np.random.default_rng(0)
    classes = np.unique(sketch_labels).tolist()
    for size in SIZES:
        for per_class in _PER_CLASS:
            filler = max(size - per_class * len(classes), len(classes))
            for _ in range(_ROUNDS):
                chosen = distractors[rng.permutation(len(distractors))[:filler]]
                of_class = {
                    label: rng.permutation(np.flatnonzero(photo_labels == label))[:per_class]
                    for label in classes
                }
                for label in classes:
                    queries = sketches[sketch_labels == label]
                    rest = [photos[of_class[other]] for other in classes if other != label]
                    yield from _outcomes(
                        queries, photos[of_class[label]], np.concatenate([chosen, *rest]), size
                    )


def _outcomes(queries: Rows, right: Rows, wrong: Rows, size: int) -> Iterator[Outcome]:
    right_scores, wrong_scores = queries @ right.T, np.sort(queries @ wrong.T, axis=1)[:, ::-1]
    best_right, best_wrong = right_scores.max(axis=1), wrong_scores[:, 0]
    is_found = best_right >= wrong_scores[:, min(_FIRST, wrong_scores.shape[1]) - 1]
    for index in range(len(queries)):
        best = float(max(best_right[index], best_wrong[index]))
        yield Outcome(size, len(right), True, bool(is_found[index]), best)
        yield Outcome(size, len(right), False, False, float(best_wrong[index]))


def fit_rule(outcomes: Sequence[Outcome]) -> MatchRule:
    """Fit a line to the percentile of false alarms at each size."""
    sizes = sorted({each.photos for each in outcomes})
    lowest = [
        np.quantile([o.best for o in outcomes if o.photos == size and o.is_found], _FALSE_ALARMS)
        for size in sizes
    ]
    per_decade, intercept = np.polyfit(np.log10(sizes), lowest, 1)
    return MatchRule(round(float(intercept), 4), round(float(per_decade), 4))


def error_rates(
    outcomes: Sequence[Outcome], rule: MatchRule, photos: int, per_class: int
) -> tuple[float, float]:
    """Return the shares of weak matches among found queries and among absent ones."""
    lowest = rule.lowest_close(photos)
    these = [each for each in outcomes if (each.photos, each.per_class) == (photos, per_class)]
    found = [each.best < lowest for each in these if each.is_found]
    absent = [each.best < lowest for each in these if not each.is_there]
    return float(np.mean(found)), float(np.mean(absent))


def write_rule(
    bundle: Path, rule: MatchRule, rates: Sequence[tuple[int, int, float, float]], asked: str
) -> None:
    """Put the rule and its error rates into the manifest and the model card of a bundle.

    Args:
        bundle: the bundle's folder.
        rule: the rule.
        rates: photos, photos per class, and the two error rates of each kind of gallery.
        asked: what the queries were, in words.
    """
    manifest = read_bundle_manifest(bundle)
    false, caught = ([rate[column] for rate in rates] for column in (2, 3))
    few = [rate[3] for rate in rates if rate[0] <= 100]
    metrics = manifest.metrics | {
        "no_close_match": {
            "false_alarms": f"{min(false):.2f} to {max(false):.2f}",
            "found": f"{min(caught):.2f} to {max(caught):.2f}; "
            f"up to 100 photos {min(few):.2f} to {max(few):.2f}",
            "rule": f"{asked} in galleries of 50 to 6,000 photos, with 1, 5 "
            "or 25 of their class: share called no close match although one of the first ten "
            "photos is right, and share of those without their class that are called so",
        }
    }
    changed = replace(manifest, match_rule=rule, metrics=metrics)
    card = render_model_card(changed).encode()
    record = FileRecord(hashlib.sha256(card).hexdigest(), len(card))
    write_atomically(bundle / CARD_NAME, card)
    replace(changed, files=manifest.files | {CARD_NAME: record}).write(bundle)


if __name__ == "__main__":
    main()
