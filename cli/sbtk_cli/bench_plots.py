"""Pictures of benchmark results."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sbtk_cli.options import check_output_file
from sbtk_runtime.bench.latency import LatencyReport
from sbtk_runtime.bench.map import MapReport
from sbtk_runtime.bench.search import SearchReport
from sbtk_runtime.errors import BadConfig, MissingExtra
from sbtk_runtime.files import atomic_path
from sbtk_runtime.machine import Machine

Axes = Any

INK = "#20242c"
GREY = "#8a919e"
COLOURS = ("#2f6db5", "#e0803a", "#3b9a6d", "#b5476b", "#7a63b8", "#8c8c3e")
_SUFFIXES = (".png", ".svg", ".pdf")


@dataclass(frozen=True)
class Panel:
    """One part of a picture: what draws it, and its height in inches."""

    draw: Callable[[Axes], None]
    height_in: float = 4.4


def check_plottable(file: Path) -> Any:
    """Returns matplotlib's `Figure`, which draws to files without any window system.

    Raises:
        BadConfig: the file's name ends in a format that is not drawn, or it cannot be written.
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
            "--plot needs matplotlib, which is not installed",
            "the extra 'plot'",
            'pip install "sbtk[plot]"',
        ) from problem
    return Figure


def save_plot(file: Path, panels: Sequence[Panel], machine: Machine) -> None:
    """Writes a picture of one panel below the other, the machine in small print at the foot.

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
    """Returns bars of the median of each stage, stacked, with the 95th percentile of the total."""

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
        ax.set_yticks(range(len(subjects)), ["one sketch, answered", "one photo, embedded"])
        ax.invert_yaxis()
        ax.grid(visible=False, axis="y")
        ax.set_xlim(0, 1.45 * max(stage.p95_ms for stage in report.stages))
        ax.set_xlabel("ms, median of each stage; the mark is the 95th percentile of the whole")
        ax.set_title(f"{report.model_id}: latency on {report.engine} {report.precision}")
        ax.legend(ncols=len(names), loc="center right", fontsize=8, frameon=False)

    return Panel(draw)


def recall_panel(report: SearchReport) -> Panel:
    """Returns recall against the median latency, a line for each graph."""

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
    """Returns a bar of the mean AP of each class, best first."""

    def draw(ax: Axes) -> None:
        ordered = sorted(report.class_map.items(), key=lambda item: -item[1])
        ax.bar(range(len(ordered)), [value for _, value in ordered], 0.75, color=COLOURS[0])
        mean = report.figures["mAP@all"]
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


def _plain(ax: Axes) -> None:
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        ax.spines[side].set_color(GREY)
    ax.tick_params(colors=INK, labelcolor=INK)
    ax.title.set_color(INK)
    ax.grid(axis="both", color="#e6e8ec", linewidth=0.7)
    ax.set_axisbelow(True)
