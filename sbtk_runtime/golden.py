"""Golden images of a bundle: what its input contract and its models make of two known images.

A program in another language that prepares images for the model compares itself with them, and
`sbtk models check` compares this installation.
"""

from __future__ import annotations

import io
import json
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from sbtk_runtime.bundle import Bundle
from sbtk_runtime.errors import BadModel
from sbtk_runtime.manifest import Precision
from sbtk_runtime.preprocess import KINDS, SIZE_PX, Kind, Pixels, prepare

#: The golden embeddings, by kind and precision.
GOLDEN_NAME = "golden.json"
#: The least cosine to a golden embedding. Engines round INT8 in their own ways.
LEAST_COSINE: dict[Precision, float] = {"fp32": 0.9999, "fp16": 0.999, "int8": 0.97}


@dataclass(frozen=True)
class Golden:
    """A known image of a kind.

    Attributes:
        kind: what it is prepared as.
        image: the image file's bytes.
        pixels: `(224, 224, 3) uint8` RGB, what the contract makes of it.
        embeddings: by precision, `(D,) float32` unit rows of ONNX Runtime on a CPU.
    """

    kind: Kind
    image: bytes
    pixels: Pixels
    embeddings: dict[Precision, NDArray[np.float32]]


def image_name(kind: Kind) -> str:
    """The name of a golden image's file in every bundle."""
    return f"golden.{kind}.png"


def pixels_name(kind: Kind) -> str:
    """The name of the file of a golden image's pixels, a PNG of 224 x 224, in every bundle."""
    return f"golden.{kind}.pixels.png"


def read_golden(bundle: Bundle) -> tuple[Golden, ...]:
    """Read the golden images of a bundle; none of a bundle that is older than they are.

    Raises:
        BadModel: a file of them is damaged.
    """
    if GOLDEN_NAME not in bundle.manifest.files:
        return ()
    try:
        tables = json.loads(bundle.content(GOLDEN_NAME))
        return tuple(
            Golden(
                kind,
                bundle.content(image_name(kind)),
                _pixels_from_png(bundle.content(pixels_name(kind))),
                {
                    precision: np.array(row, dtype=np.float32)
                    for precision, row in tables[kind]["embeddings"].items()
                    if precision in LEAST_COSINE
                },
            )
            for kind in KINDS
        )
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as problem:
        raise BadModel(
            f"{bundle.folder / GOLDEN_NAME} is damaged ({problem})",
            "golden images as sbtk export writes them",
            "get the bundle again, or export the run again",
        ) from problem


def require_golden_pixels(golden: Golden) -> None:
    """Check that this installation prepares a golden image as its bundle expects.

    Raises:
        BadModel: the pixels differ; says by how much.
    """
    found = prepare(golden.image, golden.kind).pixels
    largest = int(np.abs(found.astype(np.int16) - golden.pixels.astype(np.int16)).max())
    # Releases of Pillow may round by one step more or less.
    if largest > 1:
        raise BadModel(
            f"the golden {golden.kind} is prepared otherwise: pixels differ by up to {largest}",
            "the golden pixels of the bundle",
            "use the versions that the bundle's card names",
        )


def require_golden_embedding(
    golden: Golden, precision: Precision, row: NDArray[np.float32]
) -> float | None:
    """Check a model's embedding of golden pixels against the golden one.

    Args:
        golden: the image.
        precision: of the model that gave the row.
        row: `(D,) float32`, a unit row.

    Returns:
        The cosine between the two; `None` if the bundle has none of that precision.

    Raises:
        BadModel: they are too far apart.
    """
    expected = golden.embeddings.get(precision)
    if expected is None:
        return None
    cosine = float(expected @ row) if expected.shape == row.shape else float("nan")
    if not cosine >= LEAST_COSINE[precision]:
        raise BadModel(
            f"the {precision} model embeds the golden {golden.kind} otherwise: cosine {cosine:.4f}",
            f"{LEAST_COSINE[precision]} or more",
            "try --engine onnxruntime, or get the bundle again",
        )
    return cosine


def png_from_pixels(pixels: Pixels) -> bytes:
    """The bytes of a PNG file of `(H, W, 3) uint8` RGB pixels."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def _pixels_from_png(data: bytes) -> Pixels:
    with Image.open(io.BytesIO(data), formats=("PNG",)) as image:
        if image.size != (SIZE_PX, SIZE_PX):
            raise ValueError(f"pixels of {image.size[0]} x {image.size[1]}")
        return np.asarray(image.convert("RGB"), dtype=np.uint8)
