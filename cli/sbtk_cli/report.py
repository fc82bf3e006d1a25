"""`sbtk report`: the papers' tables and figures, with your results."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from sbtk_cli import options, output
from sbtk_cli.options import Function
from sbtk_runtime.errors import BadConfig, BadData
from sbtk_runtime.files import count_text, printable_name

if TYPE_CHECKING:
    from sbtk_cli.bench_data import Classes
    from sbtk_runtime.engines.base import EngineOptions
    from sbtk_runtime.evaluation.report.table import Format, ReportTable


split = click.option(
    "--split",
    metavar="NAME",
    help="Split that defines the unseen classes: a published one, or a file.  "
    "[default: the model's own]",
)
seed = click.option(
    "--seed", type=options.IntRange(min=0), default=0, show_default=True, help="Random seed."
)
figure_file = click.option(
    "-o",
    "--out",
    type=options.PATH,
    required=True,
    metavar="FILE",
    help="Figure to write: a .png, .svg or .pdf file.",
)


def of_labelled_images(function: Function) -> Function:
    """Add DATA, the options of its classes, and those of a model."""
    for option in (options.quiet, options.engine_options, options.model, options.classes, split):
        function = option(function)
    return click.argument("data", type=options.PATH, envvar="SBTK_DATA", required=False)(function)


def require_data(data: Path | None) -> Path:
    """Return the folder of labelled images.

    Raises:
        BadConfig: no folder was given.
    """
    if data is None:
        raise BadConfig(
            "no data set given",
            "a folder, or SBTK_DATA",
            "sbtk report figure3 DATA --out figure3.png",
        )
    return data


@click.group("report")
def command() -> None:
    """Compare results with published ones; draw figures.

    Tables compare results of 'sbtk bench map --json' with published ones, and warn if rules,
    galleries or classes differ. Figures show the hits and embeddings of a model.
    """


@command.command("bars")
@click.argument("results", nargs=-1, required=True, type=options.PATH)
@figure_file
@options.quiet
def bars_command(results: tuple[Path, ...], out: Path, quiet: bool) -> int:
    """Draw the mean AP of each class as bars.

    RESULTS are files of 'sbtk bench map --json'. Classes are sorted by the first result, best
    first, with the bars of further results next to it.
    """
    from sbtk_cli.bench_plots import check_plottable, draw_class_bars
    from sbtk_runtime.evaluation.report.results import read_measured

    check_plottable(out, "drawing")
    runs = [run for path in results for run in read_measured(path)]
    if bare := [run.name for run in runs if not run.class_map]:
        raise BadData(
            f"no class_map in the result of {bare[0]}",
            "a file of 'sbtk bench map --json'",
        )
    draw_class_bars(out, runs)
    output.notice(f"{printable_name(out)}: AP of {len(runs[0].class_map)} classes", quiet=quiet)
    return 0


_CHOICE = """Queries are the sketches given by --query, the --worst sketches by average precision,
or --random sketches (default: 4).

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
        help="Figure to write.",
    )
    @click.option(
        "--query",
        "named",
        type=options.PATH,
        multiple=True,
        metavar="FILE",
        help="Sketch of DATA to use as a query; may be repeated.",
    )
    @click.option(
        "--random",
        "random_count",
        type=options.IntRange(min=1),
        metavar="N",
        help="Use N random sketches.",
    )
    @click.option(
        "--worst",
        type=options.IntRange(min=1),
        metavar="N",
        help="Use the N sketches with the lowest average precision.",
    )
    @seed
    @click.option(
        "-k",
        "--hits",
        type=options.IntRange(min=1, max=100),
        default=hits,
        show_default=True,
        metavar="N",
        help="Number of hits to show for each sketch.",
    )
    @click.option(
        "--generalised/--no-generalised",
        "with_generalised",
        default=is_generalised,
        show_default=True,
        help="Add a panel of hits in a gallery that includes the photos of seen classes.",
    )
    def figure(
        data: Path | None,
        model: str | None,
        engine_options: EngineOptions,
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
            raise click.UsageError("Use only one of --query, --random and --worst.")
        _check_png(out)
        folder = require_data(data)
        from sbtk_cli.report_runs import WantedQueries, rank_panels
        from sbtk_runtime.embedding.embedder import Embedder
        from sbtk_runtime.evaluation.report.ranked_sheet import draw_ranked_sheet
        from sbtk_runtime.files import atomic_path

        wanted = WantedQueries(named, worst, random_count or WantedQueries.random, seed)
        with Embedder(model, engine_options) as embedder:
            found = rank_panels(
                embedder,
                folder,
                split,
                classes,
                wanted,
                hits=hits,
                with_generalised=with_generalised,
                quiet=quiet,
            )
        with atomic_path(out) as temporary:
            draw_ranked_sheet(found.panels).save(temporary, "PNG", optimize=True)
        queries = len(found.panels[0].queries)
        output.notice(f"{printable_name(out)}: {hits} hits for {queries} sketches", quiet=quiet)
        return 3 if found.unreadable else 0

    return figure


def _check_png(out: Path) -> None:
    if out.suffix.lower() != ".png":
        raise BadConfig(f"a figure named {printable_name(out)}", "a name that ends in .png")
    options.check_output_file(out)


_figure_commands = (
    _figure_command(
        "figure3",
        5,
        True,
        "Show the first 5 hits of sketches, zero-shot and generalised.\n\n"
        "Like Figure 3 of the SBTKNet paper: each sketch on the left, its hits on the right, with "
        "a green frame for hits of the right class and a red frame for others; a second panel "
        "adds the photos of seen classes to the gallery.",
    ),
    _figure_command(
        "figure4",
        10,
        False,
        "Show the first 10 hits of sketches, zero-shot.\n\n"
        "Like Figure 4 of the SBTKNet paper: each sketch on the left, its hits on the right, with "
        "a green frame for hits of the right class and a red frame for others.",
    ),
)


@command.command("map")
@of_labelled_images
@figure_file
@click.option(
    "--coordinates",
    type=options.PATH,
    metavar="FILE.csv",
    help="CSV file for the coordinates.  [default: FILE with the suffix .csv]",
)
@click.option(
    "--method",
    type=click.Choice(["auto", "pca", "umap"]),
    default="auto",
    show_default=True,
    help="Principal components, UMAP (needs umap-learn), or auto: both, if UMAP is installed.",
)
@click.option(
    "--per-class",
    type=options.IntRange(min=1),
    default=100,
    show_default=True,
    metavar="N",
    help="Largest number of sketches, and of photos, per class, drawn at random.",
)
@seed
def map_command(
    data: Path | None,
    model: str | None,
    engine_options: EngineOptions,
    split: str | None,
    classes: Classes,
    quiet: bool,
    out: Path,
    coordinates: Path | None,
    method: str,
    per_class: int,
    seed: int,
) -> int:
    """Draw a map of the embeddings of the images in DATA.

    Sketches are circles, photos are crosses, and each class has a colour. Exit code 3: some images
    could not be read.
    """
    from sbtk_cli.bench_plots import check_plottable, draw_embedding_map
    from sbtk_cli.report_runs import embed_points
    from sbtk_runtime.embedding.embedder import Embedder
    from sbtk_runtime.evaluation.report import embedding_map

    check_plottable(out, "drawing")
    coordinates = out.with_suffix(".csv") if coordinates is None else coordinates
    options.check_output_file(coordinates)
    if method == "umap":
        embedding_map.require_umap()
    folder = require_data(data)
    with Embedder(model, engine_options) as embedder:
        found = embed_points(
            embedder, folder, split, classes, per_class=per_class, seed=seed, quiet=quiet
        )
    planes: dict[embedding_map.Method, embedding_map.Plane] = {}
    shares = None
    if method != "umap":
        planes["pca"], shares = embedding_map.project_pca(found.rows)
    if method == "umap" or (method == "auto" and embedding_map.has_umap()):
        planes["umap"] = embedding_map.project_umap(found.rows, seed)
    embedding_map.write_coordinates(coordinates, found.points, planes)
    draw_embedding_map(out, found.points, planes, title=found.title, pca_shares=shares)
    output.notice(
        f"{printable_name(out)}: {count_text(len(found.points), 'embedding')} by "
        f"{' and '.join(planes)}; coordinates in {printable_name(coordinates)}",
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
    help="Format of the table.",
)
_out = click.option(
    "-o", "--out", type=options.PATH, metavar="FILE", help="Write to FILE.  [default: print]"
)
_later = click.option(
    "--later", "with_later", is_flag=True, help="Include work later than the SBTKNet paper."
)


def _comparison_command(name: str, holds: str) -> click.Command:
    @click.command(
        name,
        short_help=f"Table {name[-1]}: {holds}.",
        help=f"Compare results with the SBTKNet paper's Table {name[-1]}: {holds}.\n\n"
        "RESULTS are files of 'sbtk bench map --json'; without any, only published rows are shown. "
        "Warns if rules, galleries or classes differ.",
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
        from sbtk_runtime.evaluation.report.results import read_measured

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
    help="Half of the paper's table to show: the split of the results.",
)
@_format
@_out
@options.quiet
def _table5(
    results: tuple[Path, ...], split: str, form: Format, out: Path | None, quiet: bool
) -> int:
    """Compare results with the SBTKNet paper's Table 5: the ablation.

    RESULTS are .csv files of 'sbtk train --ablation', shown as mean and spread over seeds, and
    files of 'sbtk bench map --json'; without any, only published rows are shown.
    """
    from sbtk_runtime.evaluation.report.ablation import (
        AblationResult,
        ablation_table,
        read_ablation,
    )
    from sbtk_runtime.evaluation.report.results import MeasuredMap, read_measured

    trained: list[AblationResult] = []
    runs: list[MeasuredMap] = []
    for path in results:
        if path.suffix.lower() == ".csv":
            trained += read_ablation(path)
            continue
        try:
            runs += read_measured(path)
        except BadData as problem:
            raise BadData(
                problem.found,
                f"{problem.expected}, or a .csv file of 'sbtk train --ablation'",
                f"{problem.next_step}, or: sbtk train DATA --ablation",
            ) from problem
    return _emit_table(ablation_table(trained, runs, split=split), form, out, quiet)


_table_commands = (
    _comparison_command("table2", "zero-shot retrieval on Sketchy and TU-Berlin Extended"),
    _comparison_command("table3", "generalised zero-shot retrieval"),
    _comparison_command("table4", "zero-shot retrieval on QuickDraw Extended"),
    _table5,
)


def _emit_table(table: ReportTable, form: Format, out: Path | None, quiet: bool) -> int:
    """Print or write the table, and its warnings to stderr if they are not shown."""
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
