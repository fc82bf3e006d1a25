"""Every image of a data set opened once: what cannot be read, and what the rest are like."""

from __future__ import annotations

import hashlib
import io
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from sbtk_runtime.errors import BadImage
from sbtk_runtime.images import FORMATS, read_image_bytes
from sbtk_runtime.preprocess import Kind, prepare
from sbtk_train.data.image_set import ImageSet

# Small, as for the check before training: JPEGs are decoded at an eighth of their scale.
_SIZE_PX = 32
_AT_ONCE = 256


@dataclass(frozen=True)
class ImageCheck:
    """What came of opening the images.

    Attributes:
        unreadable: those that cannot be used, and why; empty sketches too.
        sizes: number of readable images by kind, width and height in pixels.
        modes: number of readable images by kind and Pillow's mode, such as `RGB` or `L`.
        sha256: of the bytes of each readable image.
    """

    unreadable: tuple[tuple[Path, str], ...]
    sizes: Counter[tuple[Kind, int, int]]
    modes: Counter[tuple[Kind, str]]
    sha256: dict[Path, bytes]


@dataclass(frozen=True)
class _Opened:
    path: Path
    kind: Kind
    reason: str
    width: int = 0
    height: int = 0
    mode: str = ""
    sha256: bytes = b""


def check_images(
    data: ImageSet, *, threads: int, advance: Callable[[int, int | None], None]
) -> ImageCheck:
    """Returns what came of decoding every image as training would, in a pool of threads.

    Args:
        data: the images; one that is there twice is opened once.
        threads: images decoded at a time.
        advance: told how many are done, and of how many.
    """
    unreadable: list[tuple[Path, str]] = []
    sizes: Counter[tuple[Kind, int, int]] = Counter()
    modes: Counter[tuple[Kind, str]] = Counter()
    digests: dict[Path, bytes] = {}
    total = len(set(data.sketches)) + len(set(data.photos))
    for done, opened in enumerate(_all_opened(data, threads), 1):
        if opened.reason:
            unreadable.append((opened.path, opened.reason))
        else:
            sizes[opened.kind, opened.width, opened.height] += 1
            modes[opened.kind, opened.mode] += 1
            digests[opened.path] = opened.sha256
        advance(done, total)
    return ImageCheck(tuple(unreadable), sizes, modes, digests)


def _all_opened(data: ImageSet, threads: int) -> Iterator[_Opened]:
    kinds: tuple[tuple[Kind, tuple[Path, ...]], ...] = (
        ("sketch", data.sketch_files),
        ("photo", data.photos),
    )
    with ThreadPoolExecutor(threads, thread_name_prefix="check") as pool:
        for kind, given in kinds:
            paths = list(dict.fromkeys(given))
            # A queue of half a million futures would take longer to make than it helps.
            for start in range(0, len(paths), _AT_ONCE):
                some = paths[start : start + _AT_ONCE]
                yield from pool.map(_opened, some, [kind] * len(some))


def _opened(path: Path, kind: Kind) -> _Opened:
    try:
        data = read_image_bytes(path)
        prepare(data, kind, _SIZE_PX)
    except BadImage as problem:
        return _Opened(path, kind, problem.found)
    # What has been decoded is of a format on the list, so its header is safe to read again.
    formats = [*FORMATS, *({"HEIF"} & set(Image.OPEN))]
    with Image.open(io.BytesIO(data), formats=formats) as image:
        width, height = image.size
        mode = image.mode
    return _Opened(path, kind, "", width, height, mode, hashlib.sha256(data).digest())
