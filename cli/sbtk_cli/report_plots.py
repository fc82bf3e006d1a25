"""Drawings of `sbtk report`: bars of each class's AP, and embedding maps."""

from __future__ import annotations

import colorsys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sbtk_cli.bench_plots import COLOURS, GREY, check_plottable
from sbtk_runtime.errors import MissingExtra
from sbtk_runtime.files import atomic_path
from sbtk_runtime.report.embedding_map import MapPoint, Method, Plane
from sbtk_runtime.report.measured import MeasuredMap

_NAMES: dict[Method, str] = {"pca": "principal components", "umap": "UMAP"}
_MARKERS = {"sketch": "o", "photo": "x"}


def check_drawable(file: Path) -> Any:
    """Returns matplotlib's `Figure`, before there is any work done that it could not show.

    Raises:
        BadConfig: as `check_plottable`.
        MissingExtra: matplotlib is not installed.
    """
    try:
        return check_plottable(file)
    except MissingExtra as problem:
        raise MissingExtra(
            "drawing needs matplotlib, which is not installed", problem.expected, problem.next_step
        ) from problem


def draw_class_bars(file: Path, runs: Sequence[MeasuredMap]) -> None:
    """Draws the mean AP of each class, best of the first run first, the runs side by side."""
    first = runs[0].class_map
    names = sorted(first, key=lambda name: -first[name])
    names += sorted({name for run in runs for name in run.class_map} - set(first))
    figure = _figure(file, max(6.0, 2 + 0.22 * len(names) * max(1, len(runs) / 2)), 4.4)
    axes = figure.subplots()
    width = 0.8 / len(runs)
    for number, run in enumerate(runs):
        places = [place for place, name in enumerate(names) if name in run.class_map]
        axes.bar(
            [place + (number - (len(runs) - 1) / 2) * width for place in places],
            [run.class_map[names[place]] for place in places],
            width,
            color=COLOURS[number % len(COLOURS)],
            label=f"{run.name}: {run.of}",
        )
    axes.set_xticks(
        range(len(names)), [name.replace("_", " ") for name in names], rotation=60, ha="right"
    )
    axes.tick_params(axis="x", labelsize=8 if len(names) <= 30 else 6)
    axes.set_xlim(-0.6, len(names) - 0.4)
    axes.set_ylim(0, 1)
    axes.set_ylabel("mean AP of the class (plain AP)")
    axes.grid(axis="y", color="#e6e8ec", linewidth=0.7)
    axes.set_axisbelow(True)
    figure.legend(loc="outside upper left", frameon=False, fontsize=9)
    _save(figure, file)


def draw_embedding_map(
    file: Path,
    points: Sequence[MapPoint],
    planes: Mapping[Method, Plane],
    *,
    title: str,
    pca_shares: tuple[float, float] | None,
) -> None:
    """Draws the planes side by side: sketches as circles, photos as crosses, classes in colours."""
    figure = _figure(file, 6.4 * len(planes), 6.8)
    names = sorted({point.class_name for point in points})
    colours = dict(zip(names, _distinct_colours(len(names)), strict=True))
    for number, (method, plane) in enumerate(planes.items()):
        axes = figure.add_subplot(1, len(planes), number + 1)
        for kind, marker in _MARKERS.items():
            for name in names:
                rows = [
                    row
                    for row, point in enumerate(points)
                    if point.kind == kind and point.class_name == name
                ]
                label = name.replace("_", " ") if kind == "sketch" and number == 0 else None
                axes.scatter(
                    plane[rows, 0],
                    plane[rows, 1],
                    s=16,
                    marker=marker,
                    linewidths=0.9,
                    color=colours[name],
                    label=label,
                )
        axes.set_title(_NAMES[method], fontsize=10)
        axes.set_xticks([])
        axes.set_yticks([])
        if method == "pca" and pca_shares is not None:
            axes.set_xlabel(f"{pca_shares[0]:.0%} of the variance")
            axes.set_ylabel(f"{pca_shares[1]:.0%} of the variance")
    figure.suptitle(f"{title}\nsketches: circles; photos: crosses", fontsize=10)
    figure.legend(loc="outside lower center", ncols=min(6, len(names)), frameon=False, fontsize=8)
    _save(figure, file)


def _figure(file: Path, width_in: float, height_in: float) -> Any:
    figure_class = check_drawable(file)
    return figure_class(figsize=(width_in, height_in), layout="constrained", dpi=130)


def _save(figure: Any, file: Path) -> None:
    for axes in figure.axes:
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
        for side in ("left", "bottom"):
            axes.spines[side].set_color(GREY)
    with atomic_path(file) as temporary:
        figure.savefig(temporary, format=file.suffix[1:].lower())


def _distinct_colours(count: int) -> list[tuple[float, float, float]]:
    """Returns colours around the circle, neighbours of unlike lightness."""
    return [
        colorsys.hls_to_rgb(number / count, (0.36, 0.5, 0.62)[number % 3], 0.72)
        for number in range(count)
    ]
