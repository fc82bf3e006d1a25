"""Prepares images as the model's input; training and production share this definition.

Photos are squeezed to a square, as in the papers' code, so that nothing is cut off. Sketches are
cropped to their ink and padded to a square, so that the position and size of a drawing do not
matter, unless the model was trained with whole sketches. Their ink is stretched to full contrast.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, BinaryIO, Literal, TypeVar, get_args

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from sbtk_runtime import images
from sbtk_runtime.errors import BadConfig, BadImage, EmptySketch, LargeImage
from sbtk_runtime.image_feed import decode_in_subprocess

Kind = Literal["sketch", "photo"]
KINDS: tuple[Kind, ...] = get_args(Kind)
Pixels = NDArray[np.uint8]
T = TypeVar("T")
#: An image: the path of a file, its bytes, a file opened with "rb", a Pillow image, or an array
#: `(H, W, 3)`, `(H, W, 1)` or `(H, W) uint8` of RGB or grey.
ImageInput = (
    str | os.PathLike[str] | bytes | bytearray | memoryview | BinaryIO | Image.Image | Pixels
)

SIZE_PX = 224
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
#: The version of preprocessing; raised if the pixels of any file change.
PREPROCESSING = "sbtk-1"
#: The domain input of models that take the kind of image, such as DSN.
DOMAINS: Mapping[Kind, float] = {"sketch": 0.0, "photo": 1.0}

MARGIN = 0.06
_MIN_CONTRAST = 24
_WORK_PX = 1024
# The page's rule (static/upload.js): sizes in pixels, levels of 255, shares of all pixels.
_KIND_PX = 96
_NEAR_BACKGROUND, _MIN_BACKGROUND = 24, 0.6
_COLOURED, _MAX_COLOURED = 40, 0.06


@dataclass(frozen=True)
class Prepared:
    """A prepared image: the model's input.

    Attributes:
        pixels: `(224, 224, 3) uint8`, RGB.
        notices: for the user, such as that a sketch was inverted.
    """

    pixels: Pixels
    notices: tuple[str, ...] = ()


def open_image(
    data: bytes,
    kind: Kind,
    size_px: int = SIZE_PX,
    *,
    limit_s: float | None = None,
    max_bytes: int = images.MAX_DECODE_BYTES,
) -> images.OpenImage:
    """Return the image file, opened to be decoded no larger than `prepare` needs.

    Raises:
        LargeImage: it takes more than `max_bytes` to decode.
        BadImage: the bytes are not a readable image.
    """
    return images.OpenImage(
        data,
        at_least_px=size_px if kind == "photo" else _WORK_PX,
        limit_s=limit_s,
        max_bytes=max_bytes,
        keeps_grey=True,
    )


def decode_image(data: bytes, kind: Kind) -> Image.Image:
    """Return the decoded image file, no larger than `prepare` needs.

    Raises:
        BadImage: the bytes are not a readable image.
    """
    return open_image(data, kind).decode().image


def photo_pixels(image: Image.Image, size_px: int = SIZE_PX) -> Pixels:
    """Return `(size, size, 3) uint8` RGB: the whole photo, squeezed to a square."""
    # Box filtering first keeps large images cheap; the bilinear filter then has at least three
    # source pixels for each output pixel.
    opaque = image if image.mode == "L" else images.on_white(image)
    square = opaque.resize((size_px, size_px), Image.Resampling.BILINEAR, reducing_gap=3.0)
    return np.asarray(images.on_white(square), dtype=np.uint8)


@dataclass(frozen=True)
class Preprocessing:
    """How images become a model's input; the manifests of bundles and galleries have its name.

    Attributes:
        ink_crop: whether sketches are cropped to their ink. Otherwise they are shown whole, padded
            to a square.
    """

    ink_crop: bool = True

    @property
    def name(self) -> str:
        """The name: the version, and what differs from the usual way."""
        return PREPROCESSING if self.ink_crop else f"{PREPROCESSING}-whole"

    def prepare_input(self, image: ImageInput, kind: Kind) -> Prepared:
        """Return the model's input for an image in any form that `ImageInput` names.

        Raises:
            BadConfig: `kind` is not a kind of image.
            BadImage: it is not a readable image.
            EmptySketch: nothing is drawn on the sketch.
        """
        require_kind(kind)
        if isinstance(image, Image.Image):
            return self.prepare_image(images.convert(image), kind)
        if isinstance(image, np.ndarray):
            return self.prepare_image(_image_from_array(image), kind)
        if isinstance(image, str | os.PathLike):
            return self.prepare(images.read_image_bytes(os.fspath(image)), kind)
        if isinstance(image, bytes | bytearray | memoryview):
            return self.prepare(bytes(image), kind)
        if hasattr(image, "read"):
            return self.prepare(images.read_stream(image), kind)
        raise BadImage(
            f"an image given as {type(image).__name__}",
            "a path, bytes, a file object, a Pillow image or a NumPy array",
        )

    def prepare(
        self,
        data: bytes,
        kind: Kind,
        size_px: int = SIZE_PX,
        *,
        max_bytes: int = images.MAX_DECODE_BYTES,
    ) -> Prepared:
        """Return the model's input for the bytes of an image file.

        Images that take more than `max_bytes` to decode are decoded in another process.

        Raises:
            BadConfig: `kind` is not a kind of image.
            BadImage: the bytes are not a readable image.
            EmptySketch: nothing is drawn on the sketch.
        """
        require_kind(kind)
        try:
            decoded_image = open_image(data, kind, size_px, max_bytes=max_bytes).decode()
        except LargeImage as problem:
            return self.prepare_in_subprocess(data, problem, kind, size_px)
        return self.prepare_image(decoded_image.image, kind, size_px, decoded_image.notices)

    def prepare_in_subprocess(
        self, data: bytes, problem: LargeImage, kind: Kind, size_px: int = SIZE_PX
    ) -> Prepared:
        """Return the model's input for an image that is too large to decode in this process.

        Raises:
            BadImage: it is too large for any process; otherwise as `prepare`.
        """
        task = ("prepare", self.name, kind, str(size_px))
        pixels, notices = decode_in_subprocess(data, problem, *task)
        return Prepared(pixels, tuple(notices))

    def prepare_image(
        self,
        image: Image.Image,
        kind: Kind,
        size_px: int = SIZE_PX,
        notices: tuple[str, ...] = (),
    ) -> Prepared:
        """Return the model's input for a decoded image, with its notices so far.

        Raises:
            EmptySketch: nothing is drawn on the sketch.
        """
        if kind == "photo":
            return Prepared(photo_pixels(image, size_px), notices)
        prepared = self.sketch_pixels(image, size_px)
        return replace(prepared, notices=(*notices, *prepared.notices))

    def sketch_pixels(self, image: Image.Image, size_px: int = SIZE_PX) -> Prepared:
        """Return the sketch as dark ink on white, `(size, size, 3) uint8`.

        Raises:
            EmptySketch: nothing is drawn on it.
        """
        darkness, notices = _darkness(image)
        box = _ink_box(darkness)
        if box is None:
            raise EmptySketch("the sketch is empty", "strokes that differ from the background")
        square = _square_around(darkness, box) if self.ink_crop else _centred(darkness)
        is_large = square.shape[0] > 2 * size_px
        shrunk = Image.fromarray(square).resize(
            (size_px, size_px), Image.Resampling.BOX if is_large else Image.Resampling.BILINEAR
        )
        small = np.asarray(shrunk, dtype=np.uint8)
        # On a whole page, specks and shades of the paper would outnumber the ink.
        least = 1 if self.ink_crop else max(1, int(small.max()) // 4)
        grey = 255 - full_contrast(small, least)
        return Prepared(np.repeat(grey[:, :, None], 3, axis=2), notices)


CROPPED, WHOLE = Preprocessing(), Preprocessing(ink_crop=False)
#: All ways of preprocessing, by their names.
PREPROCESSINGS: Mapping[str, Preprocessing] = {each.name: each for each in (CROPPED, WHOLE)}
#: For photos, whose preparation never differs, and for sketches of the included model. Sketches of
#: any other are prepared by its `Bundle.preprocessing`.
prepare, prepare_input = CROPPED.prepare, CROPPED.prepare_input


def detect_kind(image: Image.Image) -> Kind:
    """Return what an image seems to be: a sketch is mostly background, with hardly any colour.

    In doubt it is a sketch, as photos on a plain background may be. The image is decoded, in mode
    L, RGB or RGBA.
    """
    opaque = image if image.mode == "L" else images.on_white(image)
    small = opaque.resize((_KIND_PX, _KIND_PX), Image.Resampling.BILINEAR, reducing_gap=2.0)
    levels = np.asarray(small, dtype=np.int16)
    if levels.ndim == 2:
        return "sketch" if _background(levels) > _MIN_BACKGROUND else "photo"
    red, green, blue = np.moveaxis(levels, 2, 0)
    # This takes a fifth of the time of NumPy's reductions along a short axis.
    lightest = np.maximum(np.maximum(red, green), blue)
    coloured = lightest - np.minimum(np.minimum(red, green), blue) > _COLOURED
    has_background = _background((red + green + blue) / 3) > _MIN_BACKGROUND
    return "sketch" if has_background and coloured.mean() < _MAX_COLOURED else "photo"


def _background(grey: NDArray[Any]) -> float:
    """Return the share of grey levels `(H, W)`, from 0 to 255, that are near their median."""
    return float((np.abs(grey - np.median(grey)) < _NEAR_BACKGROUND).mean())


def domains_of(kind: Kind, count: int) -> NDArray[np.float32]:
    """Return the domain input `(count,) float32` of images of one kind."""
    return np.full(count, DOMAINS[kind], dtype=np.float32)


def require_kind(text: str) -> Kind:
    """Return the kind of image that `text` names.

    Raises:
        BadConfig: it names none.
    """
    if text == "sketch":
        return "sketch"
    if text == "photo":
        return "photo"
    raise BadConfig(f"unknown kind of image {text!r}", "'sketch' or 'photo'")


def require_several(images: Iterable[T]) -> Iterable[T]:
    """Return several images or paths; refuse a single one, which is iterable, too.

    Raises:
        BadConfig: it is a single path or image.
    """
    one = (str, bytes, bytearray, memoryview, os.PathLike, Image.Image)
    is_one_array = (
        isinstance(images, np.ndarray) and images.ndim > 1 and images.shape[2:] in ((), (1,), (3,))
    )
    if isinstance(images, one) or hasattr(images, "read") or is_one_array:
        raise BadConfig(
            f"one image, given as {type(images).__name__}", "several, such as a list of them"
        )
    return images


def _image_from_array(pixels: Pixels) -> Image.Image:
    shape = pixels.shape[:-1] if pixels.ndim == 3 and pixels.shape[2] in (1, 3) else pixels.shape
    if pixels.dtype != np.uint8 or len(shape) != 2 or 0 in shape:
        raise BadImage(
            f"an array {pixels.shape} {pixels.dtype}", "(H, W, 3), (H, W, 1) or (H, W) uint8"
        )
    grey_or_rgb = pixels[:, :, 0] if pixels.shape[2:] == (1,) else pixels
    return images.convert(Image.fromarray(np.ascontiguousarray(grey_or_rgb)))


def _darkness(image: Image.Image) -> tuple[Pixels, tuple[str, ...]]:
    """Return ink as `(H, W) uint8` (0 paper, 255 full ink) and notices."""
    image = _limit_size(image)
    if image.mode == "RGBA":
        alpha = np.asarray(image.getchannel("A"), dtype=np.uint8)
        grey = np.asarray(images.on_white(image).convert("L"), dtype=np.uint8)
        if int(grey.max()) - int(grey.min()) < _MIN_CONTRAST <= int(alpha.max()) - int(alpha.min()):
            # White strokes on a transparent canvas: the drawing is in the alpha channel.
            return alpha, ("Light strokes on a transparent background: used as ink",)
        notices: tuple[str, ...] = ("Transparent background: shown on white",)
    else:
        grey = np.asarray(image if image.mode == "L" else image.convert("L"), dtype=np.uint8)
        notices = ()
    paper = int(np.median(_border(grey)))
    if paper < 128:
        # The border may be a frame on light paper.
        paper = max(paper, int(np.median(grey)))
    if paper >= 128:
        return paper - np.minimum(grey, paper), notices
    return np.maximum(grey, paper) - paper, (*notices, "Light-on-dark sketch: colours inverted")


def _limit_size(image: Image.Image) -> Image.Image:
    longest = max(image.size)
    if longest <= 2 * _WORK_PX:
        return image
    scale = _WORK_PX / longest
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return image.resize(size, Image.Resampling.BOX)


def _border(grey: Pixels) -> Pixels:
    return np.concatenate([grey[0], grey[-1], grey[:, 0], grey[:, -1]])


def _ink_box(darkness: Pixels) -> tuple[int, int, int, int] | None:
    """Return top, bottom, left, right (ends excluded) of the ink; `None` if there is none."""
    strongest = int(darkness.max())
    if strongest < _MIN_CONTRAST:
        return None
    ink = darkness >= max(_MIN_CONTRAST // 2, strongest // 4)
    rows = np.flatnonzero(ink.any(axis=1))
    columns = np.flatnonzero(ink.any(axis=0))
    return int(rows[0]), int(rows[-1]) + 1, int(columns[0]), int(columns[-1]) + 1


def _square_around(darkness: Pixels, box: tuple[int, int, int, int]) -> Pixels:
    """Return the ink in the box, centred in a square of paper with margins."""
    top, bottom, left, right = box
    height, width = bottom - top, right - left
    # A dot stays small rather than filling the square.
    side = max(round(max(height, width) * (1 + 2 * MARGIN)), min(darkness.shape) // 4, 1)
    return _centred(darkness[top:bottom, left:right], side)


def _centred(darkness: Pixels, side: int = 0) -> Pixels:
    """Return `(H, W) uint8` ink in the middle of a square of paper, by default the smallest."""
    height, width = darkness.shape
    side = side or max(height, width)
    square = np.zeros((side, side), dtype=np.uint8)
    row, column = (side - height) // 2, (side - width) // 2
    square[row : row + height, column : column + width] = darkness
    return square


def full_contrast(darkness: Pixels, least: int = 1) -> Pixels:
    """Return ink (0 paper, 255 full ink) scaled so that its 95th percentile is full ink.

    This keeps thin lines visible. Pixels below `least` do not count.
    """
    ink = darkness[darkness >= least]
    if not ink.size:
        return darkness
    strong = float(np.percentile(ink, 95))
    scaled = np.minimum(darkness.astype(np.float32) * (255.0 / strong), 255.0)
    return np.asarray(np.rint(scaled), dtype=np.uint8)
