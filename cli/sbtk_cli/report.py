"""`sbtk report`: the papers' tables and pictures, with one's own results in them."""

from __future__ import annotations

import click

from sbtk_cli import report_bars, report_figures, report_map, report_tables


@click.group("report")
def command() -> None:
    """Make the papers' tables and pictures of results.

    Tables lay what 'sbtk bench map --json' measured beside the published figures, and warn where
    rules, galleries or classes differ. Pictures show what a model finds.
    """


for _command in (*report_tables.commands, *report_figures.commands):
    command.add_command(_command)
command.add_command(report_map.command)
command.add_command(report_bars.command)
