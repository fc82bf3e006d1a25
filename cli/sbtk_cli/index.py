"""`sbtk index`: create, update, check and export a gallery."""

from __future__ import annotations

import base64
import shlex
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sbtk_cli import options, output
from sbtk_runtime.files import count_text, printable_name
from sbtk_runtime.manifest import MANIFEST_NAME

if TYPE_CHECKING:
    from sbtk_runtime.bundle import Bundle
    from sbtk_runtime.embedding.embedder import Embedder
    from sbtk_runtime.engines.base import EngineOptions
    from sbtk_runtime.gallery.update import IndexReport
    from sbtk_runtime.manifest import PhotoShard

_HELP = """Create or update a gallery from folders of photos.

PHOTOS are files, and folders that are searched recursively. Photos that are in the gallery and have
not changed are skipped. Photos that are no longer found count as missing: they are left out of the
hits, but their embeddings are kept, in case a disk is not mounted. If interrupted, run the same
command again to resume.

\b
sbtk index photos/
sbtk index photos/ more/ --gallery all.sbtk
sbtk index photos/ --bits 64 --gallery small.sbtk
sbtk index photos/ --regions
sbtk index --list-folders
sbtk index --forget photos/2019/
sbtk index --verify
"""


@click.command(help=_HELP)
@click.argument("photos", nargs=-1, type=options.PATH)
@options.gallery
@click.option(
    "--bits",
    type=options.Bits(),
    metavar="B",
    help="Create a binary gallery: codes of B bits instead of embeddings, B/8 bytes a photo. The "
    "model must have been exported with --bits B.",
)
@options.regions(
    "Also embed N regions of each photo (9 or 16, by default 16), to find things in photos. Give "
    "it after PHOTOS. Stored in the gallery; photos that are in it get their regions."
)
@click.option(
    "--shard",
    callback=options.parse_shard,
    metavar="I/N",
    help="Index only part I of N of the photos, as with 2/8; each machine takes another part. "
    "'sbtk merge' puts the galleries together. Stored in the gallery.",
)
@click.option(
    "--checksum", is_flag=True, help="Detect changes by content, not by size, dates and inode."
)
@click.option(
    "--exclude",
    "exclude",
    multiple=True,
    metavar="PATTERN",
    help="Leave out files and folders that match a .gitignore pattern, such as '*.png', drafts/ or "
    "'/2019/scans/*'; repeatable. Stored in the gallery. A file .sbtkignore in a folder of photos "
    "does the same for that folder.",
)
@click.option("--clear-excludes", is_flag=True, help="Remove the patterns stored in the gallery.")
@click.option(
    "--include-hidden/--skip-hidden",
    default=None,
    help="Include hidden and system files and folders, or skip them (the default). Stored in the "
    "gallery.",
)
@click.option(
    "--follow-links/--no-follow-links",
    default=None,
    help="Follow links to folders, or do not (the default). Stored in the gallery.",
)
@click.option(
    "--prune",
    is_flag=True,
    help="Remove missing photos permanently: those in PHOTOS, or all if no PHOTOS are given. If "
    "the update warns about missing photos, nothing is removed.",
)
@click.option(
    "--forget",
    "forget",
    multiple=True,
    type=options.PATH,
    metavar="FOLDER",
    help="Remove a folder's photos from the gallery; the folder need not exist. No file is "
    "deleted. Repeatable.",
)
@click.option(
    "--list-folders",
    is_flag=True,
    help="List the folders of the gallery with their numbers of photos and missing photos.",
)
@click.option(
    "--list-failed",
    is_flag=True,
    help="List the files that could not be read, or only partly, with the reason.",
)
@click.option(
    "--verify", is_flag=True, help="Check hashes and rows, and that photos find themselves."
)
@click.option(
    "--repair",
    is_flag=True,
    help="With --verify: drop damaged entries; the next run embeds them.",
)
@click.option(
    "--export",
    "export_folder",
    type=options.PATH,
    metavar="DIR",
    help="Write the embeddings or codes (.npy) and a table of the photos (.csv, .parquet with "
    "pyarrow).",
)
@options.json
@options.model
@options.engine_options
@options.quiet
def command(
    photos: tuple[Path, ...],
    gallery: Path,
    bits: int | None,
    regions: int | None,
    shard: PhotoShard | None,
    checksum: bool,
    exclude: tuple[str, ...],
    clear_excludes: bool,
    include_hidden: bool | None,
    follow_links: bool | None,
    prune: bool,
    forget: tuple[Path, ...],
    list_folders: bool,
    list_failed: bool,
    verify: bool,
    repair: bool,
    export_folder: Path | None,
    as_json: bool,
    model: str | None,
    engine_options: EngineOptions,
    quiet: bool,
) -> int:
    """Run `sbtk index`."""
    if not (photos or prune or forget or list_folders or list_failed or verify or export_folder):
        raise click.UsageError("Name the folders of your photos, as in: sbtk index photos/")
    if repair and not verify:
        raise click.UsageError("--repair requires --verify.")
    for name, value in (("--bits", bits), ("--regions", regions), ("--shard", shard)):
        if value is not None and not photos:
            raise click.UsageError(f"{name} requires the folders of your photos.")
    rules_asked = (exclude, clear_excludes, include_hidden, follow_links)
    if rules_asked != ((), False, None, None) and not photos:
        raise click.UsageError(
            "--exclude, --clear-excludes, --include-hidden and --follow-links require the folders "
            "of your photos."
        )
    code = 0
    if photos:
        from sbtk_runtime.embedding.embedder import Embedder
        from sbtk_runtime.gallery.folder import roots_to_walk
        from sbtk_runtime.gallery.walk import is_photo_missed
        from sbtk_runtime.gallery.walk_rules import RuleChange, patterns_of

        # Missing folders and malformed patterns are reported before the bundle is read.
        roots_to_walk(gallery, photos)
        patterns_of(exclude)
        rule_change = RuleChange(*rules_asked)
        with Embedder(
            bundle_to_index(model, gallery, bits, shard),
            engine_options,
            notify=lambda text: output.notice(text, quiet=quiet),
            lazy=True,
        ) as embedder:
            report = _update(
                *(gallery, photos, embedder),
                bits=bits,
                shard=shard,
                rule_change=rule_change,
                checksum=checksum,
                regions=regions,
                quiet=quiet,
            )
        _print_report(report, gallery, as_json=as_json, quiet=quiet)
        is_incomplete = report.unreadable or report.without_regions or report.warnings
        code = 3 if is_incomplete or is_photo_missed(report.left_out) else 0
        if prune and report.warnings:
            output.notice(
                "Nothing was pruned. To prune anyway, run 'sbtk index --prune' without folders."
            )
            prune = False
    else:
        options.existing_gallery(gallery)
    for folder in forget:
        _drop(gallery, folder, is_missing_only=False, as_json=as_json, quiet=quiet)
    if prune:
        for root in photos or (None,):
            _drop(gallery, root, is_missing_only=True, as_json=as_json, quiet=quiet)
    if list_folders:
        _list_folders(gallery, as_json=as_json)
    if list_failed:
        _list_failed(gallery, as_json=as_json, quiet=quiet)
    if verify:
        code = _verify(gallery, repair=repair, as_json=as_json, quiet=quiet) or code
    if export_folder is not None:
        code = _export(gallery, export_folder, as_json=as_json) or code
    return code


def final_sentence(report: IndexReport, gallery: Path) -> str:
    """Return "1,000 photos searchable (12 new, 2 unreadable: failures.jsonl) in 41 s"."""
    counts = {
        "new": report.new,
        "changed": report.changed,
        "moved": report.moved,
        "found again": report.revived,
        "missing": report.missing,
        "removed": report.removed,
        "unreadable": report.unreadable,
    }
    done = ", ".join(f"{count:,} {word}" for word, count in counts.items() if count)
    if report.unreadable:
        done += f": {printable_name(gallery / 'failures.jsonl')}"
    photos = count_text(report.live, "photo")
    seconds = output.duration_text(report.seconds)
    return f"{photos} searchable ({done or 'nothing new'}) in {seconds}"


def bundle_to_index(
    model: str | None, gallery: Path, bits: int | None, shard: PhotoShard | None = None
) -> Bundle:
    """Return the bundle that was named, or that made the gallery, or the default one.

    Checks that it fits the gallery before an engine is opened.
    """
    from sbtk_runtime.bundle import Bundle
    from sbtk_runtime.gallery.folder import (
        check_bits,
        check_shard,
        published_manifest,
        require_codes,
    )

    if (gallery / MANIFEST_NAME).exists():
        manifest = published_manifest(gallery)
        check_bits(gallery, manifest, bits)
        check_shard(gallery, manifest, shard)
        if model is None:
            return options.bundle_for_gallery(None, gallery, manifest.model_id)
    bundle = Bundle.open(model)
    require_codes(gallery, bundle, bits)
    return bundle


def _update(
    gallery: Path,
    photos: tuple[Path, ...],
    embedder: Embedder,
    *,
    quiet: bool,
    **changes: Any,
) -> IndexReport:
    from sbtk_runtime.gallery.update import update_gallery

    with options.resumable_progress(quiet=quiet) as progress:
        return update_gallery(
            gallery,
            photos,
            embedder,
            progress=progress,
            notify=lambda text: output.notice(text, quiet=quiet),
            on_engine=lambda info: output.notice(
                output.engine_text(embedder.model_id, info), quiet=quiet
            ),
            **changes,
        )


def _print_report(report: IndexReport, gallery: Path, *, as_json: bool, quiet: bool) -> None:
    from sbtk_runtime.gallery.walk import left_out_sentences

    for text in report.warnings:
        output.notice(f"Warning: {text}")
    for text in [
        *report.notices,
        *_partly_readable_notices(report, gallery),
        *left_out_sentences(report.left_out),
        *_rule_notices(report),
        *([f"{report.regions:,} regions of them searchable"] if report.regions else []),
    ]:
        output.notice(text, quiet=quiet)
    if as_json:
        output.answer_json({"gallery": printable_name(gallery), **asdict(report)})
    else:
        output.answer(final_sentence(report, gallery))


def _partly_readable_notices(report: IndexReport, gallery: Path) -> list[str]:
    if not report.partly_readable:
        return []
    count = report.partly_readable
    photos = f"{count_text(count, 'photo')} {'is' if count == 1 else 'are'}"
    where = shlex.quote(printable_name(gallery))
    return [
        f"{photos} only partly readable: 'sbtk index --list-failed --gallery {where}' lists them"
    ]


def _rule_notices(report: IndexReport) -> list[str]:
    notices = []
    if report.other_shards:
        photos = count_text(report.other_shards, "photo")
        notices.append(f"{photos} left to other shards")
    if report.rules.exclude:
        patterns = " ".join(shlex.quote(printable_name(text)) for text in report.rules.exclude)
        notices.append(f"the gallery's patterns: {patterns} (--clear-excludes removes them)")
    if report.left_out_now:
        notices.append(
            f"{count_text(report.left_out_now, 'photo')} of the gallery newly excluded: no "
            "longer among the hits, but their embeddings are kept"
        )
    return notices


def _drop(
    gallery: Path, folder: Path | None, *, is_missing_only: bool, as_json: bool, quiet: bool
) -> None:
    from sbtk_runtime.gallery.index import drop_photos

    report = drop_photos(
        gallery,
        folder,
        is_missing_only=is_missing_only,
        notify=lambda text: output.notice(text, quiet=quiet),
    )
    if as_json:
        output.answer_json({"gallery": printable_name(gallery), **asdict(report)})
        return
    what = "missing photo" if is_missing_only else "photo"
    where = "" if folder is None else f" from {printable_name(folder)}"
    output.answer(
        f"{count_text(report.removed, what)} removed{where}; "
        f"{count_text(report.live, 'photo')} searchable"
    )


def _list_folders(gallery: Path, *, as_json: bool) -> None:
    from sbtk_runtime.gallery.folder import folder_counts, path_fields

    for count in folder_counts(gallery):
        if as_json:
            fields = {"photos": count.photos, "missing": count.missing, "exists": count.exists}
            output.answer_json(path_fields(count.path) | fields)
            continue
        missing = f", {count.missing:,} missing" if count.missing else ""
        where = "" if count.exists else " (not found)"
        photos = count_text(count.photos, "photo")
        output.answer(f"{printable_name(count.path)}{where}: {photos}{missing}")


def _list_failed(gallery: Path, *, as_json: bool, quiet: bool) -> None:
    from sbtk_runtime.gallery.folder import list_failures, partly_readable

    is_any = False
    for fields in [*list_failures(gallery), *partly_readable(gallery)]:
        is_any = True
        if as_json:
            output.answer_json(fields)
        else:
            name = fields.get("path") or base64.b64decode(fields["path_bytes"])
            output.answer(f"{printable_name(name)}: {fields['reason']}")
    if not is_any:
        output.notice("All files could be read.", quiet=quiet)


def _verify(gallery: Path, *, repair: bool, as_json: bool, quiet: bool) -> int:
    from sbtk_runtime.gallery.verify import verify_gallery

    report = verify_gallery(
        gallery, repair=repair, notify=lambda text: output.notice(text, quiet=quiet)
    )
    if as_json:
        output.answer_json({"gallery": printable_name(gallery), **asdict(report)})
        return 0 if report.is_good else 1
    for problem in report.problems:
        output.answer(f"problem: {problem}")
    if report.repaired:
        output.answer(
            f"{count_text(report.repaired, 'photo')} dropped: run 'sbtk index' on their "
            "folders to embed them again"
        )
    if report.repaired_regions:
        output.answer(
            f"the regions of {count_text(report.repaired_regions, 'photo')} dropped: run 'sbtk "
            "index' on any of the folders to embed them again"
        )
    if report.is_good:
        how = "in the graph" if report.by_graph else "by exact search"
        if report.bits is not None:
            how = "by their codes"
        output.answer(
            f"{count_text(report.live, 'photo')} intact; {report.found:,} of "
            f"{report.sampled:,} sampled ones find themselves {how}"
        )
    return 0 if report.is_good else 1


def _export(gallery: Path, folder: Path, *, as_json: bool) -> int:
    from sbtk_runtime.gallery.export import export_gallery

    report = export_gallery(gallery, folder)
    for text in report.notices:
        output.notice(text)
    if as_json:
        output.answer_json(
            {
                "files": [printable_name(path) for path in report.files],
                "count": report.count,
                "left_out": report.left_out,
                "left_out_regions": report.left_out_regions,
            }
        )
    else:
        files = ", ".join(printable_name(path) for path in report.files)
        left_out = f", {report.left_out:,} damaged ones left out" if report.left_out else ""
        if report.left_out_regions:
            photos = count_text(report.left_out_regions, "photo")
            left_out += f", damaged regions of {photos} left out"
        output.answer(f"{count_text(report.count, 'photo')} in {files}{left_out}")
    return 3 if report.left_out or report.left_out_regions else 0
