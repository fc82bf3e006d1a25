"""`sbtk report bars`: the mean AP of each class, of one or several results."""

from __future__ import annotations

from pathlib import Path

import click

from sbtk_cli import options, output
from sbtk_runtime.errors import BadData
from sbtk_runtime.names import printable_name


@click.command("bars")
@click.argument("results", nargs=-1, required=True, type=options.PATH)
@click.option(
    "-o",
    "--out",
    type=options.PATH,
    required=True,
    metavar="FILE",
    help="The picture to write: a .png, .svg or .pdf.",
)
@options.quiet
def command(results: tuple[Path, ...], out: Path, quiet: bool) -> int:
    """Draw the mean AP of each class as bars.

    RESULTS are files of 'sbtk bench map --json'. Classes stand in the order of the first result,
    best first; further results stand beside it.
    """
    from sbtk_cli.report_plots import check_drawable, draw_class_bars
    from sbtk_runtime.report.measured import read_measured

    check_drawable(out)
    runs = [run for path in results for run in read_measured(path)]
    if bare := [run.name for run in runs if not run.class_map]:
        raise BadData(
            f"the result of {bare[0]} has no class_map",
            "a file of 'sbtk bench map --json', which gives the AP of each class",
        )
    draw_class_bars(out, runs)
    output.notice(f"{printable_name(out)}: AP of {len(runs[0].class_map)} classes", quiet=quiet)
    return 0
