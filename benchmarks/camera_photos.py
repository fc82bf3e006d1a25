"""Indexing of 12-megapixel photos compared with a PyTorch loop, and the savings of previews.

    python -m benchmarks.camera_photos --photos FOLDER [--count 100] [--repeats 3]

The photos are enlarged to 4,000 pixels, with noise, so that they take as long to decode as a
camera's JPEG. The loop is the usual one in torch: a DataLoader that decodes and resizes in one
process per core, and torchvision's ResNet50. Each run is a process of its own, including its start;
runs of both alternate. A preview is the photo as a smaller JPEG, as some cameras embed it: the
cosine of its embedding with the whole photo's, and its CPU time.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.commands import run, run_sbtk
from benchmarks.photos import add_photos_option, copy_photos, list_photos, save_as_a_camera
from benchmarks.result import Result, print_result
from sbtk_runtime.embedding.embedder import Embedder
from sbtk_runtime.embedding.stream import Embedded
from sbtk_runtime.machine import cpu_threads

_SIDE_PX = 4_000
_PREVIEWS_PX = (1_620, 1_024, 640, 512, 320, 160)
_PREVIEW_QUALITY = 80


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_photos_option(parser, "photos to enlarge")
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--loop", type=Path, metavar="FOLDER", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.loop:
        run_torch_loop(options.loop)
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "photos"
        named = copy_photos(options.photos, options.count, Path(scratch) / "small")
        enlarge(Path(scratch) / "small", folder)
        for result in (
            measure_indexing(folder, Path(scratch), options.repeats, named),
            measure_previews(folder, Path(scratch) / "previews", named),
        ):
            print_result(result, "benchmarks.camera_photos", as_json=options.json)


def enlarge(source: Path, target: Path) -> None:
    """Write each photo of a folder with 4,000 pixels on its longer side."""
    target.mkdir()
    random = np.random.default_rng(0)
    for path in list_photos(source):
        with Image.open(path) as opened:
            photo = opened.convert("RGB")
        size_px = _size_px(photo, _SIDE_PX)
        save_as_a_camera(photo, size_px, target / f"{path.stem}.jpg", random)


def measure_indexing(folder: Path, scratch: Path, repeats: int, named: str) -> Result:
    """Time `sbtk index` and the loop, in turn."""
    count = len(list_photos(folder))
    ours, theirs = [], []
    for index in range(repeats):
        started = time.perf_counter()
        run_sbtk("index", str(folder), "--gallery", str(scratch / f"{index}.sbtk"), "--quiet")
        ours.append(count / (time.perf_counter() - started))
        started = time.perf_counter()
        run([sys.executable, "-m", "benchmarks.camera_photos", "--loop", str(folder)])
        theirs.append(count / (time.perf_counter() - started))
    ratio = statistics.median(a / b for a, b in zip(ours, theirs, strict=True))
    return Result(
        title=f"{count:,} photos of 12 megapixels, whole processes",
        columns=["", *(f"run {number + 1}" for number in range(repeats))],
        rows=[
            ["`sbtk index`, photos/s", *(f"{value:.1f}" for value in ours)],
            ["PyTorch and a DataLoader, photos/s", *(f"{value:.1f}" for value in theirs)],
        ],
        figures={"index_per_s": ours, "loop_per_s": theirs, "ratio": ratio},
        notes=[named, f"median ratio {ratio:.1f}; {cpu_threads()} cores"],
    )


def run_torch_loop(folder: Path) -> None:
    """Embed the photos of a folder as a script with torch would."""
    import torch
    from torch.utils.data import DataLoader, Dataset
    from torchvision.models import resnet50
    from torchvision.transforms.v2.functional import normalize

    paths = list_photos(folder)

    class Photos(Dataset[torch.Tensor]):
        def __len__(self) -> int:
            return len(paths)

        def __getitem__(self, index: int) -> torch.Tensor:
            with Image.open(paths[index]) as image:
                image.draft("RGB", (224, 224))
                pixels = np.array(image.convert("RGB").resize((224, 224)))
            scaled = torch.from_numpy(pixels).permute(2, 0, 1).float() / 255
            normalized: torch.Tensor = normalize(
                scaled, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
            )
            return normalized

    network = resnet50().eval().to(memory_format=torch.channels_last)
    loader = DataLoader(Photos(), batch_size=8, num_workers=cpu_threads())
    with torch.inference_mode():
        for batch in loader:
            network(batch.contiguous(memory_format=torch.channels_last))


def measure_previews(folder: Path, scratch: Path, named: str) -> Result:
    """Compare embeddings of previews with those of whole photos."""
    paths = list_photos(folder)
    rows, figures = [], {}
    with Embedder(engine="onnxruntime", threads=1) as embedder:
        whole, whole_s = _embedded(embedder, paths)
        for side_px in _PREVIEWS_PX:
            scratch.mkdir()
            for path in paths:
                with Image.open(path) as image:
                    small = image.resize(_size_px(image, side_px), Image.Resampling.LANCZOS)
                small.save(scratch / path.name, quality=_PREVIEW_QUALITY)
            found, seconds = _embedded(embedder, list_photos(scratch))
            shutil.rmtree(scratch)
            cosines = (whole * found).sum(axis=1)
            figures[str(side_px)] = [float(cosines.mean()), float(cosines.min()), seconds]
            rows.append(
                [f"{side_px}", f"{cosines.mean():.4f}", f"{cosines.min():.4f}", _ms(seconds)]
            )
    return Result(
        title="Previews of 12-megapixel photos",
        columns=["longer side, px", "mean cosine", "smallest", "decode and engine, core"],
        rows=[["whole photo", "", "", _ms(whole_s)], *rows],
        figures=figures | {"whole_s": whole_s},
        notes=[f"{named}; JPEG quality {_PREVIEW_QUALITY}; INT8 on ONNX Runtime, one thread"],
    )


def _embedded(embedder: Embedder, paths: list[Path]) -> tuple[np.ndarray, float]:
    """Return the rows of photos, and core-seconds a photo."""
    started = time.process_time()
    items = list(embedder.stream(paths, "photo"))
    seconds = (time.process_time() - started) / len(paths)
    return np.stack([item.row for item in items if isinstance(item, Embedded)]), seconds


def _size_px(image: Image.Image, side_px: int) -> tuple[int, int]:
    """Return width and height of an image with a longer side of `side_px`."""
    scale = side_px / max(image.size)
    return round(image.width * scale), round(image.height * scale)


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.0f} ms"


if __name__ == "__main__":
    main()
