"""`sbtk merge`: put the galleries of several machines together."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import click

from sbtk_cli import options, output
from sbtk_runtime.files import count_text, printable_name

_HELP = """Merge galleries of one model into one.

GALLERIES are folders that 'sbtk index' made, such as the shards of several machines. Their
embeddings are copied; no photo is read. The merged gallery holds exactly their photos: run the
command again after they were updated. If interrupted, run the same command again to resume.

\b
sbtk index photos/ --shard 1/2 --gallery a.sbtk     on one machine
sbtk index photos/ --shard 2/2 --gallery b.sbtk     on another
sbtk merge a.sbtk b.sbtk --gallery all.sbtk
"""
_SEVERAL = (
    ". A folder that machines index by different paths counts as several: mount it at the same "
    "path everywhere, or push the shards to a database"
)


@click.command(help=_HELP)
@click.argument("galleries", nargs=-1, type=options.PATH, required=True)
@options.gallery
@options.json
@options.quiet
def command(galleries: tuple[Path, ...], gallery: Path, as_json: bool, quiet: bool) -> int:
    """Run `sbtk merge`."""
    from sbtk_runtime.gallery.merge import merge_galleries

    for source in galleries:
        options.existing_gallery(source)
    with options.resumable_progress(quiet=quiet) as progress:
        report = merge_galleries(
            galleries,
            gallery,
            progress=progress,
            notify=lambda text: output.notice(text, quiet=quiet),
        )
    for text in report.notices:
        output.notice(text, quiet=quiet)
    if report.absent_shards:
        shown = ", ".join(report.absent_shards[:10])
        more = len(report.absent_shards) - 10
        folders = {text.partition(" of ")[2] for text in report.absent_shards}
        output.notice(
            f"Warning: no gallery holds {'shard' if len(report.absent_shards) == 1 else 'shards'} "
            f"{shown}{f' and {more:,} more' if more > 0 else ''}: their photos are not searchable"
            f"{_SEVERAL if len(folders) > 1 else ''}"
        )
    if as_json:
        output.answer_json({"gallery": printable_name(gallery), **asdict(report)})
    else:
        counts = {
            "copied": report.copied,
            "removed": report.removed,
            "at a path with several contents, of which the newest was taken": report.conflicts,
            "damaged and left out": report.damaged,
            "without their damaged regions": report.damaged_regions,
            "missing and left out": report.missing,
            "unreadable": report.unreadable,
        }
        done = ", ".join(f"{count:,} {word}" for word, count in counts.items() if count)
        photos = count_text(report.live, "photo")
        seconds = output.duration_text(report.seconds)
        output.answer(f"{photos} searchable ({done or 'nothing new'}) in {seconds}")
    return 3 if report.damaged or report.damaged_regions or report.absent_shards else 0
