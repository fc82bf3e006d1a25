"""A picture of a run's figures over its epochs."""

from __future__ import annotations

from pathlib import Path

from sbtk_runtime.files import atomic_path


def draw_curves(history: list[dict[str, float]], folder: Path) -> Path | None:
    """Writes `curves.png` of losses and mAP; `None` without matplotlib or epochs.

    Terms that the method does not have are left out, and so is what was not validated.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return None
    if not history:
        return None
    epochs = [row["epoch"] for row in history]
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    losses, quality = figure.subplots(1, 2)
    for name in ("loss", "metric", "identity", "knowledge", "contrastive", "memory"):
        if name in history[0]:
            losses.plot(epochs, [row[name] for row in history], marker="o", ms=3, label=name)
    losses.set(xlabel="epoch", title="training loss", ylim=(0, None))
    for name, label in (
        ("validation_map", "classes kept from training"),
        ("held_out_map", "held-out sketches of training classes"),
    ):
        if name in history[0]:
            quality.plot(epochs, [row[name] for row in history], marker="o", ms=3, label=label)
    quality.set(xlabel="epoch", title="mAP@all, seen classes", ylim=(0, 1))
    for axes in (losses, quality):
        axes.grid(alpha=0.3)
        axes.legend(frameon=False, fontsize=8)
    path = folder / "curves.png"
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
    return path
