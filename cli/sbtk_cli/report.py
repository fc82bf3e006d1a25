"""`sbtk report`: the papers' tables and figures, with your results."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from sbtk_cli import options, output
from sbtk_cli.options import Function
from sbtk_runtime.errors import BadConfig, BadData
from sbtk_runtime.files import count_text, printable_name

if TYPE_CHECKING:
    from sbtk_cli.bench_data import Classes
    from sbtk_runtime.embedding.embedder import Embedder
    from sbtk_runtime.engines.base import EngineOptions
    from sbtk_runtime.evaluation.bench.map import LabelledImages, LabelledSet
    from sbtk_runtime.evaluation.report.ranked_sheet import EmbeddedImages, Panel
    from sbtk_runtime.evaluation.report.table import Format, ReportTable
    from sbtk_runtime.manifest import BundleManifest
    from sbtk_runtime.preprocess import Kind

_RANDOM_QUERIES = 4

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
        from sbtk_runtime.embedding.embedder import Embedder
        from sbtk_runtime.evaluation.report.ranked_sheet import draw_ranked_sheet
        from sbtk_runtime.files import atomic_path

        wanted = _WantedQueries(named, worst, random_count or _RANDOM_QUERIES, seed)
        with Embedder(model, engine_options) as embedder:
            panels, is_whole = _rank_panels(
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
            draw_ranked_sheet(panels).save(temporary, "PNG", optimize=True)
        queries = len(panels[0].queries)
        output.notice(f"{printable_name(out)}: {hits} hits for {queries} sketches", quiet=quiet)
        return 0 if is_whole else 3

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
    import numpy as np

    from sbtk_cli.bench_plots import check_plottable, draw_embedding_map
    from sbtk_runtime.embedding.embedder import Embedder
    from sbtk_runtime.evaluation.report import embedding_map

    check_plottable(out, "drawing")
    coordinates = out.with_suffix(".csv") if coordinates is None else coordinates
    options.check_output_file(coordinates)
    if method == "umap":
        embedding_map.require_umap()
    folder = require_data(data)
    with Embedder(model, engine_options) as embedder:
        images = _load(embedder.bundle.manifest, folder, split, classes, quiet)
        embedded = _embed_sample(embedder, images, per_class, seed, quiet)
    rows = np.concatenate([part.rows for part in embedded.values()])
    points = [
        embedding_map.MapPoint(path, kind, name)
        for kind, part in embedded.items()
        for path, name in zip(part.paths, part.classes, strict=True)
    ]
    planes: dict[embedding_map.Method, embedding_map.Plane] = {}
    shares = None
    if method != "umap":
        planes["pca"], shares = embedding_map.project_pca(rows)
    if method == "umap" or (method == "auto" and embedding_map.has_umap()):
        planes["umap"] = embedding_map.project_umap(rows, seed)
    embedding_map.write_coordinates(coordinates, points, planes)
    title = f"{embedder.model_id}: {images.of}"
    draw_embedding_map(out, points, planes, title=title, pca_shares=shares)
    output.notice(
        f"{printable_name(out)}: {count_text(len(points), 'embedding')} by "
        f"{' and '.join(planes)}; coordinates in {printable_name(coordinates)}",
        quiet=quiet,
    )
    return 3 if any(part.unreadable for part in embedded.values()) else 0


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


@dataclass(frozen=True)
class _WantedQueries:
    """The query sketches: named ones, or else the `worst`, or else `random` ones."""

    named: tuple[Path, ...]
    worst: int | None
    random: int
    seed: int

    def choose(self, sketches: LabelledImages) -> list[int] | None:
        """Return the indices of the query sketches; `None` if all have to be tried."""
        from sbtk_runtime.evaluation.report.ranked_sheet import draw_queries, find_queries

        if self.named:
            return find_queries(sketches, self.named)
        if self.worst is not None:
            return None
        return draw_queries(len(sketches.paths), self.random, self.seed)


def _rank_panels(
    embedder: Embedder,
    data: Path,
    split: str | None,
    classes: Classes,
    wanted: _WantedQueries,
    *,
    hits: int,
    with_generalised: bool,
    quiet: bool,
) -> tuple[list[Panel], bool]:
    """Search for sketches of a data set, and return the panels of a figure.

    Args:
        embedder: of the model.
        data: folder of the data set.
        split: split that defines the unseen classes; by default the model's own.
        classes: `unseen` or `validation`.
        wanted: the query sketches.
        hits: number of photos for each sketch.
        with_generalised: whether to add a panel with the photos of seen classes in the gallery.
        quiet: print no progress and no notices.

    Returns:
        The panels, and whether all images could be read.

    Raises:
        BadData: no images of the classes, photos of a single class, or no photos of seen classes
            for the second panel.
    """
    from sbtk_cli.bench_data import load_labelled_set
    from sbtk_runtime.evaluation.protocol import Protocol, require_contrast
    from sbtk_runtime.evaluation.report.ranked_sheet import (
        compute_average_precisions,
        find_worst_queries,
        make_panel,
        select_images,
    )

    manifest = embedder.bundle.manifest
    images = _load(manifest, data, split, classes, quiet)
    gallery = images.photos
    if with_generalised:
        generalised = Protocol(setting="generalised-all")
        gallery = load_labelled_set(data, manifest, split, classes, generalised).photos
        if len(gallery.paths) == len(images.photos.paths):
            raise BadData(
                "the data set has no photos of seen classes",
                "photos of seen classes for the second panel",
                "omit that panel: --no-generalised",
            )
    require_contrast(images.sketches.labels, images.photos.labels, images.photos.classes)
    chosen = wanted.choose(images.sketches)
    sketches = images.sketches if chosen is None else select_images(images.sketches, chosen)
    queries = _embed(embedder, sketches, "sketch", quiet)
    every = _embed(embedder, gallery, "photo", quiet)
    is_whole = not (queries.unreadable or every.unreadable)
    measured = set(images.photos.classes)
    own = every.select([row for row, name in enumerate(every.classes) if name in measured])
    if chosen is None:
        queries = queries.select(
            find_worst_queries(compute_average_precisions(queries, own), wanted.worst or 1)
        )
    galleries = {f"Zero-shot: {len(own.paths):,} photos of {images.of}": own}
    if with_generalised:
        names = len(set(every.classes))
        galleries[f"Generalised: {len(every.paths):,} photos of {names} classes"] = every
    panels = [make_panel(title, queries, part, hits) for title, part in galleries.items()]
    return panels, is_whole


def _load(
    manifest: BundleManifest, data: Path, split: str | None, classes: Classes, quiet: bool
) -> LabelledSet:
    """Return the images of the classes, after printing their notices."""
    from sbtk_cli.bench_data import load_labelled_set

    images = load_labelled_set(data, manifest, split, classes)
    for text in images.notices:
        output.notice(text, quiet=quiet)
    return images


def _embed_sample(
    embedder: Embedder, images: LabelledSet, per_class: int, seed: int, quiet: bool
) -> dict[Kind, EmbeddedImages]:
    """Embed at most `per_class` sketches and photos of each class, in order."""
    import numpy as np

    from sbtk_runtime.evaluation.report.ranked_sheet import select_images

    def sample(part: LabelledImages) -> LabelledImages:
        random = np.random.default_rng(seed)
        labels = np.asarray(part.labels, dtype=np.int64)
        kept: list[int] = []
        for label in np.unique(labels):
            places = np.flatnonzero(labels == label)
            count = min(per_class, len(places))
            kept += sorted(random.choice(places, count, replace=False).tolist())
        return select_images(part, kept)

    return {
        "sketch": _embed(embedder, sample(images.sketches), "sketch", quiet),
        "photo": _embed(embedder, sample(images.photos), "photo", quiet),
    }


def _embed(embedder: Embedder, images: LabelledImages, kind: Kind, quiet: bool) -> EmbeddedImages:
    from sbtk_runtime.evaluation.report.ranked_sheet import embed_labelled

    with output.progress(f"{kind}s", quiet=quiet) as advance:
        found = embed_labelled(embedder, images, kind, advance)
    for line in found.unreadable:
        output.notice(f"skipped {line}", quiet=quiet)
    return found


for _command in (*_table_commands, *_figure_commands):
    command.add_command(_command)
