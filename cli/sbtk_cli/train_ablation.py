"""`sbtk train --ablation`: every row of the study with every seed, then its table and picture."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sbtk_cli import output
from sbtk_cli.train_options import KNOBS, config_from
from sbtk_cli.train_report import Reporter, stopping_by_signal
from sbtk_runtime.errors import BadConfig
from sbtk_runtime.files import write_atomically

if TYPE_CHECKING:
    from sbtk_train.recipes import Method
    from sbtk_train.runs.ablation import Study

#: What every row has in common unless options say otherwise: what a small machine can do.
_FREEZE_UNTIL = "layer4"
_SIZE_PX = 128
#: A drawn quadruplet is four images for each sketch, so an epoch of these is longer.
_EPOCHS: dict[Method, int] = {"sbtknet": 2, "dsn": 3, "sake": 3}

#: Decided by the rows themselves.
_OF_ROWS = (
    *("method", "recipe", "dim", "seed"),
    *("metric", "identity", "knowledge", "attention", "refit"),
)


def run_ablation(
    data: Path,
    values: dict[str, Any],
    given: Collection[str],
    root: Path,
    seeds: int,
    rows: tuple[str, ...],
    reporter: Reporter,
    *,
    as_json: bool,
) -> int:
    """Runs what is missing of the study in `root`, scores it, and writes what it found there.

    The table is printed unless `as_json`: then stdout has the reporter's JSON lines alone.
    Returns the exit code. Unseen classes are looked at only when no run is missing.
    """
    from sbtk_train.runs.checkpoint import locked

    mistaken = [name for name in _OF_ROWS if name in given]
    if mistaken:
        raise BadConfig(
            f"--{mistaken[0]} with --ablation", "options that the rows of the study leave open"
        )
    study = _study(data, values, root, seeds, rows, reporter)
    _require_teacher(study)
    root.mkdir(parents=True, exist_ok=True)
    with locked(root):
        return _run_study(study, root, reporter, as_json=as_json)


def _run_study(study: Study, root: Path, reporter: Reporter, *, as_json: bool) -> int:
    from sbtk_train.runs.ablation import missing, run_study
    from sbtk_train.runs.ablation_scores import as_markdown, draw, score_runs, write_csv

    try:
        with stopping_by_signal() as hold:
            run_study(study, root, reporter, should_stop=lambda: hold.is_stopping, on_trainer=hold)
    except KeyboardInterrupt:
        output.notice("Stopped. Run the same command to go on with the study.")
        raise
    scores = score_runs(study, root, "validation", reporter)
    if not missing(study, root):
        scores += score_runs(study, root, "unseen", reporter)
    table = as_markdown(study, scores)
    write_csv(root / "ablation.csv", scores)
    write_atomically(root / "ablation.md", table.encode())
    picture = draw(study, scores, root / "ablation.png")
    reporter(f"{root}: ablation.csv, ablation.md" + (", ablation.png" if picture else ""))
    if not as_json:
        output.answer(table.rstrip())
    return 0


def _study(
    data: Path,
    values: dict[str, Any],
    root: Path,
    seeds: int,
    rows: tuple[str, ...],
    reporter: Reporter,
) -> Study:
    """Returns what the options describe, stages frozen and their maps kept unless they say so."""
    from sbtk_train.runs.ablation import Study, chosen_rows

    freeze_until = values["freeze_until"] or _FREEZE_UNTIL
    feature_folder = values["feature_folder"]
    if feature_folder is None and freeze_until != "none":
        feature_folder = root / "feature-maps"
    # The rows bring their own recipes: of the base's nothing is kept, so nothing is said of it.
    unsaid = dict.fromkeys(KNOBS) | {"knowledge": False}
    places = {"freeze_until": freeze_until, "feature_folder": feature_folder}
    return Study(
        base=config_from(data, values | unsaid | places, reporter),
        sbtknet_recipe="sbtk",
        common=_common(values),
        epochs={method: values["epochs"] or epochs for method, epochs in _EPOCHS.items()},
        seeds=tuple(range(seeds)),
        rows=chosen_rows(rows),
    )


def _require_teacher(study: Study) -> None:
    """Refuses rows that learn from a teacher where there is none, before hours of the others."""
    if study.base.weights or study.base.teacher:
        return
    recipes = {row.name: study.config(row, 0).recipe for row in study.rows}
    taught = [
        name
        for name, recipe in recipes.items()
        if getattr(recipe, "knowledge", False) or getattr(recipe, "kd_weight", 0)
    ]
    if taught:
        others = [f"--row {name}" for name in recipes if name not in taught]
        raise BadConfig(
            f"no weights and no --teacher for {', '.join(taught)}",
            "an ImageNet classifier to learn from: --weights FILE or --teacher FILE",
            " ".join(["or rows without:", *others]) if others else "",
        )


def _common(values: dict[str, Any]) -> dict[str, object]:
    """Returns the knobs that all methods share: the losses are compared, not the optimisers."""
    from sbtk_train.recipes import RECIPES

    ours = RECIPES["sbtknet"]["sbtk"]
    shared = (
        "augment",
        "optimizer",
        "learning_rate",
        "head_rate_factor",
        "weight_decay",
        "schedule",
        "warmup_steps",
        "patience",
        "average_decay",
    )
    common: dict[str, object] = {knob: getattr(ours, knob) for knob in shared}
    common |= {"train_size_px": _SIZE_PX, "final_epochs": 0, "selection": "validation-map"}
    asked = [knob for knob in KNOBS if knob not in ("epochs", *_OF_ROWS)]
    return common | {knob: values[knob] for knob in asked if values[knob] is not None}
