"""`sbtk train`: from folders of sketches and photos to a student."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from sbtk_cli import options, output, train_options
from sbtk_runtime.errors import BadConfig

if TYPE_CHECKING:
    from sbtk_cli.train_report import Reporter
    from sbtk_train.config import TrainConfig


@click.command()
@click.argument("data", type=options.PATH, envvar="SBTK_DATA", required=False)
@train_options.training
@click.option("--name", metavar="NAME", help="Of the run folder.  [default: the method]")
@click.option(
    "--out", type=options.PATH, metavar="RUN", help="Run folder.  [default: runs/<date>-<name>]"
)
@click.option("--resume", type=options.PATH, metavar="RUN", help="Go on with a stopped run.")
@click.option(
    "--ablation",
    is_flag=True,
    help="Train every row of the ablation study with every seed; goes on where it was stopped.",
)
@click.option(
    "--seeds",
    type=click.IntRange(min=1),
    default=3,
    show_default=True,
    help="With --ablation: seeds of each row.",
)
@click.option(
    "--row", "rows", multiple=True, metavar="NAME", help="With --ablation: only this row; repeat."
)
@click.option("--json", "as_json", is_flag=True, help="Print a JSON line for each epoch.")
@click.option("--quiet", is_flag=True, help="Print no progress.")
@click.pass_context
def command(
    context: click.Context,
    /,
    data: Path | None,
    resume: Path | None,
    out: Path | None,
    name: str | None,
    ablation: bool,
    seeds: int,
    rows: tuple[str, ...],
    as_json: bool,
    quiet: bool,
    **values: Any,
) -> int:
    """Train a model on sketches and photos.

    They lie in DATA/{sketch,photo}/<class>/*, or as Sketchy Ext, TU-Berlin Ext and QuickDraw Ext
    are published ('sbtk data check DATA' says what it sees). Classes of the split are never
    looked at. Ten seen classes, drawn by a fixed seed, are kept for validation; the student that
    is best on them is kept. A stopped or killed run goes on with --resume and ends as it would
    have.

    Without DATA, trains on what SBTK_DATA names.

    On several GPUs: torchrun --nproc-per-node N -m sbtk_cli train DATA. The student is the one that
    a single process makes; a batch is shared, not multiplied.
    """
    from sbtk_cli.train_report import Reporter, stopping_by_signal
    from sbtk_train.distributed import joined_team
    from sbtk_train.run import train

    given = {
        name for name in values if context.get_parameter_source(name) is ParameterSource.COMMANDLINE
    }
    with joined_team() as team:
        reporter = Reporter(as_json and team.is_first, quiet or not team.is_first)
        if ablation:
            from sbtk_cli.train_ablation import run_ablation

            if resume is not None:
                raise BadConfig(
                    "--ablation with --resume", "one of them", "an ablation goes on by itself"
                )
            if team.size > 1:
                raise BadConfig("--ablation in several processes", "one", "sbtk train --ablation")
            root = out or Path("runs") / "ablation"
            return run_ablation(_required(data), values, given, root, seeds, rows, reporter)
        is_given = context.get_parameter_source("data") is ParameterSource.COMMANDLINE
        config, folder = team.agreed(
            lambda: (
                _resumed(resume, data if is_given else None, sorted(given), values)
                if resume is not None
                else _started(_required(data), out, name, values, team.local_size, reporter)
            )
        )
        with stopping_by_signal(lambda: team.is_first and not team.has_told()) as hold:
            record = train(
                config, folder, reporter, resume=resume is not None, on_trainer=hold, team=team
            )
    if team.is_first:
        output.notice(f"{folder}: {_summary(record)}", quiet=quiet)
        output.notice(f"next: sbtk export {folder}", quiet=quiet)
        if not as_json:
            output.answer(str(folder))
    return 0


def _resumed(
    folder: Path, data: Path | None, given: list[str], values: dict[str, Any]
) -> tuple[TrainConfig, Path]:
    from sbtk_cli.train_resume import require_same
    from sbtk_train.config import read_config

    config = read_config(folder)
    require_same(config, data, given, values)
    return config, folder


def _started(
    data: Path,
    out: Path | None,
    name: str | None,
    values: dict[str, Any],
    processes: int,
    reporter: Reporter,
) -> tuple[TrainConfig, Path]:
    from sbtk_train.run import new_run_folder

    config = train_options.config_from(data, values, reporter, processes=processes)
    folder = out if out is not None else new_run_folder(Path("runs"), name or config.method)
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / "last.safetensors").exists():
        raise BadConfig(
            f"{folder} already holds a run", "a new folder", f"sbtk train --resume {folder}"
        )
    return config, folder


def _required(data: Path | None) -> Path:
    if data is None:
        raise BadConfig("no data to train on", "a folder, or SBTK_DATA", "sbtk train DATA")
    return data


def _summary(record: dict[str, Any]) -> str:
    best = record.get("best", {})
    if "validation_map" in best:
        classes = len(record["validation_classes"])
        return (
            f"validation mAP@all {best['validation_map']:.4f} "
            f"({classes} seen classes kept from training)"
        )
    return f"mAP@all {best.get('held_out_map', float('nan')):.4f} of held-out sketches"
