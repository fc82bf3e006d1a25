"""Folders of photos for benchmarks, copied from a folder or generated."""

from __future__ import annotations

import argparse
import io
import os
import shutil
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from sbtk_runtime.generated_inputs import generate_photos
from sbtk_runtime.images import SUFFIXES

_JPEG_QUALITY = 88
_LEAST_SHARE = 0.7
_CAMERA_QUALITY, _NOISE = 92, 4.0


def add_photos_option(parser: argparse.ArgumentParser, purpose: str = "photos to index") -> None:
    """Add `--photos`: a folder, by default the photos of `SBTK_DATA`, or `None` without one."""
    data = os.environ.get("SBTK_DATA")
    parser.add_argument(
        "--photos",
        type=Path,
        default=Path(data, "photo") if data else None,
        help=f"{purpose}; by default SBTK_DATA/photo, else generated ones",
    )


def list_photos(folder: Path) -> list[Path]:
    """Return the image files below a folder, sorted."""
    found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
    if not found:
        sys.exit(f"no photos in {folder}")
    return found


def copy_photos(source: Path | None, count: int, folder: Path) -> str:
    """Fill `folder` with `count` evenly spaced photos of `source`; return their description.

    Without a source, photos are generated; if it has too few, all are made from its photos.
    """
    folder.mkdir(parents=True)
    if source is None:
        for index, content in enumerate(generate_photos(count)):
            (folder / f"{index:06d}.jpg").write_bytes(content)
        return f"{count:,} generated photos"
    found = list_photos(source)
    if len(found) < count:
        return reencode_photos(source, count, folder)
    for index in range(count):
        path = found[index * len(found) // count]
        shutil.copyfile(path, folder / f"{index:06d}{path.suffix.lower()}")
    return f"{count:,} photos of {source.name}"


def save_as_a_camera(
    photo: Image.Image, size_px: tuple[int, int], path: Path, random: np.random.Generator
) -> None:
    """Write an RGB photo as JPEG of another size, with noise.

    It is as large as a camera's file, and takes as long to decode; enlarged alone, a photo has no
    details that cost time.
    """
    large = photo.resize(size_px, Image.Resampling.LANCZOS)
    noise = random.normal(0, _NOISE, (large.height, large.width, 1))
    pixels = np.clip(np.asarray(large) + noise.astype(np.int16), 0, 255).astype(np.uint8)
    Image.fromarray(pixels).save(path, quality=_CAMERA_QUALITY)


def reencode_photos(source: Path | None, count: int, folder: Path, seed: int = 0) -> str:
    """Fill `folder` with `count` distinct photos: re-encoded random crops of given ones."""
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(seed)
    if source is None:
        contents = [io.BytesIO(content) for content in generate_photos(8)]
        images = [Image.open(content).convert("RGB") for content in contents]
    else:
        found = list_photos(source)
        chosen = [found[index * len(found) // 256] for index in range(256)]
        images = [Image.open(path).convert("RGB") for path in dict.fromkeys(chosen)]
    for index in range(count):
        image = images[int(random.integers(len(images)))]
        width, height = image.size
        share = random.uniform(_LEAST_SHARE, 1.0)
        left = random.uniform(0, (1 - share) * width)
        top = random.uniform(0, (1 - share) * height)
        box = (left, top, left + share * width, top + share * height)
        cut = image.resize((width, height), Image.Resampling.BILINEAR, box=box)
        cut.save(folder / f"{index:06d}.jpg", quality=_JPEG_QUALITY)
    of = "generated photos" if source is None else f"photos of {source.name}"
    return f"{count:,} re-encoded random crops of {len(images)} {of}, seed {seed}"
