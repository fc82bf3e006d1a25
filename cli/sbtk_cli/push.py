"""`sbtk push`: bring the photos of a gallery into a database."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import click

from sbtk_cli import options, output
from sbtk_runtime.errors import BadConfig
from sbtk_runtime.files import count_text, printable_name

_PATIENCE_S = 60.0
_HELP = """Push a gallery to PostgreSQL or Milvus.

Inserts photos that are new or changed, and deletes those that are no longer in the gallery; photos
of other sources stay. Only embeddings and paths are sent, never images. If interrupted, run the
same command again to resume. 'sbtk query --at URL' then searches there.

\b
sbtk push --at postgresql://me@db.example/photos
sbtk push archive.sbtk --at postgresql://me@db.example/photos --source archive
SBTK_TOKEN=USER:PASSWORD sbtk push --at https://milvus.example:19530
sbtk query cat.png --at postgresql://me@db.example/photos --photos archive=/mnt/archive
"""


@click.command(help=_HELP)
@click.argument(
    "gallery",
    type=options.PATH,
    envvar="SBTK_GALLERY",
    default=options.DEFAULT_GALLERY,
)
@options.at
@click.option(
    "--source",
    "sources",
    multiple=True,
    metavar="NAME",
    help="Name of the gallery's photos there; machines that push the same photos use the same "
    "name. NAME=FOLDER, repeatable, for a gallery of several folders.  [default: host:/folder]",
)
@options.json
@options.quiet
def command(
    gallery: Path, at: str | None, sources: tuple[str, ...], as_json: bool, quiet: bool
) -> int:
    """Run `sbtk push`."""
    if at is None:
        raise click.UsageError(
            "Name the collection: --at postgresql://USER@HOST/DATABASE or milvus://HOST:PORT"
        )
    from sbtk_runtime.gallery.push import push_gallery
    from sbtk_runtime.gallery.remote import open_store

    options.existing_gallery(gallery)
    store = open_store(at, patience_s=_PATIENCE_S)
    with options.resumable_progress(quiet=quiet) as progress:
        report = push_gallery(
            gallery,
            store,
            _names(sources),
            progress=progress,
            notify=lambda text: output.notice(text, quiet=quiet),
        )
    for text in report.notices:
        output.notice(text, quiet=quiet)
    if as_json:
        output.answer_json({"at": store.address.shown, **asdict(report)})
    else:
        counts = {
            "pushed": report.pushed,
            "deleted": report.deleted,
            "damaged and left out": report.damaged,
            "without their damaged regions": report.damaged_regions,
            "left out because another photo has their id": report.collisions,
        }
        done = ", ".join(f"{count:,} {word}" for word, count in counts.items() if count)
        photos = count_text(report.pushed + report.unchanged, "photo")
        names = ", ".join(map(printable_name, report.sources))
        seconds = output.duration_text(report.seconds)
        output.answer(
            f"{photos} of {names} at {store.address.shown} ({done or 'nothing new'}) in {seconds}"
        )
    return 3 if report.damaged or report.damaged_regions or report.collisions else 0


def _names(sources: tuple[str, ...]) -> dict[str, str] | str | None:
    """Return the name of the only folder, or the names by absolute folder."""
    if not sources:
        return None
    if len(sources) == 1 and "=" not in sources[0]:
        return sources[0]
    names = {}
    for text in sources:
        name, is_pair, folder = text.partition("=")
        place = str(Path(folder).absolute())
        if not is_pair or not folder or place in names:
            again = " after another one for this folder" if place in names else ""
            raise BadConfig(
                f"--source {printable_name(text)}{again}", "--source NAME=FOLDER for each folder"
            )
        names[place] = name
    return names
