"""Sketches and photos to measure training with: few distinct files under many names."""

from __future__ import annotations

import io
import os
from pathlib import Path

from PIL import Image

from sbtk_runtime.bench_inputs import generated_photos, generated_sketches
from sbtk_runtime.preprocess import SIZE_PX

#: Of a benchmark data set: enough classes for a batch of 256 images, one for validation.
CLASSES, PER_CLASS = 66, 44
_SMALL_CLASSES, _SMALL_PER_CLASS = 5, 6
_DISTINCT = 8
# As the Sketchy Database has them.
_PHOTO_PX = 256


def write_training_data(root: Path, *, is_photos: bool, is_small: bool) -> Path:
    """Returns `root` with `{sketch,photo}/<class>/*`.

    Args:
        root: a new folder.
        is_photos: JPEG photos and compressed PNG sketches of 256 px, as they come; otherwise
            PNG files without compression at the size that is trained on, which cost little.
        is_small: for a dry run.
    """
    kinds = {"sketch": generated_sketches(_DISTINCT), "photo": generated_photos(_DISTINCT)}
    classes, per_class = (_SMALL_CLASSES, _SMALL_PER_CLASS) if is_small else (CLASSES, PER_CLASS)
    for kind, files in kinds.items():
        suffix = ".jpg" if is_photos and kind == "photo" else ".png"
        originals = []
        for number, content in enumerate(files):
            original = root / "originals" / f"{kind}-{number}{suffix}"
            original.parent.mkdir(parents=True, exist_ok=True)
            _save(content, original, is_photos)
            originals.append(original)
        for label in range(classes):
            folder = root / kind / f"class-{label:02d}"
            folder.mkdir(parents=True)
            for number in range(per_class):
                original = originals[(label + number) % _DISTINCT]
                os.link(original, folder / f"{number:03d}{suffix}")
    return root


def _save(content: bytes, path: Path, is_photos: bool) -> None:
    side = _PHOTO_PX if is_photos else SIZE_PX
    picture = Image.open(io.BytesIO(content)).resize((side, side), Image.Resampling.BILINEAR)
    if path.suffix == ".jpg":
        picture.save(path, quality=88)
    else:
        picture.save(path, compress_level=6 if is_photos else 0)
