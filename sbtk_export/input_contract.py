"""The written input contract, and two golden images to check other implementations with."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from sbtk_runtime.bundle import GOLDEN_NAME, image_name, pixels_name, png_from_pixels
from sbtk_runtime.engines.base import Engine
from sbtk_runtime.files import write_atomically
from sbtk_runtime.manifest import BundleManifest, Precision
from sbtk_runtime.onnx_file import DOMAIN_NAME, INPUT_NAME, OUTPUT_NAME
from sbtk_runtime.preprocess import PREPROCESSINGS, SIZE_PX, Kind, Pixels
from sbtk_runtime.thumbnail import png_bytes

CONTRACT_NAME = "PREPROCESSING.md"

_TEXT = """\
# From an image file to the model's input ({preprocessing})

This is what a program in any language must do to use `model.*.onnx` of {name}. Scaling, mean,
standard deviation and the L2 norm are part of the model.

Input `{input} ({size}, {size}, 3) uint8` with a leading batch dimension: RGB, rows from the top,
values 0 to 255.{domain} Output `{output} (N, {dim}) float32`: rows of length 1, so the dot product
of two rows is their cosine. A sketch is compared with photos.

`round` below rounds halves to the even number, `floor` rounds down. *Box* and *triangle* are the
filters `BOX` and `BILINEAR` of Pillow's `Image.resize`: to shrink an image they are stretched by
the factor of reduction, so that every source pixel counts. A resize that takes single source pixels
or the nearest four, as many libraries do by default, gives different embeddings.

## Both kinds: decoding

1. Take the first frame, with 8 bits per channel, and apply the EXIF orientation.
2. Convert to sRGB. Grey becomes R = G = B.
3. Keep alpha only if a pixel is not opaque.

## A photo

1. If it has alpha, composite it on white.
2. Where `f = floor(side / {size} / 3)` is above 1, for width and height each, first replace blocks
   of `f` pixels along that side by their mean.
3. Resize to {size} x {size} with the triangle filter, whatever the aspect ratio. Nothing is
   cropped.

## A sketch

1. If the longer side is above 2048, resize with the box filter so that it is 1024, the other side
   `round`ed, at least 1.
2. `grey = floor((19595 R + 38470 G + 7471 B + 32768) / 65536)`, of the image on white.
3. `ink`, for each pixel, is 0 for paper:
   - With alpha, if the largest minus the smallest `grey` is below 24 and the same difference of
     alpha is not: `ink` is the alpha.
   - Otherwise `paper` is the median of `grey` along the four edges, rounded down (whole edges, so
     corners count twice). If it is below 128, use the median of all of `grey` if that is larger.
     If `paper` is at least 128, `ink = max(paper - grey, 0)`, otherwise
     `ink = max(grey - paper, 0)`.
{frame}
6. Resize to {size} x {size}: with the box filter if the side is above {twice}, otherwise with the
   triangle filter.
{contrast}
   becomes `round(min(255 v / p, 255))`.
8. R, G and B are each 255 minus that: dark ink on white.

## Checking a port

`golden.sketch.png` and `golden.photo.png` are generated images, free to use. Prepare each, and
compare with `golden.sketch.pixels.png` and `golden.photo.pixels.png`: no value should differ by
more than 2. Run the model on them and compare with `golden.json`, which has under `sketch` and
`photo` the `embeddings` of each precision: cosines should be at least 0.999 for FP32 and FP16, and
0.97 for INT8, which engines round differently. `sbtk models check` makes the same comparison for
sbtk itself. JPEG decoders differ by a few steps, and sbtk decodes large JPEGs at a reduced scale,
so compare with PNG files.
"""

# Steps 4, 5 and the beginning of 7, by whether sketches are cropped to their ink.
_FRAME = {
    True: """\
4. Let `s` be the largest `ink`. If it is below 24, the sketch is empty. Find the smallest box that
   contains all pixels with `ink >= max(12, floor(s / 4))`; it has `h` rows and `w` columns.
5. Make a square of zeros with the side `max(round(1.12 max(h, w)), floor(min(height, width) / 4),
   1)`, where height and width are those of `ink` (not of the box), and copy the box into its
   middle, starting at row `floor((side - h) / 2)` and column `floor((side - w) / 2)`.""",
    False: """\
4. If the largest `ink` is below 24, the sketch is empty. It is not cropped: `ink` has `h` rows and
   `w` columns.
5. Make a square of zeros with the side `max(h, w)`, and copy `ink` into its middle, starting at row
   `floor((side - h) / 2)` and column `floor((side - w) / 2)`.""",
}
_CONTRAST = {
    True: "7. Let `p` be the 95th percentile (with linear interpolation) of the values above 0. "
    "Each value `v`",
    False: "7. Let `t` be the largest value, and `p` the 95th percentile (with linear "
    "interpolation)\n   of the values from `max(1, floor(t / 4))` to `t`. Each value `v`",
}
_DOMAIN = (
    " Input `{name} (N,) float32`: 0 for a sketch and 1 for a photo; the same pixels have "
    "different embeddings as a sketch and as a photo."
)


def render_contract(manifest: BundleManifest) -> str:
    """Return the input contract of a bundle in Markdown."""
    domain = "" if manifest.domain_input is None else _DOMAIN.format(name=DOMAIN_NAME)
    is_cropped = PREPROCESSINGS[manifest.preprocessing].ink_crop
    return _TEXT.format(
        name=manifest.name,
        preprocessing=manifest.preprocessing,
        input=INPUT_NAME,
        output=OUTPUT_NAME,
        dim=manifest.dim,
        size=SIZE_PX,
        twice=2 * SIZE_PX,
        domain=domain,
        frame=_FRAME[is_cropped],
        contrast=_CONTRAST[is_cropped],
    )


def make_golden_images() -> dict[Kind, bytes]:
    """Return the PNG files of a generated sketch and a generated photo; always the same bytes."""
    return {"sketch": png_bytes(_sketch()), "photo": png_bytes(_photo())}


def write_contract(
    folder: Path, manifest: BundleManifest, engines: Mapping[Precision, Engine]
) -> None:
    """Write `PREPROCESSING.md` and the golden images with their pixels and embeddings.

    Args:
        folder: the bundle's.
        manifest: names the model and its inputs.
        engines: the engines that embed the golden pixels, by precision.
    """
    table: dict[str, dict[str, object]] = {}
    for kind, image in make_golden_images().items():
        pixels = PREPROCESSINGS[manifest.preprocessing].prepare(image, kind).pixels
        write_atomically(folder / image_name(kind), image)
        write_atomically(folder / pixels_name(kind), png_from_pixels(pixels))
        rows = {name: _row(engine, pixels, kind) for name, engine in engines.items()}
        names = {"image": image_name(kind), "pixels": pixels_name(kind)}
        table[kind] = names | {"embeddings": rows}
    write_atomically(folder / GOLDEN_NAME, (json.dumps(table) + "\n").encode())
    write_atomically(folder / CONTRACT_NAME, render_contract(manifest).encode())


def _row(engine: Engine, pixels: Pixels, kind: Kind) -> list[float]:
    row = engine.run(pixels[None], kind)[0].astype(np.float64)
    return [round(float(value), 7) for value in row / np.linalg.norm(row)]


def _sketch() -> Image.Image:
    """Draw a fish in grey strokes on off-white paper, left of the middle."""
    image = Image.new("RGB", (720, 540), (246, 244, 238))
    draw = ImageDraw.Draw(image)
    ink = (92, 90, 98)
    draw.arc((90, 170, 430, 400), 20, 340, fill=ink, width=5)
    draw.line([(420, 245), (500, 180), (480, 285), (505, 390), (420, 325)], fill=ink, width=5)
    draw.ellipse((150, 250, 172, 272), outline=ink, width=4)
    draw.arc((210, 230, 290, 340), 290, 70, fill=ink, width=4)
    draw.line([(240, 175), (290, 120), (330, 180)], fill=ink, width=5)
    return image


def _photo() -> Image.Image:
    """Draw a fish in flat colours on a gradient."""
    corners = np.array([[[30, 90, 150], [20, 120, 160]], [[10, 40, 90], [60, 80, 70]]], np.uint8)
    image = Image.fromarray(corners).resize((800, 500), Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(image)
    draw.ellipse((180, 130, 580, 380), fill=(226, 140, 60))
    draw.polygon([(560, 250), (690, 150), (660, 260), (700, 380)], fill=(205, 96, 40))
    draw.polygon([(330, 140), (410, 60), (470, 150)], fill=(210, 110, 50))
    draw.ellipse((240, 210, 272, 242), fill=(250, 250, 244))
    draw.ellipse((249, 219, 263, 233), fill=(12, 12, 16))
    for left, top in ((90, 90), (120, 160), (84, 250), (660, 70), (720, 440)):
        draw.ellipse((left, top, left + 26, top + 26), outline=(180, 220, 240), width=3)
    return image
