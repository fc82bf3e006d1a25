"""Peak memory of `sbtk index`, while embedding and while building the graph.

    python -m benchmarks.index_memory [--photos FOLDER] [--counts 1000 20000]

The peak is the kernel's high-water mark of resident memory (VmHWM), which is reset when the graph
begins. Needs Linux.
"""

from __future__ import annotations

import argparse
import contextlib
import re
import subprocess
import sys
import tempfile
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from benchmarks.commands import SBTK, environment
from benchmarks.photos import add_photos_option, reencode_photos
from benchmarks.result import Result, print_result

_POLL_S = 0.01
_GRAPH_BEGINS = "building the graph"


@dataclass(frozen=True)
class Peaks:
    """Peak resident memory of one run, in bytes; `graph_start` is the memory before the graph."""

    embedding: int
    graph_start: int
    graph: int


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
            peaks = index_monitored(folder, Path(scratch, "gallery.sbtk"), model)
        per_photo = (peaks.graph - peaks.graph_start) / count
        rows.append(
            [
                f"{count:,}",
                f"{peaks.embedding / 1e6:.0f} MB",
                f"{peaks.graph_start / 1e6:.0f} MB",
                f"{peaks.graph / 1e6:.0f} MB",
                f"{per_photo / 1e3:.2f} kB",
            ]
        )
        figures.append(
            {
                "photos": count,
                "embedding_bytes": peaks.embedding,
                "graph_start_bytes": peaks.graph_start,
                "graph_bytes": peaks.graph,
                "graph_bytes_per_photo": per_photo,
            }
        )
    return Result(
        title="Peak memory of `sbtk index`",
        columns=[
            "photos",
            "peak while embedding",
            "held as the graph begins",
            "peak while building the graph",
            "graph, a photo",
        ],
        rows=rows,
        figures={"runs": figures},
        notes=[*notes, "VmHWM of the process; 1 MB is 1,000,000 bytes"],
    )


def index_monitored(folder: Path, gallery: Path, model: str | None) -> Peaks:
    """Measure the peaks of one `sbtk index` of a folder into a new gallery."""
    chosen = ["--model", model] if model else []
    process = subprocess.Popen(
        [*SBTK, "index", str(folder), "--gallery", str(gallery), *chosen],
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    watch = _Watch(process.pid)
    reader = threading.Thread(target=watch.read_notices, args=(process.stderr,))
    reader.start()
    while True:
        watch.poll()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_POLL_S)
            break
    reader.join()
    if process.returncode or watch.at_graph is None:
        sys.exit(f"sbtk index failed ({process.returncode}):\n{''.join(watch.notices)}")
    embedding, graph_start = watch.at_graph
    return Peaks(embedding, graph_start, watch.peak)


class _Watch:
    """Monitors the notices and the high-water mark of a process."""

    def __init__(self, pid: int) -> None:
        self._folder = Path("/proc", str(pid))
        self.notices: list[str] = []
        self.at_graph: tuple[int, int] | None = None
        self.peak = 0

    def read_notices(self, stream: IO[str]) -> None:
        for line in stream:
            self.notices.append(line)
            if line.startswith(_GRAPH_BEGINS) and self.at_graph is None:
                self.at_graph = (self._status("VmHWM"), self._status("VmRSS"))
                self._folder.joinpath("clear_refs").write_text("5")

    def poll(self) -> None:
        if self.at_graph is not None:
            self.peak = max(self.peak, self._status("VmHWM"))

    def _status(self, key: str) -> int:
        try:
            text = self._folder.joinpath("status").read_text()
        except OSError:
            return 0
        match = re.search(rf"^{key}:\s+(\d+) kB$", text, re.MULTILINE)
        return int(match.group(1)) * 1024 if match else 0


if __name__ == "__main__":
    main()
