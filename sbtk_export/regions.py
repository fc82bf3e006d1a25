"""Regions of an exported model: its files compared with torch, or with its most exact file.

The graph of regions is made from a bundle's own ONNX files when it is needed (see
`sbtk_runtime.region_graph`), so nothing is added to a bundle but what was measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from sbtk_export.export import VARIANTS, Variant, file_name, precision_and_form, write_manifest
from sbtk_runtime.bundle import Bundle
from sbtk_runtime.engines import onnxruntime as engine_onnxruntime
from sbtk_runtime.engines.base import EngineOptions, EngineRequest
from sbtk_runtime.errors import BadConfig, BadData, BadImage, BadModel
from sbtk_runtime.files import printable_name, write_atomically
from sbtk_runtime.generated_inputs import generate_photos
from sbtk_runtime.images import read_image_bytes
from sbtk_runtime.preprocess import SIZE_PX, Pixels, domains_of, prepare
from sbtk_runtime.region_graph import region_graph
from sbtk_runtime.regions import CELL_PX, RegionGrid
from sbtk_train.batches.augment import normalise
from sbtk_train.data import read_dataset
from sbtk_train.data.splits import class_key
from sbtk_train.models.student import Student
from sbtk_train.progress import Notify

#: Photos that regions are compared on.
PHOTOS = 16
# Smallest and mean cosine. A window has fewer cells than the frame to average errors over, so the
# smallest of INT8 is below that of whole frames.
_LIMITS = {"fp32": (0.9999, 0.9999), "fp16": (0.998, 0.999), "int8": (0.9, 0.97)}
# One window that is the whole map is the plain model.
_SAME = 0.9999

Embeddings = NDArray[np.float32]


def measure_regions(
    bundle: Bundle,
    grid: RegionGrid,
    photos: Sequence[bytes],
    notify: Notify,
    student: Student | None = None,
) -> dict[str, Any]:
    """Return metrics for the manifest: how well each file of a bundle embeds regions.

    Args:
        bundle: with one model at least.
        grid: the windows.
        photos: image files to compare on.
        notify: called with progress messages.
        student: what the files are compared with; by default the bundle's most exact file.

    Raises:
        BadModel: a file has no map whose windows could be pooled, or differs too much.
    """
    pixels = np.stack([prepare(photo, "photo", grid.size_px).pixels for photo in photos])
    plain = np.stack([prepare(photo, "photo").pixels for photo in photos])
    variants = [v for v in VARIANTS if file_name(v) in bundle.manifest.files]
    reference = None if student is None else regions_by_torch(student, pixels, grid)
    whose = f"{variants[0]}'s" if student is None else "torch's"
    metrics, misses = {}, []
    for variant in variants:
        notify(f"{variant}: comparing {len(grid)} regions of {len(photos)} photos with {whose}")
        same = _cosines(
            _embedded(bundle, variant, plain, RegionGrid(SIZE_PX, ((SIZE_PX // CELL_PX, 1),)))[
                :, 0
            ],
            _embedded(bundle, variant, plain, None),
        )
        rows = _embedded(bundle, variant, pixels, grid)
        reference = rows if reference is None else reference
        cosines = _cosines(rows, reference)
        least, mean = _LIMITS[precision_and_form(variant)[0]]
        # NaN is not enough either.
        if not (cosines.min() >= least and cosines.mean() >= mean and same.min() >= _SAME):
            misses.append(
                f"{variant}: smallest cosine {cosines.min():.4f}, mean {cosines.mean():.4f}, of "
                f"one window with the whole frame {same.min():.6f}"
            )
        metrics[f"regions_{variant.replace('.', '_')}"] = {
            "value": float(cosines.min()),
            "mean": float(cosines.mean()),
            "one_window": float(same.min()),
            "rule": f"smallest cosine of {len(grid)} regions of {len(photos)} photos at "
            f"{grid.size_px} px with {whose}; one window: with the plain model at {SIZE_PX} px",
        }
    if misses:
        raise BadModel(
            "the model does not embed regions as it should: " + "; ".join(misses),
            f"smallest and mean cosine {_LIMITS}, one window {_SAME}",
            "export the run without --regions",
        )
    return metrics


def add_regions(
    folder: Path,
    grid: RegionGrid,
    images: Path | None,
    notify: Notify,
    student: Student | None = None,
) -> dict[str, Any]:
    """Measure the regions of a bundle, write that into its manifest and card, and return it.

    Args:
        folder: the bundle.
        grid: the windows.
        images: a data set whose seen classes' photos are compared on; by default generated ones.
        notify: called with progress messages.
        student: as in `measure_regions`.

    Raises:
        BadData: `images` has no photos of classes that the model calls seen.
        BadModel: as `measure_regions`.
    """
    bundle = Bundle.open(folder.absolute())
    unseen = bundle.manifest.training.get("unseen_classes", [])
    photos = generate_photos(PHOTOS) if images is None else _seen_photos(images, unseen)
    found = measure_regions(bundle, grid, photos, notify, student)
    kept = {k: v for k, v in bundle.manifest.metrics.items() if not k.startswith("regions_")}
    write_manifest(bundle.folder, replace(bundle.manifest, metrics=kept | found))
    return found


def write_region_models(bundle: Bundle, grid: RegionGrid, target: Path) -> list[Path]:
    """Write the graphs of regions, for other programs, into a new folder; return their paths.

    Their input is `images (N, S, S, 3) uint8`, their output `embeddings (N, R, D) float32`. The
    regions' boxes are in `boxes.npy`, `(R, 4) float32`: x, y, width and height, 0 to 1.

    Raises:
        BadConfig: the folder exists.
        BadModel: a file has no map whose windows could be pooled.
    """
    if target.exists():
        raise BadConfig(f"{printable_name(target)} exists", "a folder that is not there yet")
    contents = {}
    for variant in VARIANTS:
        name = file_name(variant)
        if name in bundle.manifest.files:
            content = bundle.checked_content(*precision_and_form(variant))
            made = region_graph(content, grid, bundle.manifest.dim, str(bundle.folder / name))
            contents[name.replace(".onnx", ".regions.onnx")] = made
    target.mkdir(parents=True)
    paths = [target / name for name in contents]
    for path, made in zip(paths, contents.values(), strict=True):
        write_atomically(path, made)
    np.save(target / "boxes.npy", grid.boxes())
    return [*paths, target / "boxes.npy"]


def regions_by_torch(student: Student, pixels: Pixels, grid: RegionGrid) -> Embeddings:
    """Return the embeddings `(N, R, D)` of the windows of `pixels (N, S, S, 3) uint8`."""
    student.eval()
    rows = []
    with torch.inference_mode():
        for image in pixels:
            planes = normalise(torch.from_numpy(image[None]).permute(0, 3, 1, 2))
            domains = torch.from_numpy(domains_of("photo", 1))
            features = student.feature_map(planes, domains).float()
            pooled = [
                functional.avg_pool2d(features, side, stride)[0].flatten(1).T
                for side, stride in grid.windows
            ]
            rows.append(functional.normalize(student.project(torch.cat(pooled)), dim=1).numpy())
    return np.stack(rows)


def _embedded(
    bundle: Bundle, variant: Variant, pixels: Pixels, grid: RegionGrid | None
) -> Embeddings:
    precision, form = precision_and_form(variant)
    options = EngineOptions(precision=precision, device="cpu")
    request = EngineRequest(bundle, options, form=form, regions=grid)
    engine = engine_onnxruntime.open_cpu(request)
    try:
        return engine.run(pixels, "photo")
    finally:
        engine.close()


def _cosines(rows: Embeddings, wanted: Embeddings) -> NDArray[np.float64]:
    a, b = rows.astype(np.float64), wanted.astype(np.float64)
    with np.errstate(invalid="ignore", divide="ignore"):
        lengths = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
        return np.asarray((a * b).sum(axis=-1) / lengths)


def _seen_photos(images: Path, unseen: Sequence[str]) -> list[bytes]:
    """Return photos of classes that are not among `unseen`, of each class one by turns."""
    data = read_dataset(images)
    left_out = {class_key(name) for name in unseen}
    seen = [i for i, name in enumerate(data.classes) if class_key(name) not in left_out]
    photos: list[bytes] = []
    for label in seen:
        for row in np.flatnonzero(data.photo_labels == label)[:1].tolist():
            try:
                photos.append(read_image_bytes(data.photos[row]))
            except BadImage:
                continue
    if not photos:
        raise BadData(f"{printable_name(images)} has no photos of seen classes", "one at least")
    step = max(1, len(photos) // PHOTOS)
    return photos[::step][:PHOTOS]
