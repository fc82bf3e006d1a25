"""Pictures of speed: a panel for each batch, a bar for each engine and precision."""

from __future__ import annotations

from sbtk_cli.bench_plots import COLOURS, GREY, INK, Axes, Panel
from sbtk_runtime.bench.latency import LatencyReport
from sbtk_runtime.bench.speed import Speed

_BAR_IN = 0.27
_FRAME_IN = 1.25
#: How solid a bar is: engines have colours, precisions shades of them.
_SOLID = {"int8": 1.0, "fp16": 0.72, "fp32": 0.45}
# The labels right of the longest bar need as much room as this share of it.
_ROOM = 0.85


def speed_panels(report: LatencyReport) -> list[Panel]:
    """Returns a panel for each batch: images per second, and what they stand beside."""
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
    """Returns the speed, how it compares, and what it costs in mAP."""
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
