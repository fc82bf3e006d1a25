"""Regions of an exported model: its files compared with torch, or with its most exact file.

The graph of regions is made from a bundle's ONNX files on demand (see `sbtk_runtime.region_graph`),
so only metrics are added to the bundle.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from sbtk_export.export import (
    VARIANTS,
    Variant,
    file_name,
    open_variant,
    precision_and_form,
    write_manifest,
)
from sbtk_export.parity import row_cosines
from sbtk_runtime.bundle import Bundle
from sbtk_runtime.errors import BadConfig, BadData, BadImage, BadModel
from sbtk_runtime.files import printable_name, write_atomically
from sbtk_runtime.generated_inputs import generate_photos
from sbtk_runtime.images import read_image_bytes
from sbtk_runtime.preprocess import SIZE_PX, Pixels, domains_of, prepare
from sbtk_runtime.region_graph import region_graph
from sbtk_runtime.regions import CELL_PX, RegionGrid
from sbtk_train.batches.augment import normalise
from sbtk_train.data.class_names import class_key
from sbtk_train.data.dataset import read_dataset
from sbtk_train.models.student import Student
from sbtk_train.progress import Notify

#: Number of photos to compare regions on.
PHOTOS = 16
# Smallest and mean cosine. A window averages errors over fewer cells than the whole frame, so
# INT8's smallest cosine is lower than for whole frames.
_LIMITS = {"fp32": (0.9999, 0.9999), "fp16": (0.998, 0.999), "int8": (0.9, 0.97)}
# A window that covers the whole map must give the plain model's embedding.
_SAME = 0.9999

Embeddings = NDArray[np.float32]


def measure_regions(
    bundle: Bundle,
    grid: RegionGrid,
    photos: Sequence[bytes],
    notify: Notify,
    student: Student | None = None,
) -> dict[str, Any]:
    """Compare the regions' embeddings of each file of a bundle; return metrics for the manifest.

    Args:
        bundle: a bundle with at least one model.
        grid: the windows.
        photos: image files to compare on.
        notify: called with progress messages.
        student: the reference; by default the bundle's most exact file.

    Raises:
        BadModel: a file has no feature map to pool windows of, or differs too much.
    """
    pixels = np.stack([prepare(photo, "photo", grid.size_px).pixels for photo in photos])
    plain = np.stack([prepare(photo, "photo").pixels for photo in photos])
    variants = [v for v in VARIANTS if file_name(v) in bundle.manifest.files]
    reference = None if student is None else regions_by_torch(student, pixels, grid)
    whose = f"{variants[0]}'s" if student is None else "torch's"
    metrics, misses = {}, []
    for variant in variants:
        notify(f"{variant}: comparing {len(grid)} regions of {len(photos)} photos with {whose}")
        whole = _embedded(bundle, variant, plain, RegionGrid(SIZE_PX, ((SIZE_PX // CELL_PX, 1),)))
        same = row_cosines(whole[:, 0], _embedded(bundle, variant, plain, None))
        rows = _embedded(bundle, variant, pixels, grid)
        reference = rows if reference is None else reference
        cosines = row_cosines(rows, reference)
        least, mean = _LIMITS[precision_and_form(variant)[0]]
        # NaN fails, too.
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
            "the model embeds regions incorrectly: " + "; ".join(misses),
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
    """Measure the regions of a bundle, write the metrics into its manifest and card; return them.

    Args:
        folder: the bundle.
        grid: the windows.
        images: a data set; photos of its seen classes are used. By default photos are generated.
        notify: called with progress messages.
        student: as for `measure_regions`.

    Raises:
        BadData: `images` has no photos of the model's seen classes.
        BadModel: as for `measure_regions`.
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
        BadModel: a file has no feature map to pool windows of.
    """
    if target.exists():
        raise BadConfig(f"{printable_name(target)} exists", "a new folder")
    contents = {}
    for variant in VARIANTS:
        name = file_name(variant)
        if name in bundle.manifest.files:
            content = bundle.read_onnx(*precision_and_form(variant))
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
    with contextlib.closing(open_variant(bundle, variant, grid)) as engine:
        return engine.run(pixels, "photo")


def _seen_photos(images: Path, unseen: Sequence[str]) -> list[bytes]:
    """Return the first photo of each class that is not unseen, at most 16 spread over all."""
    data = read_dataset(images)
    left_out = {class_key(name) for name in unseen}
    photos: list[bytes] = []
    for label, name in enumerate(data.classes):
        if class_key(name) not in left_out:
            for row in np.flatnonzero(data.photo_labels == label)[:1]:
                with contextlib.suppress(BadImage):
                    photos.append(read_image_bytes(data.photos[row]))
    if not photos:
        raise BadData(f"{printable_name(images)} has no photos of seen classes", "at least one")
    step = max(1, len(photos) // PHOTOS)
    return photos[::step][:PHOTOS]
