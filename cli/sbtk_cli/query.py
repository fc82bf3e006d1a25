"""`sbtk query`: find the photos of a gallery that look like a sketch."""

from __future__ import annotations

import contextlib
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from sbtk_cli import options, output
from sbtk_cli.options import bundle_for_gallery
from sbtk_runtime.errors import BadImage
from sbtk_runtime.files import count_text, printable_name, write_atomically

if TYPE_CHECKING:
    from datetime import date

    from sbtk_cli.terminal_images import Way
    from sbtk_runtime.bundle import Bundle
    from sbtk_runtime.engines.base import EngineOptions
    from sbtk_runtime.gallery.gallery import Gallery, Hit, Search
    from sbtk_runtime.gallery.remote_gallery import RemoteGallery
    from sbtk_runtime.preprocess import Kind
    from sbtk_runtime.rerank import RerankChoice

_HELP = """Find the photos that look like a sketch.

SKETCH is an image file, or - for standard input. A photo also works. Prints rank, score and path,
best first. The score is a cosine, at most 1; for binary codes, the share of equal bits minus the
share of different bits.

\b
sbtk query cat.png
sbtk query cat.png -k 30 --html cats.html
sbtk query cat.png --from 2024-05-01 --to 2024-05-31
sbtk query cat.png --show
sbtk query cat.png --paths0 | xargs -0 cp -t found/
"""


@click.command(help=_HELP)
@click.argument("sketch", type=options.NonEmptyPath(allow_dash=True))
@click.option(
    "-k",
    type=options.IntRange(min=1),
    default=10,
    show_default=True,
    metavar="N",
    help="Number of photos to find.",
)
@options.as_detected
@options.gallery
@options.at
@options.mounts
@options.search
@options.rerank
@options.taken_from
@options.taken_to
@click.option(
    "--no-fold",
    "fold",
    flag_value=False,
    default=True,
    help="List identical photos one by one.",
)
@click.option(
    "--no-regions",
    "regions",
    flag_value=False,
    default=True,
    help="Compare whole photos only, in a gallery with regions.",
)
@click.option(
    "--html", "sheet", type=options.PATH, metavar="FILE", help="Also write a contact sheet."
)
@click.option("--show", is_flag=True, help="Also show the photos in terminals that support images.")
@click.option(
    "--show-as",
    "way",
    type=click.Choice(["kitty", "iterm2", "sixel", "blocks"]),
    help="Show the photos in this way, whatever the terminal reports.",
)
@options.json
@click.option("--paths0", is_flag=True, help="Print paths only, each ended by NUL, for 'xargs -0'.")
@options.model
@options.query_engine_options
@options.quiet
def command(
    sketch: str,
    k: int,
    kind: Kind | None,
    gallery: Path,
    at: str | None,
    mounts: tuple[str, ...],
    search: Search,
    rerank: RerankChoice,
    taken_from: date | None,
    taken_to: date | None,
    fold: bool,
    regions: bool,
    sheet: Path | None,
    show: bool,
    way: Way | None,
    as_json: bool,
    paths0: bool,
    model: str | None,
    engine_options: EngineOptions,
    quiet: bool,
) -> int:
    """Run `sbtk query`."""
    if as_json and paths0:
        raise click.UsageError("--json and --paths0 cannot be combined.")
    is_shown = show or way is not None
    if is_shown and (as_json or paths0):
        raise click.UsageError("--show cannot be combined with --json or --paths0.")
    if is_shown:
        import textual_image  # noqa: F401 -- fails before any work is done
    if sheet is not None:
        options.check_output_file(sheet)
    data = _read(sketch)
    from sbtk_runtime.embedding.embedder import Embedder
    from sbtk_runtime.gallery.gallery import Gallery

    opened, bundle, name = _open(gallery, at, mounts, model)
    with Embedder(
        bundle,
        engine_options,
        batch=1,
        single_query=True,
        notify=lambda text: output.notice(text, quiet=quiet),
    ) as embedder:
        try:
            kind = kind or _detect(data, sketch, quiet=quiet)
            answer = opened.ask(
                *(data, embedder, k, kind),
                search=search,
                taken=(taken_from, taken_to),
                rerank=opened.choose_rerank(rerank, kind),
                fold=fold,
                regions=regions,
            )
        except BadImage as problem:
            raise _add_name(problem, sketch) from problem
    for text in opened.notices:
        output.notice(text, quiet=quiet)
    hits = answer.hits
    if answer.no_close_match:
        output.notice("no close match: these are best guesses", quiet=quiet)
    moved = _changed_since(hits, opened)
    try:
        if is_shown:
            _show(hits, way, quiet=quiet)
        _print_hits(hits, as_json=as_json, paths0=paths0)
    finally:
        # Also if the reader of the hits closes the pipe, as in `sbtk query ... | head -1`.
        if sheet is not None:
            framed = [replace(hit, region=None) if hit in moved else hit for hit in hits]
            _write_sheet(sheet, data, framed, kind, sketch, name, opened)
            output.notice(f"contact sheet: {printable_name(sheet)}", quiet=quiet)
    gone = sum(not os.path.lexists(hit.path) for hit in hits)
    if isinstance(opened, Gallery) and gone:
        text = f"{gone} of these {count_text(len(hits), 'photo')} no longer exist"
        output.notice(f"{text}: run 'sbtk index' again", quiet=quiet)
    elif gone:
        which = "this photo" if len(hits) == 1 else f"{gone} of these {len(hits)} photos"
        text = f"{which} {'is' if gone == 1 else 'are'} not on this machine"
        output.notice(f"{text}: --photos SOURCE=FOLDER names the folder of a source", quiet=quiet)
    if moved:
        text = f"{len(moved)} of these {count_text(len(hits), 'photo')} changed after indexing"
        again = "sbtk index" if isinstance(opened, Gallery) else "sbtk index and sbtk push"
        output.notice(f"{text}, so their regions may be wrong: run {again} again", quiet=quiet)
    # Photos with damaged embeddings count like files that could not be read.
    return 3 if opened.unusable else 0


def _open(
    gallery: Path, at: str | None, mounts: tuple[str, ...], model: str | None
) -> tuple[Gallery | RemoteGallery, Bundle, str]:
    """Return the gallery or collection, the bundle that made it, and its printable name."""
    if (at := options.chosen_collection(at, mounts)) is not None:
        there = options.open_collection(at, mounts)
        return there, options.bundle_for_collection(model, there), there.name
    from sbtk_runtime.gallery.gallery import Gallery

    opened = Gallery.open(options.existing_gallery(gallery))
    bundle = bundle_for_gallery(model, gallery, opened.manifest.model_id)
    return opened, bundle, printable_name(gallery)


def _detect(data: bytes, sketch: str, *, quiet: bool) -> Kind:
    """Return the detected kind of the image; tell the user if it is a photo."""
    from PIL import Image

    from sbtk_runtime.preprocess import detect_kind, prepare

    kind = detect_kind(Image.fromarray(prepare(data, "photo").pixels))
    if kind == "photo":
        text = f"{_name(sketch)} looks like a photo and is searched as one"
        output.notice(f"{text}; to search it as a sketch: --as sketch", quiet=quiet)
    return kind


def _read(sketch: str) -> bytes:
    """Return the bytes of the file, or of standard input for `-`."""
    from sbtk_runtime.images import MAX_FILE_BYTES, read_image_bytes

    if re.match(r"(?i)(https?|ftp|data|s3):", sketch) and not os.path.lexists(sketch):
        raise BadImage(
            f"{printable_name(sketch)} is a URL",
            "a file: sbtk does not use the network",
            "download it, then name the file",
        )
    try:
        if sketch != "-":
            return read_image_bytes(sketch)
        # A closed standard input is `None`.
        if sys.stdin is None or sys.stdin.isatty():
            raise click.UsageError("'-' reads a sketch from standard input, but nothing is piped.")
        data = sys.stdin.buffer.read(MAX_FILE_BYTES + 1)
        if not 0 < len(data) <= MAX_FILE_BYTES:
            raise BadImage("empty or too long", f"1 to {MAX_FILE_BYTES:,} bytes of an image file")
        return data
    except BadImage as problem:
        raise _add_name(problem, sketch) from problem


def _add_name(problem: BadImage, sketch: str) -> BadImage:
    return BadImage(f"{_name(sketch)}: {problem.found}", problem.expected, problem.next_step)


def _name(sketch: str) -> str:
    return "standard input" if sketch == "-" else printable_name(sketch)


def _show(hits: Sequence[Hit], way: Way | None, *, quiet: bool) -> None:
    from sbtk_cli.terminal_images import show_photos

    sys.stdout.flush()
    why_not = show_photos(hits, way)
    if why_not:
        output.notice(f"no images: {why_not}", quiet=quiet)


def _changed_since(hits: Sequence[Hit], opened: Gallery | RemoteGallery) -> list[Hit]:
    """Return the hits with a region whose files have changed since they were indexed."""
    changed = []
    for hit in hits:
        if hit.region is not None and (photo := opened.photo(hit.id)) is not None:
            with contextlib.suppress(OSError, ValueError):
                if photo.has_changed(os.stat(hit.path)):  # noqa: PTH116 -- may be any text
                    changed.append(hit)
    return changed


def _print_hits(hits: Sequence[Hit], *, as_json: bool, paths0: bool) -> None:
    if paths0:
        sys.stdout.buffer.write(b"".join(os.fsencode(hit.path) + b"\0" for hit in hits))
        return
    for hit in hits:
        if as_json:
            output.answer_json(hit.to_json())
        else:
            copies = f"  +{len(hit.copies):,} identical" if hit.copies else ""
            output.answer(f"{hit.rank:3}  {hit.score:6.3f}  {printable_name(hit.path)}{copies}")


def _write_sheet(
    sheet: Path,
    data: bytes,
    hits: Sequence[Hit],
    kind: Kind,
    sketch: str,
    gallery: str,
    opened: Gallery | RemoteGallery,
) -> None:
    from sbtk_runtime.contact_sheet import contact_sheet
    from sbtk_runtime.preprocess import PREPROCESSINGS

    facts = {
        "Photos": f"{len(hits):,} of {opened.count:,}",
        "Gallery": gallery,
        "Model": opened.manifest.model_id,
    }
    page = contact_sheet(
        data,
        hits,
        name=_name(Path(sketch).name),
        kind=kind,
        preprocessing=PREPROCESSINGS[opened.manifest.preprocessing],
        facts=facts,
    )
    write_atomically(sheet, page.encode("utf-8"))
