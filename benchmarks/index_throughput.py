"""Throughput of `sbtk index`, relative to the limit set by decoding and engine on all cores.

    python -m benchmarks.index_throughput [--photos FOLDER] [--count 1000] [--repeats 3]

The limit is cores / (core-seconds of decoding + core-seconds of the engine, per photo). Both are
counted by `sbtk index` during the same run, and measured again separately between runs.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.commands import run_sbtk
from benchmarks.photos import add_photos_option, copy_photos, list_photos
from benchmarks.result import Result, print_result
from sbtk_runtime.bundle import Bundle
from sbtk_runtime.engines.registry import open_engine
from sbtk_runtime.machine import cpu_threads
from sbtk_runtime.preprocess import prepare

_ALONE = 128
_BATCH = 8


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_photos_option(parser)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--model", help="bundle; by default the pretrained one")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        result = measure(
            Path(scratch), options.photos, options.count, options.repeats, options.model
        )
        print_result(result, "benchmarks.index_throughput", as_json=options.json)


def measure(
    scratch: Path, photos: Path | None, count: int, repeats: int, model: str | None
) -> Result:
    """Measure the speed of indexing `count` photos, `repeats` times, relative to the limit."""
    folder = scratch / "photos"
    named = copy_photos(photos, count, folder)
    runs, alone = [], []
    for index in range(repeats):
        alone.append(measure_core_seconds(folder, model))
        runs.append(index_once(folder, scratch / f"{index}.sbtk", model))
    cores = cpu_threads()
    allowed_alone = cores / statistics.median(decode + engine for decode, engine in alone)
    rows = []
    for number, run in enumerate(runs, start=1):
        rows.append(
            [
                f"run {number}",
                f"{run['photos_per_s']:.1f}/s",
                f"{run['embedding_per_s']:.1f}/s",
                f"{run['decode_core_ms']:.2f} ms",
                f"{run['engine_core_ms']:.2f} ms",
                f"{run['allowed_per_s']:.1f}/s",
                f"{run['embedding_per_s'] / run['allowed_per_s']:.1%}",
                f"{run['photos_per_s'] / run['allowed_per_s']:.1%}",
                f"{run['photos_per_s'] / allowed_alone:.1%}",
            ]
        )
    return Result(
        title=f"`sbtk index`, {count:,} photos",
        columns=[
            "",
            "whole update",
            "embedding",
            "decode, core",
            "engine, core",
            "allowed",
            "embedding / allowed",
            "whole / allowed",
            "whole / allowed alone",
        ],
        rows=rows,
        figures={"runs": runs, "alone_core_s": alone, "allowed_alone_per_s": allowed_alone},
        notes=[
            f"{named}; each run in a new process and a new gallery; {cores} cores",
            "whole update: walking, reading, hashing, embedding, commits, the graph, publishing; "
            "without the start of the process",
            "alone: decoding on one thread, then the engine on all, between the runs: "
            + ", ".join(f"{decode * 1e3:.2f} + {engine * 1e3:.2f} ms" for decode, engine in alone),
        ],
    )


def index_once(folder: Path, gallery: Path, model: str | None) -> dict[str, Any]:
    """Measure one `sbtk index` of a folder into a new gallery."""
    chosen = ["--model", model] if model else []
    started = time.perf_counter()
    answer = run_sbtk("index", str(folder), "--gallery", str(gallery), "--json", "--quiet", *chosen)
    process_s = time.perf_counter() - started
    report = json.loads(answer.splitlines()[-1])
    timings, photos = report["timings"], report["new"]
    decode_s = timings["decode_s"] + timings["preprocess_s"]
    return {
        "photos": photos,
        "process_s": process_s,
        "report": report,
        "photos_per_s": photos / report["seconds"],
        "embedding_per_s": photos / timings["wall_s"],
        "decode_core_ms": decode_s / photos * 1e3,
        "engine_core_ms": timings["engine_s"] / photos * 1e3,
        "allowed_per_s": cpu_threads() * photos / (decode_s + timings["engine_s"]),
    }


def measure_core_seconds(folder: Path, model: str | None) -> tuple[float, float]:
    """Return the core-seconds of decoding and of embedding one photo, measured separately."""
    contents = [path.read_bytes() for path in list_photos(folder)[:_ALONE]]
    started = time.thread_time()
    pixels = np.stack([prepare(content, "photo").pixels for content in contents])
    decode_s = (time.thread_time() - started) / len(contents)
    engine = open_engine(Bundle.open(model))
    try:
        engine.run(pixels[:_BATCH], "photo")
        started = time.process_time()
        for start in range(0, len(pixels), _BATCH):
            engine.run(pixels[start : start + _BATCH], "photo")
        engine_s = (time.process_time() - started) / len(pixels)
    finally:
        engine.close()
    return decode_s, engine_s


if __name__ == "__main__":
    main()
