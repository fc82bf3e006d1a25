"""Plots of benchmark and evaluation results."""

from __future__ import annotations

import colorsys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sbtk_cli.options import check_output_file
from sbtk_runtime.errors import BadConfig, MissingExtra
from sbtk_runtime.evaluation.bench.latency import LatencyReport
from sbtk_runtime.evaluation.bench.map import MapReport
from sbtk_runtime.evaluation.bench.search import SearchReport
from sbtk_runtime.evaluation.bench.speed import Speed
from sbtk_runtime.evaluation.report.embedding_map import MapPoint, Method, Plane
from sbtk_runtime.evaluation.report.results import MeasuredMap
from sbtk_runtime.files import atomic_path
from sbtk_runtime.machine import Machine

Axes = Any

INK = "#20242c"
GREY = "#8a919e"
COLOURS = ("#2f6db5", "#e0803a", "#3b9a6d", "#b5476b", "#7a63b8", "#8c8c3e")
_SUFFIXES = (".png", ".svg", ".pdf")


@dataclass(frozen=True)
class Panel:
    """A part of a figure: the function that draws it, and its height in inches."""

    draw: Callable[[Axes], None]
    height_in: float = 4.4


def check_plottable(file: Path, what: str = "--plot") -> Any:
    """Return matplotlib's `Figure`, which needs no window system; errors say that `what` needs it.

    Raises:
        BadConfig: unsupported suffix, or the file cannot be written.
        MissingExtra: matplotlib is not installed.
    """
    if file.suffix.lower() not in _SUFFIXES:
        raise BadConfig(
            f"a plot named {file.name!r}", f"a name that ends in {', '.join(_SUFFIXES)}"
        )
    check_output_file(file)
    try:
        from matplotlib.figure import Figure
    except ImportError as problem:
        raise MissingExtra(
            f"{what} needs matplotlib, which is not installed",
            "the extra 'plot'",
            'pip install "sbtk[plot]"',
        ) from problem
    return Figure


def save_plot(file: Path, panels: Sequence[Panel], machine: Machine) -> None:
    """Write a figure of panels, one below the other, with the machine in small print.

    Raises:
        BadConfig, MissingExtra: as `check_plottable`.
    """
    figure_class = check_plottable(file)
    heights = [panel.height_in for panel in panels]
    figure = figure_class(figsize=(9, sum(heights) + 0.4), layout="constrained", dpi=130)
    grid = figure.add_gridspec(len(panels), 1, height_ratios=heights)
    axes = [figure.add_subplot(grid[row, 0]) for row in range(len(panels))]
    for panel, ax in zip(panels, axes, strict=True):
        _plain(ax)
        panel.draw(ax)
    figure.supxlabel("\n".join(machine.lines()[:2]), fontsize=7.5, color=GREY, x=0.02, ha="left")
    with atomic_path(file) as temporary:
        figure.savefig(temporary, format=file.suffix[1:].lower())


def stages_panel(report: LatencyReport) -> Panel:
    """Return stacked bars of the stages' medians, with the 95th percentile of the total."""

    def draw(ax: Axes) -> None:
        subjects = list(dict.fromkeys(stage.subject for stage in report.stages))
        names = list(dict.fromkeys(s.stage for s in report.stages if s.stage != "total"))
        for row, subject in enumerate(subjects):
            left = 0.0
            for stage in report.stages:
                if stage.subject != subject or stage.stage == "total":
                    continue
                colour = COLOURS[names.index(stage.stage)]
                label = stage.stage if row == 0 else None
                ax.barh(row, stage.p50_ms, left=left, height=0.55, color=colour, label=label)
                left += stage.p50_ms
            total = next(s for s in report.stages if (s.subject, s.stage) == (subject, "total"))
            ax.plot([total.p95_ms], [row], marker="|", markersize=22, color=INK, linestyle="")
            ax.annotate(
                f"p50 {total.p50_ms:.1f} ms, p95 {total.p95_ms:.1f} ms",
                (max(left, total.p95_ms), row),
                xytext=(8, 0),
                textcoords="offset points",
                va="center",
                fontsize=9,
            )
        ax.set_yticks(range(len(subjects)), ["query of one sketch", "embedding of one photo"])
        ax.invert_yaxis()
        ax.grid(visible=False, axis="y")
        ax.set_xlim(0, 1.45 * max(stage.p95_ms for stage in report.stages))
        ax.set_xlabel("ms, median of each stage; mark: 95th percentile of the total")
        ax.set_title(f"{report.model_id}: latency on {report.engine} {report.precision}")
        ax.legend(ncols=len(names), loc="center right", fontsize=8, frameon=False)

    return Panel(draw)


def recall_panel(report: SearchReport) -> Panel:
    """Return recall by median latency, a line for each graph."""

    def draw(ax: Axes) -> None:
        names = list(dict.fromkeys(point.name for point in report.points if point.ef is not None))
        for name, colour in zip(names, COLOURS, strict=False):
            points = [point for point in report.points if point.name == name]
            x, y = [p.p50_ms for p in points], [p.recall for p in points]
            ax.plot(x, y, marker="o", markersize=5, color=colour, label=name)
            for point in points:
                ax.annotate(
                    f"ef {point.ef}",
                    (point.p50_ms, point.recall),
                    xytext=(4, -11) if name == names[0] else (-26, 7),
                    textcoords="offset points",
                    fontsize=7.5,
                    color=colour,
                )
        for point in report.points:
            if point.ef is None:
                ax.axvline(point.p50_ms, color=GREY, linestyle="--", label=point.name)
        ax.set_xscale("log")
        ax.xaxis.get_major_locator().set_params(subs=(1, 2, 5))
        ax.xaxis.set_major_formatter("{x:g}")
        ax.xaxis.set_minor_formatter("")
        ax.set_ylim(top=1.004)
        ax.set_xlabel("ms for one query on one thread, median")
        ax.set_ylabel(f"recall@{report.k} by score")
        ax.set_title(f"Search over {report.count:,} x {report.dim} vectors")
        ax.legend(fontsize=8, framealpha=0.9, edgecolor="none", loc="lower right")

    return Panel(draw)


def classes_panel(report: MapReport) -> Panel:
    """Return bars of the mean AP of each class, best first."""

    def draw(ax: Axes) -> None:
        ordered = sorted(report.class_map.items(), key=lambda item: -item[1])
        ax.bar(range(len(ordered)), [value for _, value in ordered], 0.75, color=COLOURS[0])
        mean = report.metrics["mAP@all"]
        ax.axhline(mean, color=COLOURS[1], linewidth=1.4)
        ax.text(
            0.995,
            mean + 0.015,
            f"mAP@all {mean:.3f}",
            transform=ax.get_yaxis_transform(),
            ha="right",
            color=COLOURS[1],
            fontsize=9,
        )
        names = [name.replace("_", " ") for name, _ in ordered]
        size = 8 if len(names) <= 30 else 5
        ax.set_xticks(range(len(names)), names, rotation=60, ha="right", fontsize=size)
        ax.set_ylim(0, 1)
        ax.set_ylabel("mean AP of the class")
        ax.grid(visible=False, axis="x")
        protocol = report.protocol.partition(";")[0]
        ax.set_title(f"{report.model_id} {report.precision}\n{protocol}", fontsize=10)

    return Panel(draw)


def _open_frame(ax: Axes) -> None:
    """Leave the frame open at the top and on the right."""
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        ax.spines[side].set_color(GREY)


def _plain(ax: Axes) -> None:
    _open_frame(ax)
    ax.tick_params(colors=INK, labelcolor=INK)
    ax.title.set_color(INK)
    ax.grid(axis="both", color="#e6e8ec", linewidth=0.7)
    ax.set_axisbelow(True)


_BAR_IN = 0.27
_FRAME_IN = 1.25
#: Opacity of bars: a colour for each engine, a shade for each precision.
_SOLID = {"int8": 1.0, "fp16": 0.72, "fp32": 0.45}
# Room for labels right of the longest bar, as a share of its length.
_ROOM = 0.85


def speed_panels(report: LatencyReport) -> list[Panel]:
    """Return a panel for each batch size: images per second, with reference lines."""
    batches = list(dict.fromkeys(point.batch for point in report.throughput))
    engines = list(
        dict.fromkeys(point.engine for point in report.throughput if point.role == "engine")
    )
    colours = {name: COLOURS[index % len(COLOURS)] for index, name in enumerate(engines)}
    return [_speed_panel(report, batch, colours) for batch in batches]


def _speed_panel(report: LatencyReport, batch: int, colours: dict[str, str]) -> Panel:
    points = [point for point in report.throughput if point.batch == batch]
    points.sort(key=lambda point: -point.images_per_s)

    def draw(ax: Axes) -> None:
        longest = max(point.images_per_s for point in points)
        for row, point in enumerate(points):
            is_engine = point.role == "engine"
            ax.barh(
                row,
                point.images_per_s,
                0.74,
                color=colours[point.engine] if is_engine else GREY,
                alpha=_SOLID.get(point.precision, 1.0) if is_engine else 0.6,
            )
            ax.annotate(
                _label(point),
                (point.images_per_s, row),
                xytext=(5, 0),
                textcoords="offset points",
                va="center",
                fontsize=8,
                color=INK,
                bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.0, "alpha": 0.85},
            )
        right = longest * (1 + _ROOM)
        for floor in report.floors:
            at_floor = 1e3 / floor.ms
            if at_floor < right and any(point.device == "cpu" for point in points):
                ax.axvline(at_floor, color=INK, linestyle=":", linewidth=1.1, zorder=0.5)
                ax.annotate(
                    f"{floor.kind} floor {at_floor:.0f}/s",
                    (at_floor, 1.0),
                    xycoords=("data", "axes fraction"),
                    xytext=(0, 3),
                    textcoords="offset points",
                    ha="center",
                    fontsize=7.5,
                    color=INK,
                )
        ax.set_yticks(range(len(points)), [point.name for point in points], fontsize=8.5)
        ax.invert_yaxis()
        ax.set_xlim(0, right)
        ax.grid(visible=False, axis="y")
        ax.set_xlabel("images per second")
        title = f"{report.model_id}: batch {batch}, {report.threads} threads, engine alone"
        ax.set_title(title, pad=18 if report.floors else 6)

    return Panel(draw, _FRAME_IN + _BAR_IN * len(points))


def _label(point: Speed) -> str:
    """Return the speed, its ratios to the baselines, and the difference in mAP."""
    parts = [
        f"{point.images_per_s:,.1f}/s"
        if point.images_per_s < 100
        else f"{point.images_per_s:,.0f}/s"
    ]
    for times, of in ((point.times_eager, "eager"), (point.times_compiled, "compiled")):
        if times is not None and point.role != of:
            parts.append(f"{times:.1f}x {of}")
    if point.times_floor is not None:
        parts.append(f"{point.times_floor:.2f}x floor")
    if point.map_difference is not None:
        parts.append(f"mAP {point.map_difference:+.4f}")
    return "  ".join(parts)


_NAMES: dict[Method, str] = {"pca": "principal components", "umap": "UMAP"}
_MARKERS = {"sketch": "o", "photo": "x"}


def draw_class_bars(file: Path, runs: Sequence[MeasuredMap]) -> None:
    """Draw the mean AP of each class, sorted by the first run, with runs side by side."""
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
    """Draw the maps side by side: sketches as circles, photos as crosses, a colour per class."""
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
    figure_class = check_plottable(file, "drawing")
    return figure_class(figsize=(width_in, height_in), layout="constrained", dpi=130)


def _save(figure: Any, file: Path) -> None:
    for axes in figure.axes:
        _open_frame(axes)
    with atomic_path(file) as temporary:
        figure.savefig(temporary, format=file.suffix[1:].lower())


def _distinct_colours(count: int) -> list[tuple[float, float, float]]:
    """Return hues around the circle, neighbours with different lightness."""
    return [
        colorsys.hls_to_rgb(number / count, (0.36, 0.5, 0.62)[number % 3], 0.72)
        for number in range(count)
    ]
