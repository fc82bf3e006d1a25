"""Peak memory of `sbtk index`.

    python -m benchmarks.index_memory [--photos FOLDER] [--counts 1000 20000]

The peak is the kernel's high-water mark of resident memory (VmHWM). Needs Linux.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.commands import SBTK, environment, resident_bytes
from benchmarks.photos import add_photos_option, reencode_photos
from benchmarks.result import Result, print_result

_POLL_S = 0.01


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_photos_option(parser, "photos to make the indexed ones from")
    parser.add_argument("--counts", type=int, nargs="+", default=[1000, 20_000])
    parser.add_argument("--model", help="bundle; by default the pretrained one")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    print_result(
        measure(options.photos, options.counts, options.model),
        "benchmarks.index_memory",
        as_json=options.json,
    )


def measure(photos: Path | None, counts: list[int], model: str | None) -> Result:
    """Measure the peaks of indexing each number of photos into a new gallery."""
    rows, figures, notes = [], [], []
    for count in counts:
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch, "photos")
            notes.append(reencode_photos(photos, count, folder))
            peak_bytes = index_peak(folder, Path(scratch, "gallery.sbtk"), model)
        rows.append([f"{count:,}", f"{peak_bytes / 1e6:.0f} MB"])
        figures.append({"photos": count, "peak_bytes": peak_bytes})
    return Result(
        title="Peak memory of `sbtk index`",
        columns=["photos", "peak"],
        rows=rows,
        figures={"runs": figures},
        notes=[*notes, "VmHWM of the process; 1 MB is 1,000,000 bytes"],
    )


def index_peak(folder: Path, gallery: Path, model: str | None) -> int:
    """Measure the peak, in bytes, of one `sbtk index` of a folder into a new gallery."""
    chosen = ["--model", model] if model else []
    with tempfile.TemporaryFile("w+") as notices:
        process = subprocess.Popen(
            [*SBTK, "index", str(folder), "--gallery", str(gallery), *chosen],
            env=environment(),
            stdout=subprocess.DEVNULL,
            stderr=notices,
        )
        peak = 0
        while process.poll() is None:
            peak = max(peak, resident_bytes(process.pid, "VmHWM"))
            time.sleep(_POLL_S)
        if process.returncode:
            notices.seek(0)
            sys.exit(f"sbtk index failed ({process.returncode}):\n{notices.read()}")
    return peak


if __name__ == "__main__":
    main()
