"""Retrieval quality of drawings with different line widths, rendered by the page in Chromium.

    python -m benchmarks.stroke_width --data DATA --strokes quickdraw.npz --distractors photos1000 \
        --freehand perfect-freehand/dist/esm/index.mjs

Drawings of a fold's validation classes, never unseen ones, are drawn with a speed that follows the
curvature (v ~ radius ** 1/3, Viviani and Flash 1995), a sample every 8 ms. The page's own modules
turn the samples into the image that is sent, with lines of one width and with those that the page
draws. perfect-freehand (npm) draws the same samples with its outlines.
"""

from __future__ import annotations

import argparse
import base64
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.chromium import open_chromium
from benchmarks.drawings import (
    add_fold_options,
    bundle_embedder,
    first_right,
    mean_average_precision,
    read_drawings,
    read_fold,
    require_held_out,
)
from benchmarks.result import Result, print_result

if TYPE_CHECKING:
    from playwright.sync_api import Page

    from sbtk_train.data.strokes import Drawing

_STATIC = Path(__file__).parents[1] / "sbtk_runtime" / "web" / "static"
_ORIGIN = "http://sbtk.test"
_SAMPLE_MS = 8.0
#: Units of the canvas (1,000 wide) per ms.
_SLOWEST, _FASTEST, _AT_RADIUS_100 = 0.3, 3.0, 1.5
_DRAWN_SHARE = 0.7

#: How a drawing is rendered; `thinning` is that of perfect-freehand.
VARIANTS: dict[str, dict[str, object]] = {
    "one width": {"kind": "page", "isTimed": False},
    "the page: thinner when fast": {"kind": "page", "isTimed": True},
    "perfect-freehand, thinning 0.3": {"kind": "freehand", "thinning": 0.3},
    "perfect-freehand, thinning 0.5 (its default)": {"kind": "freehand", "thinning": 0.5},
}
_RENDER = """async ([strokes, variant]) => {
    const { Drawing, LINE_WIDTHS, StrokeBuilder } = await import("/static/drawing.js");
    const { renderImage } = await import("/static/rendering.js");
    const drawing = new Drawing();
    for (const samples of strokes) {
        const [first, ...others] = samples.map(([x, y, time]) => ({
            x, y, pressure: null, timeMs: variant.isTimed ? time : 0 }));
        const builder = new StrokeBuilder("pen", LINE_WIDTHS.medium, first);
        for (const sample of others) builder.add(sample);
        const stroke = builder.finish();
        if (!variant.isTimed) for (const point of stroke.points) point.width = LINE_WIDTHS.medium;
        drawing.add(stroke);
    }
    let blob = await renderImage(drawing);
    if (variant.kind === "freehand") {
        const { getStroke } = await import("/freehand.mjs");
        const side = (await createImageBitmap(blob)).width;
        const canvas = new OffscreenCanvas(side, side);
        const context = canvas.getContext("2d");
        context.fillStyle = "#fff";
        context.fillRect(0, 0, side, side);
        context.scale(side / 1000, side / 1000);
        context.fillStyle = "#000";
        for (const samples of strokes) {
            const outline = getStroke(samples.map(([x, y]) => [x, y]), {
                size: LINE_WIDTHS.medium, thinning: variant.thinning, last: true });
            context.beginPath();
            for (const [x, y] of outline) context.lineTo(x, y);
            context.closePath();
            context.fill();
        }
        blob = await canvas.convertToBlob({ type: "image/png" });
    }
    const bytes = new Uint8Array(await blob.arrayBuffer());
    return btoa(Array.from(bytes, (byte) => String.fromCharCode(byte)).join(""));
}"""


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_fold_options(parser)
    parser.add_argument("--strokes", type=Path, required=True)
    parser.add_argument("--distractors", type=Path, required=True, help="a folder of photos")
    parser.add_argument("--freehand", type=Path, required=True, help="perfect-freehand's module")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()

    images = read_fold(options)[1].validation
    require_held_out(None, images.classes)
    drawings, labels = read_drawings(options.strokes, images.classes)
    embed = bundle_embedder(None)
    others = sorted(options.distractors.glob("*.jpg"))
    gallery = np.concatenate([embed(images.photos, "photo"), embed(others, "photo")])
    gallery_labels = np.concatenate([images.photo_labels, np.full(len(others), -1)])
    rows, figures = [], {}
    for name, files in _render(drawings, options.freehand).items():
        queries = _embed_files(files)
        ranks = first_right(queries, labels, gallery, gallery_labels)
        figures[name] = {
            "map": mean_average_precision(queries, labels, gallery, gallery_labels),
            "in_first_ten": float((ranks <= 10).mean()),
            "median_rank": float(np.median(ranks)),
        }
        one = figures[name]
        shown = [f"{one['map']:.4f}", f"{one['in_first_ten']:.1%}", f"{one['median_rank']:.0f}"]
        rows.append([name, *shown])
    columns = ["lines", "mAP@all", "a right photo among the first ten", "median rank of the first"]
    notes = [
        f"fold {options.fold} of {options.split}, validation: {', '.join(images.classes)}",
        f"{len(drawings)} drawings of {len(set(labels.tolist()))} of the classes against "
        f"{len(images.photos)} photos and {len(others):,} distractors; the included bundle, INT8",
    ]
    title = "Line widths of drawings, as the page renders them"
    result = Result(title, columns, rows, figures, notes)
    print_result(result, "benchmarks.stroke_width", as_json=options.json)


def _render(drawings: list[Drawing], freehand: Path) -> dict[str, list[bytes]]:
    """Return the PNG files of the drawings by variant."""
    sampled = [_samples(drawing) for drawing in drawings]
    with open_chromium() as browser:
        page = browser.new_page()
        _serve(page, freehand)
        page.goto(f"{_ORIGIN}/")
        files = {
            name: [
                base64.b64decode(page.evaluate(_RENDER, [strokes, variant])) for strokes in sampled
            ]
            for name, variant in VARIANTS.items()
        }
    return files


def _serve(page: Page, freehand: Path) -> None:
    script: dict[str, Any] = {"content_type": "text/javascript"}
    page.route(f"{_ORIGIN}/", lambda route: route.fulfill(body="<!doctype html>"))
    page.route(f"{_ORIGIN}/freehand.mjs", lambda route: route.fulfill(path=freehand, **script))
    page.route(
        f"{_ORIGIN}/static/*",
        lambda route: route.fulfill(path=_STATIC / route.request.url.rpartition("/")[2], **script),
    )


def _samples(drawing: Drawing) -> list[list[tuple[float, float, float]]]:
    """Return x and y in units of the canvas and the time in ms, of each stroke's samples."""
    points = np.concatenate(drawing.strokes)
    low, high = points.min(axis=0), points.max(axis=0)
    scale = 1000 * _DRAWN_SHARE / max(float((high - low).max()), 1.0)
    placed = [(stroke - (low + high) / 2) * scale + 500 for stroke in drawing.strokes]
    return [_timed(stroke) for stroke in placed]


def _timed(stroke: NDArray[np.float32]) -> list[tuple[float, float, float]]:
    steps = np.hypot(*np.diff(stroke, axis=0).T) if len(stroke) > 1 else np.zeros(0)
    length = float(steps.sum())
    if length < 2:
        return [(float(stroke[0, 0]), float(stroke[0, 1]), 0.0)]
    # Points one unit apart, whose directions are compared over 16 units.
    along = np.concatenate([[0.0], np.cumsum(steps)])
    at = np.linspace(0, length, max(3, round(length)))
    dense = np.stack([np.interp(at, along, stroke[:, axis]) for axis in (0, 1)], axis=1)
    before = dense[np.maximum(np.arange(len(dense)) - 8, 0)]
    after = dense[np.minimum(np.arange(len(dense)) + 8, len(dense) - 1)]
    incoming, outgoing = dense - before, after - dense
    turn = np.abs(
        np.arctan2(
            incoming[:, 0] * outgoing[:, 1] - incoming[:, 1] * outgoing[:, 0],
            (incoming * outgoing).sum(axis=1),
        )
    )
    radius = 8 / np.maximum(turn, 1e-3)
    speed = _AT_RADIUS_100 * (radius / 100) ** (1 / 3)
    # The pen starts and ends slowly.
    speed *= np.minimum(1, 0.2 + np.minimum(at, length - at) / 60)
    times = np.concatenate([[0.0], np.cumsum(np.diff(at) / speed.clip(_SLOWEST, _FASTEST)[1:])])
    sampled = np.append(np.arange(0, times[-1], _SAMPLE_MS), times[-1])
    x, y = (np.interp(sampled, times, dense[:, axis]) for axis in (0, 1))
    return [(float(a), float(b), float(c)) for a, b, c in zip(x, y, sampled, strict=True)]


def _embed_files(files: list[bytes]) -> NDArray[np.float32]:
    from sbtk_runtime import Embedder

    with Embedder(None, engine="onnxruntime", precision="int8") as embedder:
        return np.stack([embedder.embed_one(file, "sketch")[0] for file in files])


if __name__ == "__main__":
    main()
