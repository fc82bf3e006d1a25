"""Cost of a large gallery: a cold query, an update with one new photo, and one without.

The gallery is synthetic: clustered vectors as embeddings, random neighbours, and empty files as
photos (none above 200,000), so nothing must be embedded. Each measurement is a process of its own.
On a busy machine, CPU time (`cpu_s`, `cpu_ms`) is more reliable.

    python -m benchmarks.large_gallery --count 100000 --folder /tmp/large
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from sbtk_runtime.bundle import Bundle
from sbtk_runtime.embedding.embedder import Embedder
from sbtk_runtime.gallery.catalogue import Embedding, Origin
from sbtk_runtime.gallery.folder import VECTORS_NAME
from sbtk_runtime.gallery.gallery import Gallery
from sbtk_runtime.gallery.neighbours import NEIGHBOURS_NAME
from sbtk_runtime.gallery.rows import Vectors
from sbtk_runtime.gallery.sign_codes import update_codes
from sbtk_runtime.gallery.update import update_gallery
from sbtk_runtime.gallery.writer import Catalogue
from sbtk_runtime.generated_inputs import clustered_vectors
from sbtk_runtime.machine import peak_resident_bytes, resident_bytes
from sbtk_runtime.manifest import MANIFEST_NAME, GalleryManifest
from sbtk_runtime.preprocess import PREPROCESSING
from sbtk_runtime.rerank import NEIGHBOURS

_BATCH = 4096
_MOST_FILES = 200_000


def make_gallery(folder: Path, count: int, bundle: Bundle, photos: Path) -> float:
    """Make a gallery of `count` photos; return the seconds spent on its sign codes."""
    dim = bundle.manifest.dim
    rows = clustered_vectors(count, dim, seed=0)
    folder.mkdir(parents=True)
    with Catalogue(folder, 1) as catalogue:
        catalogue.claim(Origin(bundle.manifest.model_id, "int8", dim, PREPROCESSING))
        vectors = Vectors(folder / VECTORS_NAME, dim)
        for first in range(0, count, _BATCH):
            part = rows[first : first + _BATCH]
            added = [
                _photo(photos, row, has_file=count <= _MOST_FILES)
                for row in range(first, first + len(part))
            ]
            catalogue.commit(added, [], vectors.append(first, part))
        started = time.perf_counter()
        codes = update_codes(folder, catalogue, vectors, None, lambda text: None)
        seconds = time.perf_counter() - started
        snapshot = catalogue.write_snapshot()
    _write_neighbours(folder, count, dim)
    GalleryManifest(
        generation=1,
        model_id=bundle.manifest.model_id,
        precision="int8",
        dim=dim,
        preprocessing=PREPROCESSING,
        live=count,
        snapshot=snapshot,
        codes=codes,
    ).write(folder)
    return seconds


def _photo(photos: Path, row: int, *, has_file: bool) -> Embedding:
    path = photos / f"{row // 1000:06d}" / f"IMG_{row:08d}.jpg"
    sha256 = hashlib.sha256(str(row).encode()).hexdigest()
    if not has_file:
        return Embedding(os.fsencode(path), 1_000_000 + row, 10**18 + row, sha256, row)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    status = path.stat()
    stamps = (status.st_ctime_ns, status.st_ino)
    return Embedding(os.fsencode(path), status.st_size, status.st_mtime_ns, sha256, row, *stamps)


def _write_neighbours(folder: Path, count: int, dim: int) -> None:
    near = np.random.default_rng(0).integers(0, count, (count, NEIGHBOURS), dtype=np.int32)
    np.savez(
        folder / NEIGHBOURS_NAME,
        format=np.array([1, dim]),
        rows=np.arange(count),
        near=near,
        similarities=np.full(near.shape, 0.9, dtype=np.float16),
    )


def cold_query(folder: Path, search: str) -> dict[str, float]:
    """Open a gallery, search it once, then 100 times, without an engine."""
    query = clustered_vectors(101, 512, seed=0, of=1000)
    before, read, cpu_before = resident_bytes(), _bytes_read(), time.process_time()
    started = time.perf_counter()
    with Gallery.open(folder) as gallery:
        opened = time.perf_counter()
        gallery.search(query[0], 10, search)  # type: ignore[arg-type]
        first = time.perf_counter()
        megabytes = (_bytes_read() - read) / 1e6
        memory = (peak_resident_bytes() - before) / 1e6
        cpu_s = time.process_time()
        times = []
        begun_all = time.process_time()
        for row in query[1:]:
            begun = time.perf_counter()
            gallery.search(row, 10, search)  # type: ignore[arg-type]
            times.append(time.perf_counter() - begun)
        cpu_ms = 1e3 * (time.process_time() - begun_all) / len(times)
    return {
        "cpu_s": cpu_s - cpu_before,
        "cpu_ms": cpu_ms,
        "open_s": opened - started,
        "open_and_query_s": first - started,
        "read_mb": megabytes,
        "memory_mb": memory,
        "p50_ms": 1e3 * float(np.median(times)),
    }


def query_process(folder: Path) -> dict[str, float]:
    """Measure the second of two `sbtk query` processes, including the engine's start."""
    from PIL import Image, ImageDraw

    sketch = folder.parent / "sketch.png"
    with Image.new("L", (256, 256), 255) as image:
        ImageDraw.Draw(image).ellipse((60, 80, 200, 180), outline=0, width=5)
        image.save(sketch)
    command = [sys.executable, "-m", "sbtk_cli", "query", str(sketch), "--gallery", str(folder)]
    for _ in range(2):
        before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        subprocess.run([*command, "--json"], check=True, capture_output=True)
        seconds = time.perf_counter() - started
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"seconds": seconds, "cpu_s": cpu_s, "peak_mb": after.ru_maxrss / 1e3}


def update(folder: Path, photos: Path) -> dict[str, float]:
    """Index a folder with one new photo, then again with nothing new."""
    with Embedder(engine="onnxruntime", threads=1) as embedder:
        result = {}
        for name in ("one_new_s", "nothing_new_s"):
            started, cpu = time.perf_counter(), time.process_time()
            update_gallery(folder, [photos], embedder)
            result[name] = time.perf_counter() - started
            result[name.replace("_s", "_cpu_s")] = time.process_time() - cpu
    return result


def _bytes_read() -> int:
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(lines[0].split()[1])


def _measured(*arguments: str) -> dict[str, float]:
    done = subprocess.run(
        [sys.executable, __file__, *arguments],
        env=os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        check=True,
        text=True,
    )
    answer: dict[str, float] = json.loads(done.stdout)
    return answer


def main() -> None:
    """Print a JSON object of measurements."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=100_000)
    parser.add_argument("--folder", type=Path, required=True, help="made if it does not exist")
    parser.add_argument("--ways", default="codes,exact")
    parser.add_argument("--cold", metavar="WAY", help=argparse.SUPPRESS)
    parser.add_argument("--process", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--update", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    folder = options.folder / f"{options.count}.sbtk"
    if options.cold:
        print(json.dumps(cold_query(folder, options.cold)))
        return
    if options.process:
        print(json.dumps(query_process(folder)))
        return
    photos = options.folder / f"photos-{options.count}"
    if options.update:
        print(json.dumps(update(folder, photos)))
        return
    result: dict[str, object] = {"count": options.count}
    if not (folder / MANIFEST_NAME).exists():
        result["codes_s"] = make_gallery(folder, options.count, Bundle.open(), photos)
    where = ("--folder", str(options.folder), "--count", str(options.count))
    for way in options.ways.split(","):
        result[way] = _measured(*where, "--cold", way)
    result["sbtk query"] = _measured(*where, "--process")
    if options.count > _MOST_FILES:  # without files, an update would find all photos missing
        print(json.dumps(result, indent=1))
        return
    photos.mkdir(exist_ok=True)
    from PIL import Image

    pixels = np.random.default_rng(time.time_ns()).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(photos / f"{time.time_ns()}.png")
    result["update"] = _measured(*where, "--update")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
