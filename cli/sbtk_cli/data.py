"""`sbtk data`: what a folder of sketches and photos holds, before anything is trained on it."""

from __future__ import annotations

from pathlib import Path

import click

from sbtk_cli import options, output

_CHECK_HELP = """Look through a data set, and say what is wrong with it.

DATA is a folder of sketches and photos: Sketchy Ext, TU-Berlin Ext or QuickDraw Ext as SAKE,
SEM-PCYC or others pack them, with their list files if they have some, or plain
sketch/<class>/* and photo/<class>/*. Nothing is written or changed.

\b
sbtk data check dataset/Sketchy
sbtk data check my-data --split unseen.txt --quick

Exit codes: 0 all is well; 1 the data cannot be used as they are, or the seen and the unseen side
of a split have something in common; 3 some images would be left out (missing, unreadable, of a
format that is not read, nested too deep, or in classes with too few), or are in two classes.
"""


@click.group()
def command() -> None:
    """Look through a data set before training on it."""


@command.command(help=_CHECK_HELP)
@click.argument("data", type=options.PATH, envvar="SBTK_DATA")
@click.option(
    "--split",
    metavar="NAME|FILE",
    help="Look at this split: a published one, random:N:SEED, or a file of unseen classes.  "
    "[default: those of the data's own lists, and the published ones of these data]",
)
@click.option(
    "--keep-duplicates",
    is_flag=True,
    help="Count photos of Sketchy Ext twice that two of its folders hold, as SAKE's lists do.",
)
@click.option(
    "--allow-missing",
    is_flag=True,
    help="Accept a split file that names classes the data lack.",
)
@click.option("--quick", is_flag=True, help="Open no image: count, and compare names only.")
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
    """Runs `sbtk data check`."""
    from sbtk_cli.data_output import check_json, check_lines
    from sbtk_runtime.cpu import cpu_threads
    from sbtk_train.data.data_check import check_data, splits_of
    from sbtk_train.data.dataset import open_dataset
    from sbtk_train.data.image_check import check_images

    dataset = open_dataset(data, keep_duplicates=keep_duplicates)
    splits = splits_of(dataset, split)
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
