"""`sbtk report figure3` and `figure4`: queries, and what a model finds for them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from sbtk_cli import options, output, report_options
from sbtk_runtime.errors import BadConfig
from sbtk_runtime.names import printable_name

if TYPE_CHECKING:
    from sbtk_cli.bench_data import Classes
    from sbtk_runtime.manifest import Precision

_CHOICE = """The sketches that ask are those named by --query, the --worst ones by average
precision, or --random ones, four of them by default.

Exit code 3: some images could not be read.
"""


def _figure_command(name: str, hits: int, is_generalised: bool, about: str) -> click.Command:
    @click.command(name, short_help=about.partition("\n")[0], help=f"{about}\n\n{_CHOICE}")
    @report_options.of_labelled_images
    @click.option(
        "-o",
        "--out",
        type=options.PATH,
        required=True,
        metavar="FILE.png",
        help="The picture to write.",
    )
    @click.option(
        "--query",
        "named",
        type=options.PATH,
        multiple=True,
        metavar="FILE",
        help="A sketch of DATA that asks; may be repeated.",
    )
    @click.option(
        "--random", "random_count", type=click.IntRange(min=1), metavar="N", help="Draw N sketches."
    )
    @click.option(
        "--worst",
        type=click.IntRange(min=1),
        metavar="N",
        help="Take the N sketches of lowest average precision.",
    )
    @report_options.seed
    @click.option(
        "-k",
        "--hits",
        type=click.IntRange(min=1, max=100),
        default=hits,
        show_default=True,
        metavar="N",
        help="Photos to show for each sketch.",
    )
    @click.option(
        "--generalised/--no-generalised",
        "with_generalised",
        default=is_generalised,
        show_default=True,
        help="Show beside it what is found with the photos of seen classes in the gallery.",
    )
    def figure(
        data: Path | None,
        model: str | None,
        engine: str,
        precision: Precision | None,
        threads: int | None,
        device: str | None,
        batch: int,
        split: str | None,
        classes: Classes,
        quiet: bool,
        out: Path,
        named: tuple[Path, ...],
        random_count: int | None,
        worst: int | None,
        seed: int,
        hits: int,
        with_generalised: bool,
    ) -> int:
        if sum((bool(named), random_count is not None, worst is not None)) > 1:
            raise click.UsageError("Give one of --query, --random and --worst.")
        _check_picture(out)
        folder = report_options.required(data)
        from sbtk_cli.report_runs import WantedQueries, ranked_panels
        from sbtk_runtime.files import atomic_path
        from sbtk_runtime.report.ranked_sheet import ranked_sheet

        wanted = WantedQueries(named, worst, random_count or WantedQueries.random, seed)
        chosen = report_options.Chosen(model, engine, precision, threads, device, batch, quiet)
        found = ranked_panels(
            chosen, folder, split, classes, wanted, hits=hits, with_generalised=with_generalised
        )
        with atomic_path(out) as temporary:
            ranked_sheet(found.panels).save(temporary, "PNG", optimize=True)
        asked = len(found.panels[0].queries)
        output.notice(f"{printable_name(out)}: {hits} hits for each of {asked}", quiet=quiet)
        return 3 if found.unreadable else 0

    return figure


def _check_picture(out: Path) -> None:
    if out.suffix.lower() != ".png":
        raise BadConfig(f"a picture named {printable_name(out)}", "a name that ends in .png")
    options.check_output_file(out)


commands = (
    _figure_command(
        "figure3",
        5,
        True,
        "Show the first 5 hits of sketches, zero-shot and generalised.\n\n"
        "A picture in the manner of the SBTKNet paper's Figure 3: the sketch on the left, its hits "
        "on the right, in a green frame where the class is right and in a red one where it is "
        "wrong; the same again with the photos of seen classes among them.",
    ),
    _figure_command(
        "figure4",
        10,
        False,
        "Show the first 10 hits of sketches, zero-shot.\n\n"
        "A picture in the manner of the SBTKNet paper's Figure 4: the sketch on the left, its hits "
        "on the right, in a green frame where the class is right and in a red one where it is "
        "wrong.",
    ),
)
