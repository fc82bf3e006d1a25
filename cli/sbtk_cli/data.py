"""`sbtk data`: check a folder of sketches and photos before training on it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sbtk_cli import options, output
from sbtk_cli.output import plain_table, shown_relative
from sbtk_runtime.files import count_text, printable_name

if TYPE_CHECKING:
    from sbtk_train.data.check import DataCheck, ImageCheck, PerClass, SplitCheck
    from sbtk_train.data.leakage import Leakage, PublishedData

_CHECK_HELP = """Check a data set and report its problems.

DATA is a folder of sketches and photos: Sketchy Ext, TU-Berlin Ext or QuickDraw Ext as packed by
SAKE, SEM-PCYC or others, with or without list files, or sketch/<class>/* and photo/<class>/*.
Nothing is written or changed.

\b
sbtk data check dataset/Sketchy
sbtk data check my-data --split unseen.txt --quick

Exit codes: 0 no problems; 1 the data cannot be used as they are, or the seen and the unseen classes
of a split share images; 3 some images would be left out (missing, unreadable, in an unsupported
format, nested too deep, or in classes with too few images), or are in two classes.
"""


@click.group()
def command() -> None:
    """Check a data set before training on it."""


@command.command(help=_CHECK_HELP)
@click.argument("data", type=options.PATH, envvar="SBTK_DATA")
@click.option(
    "--split",
    metavar="NAME|FILE",
    help="Check this split: a published one, random:N:SEED, or a file of unseen classes.  "
    "[default: those of the data's own lists, and the published ones for these data]",
)
@click.option(
    "--keep-duplicates",
    is_flag=True,
    help="Count photos that are in two folders of Sketchy Ext twice, as SAKE's lists do.",
)
@click.option(
    "--allow-missing",
    is_flag=True,
    help="Accept a split file that names classes the data lack.",
)
@click.option("--quick", is_flag=True, help="Only count images and compare names; open none.")
@options.threads
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object, for programs.")
@options.quiet
def check(
    data: Path,
    split: str | None,
    keep_duplicates: bool,
    allow_missing: bool,
    quick: bool,
    threads: int | None,
    as_json: bool,
    quiet: bool,
) -> int:
    """Run `sbtk data check`."""
    from sbtk_runtime.machine import cpu_threads
    from sbtk_train.data.check import check_data, check_images, find_splits
    from sbtk_train.data.dataset import open_dataset

    dataset = open_dataset(data, keep_duplicates=keep_duplicates)
    splits = find_splits(dataset, split)
    images = None
    if not quick:
        with output.progress("opening images", quiet=quiet) as advance:
            workers = threads or cpu_threads()
            images = check_images(dataset.images, threads=workers, advance=advance)
    found = check_data(
        dataset,
        splits,
        images,
        keep_duplicates=keep_duplicates,
        allow_missing=allow_missing,
    )
    if as_json:
        output.answer_json(check_json(found))
    else:
        for line in check_lines(found):
            output.answer(line)
    return 1 if found.problems() else 0 if found.is_whole() else 3


# The number of items of a long list to show: in text, and in JSON.
_SHOWN = 5
_SHOWN_JSON = 100

Row = tuple[str, str, str]


def check_lines(check: DataCheck) -> Iterator[str]:
    """Yield the lines of the report, including tables."""
    from sbtk_train.data.splits import join_names

    layout = check.dataset.layout
    yield f"{shown_relative(layout.root)}: {layout.title}"
    name = check.published.name if check.published else ""
    yield plain_table([("", "HERE", name.upper()), *_statistics(check)])
    if check.one_sided:
        yield f"in one domain only: {join_names(check.one_sided)}"
    if check.dataset.renamed:
        pairs = [f"{name} is {to}" for name, to in check.dataset.renamed]
        yield printable_name(f"merged classes: {join_names(pairs)}")
    for each in check.dataset.missing:
        yield (
            f"{shown_relative(each.file)}: {len(each.missing):,} of its "
            f"{count_text(each.listed, 'image')} missing; first {printable_name(each.missing[0])}"
        )
    for split in check.splits:
        yield ""
        yield from _split_lines(split, check)
    if check.images is not None:
        yield ""
        yield from _image_lines(check.images)
    notices, problems = check.notices(), check.problems()
    if notices or problems:
        yield ""
    yield from (printable_name(notice) for notice in notices)
    yield from (f"PROBLEM: {printable_name(problem)}" for problem in problems)


def check_json(check: DataCheck) -> dict[str, Any]:
    """Return the report as a JSON object; long lists are truncated, and have their counts."""
    dataset, data = check.dataset, check.dataset.images
    return {
        "root": str(dataset.layout.root),
        "layout": dataset.layout.name,
        "classes": len(data.classes),
        "one_sided": list(check.one_sided),
        "sketches": asdict(check.sketches),
        "photos": asdict(check.photos),
        "duplicates": dataset.duplicates,
        "keeps_duplicates": check.keeps_duplicates,
        "renamed": dict(dataset.renamed),
        "published": asdict(check.published) if check.published else None,
        "lists": [
            {
                "name": listing.name,
                "seen": len(listing.seen),
                "unseen": len(listing.unseen),
                "training_sketches": len(listing.training_sketches),
            }
            for listing in data.listings
        ],
        "missing": [
            {
                "file": str(each.file),
                "listed": each.listed,
                "missing": len(each.missing),
                "first": [str(path) for path in each.missing[:_SHOWN_JSON]],
            }
            for each in dataset.missing
        ],
        "splits": [
            asdict(split) | {"leakage": _leakage_json(split.leakage)} for split in check.splits
        ],
        "images": _images_json(check.images) if check.images else None,
        "ignored": {
            kind: {
                "suffixes": dict(ignored.suffixes),
                "nested": [{"folder": str(path), "images": n} for path, n in ignored.nested],
                "system": [str(path) for path in ignored.system],
            }
            for kind, ignored in dataset.ignored.items()
        },
        "too_few": list(check.too_few),
        "in_two_classes": {
            "count": len(check.in_two_classes),
            "first": [list(pair) for pair in check.in_two_classes[:_SHOWN_JSON]],
        },
        "notices": check.notices(),
        "skipped": check.skipped(),
        "problems": check.problems(),
    }


def _statistics(check: DataCheck) -> Iterator[Row]:
    """Yield rows as in the paper's Table 1."""
    classes, sketches, of_sketches, photos, of_photos = _published_statistics(check.published)
    yield "classes", f"{len(check.dataset.images.classes):,}", classes
    yield "sketches", f"{check.sketches.total:,}", sketches
    yield "  of a class", _per_class(check.sketches), of_sketches
    yield "photos", f"{check.photos.total:,}", photos
    yield "  of a class", _per_class(check.photos), of_photos
    if check.dataset.duplicates:
        done = "counted" if check.keeps_duplicates else "left out"
        yield "duplicate photos", f"{check.dataset.duplicates:,}, {done}", ""


def _published_statistics(published: PublishedData | None) -> tuple[str, ...]:
    if published is None:
        return ("",) * 5
    return (
        _number(published.classes),
        _number(published.sketches),
        "{:,} ± {:,}".format(*published.sketches_per_class),
        _number(published.photos),
        "{:,} ± {:,}".format(*published.photos_per_class),
    )


def _split_lines(split: SplitCheck, check: DataCheck) -> Iterator[str]:
    from sbtk_train.data.splits import join_names

    match = split.match
    lists = f", by the lists of {split.listing}" if split.listing else ""
    yield f"split {printable_name(split.name)}{lists}"
    yield plain_table([("", "HERE", "PUBLISHED"), *_split_rows(split, check)], indent="  ")
    if match.absent:
        yield f"  not in the data: {join_names(match.absent)}"
    if match.unknown:
        yield f"  on neither list of {split.name}, so seen: {join_names(match.unknown)}"
    if split.leakage.file_names:
        first = split.leakage.file_names[0]
        yield (
            f"  {count_text(len(split.leakage.file_names), 'file name')} on both sides, such as "
            f"{printable_name(first.seen)} and {printable_name(first.unseen)}"
        )


def _split_rows(split: SplitCheck, check: DataCheck) -> Iterator[Row]:
    names = (
        *("seen classes", "  sketches to train on", "  sketches held out", "  photos"),
        *("unseen classes", "  queries (sketches)", "  gallery (photos)"),
    )
    here = (
        f"{len(split.match.seen):,}",
        f"{split.training_sketches:,}",
        f"{split.held_out_sketches:,}" if split.held_out_sketches else "drawn for training",
        f"{split.training_photos:,}",
        f"{len(split.match.unseen):,}",
        f"{split.queries:,}",
        f"{split.gallery:,}",
    )
    yield from zip(names, here, _published_split(split, check), strict=True)


def _published_split(split: SplitCheck, check: DataCheck) -> tuple[str, ...]:
    published = split.published
    if published is None or check.published is None:
        return ("",) * 7
    unseen = len(split.match.unseen) + len(split.match.absent)
    twice = check.keeps_duplicates
    return (
        _number(check.published.classes - unseen),
        _number(published.training_sketches),
        _number(published.held_out_sketches),
        "" if twice else _number(published.training_photos),
        _number(unseen),
        _number(published.queries),
        _number(published.gallery_with_duplicates if twice else published.gallery),
    )


def _image_lines(images: ImageCheck) -> Iterator[str]:
    readable = count_text(len(images.sha256), "image")
    yield f"{readable} can be read, {len(images.unreadable):,} cannot"
    for path, reason in images.unreadable[:_SHOWN]:
        yield f"  {printable_name(path)}: {printable_name(reason)}"
    if len(images.unreadable) > _SHOWN:
        yield f"  and {len(images.unreadable) - _SHOWN:,} more; --json names them"
    for kind in ("sketch", "photo"):
        sizes = [
            (f"{width} x {height}", count)
            for (of, width, height), count in images.sizes.most_common()
            if of == kind
        ]
        modes = [(mode, count) for (of, mode), count in images.modes.most_common() if of == kind]
        if sizes:
            yield f"  {kind} sizes: {_histogram(sizes)}; modes: {_histogram(modes)}"


def _histogram(counted: Sequence[tuple[str, int]]) -> str:
    shown = ", ".join(f"{what} {count:,} times" for what, count in counted[:_SHOWN])
    rest = counted[_SHOWN:]
    more = f", {len(rest):,} others {sum(count for _, count in rest):,} times" if rest else ""
    return shown + more


def _leakage_json(leakage: Leakage) -> dict[str, Any]:
    def cut(leaks: Sequence[Any]) -> dict[str, Any]:
        return {"count": len(leaks), "first": [asdict(leak) for leak in leaks[:_SHOWN_JSON]]}

    return {
        "classes": cut(leakage.classes),
        "photo_ids": cut(leakage.photo_ids),
        "contents": None if leakage.contents is None else cut(leakage.contents),
        "file_names": cut(leakage.file_names),
    }


def _images_json(images: ImageCheck) -> dict[str, Any]:
    return {
        "readable": len(images.sha256),
        "unreadable": [{"path": str(path), "reason": reason} for path, reason in images.unreadable],
        "sizes": [
            {"kind": kind, "width_px": width, "height_px": height, "images": count}
            for (kind, width, height), count in images.sizes.most_common(_SHOWN_JSON)
        ],
        "modes": [
            {"kind": kind, "mode": mode, "images": count}
            for (kind, mode), count in images.modes.most_common()
        ],
    }


def _number(value: int | None) -> str:
    return f"{value:,}" if value else ""


def _per_class(counts: PerClass) -> str:
    if not counts.total:
        return "none"
    spread = f"{counts.mean:,.0f} ± {counts.deviation:,.0f}"
    return f"{spread} ({counts.smallest:,} to {counts.largest:,})"
