"""`sbtk push`: bring the photos of a gallery into a database."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click
from click.core import ParameterSource

from sbtk_cli import options, output
from sbtk_runtime.errors import BadConfig
from sbtk_runtime.files import count_text, printable_name

if TYPE_CHECKING:
    from sbtk_runtime.gallery.remote import RemoteStore

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
sbtk push --list-sources --at postgresql://me@db.example/photos
sbtk push --remove-source archive --at postgresql://me@db.example/photos
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
@click.option(
    "--list-sources",
    is_flag=True,
    help="Push nothing; list the collection's sources with their numbers of photos.",
)
@click.option(
    "--remove-source",
    "removed",
    metavar="NAME",
    help="Push nothing; say how many photos of a source are in the collection, and with --yes "
    "remove them. No gallery and no file is changed.",
)
@click.option("--yes", "is_sure", is_flag=True, help="With --remove-source: remove the photos.")
@options.json
@options.quiet
def command(
    gallery: Path,
    at: str | None,
    sources: tuple[str, ...],
    list_sources: bool,
    removed: str | None,
    is_sure: bool,
    as_json: bool,
    quiet: bool,
) -> int:
    """Run `sbtk push`."""
    if at is None:
        raise click.UsageError(
            "Name the collection: --at postgresql://USER@HOST/DATABASE or milvus://HOST:PORT"
        )
    if is_sure and removed is None:
        raise click.UsageError("--yes requires --remove-source.")
    if list_sources or removed is not None:
        is_gallery_named = (
            click.get_current_context().get_parameter_source("gallery")
            == ParameterSource.COMMANDLINE
        )
        if sources or is_gallery_named or (list_sources and removed is not None):
            raise click.UsageError(
                "--list-sources and --remove-source concern the collection only: leave out the "
                "gallery, --source, and the other one of the two."
            )
    from sbtk_runtime.gallery.push import push_gallery
    from sbtk_runtime.gallery.remote import open_store

    if list_sources or removed is not None:
        store = open_store(at)
        if removed is None:
            return _list(store, as_json=as_json)
        return _remove(store, removed, is_sure=is_sure, as_json=as_json, quiet=quiet)
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
            "of other shards or folders and left out": report.other_shards,
        }
        done = ", ".join(f"{count:,} {word}" for word, count in counts.items() if count)
        photos = count_text(report.pushed + report.unchanged, "photo")
        names = ", ".join(map(printable_name, report.sources))
        seconds = output.duration_text(report.seconds)
        output.answer(
            f"{photos} of {names} at {store.address.shown} ({done or 'nothing new'}) in {seconds}"
        )
    left_out = report.damaged or report.damaged_regions or report.collisions or report.other_shards
    return 3 if left_out else 0


def _list(store: RemoteStore, *, as_json: bool) -> int:
    from sbtk_runtime.gallery.remote_sources import list_sources

    for source in list_sources(store):
        if as_json:
            output.answer_json(asdict(source))
            continue
        shards = f" in {count_text(len(source.shards), 'shard')}" if source.shards else ""
        if source.absent_shards:
            shards += f", without {', '.join(source.absent_shards[:10])}"
            shards += f" and {more:,} more" if (more := len(source.absent_shards) - 10) > 0 else ""
        output.answer(
            f"{printable_name(source.name)}: {count_text(source.photos, 'photo')}{shards}"
        )
    return 0


def _remove(store: RemoteStore, name: str, *, is_sure: bool, as_json: bool, quiet: bool) -> int:
    from sbtk_runtime.gallery.remote import MOST_COUNTED
    from sbtk_runtime.gallery.remote_sources import count_source, remove_source

    source = count_source(store, name)
    photos = source.photos
    if is_sure:
        with options.resumable_progress(quiet=quiet) as progress:
            photos = remove_source(
                store,
                source,
                progress=progress,
                notify=lambda text: output.notice(text, quiet=quiet),
            )
    at = store.address.shown
    if as_json:
        fields = {"at": at, "source": source.name, "photos": photos, "removed": is_sure}
        output.answer_json(fields)
        return 0
    shown = f"{count_text(photos, 'photo')} of {printable_name(source.name)}"
    if is_sure:
        output.answer(f"{shown} removed from {at}")
    else:
        least = "at least " if photos == MOST_COUNTED else ""
        output.answer(f"nothing removed yet: --yes removes {least}{shown} from {at}")
    return 0


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
