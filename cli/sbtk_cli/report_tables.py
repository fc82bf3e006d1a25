"""`sbtk report table2` to `table5`: measured figures beside the published ones."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from sbtk_cli import options, output
from sbtk_runtime.names import printable_name

if TYPE_CHECKING:
    from sbtk_runtime.report.report_table import ReportTable
    from sbtk_runtime.report.table_text import Format

_results = click.argument("results", nargs=-1, type=options.PATH)
_format = click.option(
    "--format",
    "form",
    type=click.Choice(["markdown", "csv", "latex"]),
    default="markdown",
    show_default=True,
    help="How to write the table.",
)
_out = click.option(
    "-o", "--out", type=options.PATH, metavar="FILE", help="Write to FILE.  [default: print]"
)
_later = click.option(
    "--later", "with_later", is_flag=True, help="Show work later than the SBTKNet paper, too."
)


def _comparison_command(name: str, holds: str) -> click.Command:
    @click.command(
        name,
        short_help=f"Table {name[-1]}: {holds}.",
        help=f"Lay results beside the SBTKNet paper's Table {name[-1]}: {holds}.\n\n"
        "RESULTS are files of 'sbtk bench map --json'; without any, the published rows are "
        "shown alone. Where rules, galleries or classes differ, a warning says so.",
    )
    @_results
    @_format
    @_out
    @_later
    @options.quiet
    def table(
        results: tuple[Path, ...], form: Format, out: Path | None, with_later: bool, quiet: bool
    ) -> int:
        from sbtk_runtime.report.comparison import comparison
        from sbtk_runtime.report.measured import read_measured

        runs = [run for path in results for run in read_measured(path)]
        return _hand_over(comparison(name, runs, with_later=with_later), form, out, quiet)

    return table


@click.command("table5", short_help="Table 5: the ablation, with mean and spread over seeds.")
@_results
@click.option(
    "--split",
    type=click.Choice(["SK-YE", "TUB-SH"]),
    default="SK-YE",
    show_default=True,
    help="Which of the paper's two halves to show; the results' own split.",
)
@_format
@_out
@options.quiet
def _table5(
    results: tuple[Path, ...], split: str, form: Format, out: Path | None, quiet: bool
) -> int:
    """Lay results beside the SBTKNet paper's Table 5: its ablation.

    RESULTS are the .csv of 'sbtk train --ablation', of which mean and spread over seeds are shown,
    and files of 'sbtk bench map --json'; without any, the published rows are shown alone.
    """
    from sbtk_runtime.report.ablation_results import AblationResult, read_ablation
    from sbtk_runtime.report.ablation_table import ablation_table
    from sbtk_runtime.report.measured import MeasuredMap, read_measured

    trained: list[AblationResult] = []
    runs: list[MeasuredMap] = []
    for path in results:
        if path.suffix.lower() == ".csv":
            trained += read_ablation(path)
        else:
            runs += read_measured(path)
    return _hand_over(ablation_table(trained, runs, split=split), form, out, quiet)


commands = (
    _comparison_command("table2", "zero-shot retrieval on Sketchy and TU-Berlin Extended"),
    _comparison_command("table3", "generalised zero-shot retrieval"),
    _comparison_command("table4", "zero-shot retrieval on QuickDraw Extended"),
    _table5,
)


def _hand_over(table: ReportTable, form: Format, out: Path | None, quiet: bool) -> int:
    """Prints or writes the table; warnings that it does not show itself go to stderr."""
    from sbtk_runtime.files import write_atomically
    from sbtk_runtime.report.table_text import table_text

    text = table_text(table, form)
    if out is None:
        output.answer(text.rstrip("\n"))
    else:
        options.check_output_file(out)
        write_atomically(out, text.encode())
        output.notice(f"{printable_name(out)}: {table.title}", quiet=quiet)
    if out is not None or form == "csv":
        for warning in table.warnings:
            output.notice(f"warning: {warning}", quiet=quiet)
    return 0
