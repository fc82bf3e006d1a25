"""Quality and cost of regions: objects in scenes, and whole photos, with and without regions.

    python -m benchmarks.regions --data sketchy125 --distractors photos1000

Scenes are made from photos of a fold's validation classes, never unseen ones: each is pasted, at a
third, a half or two thirds of the side, into a photo without these classes, at a random position
with blended edges. Photos of less than 224 pixels a side are enlarged, since they would have no
regions. With --strokes and --photos, such as Quick, Draw! and Caltech-101, the classes
are those that the data do not have, for a model that was trained on all seen classes. The same
galleries are searched with and without regions.
"""

from __future__ import annotations

import argparse
import itertools
import math
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from benchmarks.drawings import (
    add_fold_options,
    average_precision,
    image_bytes,
    read_fold,
    require_held_out,
    require_no_others,
)
from benchmarks.photos import list_photos, save_as_a_camera
from benchmarks.reranking import clean_drawings
from benchmarks.result import Result, print_result
from sbtk_runtime import Embedder
from sbtk_runtime.gallery.gallery import Gallery
from sbtk_runtime.gallery.update import update_gallery
from sbtk_runtime.preprocess import SIZE_PX
from sbtk_runtime.regions import DEFAULT_REGIONS
from sbtk_runtime.rerank import Rerank
from sbtk_train.data.image_set import ImageSet, ImageSource

SIDES = {"a third": 1 / 3, "a half": 1 / 2, "two thirds": 2 / 3}
_WHOLE, _OTHERS = "whole photos", "others"
_SCENE_PX = 768
_LARGE_PX = (4000, 3000)
_DISTRACTORS = 250
_QUERIES, _REPEATS = 60, 5
_RERANKS: tuple[Rerank, ...] = ("none", "diffusion")
_PER_CLASS = 25
#: Other file names of photos of the classes. A background with one of these would be a right hit
#: that counts as wrong.
_OTHER_NAMES = {
    "alarm_clock": ("clock",),
    "apple": ("granny",),
    "candle": ("torch",),
    "ceiling fan": ("fan",),
    "cell phone": ("telephone", "phone"),
    "deer": ("gazelle", "impala", "hartebeest"),
    "hotdog": ("hot_dog",),
    "laptop": ("notebook",),
    "parrot": ("macaw", "lorikeet", "cockatoo", "grey"),
    "shark": ("hammerhead",),
    "snake": ("boa", "cobra", "mamba", "python", "viper", "rattle", "sidewinder"),
    "soccer ball": ("soccer",),
    "stop sign": ("sign",),
    "wristwatch": ("watch", "clock"),
}

Rows = NDArray[np.float32]


@dataclass(frozen=True)
class Quality:
    """Quality of the search of sketches in a gallery.

    Attributes:
        precision: mAP@all among the photos made of validation photos.
        distracted: mAP@all with distractors.
        right_rank: median rank of the photo that a sketch was drawn from; NaN for clean drawings.
        in_ten: share of sketches with that photo in the first ten; NaN for clean drawings.
        by_class: mAP@all with distractors of each class.
    """

    precision: float
    distracted: float
    right_rank: float
    in_ten: float
    by_class: tuple[float, ...]


@dataclass(frozen=True)
class Speed:
    """Speed of indexing: the number of photos, and the seconds for all of them."""

    photos: int
    seconds: float


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_fold_options(parser)
    parser.add_argument("--distractors", type=Path, required=True, help="backgrounds, too")
    parser.add_argument("--strokes", type=Path, help="stroke file of clean drawings")
    parser.add_argument("--photos", type=Path, help="class folders with photos of the same things")
    parser.add_argument("--model", type=Path, help="bundle; by default the pretrained one")
    parser.add_argument("--engine", default="onnxruntime")
    parser.add_argument("--regions", type=int, default=DEFAULT_REGIONS)
    parser.add_argument("--large", type=int, default=40, help="12-megapixel photos to index")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()

    data, division = read_fold(options)
    if options.strokes is not None and options.photos is not None:
        require_no_others(options.model, data.classes)
        images = _first_photos(clean_drawings(options.strokes, options.photos, data.classes))
    else:
        images = division.validation
        require_held_out(options.model, images.classes)
    with (
        tempfile.TemporaryDirectory() as scratch,
        Embedder(options.model, engine=options.engine) as embedder,
    ):
        for result in measure(
            Path(scratch), images, options.distractors, embedder, options.regions, options.large
        ):
            print_result(result, "benchmarks.regions", as_json=options.json)


def measure(
    scratch: Path,
    images: ImageSet,
    photos: Path,
    embedder: Embedder,
    regions: int,
    large: int,
) -> tuple[Result, Result]:
    """Make scenes, index them, and measure quality, then what regions cost."""
    others = backgrounds(photos, images.classes)
    folders = make_scenes(scratch, images, others)
    sketches = np.stack(
        [embedder.embed_one(image_bytes(each), "sketch")[0] for each in images.sketches]
    )
    rows: list[list[str]] = []
    figures: dict[str, object] = {}
    for name in (*SIDES, _WHOLE):
        gallery = scratch / f"{folders[name].name}.sbtk"
        update_gallery(gallery, [folders[name], folders[_OTHERS]], embedder, regions=regions)
        with Gallery.open(gallery) as opened:
            without: dict[Rerank, Quality] = {}
            for is_with, rerank in itertools.product((False, True), _RERANKS):
                found = quality(opened, sketches, images, regions=is_with, rerank=rerank)
                without.setdefault(rerank, found)
                regions_text = "with" if is_with else "without"
                figures[f"{name}, {regions_text}, {rerank}"] = vars(found)
                rows.append(
                    [
                        name,
                        regions_text,
                        rerank,
                        f"{found.precision:.3f}",
                        f"{found.distracted:.3f}",
                        _change(without[rerank], found) if is_with else "",
                        "" if math.isnan(found.right_rank) else f"{found.right_rank:,.0f}",
                        "" if math.isnan(found.in_ten) else f"{found.in_ten:.1%}",
                    ]
                )
    info = embedder.engine.info
    engine = f"{info.name}, {info.precision}, {info.threads} threads"
    found_things = Result(
        title=f"Search with and without {regions} regions per photo",
        columns=[
            "the object's side",
            "regions",
            "re-ranking",
            "mAP@all",
            f"among {_DISTRACTORS} distractors",
            "change by regions",
            "median rank",
            "in the first ten",
        ],
        rows=rows,
        figures=figures,
        notes=[
            "change by regions: among distractors, ± its standard error over classes",
            "rank, first ten: among distractors, of the scene or photo with the photo that the "
            "sketch was drawn from",
            f"{len(sketches)} sketches of {', '.join(images.classes)}; each gallery has a scene "
            f"for each of their {len(images.photos)} photos, or these photos",
            f"exact search; engine: {engine}",
        ],
    )
    cost_rows, cost = costs(scratch, folders, sketches, embedder, regions, large)
    costing = Result(
        title=f"Cost of {regions} regions per photo",
        columns=["", "without", "with", "with / without"],
        rows=cost_rows,
        figures=cost,
        notes=["a search: without embedding the sketch; bytes: the whole gallery folder", engine],
    )
    return found_things, costing


def _change(before: Quality, after: Quality) -> str:
    changes = np.array(after.by_class) - np.array(before.by_class)
    error = changes.std(ddof=1) / math.sqrt(len(changes))
    return f"{changes.mean():+.4f} ± {error:.4f}"


def _first_photos(images: ImageSet) -> ImageSet:
    """Return the drawings, and the first photos of each class."""
    first = [
        np.flatnonzero(images.photo_labels == label)[:_PER_CLASS]
        for label in range(len(images.classes))
    ]
    kept = np.concatenate(first)
    photos = tuple(images.photos[row] for row in kept)
    return replace(images, photos=photos, photo_labels=images.photo_labels[kept])


def backgrounds(folder: Path, classes: Sequence[str]) -> list[Path]:
    """Return photos without the classes, judging by file names, in random order."""
    words = [word for name in classes for word in (name, *_OTHER_NAMES.get(name, ()))]
    found = [
        path for path in list_photos(folder) if not any(word in path.stem.lower() for word in words)
    ]
    return [found[index] for index in np.random.default_rng(0).permutation(len(found))]


def make_scenes(scratch: Path, images: ImageSet, others: Sequence[Path]) -> dict[str, Path]:
    """Fill folders with scenes by side, whole photos and distractors; return them by name.

    The name of a file begins with its row in `images.photos`.
    """
    random = np.random.default_rng(0)
    folders = {name: scratch / name.replace(" ", "-") for name in (*SIDES, _WHOLE, _OTHERS)}
    for folder in folders.values():
        folder.mkdir()
    background = itertools.cycle(others[_DISTRACTORS:])
    for row, photo in enumerate(_files(images.photos)):
        thing = _enlarged(Image.open(photo).convert("RGB"))
        thing.save(folders[_WHOLE] / f"{row:04d}.jpg", quality=92)
        for name, share in SIDES.items():
            made = scene(thing, Image.open(next(background)).convert("RGB"), share, random)
            made.save(folders[name] / f"{row:04d}.jpg", quality=92)
    for number, path in enumerate(others[:_DISTRACTORS]):
        Image.open(path).convert("RGB").save(folders[_OTHERS] / f"other-{number:04d}.jpg")
    return folders


def _enlarged(photo: Image.Image) -> Image.Image:
    """Return the photo, at least as large as those that have regions, as all distractors are."""
    scale = SIZE_PX / min(photo.size)
    if scale <= 1:
        return photo
    width, height = (max(SIZE_PX, round(side * scale)) for side in photo.size)
    return photo.resize((width, height), Image.Resampling.BICUBIC)


def scene(
    thing: Image.Image, background: Image.Image, share: float, random: np.random.Generator
) -> Image.Image:
    """Return the background with the object at a share of its side, with blended edges."""
    canvas = background.resize((_SCENE_PX, _SCENE_PX), Image.Resampling.BICUBIC)
    side = round(_SCENE_PX * share)
    edge = max(2, side // 24)
    mask = Image.new("L", (side, side))
    mask.paste(255, (edge, edge, side - edge, side - edge))
    x, y = (int(value) for value in random.integers(0, _SCENE_PX - side + 1, 2))
    canvas.paste(
        thing.resize((side, side), Image.Resampling.BICUBIC),
        (x, y),
        mask.filter(ImageFilter.GaussianBlur(edge / 2)),
    )
    return canvas


def quality(
    gallery: Gallery, sketches: Rows, images: ImageSet, *, regions: bool, rerank: Rerank
) -> Quality:
    """Return how well sketches find the photos of their class, and their own photo."""
    stems = {photo.stem: row for row, photo in enumerate(_files(images.photos))}
    precisions, distracted, ranks = [], [], []
    for sketch, drawn, label in zip(sketches, images.sketches, images.sketch_labels, strict=True):
        answer = gallery.answer(
            sketch, gallery.count, "exact", fold=False, rerank=rerank, regions=regions
        )
        names = [Path(hit.path).stem for hit in answer.hits]
        found = [int(name) if name.isdigit() else -1 for name in names]
        is_right = np.array([row >= 0 and images.photo_labels[row] == label for row in found])
        is_made = np.array([row >= 0 for row in found])
        precisions.append(average_precision(is_right[is_made]))
        distracted.append(average_precision(is_right))
        if isinstance(drawn, Path) and drawn.stem.rpartition("-")[0] in stems:
            ranks.append(found.index(stems[drawn.stem.rpartition("-")[0]]) + 1)
    return Quality(
        float(np.mean(precisions)),
        float(np.mean(distracted)),
        float(np.median(ranks)) if ranks else math.nan,
        float(np.mean(np.array(ranks) <= 10)) if ranks else math.nan,
        tuple(
            float(np.mean(np.array(distracted)[images.sketch_labels == label]))
            for label in range(len(images.classes))
        ),
    )


def _files(sources: Sequence[ImageSource]) -> list[Path]:
    return [source for source in sources if isinstance(source, Path)]


def costs(
    scratch: Path,
    folders: dict[str, Path],
    sketches: Rows,
    embedder: Embedder,
    regions: int,
    large: int,
) -> tuple[list[list[str]], dict[str, float]]:
    """Return the cost of regions in bytes, query time and indexing time: rows and figures."""
    rows: list[list[str]] = []
    figures: dict[str, float] = {}
    of = (
        ("scenes and photos", list(folders.values()), 1),
        ("12-megapixel photos", [_large_photos(scratch, folders, large)], _REPEATS),
    )
    for what, roots, repeats in of:
        # Interleaved, so that other load affects both.
        speeds: dict[int | None, list[Speed]] = {None: [], regions: []}
        for again in range(repeats):
            for number, found in speeds.items():
                gallery = scratch / f"{what}-{number}-{again}.sbtk"
                found.append(_speed(gallery, number, roots, embedder))
        both = []
        for number, found in speeds.items():
            gallery = scratch / f"{what}-{number}-0.sbtk"
            live = found[0].photos
            both.append(
                (
                    statistics.median(live / one.seconds for one in found),
                    _size(gallery) / live,
                    *(_query_ms(gallery, sketches, rerank) for rerank in _RERANKS),
                )
            )
        units = (
            f"indexing, photos/s (median of {repeats})",
            "disk, bytes a photo",
            "search for 24 hits, ms",
            "search for 24 hits and diffusion, ms",
        )
        for unit, before, after in zip(units, *both, strict=True):
            name = f"{live:,} {what}: {unit}"
            rows.append([name, f"{before:,.1f}", f"{after:,.1f}", f"{after / before:.2f}"])
            figures |= {f"{name}, without": before, f"{name}, with": after}
    return rows, figures


def _speed(gallery: Path, regions: int | None, roots: Sequence[Path], embedder: Embedder) -> Speed:
    """Make a gallery and return the speed."""
    started = time.perf_counter()
    live = update_gallery(gallery, roots, embedder, regions=regions).live
    return Speed(live, time.perf_counter() - started)


def _large_photos(scratch: Path, folders: dict[str, Path], count: int) -> Path:
    folder = scratch / "large"
    folder.mkdir()
    random = np.random.default_rng(0)
    for path in sorted(folders["a third"].iterdir())[:count]:
        save_as_a_camera(Image.open(path).convert("RGB"), _LARGE_PX, folder / path.name, random)
    return folder


def _size(gallery: Path) -> int:
    return sum(path.stat().st_size for path in gallery.rglob("*") if path.is_file())


def _query_ms(gallery: Path, sketches: Rows, rerank: Rerank) -> float:
    """Return the median time of a search in milliseconds, without embedding the sketch."""
    with Gallery.open(gallery) as opened:
        opened.answer(sketches[0], 24, rerank=rerank)
        times = []
        for sketch in sketches[:_QUERIES]:
            started = time.perf_counter()
            opened.answer(sketch, 24, rerank=rerank)
            times.append(time.perf_counter() - started)
    return statistics.median(times) * 1e3


if __name__ == "__main__":
    main()
