"""`sbtk report`: the papers' tables and pictures, with one's own results in them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from sbtk_cli import options, output
from sbtk_runtime.errors import BadConfig, BadData
from sbtk_runtime.files import printable_name

if TYPE_CHECKING:
    from sbtk_cli.bench_data import Classes
    from sbtk_runtime.evaluation.report.table import Format, ReportTable
    from sbtk_runtime.manifest import Precision


Function = TypeVar("Function", bound=Callable[..., Any])

split = click.option(
    "--split",
    metavar="NAME",
    help="Which classes are unseen: a published split, or a file.  [default: the model's own]",
)
classes = click.option(
    "--classes",
    type=click.Choice(["unseen", "validation"]),
    default="unseen",
    show_default=True,
    help="The split's unseen classes, or seen ones that were held out from training.",
)
seed = click.option(
    "--seed", type=click.IntRange(min=0), default=0, show_default=True, help="For what is drawn."
)


def of_labelled_images(function: Function) -> Function:
    """Add DATA, the choice of its classes, and the options of a model."""
    shared = (options.quiet, options.batch, options.device, options.threads, options.precision)
    for option in (*shared, options.engine, options.model, classes, split):
        function = option(function)
    return click.argument("data", type=options.PATH, envvar="SBTK_DATA", required=False)(function)


def required(data: Path | None) -> Path:
    """Return the folder of labelled images.

    Raises:
        BadConfig: none was named.
    """
    if data is None:
        raise BadConfig(
            "no data to make pictures of",
            "a folder, or SBTK_DATA",
            "sbtk report figure3 DATA --out figure3.png",
        )
    return data


@click.group("report")
def command() -> None:
    """Make the papers' tables and pictures of results.

    Tables lay what 'sbtk bench map --json' measured beside the published figures, and warn where
    rules, galleries or classes differ. Pictures show what a model finds.
    """


@command.command("bars")
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
def bars_command(results: tuple[Path, ...], out: Path, quiet: bool) -> int:
    """Draw the mean AP of each class as bars.

    RESULTS are files of 'sbtk bench map --json'. Classes stand in the order of the first result,
    best first; further results stand beside it.
    """
    from sbtk_cli.bench_plots import check_drawable, draw_class_bars
    from sbtk_runtime.evaluation.report.measured import read_measured

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


_CHOICE = """The sketches that ask are those named by --query, the --worst ones by average
precision, or --random ones, four of them by default.

Exit code 3: some images could not be read.
"""


def _figure_command(name: str, hits: int, is_generalised: bool, about: str) -> click.Command:
    @click.command(name, short_help=about.partition("\n")[0], help=f"{about}\n\n{_CHOICE}")
    @of_labelled_images
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
    @seed
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
        folder = required(data)
        from sbtk_cli.report_runs import Chosen, WantedQueries, ranked_panels
        from sbtk_runtime.evaluation.report.ranked_sheet import draw_ranked_sheet
        from sbtk_runtime.files import atomic_path

        wanted = WantedQueries(named, worst, random_count or WantedQueries.random, seed)
        chosen = Chosen(model, engine, precision, threads, device, batch, quiet)
        found = ranked_panels(
            chosen, folder, split, classes, wanted, hits=hits, with_generalised=with_generalised
        )
        with atomic_path(out) as temporary:
            draw_ranked_sheet(found.panels).save(temporary, "PNG", optimize=True)
        asked = len(found.panels[0].queries)
        output.notice(f"{printable_name(out)}: {hits} hits for each of {asked}", quiet=quiet)
        return 3 if found.unreadable else 0

    return figure


def _check_picture(out: Path) -> None:
    if out.suffix.lower() != ".png":
        raise BadConfig(f"a picture named {printable_name(out)}", "a name that ends in .png")
    options.check_output_file(out)


_figure_commands = (
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


@command.command("map")
@of_labelled_images
@click.option(
    "-o",
    "--out",
    type=options.PATH,
    required=True,
    metavar="FILE",
    help="The picture to write: a .png, .svg or .pdf.",
)
@click.option(
    "--coordinates",
    type=options.PATH,
    metavar="FILE.csv",
    help="Where to write each image's place.  [default: beside the picture]",
)
@click.option(
    "--method",
    type=click.Choice(["auto", "pca", "umap"]),
    default="auto",
    show_default=True,
    help="Principal components, UMAP (needs umap-learn), or both where UMAP is installed.",
)
@click.option(
    "--per-class",
    type=click.IntRange(min=1),
    default=100,
    show_default=True,
    metavar="N",
    help="At most so many sketches, and so many photos, of a class, drawn by the seed.",
)
@seed
def map_command(
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
    coordinates: Path | None,
    method: str,
    per_class: int,
    seed: int,
) -> int:
    """Draw the embeddings of the images in DATA in the plane.

    Sketches are circles and photos are crosses; each class has a colour. Exit code 3: some images
    could not be read.
    """
    from sbtk_cli.bench_plots import check_drawable, draw_embedding_map
    from sbtk_cli.report_runs import Chosen, embedded_points
    from sbtk_runtime.evaluation.report import embedding_map

    check_drawable(out)
    coordinates = out.with_suffix(".csv") if coordinates is None else coordinates
    options.check_output_file(coordinates)
    if method == "umap":
        embedding_map.require_umap()
    chosen = Chosen(model, engine, precision, threads, device, batch, quiet)
    found = embedded_points(chosen, required(data), split, classes, per_class=per_class, seed=seed)
    planes: dict[embedding_map.Method, embedding_map.Plane] = {}
    shares = None
    if method != "umap":
        planes["pca"], shares = embedding_map.project_pca(found.rows)
    if method == "umap" or (method == "auto" and embedding_map.has_umap()):
        planes["umap"] = embedding_map.project_umap(found.rows, seed)
    embedding_map.write_coordinates(coordinates, found.points, planes)
    draw_embedding_map(out, found.points, planes, title=found.title, pca_shares=shares)
    output.notice(
        f"{printable_name(out)}: {output.count_text(len(found.points), 'embedding')} by "
        f"{' and '.join(planes)}; places in {printable_name(coordinates)}",
        quiet=quiet,
    )
    return 3 if found.unreadable else 0


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
        from sbtk_runtime.evaluation.report.comparison import compare
        from sbtk_runtime.evaluation.report.measured import read_measured

        runs = [run for path in results for run in read_measured(path)]
        return _emit_table(compare(name, runs, with_later=with_later), form, out, quiet)

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
    from sbtk_runtime.evaluation.report.ablation import (
        AblationResult,
        ablation_table,
        read_ablation,
    )
    from sbtk_runtime.evaluation.report.measured import MeasuredMap, read_measured

    trained: list[AblationResult] = []
    runs: list[MeasuredMap] = []
    for path in results:
        if path.suffix.lower() == ".csv":
            trained += read_ablation(path)
        else:
            runs += read_measured(path)
    return _emit_table(ablation_table(trained, runs, split=split), form, out, quiet)


_table_commands = (
    _comparison_command("table2", "zero-shot retrieval on Sketchy and TU-Berlin Extended"),
    _comparison_command("table3", "generalised zero-shot retrieval"),
    _comparison_command("table4", "zero-shot retrieval on QuickDraw Extended"),
    _table5,
)


def _emit_table(table: ReportTable, form: Format, out: Path | None, quiet: bool) -> int:
    """Print or writes the table; warnings that it does not show itself go to stderr."""
    from sbtk_runtime.evaluation.report.table import format_table
    from sbtk_runtime.files import write_atomically

    text = format_table(table, form)
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


for _command in (*_table_commands, *_figure_commands):
    command.add_command(_command)
