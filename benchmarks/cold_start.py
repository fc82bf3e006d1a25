"""Time of `sbtk query` and `sbtk --help` as whole processes, and of importing the same libraries.

    python -m benchmarks.cold_start [--runs 15] [--photos 200] [--model BUNDLE]

Each run is a new process, with files in the page cache. The contenders alternate.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.commands import SBTK, run, run_sbtk
from benchmarks.photos import copy_photos
from benchmarks.result import Result, print_result
from sbtk_runtime.generated_inputs import generate_sketches

# Prints every module from outside the standard library that a query has imported.
_LIST_MODULES = """
import contextlib, io, json, sys
before = set(sys.modules)
from sbtk_cli.main import main
with contextlib.redirect_stdout(io.StringIO()):
    code = main(sys.argv[1:])
assert code == 0, code
own = {"sbtk_cli", "sbtk_runtime"} | set(sys.stdlib_module_names)
found = [name for name in sys.modules if name not in before]
print(json.dumps([name for name in found if name.partition(".")[0] not in own]))
"""
_IMPORT_MODULES = """
import contextlib, importlib, sys
for name in sys.argv[1:]:
    with contextlib.suppress(ImportError):
        importlib.import_module(name)
"""


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=15)
    parser.add_argument("--photos", type=int, default=200, help="photos in the gallery")
    parser.add_argument("--model", help="bundle; by default the pretrained one")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        print_result(
            measure(Path(scratch), options.runs, options.photos, options.model),
            "benchmarks.cold_start",
            as_json=options.json,
        )


def measure(scratch: Path, runs: int, photos: int, model: str | None) -> Result:
    """Measure the wall time of each command, with a gallery of generated photos in `scratch`."""
    chosen = ["--model", model] if model else []
    sketch, gallery = scratch / "sketch.png", scratch / "gallery.sbtk"
    sketch.write_bytes(generate_sketches(1)[0])
    copy_photos(None, photos, scratch / "photos")
    run_sbtk("index", str(scratch / "photos"), "--gallery", str(gallery), "--quiet", *chosen)
    query = ["query", str(sketch), "--gallery", str(gallery), "--quiet", *chosen]
    modules = json.loads(run([sys.executable, "-c", _LIST_MODULES, *query]))
    commands = {
        "sbtk query": [*SBTK, *query],
        "importing the same libraries": [sys.executable, "-c", _IMPORT_MODULES, *modules],
        "sbtk --help": [*SBTK, "--help"],
        "Python alone": [sys.executable, "-c", "pass"],
    }
    seconds = _run_interleaved(commands, runs)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    ratio = medians["sbtk query"] / medians["importing the same libraries"]
    libraries = sorted({name.partition(".")[0] for name in modules})
    return Result(
        title="Cold processes",
        columns=["process", "median", "fastest", "slowest"],
        rows=[
            [name, *(f"{figure:.3f} s" for figure in (medians[name], min(times), max(times)))]
            for name, times in seconds.items()
        ],
        figures={
            "median_s": medians,
            "query_times_imports": ratio,
            "seconds": seconds,
            "libraries": libraries,
        },
        notes=[
            f"`sbtk query` takes {ratio:.2f} times as long as importing the same libraries: "
            f"{', '.join(libraries)}",
            f"{runs} interleaved runs of each; gallery of {photos} photos; files in the page cache",
        ],
    )


def _run_interleaved(commands: Mapping[str, Sequence[str]], runs: int) -> dict[str, list[float]]:
    seconds: dict[str, list[float]] = {name: [] for name in commands}
    for index in range(runs + 1):
        for name, command in commands.items():
            started = time.perf_counter()
            run(command)
            if index > 0:  # the first round fills the page cache
                seconds[name].append(time.perf_counter() - started)
    return seconds


if __name__ == "__main__":
    main()
