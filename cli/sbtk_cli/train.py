"""`sbtk train`: from folders of sketches and photos to a student."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from sbtk_cli import options, output, train_options
from sbtk_runtime.errors import BadConfig
from sbtk_runtime.names import printable_name

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
    from sbtk_train.runs.run import train

    given = _given(context)
    _refuse_idle(given, is_ablation=ablation, is_resumed=resume is not None)
    with joined_team() as team:
        reporter = Reporter(as_json and team.is_first, quiet or not team.is_first)
        if ablation:
            from sbtk_cli.train_ablation import run_ablation

            if team.size > 1:
                raise BadConfig("--ablation in several processes", "one", "sbtk train --ablation")
            root = out or Path("runs") / "ablation"
            return run_ablation(
                _required(data), values, given, root, seeds, rows, reporter, as_json=as_json
            )
        config, folder = team.agreed(
            lambda: (
                _resumed(resume, data if "data" in given else None, given, values)
                if resume is not None
                else _started(_required(data), out, name, values, team.local_size, reporter)
            )
        )
        try:
            with stopping_by_signal(lambda: team.is_first and not team.has_told()) as hold:
                record = train(
                    config, folder, reporter, resume=resume is not None, on_trainer=hold, team=team
                )
        except KeyboardInterrupt:
            if team.is_first:
                output.notice(_how_to_go_on(folder))
            raise
    if team.is_first:
        output.notice(f"{folder}: {_summary(record)}", quiet=quiet)
        output.notice(f"next: sbtk export {folder}", quiet=quiet)
        if not as_json:
            output.answer(str(folder))
    return 0


def _how_to_go_on(folder: Path) -> str:
    """Returns what to type after a run was stopped."""
    from sbtk_train.runs.checkpoint import LAST

    shown = shlex.quote(printable_name(folder))
    if (folder / LAST).is_file():
        return f"saved; next: sbtk train --resume {shown}"
    return f"nothing was saved yet; start again with --out {shown}"


def _given(context: click.Context) -> list[str]:
    """Returns the names of what stands on the command line, sorted."""
    told = ParameterSource.COMMANDLINE
    return sorted(name for name in context.params if context.get_parameter_source(name) is told)


def _refuse_idle(given: Sequence[str], *, is_ablation: bool, is_resumed: bool) -> None:
    """Refuses options that would be passed over in silence."""
    if is_ablation and is_resumed:
        raise click.UsageError("An ablation goes on by itself: leave out --resume.")
    if is_ablation and "name" in given:
        raise click.UsageError("--name is of a single run; an ablation's folder is its --out.")
    if not is_ablation and ("seeds" in given or "rows" in given):
        raise click.UsageError("--seeds and --row go with --ablation.")
    if is_resumed and ("out" in given or "name" in given):
        raise click.UsageError("A run is resumed where it is: leave out --out and --name.")


def _resumed(
    folder: Path, data: Path | None, given: Sequence[str], values: dict[str, Any]
) -> tuple[TrainConfig, Path]:
    from sbtk_cli.train_resume import resumed_config
    from sbtk_train.config import read_config

    own = read_config(folder)
    return resumed_config(own, data, [name for name in given if name in values], values), folder


def _started(
    data: Path,
    out: Path | None,
    name: str | None,
    values: dict[str, Any],
    processes: int,
    reporter: Reporter,
) -> tuple[TrainConfig, Path]:
    from sbtk_train.runs.run import new_run_folder

    config = train_options.config_from(data, values, reporter, processes=processes)
    folder = out if out is not None else new_run_folder(Path("runs"), name or config.method)
    folder.mkdir(parents=True, exist_ok=True)
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
