"""`sbtk report map`: embeddings of sketches and photos in the plane."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from sbtk_cli import options, output, report_options
from sbtk_runtime.names import printable_name

if TYPE_CHECKING:
    from sbtk_cli.bench_data import Classes
    from sbtk_runtime.manifest import Precision


@click.command("map")
@report_options.of_labelled_images
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
@report_options.seed
def command(
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
    from sbtk_cli.report_plots import check_drawable, draw_embedding_map
    from sbtk_cli.report_runs import embedded_points
    from sbtk_runtime.report import embedding_map

    check_drawable(out)
    coordinates = out.with_suffix(".csv") if coordinates is None else coordinates
    options.check_output_file(coordinates)
    if method == "umap":
        embedding_map.require_umap()
    chosen = report_options.Chosen(model, engine, precision, threads, device, batch, quiet)
    found = embedded_points(
        chosen, report_options.required(data), split, classes, per_class=per_class, seed=seed
    )
    planes: dict[embedding_map.Method, embedding_map.Plane] = {}
    shares = None
    if method != "umap":
        planes["pca"], shares = embedding_map.principal_plane(found.rows)
    if method == "umap" or (method == "auto" and embedding_map.has_umap()):
        planes["umap"] = embedding_map.umap_plane(found.rows, seed)
    embedding_map.write_coordinates(coordinates, found.points, planes)
    draw_embedding_map(out, found.points, planes, title=found.title, pca_shares=shares)
    output.notice(
        f"{printable_name(out)}: {output.count_text(len(found.points), 'embedding')} by "
        f"{' and '.join(planes)}; places in {printable_name(coordinates)}",
        quiet=quiet,
    )
    return 3 if found.unreadable else 0
